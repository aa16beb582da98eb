"""The recipes of augmentation for training.

A recipe is a list of functions ``(sample, rng) -> sample``. Those that choose what is seen only move the
sample's window; `render` makes the pixels of it once, at the network's size, and colours are changed after
that. torchvision's v2 transforms do the same on whole images, at about four times the cost.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ssd.choices import Recipe
from ssd.transforms import MEAN

Floats = npt.NDArray[np.float32]
Rng = np.random.Generator


@dataclass(frozen=True)
class Sample:
    """An image with its boxes, on its way through a recipe."""

    image: Tensor
    """uint8 ``[H, W, 3]``, RGB."""
    boxes: Floats
    """xyxy in the pixels of `image`, ``[M, 4]``; M may be 0."""
    labels: npt.NDArray[np.int64]
    """``[M]``, counted from 1."""
    size: int
    """Width and height of the network's input."""
    window: tuple[int, int, int, int]
    """What the network is to see: left, top, right, bottom in the pixels of `image`; it may reach outside."""


Augmentation = Callable[[Sample, Rng], Sample]

CROP_ATTEMPTS = 50
LUMA = np.array([0.299, 0.587, 0.114])  # of RGB, ITU-R BT.601
_YIQ = np.array([LUMA, [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])  # as in NVIDIA DALI's hue


def take_tile(sample: Sample, rng: Rng, *, side: int) -> Sample:
    """Cut out a tile, as detection in tiles sees the image: anywhere, with the centre of some box in it.

    The whole image, which detection looks at besides, stays about as often as any one of its tiles is taken.
    Boxes stay if their centre is in the tile.

    Args:
        sample: fresh, its window the whole image.
        rng: decides.
        side: of the tile in pixels; images that are no larger stay whole.
    """
    height, width = sample.image.shape[:2]
    tiles = math.ceil(width / side) * math.ceil(height / side)
    if tiles == 1 or rng.integers(1 + tiles) == 0:
        return sample
    free = np.maximum((width - side, height - side), 0)
    low, high = np.zeros(2, np.int64), free
    centers = (sample.boxes[:, :2] + sample.boxes[:, 2:]) / 2
    if len(centers):
        center = centers[rng.integers(len(centers))]
        low = np.clip(np.floor(center).astype(np.int64) + 1 - side, 0, free)
        high = np.clip(np.ceil(center).astype(np.int64) - 1, low, free)
    left, top = rng.integers(low, high + 1).tolist()
    right, bottom = left + min(side, width), top + min(side, height)
    inside = _inside(centers, (left, top, right, bottom))
    # Cut out, and not just the window moved: what lies around has lost its boxes, and must not be seen again.
    return replace(
        sample,
        image=sample.image[top:bottom, left:right],
        boxes=sample.boxes[inside] - np.array([left, top, left, top], np.float32),
        labels=sample.labels[inside],
        window=(0, 0, right - left, bottom - top),
    )


def zoom_out(sample: Sample, rng: Rng, *, probability: float = 0.5, most: float = 4.0) -> Sample:
    """Show the image small on a larger canvas (SSD paper, section 3.6), so that objects get smaller.

    Args:
        sample: whose window grows up to `most` times in width and height.
        rng: decides.
        probability: of doing anything.
        most: at least 1.
    """
    if rng.random() >= probability:
        return sample
    left, top, right, bottom = sample.window
    factor = rng.uniform(1, most)
    width, height = (right - left) * factor, (bottom - top) * factor
    left -= round(rng.uniform(0, width - (right - left)))
    top -= round(rng.uniform(0, height - (bottom - top)))
    return replace(sample, window=(left, top, left + round(width), top + round(height)))


def iou_crop(sample: Sample, rng: Rng, *, every_box: bool = False) -> Sample:
    """Crop to a random part that overlaps the boxes by a random minimum (SSD paper, section 2.2).

    The part is 0.3 to 1 of the width and of the height, with these in a ratio of 1:2 to 2:1, and holds the
    centre of a box. Its IoU with some box exceeds 0.1, 0.3, 0.5, 0.7, 0.9 or nothing, by chance; one time in
    seven there is no crop. Boxes stay if their centre does.

    Args:
        sample: without boxes, any part will do.
        rng: decides.
        every_box: the IoU with each box has to exceed the minimum, as NVIDIA's code requires, and not just
            with one, as in the paper.
    """
    modes = (None, 0.1, 0.3, 0.5, 0.7, 0.9, -1.0)  # None: the image as it is; -1: any part
    left, top, right, bottom = sample.window
    width, height = right - left, bottom - top
    boxes = sample.boxes.astype(np.float64)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    for _ in range(CROP_ATTEMPTS):
        least = modes[rng.integers(len(modes))]
        if least is None:
            return sample
        # One part is drawn for a mode, as published: where boxes are small, a strict mode finds none, and
        # the next draw is likely to be a milder one.
        w, h = rng.uniform(0.3, 1, size=2)
        if not 0.5 <= w / h <= 2:
            continue
        x0 = left + round(rng.uniform(0, 1 - w) * width)
        y0 = top + round(rng.uniform(0, 1 - h) * height)
        part = (x0, y0, x0 + max(round(w * width), 1), y0 + max(round(h * height), 1))
        if len(boxes) == 0:
            return replace(sample, window=part)
        inside = _inside(centers, part)
        if not inside.any():
            continue
        if least >= 0:
            enough = _iou(boxes, part) > least
            if not (enough.all() if every_box else enough.any()):
                continue
        return replace(sample, window=part, boxes=sample.boxes[inside], labels=sample.labels[inside])
    return sample


def render(sample: Sample, rng: Rng) -> Sample:
    """Resize what is in the window to the network's size, with ImageNet's mean around the image.

    Boxes are clipped; what no longer has an area goes.
    """
    size = sample.size
    left, top, right, bottom = sample.window
    height, width = sample.image.shape[:2]
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    across, down = size / (right - left), size / (bottom - top)
    # Where the image goes, in whole pixels; boxes move with it exactly.
    u0, v0, u1, v1 = (
        round(value)
        for value in ((x0 - left) * across, (y0 - top) * down, (x1 - left) * across, (y1 - top) * down)
    )
    seen = None
    if u1 > u0 and v1 > v0:
        part = sample.image[y0:y1, x0:x1].permute(2, 0, 1)[None]
        seen = interpolate(part, (v1 - v0, u1 - u0), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    if seen is not None and seen.shape[:2] == (size, size):
        image = seen.contiguous()
    else:
        mean = torch.tensor([round(255 * value) for value in MEAN], dtype=torch.uint8)
        image = mean.expand(size, size, 3).contiguous()
        if seen is None:  # all of it is beyond the window
            return Sample(image, sample.boxes[:0], sample.labels[:0], size, (0, 0, size, size))
        image[v0:v1, u0:u1] = seen
    scale = np.array([(u1 - u0) / (x1 - x0), (v1 - v0) / (y1 - y0)] * 2)
    boxes = (sample.boxes - np.array([x0, y0] * 2)) * scale + np.array([u0, v0] * 2)
    boxes = boxes.clip(0, size).astype(np.float32)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return Sample(image, boxes[kept], sample.labels[kept], size, (0, 0, size, size))


def drop_tiny(sample: Sample, rng: Rng, *, least: float = 1.0) -> Sample:
    """Let go of boxes narrower or lower than `least` pixels: nothing of them can be seen."""
    kept = (sample.boxes[:, 2:] - sample.boxes[:, :2] >= least).all(1)
    return replace(sample, boxes=sample.boxes[kept], labels=sample.labels[kept])


def flip(sample: Sample, rng: Rng) -> Sample:
    """Swap left and right, every other time."""
    if rng.random() >= 0.5:
        return sample
    width = sample.image.shape[1]
    boxes = sample.boxes.copy()
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    left, top, right, bottom = sample.window
    window = (width - right, top, width - left, bottom)
    return replace(sample, image=sample.image.flip(1), boxes=boxes, window=window)


def color_jitter(
    sample: Sample,
    rng: Rng,
    *,
    brightness: float = 0.125,
    contrast: float = 0.5,
    saturation: float = 0.5,
    hue: float = 0.05,
    probability: float = 1.0,
) -> Sample:
    """Change brightness, contrast, saturation and hue by chance, in a random order.

    The ranges are the published ones; the hue is turned in YIQ, as NVIDIA's DALI does it, so that all four
    are one affine map of a pixel.

    Args:
        sample: its image changes, its boxes do not.
        rng: decides.
        brightness, contrast, saturation: factors are drawn from ``[1 - value, 1 + value]``.
        hue: turned by up to this part of a circle either way.
        probability: of each of the four.
    """
    mean = sample.image.permute(2, 0, 1).reshape(3, -1).float().mean(1).double().numpy()
    matrix, offset = np.eye(3), np.zeros(3)

    def factor(reach: float) -> float:
        return rng.uniform(1 - reach, 1 + reach)

    for kind in rng.permutation(4):
        if probability < 1 and rng.random() >= probability:
            continue
        shift = 0.0
        if kind == 0:
            step = np.eye(3) * factor(brightness)
        elif kind == 1:
            amount = factor(contrast)
            step = np.eye(3) * amount
            shift = (1 - amount) * (LUMA @ (matrix @ mean + offset))  # towards the mean grey
        elif kind == 2:
            amount = factor(saturation)
            step = np.eye(3) * amount + (1 - amount) * LUMA  # towards the pixel's own grey
        else:
            angle = 2 * np.pi * rng.uniform(-hue, hue)
            turn = np.array(
                [[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]]
            )
            step = np.linalg.inv(_YIQ) @ turn @ _YIQ
        matrix, offset = step @ matrix, step @ offset + shift
    rows = np.column_stack([matrix, offset]).ravel().tolist()
    changed = Image.fromarray(sample.image.numpy()).convert("RGB", tuple(rows))
    return replace(sample, image=torch.from_numpy(np.array(changed)))


STEPS: dict[Recipe, tuple[Augmentation, ...]] = {
    # NVIDIA DeepLearningExamples, SSD300 v1.1.
    "published": (
        partial(iou_crop, every_box=True),
        render,
        flip,
        color_jitter,
    ),
    # Crops as in the paper, zoom-out as in its section 3.6, colours every other time as in its Caffe code.
    "default": (
        partial(zoom_out, most=2.0),
        iou_crop,
        render,
        drop_tiny,
        flip,
        partial(color_jitter, probability=0.5),
    ),
    "none": (render,),
}
"""What `augment` does in each recipe, in order."""


def augment(
    image: Image.Image,
    boxes: Floats,
    labels: npt.NDArray[np.int64],
    recipe: Recipe,
    rng: Rng,
    size: int,
    tiles: int | None = None,
) -> tuple[Tensor, Floats, npt.NDArray[np.int64]]:
    """A training example of an image.

    Args:
        image: mode RGB.
        boxes: float32 xyxy in pixels, ``[M, 4]``; M may be 0.
        labels: int64 ``[M]``, counted from 1.
        recipe: a name in `STEPS`.
        rng: decides; the same one gives the same example.
        size: width and height of the network's input.
        tiles: side of the tiles of the image that are shown instead of all of it; see `take_tile`.

    Returns:
        uint8 ``[size, size, 3]``; boxes, float32 xyxy, normalised, ``[K, 4]``; their labels ``[K]``.
    """
    sample = Sample(torch.from_numpy(np.array(image)), boxes, labels, size, (0, 0, *image.size))
    if tiles is not None:
        sample = take_tile(sample, rng, side=tiles)
    for step in STEPS[recipe]:
        sample = step(sample, rng)
    return sample.image, sample.boxes / np.float32(size), sample.labels


def _inside(points: npt.NDArray[np.float64], part: tuple[int, int, int, int]) -> npt.NDArray[np.bool_]:
    left, top, right, bottom = part
    x, y = points[:, 0], points[:, 1]
    within: npt.NDArray[np.bool_] = (x > left) & (x < right) & (y > top) & (y < bottom)
    return within


def _iou(boxes: npt.NDArray[np.float64], part: tuple[int, int, int, int]) -> npt.NDArray[np.float64]:
    """IoU of boxes ``[M, 4]`` with one; arrays, since torch's calls cost more than the numbers here."""
    low, high = np.maximum(boxes[:, :2], part[:2]), np.minimum(boxes[:, 2:], part[2:])
    shared = (high - low).clip(0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (part[2] - part[0]) * (part[3] - part[1])
    iou: npt.NDArray[np.float64] = shared / (areas - shared)
    return iou
