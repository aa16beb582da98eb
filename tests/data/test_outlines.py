import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from pycocotools import mask as official

from ssd.data.outlines import around_mask, around_points, around_segmentation, turned


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_masks_have_the_box_of_their_pixels(height, width, data):
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.asfortranarray(np.array(bits, np.uint8).reshape(height, width))
    packed = official.encode(mask)
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    counts = [0, *runs] if flat[0] else runs
    found = [around_mask(packed["counts"].decode(), packed["size"]), around_mask(counts, [height, width])]
    if mask.any():
        left, top, box_width, box_height = official.toBbox(packed).tolist()
        assert found == [(left, top, left + box_width, top + box_height)] * 2
    else:
        assert found == [None, None]


@pytest.mark.parametrize(
    ("counts", "size"),
    [
        *(([3, 4], [2, 3]), ([3, -1, 4], [2, 3]), ([], [2, 3]), (None, [2, 3]), ([3, 3], None)),
        *(([3, 3], [0, 6]), ([3, "3"], [2, 3]), (["a"], [2, 3]), ([6], [2, 3]), ([10**30], [2, 3])),
    ],
)
def test_run_lengths_that_make_no_such_image(counts, size):
    assert around_mask(counts, size) is None


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), st.integers(0, 9), st.integers(0, 9))
def test_no_text_gives_anything_but_a_box_in_the_image(text, height, width):
    box = around_mask(text, [height, width])
    assert box is None or (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height)


@pytest.mark.parametrize(
    ("segmentation", "box"),
    [
        ([[1, 2, 5, 2, 5, 9]], (1, 2, 5, 9)),
        ([[1, 2, 5, 2, 5, 9], [7, 0, 8, 0, 8, 1]], (1, 0, 8, 9)),
        ([1, 2, 5, 2, 5, 9], (1, 2, 5, 9)),
        ([[1, 2], [5, 2], [5, 9]], (1, 2, 5, 9)),
        ({"counts": [7, 2, 3], "size": [4, 3]}, (1, 0, 3, 4)),
        ([[1, 2, 5, 9]], None),
        ([[1, 2, 5, 2, 5]], None),
        ([[1, 2, 5, 2, 5, 9], [1, 2, 3]], None),
        ([[1, 2, 5, 2, 5, float("nan")]], None),
        *((each, None) for each in ([], [[]], {}, None, "", 5, [None], [[None] * 6], {"counts": "a"})),
    ],
)
def test_boxes_of_segmentations(segmentation, box):
    assert around_segmentation(segmentation) == box


def test_points_are_three_or_more():
    assert around_points([0, 1, 2, 3]) is None
    assert around_points((3, 1, 0, 5, 2, 2)) == (0, 1, 3, 5)


@settings(max_examples=100, deadline=None)
@given(st.floats(-720, 720), st.floats(1, 500), st.floats(1, 500))
def test_turned_rectangles_have_the_box_of_their_corners(degrees, width, height):
    box = turned((10, 20, 10 + width, 20 + height), degrees)
    turn = np.exp(1j * np.radians(degrees))
    corners = [complex(x, y) * turn for x in (-width / 2, width / 2) for y in (-height / 2, height / 2)]
    centre = complex(10 + width / 2, 20 + height / 2)
    xs, ys = np.real(corners) + centre.real, np.imag(corners) + centre.imag
    np.testing.assert_allclose(box, (xs.min(), ys.min(), xs.max(), ys.max()), atol=1e-9)
