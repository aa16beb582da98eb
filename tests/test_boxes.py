import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays
from torchvision.ops import box_convert

from ssd.boxes import NUM_DEFAULT_BOXES, decode, default_boxes, encode, match


def test_default_boxes_equal_the_published_ones(figures):
    boxes = default_boxes()
    assert boxes.shape == (NUM_DEFAULT_BOXES, 4) == (8732, 4)
    np.testing.assert_array_equal(boxes, figures["dboxes/xywh"])
    np.testing.assert_array_equal(box_convert(boxes, "cxcywh", "xyxy"), figures["dboxes/ltrb"])


def test_first_default_boxes_by_hand():
    # Map 0 has 38x38 cells of 8 pixels: the first two of its first shape, 21 pixels square, lie side by side.
    np.testing.assert_allclose(default_boxes()[:2] * 300, [[4, 4, 21, 21], [12, 4, 21, 21]], rtol=1e-6)
    # The last map has one cell; its last shape is tall: 261 / sqrt(2) by 261 * sqrt(2), clamped to the image.
    np.testing.assert_allclose(default_boxes()[-1] * 300, [150, 150, 261 / 2**0.5, 300], rtol=1e-6)


@pytest.mark.parametrize("i", range(4))
def test_match_equals_the_published_encoder(figures, i):
    boxes, labels = torch.tensor(figures[f"encode{i}/boxes"]), torch.tensor(figures[f"encode{i}/labels"])
    matched, matched_labels = match(boxes, labels, default_boxes())
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
    matched, labels = match(*padded_truths(figures), default_boxes())
    for i in range(4):
        np.testing.assert_array_equal(matched[i], figures[f"encode{i}/out_boxes_xywh"])
        np.testing.assert_array_equal(labels[i], figures[f"encode{i}/out_labels"])


@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3)])
def test_match_without_ground_truths_is_all_background(shape):
    matched, labels = match(torch.zeros(*shape, 4), torch.zeros(shape, dtype=torch.int64), default_boxes())
    assert labels.shape == (*shape[:-1], 8732)
    assert labels.dtype == torch.int64
    assert not labels.any()
    expected = default_boxes().expand(*shape[:-1], -1, -1)
    torch.testing.assert_close(matched, expected, atol=1e-6, rtol=0)


def test_of_two_truths_that_want_one_default_box_the_later_has_it():
    defaults = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1]])
    truths = torch.tensor([[0.3, 0.3, 0.7, 0.7], [0.35, 0.35, 0.75, 0.75]])
    assert match(truths, torch.tensor([1, 2]), defaults)[1].tolist() == [2, 0]
    assert match(truths.flip(0), torch.tensor([2, 1]), defaults)[1].tolist() == [1, 0]


def test_a_truth_that_overlaps_little_still_takes_its_best_default_box():
    tiny = torch.tensor([[0.5, 0.5, 0.505, 0.505]])
    _, labels = match(tiny, torch.tensor([7]), default_boxes())
    assert labels.count_nonzero() == 1
    assert labels.max() == 7


@pytest.mark.parametrize(("boxes", "labels"), [((3, 4), (2,)), ((4,), ()), ((2, 3, 4), (3,)), ((3, 5), (3,))])
def test_match_refuses_shapes_that_do_not_fit(boxes, labels):
    with pytest.raises(ValueError, match="boxes must be"):
        match(torch.zeros(boxes), torch.zeros(labels, dtype=torch.int64), default_boxes())


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
    boxes = decode(offsets, default_boxes()[:100])
    assert boxes.dtype == torch.float32
    assert torch.equal(boxes, decode(offsets.float(), default_boxes()[:100]))
    assert torch.equal(offsets, before)


def test_decode_of_absurd_sizes_is_finite():
    assert decode(torch.full((1, 4), 1e4), default_boxes()[:1]).isfinite().all()
