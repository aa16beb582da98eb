import sys
import types

import pytest
import torch
from torch import nn
from training import CPU, SGD

from ssd.model import SSD
from ssd.train.optim import freeze, make_optimizer, parameter_groups, update_average


@pytest.mark.parametrize("frozen", [0, 2])
def test_each_parameter_is_in_one_group_and_norms_and_biases_do_not_decay(frozen):
    model = SSD(3, "resnet18")
    freeze(model, frozen)
    decayed, plain = parameter_groups(model, 5e-4)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (5e-4, 0)
    ids = [id(each) for group in (decayed, plain) for each in group["params"]]
    assert sorted(ids) == sorted(id(each) for each in model.parameters() if each.requires_grad)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert {id(module.weight), id(module.bias)}.isdisjoint(map(id, decayed["params"]))
        if isinstance(module, nn.Conv2d) and module.weight.requires_grad:
            assert id(module.weight) in map(id, decayed["params"])


def test_the_average_by_hand():
    model, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0), average.weight.data.fill_(0.0)
    update_average(average, model, 0.9, step=0)
    assert average.weight.item() == pytest.approx(0.9)  # (1 + 0) / (10 + 0) of the old
    average.weight.data.fill_(0.0)
    update_average(average, model, 0.9, step=10_000)
    assert average.weight.item() == pytest.approx(0.1)


def test_apex_is_used_on_cuda_where_it_can_be_imported(monkeypatch):
    made = []
    apex = types.ModuleType("apex")
    apex.optimizers = types.ModuleType("apex.optimizers")
    apex.optimizers.FusedSGD = lambda groups, **options: made.append((groups, options)) or "fused"
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex.optimizers)
    model = SSD(3, "resnet18")
    assert make_optimizer(model, torch.device("cuda"), **SGD) == "fused"
    ((groups, options),) = made
    assert options == {"lr": 0.02, "momentum": 0.9}
    assert [group["weight_decay"] for group in groups] == [5e-4, 0.0]
    assert isinstance(make_optimizer(model, CPU, **SGD), torch.optim.SGD)


def test_a_left_out_first_step_leaves_no_trace(monkeypatch):
    """torch's fused SGD would start from whatever the memory held."""
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: torch.full_like(args[0], 1e20))
    model = nn.Linear(3, 3)
    optimizer = make_optimizer(model, CPU, **SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.zeros(()))  # a scaler begins with the first loss
    before = model.weight.detach().clone()
    for gradient in (torch.inf, 1.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update(1.0)
        if gradient == torch.inf:
            assert torch.equal(model.weight, before)
    torch.testing.assert_close(model.weight, before - 0.02 * (1 + 5e-4 * before))
