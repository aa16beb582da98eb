"""YOLO: each image has a text file of boxes relative to it; a YAML or text file names the classes."""

import math
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ssd.data.annotations import Annotations
from ssd.data.builder import Builder, finite_numbers, number, read_text
from ssd.data.folders import files_of, holds_all, images_below, subfolders
from ssd.data.judge import DOUBTFUL, MISSING, NOT_A_BOX, UNKNOWN_CATEGORY, UNREADABLE, upright_sizes
from ssd.data.names import ImageFolder, files_below, named_parts, within, written_parts
from ssd.data.pairs import (
    LABEL_FOLDERS,
    Pairs,
    count_objects,
    is_label_name,
    is_of_another,
    joined,
    label_folders,
    pair,
)
from ssd.data.yolo_settings import MOST_PARTS, Settings, entries_of, find_listings, find_settings
from ssd.errors import AnnotationError, ImageError, as_line
from ssd.images import is_image_name, load_image

STRAY = "label files without an image"

_MOST_OF_SIDE = 1.5  # times a side; what is larger is no part of it
_SHOWN = 80  # characters of a line
_ASKED = 20  # files that are looked into


def is_at(path: Path) -> bool:
    """Whether a path is a file that names classes, or a folder with one, or with YOLO's label files."""
    try:
        return find_settings(path) is not None or _has_labels(path)
    except AnnotationError:  # `read` tells what is wrong
        return True


def has_split(path: Path, split: str) -> bool:
    """Whether there are images of a split, or labels."""
    try:
        settings = find_settings(path)
    except AnnotationError:
        return False
    return settings is not None and _has_split(settings, split)


def _has_split(settings: Settings, split: str) -> bool:
    try:
        return any(_has_some(listing, settings) for listing in find_listings(settings, split))
    except AnnotationError:
        # Roboflow's files name splits that were not exported; or the labels alone are here.
        places = _places_of_entries(settings, split) if entries_of(settings, split) else []
        return any(is_label_name(name) for place in places for name in files_below(Path(place)))


def read(
    path: Path,
    split: str,
    images: Path | None,
    class_names: Sequence[str] | None,
    *,
    follow: bool = False,
) -> Annotations:
    """Read a split of a YOLO dataset; labels are looked for in ``labels/`` for ``images/``, and beside these.

    The classes, and where each split is, are told by a YAML file or by darknet's ``obj.data``. Where there is
    only ``classes.txt`` or the like, folders that are called as the splits tell the rest.
    """
    settings = find_settings(path)
    if settings is None:
        raise AnnotationError(
            f"{path}: there are label files, but nothing names their classes; put the names into classes.txt "
            "there, one a line in the order of their numbers"
        )
    listings = find_listings(settings, split, images)
    found = _Listed([], [], [])
    parts: dict[Path, tuple[list[str], list[str]]] = {}
    for listing in listings:
        before = len(found.paths)
        if os.path.isdir(listing):
            found.paths.extend(_images_in(listing))
        else:
            _read_list(listing, settings, images, found, follow=follow)
        home = settings.own if images else _home(settings, listing)
        paths, folders = parts.setdefault(home, ([], []))
        paths += found.paths[before:]
        folders += [str(listing)] if os.path.isdir(listing) else []
    home = next(iter(parts))
    places = _places_of_entries(settings, split) if images else []
    pairs = joined(
        pair(paths, folders, str(each), split, places, _searched(each, folders, settings, images))
        for each, (paths, folders) in parts.items()
    )
    if images:
        pairs = _without_other_splits(pairs, str(home), split)
    told = _told_without_val(settings) if split == "train" else ""
    return _build(settings, listings, found, pairs, home, class_names, told, follow=follow)


def _told_without_val(settings: Settings) -> str:
    """What to say where the val split is named, but cannot be found; else nothing is evaluated unseen."""
    entries = entries_of(settings, "val")
    if not entries or _has_split(settings, "val"):
        return ""
    named = f"{settings.file.name} names {', '.join(entries[:3])} as val"
    try:
        find_listings(settings, "val")
    except AnnotationError:
        return f"{named}, which is not there"
    return f"{named}, where there are no images"


# --- Images -----------------------------------------------------------------------------------------------


class _Listed(NamedTuple):
    """The images of a split."""

    paths: list[str]
    """Absolute."""
    guessed: list[tuple[str, str]]
    """Lines of lists whose image was found by their last parts, and that image."""
    lost: list[tuple[Path, int, str]]
    """Lines of lists that name no image that is there: the list, the line's number, and why not."""


def _images_in(folder: Path) -> list[str]:
    """The images in a folder and below it, sorted."""
    names = [name.split("/") for name in images_below(folder)]
    return [os.path.join(folder, *parts) for parts in sorted(names)]


def _read_list(
    listing: Path, settings: Settings, images: Path | None, found: _Listed, *, follow: bool
) -> None:
    """Add the images that a text file lists, one a line."""
    roots = [images] if images else _list_roots(listing, settings)
    places = [ImageFolder(Path(os.path.abspath(root)), follow=follow) for root in dict.fromkeys(roots)]
    for number_of_line, line in enumerate(read_text(listing).splitlines(), start=1):
        written = line.strip()
        if not written:
            continue
        exact = ((place, name) for place in places if (name := place.find_as_written(written)) is not None)
        place, name = next(exact, (places[-1], ""))
        if not name:
            name, why, _ = place.find(written)
            if why or place.find_as_written(name) is None:
                why = why or f"there is no such file in {place.root}"
                found.lost.append((listing, number_of_line, f"{as_line(written, _SHOWN)}: {why}"))
                continue
            found.guessed.append((written, name))
        found.paths.append(os.path.abspath(os.path.join(place.root, name)))


def _list_roots(listing: Path, settings: Settings) -> list[Path]:
    """The folders in which a list names images: its own, and where the dataset's paths start from."""
    if listing.is_relative_to(settings.own):
        starts = (Path(os.path.abspath(each)) for each in settings.starts)
        return [listing.parent, *(each for each in starts if each.is_relative_to(settings.own))]
    named = (Path(os.path.abspath(each)) for each in settings.starts)
    roots = [listing.parent, *(each for each in named if listing.is_relative_to(each))]
    return [*(each for each in roots if not holds_all(str(each))), settings.root]


def _home(settings: Settings, listing: Path) -> Path:
    """The folder of the dataset that a listing is in; above it no labels are looked for."""
    for start in settings.starts:
        home = Path(os.path.abspath(start))
        if listing.is_relative_to(home) and home.is_relative_to(settings.own):
            return home
    folder = listing if os.path.isdir(listing) else listing.parent
    above = [each.parent for each in (folder, *folder.parents) if each.name.lower() == "images"]
    beside = [folder.parent] if set(LABEL_FOLDERS) & subfolders(folder.parent).keys() else []
    # Of these only the folders for labels are looked into (see `_searched`): they may hold the dataset.
    return next((each for each in [*above, *beside] if each.parent != each), folder)


def _searched(home: Path, folders: Sequence[str], settings: Settings, images: Path | None) -> list[str]:
    """Where label files may be by their names alone: in the dataset, or in what it names outside."""
    if images or home.is_relative_to(settings.own):
        return [str(home)]
    return list(dict.fromkeys(place for each in folders for place in label_folders(each, str(home))))


def _places_of_entries(settings: Settings, split: str) -> list[str]:
    """Where labels are looked for whose images are not where the file says."""
    root = str(settings.own)
    entries = [entry for entry in entries_of(settings, split) if not entry.lower().endswith(".txt")]
    parts = [named_parts(written_parts(entry)) for entry in entries]
    expected = [os.path.join(root, *each) for each in parts if within(each) and len(each) <= MOST_PARTS] or [
        os.path.join(root, "images", split),
        os.path.join(root, split, "images"),
    ]
    places = [place for folder in expected for place in label_folders(os.path.abspath(folder), root)]
    return [place for place in dict.fromkeys(places) if os.path.isdir(place)]


def _without_other_splits(pairs: Pairs, root: str, split: str) -> Pairs:
    """Without images of a shared folder whose labels are another split's."""
    gone = {
        i
        for i, labels in pairs.doubtful.items()
        if all(is_of_another(label, root, split) for label in labels)
    }
    kept = [i for i in range(len(pairs.images)) if i not in gone]
    return Pairs(
        [pairs.images[i] for i in kept],
        [pairs.labels[i] for i in kept],
        {new: pairs.doubtful[i] for new, i in enumerate(kept) if i in pairs.doubtful},
        pairs.strays,
        [new for new, i in enumerate(kept) if i in pairs.elsewhere],
    )


def _has_some(listing: Path, settings: Settings) -> bool:
    if not os.path.isdir(listing):
        return any(line.strip() for line in read_text(listing).splitlines())
    if settings.splits and any(is_image_name(name) for name in files_below(listing)):
        return True
    labels = (
        os.path.join(place, name)
        for place in label_folders(str(listing), str(_home(settings, listing)))
        for name in files_below(Path(place))
        if is_label_name(name)
    )
    return any(count_objects(label) for label in islice(labels, _ASKED))


def _has_labels(root: Path) -> bool:
    """Whether a folder has label files in ``labels/``, or in one of its folders."""
    top = subfolders(root)
    folders = [root, *top.values()]
    places = [below[name] for below in map(subfolders, folders) for name in LABEL_FOLDERS if name in below]
    files = (
        file
        for place in places
        for folder in (place, *subfolders(place).values())
        for file in files_of(folder, ".txt")
    )
    return any(count_objects(str(file)) for file in islice(files, _ASKED))


# --- Labels -----------------------------------------------------------------------------------------------


def _build(
    settings: Settings,
    listings: Sequence[Path],
    listed: _Listed,
    pairs: Pairs,
    home: Path,
    wanted: Sequence[str] | None,
    note: str,
    *,
    follow: bool,
) -> Annotations:
    paths = [Path(image) for image in pairs.images]
    root = Path(os.path.commonpath([path.parent for path in paths])) if paths else listings[0]
    builder = Builder(settings.file, root, follow=follow)
    labels = builder.set_classes(settings.names, tuple(range(len(settings.names))), wanted)
    lines = _Lines(settings, labels, builder)
    for i, (path, label, size) in enumerate(zip(paths, pairs.labels, upright_sizes(paths), strict=True)):
        name = path.relative_to(root)
        image = builder.add_image(name.as_posix(), name.with_suffix("").as_posix(), *(size or (None, None)))
        if size is None and os.path.isfile(path):
            builder.problem(UNREADABLE, builder.names[image], "", _why_unreadable(path))
        elif i in pairs.doubtful:
            some = ", ".join(_below_home(each, home) for each in pairs.doubtful[i][:5])
            told = (
                f"has no label file in its place, but {some} may be its own; put that where it belongs, in "
                f"{_below_home(str(_expected(path, home)), home)}, or remove it"
            )
            builder.problem(DOUBTFUL, builder.names[image], "", told)
        elif label is not None and size is not None:
            lines.read(label, image, size)
    _tell_lists(settings, listings, listed, builder)
    _tell_pairs(pairs, home, builder)
    if note:
        builder.note(note)
    hint = ""
    if paths:
        hint = f"those of {paths[0].name} were looked for in {_expected(paths[0], home)}"
    return builder.build(labels_hint=hint)


def _tell_lists(settings: Settings, listings: Sequence[Path], listed: _Listed, builder: Builder) -> None:
    """Tell what the lists of images hold, and the settings, that is not so."""
    for file, number_of_line, why in listed.lost:
        builder.problem(MISSING, str(file), f"line {number_of_line}", why)
    if not listed.paths and not listed.lost:
        what = f"there are no images in {', '.join(map(str, listings))}"
        what += "; if they are elsewhere, give their folder with --images (images=...)"
        builder.problem(MISSING, str(settings.file), "", what)
    if listed.guessed:
        written, name = listed.guessed[0]
        builder.note(
            f"{len(listed.guessed)} images are listed by paths that are not here; they were found by the "
            f"last parts of these, such as {name} for {as_line(written, _SHOWN)}"
        )
    if settings.others:
        others = ", ".join(file.name for file in settings.others)
        builder.note(f"{settings.file.name} is read; {others} could be given in its place")
    if settings.class_count not in (None, len(settings.names)):
        what = f"{settings.file.name} says nc: {settings.class_count}, but has {len(settings.names)} names"
        builder.note(f"{what}, which count")


def _tell_pairs(pairs: Pairs, home: Path, builder: Builder) -> None:
    """Tell which images and label files do not belong to each other."""
    lacking = [i for i, label in enumerate(pairs.labels) if label is None and i not in pairs.doubtful]
    example = f"such as {builder.names[lacking[0]]}" if lacking else ""
    if pairs.strays and pairs.images:
        told = f"{len(pairs.strays)} label files with {sum(pairs.strays.values())} objects are no image's, "
        told += f"such as {_below_home(min(pairs.strays), home)}"
        if lacking:
            told += f", while {len(lacking)} images have no label file, {example}; call each label file like "
            told += "its image, and remove those whose images are gone"
            builder.problem(STRAY, str(builder.source), "", told)
        else:
            builder.note(f"{told}; they are not used")
        for i in lacking:
            why = "has no label file, and there are label files that are no image's"
            builder.problem(DOUBTFUL, builder.names[i], "", why)
    elif lacking:
        count = len(pairs.images)
        builder.note(
            f"{len(lacking)} of {count} images have no label file and count as background, {example}"
        )
    if pairs.elsewhere:
        first = pairs.elsewhere[0]
        found = _below_home(pairs.labels[first] or "", home)
        builder.note(
            f"{len(pairs.elsewhere)} of {len(pairs.images)} images have their label file in another place, "
            f"where it was found by its name alone, such as {found} for {builder.names[first]}"
        )
    images_of: dict[str, list[str]] = defaultdict(list)
    for image, label in zip(pairs.images, pairs.labels, strict=True):
        if label is not None:
            images_of[label].append(os.path.basename(image))
    shared = [(label, names) for label, names in images_of.items() if len(set(names)) > 1]
    if shared:
        label, names = shared[0]
        builder.note(
            f"{len(shared)} label files are read for several images each, such as "
            f"{_below_home(label, home)} for {' and '.join(names[:3])}"
        )


def _below_home(path: str, home: Path) -> str:
    """A path for messages: from the dataset's folder on, if it is in it."""
    return os.path.relpath(path, home) if Path(path).is_relative_to(home) else path


def _expected(image: Path, home: Path) -> Path:
    """Where the label file of an image belongs."""
    parts = list(image.parts)
    above = len(home.parts) if image.is_relative_to(home) else 0
    for i in reversed(range(above, len(parts) - 1)):
        if parts[i].lower() == "images":
            parts[i] = "labels"
            return Path(*parts).with_suffix(".txt")
    return image.with_suffix(".txt")


def _why_unreadable(path: Path) -> str:
    try:
        load_image(path)
    except ImageError as error:
        return str(error).removeprefix(f"{path}: ")
    return "its size, which its boxes need, cannot be read"


class _Lines:
    """Reads label files into a builder."""

    def __init__(self, settings: Settings, labels: Sequence[int | None], builder: Builder) -> None:
        self._names, self._labels, self._builder = settings.names, labels, builder
        self._has_keypoints = settings.has_keypoints
        self._numbers = {name: number for number, name in reversed(list(enumerate(settings.names))) if name}
        self._longest = max(map(len, self._numbers), default=0)

    def read(self, file: str, image: int, size: tuple[int, int]) -> None:
        """Add the boxes of an image."""
        name = os.path.basename(file)
        try:
            text = read_text(Path(file))
        except AnnotationError as error:
            why = f"its label file {name} {str(error).removeprefix(f'{file}: ')}"
            self._builder.problem(DOUBTFUL, self._builder.names[image], "", why)
            return
        if "\0" in text:
            why = f"its label file {name} is no text; write it anew, or remove it if the image has no objects"
            self._builder.problem(DOUBTFUL, self._builder.names[image], "", why)
            return
        for count, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                self._read_line(line.strip(), f"{name}:{count}", image, size)

    def _read_line(self, line: str, tag: str, image: int, size: tuple[int, int]) -> None:
        class_number, words = self._split(line)
        values = [number(word) for word in words]
        box, why = _box_of(values[:4] if self._has_keypoints else values, size)
        shown = as_line(line, _SHOWN)
        file = self._builder.names[image]
        if box is None:
            self._builder.problem(NOT_A_BOX, file, tag, f"{why}: {shown}")
        elif class_number is None:
            why = f"its class is none of 0 to {len(self._names) - 1}, nor one of their names"
            self._builder.problem(UNKNOWN_CATEGORY, file, tag, f"{why}: {shown}")
        else:
            label, category = self._labels[class_number], self._names[class_number]
            self._builder.add_box(image, tag, box, label, category=category)

    def _split(self, line: str) -> tuple[int | None, list[str]]:
        """The number of the class, if it is one, and the words that follow it."""
        words = _words(line)
        value = number(words[0]) if words else math.nan
        if value.is_integer() and 0 <= value < len(self._names):
            return int(value), words[1:]
        ends = [found.start() for found in re.finditer("[ \t,;]", line[: self._longest + 1])]
        for end in reversed(ends):  # names may have spaces
            if line[:end] in self._numbers:
                return self._numbers[line[:end]], _words(line[end:].strip(" \t,;"))
        return None, words[1:]


def _words(line: str) -> list[str]:
    """What a line holds, between spaces, tabs, commas or semicolons; with points for decimal commas."""
    if "," not in line and ";" not in line:
        return line.split()
    words = re.split(r"[;\s]+", line.strip("; \t"))
    if len(words) > 4 and all(re.fullmatch(r"-?\d*,\d+|[^,]*", word) for word in words):
        return [word.replace(",", ".") for word in words]
    return re.split(r"[,;\s]+", line.strip(",; \t"))


def _box_of(values: Sequence[float], size: tuple[int, int]) -> tuple[tuple[float, ...] | None, str]:
    """The box that the numbers behind a class give, in pixels; or None and why they give none.

    Four are its centre and size, and a fifth a confidence; more are the corners of a polygon.
    """
    width, height = size
    if not all(map(math.isfinite, values)):
        return None, "not a class and the numbers of a box"
    if len(values) not in (4, 5) and (len(values) < 6 or len(values) % 2):
        return None, (
            f"{len(values)} numbers behind the class are no box (4) and no polygon (6 or more, in pairs); "
            "key points need kpt_shape in the YAML file"
        )
    corners = values if len(values) > 5 else values[:4]
    if max(map(abs, corners)) > _MOST_OF_SIDE:
        return None, (
            "its numbers have to be parts of the image's width and height, 1 at most; divide pixels "
            f"by its size ({width}x{height}), per cent by 100"
        )
    if len(values) == 5 and not 0 <= values[4] <= 1:
        return None, (
            "its sixth number is no confidence from 0 to 1; if it is an angle, export the corners of the box "
            "instead (YOLO OBB)"
        )
    if len(values) > 5:
        xs, ys = values[0::2], values[1::2]
        edges = (min(xs), min(ys), max(xs), max(ys))
    else:
        x, y, w, h = corners
        edges = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    box = finite_numbers([edge * side for edge, side in zip(edges, size * 2, strict=True)], 4)
    return box, "not a class and the numbers of a box"
