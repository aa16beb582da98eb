"""Holding images out of a dataset that has no val split, with near-duplicates on the same side."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

import numpy as np
import numpy.typing as npt
from PIL import Image

from ssd.data.annotations import Annotations
from ssd.errors import AnnotationError, ImageError
from ssd.images import load_scaled

HELD_OUT = "val_images.txt"
"""The file of a run folder that lists the images that the run held out, a line each."""

_SIDE = 16  # of the thumbnails that are compared
# Of 255, how far two thumbnails of one picture are apart: anywhere, for JPEG moves colours, and on average.
_MOST_APART, _MEAN_APART = 32, 10
_LEAST_SPREAD = 8  # of 255, standard deviation: less is flat, of which brightness is all that there is
_SPREAD = 48  # that of usual photos, at which all that are not flat are hashed
_CONTRAST = 4  # of 255: smaller differences between neighbouring cells are noise, as of JPEG
_BANDS, _BAND_BITS = 4, 16  # of a hash of 8 x 8 bits; hashes of fewer than four differences share a band
_NEIGHBOURS = 8  # of one band that each image is compared with: without a limit, all of flat images would be


def hold_out(
    annotations: Annotations,
    fraction: float,
    seed: int = 0,
    *,
    crowd: bool = False,
    on_done: Callable[[], object] = lambda: None,
) -> tuple[Annotations, Annotations]:
    """Part the images of a dataset into those to train on and those to evaluate on, at random.

    Images that look nearly the same stay together, also mirrored or with another brightness or contrast, as
    do those that Roboflow made of one (``name.rf.*``) and several entries of one file. Images with and
    without boxes are parted alike, and each class keeps boxes to train on.

    Args:
        annotations: see `ssd.data.load`.
        fraction: of the images to evaluate on, in (0, 1); as near as the groups allow.
        seed: the same one gives the same parts of the same images.
        crowd: whether crowd boxes are trained on; what is held out has others, too, which alone are measured.
        on_done: called after each image that was looked at.

    Returns:
        What to train on, and what to evaluate on, in the order of the dataset.

    Raises:
        ValueError: the fraction is not in (0, 1).
        AnnotationError: there are no two groups of images to part, or no box that an evaluation counts.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction of images to hold out is above 0 and below 1; got {fraction:g}")
    images = annotations.images_of_boxes()
    measured = np.bincount(images[~annotations.crowd], minlength=len(annotations)) > 0
    if not measured.any():
        raise AnnotationError(
            f"{annotations.source}: no images can be held out to evaluate on: there is no box that counts in "
            "evaluation, as crowd and difficult ones do not; train without holding images out"
        )
    groups = _groups(annotations, on_done)
    groups = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    counts = _boxes_by_class(annotations, crowd=crowd)
    labelled = [group for group in groups if counts[group].any()]
    others = [group for group in groups if not counts[group].any()]
    held, background = _chosen(labelled, fraction, counts), _chosen(others, fraction, counts)
    if not measured[held + background].any():
        wanted = [group for group in groups if measured[group].any()]
        smallest = _smallest(wanted, counts, len(annotations))
        if smallest is None:
            raise AnnotationError(
                f"no images can be held out of {len(annotations)}: they make {len(groups)} groups of nearly "
                f"equal ones, {len(wanted)} of them with boxes to measure, the largest of "
                f"{max(map(len, wanted))} images; half of the images, and boxes of every class, have to be "
                "left to train on. Make a val split of images of another scene, camera or day"
            )
        # It comes first: behind others it might take the last boxes of a class.
        held = _chosen([smallest, *(each for each in labelled if each is not smallest)], fraction, counts)
        held = held if measured[held].any() else smallest  # which may be more than the fraction
    held = held + background
    kept = np.setdiff1d(np.arange(len(annotations)), held)
    return annotations.select(kept.tolist()), annotations.select(sorted(held))


def read_held_out(file: Path) -> list[str]:
    """The names in a `HELD_OUT` file.

    Raises:
        FileNotFoundError: it is not there.
    """
    try:
        names = file.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{file} is missing, which lists the images that the run held out; put it back"
        ) from None
    return [name for name in names if name]


def part_by_names(annotations: Annotations, held: Iterable[str]) -> tuple[Annotations, Annotations]:
    """The parts that `hold_out` gave before, by the file names of the second.

    Raises:
        AnnotationError: one of them is not among the images any more, or no other is.
    """
    names, wanted = annotations.file_names.tolist(), set(held)
    if gone := sorted(wanted - set(names)):
        raise AnnotationError(
            f"{annotations.source}: {len(gone)} of {len(wanted)} held-out images are not among its images "
            f"any more, as {gone[0]}; put them back, or begin a new run"
        )
    val = [i for i, name in enumerate(names) if name in wanted]
    train = [i for i, name in enumerate(names) if name not in wanted]
    if not val or not train:
        raise AnnotationError(
            f"{annotations.source}: the run's list holds out {len(val)} of {len(names)} images, which leaves "
            f"none to {'train' if val else 'evaluate'} on; put the list back as it was"
        )
    return annotations.select(train), annotations.select(val)


def _chosen(groups: Sequence[list[int]], fraction: float, counts: npt.NDArray[np.int64]) -> list[int]:
    """The images of the first of these groups that fit into a fraction of them; each class keeps boxes."""
    room = round(fraction * sum(map(len, groups)))
    left = counts.sum(0)
    held: list[int] = []
    for group in groups:
        lost = counts[group].sum(0)
        if len(group) <= room and ((left > lost) | (lost == 0)).all():
            held += group
            room -= len(group)
            left = left - lost
    return held


def _smallest(groups: Sequence[list[int]], counts: npt.NDArray[np.int64], images: int) -> list[int] | None:
    """The smallest group that training can do without, for where a fraction of few images is none."""
    total = counts.sum(0)
    for group in sorted(groups, key=len):
        lost = counts[group].sum(0)
        if len(group) <= images / 2 and ((total > lost) | (lost == 0)).all():
            return group
    return None


def _boxes_by_class(annotations: Annotations, *, crowd: bool) -> npt.NDArray[np.int64]:
    """How many boxes of each class that are trained on are in each image, ``[N, classes]``."""
    counts = np.zeros((len(annotations), len(annotations.class_names)), np.int64)
    real = annotations.trained_on(crowd=crowd)
    np.add.at(counts, (annotations.images_of_boxes()[real], annotations.labels[real] - 1), 1)
    return counts


# --- Groups -----------------------------------------------------------------------------------------------


def _groups(annotations: Annotations, on_done: Callable[[], object]) -> list[list[int]]:
    """The indices of the images, those that belong together in one list; ordered by the first of each."""
    names = annotations.file_names.tolist()
    parents = list(range(len(names)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    def join(i: int, j: int) -> None:
        low, high = sorted((root(i), root(j)))
        parents[high] = low

    first: dict[str, int] = {}
    for i, name in enumerate(names):
        join(i, first.setdefault(_source_of(name), i))
    thumbnails, seen = _thumbnails(annotations, on_done)
    for i, j in _alike(thumbnails, np.array(seen, np.int64)):
        join(i, j)
    groups: dict[int, list[int]] = defaultdict(list)
    for i in range(len(names)):
        groups[root(i)].append(i)
    return list(groups.values())


def _source_of(name: str) -> str:
    """What an image was made of: Roboflow calls its variants ``<source>.rf.<digest>.jpg``, in any folder.

    >>> _source_of("train/a_jpg.rf.0f3a.jpg"), _source_of("train/a.jpg")
    ('a_jpg.rf', 'train/a.jpg')
    """
    source, mark, _ = PurePath(name).name.rpartition(".rf.")
    return f"{source}.rf" if mark else name


def _thumbnails(
    annotations: Annotations, on_done: Callable[[], object]
) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """Small pictures of the images that can be read, uint8 ``[n, 16, 16, 3]``, and which those are."""

    def read(i: int) -> npt.NDArray[np.uint8] | None:
        try:
            image, _ = load_scaled(annotations.path(i), 4 * _SIDE)
        except (AnnotationError, ImageError, OSError):  # told by whoever trains on it
            return None
        # The mean of what each pixel covers: single pixels of a large photo say nothing.
        return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX))

    found, seen = [], []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for i, thumbnail in enumerate(pool.map(read, range(len(annotations)))):
            on_done()
            if thumbnail is not None:
                found.append(thumbnail)
                seen.append(i)
    return np.array(found, np.uint8).reshape(-1, _SIDE, _SIDE, 3), seen


def _alike(thumbnails: npt.NDArray[np.uint8], indices: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Pairs of images that look nearly the same; each is compared with few that its hash makes likely."""
    # Behind them their mirror images, so that one of a pair may be turned.
    mirrored = np.repeat([False, True], len(indices))
    thumbnails = np.concatenate([thumbnails, thumbnails[:, :, ::-1]])
    indices = np.tile(indices, 2)
    grey = thumbnails.mean(3, dtype=np.float32)
    brightness, spread = grey.mean((1, 2)), grey.std((1, 2))
    hashes = _hashes(grey, spread)
    for band in range(_BANDS):
        keys = hashes >> np.uint64(band * _BAND_BITS) & np.uint64(2**_BAND_BITS - 1)
        order = np.lexsort((brightness, hashes, keys))
        for step in range(1, _NEIGHBOURS + 1):
            one, other = order[:-step], order[step:]
            likely = (keys[one] == keys[other]) & ~(mirrored[one] & mirrored[other])
            one, other = one[likely], other[likely]
            for start in range(0, len(one), 4096):
                a, b = one[start : start + 4096], other[start : start + 4096]
                same = _near(thumbnails[a], thumbnails[b], brightness[[a, b]], spread[[a, b]])
                yield from zip(indices[a[same]].tolist(), indices[b[same]].tolist(), strict=True)


def _near(
    a: npt.NDArray[np.uint8],
    b: npt.NDArray[np.uint8],
    brightness: npt.NDArray[np.float32],
    spread: npt.NDArray[np.float32],
) -> npt.NDArray[np.bool_]:
    """Which thumbnails ``[n, 16, 16, 3]`` are those of one picture; the others are ``[2, n]``, of both.

    Those that are not flat get the same brightness first, and the higher of both contrasts.
    """
    flat = spread.min(0) < _LEAST_SPREAD
    centre = np.where(flat, 0, brightness)
    factor = np.where(flat, 1, spread.max(0) / spread.clip(_LEAST_SPREAD))
    centre, factor = centre[:, :, None], factor[:, :, None].astype(np.float32)
    pixels = [each.reshape(len(a), -1).astype(np.float32) for each in (a, b)]
    apart = np.abs((pixels[0] - centre[0]) * factor[0] - (pixels[1] - centre[1]) * factor[1])
    near: npt.NDArray[np.bool_] = (apart.max(1) <= _MOST_APART) & (apart.mean(1) <= _MEAN_APART)
    return near


def _hashes(grey: npt.NDArray[np.float32], spread: npt.NDArray[np.float32]) -> npt.NDArray[np.uint64]:
    """Difference hashes of 64 bits: of 8 x 8 cells, whether the next one to the right is brighter."""
    scale = np.where(spread < _LEAST_SPREAD, 1, _SPREAD / spread.clip(_LEAST_SPREAD))
    cells = grey.reshape(-1, 8, 2, 8, 2).mean((2, 4)) * scale[:, None, None]
    bits = (np.roll(cells, -1, axis=2) - cells > _CONTRAST).reshape(-1, 64)
    weights = np.uint64(1) << np.arange(64, dtype=np.uint64)
    hashes: npt.NDArray[np.uint64] = (bits * weights).sum(1, dtype=np.uint64)
    return hashes
