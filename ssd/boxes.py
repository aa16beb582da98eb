"""Layouts of default boxes, matching, and the coding between boxes and network outputs: pure functions.

Boxes are float32 in the last dimension, normalised by the image's width and height, as centre and
size (``cxcywh``) or as corners (``xyxy``).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

CENTER_VARIANCE = 0.1
SIZE_VARIANCE = 0.2

# exp() of a raw size offset is capped here, as in torchvision's and detectron2's box coders; a default
# box cannot grow more than 62.5 times, so nothing that a trained network predicts is touched.
MAX_LOG_GROWTH = math.log(1000 / 16)

# Far above any layout of use; layouts come with files of strangers.
_MAX_SIZE = 4096
_MAX_MAPS = 16
_MAX_RATIOS = 16
_MAX_NUMBER = 1e6
_MAX_BOXES = 4_000_000

# A fitted number stays within this factor of the one it began with: what a map sees of the image, and how
# closely its cells lie, is made for boxes of about that size.
_MOST_FITTED = 2.0
_FITTED_BY = (1.5, 1.2, 1.1, 1.05)  # factors of the search, from coarse to fine
_FITTED_BOXES = 2000  # that are looked at; more tell nothing new
_AT_ONCE = 10_000  # boxes, for memory


@dataclass(frozen=True)
class Layout:
    """The size of a network's input, and the default boxes on each of its feature maps.

    The network follows from it: the first map is the trunk's, an eighth of the input; each block after it
    makes the next one, of half its size, or two smaller.

    Raises:
        ValueError: values that no network has; the message says which.
        TypeError: values that are no numbers.

    >>> LAYOUTS["300"].num_default_boxes
    8732
    """

    size: int
    """Width and height of the input in pixels."""
    maps: tuple[int, ...]
    """Cells across and down of each feature map, largest first."""
    steps: tuple[float, ...]
    """Of each map, how many pixels of the input lie between the centres of its cells."""
    scales: tuple[float, ...]
    """Of each map, the side of its square default box in pixels; and one number more, for after the last."""
    aspect_ratios: tuple[tuple[float, ...], ...]
    """Of each map, the ratios of width to height of the other default boxes; each is also used upright."""

    def __post_init__(self) -> None:
        rows: list[object] = [self.maps, self.steps, self.scales, self.aspect_ratios]
        rows += self.aspect_ratios if isinstance(self.aspect_ratios, list | tuple) else []
        if not all(isinstance(row, list | tuple) for row in rows):
            raise TypeError("a layout's maps, steps, scales and rows of aspect ratios are lists of numbers")
        for name in ("maps", "steps", "scales"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "aspect_ratios", tuple(tuple(ratios) for ratios in self.aspect_ratios))
        whole = (self.size, *self.maps)
        numbers = (*whole, *self.steps, *self.scales, *(ratio for row in self.aspect_ratios for ratio in row))
        if not all(type(number) in (int, float) for number in numbers) or {*map(type, whole)} != {int}:
            raise TypeError("a layout is made of numbers; its size and maps are whole ones")
        count = len(self.maps)
        lengths = len(self.steps), len(self.scales) - 1, len(self.aspect_ratios)
        if not 1 <= count <= _MAX_MAPS or lengths != (count,) * 3:
            raise ValueError(
                f"a layout has 1 to {_MAX_MAPS} maps, as many steps and rows of aspect ratios, and a scale "
                f"more; got {count} maps, {lengths[0]} steps, {lengths[2]} rows, {lengths[1] + 1} scales"
            )
        if not 8 <= self.size <= _MAX_SIZE:
            raise ValueError(f"a layout's size is 8 to {_MAX_SIZE} pixels; got {self.size}")
        first = math.ceil(self.size / 8)
        if self.maps[0] != first:
            raise ValueError(
                f"the first map of an input of {self.size} has {first} cells; got {self.maps[0]}"
            )
        for larger, smaller in pairwise(self.maps):
            if smaller < 1 or smaller not in (_following(larger, 1), _following(larger, 2)):
                raise ValueError(f"a map of half of {larger} cells, or two fewer, comes next; got {smaller}")
        if not all(0 < number <= _MAX_NUMBER for number in numbers):
            raise ValueError(
                f"a layout's steps, scales and aspect ratios are above 0, finite, at most {_MAX_NUMBER:g}"
            )
        if max(map(len, self.aspect_ratios)) > _MAX_RATIOS:
            raise ValueError(f"a layout has at most {_MAX_RATIOS} aspect ratios of a map")
        if self.num_default_boxes > _MAX_BOXES:
            raise ValueError(f"a layout has at most {_MAX_BOXES:,} boxes; got {self.num_default_boxes:,}")

    @property
    def strides(self) -> tuple[int, ...]:
        """Of each block that makes the next map: 1, without padding, or 2, with a border of 1 around the map.

        1 where both give that map: from 5 cells to 3, and from 4 to 2.

        >>> LAYOUTS["300"].strides
        (2, 2, 2, 1, 1)
        """
        return tuple(1 if smaller == _following(larger, 1) else 2 for larger, smaller in pairwise(self.maps))

    @property
    def boxes_per_cell(self) -> tuple[int, ...]:
        """How many default boxes each cell of a map has."""
        return tuple(2 + 2 * len(ratios) for ratios in self.aspect_ratios)

    @property
    def boxes_per_map(self) -> tuple[int, ...]:
        """How many default boxes each map has."""
        return tuple(n * cells**2 for n, cells in zip(self.boxes_per_cell, self.maps, strict=True))

    @property
    def num_default_boxes(self) -> int:
        """How many default boxes there are on all maps."""
        return sum(self.boxes_per_map)

    def shapes(self) -> list[list[tuple[float, float]]]:
        """Of each map, the width and height of its default boxes, in parts of the image."""
        shapes = []
        for scale, next_scale, ratios in zip(self.scales, self.scales[1:], self.aspect_ratios, strict=False):
            small = scale / self.size
            between = math.sqrt(small * (next_scale / self.size))
            of_map = [(small, small), (between, between)]
            for ratio in ratios:
                wide = (small * math.sqrt(ratio), small / math.sqrt(ratio))
                of_map += [wide, wide[::-1]]
            shapes.append(of_map)
        return shapes

    def default_boxes(self) -> Tensor:
        """The default boxes, clamped to the image.

        Returns:
            float32 cxcywh, normalised, in [0, 1], ``[num_default_boxes, 4]`` on the CPU; ordered by map, then
            shape, then row, then column.

        >>> LAYOUTS["300"].default_boxes()[0]
        tensor([0.0133, 0.0133, 0.0700, 0.0700])
        """
        levels = []
        for cells, step, shapes in zip(self.maps, self.steps, self.shapes(), strict=True):
            # As published, a cell is step/size wide (37.5 cells for step 8), although the map has 38 of them.
            centers = (torch.arange(cells, dtype=torch.float64, device="cpu") + 0.5) / (self.size / step)
            cy, cx = torch.meshgrid(centers, centers, indexing="ij")
            grid = torch.stack([cx, cy], dim=-1).reshape(1, -1, 2).expand(len(shapes), -1, -1)
            sides = torch.tensor(shapes, dtype=torch.float64, device="cpu")[:, None]
            sides = sides.expand(-1, grid.shape[1], -1)
            levels.append(torch.cat([grid, sides], dim=-1).reshape(-1, 4))
        return torch.cat(levels).float().clamp(0, 1)

    def halved(self) -> "Layout | None":
        """The layout of the same network over images of half the size, which has fewer maps.

        It has those that the trunk and the first blocks make there, as far as they have as many cells as the
        next map has here. Default boxes keep their width and height in pixels. None where not even the first
        map has.

        >>> LAYOUTS["300"].halved().maps, LAYOUTS["512"].halved().maps
        ((19, 10, 5, 3, 1), (32, 16, 8, 4, 2))
        """
        size, maps = self.size // 2, list(self.maps[1:2])
        if size < 8 or maps != [math.ceil(size / 8)]:
            return None
        for stride, wanted in zip(self.strides, self.maps[2:], strict=False):
            if wanted != _following(maps[-1], stride):
                break
            maps.append(wanted)
        count = len(maps)
        steps = tuple(step / 2 for step in self.steps[1 : count + 1])
        return Layout(size, tuple(maps), steps, self.scales[: count + 1], self.aspect_ratios[:count])

    def best_overlaps(self, boxes: Tensor) -> Tensor:
        """The IoU of each box with the default box that fits it best.

        Args:
            boxes: float32 xyxy, normalised, within the image, ``[M, 4]`` on the CPU.

        Returns:
            float32 ``[M]``.

        >>> LAYOUTS["300"].best_overlaps(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
        tensor([0.9135])
        """
        if len(boxes) > _AT_ONCE:
            return torch.cat([self.best_overlaps(some) for some in boxes.split(_AT_ONCE)])
        center, side = to_centers(boxes.double()).split(2, dim=1)
        best = boxes.new_zeros(len(boxes), dtype=torch.float64)
        for cells, step, shapes in zip(self.maps, self.steps, self.shapes(), strict=True):
            # Of default boxes of one shape, the nearest overlaps most: what is shared falls with the distance
            # across, and with that down.
            cell = self.size / step
            nearest = (((center * cell).floor().clamp(0, cells - 1) + 0.5) / cell).clamp(max=1)
            sides = torch.tensor(shapes, dtype=torch.float64).clamp(max=1)[:, None]  # [S, 1, 2]
            reach = (side + sides) / 2 - (center - nearest).abs()
            shared = torch.minimum(reach.clamp(min=0), torch.minimum(side, sides)).prod(-1)
            best = torch.maximum(best, (shared / (side.prod(-1) + sides.prod(-1) - shared)).amax(0))
        return best.float()

    def fitted(self, boxes: Tensor) -> "Layout":
        """This layout with scales and aspect ratios by which more of some boxes can be matched.

        They are searched one by one, from coarse to fine, for the largest part of the boxes that a default
        box overlaps by more than 0.5, and the highest overlap. Maps, steps and the number of shapes stay, so
        that a network for it has tensors of the same shapes; each number stays within half and twice of what
        it was.

        Args:
            boxes: float32 xyxy, normalised, within the image, with an area, ``[M, 4]`` on the CPU; of very
                many, some are looked at.

        Raises:
            ValueError: there are no boxes.
        """
        if not len(boxes):
            raise ValueError("a layout cannot be fitted to no boxes")
        some = evenly(boxes, _FITTED_BOXES)

        def fit(layout: Layout) -> float:
            best = layout.best_overlaps(some)
            return float((best > 0.5).double().mean() + best.double().mean())

        layout, reached = self, fit(self)
        for factor in _FITTED_BY:
            improved = True
            while improved:
                improved = False
                for other in _neighbours(layout, self, factor):
                    if (score := fit(other)) > reached + 1e-4:
                        layout, reached, improved = other, score, True
                        break
        return layout

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as files hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Layout":
        """What `to_dict` gave, also after JSON made lists of its tuples.

        Raises:
            ValueError, TypeError: it is something else.
        """
        names = {each.name for each in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            raise ValueError(f"a layout has {', '.join(sorted(names))}")
        return cls(**values)


def _following(cells: int, stride: int) -> int:
    """Cells of the map that a block's convolution of 3x3 makes of one with so many; see `Layout.strides`."""
    return cells - 2 if stride == 1 else math.ceil(cells / 2)


def evenly(boxes: Tensor, most: int) -> Tensor:
    """At most so many of the boxes, evenly spread."""
    return boxes[torch.linspace(0, len(boxes) - 1, min(len(boxes), most), dtype=torch.float64).long()]


def _neighbours(layout: Layout, origin: Layout, factor: float) -> Iterator[Layout]:
    """Layouts with one number of `layout` changed by a factor, not too far from that of `origin`."""

    def changed(value: float, first: float) -> Iterator[float]:
        for new in (round(value * factor, 2), round(value / factor, 2)):
            if first / _MOST_FITTED <= new <= first * _MOST_FITTED:
                yield new

    for k, scale in enumerate(layout.scales):
        for new in changed(scale, origin.scales[k]):
            scales = (*layout.scales[:k], new, *layout.scales[k + 1 :])
            if sorted(scales) == list(scales):
                yield replace(layout, scales=scales)
    for k, row in enumerate(layout.aspect_ratios):
        for j, ratio in enumerate(row):
            for new in changed(ratio, origin.aspect_ratios[k][j]):
                if new > 1:
                    rows = list(layout.aspect_ratios)
                    rows[k] = (*row[:j], new, *row[j + 1 :])
                    yield replace(layout, aspect_ratios=tuple(rows))


LAYOUTS = {
    # SSD300 as published for COCO: weiliu89/caffe (ssd branch), and NVIDIA DeepLearningExamples'
    # dboxes300_coco.
    "300": Layout(
        size=300,
        maps=(38, 19, 10, 5, 3, 1),
        steps=(8, 16, 32, 64, 100, 300),
        scales=(21, 45, 99, 153, 207, 261, 315),
        aspect_ratios=((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)),
    ),
    # SSD512 for COCO: weiliu89/caffe (ssd branch), and mmdetection's ssd512_coco.
    "512": Layout(
        size=512,
        maps=(64, 32, 16, 8, 4, 2, 1),
        steps=(8, 16, 32, 64, 128, 256, 512),
        scales=(20.48, 51.2, 133.12, 215.04, 296.96, 378.88, 460.8, 542.72),
        aspect_ratios=((2,), (2, 3), (2, 3), (2, 3), (2, 3), (2,), (2,)),
    ),
}
"""Layouts by name. What says nothing of its layout is of the published one."""

PUBLISHED_LAYOUT = LAYOUTS["300"]

FITTED = {"fitted": "300", "fitted-512": "512"}
"""Layouts that are fitted to the boxes of a dataset, by name: what each begins with."""


def to_corners(boxes: Tensor) -> Tensor:
    """xyxy of cxcywh, ``[..., 4]``; as torchvision's box_convert, whose import takes a second."""
    half = 0.5 * boxes[..., 2:]
    return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], dim=-1)


def to_centers(boxes: Tensor) -> Tensor:
    """cxcywh of xyxy, ``[..., 4]``."""
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], dim=-1)


def match(
    boxes: Tensor, labels: Tensor, default_boxes: Tensor, iou_threshold: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Give each default box a ground truth, or the background.

    A default box takes the ground truth that it overlaps most, if their IoU exceeds `iou_threshold`. Each
    ground truth also takes the default box that it overlaps most; where two want the same one, the later
    has it.

    Args:
        boxes: ground truths, float32 xyxy, normalised, ``[M, 4]`` for one image or ``[N, M, 4]`` padded.
        labels: int64 ``[M]`` or ``[N, M]``; classes count from 1, and 0 marks padding. M may be 0.
        default_boxes: float32 cxcywh, normalised, ``[P, 4]``.
        iou_threshold: in [0, 1].

    Returns:
        The matched boxes, float32 cxcywh ``[P, 4]`` or ``[N, P, 4]``, which are the default boxes
        themselves where nothing matched, and their labels, int64 ``[P]`` or ``[N, P]``, 0 for background.

    Raises:
        ValueError: the shapes of boxes and labels do not fit.
    """
    if boxes.ndim not in (2, 3) or boxes.shape[-1] != 4 or labels.shape != boxes.shape[:-1]:
        raise ValueError(
            f"boxes must be [M, 4] or [N, M, 4] and labels [M] or [N, M]; "
            f"got {list(boxes.shape)} and {list(labels.shape)}"
        )
    if boxes.ndim == 2:
        matched, matched_labels = match(boxes[None], labels[None], default_boxes, iou_threshold)
        return matched[0], matched_labels[0]

    corners = to_corners(default_boxes)
    batch, truths, count = *labels.shape, len(default_boxes)
    if truths == 0:
        background = labels.new_zeros(batch, count)
        return to_centers(corners).expand(batch, -1, -1), background

    real = labels > 0  # [N, M]
    iou = box_iou(boxes.reshape(-1, 4), corners).view(batch, truths, count)
    iou = iou.masked_fill_(~real[..., None], -1)
    best_iou, best_truth = iou.max(dim=1)  # [N, P]
    best_default = iou.max(dim=2).indices  # [N, M]

    # amax and not plain indexing: the later ground truth wins on every device, not just by luck on the CPU.
    order = torch.arange(truths, device=labels.device).where(real, -1)
    forced = labels.new_full((batch, count), -1).scatter_reduce(1, best_default, order, "amax")
    best_truth = forced.where(forced >= 0, best_truth)
    positive = (forced >= 0) | (best_iou > iou_threshold)

    matched = boxes.gather(1, best_truth[..., None].expand(-1, -1, 4))
    matched = matched.where(positive[..., None], corners)
    return to_centers(matched), labels.gather(1, best_truth) * positive


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes ``[I, 4]`` and ``[J, 4]``, both xyxy: ``[I, J]``.

    As torchvision's, but by contiguous planes, which is much faster on a CPU.
    """
    ax, ay, ar, ab = a.t().contiguous()[..., None]
    bx, by, br, bb = b.t().contiguous()[:, None]
    shared = torch.minimum(ar, br).sub_(torch.maximum(ax, bx)).clamp_(min=0)
    shared *= torch.minimum(ab, bb).sub_(torch.maximum(ay, by)).clamp_(min=0)
    union = ((ar - ax) * (ab - ay) + (br - bx) * (bb - by)).sub_(shared)
    return shared.div_(union)


def encode(boxes: Tensor, default_boxes: Tensor) -> Tensor:
    """Offsets that the network should predict for boxes: the inverse of `decode`.

    Args:
        boxes: float32 cxcywh, normalised, ``[..., 4]``; sizes above 0.
        default_boxes: float32 cxcywh, normalised, ``[..., 4]``, broadcast against `boxes`.

    Returns:
        float32 ``[..., 4]``: centre distance in default sizes / 0.1, log of the size ratio / 0.2.
    """
    center = (boxes[..., :2] - default_boxes[..., :2]) / (default_boxes[..., 2:] * CENTER_VARIANCE)
    size = (boxes[..., 2:] / default_boxes[..., 2:]).log() / SIZE_VARIANCE
    return torch.cat([center, size], dim=-1)


def decode(offsets: Tensor, default_boxes: Tensor) -> Tensor:
    """Boxes from the network's offsets.

    Args:
        offsets: ``[..., 4]``, any float dtype; computed in float32.
        default_boxes: float32 cxcywh, normalised, ``[..., 4]``, broadcast against `offsets`.

    Returns:
        float32 ``[..., 4]``, xyxy, normalised; not clipped to the image.

    >>> decode(torch.zeros(1, 4), torch.tensor([[0.5, 0.5, 0.2, 0.4]]))
    tensor([[0.4000, 0.3000, 0.6000, 0.7000]])
    """
    offsets = offsets.float()
    center = offsets[..., :2] * CENTER_VARIANCE * default_boxes[..., 2:] + default_boxes[..., :2]
    growth = (offsets[..., 2:] * SIZE_VARIANCE).clamp(max=MAX_LOG_GROWTH)
    half = 0.5 * (growth.exp() * default_boxes[..., 2:])
    return torch.cat([center - half, center + half], dim=-1)
