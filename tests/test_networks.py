import pathlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import NAMES, assert_is, find, made, through_file, with_prefix
from torch.optim.swa_utils import AveragedModel

from ssd import containers, networks
from ssd.errors import CheckpointError

PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.",
    "net.",
    "ema_model.",
    "student.",
    "1.",
    "_forward_module.",
    "ssd.",
)
HOLDERS = (
    "state_dict",
    "model_state_dict",
    "net",
    "network",
    "model_ema",
    "ema_state_dict",
    "weights",
    "any",
)
COMPANY = {
    "epoch": 3,
    "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
    "pytorch-lightning_version": "2.5.0",
    "loss": [0.5, 0.25],
    "n": torch.tensor(4),
}


@given(
    prefixes=st.lists(st.sampled_from(PREFIXES), max_size=4),
    holders=st.lists(st.sampled_from(HOLDERS), max_size=4),
    counter=st.sampled_from([None, "n_averaged", "num_updates", "module.n_averaged", "initted"]),
    company=st.lists(st.sampled_from(sorted(COMPANY)), unique=True),
)
def test_any_nesting_of_wrappers_and_containers_is_read(prefixes, holders, counter, company):
    content = with_prefix("".join(prefixes), made())
    if counter:
        content[counter] = torch.tensor(7)
    for holder in holders:
        content = {key: COMPANY[key] for key in company} | {holder: content}
    assert_is(find(content), made())


def test_wrappers_within_a_name_are_left_out():
    inner = {key.replace("extractor.feature", "extractor._orig_mod.feature"): v for key, v in made().items()}
    assert any("_orig_mod" in key for key in inner)
    assert_is(find(inner), made())


def test_names_that_would_collide_stay_as_they_are():
    other = made(1)
    with pytest.raises(CheckpointError, match=r"holds 2 networks: \*, module\.\*"):
        find(made() | with_prefix("module.", other))
    network = find(with_prefix("module.", made()) | {"loc.0.weight": other["loc.0.weight"]})
    assert_is(network, made())
    assert list(network.beside) == ["loc.0.weight"]


@pytest.mark.parametrize(
    "content",
    [
        lambda model, average: {"model": model, "ema": average, "updates": 3},
        lambda model, average: {"epoch": 1, "arch": "ssd", "state_dict": model, "state_dict_ema": average},
        lambda model, average: {"ema": {"module": average}, "model": model},
        lambda model, average: {"model": model, "model_ema": average, "best": model},
        lambda model, average: {"model": model, "average": average},  # a run's state.pt
        lambda model, average: {"model": model, "average_model": with_prefix("module.", average)},
        lambda model, average: {
            "state_dict": with_prefix("model.", model) | with_prefix("ema.module.", average)
        },
        lambda model, average: with_prefix("online_model.", model) | with_prefix("ema_model.", average),
        lambda model, average: model | with_prefix("ema.", average),
        lambda model, average: {"weights": model, "swa_state_dict": average},
        lambda model, average: {"state_dict": average, "current_model_state": model, "averaging_state": {}},
    ],
)
def test_the_average_is_read_where_there_are_both(content):
    assert_is(find(content(made(), made(1))), made(1))


def test_an_average_of_parameters_alone_has_the_models_statistics():
    shadow = {key: value for key, value in made(1).items() if "running" not in key}
    network = find({"model": made(), "ema": {"decay": 0.99, "shadow": shadow}})
    assert_is(network, made() | shadow)


def test_a_name_that_merely_contains_the_letters_is_no_average():
    with pytest.raises(CheckpointError, match="2 networks"):
        find({"schema": made(), "semantic": made(1)})


def test_the_same_tensors_twice_are_one_network(tmp_path):
    model = made()
    content = through_file(tmp_path, {"state_dict": dict(model), "model": dict(model), "best": model})
    assert_is(find(content), model)


@pytest.mark.parametrize(
    "content",
    [
        {"best_state_dict": made(), "last_state_dict": made(1)},
        {"runs": {"a": {"model": made()}, "b": {"model": made(1)}}},
        with_prefix("student.", made()) | with_prefix("teacher.", made(1)),
        {"state_dict": with_prefix("module.student.", made()) | with_prefix("module.teacher.", made(1))},
        made() | with_prefix("other.", made(1)),
        [made(), made(1)],
    ],
)
def test_of_several_networks_the_advice_saves_one(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save([content, np.float64(1), np.arange(3)], "both.ckpt")
    with pytest.raises(CheckpointError, match="holds 2 networks") as caught:
        networks.find_network(pathlib.Path("both.ckpt"), containers.read(pathlib.Path("both.ckpt"))[0])
    exec(str(caught.value).split("as by: ")[1], {})
    found = find(containers.read(pathlib.Path("both-weights.pt"))[0])
    assert any(torch.equal(found.tensors["conf.0.weight"], made(seed)["conf.0.weight"]) for seed in (0, 1))


def test_containers_that_hold_themselves_or_are_very_many_end(tmp_path):
    loop = {"model": made()}
    loop["self"] = loop
    wide = [[[[[]] * 1000] * 1000] * 1000] * 1000
    assert_is(find({"wide": wide, "loop": loop}), made())


def torchvision_keys(name):
    import torchvision.models.detection as models

    with torch.device("meta"):
        return getattr(models, name)(weights=None, weights_backbone=None).state_dict()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ssd300_vgg16", "torchvision's ssd300_vgg16"),
        ("ssdlite320_mobilenet_v3_large", "torchvision's ssdlite320"),
        ("fasterrcnn_resnet50_fpn", "torchvision's Faster R-CNN"),
        ("retinanet_resnet50_fpn", "torchvision's RetinaNet"),
        ("fcos_resnet50_fpn", "torchvision's FCOS"),
    ],
)
def test_other_networks_are_told_by_name(name, told):
    with pytest.raises(CheckpointError, match=f"not an SSD300 with a ResNet trunk; .*those of {told};"):
        find({"model": torchvision_keys(name)})


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["vgg.0.weight", "L2Norm.weight", "extras.0.weight", "loc.0.weight", "conf.0.weight"], "amdegroot"),
        (["backbone.vgg.0.weight", "box_head.predictor.cls_headers.0.weight"], r"lufficc's SSD \(VGG16\)"),
        (["model.layer1.0.weight", "additional_blocks.0.0.weight", "conf.0.weight"], "MLPerf"),
        (
            ["conv1.weight", "layer1.0.conv1.weight", "layer3.0.conv1.weight", "fc.weight"],
            "--backbone-weights",
        ),
        (NAMES[:2], "trunk, without its heads"),
    ],
)
def test_other_networks_of_which_only_names_are_known(names, told):
    with pytest.raises(CheckpointError, match=f"named as those of .*{told}"):
        find(with_prefix("module.", {name: torch.zeros(2) for name in names}))


def test_a_network_that_nobody_knows_is_told_by_its_first_names():
    with pytest.raises(CheckpointError, match=r"trunk; it begins with a, b, c\. Pass weights of"):
        find({key: torch.zeros(1) for key in "abcd"})


def test_the_state_of_torchs_own_average_is_read():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conf = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
            self.feature_extractor = torch.nn.Module()
            self.feature_extractor.feature_extractor = torch.nn.Sequential(torch.nn.Linear(2, 2))

    net = Net()
    for content in (AveragedModel(net).state_dict(), {"module": AveragedModel(net).state_dict()}):
        assert_is(find(content), net.state_dict())


def test_very_many_networks_are_told_in_time():
    with pytest.raises(CheckpointError, match="holds at least 20 networks") as caught:
        find({f"{number}.{key}": value for number in range(20_000) for key, value in made().items()})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "content",
    [
        {"\x1b[31mred\n" * 9: torch.zeros(2)},
        {"\ud800" * 999: 1},
        {"\r": made(), "a" * 10**6: made(1)},
        {"\x07": []},
    ],
)
def test_names_of_a_file_are_told_in_a_line_that_a_terminal_can_show(content):
    with pytest.raises(CheckpointError) as caught:
        find(content)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
