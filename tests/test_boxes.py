import json
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import SMALL_LAYOUT
from hypothesis import given
from hypothesis.extra.numpy import arrays
from torchvision import ops
from torchvision.ops import box_convert

from ssd.boxes import (
    LAYOUTS,
    PUBLISHED_LAYOUT,
    Layout,
    box_iou,
    decode,
    encode,
    match,
    to_centers,
    to_corners,
)


def test_default_boxes_equal_the_published_ones(figures):
    boxes = PUBLISHED_LAYOUT.default_boxes()
    assert boxes.shape == (PUBLISHED_LAYOUT.num_default_boxes, 4) == (8732, 4)
    np.testing.assert_array_equal(boxes, figures["dboxes/xywh"])
    np.testing.assert_array_equal(box_convert(boxes, "cxcywh", "xyxy"), figures["dboxes/ltrb"])


def test_the_layout_of_512_pixels_follows_the_rule_of_caffes_script():
    """Scales from 10 % of the input on in steps of 16 %, 4 % for the first map; maps halve to one cell."""
    layout = LAYOUTS["512"]
    percent = [4, *range(10, 107, 16)]
    np.testing.assert_allclose(layout.scales, [512 * each / 100 for each in percent])
    assert layout.maps == tuple(512 // step for step in layout.steps) == (64, 32, 16, 8, 4, 2, 1)
    assert layout.boxes_per_cell == (4, 6, 6, 6, 6, 4, 4)
    assert layout.num_default_boxes == 24564
    # The second cell of the first map; and the tall shape of the last, clamped to the image.
    boxes = layout.default_boxes() * 512
    np.testing.assert_allclose(boxes[1], [12, 4, 20.48, 20.48], rtol=1e-6)
    np.testing.assert_allclose(boxes[-1], [256, 256, 460.8 / 2**0.5, 512], rtol=1e-6)


def test_layouts_go_through_plain_data():
    for layout in (*LAYOUTS.values(), SMALL_LAYOUT):
        assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
        assert hash(layout) == hash(Layout.from_dict(layout.to_dict()))
        assert layout.default_boxes().shape == (layout.num_default_boxes, 4)
        assert sum(layout.boxes_per_map) == layout.num_default_boxes


@pytest.mark.parametrize("name", LAYOUTS)
def test_half_a_layout_has_the_same_boxes_in_pixels_of_the_next_maps(name):
    """Each map's boxes are those of that map, centred where the next one has its cells."""
    layout = LAYOUTS[name]
    half = layout.halved()
    assert half is not None
    assert half.size == layout.size // 2
    assert half.maps == layout.maps[1 : len(half.maps) + 1]
    whole, part = layout.default_boxes(), half.default_boxes()
    starts = np.cumsum([0, *layout.boxes_per_map])
    begin = 0
    for k, cells in enumerate(half.maps):
        of_map = part[begin : begin + half.boxes_per_map[k]].view(-1, cells**2, 4)
        begin += half.boxes_per_map[k]
        here = whole[starts[k] : starts[k + 1]].view(-1, layout.maps[k] ** 2, 4)
        following = whole[starts[k + 1] : starts[k + 2]].view(-1, cells**2, 4)
        torch.testing.assert_close(of_map[0, :, :2], following[0, :, :2])
        torch.testing.assert_close(of_map[:, 0, 2:], (2 * here[:, 0, 2:]).clamp(max=1))
    assert begin == len(part)


def test_layouts_without_a_half():
    layout = LAYOUTS["300"]
    one = Layout(8, (1,), (8,), (4, 8), ((2,),))
    assert one.halved() is Layout(8, (1, 1), (8, 8), (4, 8, 8), ((2,), (2,))).halved() is None
    # The second map of 257 pixels has 17 cells, the first one of 128 pixels 16.
    odd = replace(layout, size=257, maps=(33, 17, 9, 5, 3, 1))
    assert odd.halved() is None
    # The blocks make 17, 9, 5, 3 cells of 17; the next one, made for 5 to 3, makes 1 of 3.
    assert replace(odd, size=260).halved().maps == (17, 9, 5, 3, 1)
    # From 6 cells to 3 a block has a stride of 2, by which 3 become 2, and not 1.
    assert SMALL_LAYOUT.halved().maps == (6, 3)


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), SMALL_LAYOUT], ids=lambda layout: str(layout.size))
def test_best_overlaps_are_those_with_all_default_boxes(layout):
    """Of boxes anywhere in the image, up to the whole of it, and on its border."""
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((300, 2, 2)) ** 2, axis=1).reshape(300, 4).astype(np.float32)
    boxes = torch.from_numpy(np.concatenate([corners, [[0, 0, 1, 1], [0.98, 0, 1, 0.03]]]).astype(np.float32))
    slow = ops.box_iou(boxes, box_convert(layout.default_boxes(), "cxcywh", "xyxy")).amax(1)
    np.testing.assert_allclose(layout.best_overlaps(boxes), slow, atol=2e-6)


def boxes_of_sides(*sides, count=400):
    """Boxes anywhere in the image, of widths and heights that are given in pixels of 300."""
    rng = np.random.default_rng(1)
    shape = np.array(sides)[rng.integers(len(sides), size=count)] / 300 * rng.uniform(0.9, 1.1, (count, 2))
    corner = rng.random((count, 2)) * (1 - shape)
    return torch.from_numpy(np.concatenate([corner, corner + shape], 1).astype(np.float32))


@pytest.mark.parametrize("name", list(LAYOUTS))
@pytest.mark.parametrize("sides", [[(14, 14)], [(20, 60), (60, 20)], [(200, 230), (13, 18)]], ids=str)
def test_a_fitted_layout_matches_more_and_keeps_what_the_network_is_made_of(name, sides):
    boxes, origin = boxes_of_sides(*sides), LAYOUTS[name]
    fitted = origin.fitted(boxes)
    assert (fitted.size, fitted.maps, fitted.steps) == (origin.size, origin.maps, origin.steps)
    assert fitted.boxes_per_cell == origin.boxes_per_cell
    assert list(fitted.scales) == sorted(fitted.scales)
    numbers = (*fitted.scales, *(ratio for row in fitted.aspect_ratios for ratio in row))
    before = (*origin.scales, *(ratio for row in origin.aspect_ratios for ratio in row))
    assert all(first / 2 <= new <= 2 * first for new, first in zip(numbers, before, strict=True))
    reached = ops.box_iou(boxes, box_convert(fitted.default_boxes(), "cxcywh", "xyxy")).amax(1)
    old = ops.box_iou(boxes, box_convert(origin.default_boxes(), "cxcywh", "xyxy")).amax(1)
    assert (reached > 0.5).sum() >= (old > 0.5).sum()
    assert reached.mean() > old.mean() + 0.03
    assert Layout.from_dict(json.loads(json.dumps(fitted.to_dict()))) == fitted


def test_small_boxes_that_hardly_match_do_so_once_fitted():
    boxes = boxes_of_sides((14, 14))
    assert (LAYOUTS["300"].best_overlaps(boxes) > 0.5).float().mean() < 0.05
    assert (LAYOUTS["300"].fitted(boxes).best_overlaps(boxes) > 0.5).float().mean() > 0.75


def test_a_layout_is_not_fitted_to_nothing():
    with pytest.raises(ValueError, match="fitted to no boxes"):
        PUBLISHED_LAYOUT.fitted(torch.zeros(0, 4))


def test_another_layout_by_hand():
    assert SMALL_LAYOUT.boxes_per_cell == (4, 6, 4, 2)
    assert SMALL_LAYOUT.boxes_per_map == (4 * 144, 6 * 36, 4 * 9, 2)
    boxes = SMALL_LAYOUT.default_boxes() * 96
    # The second cell of the first map; and both squares of the last, of 80 and sqrt(80 * 96) pixels.
    np.testing.assert_allclose(boxes[1], [12, 4, 14, 14], rtol=1e-6)
    np.testing.assert_allclose(boxes[-2:], [[48, 48, 80, 80], [48, 48, 7680**0.5, 7680**0.5]], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"size": 100}, ValueError, "the first map of an input of 100 has 13 cells; got 12"),
        ({"size": 7}, ValueError, "size is 8 to 4096"),
        ({"size": 96.0}, TypeError, "whole"),
        ({"size": True}, TypeError, "whole"),
        ({"maps": (12, 6, 3, 0)}, ValueError, "half of 3 cells, or two fewer, comes next; got 0"),
        ({"maps": (12, 7, 3, 1)}, ValueError, "half of 12 cells, or two fewer, comes next; got 7"),
        ({"maps": ()}, ValueError, "got 0 maps"),
        ({"maps": ("12", 6, 3, 1)}, TypeError, "numbers"),
        ({"maps": torch.ones(4).expand(4)}, TypeError, "lists of numbers"),
        ({"maps": 12}, TypeError, "lists of numbers"),
        ({"aspect_ratios": 2}, TypeError, "lists of numbers"),
        ({"aspect_ratios": (2, 2, 2, 2)}, TypeError, "lists of numbers"),
        ({"steps": (8, 16, 32)}, ValueError, "3 steps"),
        ({"steps": (8, 16, 32, 0)}, ValueError, "above 0"),
        ({"scales": (14, 30, 55, 80)}, ValueError, "4 scales"),
        ({"scales": (14, 30, 55, 80, float("inf"))}, ValueError, "finite"),
        ({"scales": (14, 30, 55, 80, float("nan"))}, ValueError, "finite"),
        ({"aspect_ratios": ((2,), (2,), (2,), (2,) * 17)}, ValueError, "at most 16"),
    ],
)
def test_layouts_that_no_network_has_are_refused(changes, error, reason):
    with pytest.raises(error, match=reason):
        Layout.from_dict(SMALL_LAYOUT.to_dict() | changes)


@pytest.mark.parametrize("values", [None, [], {}, {"size": 300}, SMALL_LAYOUT.to_dict() | {"more": 1}])
def test_other_data_is_no_layout(values):
    with pytest.raises(ValueError, match="a layout has aspect_ratios, maps, scales, size, steps"):
        Layout.from_dict(values)


@given(arrays(np.float32, (7, 4), elements=st.floats(-10, 10, width=32)))
def test_conversions_are_those_of_torchvision(values):
    boxes = torch.from_numpy(values)
    assert torch.equal(to_corners(boxes), box_convert(boxes, "cxcywh", "xyxy"))
    assert torch.equal(to_centers(boxes), box_convert(boxes, "xyxy", "cxcywh"))


@given(arrays(np.float32, (7, 4), elements=st.floats(0, 1, width=32)))
def test_overlaps_are_those_of_torchvision(values):
    boxes = to_corners(torch.from_numpy(values) + 0.01)
    torch.testing.assert_close(box_iou(boxes, boxes[:3]), ops.box_iou(boxes, boxes[:3]), atol=1e-6, rtol=1e-5)


def test_first_default_boxes_by_hand():
    # Map 0 has 38x38 cells of 8 pixels: the first two of its first shape, 21 pixels square, lie side by side.
    np.testing.assert_allclose(
        PUBLISHED_LAYOUT.default_boxes()[:2] * 300, [[4, 4, 21, 21], [12, 4, 21, 21]], rtol=1e-6
    )
    # The last map has one cell; its last shape is tall: 261 / sqrt(2) by 261 * sqrt(2), clamped to the image.
    np.testing.assert_allclose(
        PUBLISHED_LAYOUT.default_boxes()[-1] * 300, [150, 150, 261 / 2**0.5, 300], rtol=1e-6
    )


@pytest.mark.parametrize("i", range(4))
def test_match_equals_the_published_encoder(figures, i):
    boxes, labels = torch.tensor(figures[f"encode{i}/boxes"]), torch.tensor(figures[f"encode{i}/labels"])
    matched, matched_labels = match(boxes, labels, PUBLISHED_LAYOUT.default_boxes())
    np.testing.assert_array_equal(matched, figures[f"encode{i}/out_boxes_xywh"])
    np.testing.assert_array_equal(matched_labels, figures[f"encode{i}/out_labels"])


def padded_truths(figures, most=61):
    boxes, labels = torch.zeros(4, most, 4), torch.zeros(4, most, dtype=torch.int64)
    for i in range(4):
        count = len(figures[f"encode{i}/labels"])
        boxes[i, :count] = torch.tensor(figures[f"encode{i}/boxes"])
        labels[i, :count] = torch.tensor(figures[f"encode{i}/labels"])
    return boxes, labels


def test_match_of_a_padded_batch_equals_single_images(figures):
    matched, labels = match(*padded_truths(figures), PUBLISHED_LAYOUT.default_boxes())
    for i in range(4):
        np.testing.assert_array_equal(matched[i], figures[f"encode{i}/out_boxes_xywh"])
        np.testing.assert_array_equal(labels[i], figures[f"encode{i}/out_labels"])


@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3)])
def test_match_without_ground_truths_is_all_background(shape):
    matched, labels = match(
        torch.zeros(*shape, 4), torch.zeros(shape, dtype=torch.int64), PUBLISHED_LAYOUT.default_boxes()
    )
    assert labels.shape == (*shape[:-1], 8732)
    assert labels.dtype == torch.int64
    assert not labels.any()
    expected = PUBLISHED_LAYOUT.default_boxes().expand(*shape[:-1], -1, -1)
    torch.testing.assert_close(matched, expected, atol=1e-6, rtol=0)


def test_of_two_truths_that_want_one_default_box_the_later_has_it():
    defaults = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1]])
    truths = torch.tensor([[0.3, 0.3, 0.7, 0.7], [0.35, 0.35, 0.75, 0.75]])
    assert match(truths, torch.tensor([1, 2]), defaults)[1].tolist() == [2, 0]
    assert match(truths.flip(0), torch.tensor([2, 1]), defaults)[1].tolist() == [1, 0]


def test_a_truth_that_overlaps_little_still_takes_its_best_default_box():
    tiny = torch.tensor([[0.5, 0.5, 0.505, 0.505]])
    _, labels = match(tiny, torch.tensor([7]), PUBLISHED_LAYOUT.default_boxes())
    assert labels.count_nonzero() == 1
    assert labels.max() == 7


@pytest.mark.parametrize(("boxes", "labels"), [((3, 4), (2,)), ((4,), ()), ((2, 3, 4), (3,)), ((3, 5), (3,))])
def test_match_refuses_shapes_that_do_not_fit(boxes, labels):
    with pytest.raises(ValueError, match="boxes must be"):
        match(torch.zeros(boxes), torch.zeros(labels, dtype=torch.int64), PUBLISHED_LAYOUT.default_boxes())


def test_encode_by_hand():
    # 0.05 right of the centre of a box 0.2 wide is a quarter of its width, or 2.5 tenths; e times as tall.
    offsets = encode(torch.tensor([0.55, 0.5, 0.2, 0.4 * np.e]), torch.tensor([0.5, 0.5, 0.2, 0.4]))
    torch.testing.assert_close(offsets, torch.tensor([2.5, 0, 0, 5]), atol=1e-5, rtol=1e-5)


unit = st.floats(2**-6, 1, width=32)


@given(arrays(np.float32, (5, 4), elements=unit), arrays(np.float32, (5, 4), elements=unit))
def test_decode_inverts_encode(boxes, defaults):
    boxes, defaults = torch.from_numpy(boxes), torch.from_numpy(defaults)
    # Within 62.5 times the default box, where sizes are not capped.
    boxes[:, 2:] = boxes[:, 2:].minimum(60 * defaults[:, 2:])
    corners = decode(encode(boxes, defaults), defaults)
    torch.testing.assert_close(box_convert(corners, "xyxy", "cxcywh"), boxes, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decode_computes_in_float32_and_leaves_its_input(dtype):
    offsets = torch.randn(100, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = offsets.clone()
    boxes = decode(offsets, PUBLISHED_LAYOUT.default_boxes()[:100])
    assert boxes.dtype == torch.float32
    assert torch.equal(boxes, decode(offsets.float(), PUBLISHED_LAYOUT.default_boxes()[:100]))
    assert torch.equal(offsets, before)


def test_decode_of_absurd_sizes_is_finite():
    assert decode(torch.full((1, 4), 1e4), PUBLISHED_LAYOUT.default_boxes()[:1]).isfinite().all()
