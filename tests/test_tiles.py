"""Objects of a made-up detector, which sees those that lie in a window as far as they do."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssd.postprocess import overlap
from ssd.tiles import OVERLAP, Window, are_cut, cut, gather, in_tiles, merge, number_of_windows


@pytest.mark.parametrize("side", [100, 137, 300])
@pytest.mark.parametrize("size", [(100, 80), (101, 300), (1000, 333), (640, 640)])
def test_tiles_cover_the_image_and_overlap(size, side):
    whole, *tiles = cut(*size, side)
    assert whole == (0, 0, *size)
    if max(size) <= side:
        assert tiles == []
        return
    covered = np.zeros(size[::-1], int)
    for left, top, right, bottom in tiles:
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        assert (right - left, bottom - top) == (min(side, size[0]), min(side, size[1]))
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1
    for length, axis in zip(size, (0, 1), strict=True):
        starts = sorted({tile[axis] for tile in tiles})
        assert starts[-1] == max(0, length - side)
        assert all(b - a <= side * (1 - OVERLAP) for a, b in pairwise(starts))


@pytest.mark.parametrize("side", [33, 100, 640])
def test_neighbouring_tiles_share_a_quarter_of_their_side_or_more(side):
    """In rows of up to some eighty tiles, of which the longest are as far apart as they may be."""
    for length in range(side + 1, 60 * side, side // 3):
        starts = sorted({window.left for window in cut(length, 1, side)[1:]})
        assert max(b - a for a, b in pairwise(starts)) <= 0.75 * side


def test_without_tiles_there_is_the_image():
    assert cut(4000, 3000, None) == [(0, 0, 4000, 3000)]


def seen(objects, window, least=0.2):
    """What a perfect detector finds in a window: of each object, what lies within, in parts of the window."""
    left, top, right, bottom = window
    corner, sides = torch.tensor([left, top] * 2), torch.tensor([right - left, bottom - top] * 2)
    inside = torch.stack(
        [objects[:, 0::2].clamp(left, right), objects[:, 1::2].clamp(top, bottom)], 2
    ).flatten(1)
    part = (inside[:, 2:] - inside[:, :2]).prod(1) / (objects[:, 2:] - objects[:, :2]).prod(1)
    found = part > least
    order = part[found].sort(descending=True, stable=True).indices
    scores = (0.5 + part[found] / 2)[order]
    return (inside[found][order] - corner) / sides, scores, torch.zeros(len(order), dtype=torch.int64)


def found_in(objects, size, side, max_detections=100):
    windows = cut(*size, side)
    parts = [seen(objects, window) for window in windows[1:]]
    nothing = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    return gather([nothing, *parts], windows, size, iou_threshold=0.5, max_detections=max_detections)


@pytest.mark.parametrize("shape", [(20, 20), (40, 10), (12, 48), (49, 49)])
def test_an_object_is_found_once_wherever_it_lies(shape):
    """It walks over the borders of tiles, pixel by pixel, and is as large as the overlap at most."""
    for x in range(0, 420 - shape[0], 1):
        y = (7 * x) % (330 - shape[1])
        objects = torch.tensor([[x, y, x + shape[0], y + shape[1]]], dtype=torch.float32)
        boxes, scores, _ = found_in(objects, (420, 330), 200)
        torch.testing.assert_close(boxes, objects, atol=1e-3, rtol=0)
        assert scores.tolist() == [1]


def test_an_object_that_no_tile_holds_is_found_once():
    for x in range(0, 200):
        objects = torch.tensor([[x, 20, x + 110, 60]], dtype=torch.float32)
        boxes, _, _ = found_in(objects, (420, 100), 200)
        assert len(boxes) == 1


def test_neighbours_at_a_border_stay_apart():
    objects = torch.tensor([[140, 20, 160, 40], [161, 20, 181, 40], [150, 41, 170, 61]], dtype=torch.float32)
    boxes, _, _ = found_in(objects, (420, 330), 200)
    assert {tuple(box) for box in boxes.round().tolist()} == {tuple(box) for box in objects.tolist()}


def test_what_ends_at_a_border_within_the_image_is_cut():
    boxes = torch.tensor(
        [
            [100.0, 50, 120, 70],
            [150, 50, 199.6, 70],
            [150, 50, 199, 70],
            [150, 0, 170, 20],
            [150, 180, 170, 200],
        ]
    )
    window = Window(100, 0, 200, 200)
    assert are_cut(boxes, window, (400, 200)).tolist() == [True, True, False, False, False]
    assert are_cut(boxes, Window(0, 0, 400, 200), (400, 200)).tolist() == [False] * 5


def slow_nms(boxes, scores, class_ids, iou_threshold):
    kept = []
    for i in scores.sort(descending=True, stable=True).indices.tolist():
        rivals = [j for j in kept if class_ids[j] == class_ids[i]]
        if not any(overlap(boxes[None, [i]], boxes[None, [j]], iou_threshold).item() for j in rivals):
            kept.append(i)
    return kept


@pytest.mark.parametrize("seed", range(20))
def test_whole_boxes_go_through_plain_nms(seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(60, 2, generator=generator) * 50
    boxes = torch.cat([corners, corners + 1 + torch.rand(60, 2, generator=generator) * 40], 1)
    scores = torch.rand(60, generator=generator).mul(20).round().div(20)
    class_ids = torch.randint(3, (60,), generator=generator)
    kept = merge(boxes, scores, class_ids, torch.zeros(60, dtype=torch.bool), 0.4)
    assert scores[kept].tolist() == sorted(scores[kept].tolist(), reverse=True)
    assert sorted(kept.tolist()) == sorted(slow_nms(boxes, scores, class_ids, 0.4))


def stays(box, other, is_cut, other_is_cut, iou_threshold):
    """Whether a box stays beside a better one of its class, by the text of `merge`, in plain numbers."""
    across, down = (min(box[k + 2], other[k + 2]) - max(box[k], other[k]) for k in (0, 1))
    shared = max(across, 0) * max(down, 0)
    area, its_area = ((each[2] - each[0]) * (each[3] - each[1]) for each in (box, other))
    if shared / (area + its_area - shared) >= iou_threshold:
        return False
    least = min(area, its_area) if other_is_cut else area
    return not (is_cut and shared > 0.5 * least)


@pytest.mark.parametrize("iou_threshold", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_merging_is_what_its_text_says(seed, iou_threshold):
    """Of boxes of very different sizes, also such as fill the image, of which some are cut."""
    rng = np.random.default_rng(seed)
    sides = 2 ** rng.uniform(1, 9, (300, 1)) * rng.uniform(0.5, 2, (300, 2))
    corners = rng.uniform(0, 600, (300, 2)).round(1)
    boxes = torch.from_numpy(np.concatenate([corners, corners + sides.round(1)], 1).astype(np.float32))
    scores = torch.from_numpy(rng.integers(1, 50, 300) / 50).float()
    class_ids, is_cut = torch.from_numpy(rng.integers(0, 2, 300)), torch.from_numpy(rng.random(300) < 0.3)
    expected: list[int] = []
    for i in sorted(range(300), key=lambda i: (is_cut[i], -scores[i], i)):
        if all(
            stays(*(boxes[k].tolist() for k in (i, j)), *(bool(is_cut[k]) for k in (i, j)), iou_threshold)
            for j in expected
            if class_ids[j] == class_ids[i]
        ):
            expected.append(i)
    kept = merge(boxes, scores, class_ids, is_cut, iou_threshold)
    assert sorted(kept.tolist()) == sorted(expected)
    assert scores[kept].tolist() == sorted(scores[kept].tolist(), reverse=True)


class Largest(TorchDispatchMode):
    """Notes the most bytes that a result of torch had."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for each in result if isinstance(result, list | tuple) else [result]:
            if isinstance(each, torch.Tensor):
                self.bytes = max(self.bytes, each.numel() * each.element_size())
        return result


def test_many_boxes_are_not_all_compared_with_each_other():
    """5,000 boxes of one class, some of which fill the image: a byte for each pair would be 25 MB."""
    rng = np.random.default_rng(0)
    corners, sides = rng.uniform(0, 4000, (5000, 2)), rng.uniform(5, 35, (5000, 2))
    sides[:50] = 4000
    boxes = torch.from_numpy(np.concatenate([corners, corners + sides], 1)).float()
    scores, nothing = torch.from_numpy(rng.random(5000)).float(), torch.zeros(5000, dtype=torch.int64)
    with Largest() as largest:
        kept = merge(boxes, scores, nothing, nothing.bool(), 0.5)
    assert largest.bytes < 10e6
    assert 4500 < len(kept) < 5000


def test_a_cut_box_gives_way_to_a_whole_one_of_a_lower_score():
    boxes = torch.tensor([[0.0, 0, 10, 20], [0, 0, 20, 20], [0, 0, 10, 20]])
    scores, class_ids = torch.tensor([0.9, 0.4, 0.8]), torch.tensor([0, 0, 1])
    ends = torch.tensor([True, False, True])
    assert merge(boxes, scores, class_ids, ends, 0.5).tolist() == [2, 1]
    assert merge(boxes, scores, class_ids, ~ends, 0.5).tolist() == [0, 2]  # now the whole one is the smaller
    assert merge(boxes[:0], scores[:0], class_ids[:0], ends[:0], 0.5).tolist() == []


def test_the_most_detections_are_of_the_whole_image():
    objects = torch.tensor([[x, 20.0, x + 10, 40] for x in range(0, 400, 20)])
    assert len(found_in(objects, (420, 330), 200)[0]) == 20
    assert len(found_in(objects, (420, 330), 200, max_detections=7)[0]) == 7


@pytest.mark.parametrize(
    ("width", "height", "side"), [(640, 640, 320), (100, 90, 100), (7, 5000, 33), (999, 32, 32)]
)
def test_the_number_of_windows_is_that_of_cut(width, height, side):
    assert number_of_windows(width, height, side) == len(cut(width, height, side))


def test_boxes_in_tiles_by_hand():
    """Of an image that is larger, one that is smaller, one that is lower, and of a box larger than a tile."""
    pixels = torch.tensor([[700.0, 30, 716, 70], [50, 20, 200, 170], [0, 0, 40, 100], [0, 0, 900, 320]])
    sizes = torch.tensor([[2000.0, 1500], [200, 200], [2000, 200], [1000, 640]])
    found = in_tiles(pixels / sizes.repeat(1, 2), sizes, 320)
    left = 700 % (320 - 16)
    expected = [
        [left / 320, 30 / 320, (left + 16) / 320, 70 / 320],
        [0, 20 / 200, 150 / 200, 170 / 200],  # where in its tile it lies does not matter
        [0, 0, 40 / 320, 100 / 200],
        [0, 0, 1, 1],
    ]
    torch.testing.assert_close(
        found[:, 2:] - found[:, :2], torch.tensor(expected)[:, 2:] - torch.tensor(expected)[:, :2]
    )
    torch.testing.assert_close(found[[0, 2, 3]], torch.tensor(expected)[[0, 2, 3]])
