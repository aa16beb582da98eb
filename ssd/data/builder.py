"""What the readers of all formats share: names of splits, numbers, paths, and putting a record together."""

import codecs
import itertools
import math
import re
import stat
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssd.data.annotations import Annotations, Problem
from ssd.data.judge import (
    MISSING,
    UNKNOWN_CATEGORY,
    judge_areas,
    judge_boxes,
    judge_files,
    judge_repeats,
    lost_images,
    upright_sizes,
)
from ssd.data.names import ImageFolder, path_of
from ssd.errors import AnnotationError, as_line, shown

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
"""The names under which folders keep each split."""

TWICE = "duplicate category"

_LONGEST_NAME = 300  # characters of a class name


def split_names(split: str) -> tuple[str, ...]:
    """The names under which a folder may keep a split; that of any other split is its own."""
    return SPLITS.get(split, (split,))


class Builder:
    """Collects what a reader finds, and has every file and box judged by the same rules.

    Args:
        source: the annotation file, or the folder of them.
        root: the folder of the images.
        follow: whether names of images may lead out of it; see `ssd.data.load`.
    """

    def __init__(self, source: Path, root: Path, *, follow: bool = False) -> None:
        self.source, self.root, self.follow = source, root, follow
        self.names: list[str] = []
        """The file of each image, relative to `root`; what was written where none was found."""
        self._folder = ImageFolder(root, follow=follow)
        self._written: list[str] = []
        self._guessed: list[bool] = []
        self._lost: set[int] = set()
        self._ids: list[int | str] = []
        self._sizes: list[tuple[int, int]] = []
        # Of each box; in arrays, for there may be millions.
        self._boxes, self._areas = array("d"), array("d")
        self._images, self._labels_given, self._crowd = array("q"), array("q"), array("b")
        self._tags: list[str] = []
        self._problems: list[Problem] = []
        self._notes: list[str] = []
        self._class_names: tuple[str, ...] = ()
        self._category_ids: tuple[int, ...] = ()
        self._twins: dict[int, int] = {}

    def problem(self, kind: str, file: str, annotation: str, message: str, *, fatal: bool = True) -> None:
        """Note what is wrong; see `Problem`."""
        self._problems.append(Problem(kind, file, as_line(annotation), as_line(message), fatal))

    def note(self, text: str) -> None:
        """Add a line to `Annotations.notes`."""
        self._notes.append(as_line(text))

    def path(self, image: int) -> Path | None:
        """Where the file of an image should be; None where its name leads out."""
        return path_of(self.root, self.names[image], follow=self.follow)

    def set_classes(
        self, names: Sequence[str], category_ids: tuple[int, ...], wanted: Sequence[str] | None
    ) -> list[int | None]:
        """Settle the classes.

        Args:
            names: of the dataset's categories. Several of one name are one class; where boxes are of more
                than one of them, that is a problem.
            category_ids: of the same.
            wanted: the classes of a model, in its order; None for the dataset's own.

        Returns:
            What `add_box` takes as the label of each of the dataset's categories; None of one that is none of
            the classes, which is a problem of each box that is of it.

        Raises:
            AnnotationError: there are no categories, or their names are no text, so that several may be the
                same.
        """
        if not names:
            raise AnnotationError(f"{self.source}: there are no categories")
        for name in names:
            # What was no UTF-8, or cannot be saved as such, as JSON's escapes may make it.
            if re.search("[\N{REPLACEMENT CHARACTER}\ud800-\udfff]", name):
                raise AnnotationError(
                    f"{self.source}: the class name {shown(name)} was not saved as UTF-8; save the file that "
                    "names the classes as UTF-8, with the names as they should be"
                )
            if len(name) > _LONGEST_NAME:
                raise AnnotationError(
                    f"{self.source}: the class name {shown(name)} has {len(name):,} characters; give it "
                    f"a name of {_LONGEST_NAME} at most"
                )
        ids: dict[str, int] = {}
        for name, category_id in zip(names, category_ids, strict=True):
            ids.setdefault(name, category_id)
        if wanted is None:
            self._class_names, self._category_ids = tuple(ids), tuple(ids.values())
        else:
            taken = set(ids.values())
            free = (i for i in itertools.count(1) if i not in taken)
            self._class_names = tuple(wanted)
            self._category_ids = tuple(ids[name] if name in ids else next(free) for name in wanted)
        label_of: dict[str, int] = {}
        for label, name in enumerate(self._class_names, start=1):
            label_of.setdefault(name, label)
        labels: list[int | None] = []
        again: set[str] = set()
        for name in names:
            own = label_of.get(name)
            if own is not None and name in again:
                # A label of its own, until it is known whether there are boxes of it.
                twin = len(self._class_names) + 1 + len(self._twins)
                self._twins[twin] = own
                own = twin
            again.add(name)
            labels.append(own)
        return labels

    def add_image(self, written: str, image_id: int | str, width: object, height: object) -> int:
        """Add an image.

        Args:
            written: its name or path as it was written, on whatever machine: `ssd.data.names` finds its file
                within `root`. Where there is none, that is a problem of the image.
            image_id: see `Annotations`.
            width, height: of the upright image; anything but numbers where they are not known.

        Returns:
            Its index, which `add_box` takes.
        """
        size = finite_numbers([width, height], 2)
        self._sizes.append((int(size[0]), int(size[1])) if size and min(size) >= 1 else (0, 0))
        found = self._folder.find(written)
        index = len(self.names)
        if found.why:
            self._lose(index, found.name, found.why)
        self.names.append(found.name)
        self._written.append(written)
        self._guessed.append(found.guessed)
        self._ids.append(image_id)
        return index

    def add_box(
        self,
        image: int,
        tag: str,
        box: tuple[float, ...],
        label: int | None,
        *,
        category: str = "",
        crowd: bool = False,
        area: float | None = None,
    ) -> None:
        """Add a box.

        Args:
            image: the index of its image.
            tag: what messages call it.
            box: xyxy in pixels of the upright image.
            label: of its category, from `set_classes`; None becomes a problem of this box.
            category: the name of its category, for that problem.
            crowd, area: see `Annotations`; None where the file gives no area.
        """
        if label is None:
            what = f"its category {shown(category)}" if category else "its category"
            some = ", ".join(self._class_names[:10]) + (" ..." if len(self._class_names) > 10 else "")
            self.problem(UNKNOWN_CATEGORY, self.names[image], tag, f"{what} is none of the classes {some}")
        else:
            self._boxes.extend(box)
            self._images.append(image)
            self._labels_given.append(label)
            self._crowd.append(crowd)
            self._areas.append(math.nan if area is None else area)
            self._tags.append(tag)

    def build(self, labels_hint: str = "") -> Annotations:
        """The record of all that was added, with what is wrong with it."""
        self._tell_guesses()
        self._problems += judge_files(
            self.root, [name for i, name in enumerate(self.names) if i not in self._lost]
        )
        self._read_sizes()
        image = np.array(self._images, np.int64)
        order = np.argsort(image, kind="stable")
        boxes = np.array(self._boxes, np.float64).reshape(-1, 4)[order]
        image = image[order]
        tags = [self._tags[i] for i in order]
        labels = np.array(self._labels(), np.int64)[order]
        sizes = np.array(self._sizes, np.int64).reshape(-1, 2)
        usable, problems = judge_boxes(boxes, labels, image, tags, self.names, sizes)
        problems += judge_repeats(self.names, image, labels, boxes)
        extent = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        given = np.array(self._areas, np.float64)[order]
        areas_given, told = judge_areas(given, boxes, usable)
        if told:
            problems.append(Problem("impossible area", str(self.source), "", told, fatal=False))
        counts = np.bincount(image, minlength=len(self.names))
        return Annotations(
            root=self.root,
            source=self.source,
            class_names=self._class_names,
            category_ids=self._category_ids,
            file_names=np.array(self.names, np.str_),
            image_ids=tuple(self._ids),
            sizes=sizes,
            starts=np.concatenate([[0], counts.cumsum()]).astype(np.int64),
            boxes=boxes,
            labels=labels,
            crowd=np.array(self._crowd, np.bool_)[order],
            areas=np.where(areas_given, given, extent),
            areas_given=areas_given,
            usable=usable,
            problems=(*self._problems, *problems),
            notes=tuple(self._notes),
            labels_hint=labels_hint,
            follow=self.follow,
        )

    def _lose(self, image: int, name: str, why: str) -> None:
        """Note that an image has no file."""
        self._lost.add(image)
        self.problem(MISSING, name, "", why)

    def _tell_guesses(self) -> None:
        """Tell which images are called otherwise; a file that two names may stand for is neither's."""
        entries: dict[str, list[int]] = defaultdict(list)
        for i, name in enumerate(self.names):
            if i not in self._lost:
                entries[name].append(i)
        for name, same in entries.items():
            guessed = [i for i in same if self._guessed[i]]
            others = {self._written[i] for i in same}
            if len(others) < 2 or not guessed:
                continue
            two = sorted(others)[:2]
            for i in guessed:
                other = next(each for each in two if each != self._written[i])
                self.names[i] = as_line(self._written[i], _LONGEST_NAME)
                self._lose(
                    i,
                    self.names[i],
                    f"there is no such file in {self.root}; {name}, which its last parts fit, may be that of "
                    f"{shown(other)}. Name the images so that they can be told apart",
                )
        sure = [i for i, guessed in enumerate(self._guessed) if guessed and i not in self._lost]
        if sure:
            self.note(
                f"{len(sure)} of {len(self.names)} images were found by the last parts of their names, or by "
                f"another spelling, such as {self.names[sure[0]]} for {as_line(self._written[sure[0]], 200)}"
            )

    def _labels(self) -> list[int]:
        """The label of each box; categories of one name become one class here."""
        used = set(self._labels_given)
        categories = Counter(self._twins.get(label, label) for label in used)
        for label in sorted(label for label, count in categories.items() if count > 1):
            self.problem(
                TWICE,
                str(self.source),
                "",
                f"{categories[label]} categories with boxes are called "
                f"{shown(self._class_names[label - 1])}; give each a name of its own; --lenient "
                "(lenient=True) takes them for one class",
            )
        return [self._twins.get(label, label) for label in self._labels_given]

    def _read_sizes(self) -> None:
        """Read sizes that the files do not give, without which nobody knows which boxes lie outside."""
        lost = lost_images(self._problems)
        unknown = [i for i, size in enumerate(self._sizes) if size == (0, 0) and self.names[i] not in lost]
        found = [(i, path) for i in unknown if (path := self.path(i)) is not None]
        for (i, _), size in zip(found, upright_sizes([path for _, path in found]), strict=True):
            self._sizes[i] = size or (0, 0)


def finite_numbers(values: object, count: int) -> tuple[float, ...] | None:
    """The values as finite floats, or None if they are not `count` numbers."""
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        return None
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return None
    # Far beyond any image, and float32 squares it; JSON's integers have no limit at all.
    return tuple(map(float, values)) if all(abs(value) < 1e9 for value in values) else None


def number(text: str | None) -> float:
    """A number that is written as text; NaN if it is none."""
    try:
        # An underscore between digits is Python's own way to write them.
        return float(text) if text and "_" not in text else float("nan")
    except ValueError:
        return float("nan")


def read_text(path: Path, most: int | None = None) -> str:
    """The text of a file; see `decode`.

    Args:
        path: the file.
        most: the bytes that it may have, where there is a limit.

    Raises:
        AnnotationError: see `read_bytes`; or it has more.
    """
    content = read_bytes(path, -1 if most is None else most + 1)
    if most is not None and len(content) > most:
        raise AnnotationError(f"{path}: has more than {most:,} bytes")
    try:
        return decode(content)
    except MemoryError:
        raise AnnotationError(f"{path}: cannot be read (it is too large for the memory)") from None


def read_bytes(path: Path, most: int = -1) -> bytes:
    """The content of a file of a dataset, or the first `most` bytes of it.

    Raises:
        AnnotationError: it cannot be read, or is no file: a folder, a pipe or a device.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # of a folder, the system says what it is
            with path.open("rb") as file:
                return file.read(most)
        why = "it is no regular file"
    except (OSError, ValueError) as error:  # the latter of names that no file can have
        why = getattr(error, "strerror", None) or str(error)
    except MemoryError:
        why = "it is too large for the memory"
    raise AnnotationError(f"{path}: cannot be read ({why})")


_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins as the next does
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decode(content: bytes) -> str:
    """Bytes as text: UTF-8, or what a byte-order mark says; bytes that are none become question marks.

    >>> decode("cat".encode("utf-16")), decode(b"\\xef\\xbb\\xbfcat"), decode(b"cat")
    ('cat', 'cat', 'cat')
    """
    mark, encoding = next((each for each in _MARKS if content.startswith(each[0])), (b"", "utf-8"))
    text = content[len(mark) :].decode(encoding, "replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")
