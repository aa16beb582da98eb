"""What is wrong with a dataset, and what training and evaluation refuse: the same rules for all who ask."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ssd.data.annotations import Annotations, Problem
from ssd.errors import AnnotationError
from ssd.images import is_image_name, is_turned, upright_size
from ssd.signatures import HEIF_SUFFIXES

MISSING = "missing image"
UNREADABLE = "unreadable image"
WRONG_SIZE = "wrong size"

CONTRADICTED = "image labelled twice"
DOUBTFUL = "image whose labels are in doubt"

LOST = (MISSING, UNREADABLE, WRONG_SIZE, CONTRADICTED, DOUBTFUL)
"""Problems that leave an image out, where that is allowed."""

INVERTED = "inverted box"
NO_AREA = "zero area"
OUTSIDE = "box outside"

MISSHAPEN = (INVERTED, NO_AREA, OUTSIDE)
"""Problems of boxes that are not trained on, but count in evaluation, as in the official code."""

NOT_A_BOX = "not a box"
UNKNOWN_CATEGORY = "unknown category id"

NO_IMAGES = "no images"
NO_BOXES = "no boxes to train on"
TOO_FEW = "too few images"

TRAINED_ON = (NO_BOXES, TOO_FEW)
"""What is refused of a whole training set, and not of a part of one, or of one that is evaluated on."""

Purpose = Literal["training", "evaluation"]
"""What a split is for."""

_MOST_TOLD = 10  # problems that an error lists
_LEAST_IMAGES = 2  # of a batch: BatchNorm needs them

_MOST_OF_BOX, _ROUNDING = 1.1, 4  # of an area, beside that of its box
# An object in one piece, which reaches all sides of its box, has a pixel for each along the longer one.
_LEAST_OF_SIDE = 0.5


# --- What is wrong ----------------------------------------------------------------------------------------


def judge_files(root: Path, names: Sequence[str]) -> list[Problem]:
    """Images that are not there.

    Args:
        root: the folder of the images.
        names: of the images, relative to it.
    """
    # One listing of a folder, not a question to the file system for every image.
    folders: dict[str, dict[str, bool]] = {}
    alike: dict[str, dict[str, str]] = {}
    problems = []
    for name in names:
        folder, last = os.path.split(name)
        if folder not in folders:
            folders[folder] = _listing(root / folder)
        is_other = folders[folder].get(last)
        if is_other is None or (is_other and not os.path.isfile(root / name)):
            if folder not in alike:
                alike[folder] = _by_stem(folders[folder])
            why = _why_missing(root, name, alike[folder].get(os.path.splitext(last)[0], ""))
            problems.append(Problem(MISSING, name, "", why))
    return problems


def _listing(folder: Path) -> dict[str, bool]:
    """The names in a folder, and whether each is a link, or no file; empty if the folder cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: not entry.is_file(follow_symlinks=False) for entry in entries}
    except (OSError, ValueError):  # the latter of names that no file can have
        return {}


def _by_stem(names: Iterable[str]) -> dict[str, str]:
    """Of names, those of images, read or not, by the names without suffix."""
    images = [each for each in names if is_image_name(each) or _is_heif(each)]
    return {os.path.splitext(each)[0]: each for each in sorted(images, key=lambda each: not _is_heif(each))}


def _is_heif(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in HEIF_SUFFIXES


def _why_missing(root: Path, name: str, alike: str) -> str:
    """Why an image is missing; `alike` is a file beside it of another suffix, if there is one."""
    path = root / name
    for step in (path, *path.parents)[: len(Path(name).parts)]:
        if os.path.islink(step) and not os.path.exists(step):
            what = "is" if step == path else f"{step} is"
            return f"{what} a link to {os.path.realpath(step)}, where nothing is found"
    if os.path.exists(path):
        return "is a folder" if os.path.isdir(path) else "is a pipe or a device, and no file"
    why = f"there is no such file in {root}"
    if alike and alike != os.path.basename(name):
        why += f"; {alike} is there"
        why += "" if is_image_name(alike) else ", which needs pillow-heif (pip install pillow-heif)"
    return why


def judge_repeats(
    names: Sequence[str],
    images: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    boxes: npt.NDArray[np.float64],
) -> list[Problem]:
    """Images that are listed more than once; fatal where the entries label different objects.

    Args:
        names: of the images.
        images, labels, boxes: of each box, ordered by image; see `judge_boxes`.
    """
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        places.setdefault(name, []).append(i)
    starts = np.searchsorted(images, np.arange(len(names) + 1))

    def content(i: int) -> list[list[float]]:
        part = slice(starts[i], starts[i + 1])
        return sorted(np.column_stack([labels[part], boxes[part]]).tolist())

    problems = []
    for name, entries in places.items():
        if len(entries) == 1:
            continue
        first = content(entries[0])
        if all(content(i) == first for i in entries[1:]):
            message = f"is listed {len(entries)} times, with the same boxes; it counts as often"
            problems.append(Problem("image listed twice", name, "", message, fatal=False))
        else:
            message = (
                f"is listed {len(entries)} times, with different boxes; what one entry labels would be "
                "background to the others. Two images of one name? Rename them, or join their entries"
            )
            problems.append(Problem(CONTRADICTED, name, "", message))
    return problems


def judge_areas(
    given: npt.NDArray[np.float64], boxes: npt.NDArray[np.float64], usable: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.bool_], str]:
    """Which areas can be those of the objects in their boxes, and what to say of the others.

    By its area evaluation tells an object's size. One that is larger than its box, or not above 0, is none.
    Where half of all are too small to reach across their boxes, or all are equal in boxes of different sizes,
    none is; a few such ones may be objects in several pieces.

    Args:
        given: as the file says; NaN where it says nothing, ``[T]``.
        boxes: xyxy, ``[T, 4]``.
        usable: which boxes have an area themselves, ``[T]``.

    Returns:
        Which areas are given and possible, ``[T]``; and a line, empty where all that are given are.
    """
    there = ~np.isnan(given)
    sides = boxes[:, 2:] - boxes[:, :2]
    own = sides.prod(1)
    asked = there & usable
    possible = ~asked | ((given > 0) & (given <= _MOST_OF_BOX * own + _ROUNDING))
    if asked.any():
        reach = given[asked] / sides[asked].max(1)
        spread = own[asked].max() > 2 * own[asked].min()
        constant = asked.sum() > 2 and spread and np.ptp(given[asked]) == 0
        if constant or np.median(reach) < _LEAST_OF_SIDE:
            possible &= ~asked
    wrong = (~possible).nonzero()[0]
    if not len(wrong):
        return there, ""
    first = wrong[0]
    return there & possible, (
        f"{len(wrong)} of {int(there.sum())} areas cannot be right, as {given[first]:g} in a box of "
        f"{own[first]:g}; evaluation takes the area of the box for the size of those"
    )


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
    if why := _why_wrong_size(annotations, i, size):
        raise AnnotationError(f"{annotations.path(i)}: {why}")


def _why_wrong_size(annotations: Annotations, i: int, size: tuple[int, int]) -> str:
    """What is wrong with the size of an image; empty if nothing is."""
    width, height = (int(value) for value in annotations.sizes[i])
    if (width, height) in ((0, 0), size):
        return ""
    turned = ""
    if size == (height, width):
        turned = " (width and height are exchanged)"
        if is_turned(annotations.path(i)):
            turned = " (the annotations seem to ignore its EXIF orientation)"
    return (
        f"is {size[0]}x{size[1]}, but {annotations.source} says {width}x{height}{turned}; correct the "
        "annotations"
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
    why = _why_wrong_size(annotations, i, size)
    return Problem(WRONG_SIZE, name, "", why) if why else None


def lost_images(problems: Iterable[Problem]) -> set[str]:
    """The files of those images that, by their problems, cannot be used."""
    return {problem.file for problem in problems if problem.kind in LOST}


def is_without_images(annotations: Annotations) -> bool:
    """Whether no image is where it should be."""
    return sum(problem.kind == MISSING for problem in annotations.problems) >= len(annotations)


def upright_sizes(paths: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Width and height of images after EXIF rotation, from their headers; None where there is none."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda path: upright_size(path) if os.path.isfile(path) else None, paths))


def listed(counts: Mapping[str, int]) -> str:
    """Kinds of problems with their numbers, as text."""
    return ", ".join(f"{kind}: {count}" for kind, count in counts.items())


# --- What is refused --------------------------------------------------------------------------------------


def judge_split(annotations: Annotations, purpose: Purpose) -> list[Problem]:
    """All problems of a split; fatal are those that its purpose refuses. Check, train and evaluate ask here.

    Args:
        annotations: whose problems are those that are known: the reader's, or after `ssd check` all.
        purpose: "evaluation" takes boxes without area, as the official code; "training", no crowd boxes.
    """
    tolerated = MISSHAPEN if purpose == "evaluation" else ()
    problems = [
        replace(each, fatal=False) if each.fatal and each.kind in tolerated else each
        for each in annotations.problems
    ]
    if not any(each.fatal for each in problems):
        if not len(annotations):
            problems.append(Problem(NO_IMAGES, str(annotations.source), "", "lists no images"))
        elif purpose == "training":
            problems += _judge_training_set(annotations, crowd=False)
    return problems


def _judge_training_set(annotations: Annotations, *, crowd: bool) -> list[Problem]:
    """What is wrong with the whole of it."""
    count, source = len(annotations), str(annotations.source)
    if not annotations.trained_on(crowd=crowd).any():
        what = f"no boxes to train on in {count} images"
        what += f"; {annotations.labels_hint}" if annotations.labels_hint else ""
        if usable := int(annotations.usable.sum()):
            what = (
                f"no boxes to train on: all {usable} are crowd (iscrowd) or difficult; --crowd trains on "
                "them (crowd=True, in the config and the DetectionDataset)"
            )
        return [Problem(NO_BOXES, source, "", what)]
    if count < _LEAST_IMAGES:
        what = f"a single image; training takes at least {_LEAST_IMAGES} in a batch, for BatchNorm"
        return [Problem(TOO_FEW, source, "", what)]
    return []


def notes_of(annotations: Annotations, purpose: Purpose, *, crowd: bool = False) -> list[str]:
    """What is told of a split that is used: what its reader noted, and what becomes background."""
    lines = list(annotations.notes)
    if purpose == "evaluation":
        if len(annotations) and not (~annotations.crowd).any():
            lines.append("there is no box to find, so all numbers will be -1")
        return lines
    real = annotations.trained_on(crowd=crowd)
    if not real.any():
        return lines  # such a set is refused
    images = annotations.images_of_boxes()
    kept = np.bincount(images[real], minlength=len(annotations)) > 0
    if empty := int((~kept).sum()):
        lines.append(f"{empty} of {len(annotations)} images have no boxes to train on and are background")
    hidden = int((np.bincount(images[annotations.crowd], minlength=len(annotations)) > 0)[~kept].sum())
    if hidden and not crowd:
        lines.append(
            f"{hidden} of those hold crowd or difficult boxes, which --crowd trains on, and which are left "
            "out otherwise"
        )
    return lines


def usable_for_training(annotations: Annotations, *, lenient: bool = False) -> Annotations:
    """Require annotations that can be trained on.

    Raises:
        AnnotationError: with the first of the problems, unless `lenient`, which leaves those images and
            annotations out, and counts them in `Annotations.left_out`.
    """
    return _usable(annotations, "training", lenient=lenient)


def usable_for_evaluation(annotations: Annotations, *, lenient: bool = False) -> Annotations:
    """Require what an honest evaluation needs; boxes without area stay in it, as in the official code.

    Raises:
        AnnotationError: missing images, unknown ids or numbers that are none, unless `lenient`, which leaves
            those images and annotations out, and counts them in `Annotations.left_out`.
    """
    return _usable(annotations, "evaluation", lenient=lenient)


def require_boxes(annotations: Annotations, *, crowd: bool = False) -> None:
    """Require something to train on.

    Args:
        annotations: of the training set.
        crowd: whether crowd boxes are trained on.

    Raises:
        AnnotationError: no image has a box that is trained on.
    """
    for problem in _judge_training_set(annotations, crowd=crowd):
        if problem.kind == NO_BOXES:
            raise AnnotationError(str(problem))


def _usable(annotations: Annotations, purpose: Purpose, *, lenient: bool) -> Annotations:
    """What is left without images that cannot be used; fatal problems become a count.

    Raises:
        AnnotationError: there are such problems, of which it has the first ten, and it is not `lenient`; or
            there is no image that can be used.
    """
    if lenient:
        annotations = _with_header_problems(annotations)
    judged = [each for each in judge_split(annotations, purpose) if each.kind not in TRAINED_ON]
    fatal = [each for each in judged if each.fatal]
    lost = lost_images(annotations.problems)
    used = annotations.without(lost) if lost else annotations
    if not len(used):
        raise AnnotationError(_told_without_images(annotations, fatal))
    counts = Counter(problem.kind for problem in fatal)
    if fatal and not lenient:
        more = f"\n  and {len(fatal) - _MOST_TOLD} more" if len(fatal) > _MOST_TOLD else ""
        raise AnnotationError(
            f"{annotations.source} has annotations that cannot be used ({listed(counts)}); correct them, or "
            "leave them out with --lenient (lenient=True):\n  "
            + "\n  ".join(map(str, fatal[:_MOST_TOLD]))
            + more
        )
    refused = {each.kind for each in fatal}
    rest = tuple(each for each in used.problems if not each.fatal or each.kind not in refused)
    return replace(used, problems=rest, left_out=Counter(annotations.left_out) + counts)


def _told_without_images(annotations: Annotations, fatal: Sequence[Problem]) -> str:
    if not len(annotations):
        others = [str(each) for each in fatal if each.kind != NO_IMAGES]
        return "\n  ".join([f"{annotations.source}: lists no images", *others[:1]])
    what = f"{annotations.source}: no images that can be used ({listed(Counter(p.kind for p in fatal))})"
    if is_without_images(annotations):
        what = (
            f"{annotations.source}: no images that can be read in {annotations.root}; if they are elsewhere, "
            "give their folder with --images (images=...)"
        )
    return f"{what}\n  {next((each for each in fatal if each.kind in LOST), fatal[0])}"


def _with_header_problems(annotations: Annotations) -> Annotations:
    """With those problems of the images that show in their headers, which are not read otherwise."""
    lost = lost_images(annotations.problems)
    indices = [i for i, name in enumerate(annotations.file_names.tolist()) if name not in lost]
    sizes = upright_sizes([annotations.path(i) for i in indices])
    found = (
        judge_image(annotations, i, size or "cannot be read as an image (ssd check says why)")
        for i, size in zip(indices, sizes, strict=True)
    )
    return replace(annotations, problems=(*annotations.problems, *filter(None, found)))
