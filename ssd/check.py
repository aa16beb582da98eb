"""Reading a whole dataset before training: what is in it, what is wrong, what the network can match.

What is refused is for `ssd.data.judge.judge_split` to say, as in training and evaluation.
"""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssd.boxes import FITTED, LAYOUTS, PUBLISHED_LAYOUT, Layout, evenly
from ssd.data.annotations import Annotations, Problem
from ssd.data.builder import read_bytes
from ssd.data.formats import SPLITS, find_split, load
from ssd.data.judge import Purpose, is_without_images, judge_image, judge_split, lost_images, notes_of
from ssd.errors import AnnotationError, ImageError, as_line
from ssd.images import load_image
from ssd.pixels import DECODED
from ssd.tiles import in_tiles, number_of_windows

_SHOWN = 5
_ENOUGH = 0.02  # a costlier layout has to match more by this part of the boxes
_TILED = 0.9  # with less of the boxes matched by any layout, tiles are looked at
_TILES = (1280, 960, 640, 480, 320)  # sides in pixels
_COMPARED = 5000  # boxes by which layouts are chosen; more tell nothing new
_CHUNK = 1024  # images that are read ahead, of any number


@dataclass(frozen=True)
class SplitReport:
    """One split of a dataset."""

    name: str
    source: str
    images: int
    background: int
    """Images without any box."""
    crowd: int
    boxes: dict[str, int]
    """By class, without crowd."""
    sizes: list[tuple[str, int, float]]
    """Of each size class: its name, how many boxes, and which part of them overlaps a default box by 0.5."""
    matched: float
    """The part of all boxes that overlaps a default box by more than 0.5. The others only get the one that
    fits best, and are hard to learn."""
    problems: list[Problem]
    """Fatal are those that training refuses, or evaluation in the splits that are not trained on."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Choice:
    """A layout to train, and what it could do with the boxes to train on."""

    layout: str
    """By its name; see `ssd.boxes.LAYOUTS` and `ssd.boxes.FITTED`."""
    tiles: int | None
    """Side of the tiles in pixels, where images are cut into such."""
    matched: float
    """The part of the boxes that overlaps a default box by more than 0.5."""
    time: float
    """Of detection in an image, by the pixels that the network sees; that of layout 300 is 1."""

    def options(self) -> str:
        """Of `ssd train`."""
        return f"--layout {self.layout}" + (f" --tiles {self.tiles}" if self.tiles else "")


@dataclass(frozen=True)
class Report:
    """A dataset, split by split."""

    splits: list[SplitReport]
    size: int
    """Width and height of the network's input in pixels, at which boxes are told apart by size."""
    unread: dict[str, str] = field(default_factory=dict)
    """Splits that cannot be read at all, and why."""
    choices: list[Choice] = field(default_factory=list)
    """What could be trained, the quickest first; empty without a split to train on, or without boxes."""

    @property
    def recommended(self) -> Choice | None:
        """The quickest choice of those that match about as many boxes as any."""
        most = max((choice.matched for choice in self.choices), default=0.0)
        return next((choice for choice in self.choices if choice.matched >= most - _ENOUGH), None)

    @property
    def fatal(self) -> int:
        """How many problems training or evaluation refuses."""
        return len(self.unread) + sum(each.fatal for split in self.splits for each in split.problems)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; with all problems."""
        recommended = self.recommended
        return asdict(self) | {
            "fatal": self.fatal,
            "recommended": None if recommended is None else asdict(recommended),
        }

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for split in self.splits for name in split.boxes))
        columns = [split.name for split in self.splits]
        wide = max(map(len, [*map(as_line, names), "background images", "boxes under 128 px"]))
        lines = [f"{'':{wide}}" + "".join(f"{name:>12}" for name in columns)]

        def row(title: str, values: Sequence[str]) -> None:
            lines.append(f"{title:{wide}}" + "".join(f"{value:>12}" for value in values))

        row("images", [f"{split.images:,}" for split in self.splits])
        row("background images", [f"{split.background:,}" for split in self.splits])
        row("crowd boxes", [f"{split.crowd:,}" for split in self.splits])
        lines.append("boxes by class")
        for name in names:
            row(f"  {as_line(name)}", [f"{split.boxes.get(name, 0):,}" for split in self.splits])
        lines.append(
            f"boxes by size at {self.size}x{self.size}, and the part that default boxes can match (IoU > 0.5)"
        )
        for k, (title, _, _) in enumerate(self.splits[0].sizes):
            cells = [split.sizes[k] for split in self.splits]
            row(f"  {title}", [f"{count:,} {part:4.0%}" if count else "-" for _, count, part in cells])
        counts = [sum(count for _, count, _ in split.sizes) for split in self.splits]
        parts = [split.matched for split in self.splits]
        row("  all", [f"{part:.0%}" if n else "-" for n, part in zip(counts, parts, strict=True)])
        lines += self._choice_lines()
        for split in self.splits:
            lines += _problem_lines(split)
        lines += [f"{name}: cannot be read: {why}" for name, why in self.unread.items()]
        if "train" in columns and "val" not in (*columns, *self.unread):
            lines.append(
                "there is no val split: ssd train evaluates on none; name one with --val, or hold images out "
                "with --val-fraction 0.2"
            )
        return "\n".join(lines)

    def _choice_lines(self) -> list[str]:
        recommended = self.recommended
        if recommended is None:
            return []
        lines = ["what could be trained, the part that it can match, and its time for an image"]
        for choice in self.choices:
            mark = "   recommended" if choice == recommended else ""
            lines.append(f"  {choice.options():30}{choice.matched:6.0%}{choice.time:7.1f}x{mark}")
        return lines


def _problem_lines(split: SplitReport) -> list[str]:
    lines = [f"{split.name}: note: {line}" for line in split.notes]
    if not split.problems:
        return [*lines, f"{split.name}: nothing wrong"]
    for (kind, fatal), count in Counter((each.kind, each.fatal) for each in split.problems).most_common():
        lines.append(f"{split.name}: {'' if fatal else 'note: '}{kind}: {count}")
        some = [each for each in split.problems if (each.kind, each.fatal) == (kind, fatal)]
        lines += [f"  {each}" for each in some[:_SHOWN]]
        lines += [f"  and {count - _SHOWN} more (--json lists all)"] if count > _SHOWN else []
    return lines


def read_splits(
    path: Path, images: Path | None = None, *, follow: bool = False
) -> tuple[dict[str, Annotations], dict[str, str]]:
    """Every split of a dataset; the first one's classes are those of the others.

    Args:
        path, follow: see `ssd.data.load`.
        images: the folder of the images, where it cannot be found by the layout; see `load_beside`.

    Returns:
        The splits by name, and of those that cannot be read, why. One to train on should be among them.

    Raises:
        AnnotationError: none can be read.
        FileNotFoundError: there is no such path.
    """
    read: dict[str, Annotations] = {}
    unread: dict[str, AnnotationError] = {}
    for split in SPLITS:
        if split != "train" and not find_split(path, split):
            continue
        try:
            if read:
                names = next(iter(read.values())).class_names
                read[split] = load_beside(path, split, images, names, follow=follow)
            else:
                read[split] = load(path, split, images=images, follow=follow)
        except AnnotationError as error:
            unread[split] = error
    if not read:
        raise next(iter(unread.values()))
    return read, {split: str(error) for split, error in unread.items()}


def load_beside(
    path: Path, split: str, images: Path | None, class_names: Sequence[str], *, follow: bool = False
) -> Annotations:
    """A split beside the one that is trained on, as training and `ssd check` read it.

    Args:
        path, split, class_names, follow: see `ssd.data.load`.
        images: the folder that was named for the images to train on; this split's are looked for there, too,
            where its own place has none of them.
    """
    annotations = load(path, split, class_names=class_names, follow=follow)
    if images is not None and is_without_images(annotations):
        annotations = load(path, split, images=images, class_names=class_names, follow=follow)
    return annotations


def check_dataset(
    splits: dict[str, Annotations],
    layout: Layout = PUBLISHED_LAYOUT,
    on_done: Callable[[], object] = lambda: None,
    *,
    unread: Mapping[str, str] | None = None,
) -> Report:
    """Read every image and annotation of a dataset.

    Args:
        splits: annotations by the name of their split, from `ssd.data.load`; "train" is judged by what
            training takes, others by what evaluation takes.
        layout: of the network that is to be trained: its input, and its default boxes.
        on_done: called after each image.
        unread: splits that cannot be read, and why; see `read_splits`.
    """
    contents: dict[bytes, tuple[str, int]] = {}  # digest of an image file -> split and index
    reports = []
    for name, annotations in splits.items():
        problems = list(annotations.problems)
        for i, (digest, problem) in enumerate(_read_images(annotations)):
            on_done()
            problems += [problem] if problem else []
            if digest:
                split, other = contents.setdefault(digest, (name, i))
                file, twin = str(annotations.file_names[i]), str(splits[split].file_names[other])
                if (split, twin) != (name, file):
                    kind = "image twice" if split == name else "image in two splits"
                    message = f"is the same image as {twin} of {split}"
                    problems.append(Problem(kind, file, "", message, fatal=False))
        reports.append(_report(name, replace(annotations, problems=tuple(problems)), layout))
    choices = _choices(splits["train"]) if "train" in splits else []
    return Report(reports, layout.size, dict(unread or {}), choices)


def _choices(annotations: Annotations) -> list[Choice]:
    boxes, sizes = (evenly(torch.from_numpy(each), _COMPARED) for each in annotations.normalised_boxes())
    if not len(boxes):
        return []

    def matched(name: str, boxes: Tensor) -> float:
        layout = LAYOUTS[FITTED[name]].fitted(boxes) if name in FITTED else LAYOUTS[name]
        return _share(_are_matched(boxes, layout))

    choices = [
        Choice(name, None, matched(name, boxes), (LAYOUTS[FITTED.get(name, name)].size / 300) ** 2)
        for name in (*LAYOUTS, *FITTED)
    ]
    if max(choice.matched for choice in choices) < _TILED:
        images = Counter((width, height) for width, height in annotations.sizes.tolist())
        for side in (side for side in _TILES if side < annotations.sizes.max()):
            views = sum(n * number_of_windows(*size, side) for size, n in images.items()) / len(annotations)
            tiled = in_tiles(boxes, sizes, side)
            for name in ("300", "fitted"):
                choices.append(Choice(name, side, matched(name, tiled), views))
    return sorted(choices, key=lambda choice: choice.time)


def _read_images(annotations: Annotations) -> Iterator[tuple[bytes, Problem | None]]:
    """The digest of each image's file, and what is wrong with it that is not known already."""
    lost = lost_images(annotations.problems)

    def read(i: int) -> tuple[bytes, Problem | None]:
        name = str(annotations.file_names[i])
        if name in lost:
            return b"", None
        try:
            content = read_bytes(annotations.path(i))
            with DECODED.taken(max(0, math.prod(annotations.sizes[i].tolist()))):
                found: tuple[int, int] | str = load_image(content, name=name).size
        except (AnnotationError, ImageError) as error:
            found = str(error).removeprefix(f"{name}: ").removeprefix(f"{annotations.root / name}: ")
        problem = judge_image(annotations, i, found)
        return b"" if problem else hashlib.sha256(content).digest(), problem

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for start in range(0, len(annotations), _CHUNK):
            yield from pool.map(read, range(start, min(start + _CHUNK, len(annotations))))


def _report(name: str, annotations: Annotations, layout: Layout) -> SplitReport:
    purpose: Purpose = "training" if name == "train" else "evaluation"
    per_image = np.diff(annotations.starts)
    boxes = torch.from_numpy(annotations.normalised_boxes()[0])
    matched = _are_matched(boxes, layout)
    sizes = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt().numpy() * layout.size
    limits = size_limits(layout.size)
    size_rows = []
    for low, high in pairwise(limits):
        part = (sizes >= low) & ((sizes < high) | (high == limits[-1]))
        title = f"under {high} px" if low == 0 else f"{low} to {high} px"
        size_rows.append((title, int(part.sum()), _share(matched[part])))
    counted = np.bincount(
        annotations.labels[~annotations.crowd], minlength=len(annotations.class_names) + 1
    ).tolist()
    return SplitReport(
        name=name,
        source=str(annotations.source),
        images=len(annotations),
        background=int((per_image == 0).sum()),
        crowd=int(annotations.crowd.sum()),
        boxes=dict(zip(annotations.class_names, counted[1:], strict=True)),
        sizes=size_rows,
        matched=_share(matched),
        problems=judge_split(annotations, purpose),
        notes=notes_of(annotations, purpose),
    )


def size_limits(size: int) -> list[int]:
    """Limits of the size classes: square root of a box's area, in pixels of the network's input.

    >>> size_limits(300)
    [0, 8, 16, 32, 64, 128, 300]
    """
    limits = [0]
    limit = 8
    while 2 * limit <= size:
        limits.append(limit)
        limit *= 2
    return [*limits, size]


def _are_matched(boxes: Tensor, layout: Layout) -> npt.NDArray[np.bool_]:
    """Which boxes, float32 xyxy, normalised ``[M, 4]``, a default box overlaps by more than 0.5: ``[M]``."""
    return (layout.best_overlaps(boxes) > 0.5).numpy()


def _share(matched: npt.NDArray[np.bool_]) -> float:
    return float(matched.mean()) if len(matched) else 0.0
