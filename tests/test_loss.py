import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import waiting_for_cuda_fails
from hypothesis import given, settings

from ssd.boxes import LAYOUTS, encode, match
from ssd.loss import LOSSES, BatchMultiBoxLoss, MultiBoxLoss

DEFAULT_BOXES = LAYOUTS["300"].default_boxes()


def published_inputs(figures):
    random = np.random.RandomState(2001)
    loc = torch.tensor(random.standard_normal((4, 4, 8732)).astype(np.float32))
    conf = torch.tensor(random.standard_normal((4, 81, 8732)).astype(np.float32))
    boxes = torch.stack([torch.tensor(figures[f"encode{i}/out_boxes_xywh"]) for i in range(4)])
    labels = torch.stack([torch.tensor(figures[f"encode{i}/out_labels"]).long() for i in range(4)])
    return loc, conf, boxes, labels


def total(losses):
    return (losses.loc + losses.conf).mean()


def test_value_and_gradients_equal_the_published_loss(figures):
    loc, conf, boxes, labels = published_inputs(figures)
    loc.requires_grad_(), conf.requires_grad_()
    loss = total(MultiBoxLoss(DEFAULT_BOXES)(loc, conf, boxes, labels))
    np.testing.assert_allclose(loss.item(), figures["loss/value"], rtol=1e-6)
    loss.backward()
    np.testing.assert_allclose([loc.grad.norm(), conf.grad.norm()], figures["loss/grad_norms"], rtol=1e-5)


def oracle(loc, conf, boxes, labels, defaults):
    """The loss of one image, box by box."""
    positives = [p for p in range(len(labels)) if labels[p] > 0]
    if not positives:
        return 0.0
    surprise = -conf.log_softmax(0)
    value = 0.0
    for p in positives:
        difference = (loc[:, p] - encode(boxes[p], defaults[p])).abs()
        value += sum(0.5 * d * d if d < 1 else d - 0.5 for d in difference.tolist())
        value += surprise[labels[p], p].item()
    negatives = sorted((surprise[0, p].item() for p in range(len(labels)) if labels[p] == 0), reverse=True)
    return (value + sum(negatives[: 3 * len(positives)])) / len(positives)


@st.composite
def batches(draw):
    """Default boxes, and of three images raw loc and conf, matched boxes and labels."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    count, classes, share = draw(st.integers(2, 40)), draw(st.integers(2, 5)), draw(st.floats(0, 1))
    defaults = torch.rand(count, 4, generator=random) * 0.5 + 0.1
    loc = torch.randn(3, 4, count, generator=random) * 2
    conf = torch.randn(3, classes, count, generator=random) * 3
    boxes = torch.rand(3, count, 4, generator=random) * 0.5 + 0.1
    labels = torch.randint(1, classes, (3, count), generator=random)
    labels *= torch.rand(3, count, generator=random) < share
    return defaults, loc, conf, boxes, labels


@settings(max_examples=60, deadline=None)
@given(batches())
def test_equals_a_slow_oracle(batch):
    defaults, loc, conf, boxes, labels = batch
    losses = MultiBoxLoss(defaults)(loc, conf, boxes, labels)
    expected = [oracle(*each, defaults) for each in zip(loc, conf, boxes, labels, strict=True)]
    np.testing.assert_allclose(losses.loc + losses.conf, expected, rtol=1e-4, atol=1e-5)


def batch_oracle(conf, labels):
    """The confidence loss of a batch, box by box."""
    surprise = -conf.log_softmax(1)
    entropy = [
        [surprise[n, labels[n, p], p].item() for p in range(labels.shape[1])] for n in range(len(labels))
    ]
    negatives = [(n, p) for n in range(len(labels)) for p in range(labels.shape[1]) if labels[n, p] == 0]
    negatives.sort(key=lambda each: -entropy[each[0]][each[1]])
    positives = int((labels > 0).sum())
    chosen = set(negatives[: 3 * positives])
    for n in range(len(labels)):
        chosen |= set([each for each in negatives if each[0] == n][:8])
    chosen |= {tuple(each) for each in (labels > 0).nonzero().tolist()}
    return sum(entropy[n][p] for n, p in chosen) / max(positives, 8 / 3 * len(labels))


@settings(max_examples=60, deadline=None)
@given(batches())
def test_the_batch_loss_equals_a_slow_oracle(batch):
    defaults, loc, conf, boxes, labels = batch
    pooled = BatchMultiBoxLoss(defaults)(loc, conf, boxes, labels)
    np.testing.assert_allclose(pooled.conf.mean(), batch_oracle(conf, labels), rtol=1e-4, atol=1e-5)
    single, positives = MultiBoxLoss(defaults)(loc, conf, boxes, labels), (labels > 0).sum(1)
    expected = (single.loc * positives).sum() / max(int(positives.sum()), 8)
    np.testing.assert_allclose(pooled.loc.mean(), expected, rtol=1e-4, atol=1e-5)


def test_an_image_without_boxes_teaches_in_the_batch_loss():
    conf = torch.zeros(2, 3, 8732)
    conf[:, 0] = 4  # all is background ...
    conf[1, 2, 100:130] = 9  # ... but for what is seen in the second image, which has nothing
    conf.requires_grad_()
    truths = torch.tensor([[[0.1, 0.1, 0.5, 0.5]], [[0.0, 0.0, 0.0, 0.0]]]), torch.tensor([[1], [0]])
    boxes, labels = match(*truths, DEFAULT_BOXES)
    assert (labels[0] > 0).any()
    assert not labels[1].any()
    total(BatchMultiBoxLoss(DEFAULT_BOXES)(torch.zeros(2, 4, 8732), conf, boxes, labels)).backward()
    assert (conf.grad[1, 2, 100:130] > 0).sum() >= min(3 * int((labels > 0).sum()), 30)
    assert (conf.grad[0] != 0).any(0).sum() >= 8


def test_a_batch_without_boxes_has_a_finite_loss():
    conf = torch.zeros(2, 3, 8732, requires_grad=True)
    labels = torch.zeros(2, 8732, dtype=torch.int64)
    losses = BatchMultiBoxLoss(DEFAULT_BOXES)(
        torch.zeros(2, 4, 8732), conf, DEFAULT_BOXES.expand(2, -1, 4), labels
    )
    np.testing.assert_allclose(losses.conf.detach(), 3 * np.log(3), rtol=1e-6)  # 8 of ln 3 over 8 / 3
    assert not losses.loc.any()


def test_images_without_boxes_give_zero_and_finite_gradients():
    loc = torch.randn(2, 4, 8732, requires_grad=True)
    conf = torch.randn(2, 3, 8732, requires_grad=True)
    boxes, labels = match(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), DEFAULT_BOXES)
    loss = total(MultiBoxLoss(DEFAULT_BOXES)(loc, conf, boxes, labels))
    loss.backward()
    assert loss.item() == 0
    assert loc.grad.abs().sum() == conf.grad.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_is_computed_in_fp32_whatever_comes_in(figures, dtype):
    loc, conf, boxes, labels = published_inputs(figures)
    loss = MultiBoxLoss(DEFAULT_BOXES)
    low = loss(loc.to(dtype), conf.to(dtype), boxes, labels)
    assert low.loc.dtype == low.conf.dtype == torch.float32
    same = loss(loc.to(dtype).float(), conf.to(dtype).float(), boxes, labels)
    assert torch.equal(low.loc, same.loc)
    assert torch.equal(low.conf, same.conf)


def test_half_precision_logits_that_would_overflow_a_sum_stay_finite():
    conf = torch.full((1, 3, 8732), -3e4, dtype=torch.float16)
    labels = torch.zeros(1, 8732, dtype=torch.int64)
    labels[0, :3000] = 1
    conf[:, 2] = 3e4
    losses = MultiBoxLoss(DEFAULT_BOXES)(torch.zeros(1, 4, 8732), conf, DEFAULT_BOXES[None], labels)
    assert losses.conf.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_bad_image_is_told_apart(name):
    loc, conf = torch.zeros(3, 4, 8732), torch.zeros(3, 3, 8732)
    loc[1, 0, :] = torch.nan
    boxes, labels = match(torch.tensor([[[0.1, 0.1, 0.5, 0.5]]] * 3), torch.ones(3, 1).long(), DEFAULT_BOXES)
    losses = LOSSES[name](DEFAULT_BOXES)(loc, conf, boxes, labels)
    assert (losses.loc + losses.conf).isfinite().tolist() == [True, False, True]
    conf[2, 1, :] = torch.nan
    losses = LOSSES[name](DEFAULT_BOXES)(loc, conf, boxes, labels)
    assert (losses.loc + losses.conf).isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize("name", LOSSES)
def test_runs_on_the_device_of_its_inputs_and_waits_for_nothing(name, fake_cuda):
    device = torch.device("cuda")
    loss = LOSSES[name](DEFAULT_BOXES).to(device)
    boxes, labels = match(
        torch.tensor([[[0.1, 0.1, 0.5, 0.5]]]).to(device),
        torch.ones(1, 1).long().to(device),
        loss.default_boxes,
    )
    losses = loss(torch.zeros(1, 4, 8732).to(device), torch.zeros(1, 3, 8732).to(device), boxes, labels)
    assert losses.loc.device.type == losses.conf.device.type == "cuda"


@pytest.mark.cuda
@pytest.mark.parametrize("name", LOSSES)
def test_no_host_synchronisation_on_cuda(name):
    device = torch.device("cuda")
    defaults = DEFAULT_BOXES.to(device)
    loss = LOSSES[name](defaults)
    truths = torch.tensor([[[0.1, 0.1, 0.5, 0.5]]], device=device), torch.ones(1, 1, device=device).long()
    loc = torch.zeros(1, 4, 8732, device=device, requires_grad=True)
    conf = torch.zeros(1, 3, 8732, device=device, requires_grad=True)
    with waiting_for_cuda_fails():
        total(loss(loc, conf, *match(*truths, defaults))).backward()


def test_losses_by_name_are_made_of_default_boxes(figures):
    inputs = published_inputs(figures)
    named, plain = LOSSES["multibox"](DEFAULT_BOXES)(*inputs), MultiBoxLoss(DEFAULT_BOXES)(*inputs)
    assert torch.equal(named.loc, plain.loc)
    assert torch.equal(named.conf, plain.conf)


@pytest.mark.parametrize("kind", LOSSES.values())
def test_class_weights_scale_the_cross_entropy_of_the_positives_alone(kind):
    torch.manual_seed(0)
    defaults = DEFAULT_BOXES[:200]
    loc, conf, boxes = torch.randn(2, 4, 200), torch.randn(2, 3, 200), torch.rand(2, 200, 4) + 0.1
    labels = (torch.rand(2, 200) < 0.1).long() * torch.randint(1, 3, (2, 200))
    plain = kind(defaults)(loc, conf, boxes, labels)
    same = kind(defaults, class_weights=torch.ones(3))(loc, conf, boxes, labels)
    assert torch.equal(plain.conf, same.conf)
    weighted = kind(defaults, class_weights=torch.tensor([1.0, 1.0, 4.0]))(loc, conf, boxes, labels)
    assert torch.equal(weighted.loc, plain.loc)
    second = torch.zeros(2)  # cross-entropy of the second class, by hand
    for n, p in (labels == 2).nonzero().tolist():
        second[n] -= conf[n, :, p].log_softmax(0)[2]
    positives = (labels > 0).sum(1)
    count = positives if kind is MultiBoxLoss else positives.sum() / 2
    torch.testing.assert_close(weighted.conf - plain.conf, 3 * second / count)
