"""Made-up data: scenes of six kinds of shapes, as a COCO dataset. For tests, first steps and the demo."""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from ssd.drawing import encoded
from ssd.files import gone_if_unused, take_new, temporary_folder, writing

CLASSES = ("circle", "square", "triangle", "star", "cross", "ring")
DISTRACTORS = ("half disc", "arrow", "corner")
"""Shapes of no class."""

MOST_OBJECTS = 8
BACKGROUND_ONLY = 0.08  # of the scenes hold no shape
SMALLEST, LARGEST = 0.10, 0.55  # diameter of a shape, as part of the image's shorter side
LEAST_VISIBLE = 0.6  # of a shape that others cover, or that reaches outside
_FINER = 4  # masks are drawn so many times as large, for smooth edges

Rng = np.random.Generator
Pixels = npt.NDArray[np.float32]


def draw_scene(
    rng: Rng, kinds: Sequence[str] = CLASSES
) -> tuple[Image.Image, npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """A scene of shapes.

    Size, colour, texture, rotation, overlap and background vary; some scenes hold nothing but background.

    Args:
        rng: decides everything.
        kinds: of the shapes, among `CLASSES` and `DISTRACTORS`.

    Returns:
        An RGB image; boxes, xyxy in whole pixels, ``[M, 4]``; labels ``[M]``, 1 for the first of the kinds.
        A box is that of the whole shape, even where another covers it, clipped to the image.

    >>> image, boxes, labels = draw_scene(np.random.default_rng(3))
    >>> image.size, len(boxes) == len(labels)
    ((450, 333), True)
    """
    width, height = (int(side) for side in rng.integers(320, 481, size=2))
    canvas = _background(rng, width, height)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    owner = np.full((height, width), -1)  # of each pixel
    areas: list[int] = []
    count = 0 if rng.random() < BACKGROUND_ONLY else int(rng.integers(1, MOST_OBJECTS + 1))
    for _ in range(count):
        label = int(rng.integers(len(kinds))) + 1
        mask = _mask(rng, kinds[label - 1], min(width, height))
        h, w = mask.shape
        for _attempt in range(10):
            x, y = (
                int(rng.integers(-w // 6, width - w + w // 6)),
                int(rng.integers(-h // 6, height - h + h // 6)),
            )
            left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
            part = mask[top - y : bottom - y, left - x : right - x]
            solid = part > 0.5
            below = owner[top:bottom, left:right]
            if solid.sum() < LEAST_VISIBLE * (mask > 0.5).sum():
                continue
            trial = np.where(solid, len(boxes), below)
            outer = owner.copy()
            outer[top:bottom, left:right] = trial
            left_over = np.bincount(outer[outer >= 0], minlength=len(boxes) + 1)
            if all(left_over[i] >= LEAST_VISIBLE * area for i, area in enumerate(areas)):
                owner = outer
                break
        else:
            continue
        region = canvas[top:bottom, left:right]
        paint = _paint(rng, mask.shape, canvas[top:bottom, left:right].mean((0, 1)))
        paint = paint[top - y : bottom - y, left - x : right - x]
        region += part[..., None] * (paint - region)
        ys, xs = solid.nonzero()
        boxes.append((left + xs.min(), top + ys.min(), left + xs.max() + 1, top + ys.max() + 1))
        labels.append(label)
        areas.append(int(solid.sum()))
    canvas += rng.normal(0, rng.uniform(0, 6), canvas.shape)
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    return image, np.array(boxes, np.float64).reshape(-1, 4), np.array(labels, np.int64)


def write_dataset(
    folder: str | os.PathLike[str],
    train: int,
    val: int,
    seed: int = 0,
    on_done: Callable[[], object] = lambda: None,
) -> None:
    """Write a dataset of scenes: ``train.json`` with ``train/``, and ``val.json`` with ``val/``; all or none.

    The same numbers and seed give the same scenes.

    Args:
        folder: made where it is not there.
        train, val: images of each split; a split of none is left out.
        seed: of all scenes.
        on_done: called after each image.

    Raises:
        FileExistsError: the folder has one of these already.
        OSError: it cannot be written; the message says why.
    """
    for name in ("train.json", "train", "val.json", "val"):
        if (Path(folder) / name).exists():
            raise FileExistsError(f"{Path(folder) / name} exists already; choose another folder")
    folder = Path(folder)
    splits = {split: images for split, images in (("train", train), ("val", val)) if images}
    with gone_if_unused(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder / "shapes") as made:
            for number, split in enumerate(("train", "val")):
                if split in splits:
                    with writing(folder / split):
                        _write_split(made, split, splits[split], (seed, number), on_done)
            names = [*splits, *(f"{split}.json" for split in splits)]
            take_new([(made / name, folder / name) for name in names])


def _write_split(
    folder: Path, split: str, count: int, seed: tuple[int, int], on_done: Callable[[], object]
) -> None:
    (folder / split).mkdir()
    content: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
    }
    for i in range(count):
        image, boxes, labels = draw_scene(np.random.default_rng((*seed, i)))
        name = f"{i:06}.jpg"
        (folder / split / name).write_bytes(encoded(image))
        content["images"].append({"id": i, "file_name": name, "width": image.width, "height": image.height})
        for (left, top, right, bottom), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": i,
                    "category_id": label,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                }
            )
        on_done()
    (folder / f"{split}.json").write_bytes(json.dumps(content).encode())


# --- Drawing ----------------------------------------------------------------------------------------------


def _background(rng: Rng, width: int, height: int) -> Pixels:
    """A gradient with clutter that is none of the shapes: lines, open curves, blurred patches."""
    start, end = rng.uniform(20, 235, (2, 3))
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:height, 0:width]
    along = (x / width * math.cos(angle) + y / height * math.sin(angle))[..., None]
    image = Image.fromarray((start + (end - start) * along.clip(-1, 1)).clip(0, 255).astype(np.uint8))
    pencil = ImageDraw.Draw(image)

    def color() -> tuple[int, ...]:
        return tuple(int(value) for value in rng.integers(0, 256, 3))

    for _ in range(rng.integers(0, 6)):  # patches
        corners = rng.uniform(-0.1, 1.1, 2) * (width, height) + rng.normal(0, 40, (5, 2))
        pencil.polygon([tuple(point) for point in corners], fill=color())
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(2, 12)))
    pencil = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 12)):  # curves
        points = (rng.uniform(0, 1, 2) * (width, height) + rng.normal(0, 30, (4, 2)).cumsum(0)).tolist()
        pencil.line([tuple(point) for point in points], fill=color(), width=int(rng.integers(1, 5)))
    for _ in range(rng.integers(0, 60)):  # specks
        px, py = rng.uniform(0, 1, 2) * (width, height)
        pencil.point((px, py), fill=color())
    return np.asarray(image, np.float32).copy()


def _outline(kind: str) -> npt.NDArray[np.float64]:
    """Corners of a shape in the unit circle, ``[K, 2]``."""

    def spokes(count: int, radii: tuple[float, ...]) -> npt.NDArray[np.float64]:
        angles = np.arange(count) * 2 * math.pi / count - math.pi / 2
        points = np.column_stack([np.cos(angles), np.sin(angles)]).astype(np.float64)
        scaled: npt.NDArray[np.float64] = points * np.resize(radii, count)[:, None]
        return scaled

    if kind == "cross":
        arm = 0.3
        quarter = np.array([(arm, 1.0), (arm, arm), (1.0, arm)])
        turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
        parts = [quarter]
        for _ in range(3):
            parts.append(parts[-1] @ turn.T)
        return np.concatenate(parts)
    if kind == "half disc":
        return spokes(64, (1.0,))[:33]
    if kind == "arrow":
        return np.array([(1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3), (-1, -0.3), (0.1, -0.3), (0.1, -0.8)])
    if kind == "corner":
        return np.array([(-0.8, -0.8), (-0.2, -0.8), (-0.2, 0.2), (0.8, 0.2), (0.8, 0.8), (-0.8, 0.8)])
    corners = {"circle": 64, "ring": 64, "square": 4, "triangle": 3, "star": 10}[kind]
    return spokes(corners, (1.0, 0.45) if kind == "star" else (1.0,))


def _mask(rng: Rng, kind: str, side: int) -> Pixels:
    """How much of each pixel a shape covers, cut to its extent."""
    diameter = side * math.exp(rng.uniform(math.log(SMALLEST), math.log(LARGEST)))
    stretch = rng.uniform(0.8, 1.25)
    angle = rng.uniform(0, 2 * math.pi)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    points = (_outline(kind) * (stretch, 1 / stretch)) @ turn.T * (diameter / 2) * _FINER
    edge = math.ceil(np.abs(points).max() / _FINER + 1) * _FINER
    mask = Image.new("L", (2 * edge, 2 * edge))
    pencil = ImageDraw.Draw(mask)
    pencil.polygon([tuple(point) for point in points + edge], fill=255)
    if kind == "ring":
        pencil.polygon([tuple(point) for point in points * rng.uniform(0.45, 0.65) + edge], fill=0)
    mask = mask.reduce(_FINER)
    return np.asarray(mask.crop(mask.getbbox()), np.float32) / np.float32(255)


def _paint(rng: Rng, shape: tuple[int, ...], behind: Pixels) -> Pixels:
    """Colours for a shape that can be told from what is behind it: plain, fading, striped or speckled."""
    color = rng.uniform(0, 255, 3)
    while np.abs(color - behind).sum() < 150:
        color = rng.uniform(0, 255, 3)
    other = color + rng.uniform(-60, 60, 3)
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]]
    angle, kind = rng.uniform(0, math.pi), rng.integers(4)
    across = x * math.cos(angle) + y * math.sin(angle)
    if kind == 0:
        share = np.zeros(shape)
    elif kind == 1:
        share = (across - across.min()) / (np.ptp(across) + 1e-6)
    elif kind == 2:
        share = (across / rng.uniform(3, 10) % 2 < 1).astype(float)
    else:
        share = rng.random(shape)
    return (color + (other - color) * share[..., None]).astype(np.float32)
