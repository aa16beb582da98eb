"""The upright box around what is none itself: polygons, masks in run lengths, turned rectangles.

Boxes are xyxy in pixels.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ssd.data.builder import finite_numbers

Box = tuple[float, float, float, float]


def around_segmentation(segmentation: object) -> Box | None:
    """The box around COCO's segmentation: polygons, or a mask in run lengths, compressed or not.

    Returns:
        None for all that is neither, for polygons of fewer than three points and for empty masks.
    """
    if isinstance(segmentation, dict):
        return around_mask(segmentation.get("counts"), segmentation.get("size"))
    if not isinstance(segmentation, list) or not segmentation:
        return None
    # A list of polygons; some tools write the only one without the outer list, or points as pairs.
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    if all(isinstance(each, list) and len(each) == 2 for each in polygons):
        polygons = [[value for point in polygons for value in point]]
    boxes = [around_points(polygon) for polygon in polygons]
    found = [box for box in boxes if box is not None]
    if not found or len(found) < len(boxes):
        return None
    lefts, tops, rights, bottoms = zip(*found, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def around_points(values: object) -> Box | None:
    """The box around three or more points, given as x, y, x, y, ...; None for all else."""
    if not isinstance(values, Sequence) or len(values) < 6 or len(values) % 2:
        return None
    numbers = finite_numbers(values, len(values))
    if numbers is None:
        return None
    xs, ys = numbers[::2], numbers[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def around_mask(counts: object, size: object) -> Box | None:
    """The box around a mask that is written as COCO's run lengths.

    Args:
        counts: how many pixels are background, object, background, ... in turn, down the columns from the
            left; or the same as pycocotools compresses it to text.
        size: height and width of the image.

    Returns:
        None where the run lengths do not make such an image, or no pixel is of the object.
    """
    sides = finite_numbers(size, 2)
    runs = _unpacked(counts) if isinstance(counts, str) else _runs(counts)
    if sides is None or runs is None:
        return None
    height, width = int(sides[0]), int(sides[1])
    ends = runs.cumsum()
    if not len(runs) or (runs < 0).any() or height < 1 or ends[-1] != height * width:
        return None
    shown = runs[1::2] > 0
    first, last = (ends - runs)[1::2][shown], ends[1::2][shown] - 1  # pixels of each run of the object
    if not len(first):
        return None
    left, right = int(first[0]) // height, int(last[-1]) // height
    # A run that goes on in the next column is at the bottom of one and at the top of the other.
    wraps = bool((first // height != last // height).any())
    top = 0 if wraps else int((first % height).min())
    bottom = height - 1 if wraps else int((last % height).max())
    return float(left), float(top), float(right + 1), float(bottom + 1)


def turned(box: Box, degrees: float) -> Box:
    """The upright box around a rectangle that is turned about its centre."""
    if not degrees:
        return box
    left, top, right, bottom = box
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    half_width, half_height = (right - left) / 2, (bottom - top) / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    across, down = half_width * cos + half_height * sin, half_width * sin + half_height * cos
    return x - across, y - down, x + across, y + down


def _runs(counts: object) -> npt.NDArray[np.int64] | None:
    if not isinstance(counts, list) or not counts:
        return None
    numbers = finite_numbers(counts, len(counts))
    return None if numbers is None else np.array(numbers).astype(np.int64)


def _unpacked(text: str) -> npt.NDArray[np.int64] | None:
    """Run lengths from pycocotools' text: 5 bits a letter, least first; from the fourth on, differences."""
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 50:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last letter of a number, of which bit 4 is the sign
            value -= (bits & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
            if abs(runs[-1]) > 1e9:
                return None
    return np.array(runs, np.int64) if runs and not shift else None
