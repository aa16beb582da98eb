import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from ssd import postprocess as module
from ssd.boxes import PUBLISHED_LAYOUT
from ssd.errors import NonFiniteError
from ssd.postprocess import postprocess

REGIMES = {"sparse": (9, 2), "typical": (6, 1), "dense": (4, 2)}


def regime_outputs(regime, images=2):
    background, scale = REGIMES[regime]
    random = np.random.RandomState(3001)
    loc = (0.5 * random.standard_normal((images, 4, 8732))).astype(np.float32)
    conf = (scale * random.standard_normal((images, 81, 8732))).astype(np.float32)
    conf[:, 0] += background
    return torch.from_numpy(loc), torch.from_numpy(conf)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("iou", "most"), [(0.5, 20), (0.5, 200), (0.45, 200)])
def test_figures(figures, regime, iou, most):
    loc, conf = regime_outputs(regime)
    found = postprocess(
        loc, conf, PUBLISHED_LAYOUT.default_boxes(), iou_threshold=iou, max_detections=most
    ).per_image()
    for image, (boxes, scores, class_ids) in enumerate(found):
        name = f"decode/{regime}/{iou}/{most}/{image}"
        assert (scores.diff() <= 0).all()
        np.testing.assert_allclose(scores, figures[f"{name}/scores"][::-1], atol=1e-5, rtol=0)
        ours = sorted(zip((class_ids + 1).tolist(), boxes.tolist(), strict=True))
        theirs = sorted(
            zip(figures[f"{name}/labels"].tolist(), figures[f"{name}/boxes"].tolist(), strict=True)
        )
        assert [label for label, _ in ours] == [label for label, _ in theirs]
        # Processors differ in the last bit of exp().
        np.testing.assert_allclose([box for _, box in ours], [box for _, box in theirs], atol=2e-7, rtol=0)


# --- A slow oracle: the published rule, a box at a time, in plain Python and float32 ---


def oracle(loc, conf, defaults, score_threshold, iou_threshold, max_detections, max_per_class, voting=False):
    probabilities = torch.softmax(conf.float().T, -1).T
    kept = []
    for label in range(1, conf.shape[0]):
        candidates = [
            (-float(p), i) for i, p in enumerate(probabilities[label]) if p > torch.tensor(score_threshold)
        ]
        chosen, best = [], sorted(candidates)[:max_per_class]
        boxes = [oracle_box(loc[:, i].float().numpy(), defaults[i].numpy()) for _, i in best]
        for (minus_score, i), box in zip(best, boxes, strict=True):
            if all(oracle_iou(box, other) < np.float32(iou_threshold) for _, _, other in chosen):
                chosen.append((minus_score, i, box))
        if voting:
            chosen = [(*each, oracle_vote(box, best, boxes)) for *each, box in chosen]
        kept += [(minus_score, i, label - 1, box) for minus_score, i, box in chosen]
    kept.sort(key=lambda each: (each[0], each[2], each[1]))
    return kept[:max_detections]


def oracle_box(offsets, default):
    cx, cy = offsets[:2] * np.float32(0.1) * default[2:] + default[:2]
    w, h = np.exp(offsets[2:] * np.float32(0.2)) * default[2:]
    half = np.float32(0.5)
    return np.array([cx - half * w, cy - half * h, cx + half * w, cy + half * h], np.float32)


def oracle_vote(kept, candidates, boxes):
    total, weight = np.zeros(4), 0.0
    for (minus_score, _), box in zip(candidates, boxes, strict=True):
        if oracle_iou(kept, box) >= np.float32(module.VOTING_IOU):
            total, weight = total - minus_score * box, weight - minus_score
    return total / weight


def oracle_iou(a, b):
    w = max(min(a[2], b[2]) - max(a[0], b[0]), np.float32(0))
    h = max(min(a[3], b[3]) - max(a[1], b[1]), np.float32(0))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / union


def assert_equals_oracle(loc, conf, defaults, **options):
    found = postprocess(loc, conf, defaults, **options)
    assert found.boxes.shape == (len(loc), options["max_detections"], 4)
    for image, (boxes, scores, class_ids) in enumerate(found.per_image()):
        expected = oracle(loc[image], conf[image], defaults, **options)
        assert class_ids.tolist() == [each[2] for each in expected]
        np.testing.assert_allclose(scores, [-each[0] for each in expected], atol=1e-6)
        np.testing.assert_allclose(boxes, np.reshape([each[3] for each in expected], (-1, 4)), atol=1e-6)


@st.composite
def outputs(draw):
    """Few boxes that overlap a lot; in half of the examples with many equal scores."""
    images, classes, boxes = draw(st.integers(1, 3)), draw(st.integers(2, 4)), draw(st.integers(1, 24))
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.RandomState(seed)
    loc, conf = (
        random.standard_normal((images, 4, boxes)),
        3 * random.standard_normal((images, classes, boxes)),
    )
    if draw(st.booleans()):  # ties: few different columns, and two classes of equal logits
        loc, conf = np.zeros_like(loc), conf[:, :, random.randint(0, min(3, boxes), boxes)]
        conf[:, -1] = conf[:, 1]
    conf[:, 0] += draw(st.sampled_from([-4, 0, 4, 40]))
    # Dyadic default boxes: neighbours overlap by exactly 1/3, 1/2, 3/5 ..., where < and <= differ.
    centers = random.randint(2, 7, (boxes, 2)) / 8
    defaults = np.concatenate([centers, random.choice([0.25, 0.5], (boxes, 2))], 1)
    return tuple(torch.from_numpy(each.astype(np.float32)) for each in (loc, conf, defaults))


@settings(max_examples=150, deadline=None)
@given(
    outputs(),
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    st.sampled_from([0.3, 0.5, 0.6]),
    st.sampled_from([1, 5, 200]),
    st.sampled_from([1, 4, 200]),
    st.sampled_from([1, 4, 256]),
    st.sampled_from([None, 0.5, 0.65]),
)
def test_equals_the_oracle(tensors, score, iou, most, per_class, block, voting):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        patch.setattr(module, "VOTING_IOU", voting)
        assert_equals_oracle(
            *tensors,
            score_threshold=score,
            iou_threshold=iou,
            max_detections=most,
            max_per_class=per_class,
            voting=voting is not None,
        )


@pytest.mark.parametrize("voting", [False, True])
@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_equals_the_oracle_when_dense(spread, voting):
    """Hundreds of candidates of a class, over many blocks, most suppressed (0.1) or few (1.0)."""
    random = np.random.RandomState(5)
    loc = torch.from_numpy((spread * random.standard_normal((2, 4, 600))).astype(np.float32))
    conf = torch.from_numpy(random.standard_normal((2, 4, 600)).astype(np.float32))
    centers = 0.5 + spread * random.uniform(-0.4, 0.4, (600, 2))
    defaults = torch.from_numpy(np.concatenate([centers, np.full((600, 2), 0.2)], 1).astype(np.float32))
    assert_equals_oracle(
        loc,
        conf,
        defaults,
        score_threshold=0.05,
        iou_threshold=0.5,
        max_detections=50,
        max_per_class=200,
        voting=voting,
    )


def test_voting_by_hand(monkeypatch):
    """With the first box the second has an IoU of 0.8, the third of 0.6; the last two have no area."""
    centers, widths = [0.3, 0.34, 0.39, 0.8, 0.1], [0.36, 0.36, 0.36, 0, 0]
    defaults = torch.tensor([[cx, 0.5, w, 0.4] for cx, w in zip(centers, widths, strict=True)])
    scores = torch.tensor([0.8, 0.4, 0.6, 0.5, 0.3])
    outputs = torch.zeros(1, 4, 5), torch.stack([1 - scores, scores])[None].log(), defaults
    plain, voted = (postprocess(*outputs, voting=each) for each in (False, True))
    assert torch.equal(plain.scores, voted.scores)
    left = 0.12 + 0.04 * 0.4 / (0.8 + 0.4)
    expected = [[left, 0.3, left + 0.36, 0.7], [0.8, 0.3, 0.8, 0.7]]  # without area it stays
    np.testing.assert_allclose(voted.boxes[0, :2], expected, atol=1e-6)
    assert voted.counts.tolist() == [2]
    monkeypatch.setattr(module, "_BLOCK", 1)  # with one detection, none of the others is reached by NMS
    first = postprocess(*outputs, max_detections=1, voting=True)
    assert torch.equal(first.boxes[0, 0], voted.boxes[0, 0])


def test_nothing_votes_for_nothing():
    for images in (0, 2):
        conf = torch.zeros(images, 4, 10)
        conf[:, 0] = 20
        found = postprocess(torch.zeros(images, 4, 10), conf, torch.ones(10, 4), voting=True)
        assert found.counts.tolist() == [0] * images
        assert not found.boxes.any()


def test_a_long_chain_of_suppressions():
    """Each box overlaps only its neighbours, so every second one goes."""
    centers = torch.arange(300) / 300
    defaults = torch.stack([centers, torch.full((300,), 0.5), torch.full((300,), 0.011), torch.ones(300)], 1)
    conf = torch.zeros(1, 2, 300)
    conf[0, 1] = torch.linspace(9, 1, 300)
    found = postprocess(
        torch.zeros(1, 4, 300), conf, defaults, iou_threshold=0.5, max_detections=300, max_per_class=300
    )
    np.testing.assert_allclose(found.boxes[0, :150, [0, 2]].mean(1), centers[::2], atol=1e-5)
    assert found.counts.tolist() == [150]


def test_a_huge_max_detections_costs_little():
    """As many comparisons as there are detections, whatever room was asked for."""
    loc, conf = regime_outputs("typical", images=1)
    found = postprocess(loc, conf, PUBLISHED_LAYOUT.default_boxes(), max_detections=100_000)
    usual = postprocess(loc, conf, PUBLISHED_LAYOUT.default_boxes(), max_detections=2_000)
    assert found.counts.tolist() == usual.counts.tolist()
    assert torch.equal(found.boxes[:, :2_000], usual.boxes)


@pytest.mark.parametrize("classes", [None, [1]])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_nothing_found_has_the_right_shapes_and_types(images, classes):
    conf = torch.zeros(images, 4, 8732)
    conf[:, 0] = 20
    found = postprocess(torch.zeros(images, 4, 8732), conf, PUBLISHED_LAYOUT.default_boxes(), classes=classes)
    assert found.boxes.shape == (images, 200, 4)
    for boxes, scores, class_ids in found.per_image():
        assert (boxes.shape, scores.shape, class_ids.shape) == ((0, 4), (0,), (0,))
        assert (boxes.dtype, scores.dtype, class_ids.dtype) == (torch.float32, torch.float32, torch.int64)


def test_classes_leaves_the_others_out_before_the_best_are_taken():
    loc, conf = regime_outputs("typical")
    everything = postprocess(loc, conf, PUBLISHED_LAYOUT.default_boxes(), max_detections=200)
    wanted = postprocess(loc, conf, PUBLISHED_LAYOUT.default_boxes(), max_detections=200, classes=[3, 70])
    for all_of, some in zip(everything.per_image(), wanted.per_image(), strict=True):
        chosen = (all_of[2] == 3) | (all_of[2] == 70)
        count = int(chosen.sum())
        assert set(some[2].tolist()) == {3, 70}
        assert len(some[1]) > count > 0
        assert torch.equal(some[0][:count], all_of[0][chosen])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    loc, conf = (each.to(dtype) for each in regime_outputs("typical"))
    found = postprocess(loc, conf, PUBLISHED_LAYOUT.default_boxes())
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    for ours, expected in zip(
        found, postprocess(loc.float(), conf.float(), PUBLISHED_LAYOUT.default_boxes()), strict=True
    ):
        assert torch.equal(ours, expected)


def test_inputs_are_left_as_they_are_and_a_second_call_gives_the_same():
    loc, conf = (each.requires_grad_() for each in regime_outputs("typical"))
    before = loc.detach().clone(), conf.detach().clone()
    first, second = (postprocess(loc, conf, PUBLISHED_LAYOUT.default_boxes()) for _ in range(2))
    assert torch.equal(loc, before[0])
    assert torch.equal(conf, before[1])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not first.scores.requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["loc", "conf"])
def test_outputs_that_are_not_finite_are_an_error_that_names_the_image(which, value):
    outputs = dict(zip(("loc", "conf"), regime_outputs("typical", images=3), strict=True))
    outputs[which][1, 2, 77] = value
    with pytest.raises(NonFiniteError, match=r"image \[1\] of the batch"):
        postprocess(**outputs, default_boxes=PUBLISHED_LAYOUT.default_boxes())


def test_finite_outputs_whose_sum_overflows_are_no_error():
    loc, conf = regime_outputs("typical", images=1)
    conf[0, 0] = 1e36
    assert postprocess(loc, conf, PUBLISHED_LAYOUT.default_boxes()).counts.tolist() == [0]


@pytest.mark.parametrize("shapes", [((1, 4, 10), (2, 3, 10)), ((1, 4, 9), (1, 3, 9)), ((4, 10), (3, 10))])
def test_shapes_that_do_not_fit_are_refused(shapes):
    loc, conf = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"expected loc \[N, 4, 10\]"):
        postprocess(loc, conf, PUBLISHED_LAYOUT.default_boxes()[:10])


def test_runs_on_cuda_without_mixing_devices(fake_cuda):
    loc, conf = regime_outputs("typical")
    expected = postprocess(loc, conf, PUBLISHED_LAYOUT.default_boxes())
    found = postprocess(
        loc.to("cuda"), conf.to("cuda"), PUBLISHED_LAYOUT.default_boxes().to("cuda"), classes=range(80)
    )
    assert all(each.device.type == "cuda" for each in found)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(RuntimeError, match="same device"):
        postprocess(loc.to("cuda"), conf.to("cuda"), PUBLISHED_LAYOUT.default_boxes())


@pytest.mark.cuda
@pytest.mark.parametrize("voting", [False, True])
@pytest.mark.parametrize("regime", REGIMES)
def test_a_real_gpu_gives_what_the_cpu_gives(regime, voting):
    loc, conf = regime_outputs(regime)
    expected = postprocess(loc, conf, PUBLISHED_LAYOUT.default_boxes(), voting=voting)
    found = postprocess(loc.cuda(), conf.cuda(), PUBLISHED_LAYOUT.default_boxes().cuda(), voting=voting)
    for (boxes, scores, class_ids), (their_boxes, their_scores, their_ids) in zip(
        found.per_image(), expected.per_image(), strict=True
    ):
        torch.testing.assert_close(scores.cpu(), their_scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(boxes.cpu(), their_boxes, atol=1e-5, rtol=0)
        assert torch.equal(class_ids.cpu(), their_ids)


def test_each_class_may_have_a_threshold_of_its_own():
    """As if each class were looked for alone, with its threshold."""
    loc, conf = regime_outputs("dense", images=2)
    loc, conf, defaults = loc[..., :400], conf[:, :4, :400], PUBLISHED_LAYOUT.default_boxes()[:400]
    limits = (0.6, 0.3, 0.4)
    together = postprocess(loc, conf, defaults, score_threshold=limits, max_detections=60).per_image()
    alone = [
        postprocess(loc, conf, defaults, score_threshold=limit, max_detections=400, classes=[k]).per_image()
        for k, limit in enumerate(limits)
    ]
    for image, (boxes, scores, class_ids) in enumerate(together):
        expected = sorted(
            (
                (-s, k, b)
                for each in alone
                for b, s, k in zip(*map(torch.Tensor.tolist, each[image]), strict=True)
            ),
        )[:60]
        ours = zip((-scores).tolist(), class_ids.tolist(), boxes.tolist(), strict=True)
        assert sorted(ours) == sorted(expected)
        assert set(class_ids.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("number", [np.float32(0.4), np.float16(0.4), torch.tensor(0.4)], ids=repr)
def test_a_threshold_may_be_any_number(number):
    generator = torch.Generator().manual_seed(0)
    loc, conf = torch.randn(2, 4, 40, generator=generator), 3 * torch.randn(2, 4, 40, generator=generator)
    default_boxes = torch.rand(40, 4, generator=generator) * 0.5 + 0.1
    found, expected = (
        postprocess(loc, conf, default_boxes, score_threshold=each) for each in (number, float(number))
    )
    assert found.counts.sum() > 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
