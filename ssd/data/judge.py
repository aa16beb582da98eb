"""What is wrong with a dataset, and what training and evaluation refuse: the same rules for all who ask."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ssd.data.annotations import Annotations, Problem, leads_out, told_link
from ssd.errors import AnnotationError
from ssd.images import upright_size

MISSING = "missing image"
LINK_OUT = "link out of the folder"
UNREADABLE = "unreadable image"
WRONG_SIZE = "wrong size"

LOST = (MISSING, LINK_OUT, UNREADABLE, WRONG_SIZE)
"""Problems that leave an image out, where that is allowed."""

INVERTED = "inverted box"
NO_AREA = "zero area"
OUTSIDE = "box outside"

MISSHAPEN = (INVERTED, NO_AREA, OUTSIDE)
"""Problems of boxes that are not trained on, but count in evaluation, as in the official code."""

NOT_A_BOX = "not a box"
UNKNOWN_CATEGORY = "unknown category id"

_MOST_TOLD = 10  # problems that an error lists


# --- What is wrong ----------------------------------------------------------------------------------------


def judge_files(root: Path, names: Sequence[str], *, follow_links: bool) -> list[Problem]:
    """Images that are not there, or that a link has outside of the folder where that is not allowed.

    Args:
        root: the folder of the images.
        names: of the images, relative to it.
        follow_links: see `Annotations.follow_links`.
    """
    # One listing of a folder, not a question to the file system for every image.
    folders: dict[str, dict[str, bool]] = {}
    strays: set[str] = set()
    problems = []
    for name in names:
        folder, last = os.path.split(name)
        if folder not in folders:
            folders[folder] = _listing(root / folder)
            if not follow_links and leads_out(root / folder, root):
                strays.add(folder)
        is_link = folders[folder].get(last)
        path = root / name
        if is_link is None or (is_link and not os.path.exists(path)):
            problems.append(Problem(MISSING, name, "", _why_missing(root, name)))
        elif not follow_links and (is_link or folder in strays) and leads_out(path, root):
            problems.append(Problem(LINK_OUT, name, "", told_link(root)))
    return problems


def _listing(folder: Path) -> dict[str, bool]:
    """The names in a folder, and whether each is a link; empty if the folder cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_symlink() for entry in entries}
    except (OSError, ValueError):  # the latter of names that no file can have
        return {}


def _why_missing(root: Path, name: str) -> str:
    path = root / name
    for step in (path, *path.parents)[: len(Path(name).parts)]:
        if os.path.islink(step) and not os.path.exists(step):
            what = "is" if step == path else f"{step} is"
            return f"{what} a link to {os.path.realpath(step)}, where nothing is found"
    return f"there is no such file in {root}"


def judge_repeats(names: Sequence[str]) -> list[Problem]:
    """Images that are listed more than once."""
    message = "is listed {} times; what one entry labels is background to the others"
    return [
        Problem("image listed twice", name, "", message.format(count), fatal=False)
        for name, count in Counter(names).items()
        if count > 1
    ]


def judge_boxes(
    boxes: npt.NDArray[np.float64],
    labels: npt.NDArray[np.int64],
    images: npt.NDArray[np.int64],
    tags: Sequence[str],
    names: Sequence[str],
    sizes: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.bool_], list[Problem]]:
    """Judge the boxes of a split.

    Args:
        boxes: xyxy in pixels, not clipped, ``[T, 4]``.
        labels: ``[T]``.
        images: of each box, the index of its image, ``[T]``.
        tags: of each box, what messages call it.
        names: of the images, N of them.
        sizes: of the images, width and height, 0 where they are not known, ``[N, 2]``.

    Returns:
        Which boxes can be trained on, ``[T]``; and the problems.
    """
    size = sizes.astype(np.float64)[images]
    size[size == 0] = np.inf
    narrow = boxes.astype(np.float32)  # what training computes with
    extent = (narrow[:, 2:] - narrow[:, :2]).astype(np.float64)
    inverted = (extent < 0).any(1)
    zero = ~inverted & (extent == 0).any(1)
    visible = np.minimum(boxes[:, 2:], size) - np.maximum(boxes[:, :2], 0)
    outside = ~inverted & ~zero & (visible <= 0).any(1)
    usable: npt.NDArray[np.bool_] = ~(inverted | zero | outside)
    reaches = usable & ((boxes[:, :2] < -1).any(1) | (boxes[:, 2:] > size + 1).any(1))
    keys = np.column_stack([images, labels, boxes])
    _, first = np.unique(keys, axis=0, return_index=True)
    again = np.ones(len(boxes), np.bool_)
    again[first] = False
    kinds: tuple[tuple[Any, str, str, bool], ...] = (
        (inverted, INVERTED, "has a negative size", True),
        (zero, NO_AREA, "has no area", True),
        (outside, OUTSIDE, "lies outside the image of {size}", True),
        (reaches, "box reaches outside", "reaches outside the image of {size}; it is clipped", False),
        (again, "duplicate box", "is there twice, with the same class", False),
    )
    problems = []
    for mask, kind, what, fatal in kinds:
        for i in mask.nonzero()[0].tolist():
            (left, top), (width, height) = boxes[i, :2].tolist(), extent[i].tolist()
            image_size = "x".join(f"{side:g}" for side in size[i])
            message = f"the box at ({left:g}, {top:g}), {width:g} wide and {height:g} high, "
            message += what.format(size=image_size)
            problems.append(Problem(kind, names[images[i]], tags[i], message, fatal))
    return usable, problems


def require_size(annotations: Annotations, i: int, size: tuple[int, int]) -> None:
    """Require that an upright image has the size that its annotations were made for.

    Raises:
        AnnotationError: it has another one; the boxes would be elsewhere.
    """
    width, height = (int(value) for value in annotations.sizes[i])
    if (width, height) not in ((0, 0), size):
        turned = " (the annotations seem to ignore its EXIF orientation)" if size == (height, width) else ""
        raise AnnotationError(
            f"{annotations.root / str(annotations.file_names[i])}: is {size[0]}x{size[1]}, but "
            f"{annotations.source} says {width}x{height}{turned}; correct the annotations"
        )


def judge_image(annotations: Annotations, i: int, size: tuple[int, int] | str) -> Problem | None:
    """What is wrong with an image that was read.

    Args:
        annotations: that list it.
        i: its index.
        size: width and height of the upright image; or why it could not be read.
    """
    name = str(annotations.file_names[i])
    if isinstance(size, str):
        return Problem(UNREADABLE, name, "", size)
    try:
        require_size(annotations, i, size)
    except AnnotationError as error:
        return Problem(WRONG_SIZE, name, "", str(error))
    return None


def lost_images(problems: Iterable[Problem]) -> set[str]:
    """The files of those images that, by their problems, cannot be used."""
    return {problem.file for problem in problems if problem.kind in LOST}


def is_without_images(annotations: Annotations) -> bool:
    """Whether no image is where it should be."""
    return sum(problem.kind == MISSING for problem in annotations.problems) >= len(annotations)


def upright_sizes(paths: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Width and height of images after EXIF rotation, from their headers; None where there is none."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(upright_size, paths))


def listed(counts: Mapping[str, int]) -> str:
    """Kinds of problems with their numbers, as text."""
    return ", ".join(f"{kind}: {count}" for kind, count in counts.items())


# --- What is refused --------------------------------------------------------------------------------------


def usable_for_training(annotations: Annotations, *, lenient: bool = False) -> Annotations:
    """Require annotations that can be trained on.

    Raises:
        AnnotationError: with the first of the problems, unless `lenient`, which leaves those images and
            annotations out, and counts them in `Annotations.left_out`.
    """
    return _usable(annotations, lenient=lenient, tolerated=())


def usable_for_evaluation(annotations: Annotations, *, lenient: bool = False) -> Annotations:
    """Require what an honest evaluation needs; boxes without area stay in it, as in the official code.

    Raises:
        AnnotationError: missing images, unknown ids or numbers that are none, unless `lenient`, which leaves
            those images and annotations out, and counts them in `Annotations.left_out`.
    """
    return _usable(annotations, lenient=lenient, tolerated=MISSHAPEN)


def require_boxes(annotations: Annotations) -> None:
    """Require something to train on.

    Raises:
        AnnotationError: no image has a box that can be used.
    """
    if not annotations.usable.any():
        hint = f"; {annotations.labels_hint}" if annotations.labels_hint else ""
        raise AnnotationError(
            f"{annotations.source}: no boxes to train on in {len(annotations)} images{hint}"
        )


def _usable(annotations: Annotations, *, lenient: bool, tolerated: Sequence[str]) -> Annotations:
    """What is left without images that cannot be used; fatal problems, but for some kinds, become a count.

    Raises:
        AnnotationError: there are such problems, of which it has the first ten, and it is not `lenient`; or
            there is no image that can be used.
    """
    if lenient:
        annotations = _with_header_problems(annotations)
    lost = lost_images(annotations.problems)
    used = annotations.without(lost) if lost else annotations
    fatal = [each for each in annotations.problems if each.fatal and each.kind not in tolerated]
    if not len(used):
        _refuse_without_images(annotations, fatal)
    counts = Counter(problem.kind for problem in fatal)
    if fatal and not lenient:
        more = f"\n  and {len(fatal) - _MOST_TOLD} more" if len(fatal) > _MOST_TOLD else ""
        raise AnnotationError(
            f"{annotations.source} has annotations that cannot be used ({listed(counts)}); correct them, or "
            "leave them out with --lenient (lenient=True):\n  "
            + "\n  ".join(map(str, fatal[:_MOST_TOLD]))
            + more
        )
    rest = tuple(each for each in used.problems if not each.fatal or each.kind in tolerated)
    return replace(used, problems=rest, left_out=Counter(annotations.left_out) + counts)


def _refuse_without_images(annotations: Annotations, fatal: Sequence[Problem]) -> NoReturn:
    what = f"{annotations.source}: lists no images"
    if len(annotations):
        what = (
            f"{annotations.source}: no images that can be read in {annotations.root}; if they are elsewhere, "
            "give their folder with --images (images=...), or --val-images for what is evaluated on"
        )
    raise AnnotationError(f"{what}\n  {fatal[0]}" if fatal else what)


def _with_header_problems(annotations: Annotations) -> Annotations:
    """With those problems of the images that show in their headers, which are not read otherwise."""
    lost = lost_images(annotations.problems)
    indices = [i for i, name in enumerate(annotations.file_names.tolist()) if name not in lost]
    sizes = upright_sizes([annotations.path(i) for i in indices])
    found = (
        judge_image(annotations, i, size or "is no image, or a damaged one")
        for i, size in zip(indices, sizes, strict=True)
    )
    return replace(annotations, problems=(*annotations.problems, *filter(None, found)))
