"""Large images in overlapping tiles: where they lie, and one NMS over what is found in all of them."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ssd.postprocess import overlap

OVERLAP = 0.25
"""Least part of a tile's side that it shares with the next: a smaller object is whole in one of them."""

# Of a tile's side: the object of a box that ends so near its border may go on beyond. With more, whole ones
# beside it count as cut.
_BORDER = 0.005
_AT_ONCE = 64  # boxes, for memory
_WITHIN = 0.5  # of a cut box: with more of it inside another one, it is a part of that one's object

Found: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""boxes float32 xyxy ``[K, 4]``, scores float32 ``[K]``, class_ids int64 ``[K]``, best first."""


class Window(NamedTuple):
    """A part of an image, in its pixels."""

    left: int
    top: int
    right: int
    bottom: int


def cut(width: int, height: int, side: int | None) -> list[Window]:
    """The whole image and, if it is larger than a tile, tiles that cover it, evenly laid.

    Args:
        width, height: of the image, in pixels.
        side: of a tile, in pixels of the image, at least 1; None for no tiles.

    >>> [window[:2] for window in cut(700, 300, 400)]
    [(0, 0), (0, 0), (300, 0)]
    """
    whole = Window(0, 0, width, height)
    if side is None:
        return [whole]
    tiles = [
        Window(left, top, min(left + side, width), min(top + side, height))
        for top, left in product(_starts(height, side), _starts(width, side))
    ]
    return [whole] if len(tiles) == 1 else [whole, *tiles]


def number_of_windows(width: int, height: int, side: int) -> int:
    """How many windows `cut` gives."""
    tiles = (1 + _steps(width, side)) * (1 + _steps(height, side))
    return tiles if tiles == 1 else 1 + tiles


def _starts(length: int, side: int) -> list[int]:
    steps = _steps(length, side)
    return [round(i * (length - side) / max(steps, 1)) for i in range(steps + 1)]


def _steps(length: int, side: int) -> int:
    return -(-max(0, length - side) // max(1, int(side * (1 - OVERLAP))))


def in_tiles(boxes: Tensor, sizes: Tensor, side: int) -> Tensor:
    """Boxes in parts of a tile that they are in, instead of their image; larger ones fill it.

    Args:
        boxes: float32 xyxy in parts of their images, ``[M, 4]``.
        sizes: float32 width and height of their images in pixels, ``[M, 2]``.
        side: of the tiles in pixels.
    """
    tiles = sizes.clamp(max=side)
    shapes = (boxes[:, 2:] - boxes[:, :2]) * sizes
    # Somewhere: where tiles lie does not matter.
    corners = boxes[:, :2] * sizes % (tiles - shapes).clamp(min=1)
    return (torch.cat([corners, corners + shapes], 1) / tiles.repeat(1, 2)).clamp(0, 1)


def gather(
    found: Sequence[Found],
    windows: Sequence[Window],
    size: tuple[int, int],
    *,
    iou_threshold: float,
    max_detections: int,
) -> Found:
    """What was found in an image, in its pixels, from what was found in each window; see `merge`.

    Args:
        found: of each window, its boxes in parts of it.
        windows: of the image.
        size: width and height of the image.
        iou_threshold, max_detections: see `ssd.postprocess.postprocess`.

    Returns:
        Boxes within the image that have an area.
    """
    parts: list[Found] = []
    ends: list[Tensor] = []
    for (shares, scores, class_ids), window in zip(found, windows, strict=True):
        left, top, right, bottom = window
        corner = shares.new_tensor([left, top, left, top])
        sides = shares.new_tensor([right - left, bottom - top] * 2)
        boxes = (shares * sides + corner).clamp(min=corner, max=shares.new_tensor([right, bottom] * 2))
        inside = (boxes[:, 2:] > boxes[:, :2]).all(1)  # what lies beyond the border has no area left
        parts.append((boxes[inside], scores[inside], class_ids[inside]))
        ends.append(are_cut(boxes[inside], window, size))
    if len(parts) == 1:
        return parts[0]
    boxes, scores, class_ids = map(torch.cat, zip(*parts, strict=True))
    kept = merge(boxes, scores, class_ids, torch.cat(ends), iou_threshold)[:max_detections]
    return boxes[kept], scores[kept], class_ids[kept]


def are_cut(boxes: Tensor, window: Window, size: tuple[int, int]) -> Tensor:
    """Whether boxes end at a border of their window within the image, so that an object may go on beyond.

    Args:
        boxes: float32 xyxy in pixels of the image, ``[K, 4]``.
        window: that they were found in.
        size: width and height of the image.

    Returns:
        bool ``[K]``.
    """
    near_x, near_y = _BORDER * (window.right - window.left), _BORDER * (window.bottom - window.top)
    left, top, right, bottom = boxes.unbind(-1)
    at_left = (left < window.left + near_x) & (window.left > 0)
    at_top = (top < window.top + near_y) & (window.top > 0)
    at_right = (right > window.right - near_x) & (window.right < size[0])
    at_bottom = (bottom > window.bottom - near_y) & (window.bottom < size[1])
    return at_left | at_top | at_right | at_bottom


def merge(boxes: Tensor, scores: Tensor, class_ids: Tensor, cut: Tensor, iou_threshold: float) -> Tensor:
    """Greedy NMS in each class over what was found in all windows; cut boxes give way to whole ones.

    A box stays while its IoU with every better one that stayed is below the threshold; whole ones are better
    than cut ones, then those of a higher score. A cut box also goes where half of it is within a whole one,
    as does the one of two cut ones of which half, or half of the other, is within both: they are parts of
    one object.

    Args:
        boxes: float32 xyxy in pixels of the image, with an area, ``[K, 4]``.
        scores: float32 ``[K]``.
        class_ids: int64 ``[K]``.
        cut: bool ``[K]``; see `are_cut`.
        iou_threshold: in [0, 1].

    Returns:
        int64, the indices of those that stay, best scores first.
    """
    order = scores.sort(descending=True, stable=True).indices
    order = order[cut[order].sort(stable=True).indices]
    classes = class_ids.unique().tolist()
    kept = [_kept(boxes, cut, order[class_ids[order] == each], iou_threshold) for each in classes]
    left = torch.cat(kept) if kept else order
    return left[scores[left].sort(descending=True, stable=True).indices]


def _kept(boxes: Tensor, cut: Tensor, order: Tensor, iou_threshold: float) -> Tensor:
    """Those that stay of the boxes of one class, best first."""
    worse, better = _conflicts(boxes[order], cut[order], iou_threshold)
    keep = torch.ones_like(order, dtype=torch.bool)
    while True:  # as `ssd.postprocess.survivors`, of pairs
        update = torch.ones_like(keep)
        update[worse[keep[better]]] = False
        if torch.equal(update, keep):
            return order[keep]
        keep = update


def _conflicts(boxes: Tensor, cut: Tensor, iou_threshold: float) -> tuple[Tensor, Tensor]:
    """Pairs of boxes, which come best first, of which the worse goes if the better stays.

    Each box is compared only with those around it, some at a time: an image of many tiles has 100,000 boxes.
    """
    low, high = boxes.split(2, dim=1)
    area = (high - low).prod(1)
    # Small boxes that lie side by side together, so that few others are around them.
    by_left = low[:, 0].argsort()
    by_size = (high - low).amax(1).log2().floor()[by_left].argsort(stable=True)
    pairs = [low.new_zeros(0, 2, dtype=torch.int64)]
    for some in by_left[by_size].split(_AT_ONCE):
        near = ((low < high[some].amax(0)) & (high > low[some].amin(0))).all(1)
        others = (near if iou_threshold > 0 else torch.ones_like(near)).nonzero().flatten()
        span = high[some, None].minimum(high[others]) - low[some, None].maximum(low[others])
        # Of the cut box of a row; and of two cut ones, of the smaller.
        least = area[some, None].minimum(area[others].where(cut[others], torch.inf))
        parts = cut[some, None] & (span.clamp_(min=0).prod(-1) > _WITHIN * least)
        conflict = (overlap(boxes[None, some], boxes[None, others], iou_threshold)[0] | parts) & (
            others < some[:, None]
        )
        row, column = conflict.nonzero(as_tuple=True)
        pairs.append(torch.stack([some[row], others[column]], 1))
    worse, better = torch.cat(pairs).unbind(1)
    return worse, better
