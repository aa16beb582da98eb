"""Objects that move, whose boxes in each frame are known, and detections of them as a detector gives them."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ssd.detections import Detections
from ssd.shapes import CLASSES, _outline

WIDTH, HEIGHT = 480, 360
LEAST_SEEN = 0.35  # of an object, below which no detector finds it


class Moving(NamedTuple):
    """One object, and the walls that it may be behind."""

    class_id: int
    boxes: np.ndarray
    """``[T, 4]``: of all of it, in each frame."""
    seen: np.ndarray
    """``[T, 4]``: of what is seen of it."""

    @property
    def share(self) -> np.ndarray:
        """How much of it is seen, ``[T]``."""
        return areas(self.seen) / areas(self.boxes)


def areas(boxes: np.ndarray) -> np.ndarray:
    return np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(1)


def hidden(seed: int, rate: float, *, wall: bool) -> tuple[np.ndarray, Moving]:
    """Times, and an object that is hidden for 2 s: it vanishes and comes back, or goes behind a wall."""
    rng = np.random.default_rng(seed)
    size = rng.uniform(40, 110, 2)
    before, gap = rng.uniform(1, 3), 2.0
    times = np.arange(0, before + gap + 2, 1 / rate)
    speed = np.array([rng.choice([-1, 1]) * rng.uniform(40, 110), rng.uniform(-15, 15)])
    if not wall:
        speed = rng.uniform([-120, -60], [120, 60])
    centres = np.array([WIDTH, HEIGHT]) / 2 + speed * (times - before - gap / 2)[:, None]
    boxes = np.hstack([centres - size / 2, centres + size / 2])
    seen = boxes.copy()
    if wall:
        half = (size[0] * (1 - 2 * LEAST_SEEN) + abs(speed[0]) * gap) / 2
        seen = behind(boxes, WIDTH / 2 - half, WIDTH / 2 + half)
    else:
        seen[(times >= before) & (times < before + gap)] = 0
    return times, Moving(0, boxes, seen)


def behind(boxes: np.ndarray, left: float, right: float) -> np.ndarray:
    """What is seen of boxes, the larger part, behind a wall from top to bottom."""
    seen = boxes.copy()
    at_left = np.clip(left - boxes[:, 0], 0, None), boxes[:, 2] > left
    at_right = np.clip(boxes[:, 2] - right, 0, None), boxes[:, 0] < right
    touched = at_left[1] & at_right[1]
    goes_left = touched & (at_left[0] > at_right[0])
    goes_right = touched & ~goes_left
    seen[goes_left, 2] = np.maximum(left, boxes[goes_left, 0])
    seen[goes_right, 0] = np.minimum(right, boxes[goes_right, 2])
    return seen


def crowd(seed: int, rate: float, seconds: float = 8, count: int = 6) -> tuple[np.ndarray, list[Moving]]:
    """Times, and objects that bounce off the edges of the picture, behind a wall in its middle."""
    rng = np.random.default_rng(seed)
    times = np.arange(0, seconds, 1 / rate)
    objects = []
    for _ in range(count):
        size = rng.uniform(45, 90, 2)
        room = np.array([WIDTH, HEIGHT]) - size
        speed = rng.uniform(30, 110, 2) * rng.choice([-1, 1], 2)
        way = rng.uniform(0, room) + speed * times[:, None]
        corner = room - np.abs(way % (2 * room) - room)  # there and back again
        boxes = np.hstack([corner, corner + size])
        objects.append(
            Moving(int(rng.integers(len(CLASSES))), boxes, behind(boxes, WIDTH / 2 - 30, WIDTH / 2 + 30))
        )
    return times, objects


def detected(
    times: np.ndarray, objects: list[Moving], seed: int, source: str = "film", noise: float = 1.5
) -> Iterator[Detections]:
    """As a detector sees them: not exactly, scores lower where less is seen; some missed, some made up."""
    rng = np.random.default_rng([seed, 1])
    for number, time in enumerate(times):
        boxes, scores, class_ids = [], [], []
        for each in objects:
            share = each.share[number]
            if share >= LEAST_SEEN and rng.random() > 0.03:
                boxes.append(each.seen[number] + rng.normal(0, noise, 4))
                scores.append(np.clip(0.9 * min(1, (share - 0.1) / 0.7) + rng.normal(0, 0.05), 0.05, 1))
                class_ids.append(each.class_id)
        if len(objects) > 1 and rng.random() < 0.1:
            corner = rng.uniform(0, [WIDTH - 60, HEIGHT - 60])
            boxes.append(np.hstack([corner, corner + 50]))
            scores.append(rng.uniform(0.1, 0.6))
            class_ids.append(int(rng.integers(len(CLASSES))))
        order = np.argsort(scores)[::-1]
        yield Detections(
            np.reshape(boxes, (-1, 4))[order],
            np.array(scores)[order],
            np.array(class_ids, int)[order],
            CLASSES,
            (HEIGHT, WIDTH),
            source=source,
            number=0,
            frame=number,
            time=float(time),
        )


COLORS = ("#e8c840", "#e05050", "#50b0f0", "#f0f0f0", "#70d070", "#e080e0")


def drawn(objects: list[Moving], number: int, wall: tuple[float, float] | None = None) -> np.ndarray:
    """A frame of them, uint8 ``[H, W, 3]``, with a wall."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "#44505c")
    canvas = ImageDraw.Draw(picture)
    for index, each in enumerate(objects):
        left, top, right, bottom = each.boxes[number]
        outline = _outline(CLASSES[each.class_id])
        low, high = outline.min(0), outline.max(0)
        points = (outline - low) / (high - low) * [right - left, bottom - top] + [left, top]
        canvas.polygon([tuple(point) for point in points], fill=COLORS[index % len(COLORS)])
        if CLASSES[each.class_id] == "ring":
            inner = points.mean(0) + 0.55 * (points - points.mean(0))
            canvas.polygon([tuple(point) for point in inner], fill="#44505c")
    if wall:
        canvas.rectangle((wall[0], 0, wall[1], HEIGHT), fill="#20252b")
    return np.asarray(picture)
