import numpy as np
import pytest
import torch
from conftest import OTHER_LAYOUTS, made_model

from ssd import proof
from ssd.backends import NMS, Metadata
from ssd.backends.graph import Graph, greedy, suppress
from ssd.boxes import Layout
from ssd.postprocess import postprocess


def metadata(**changes):
    values = {"class_names": ("cat", "cup", "person"), "category_ids": (), "backbone": "resnet18"}
    values |= {"precision": "fp32", "uint8": False, "batch": None, "nms": None}
    return Metadata(**values | changes)


def one_by_one(boxes, scores, iou_threshold):
    """Greedy NMS of one group, spelled out."""
    kept = []
    for i, score in enumerate(scores):
        overlaps = []
        for j in kept:
            sides = np.minimum(boxes[i, 2:], boxes[j, 2:]) - np.maximum(boxes[i, :2], boxes[j, :2])
            shared = np.prod(np.clip(sides, 0, None))
            areas = [np.prod(boxes[k, 2:] - boxes[k, :2]) for k in (i, j)]
            overlaps.append(shared / (sum(areas) - shared))
        if score > 0 and not any(overlap >= iou_threshold for overlap in overlaps):
            kept.append(i)
    return kept


@pytest.mark.parametrize("suppress", [greedy, suppress])
def test_greedy_equals_a_loop(suppress):
    rng = np.random.default_rng(0)
    corner = rng.random((6, 30, 2)).astype(np.float32)
    boxes = np.concatenate([corner, corner + rng.uniform(0.1, 0.6, (6, 30, 2))], 2).astype(np.float32)
    scores = np.sort(rng.random((6, 30)).astype(np.float32))[:, ::-1].copy()
    scores[:, 25:] = 0
    scores[5] = 0
    found = suppress(torch.from_numpy(boxes), torch.from_numpy(scores), 0.5).numpy()
    for group in range(6):
        kept = one_by_one(boxes[group], scores[group], 0.5)
        assert np.flatnonzero(found[group]).tolist() == kept
        assert np.array_equal(found[group][kept], scores[group][kept])
    assert 5 < (found[0] > 0).sum() < 25


def test_the_graph_equals_the_postprocess(small_model):
    graph = Graph(small_model, metadata(uint8=True, nms=NMS(0.05, 0.5, 50)), greedy)
    images = proof._images_to_try(300)[1:4]
    with torch.inference_mode():
        boxes, scores, class_ids, counts = graph(images)
        raw = Graph(small_model, metadata(uint8=True), greedy)(images)
        expected = postprocess(*raw, graph.default_boxes, max_detections=50)
    assert counts.tolist() == expected.counts.tolist()
    torch.testing.assert_close(scores, expected.scores)
    torch.testing.assert_close(boxes, expected.boxes)
    assert torch.equal(class_ids, expected.class_ids)


# A single feature map of 16 cells: 64 default boxes, fewer than the candidates that NMS takes at most.
FEW_BOXES = Layout(size=32, maps=(4,), steps=(8,), scales=(10, 20), aspect_ratios=((2,),))


@pytest.mark.parametrize("layout", [*OTHER_LAYOUTS.values(), FEW_BOXES], ids=[*OTHER_LAYOUTS, "few boxes"])
def test_other_layouts_equal_the_model_and_the_postprocess(layout):
    model = made_model(layout=layout)
    images = torch.randn(2, 3, layout.size, layout.size, generator=torch.Generator().manual_seed(0))
    nms = NMS(0.05, 0.5, 40)
    with torch.inference_mode():
        raw = Graph(model, metadata(layout=layout), greedy)(images)
        for ours, theirs in zip(raw, model(images), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        boxes, scores, class_ids, counts = Graph(model, metadata(layout=layout, nms=nms), greedy)(images)
        expected = postprocess(*raw, layout.default_boxes(), max_detections=40)
    assert counts.tolist() == expected.counts.tolist()
    assert min(counts) > 5
    torch.testing.assert_close(scores, expected.scores)
    torch.testing.assert_close(boxes, expected.boxes)
    assert torch.equal(class_ids, expected.class_ids)


def test_nan_in_the_network_makes_the_scores_nan(small_model):
    graph = Graph(small_model, metadata(nms=NMS()), greedy)
    images = torch.zeros(2, 3, 300, 300)
    images[1, 0, 5, 5] = torch.nan
    with torch.inference_mode():
        _, scores, _, _ = graph(images)
    assert scores[0].isfinite().all()
    assert scores[1].isnan().any()
