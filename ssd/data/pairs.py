"""Which label file is which image's, where each image has a text file of its own."""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ssd.data.builder import number, read_text
from ssd.data.folders import IMAGE_FOLDERS, split_of, subfolders
from ssd.data.names import files_below, loose, without_upload
from ssd.errors import AnnotationError
from ssd.images import is_image_name

LABEL_FOLDERS = ("labels", "label")
"""Folders of label files, beside those of the images."""

_COMPANIONS = frozenset(
    ".txt .xml .json .yaml .yml .csv .cache .npy .npz .md .html .data .names .zip .db .ini .py .log".split()  # noqa: SIM905
)
"""Suffixes of what lies beside images and is none."""

_PREDICTED = ("predict", "runs", "results", "output", "inference", "exp")
"""How folders are called, or begin, in which networks leave what they found."""


class Pairs(NamedTuple):
    """The label files of images, and what does not fit together; paths are absolute."""

    images: list[str]
    """Those that were given; after them, files of other suffixes that label files take for images."""
    labels: list[str | None]
    """The label file of each; None for those that have none."""
    doubtful: dict[int, list[str]]
    """Of images that have none, by their index: label files elsewhere that may be theirs."""
    strays: dict[str, int]
    """Label files that are no image's, with the number of their objects; none that have no objects."""
    elsewhere: Sequence[int] = ()
    """The images, by their index, whose label files are not where labels are looked for."""


def pair(
    images: Sequence[str],
    listings: Sequence[str],
    root: str,
    split: str,
    extra: Sequence[str] = (),
    searched: Sequence[str] | None = None,
) -> Pairs:
    """Find the label file of each image.

    That is one that is called like the image, in one of the places where labels are looked for; or else, if
    just one in the whole dataset is called so and is no other image's, that one. Letter case, Unicode's ways
    to write one letter and percent-encoding are not told apart where that leaves one.

    Args:
        images: absolute paths.
        listings: the folders that were searched for them, in which other files may have labels, too.
        root: the folder of the dataset.
        split: of the images.
        extra: more places where labels are looked for.
        searched: where label files are looked for by their names alone; by default in all of `root`.
    """
    known = _LabelFiles(root, extra)
    images = list(images)
    labels = known.of(images)
    claimed = set(labels)
    free = [label for label in known.searched(images, listings, split) if label not in claimed]
    if free:
        others = _other_files(listings, images)
        for other, label in zip(others, known.of(others), strict=True):
            if label and label not in claimed and known.count(label):
                images.append(other)
                labels.append(label)
                claimed.add(label)
    if not free and None not in labels:
        return Pairs(images, labels, {}, {})
    given = set(images)
    places = [root] if searched is None else searched
    below = [os.path.join(each, name) for each in places for name in files_below(Path(each))]
    elsewhere = [path for path in below if path not in given and is_image_name(path)]
    theirs = known.of(elsewhere)
    claimed.update(theirs)
    free = [label for label in free if label not in claimed]
    unused = [path for path in dict.fromkeys([*free, *below]) if path not in claimed]
    lacking = [image for image, label in zip(elsewhere, theirs, strict=True) if label is None]
    sure, doubtful = _called_alike(
        images, labels, lacking, unused, known, lambda file: split in _splits_of(file, root)
    )
    for i, label in sure.items():
        if is_of_another(label, root, split) or _may_be_predicted(label, root):
            doubtful[i] = [label]
        else:
            labels[i] = label
    used = {*labels, *(option for options in doubtful.values() for option in options)}
    strays = {label: known.count(label) for label in free if label not in used}
    strays = {label: count for label, count in strays.items() if count}
    return Pairs(images, labels, doubtful, strays, sorted(sure.keys() - doubtful.keys()))


def joined(parts: Iterable[Pairs]) -> Pairs:
    """The pairs of several datasets' folders as one."""
    images: list[str] = []
    labels: list[str | None] = []
    doubtful: dict[int, list[str]] = {}
    strays: dict[str, int] = {}
    elsewhere: list[int] = []
    for part in parts:
        first = len(images)
        images += part.images
        labels += part.labels
        doubtful |= {first + i: options for i, options in part.doubtful.items()}
        strays |= part.strays
        elsewhere += [first + i for i in part.elsewhere]
    return Pairs(images, labels, doubtful, strays, elsewhere)


def is_label_name(name: str) -> bool:
    """Whether a file of this name may be a label file."""
    return name.lower().endswith(".txt") and not os.path.basename(name).startswith(".")


def label_folders(folder: str, root: str) -> list[str]:
    """Where the labels of a folder's images may be: ``labels/`` for ``images/``, within it, beside it, in it.

    Args:
        folder: absolute; it need not exist.
        root: the folder of the dataset, above which nothing is looked for.
    """
    path = Path(folder)
    parts = path.parts
    first = len(Path(root).parts) if path.is_relative_to(root) else 1
    mirrored, siblings = [], []
    for i in reversed(range(first, len(parts))):
        for place in _label_folders_in(Path(*parts[:i])):
            if parts[i].lower() in IMAGE_FOLDERS:  # images/train and labels/train
                mirrored.append(in_any_case(place, parts[i + 1 :]))
            else:  # train and labels/train; or frames and labels
                siblings.append(in_any_case(place, parts[i:]))
                siblings += [place] if i == len(parts) - 1 else []
    places = [*mirrored, *_label_folders_in(path), *siblings, path]
    return list(dict.fromkeys(str(place) for place in places if place))


def in_any_case(base: Path, parts: Sequence[str]) -> Path | None:
    """What is at a path below a folder, in any letter case if there is just one; None if nothing is."""
    for part in parts:
        names = [part]
        if not os.path.exists(base / part):
            names = [name for name in _names_in(str(base)) if name.casefold() == part.casefold()]
        if len(names) != 1:
            return None
        base = base / names[0]
    return base


def count_objects(file: str) -> int:
    """How many lines of a file are those of YOLO labels: a class and at least four numbers."""
    try:
        lines = read_text(Path(file)).splitlines()
    except AnnotationError:
        return 0
    rows = (line.replace(",", " ").split() for line in lines)
    return sum(len(row) > 4 and not any(math.isnan(number(word)) for word in row[-4:]) for row in rows)


class _LabelFiles:
    """The label files of folders, each of which is listed once."""

    def __init__(self, root: str, extra: Sequence[str]) -> None:
        self._root, self._extra = root, extra
        self._places: dict[str, list[str]] = {}
        self._stems: dict[str, dict[str, str]] = {}
        self._alike: dict[str, dict[str, list[str]]] = {}
        self._counts: dict[str, int] = {}

    def of(self, images: Sequence[str]) -> list[str | None]:
        """The label file of each image in the places for its folder."""
        labels: list[str | None] = [self._exactly(image) for image in images]
        claimed = set(labels)
        options = {}
        for i, label in enumerate(labels):
            if label is None:
                options[i] = [each for each in self._alike_in_places(images[i]) if each not in claimed]
        wanted = Counter(each for some in options.values() for each in some)
        for i, some in options.items():
            if len(some) == 1 and wanted[some[0]] == 1:
                labels[i] = some[0]
        return labels

    def count(self, label: str) -> int:
        """How many objects a label file has."""
        if label not in self._counts:
            self._counts[label] = count_objects(label)
        return self._counts[label]

    def searched(self, images: Sequence[str], listings: Sequence[str], split: str) -> list[str]:
        """All label files in the places for images and for the folders that were searched, sorted."""
        found = set()
        for folder in {os.path.dirname(image) for image in images}:
            for place in self._places_of(folder):
                found |= {os.path.join(place, name) for name in self._stems_in(place).values()}
        for place in {place for folder in listings for place in self._places_of(folder)}:
            found |= {os.path.join(place, name) for name in files_below(Path(place)) if is_label_name(name)}
        return sorted(file for file in found if not is_of_another(file, self._root, split))

    def _places_of(self, folder: str) -> list[str]:
        if folder not in self._places:
            self._places[folder] = [*label_folders(folder, self._root), *self._extra]
        return self._places[folder]

    def _stems_in(self, place: str) -> dict[str, str]:
        """The label files in a folder by their stems."""
        if place not in self._stems:
            names = [name for name in _names_in(place) if is_label_name(name)]
            self._stems[place] = {os.path.splitext(name)[0]: name for name in names}
        return self._stems[place]

    def _exactly(self, image: str) -> str | None:
        folder, name = os.path.split(image)
        stem = os.path.splitext(name)[0]
        for place in self._places_of(folder):
            stems = self._stems_in(place)
            if label := stems.get(stem) or stems.get(name):
                return os.path.join(place, label)
        return None

    def _alike_in_places(self, image: str) -> list[str]:
        folder, name = os.path.split(image)
        for place in self._places_of(folder):
            if place not in self._alike:
                table: dict[str, list[str]] = defaultdict(list)
                for stem, label in self._stems_in(place).items():
                    table[loose(stem)].append(os.path.join(place, label))
                self._alike[place] = table
            if found := [label for key in _keys(name) for label in self._alike[place].get(key, ())]:
                return found
        return []


def _called_alike(
    images: Sequence[str],
    labels: Sequence[str | None],
    elsewhere: Sequence[str],
    unused: Sequence[str],
    known: _LabelFiles,
    is_own: Callable[[str], bool],
) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Label files with objects, anywhere, that are called like images without one.

    Args:
        images, labels: of a split.
        elsewhere: other images without label files.
        unused: all files that are no image's label file.
        is_own: whether the path of a file says that it is of the split.

    Returns:
        By the index of an image: the one that can only be its own; and several, or one that others may have.
    """
    lacking = {i: _keys(os.path.basename(images[i])) for i, label in enumerate(labels) if label is None}
    keys = {key for some in lacking.values() for key in some}
    options: dict[str, list[str]] = defaultdict(list)
    for file in filter(is_label_name, unused):
        stem = loose(os.path.splitext(os.path.basename(file))[0])
        for key in dict.fromkeys((stem, without_upload(stem))):
            if key in keys and known.count(file):
                options[key].append(file)
    own_takers = Counter(key for some in lacking.values() for key in some)
    takers = own_takers + Counter(key for image in elsewhere for key in _keys(os.path.basename(image)))
    sure, doubtful = {}, {}
    for i, some in lacking.items():
        found = list(dict.fromkeys(file for key in some for file in options.get(key, ())))
        own = [file for file in found if is_own(file)]
        rivals = own_takers if own else takers
        if len(own or found) == 1 and all(rivals[key] == 1 for key in some if key in options):
            sure[i] = (own or found)[0]
        elif found:
            doubtful[i] = found
    return sure, doubtful


def _keys(name: str) -> tuple[str, str]:
    """What the stem of an image's label file may be, spelled loosely: for photo.jpg, photo and photo.jpg."""
    return loose(os.path.splitext(name)[0]), loose(name)


def _other_files(listings: Sequence[str], images: Sequence[str]) -> list[str]:
    """The files below folders that are not among the images and may be some, whatever their suffix says."""
    given = set(images)
    below = (os.path.join(folder, name) for folder in listings for name in files_below(Path(folder)))
    return [
        path
        for path in below
        if path not in given and os.path.splitext(path)[1].lower() not in _COMPANIONS | {""}
    ]


def is_of_another(file: str, root: str, split: str) -> bool:
    """Whether the path of a file in a dataset speaks of another split, and not of this one."""
    spoken = _splits_of(file, root)
    return bool(spoken) and split not in spoken


def _splits_of(file: str, root: str) -> set[str]:
    """The splits of which the folders of a file in a dataset speak."""
    return {found for part in _folders_within(file, root) if (found := split_of(part))}


def _folders_within(file: str, root: str) -> tuple[str, ...]:
    """The folders of a file, from that of the dataset on if it is in it."""
    path = Path(file)
    return (path.relative_to(root) if path.is_relative_to(root) else path).parts[:-1]


def _may_be_predicted(file: str, root: str) -> bool:
    """Whether a label file may be what a network found: by its folders, or as each line ends in a score."""
    if any(part.lower().startswith(_PREDICTED) for part in _folders_within(file, root)):
        return True
    rows = [line.split() for line in read_text(Path(file)).splitlines() if line.strip()]
    return all(len(row) == 6 for row in rows)


def _label_folders_in(folder: Path) -> list[Path]:
    below = subfolders(folder)
    return [below[name] for name in LABEL_FOLDERS if name in below]


def _names_in(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (OSError, ValueError):
        return []
