"""Pascal VOC: an XML file for each image, whose lists of names make the splits; or beside the images."""

import math
import os
import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from ssd.data.annotations import Annotations
from ssd.data.builder import (
    SPLITS,
    Builder,
    finite_numbers,
    number,
    read_bytes,
    read_text,
    split_names,
)
from ssd.data.folders import (
    ANNOTATION_FOLDERS,
    files_of,
    image_folders,
    images_below,
    judge_unread,
    speaks_of,
    split_of,
    subfolders,
)
from ssd.data.judge import NOT_A_BOX, UNKNOWN_CATEGORY
from ssd.data.names import files_below, loose
from ssd.data.outlines import Box, around_points, turned
from ssd.errors import AnnotationError, as_line
from ssd.images import SUFFIXES, is_image_name

BAD_FILE = "unreadable annotation file"
NO_FILE = "missing annotation file"

_ENDINGS = ["", *(end for each in (".jpg", ".png", *sorted(SUFFIXES)) for end in (each, each.upper()))]
"""What an image may be called after the name of its annotation file, the usual first."""
_NO_IMAGES = (".xml", ".txt", ".json", ".csv")

_LIST_FOLDERS = ("splits", "split", "lists", "sets")
"""Folders in which some keep the lists of names, in place of ``ImageSets``."""

_ASKED = 40  # files of which a folder is asked for the images
_TOLD = 5


# --- Which files, which folder ----------------------------------------------------------------------------


class _Split(NamedTuple):
    """Where a split is."""

    folder: Path
    """Of the annotation files."""
    base: Path
    """The folder in which the images are somewhere."""
    files: list[Path]
    """Of the split."""
    every: list[Path]
    """Of all splits, which tell the classes."""
    lost: Sequence[str] = ()
    """Names in the list that no file has."""
    listing: Path | None = None
    """The list of names, if there is one."""


def is_at(path: Path) -> bool:
    """Whether a folder holds XML files where VOC has them, or in folders of their own."""
    return os.path.isdir(path) and bool(_sources(path))


def has_split(path: Path, split: str) -> bool:
    """Whether there are XML files of a split."""
    if not os.path.isdir(path):
        return False
    try:
        found = _split(path, split)
    except AnnotationError:
        return False
    return bool(found.files or found.lost)


def read(
    path: Path,
    split: str,
    images: Path | None,
    class_names: Sequence[str] | None,
    *,
    follow: bool = False,
) -> Annotations:
    """Read a split of a Pascal VOC dataset, or of one that has XML files beside the images.

    Corners count from 1 and are part of the box, as in VOC's own files.
    """
    chosen = _split(path, split)
    parsed = {file: _parse(file) for file in dict.fromkeys([*chosen.every, *chosen.files])}
    sound = {file: each for file, each in parsed.items() if isinstance(each, _File)}
    bad = {file: each for file, each in parsed.items() if isinstance(each, str)}
    names = sorted({each.name for found in sound.values() for each in found.objects} - {""})
    if not names:
        why = [f"{file}: {told}" for file, told in bad.items()][:_TOLD]
        message = f"{chosen.folder}: no objects with a name in {len(parsed)} XML files"
        raise AnnotationError("\n  ".join([message, *why]))

    folder = images or _image_folder(chosen, split)
    builder = Builder(chosen.folder, folder, follow=follow)
    labels = builder.set_classes(names, tuple(range(1, len(names) + 1)), class_names)
    by_name = dict(zip(names, labels, strict=True))
    own = {file: each for file, each in sound.items() if file.is_relative_to(chosen.folder)}
    found = _pair(own, chosen.folder, folder)
    for file in chosen.files:
        if file in bad:
            builder.problem(BAD_FILE, str(file), "", bad[file])
            continue
        entry = sound[file]
        stem = _stem(file, chosen.folder)
        index = builder.add_image(found[file], stem, *entry.size)
        for count, each in enumerate(entry.objects, start=1):
            _add_object(each, f"{file.name}:{count}", index, by_name, builder)
    for name in chosen.lost:
        message = (
            f"is listed in {chosen.listing}, but {chosen.folder} has no XML file of that name; that of an "
            "image without objects holds <annotation></annotation>"
        )
        builder.problem(NO_FILE, name, "", message)
    _note_unclaimed(chosen, folder, found, builder)
    judge_unread(builder)
    return builder.build()


def _note_unclaimed(chosen: _Split, folder: Path, found: Mapping[Path, str], builder: Builder) -> None:
    """Note images that have no annotation file, and annotation files that are in no list."""
    claimed = {_loose_stem(name) for name in [*found.values(), *builder.names]}
    claimed |= {loose(file.stem) for file in chosen.every}
    unclaimed = sorted(name for name in images_below(folder) if _loose_stem(name) not in claimed)
    if unclaimed:
        builder.note(
            f"{len(unclaimed)} images in {folder} have no XML file, such as {unclaimed[0]}, and are not used"
        )
    if chosen.listing is not None:
        called = _Called(chosen.every, chosen.folder)
        listed = {file for each in _name_lists(chosen.listing.parent) for file in called.of_list(each)[0]}
        rest = [file for file in chosen.every if file not in listed]
        if rest:
            builder.note(f"{len(rest)} XML files are in no list, such as {rest[0].name}, and not used")


def _split(root: Path, split: str) -> _Split:
    """Where a split is.

    Raises:
        AnnotationError: there is none, or there are several datasets.
    """
    sources = _sources(root)
    named = {base: folder for base, folder in sources if base != root and split_of(base.name)}
    own = {base: folder for base, folder in sources if base != root and speaks_of(base.name, split)}
    if named or own:  # a folder for each split
        every = [file for folder in (named | own).values() for file in _xml_files(folder)]
        if not own:
            raise AnnotationError(f"{root}: there is no {split} split; it has {_listed(named, root)}")
        base, folder = next(iter(own.items()))
        return _Split(folder, base, _xml_files(folder), every)
    if len(sources) > 1:
        raise AnnotationError(
            f"{root}: holds several datasets; give one of {', '.join(str(base) for base, _ in sources)}"
        )
    if not sources:
        raise AnnotationError(f"{root}: there is no {split} split, as there are no XML files")
    (base, folder) = sources[0]
    every = _xml_files(folder)
    called = _Called(every, folder)
    lists = _lists(base) or _loose_lists(base, folder, called)
    listing = _list_of(lists, split)
    if listing is not None:
        files, lost = called.of_list(listing)
        if files or lost:
            return _Split(folder, base, files, every, lost, listing)
        raise AnnotationError(f"{root}: there is no {split} split: {listing} is empty")
    if lists:
        told = ", ".join(str(each.relative_to(root)) for each in list(lists.values())[:_TOLD])
        raise AnnotationError(f"{root}: there is no {split} split; the lists are {told}")
    within = {name: each for name, each in subfolders(folder).items() if split_of(name)}
    if within and folder != base:  # Annotations/train and so on
        chosen = next((each for name, each in within.items() if speaks_of(name, split)), None)
        if chosen is None:
            raise AnnotationError(
                f"{root}: there is no {split} split; it has {', '.join(within)} in {folder}"
            )
        return _Split(chosen, base, _xml_files(chosen), every)
    if split != "train":
        raise AnnotationError(f"{root}: there is no {split} split; all {len(every)} XML files are train")
    return _Split(folder, base, every, every)


def _listed(folders: Mapping[Path, Path], root: Path) -> str:
    return ", ".join(f"{split_of(base.name)} ({base.relative_to(root)})" for base in folders)


def _sources(root: Path) -> list[tuple[Path, Path]]:
    """The folders of XML files, each after the folder of its dataset: the dataset's own, or one for each."""
    own = _annotation_folder(root)
    if own is not None:
        return [(root, own)]
    below = list(subfolders(root).values())
    found = [(each, folder) for each in below if (folder := _annotation_folder(each)) is not None]
    if found:
        return found
    if files_of(root, ".xml"):
        return [(root, root)]
    beside = [each for each in below if files_of(each, ".xml")]
    if len(beside) == 1 and not split_of(beside[0].name):
        return [(root, beside[0])]  # XML files in one folder, images perhaps in another
    return [(each, each) for each in beside]


def _annotation_folder(base: Path) -> Path | None:
    found = subfolders(base)
    folders = (found[name] for name in ANNOTATION_FOLDERS if name in found)
    return next((each for each in folders if any(_xml_names(each))), None)


def _xml_names(folder: Path) -> Iterator[str]:
    return (name for name in files_below(folder) if name.lower().endswith(".xml"))


def _xml_files(folder: Path) -> list[Path]:
    """Those of a folder, and below it where it holds nothing else; sorted."""
    if folder.name.lower() in ANNOTATION_FOLDERS or not files_of(folder, ".xml"):
        return sorted(folder / name for name in _xml_names(folder))
    return files_of(folder, ".xml")


def _lists(base: Path) -> dict[str, Path]:
    """The lists of names by what they are called, in lower case."""
    sets = subfolders(base).get("imagesets", base / "ImageSets")
    for folder in (subfolders(sets).get("main", sets / "Main"), sets):
        if found := _name_lists(folder):
            return {file.stem.lower(): file for file in found}
    return {}


def _loose_lists(base: Path, folder: Path, called: "_Called") -> dict[str, Path]:
    """Lists in other places that are called as splits and name some of the files.

    By their splits; by what they are called where several may be one split's.
    """
    folders = [base, folder, *(each for name, each in subfolders(base).items() if name in _LIST_FOLDERS)]
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    for file in (file for each in dict.fromkeys(folders) for file in _name_lists(each)):
        stem = file.stem.lower()
        name = split_of(stem) or stem
        if name in (*SPLITS, "trainval") and called.of_list(file)[0]:
            found[name].setdefault(stem, file)
    lists: dict[str, Path] = {}
    for name, files in found.items():
        lists |= files if len(files) > 1 else {name: next(iter(files.values()))}
    return lists


def _name_lists(folder: Path) -> list[Path]:
    """The text files of a folder but for those of one class, as "cat_train", which say who has it."""
    files = files_of(folder, ".txt")
    stems = {file.stem for file in files}
    parts = [file.stem.rpartition("_") for file in files]
    return [file for file, (start, _, end) in zip(files, parts, strict=True) if not start or end not in stems]


def _list_of(lists: Mapping[str, Path], split: str) -> Path | None:
    exact = [lists[name] for name in (*split_names(split), split.lower()) if name in lists]
    if exact:
        return exact[0]
    if split != "train":
        return None
    # CVAT's only list is called default; else an only list is taken, unless it is another split's.
    usual = [lists[name] for name in ("trainval", "default", "all") if name in lists]
    only = [file for name, file in lists.items() if len(lists) == 1 and split_of(name) in (None, "train")]
    return next(iter([*usual, *only]), None)


class _Called:
    """The annotation files of a folder by what lists may call them."""

    def __init__(self, every: Sequence[Path], folder: Path) -> None:
        self._whole: dict[str, Path] = {}
        self._last: dict[str, list[Path]] = defaultdict(list)
        for file in every:
            stem = _stem(file, folder)
            self._whole[stem] = file
            self._last[loose(stem)].append(file)
            if "/" in stem:
                self._last[loose(stem.rsplit("/", 1)[-1])].append(file)

    def of_list(self, listing: Path) -> tuple[list[Path], list[str]]:
        """The files of the names in a list, and those names of which there is none."""
        files, lost = [], []
        for line in filter(None, map(str.strip, read_text(listing).splitlines())):
            readings = list(_readings(line))
            found = self._find(readings)
            if found is None:
                lost.append(readings[-1])
            else:
                files.append(found)
        return files, lost

    def _find(self, readings: Sequence[str]) -> Path | None:
        for each in readings:
            if each in self._whole:
                return self._whole[each]
        for each in readings:
            for part in (each, each.rsplit("/", 1)[-1]):
                if len(fits := self._last.get(loose(part), [])) == 1:
                    return fits[0]
        return None


def _readings(line: str) -> Iterator[str]:
    """The names that a line of a list may mean, without suffix: names may have spaces, and a flag may follow.

    >>> list(_readings("GSHJ (1) -1"))
    ['GSHJ (1) -1', 'GSHJ (1)']
    """
    quoted = re.match(r'"([^"]+)"', line)  # as CVAT writes a name with spaces
    texts = [quoted[1]] if quoted else [line]
    # One flag follows in VOC's lists of a class, three numbers in those of Oxford's pets. Words are split off
    # the end, as the time of a pattern that may begin anywhere grows with the square of a line's length.
    for count, flags in ((1, "-?[01]"), (3, r"\d+")):
        head, *words = line.rsplit(None, count)
        if not quoted and len(words) == count and all(re.fullmatch(flags, word) for word in words):
            texts.append(head)
    # PaddleDetection has an image and an XML file in a line; other tools, an image and its boxes.
    pair = re.search(r"(?<=.)\.\w+\s+", line) if line.lower().endswith(".xml") else None
    boxes = list(takewhile(re.compile(r"-?\d+(\.\d+)?(,-?\d+(\.\d+)?)+").fullmatch, reversed(line.split())))
    boxed = line.rsplit(None, len(boxes))[0] if boxes else ""
    for text in dict.fromkeys([*texts, line[pair.end() :] if pair else boxed or texts[-1]]):
        name = text.replace("\\", "/").removeprefix("./")
        yield name
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in {*SUFFIXES, ".xml"}:
            yield stem


def _stem(file: Path, folder: Path) -> str:
    """What an annotation file is called, from its folder on, with "/" and without suffix."""
    name = file.relative_to(folder) if file.is_relative_to(folder) else Path(file.name)
    return name.with_suffix("").as_posix()


def _image_folder(chosen: _Split, split: str) -> Path:
    """The folder that has most of the images, by the names of their files."""
    titles = [*split_names(split)]
    titles += [chosen.folder.name] if chosen.folder.name.lower() not in ANNOTATION_FOLDERS else []
    own = [*image_folders(chosen.base, titles), chosen.folder]
    by_itself = chosen.folder == chosen.base and chosen.base.name.lower() in ANNOTATION_FOLDERS
    beside = list(image_folders(chosen.base.parent, titles)) if by_itself else []
    files = chosen.files or chosen.every
    stems = [_stem(file, chosen.folder) for file in files[:: len(files) // _ASKED + 1]]

    def count(folder: Path) -> int:
        return sum(any(os.path.isfile(f"{folder / stem}{end}") for end in _ENDINGS) for stem in stems)

    best = max(dict.fromkeys([*own, *beside]), key=count)  # the first of those that have as many
    if count(best):
        return best
    return next((each for each in own if any(map(is_image_name, files_below(each)))), own[0])


def _pair(files: Mapping[Path, "_File"], folder: Path, images: Path) -> dict[Path, str]:
    """The image of each annotation file, relative to its folder; what the file says where none is there.

    It is the one that is called like the file, since copies of annotation files often still name the first
    one's image; else the one that the file names, unless that is another file's.
    """
    whole: dict[str, list[str]] = defaultdict(list)
    last: dict[str, list[str]] = defaultdict(list)
    for name in images_below(images):
        for called in (os.path.splitext(name)[0], name):  # of which some write a.jpg.xml
            whole[loose(called)].append(name)
            last[loose(called).rsplit("/", 1)[-1]].append(name)
    folders = {part for name in whole for part in name.split("/")[-2:-1]}
    pairs, named = {}, {}
    astray = set()
    for file, entry in files.items():
        stem = _stem(file, folder)
        short = os.path.splitext(stem)[0] if is_image_name(stem) else stem
        same = next((whole[loose(each)] for each in (stem, short) if loose(each) in whole), [])
        alike = last.get(loose(short).rsplit("/", 1)[-1], [])
        written = entry.written.replace("\\", "/").rsplit("/", 1)[-1]
        if not same and len(alike) == 1:
            ways = [stem, entry.written] if _loose_stem(written) == _loose_stem(stem) else [stem]
            if any(_is_of_another_folder(f"{images.name}/{alike[0]}", way, folders) for way in ways):
                astray.add(file)
            else:
                same = alike
        # Of a.jpg and a.png, the one that the file names; of a.jpg and A.jpg, that of the file's spelling.
        same = sorted(
            same,
            key=lambda name: (os.path.basename(name) != written, os.path.splitext(name)[0] != stem, name),
        )
        if same:
            pairs[file] = same[0]
        else:
            named[file] = entry.written or f"{stem}.jpg"
    taken = {_loose_stem(name) for name in pairs.values()}
    unread = _unread(images) if named else {}
    for file, written in named.items():
        stem, suffix = _stem(file, folder), os.path.splitext(written)[1]
        own = unread.get(loose(stem.rsplit("/", 1)[-1]))
        if own is None:
            by_stem = _loose_stem(written) in taken or (file in astray and "/" in stem)
            own = f"{stem}{suffix or '.jpg'}" if by_stem else written
        pairs[file] = own
    return pairs


def _is_of_another_folder(image: str, named: str, folders: Collection[str]) -> bool:
    """Whether the folder that stands in a name is one of those, and an image is in another one."""
    written = loose(named).split("/")[-2:-1]
    return bool(written) and written[0] in folders and loose(image).split("/")[-2:-1] != written


def _unread(folder: Path) -> dict[str, str]:
    """Files that may be images of a kind that is not read, by what they are called without suffix."""
    names = (name for name in files_below(folder) if not is_image_name(name))
    return {
        loose(os.path.splitext(os.path.basename(name))[0]): name
        for name in names
        if not name.lower().endswith(_NO_IMAGES)
    }


def _loose_stem(name: str) -> str:
    """The last part of an image's name or path, without suffix, in any spelling."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    return loose(os.path.splitext(last)[0] if is_image_name(last) else last)


# --- What they say ----------------------------------------------------------------------------------------


class _Object(NamedTuple):
    name: str
    box: Box | None
    corners: Sequence[str]
    """Of its bndbox, as written; empty where it has none."""
    difficult: bool


class _File(NamedTuple):
    """What an annotation file says."""

    written: str
    """The name or path of its image."""
    size: tuple[float, float]
    objects: list[_Object]


def _parse(file: Path) -> "_File | str":
    """What an annotation file says, or what is wrong with it."""
    try:
        content = read_bytes(file)
    except AnnotationError as error:
        return str(error).removeprefix(f"{file}: ")
    if not content.strip():
        return "is empty; that of an image without objects holds <annotation></annotation>"
    if b"<!ENTITY" in content.replace(b"\0", b""):
        return "not an XML file as VOC has them: it defines entities, which may expand without end"
    try:
        tree = _tree(content)
    except (ET.ParseError, ValueError, LookupError) as error:  # the latter of unknown encodings
        return f"not an XML file ({error})"
    for each in tree.iter():
        if isinstance(each.tag, str) and each.tag[0] == "{":
            each.tag = each.tag.rsplit("}", 1)[-1]
    if tree.tag.lower() != "annotation":
        cvat = "; CVAT exports Pascal VOC, too" if tree.tag == "annotations" else ""
        return f"its root element is <{as_line(tree.tag, 60)}>, not <annotation>{cvat}"
    written = _text(tree, "filename") or _text(tree, "path")
    width, height = (number(_text(tree, f"size/{side}")) for side in ("width", "height"))
    return _File(written, (width, height), [_object(each) for each in tree.iter("object")])


def _tree(content: bytes) -> ET.Element:
    """The elements of an XML file.

    Raises:
        ET.ParseError, ValueError, LookupError: it is none.
    """
    try:
        return ET.fromstring(content.lstrip())
    except (ET.ParseError, ValueError, LookupError):
        # Encodings that the parser has not, wrong declarations, or lines before one.
        declared = re.search(rb"encoding\s*=\s*[\"']([\w.-]+)", content[:200])
        name = declared[1].decode().lower() if declared else "utf-8"
        for codec in ("gb18030" if name.startswith("gb") else name, "utf-8"):
            try:
                text = content.decode(codec).lstrip("\ufeff \t\r\n")
                if "<!ENTITY" not in text:
                    return ET.fromstring(re.sub(r"^<\?xml.*?\?>", "", text, flags=re.DOTALL).lstrip())
            except (ET.ParseError, ValueError, LookupError):
                continue
        raise


def _text(element: ET.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _object(entry: ET.Element) -> _Object:
    written = [_text(entry, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    found = finite_numbers([number(each) for each in written], 4)
    if found:
        left, top, right, bottom = found
        box: Box | None = turned((left - 1, top - 1, right, bottom), _rotation(entry))
    else:
        box = _around(entry)
    difficult = _text(entry, "difficult").lower() in ("1", "true")
    corners = written if entry.find("bndbox") is not None else ()
    return _Object(_text(entry, "name"), box, corners, difficult)


def _rotation(entry: ET.Element) -> float:
    """By how many degrees CVAT has turned the box of an object."""
    attributes = [*entry.findall("attribute"), *entry.findall("attributes/attribute")]
    values = [number(_text(each, "value")) for each in attributes if _text(each, "name") == "rotation"]
    return next((value for value in values if math.isfinite(value)), 0.0)


def _around(entry: ET.Element) -> Box | None:
    """The box around what some tools write in place of an upright one: a polygon, or a turned rectangle."""
    for shape in entry:
        x, y, width, height, angle = (number(_text(shape, key)) for key in ("cx", "cy", "w", "h", "angle"))
        if finite_numbers([x, y, width, height], 4):
            upright = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            return turned(upright, math.degrees(angle)) if math.isfinite(angle) else upright
        # Not all that is below: objects may be nested in objects.
        near = [shape, *(each for child in shape for each in (child, *child))]
        points = [
            [number(each.text) for each in near if re.fullmatch(rf"{axis}(\d+|_\w+)?", each.tag)]
            for axis in "xy"
        ]
        if len(points[0]) == len(points[1]):
            box = around_points([value for point in zip(*points, strict=True) for value in point])
            if box is not None:
                return box
    return None


def _add_object(
    entry: _Object, tag: str, image: int, labels: Mapping[str, int | None], builder: Builder
) -> None:
    if not entry.name:
        builder.problem(UNKNOWN_CATEGORY, builder.names[image], tag, "the object has no name")
    elif entry.box is None:
        message = "it has no bndbox, nor a polygon of three points or more"
        if entry.corners:
            message = f"its bndbox ({as_line(', '.join(entry.corners), 60)}) is not four finite numbers"
        builder.problem(NOT_A_BOX, builder.names[image], tag, message)
    else:
        builder.add_box(image, tag, entry.box, labels[entry.name], category=entry.name, crowd=entry.difficult)
