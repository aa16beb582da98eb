"""What tells the classes and splits of a YOLO dataset: a YAML file, darknet's obj.data, or the folders."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import yaml

from ssd.data.builder import SPLITS, decode, read_bytes, read_text, split_names
from ssd.data.folders import (
    IMAGE_FOLDERS,
    files_of,
    holds_all,
    holds_images,
    speaks_of,
    split_of,
    subfolders,
)
from ssd.data.names import named_parts, within, written_parts
from ssd.data.pairs import LABEL_FOLDERS, in_any_case
from ssd.errors import AnnotationError, as_line, shown
from ssd.images import is_image_name

_USUAL = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_NAMES_FILES = ("classes.txt", "obj.names", "_darknet.labels", "labels.txt", "class_names.txt", "names.txt")
_NOTHING = ("", "~", "null", "none", "[]")  # how YAML says so, which is read as text
_MOST_TOLD = 10
_BEGINNING = 1 << 16  # bytes of a list of images, by which it is known
_LONGEST = 1000  # characters of a folder's path, as far as it is looked for
_MOST_OF_SETTINGS = 1 << 22  # bytes of a YAML file: 100,000 names have 2 MB
MOST_PARTS = 50  # of a path, beyond which nobody looks


class Settings(NamedTuple):
    """What is known of a dataset before its images and labels are looked for."""

    file: Path
    """That names the classes."""
    root: Path
    """The folder of the dataset."""
    names: list[str]
    splits: dict[str, list[str]]
    """By the name of a split in lower case: folders of its images, or files that list them, as written. Empty
    where only folders tell."""
    base: str = ""
    """Where those start from, as written."""
    has_keypoints: bool = False
    class_count: int | None = None
    """What the file says of the number of classes."""
    others: tuple[Path, ...] = ()
    """More files that could have been read in place of this one."""

    @property
    def starts(self) -> list[Path]:
        """The folders from which paths may be meant."""
        base = self.root / self.base
        return [base, self.root] if self.base and os.path.isdir(base) else [self.root]

    @property
    def own(self) -> Path:
        """The absolute path of the dataset's folder, in which files need not be images."""
        return Path(os.path.abspath(self.root))


def find_settings(path: Path) -> Settings | None:
    """The settings of a dataset, by its folder or the file itself; None where nothing names classes.

    Raises:
        AnnotationError: a file that should name them does not, or several do.
    """
    if os.path.isfile(path):
        suffix, name = path.suffix.lower(), path.name.lower()
        if suffix in (".yaml", ".yml"):
            return _of_yaml(path)
        if suffix == ".data":
            return _of_darknet(path)
        if suffix == ".names" or name in _NAMES_FILES:
            within = path.parent.name.lower() in (*LABEL_FOLDERS, *IMAGE_FOLDERS)
            return Settings(path, path.parent.parent if within else path.parent, _read_names(path), {})
        return None
    files = [*files_of(path, ".yaml"), *files_of(path, ".yml")]
    usual = [file for name in _USUAL for file in files if file.name.lower() == name]
    others = [file for file in files if file not in usual and _has_classes_and_splits(file)]
    if usual:
        settings = _of_yaml(usual[0])
        more = [file for file in usual[1:] if _has_classes_and_splits(file)]
        return settings._replace(others=(*more, *others))
    if len(others) > 1:
        raise AnnotationError(f"{path}: holds several YOLO datasets' files; give one of {_told(others)}")
    if others:
        return _of_yaml(others[0])
    darknet = files_of(path, ".data")
    if len(darknet) == 1:
        return _of_darknet(darknet[0])
    file = _names_file(path)
    return None if file is None else Settings(file, path, _read_names(file), {})


def find_listings(settings: Settings, split: str, images: Path | None = None) -> list[Path]:
    """The folders of a split's images, and text files that list them.

    Args:
        settings: of the dataset.
        split: "train", "val", "test", or one of another name.
        images: the folder of the images, where it is given.

    Raises:
        AnnotationError: there is no such split, or one of them is not there.
    """
    if not settings.splits:
        found = _by_layout(images, split) if images else []
        found = found or _by_layout(settings.root, split)
        if not found:
            raise AnnotationError(f"{settings.root}: there is no {split} split; {_there(settings.root)}")
        return found
    entries = entries_of(settings, split)
    if not entries:
        has = _told([key for key in settings.splits if split_of(key)])
        raise AnnotationError(
            f"{settings.file}: there is no {split} split; " + (f"it has {has}" if has else "it has none")
        )
    return list(dict.fromkeys(_located(entry, settings, split, images) for entry in entries))


def entries_of(settings: Settings, split: str) -> list[str]:
    """Where a split is, as written; nothing where it is not told."""
    return next((settings.splits[key] for key in split_names(split) if key in settings.splits), [])


def _located(entry: str, settings: Settings, split: str, images: Path | None) -> Path:
    entry = entry[:_LONGEST]
    parts = written_parts(entry)
    is_list = entry.lower().endswith(".txt")
    for start in [] if images and not is_list else settings.starts:
        for written in (entry, "/".join(parts)):
            if os.path.exists(start / written):
                return _require_images(Path(os.path.abspath(start / written)), entry, settings)
    # Paths of another machine: as many of their last parts as are there, down to those that tell the split.
    least = next((len(parts) - i for i, part in enumerate(parts) if speaks_of(part, split)), 1)
    starts = settings.starts if images is None or is_list else [images]
    for way in _spellings(parts, split):
        whole = [part for part in named_parts([*written_parts(settings.base), *way]) if part][-MOST_PARTS:]
        for count in range(len(whole), least - 1, -1):
            for start in starts:
                if found := in_any_case(start, whole[-count:] if count else []):
                    return _require_images(Path(os.path.abspath(found)), entry, settings)
    if images is not None and not is_list:
        return Path(os.path.abspath(images))
    what = f"there is no folder {as_line(entry, 200)}"
    raise AnnotationError(f"{settings.file}: {what}; {_there(settings.root)}")


def _require_images(path: Path, entry: str, settings: Settings) -> Path:
    """Require of a split outside of the dataset's folder that it is a folder of images, or a list of them."""
    if path.is_relative_to(settings.own):
        return path
    if os.path.isdir(path):
        is_one = not holds_all(str(path), str(settings.own)) and holds_images(path)
    else:
        is_one = path.suffix.lower() == ".txt" and _lists_images(path, most=True)
    if not is_one:
        raise AnnotationError(
            f"{settings.file}: {as_line(entry, 200)} is outside of {settings.root}, and neither a folder of "
            "images nor a list of them; give the folder with the images with --images (images=...)"
        )
    return path


def _spellings(parts: list[str], split: str) -> Iterator[list[str]]:
    """The parts of a split's path, first as written: Roboflow may write val/images where valid/images is.

    >>> list(_spellings(["val", "images"], "val"))
    [['val', 'images'], ['valid', 'images'], ['validation', 'images']]
    """
    yield parts
    names = split_names(split)
    for i, part in enumerate(parts):
        stem, suffix = os.path.splitext(part)
        if stem.lower() in names:
            for name in names:
                if name != stem.lower():
                    yield [*parts[:i], name + suffix, *parts[i + 1 :]]


# --- Files that tell it -----------------------------------------------------------------------------------


class _AsWritten(getattr(yaml, "CBaseLoader", yaml.BaseLoader)):  # type: ignore[misc]
    """Scalars stay text as it stands in the file; and what is there twice is not lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = next((key for key, count in keys.items() if count > 1), None)
        if twice is not None:
            told = f"{shown(twice)} is there twice"
            raise yaml.constructor.ConstructorError(None, None, told, node.start_mark)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


def _read_yaml(file: Path) -> dict[str, Any]:
    """The settings in a file, by their keys in lower case."""
    return _parsed_yaml(file, read_text(file, _MOST_OF_SETTINGS))


@lru_cache(maxsize=2)  # it is asked for each split, by each format
def _parsed_yaml(file: Path, text: str) -> dict[str, Any]:
    try:
        # The loader makes text, lists and dicts only, each of them once, however many aliases it has: whoever
        # makes text of them has to mind that.
        config = yaml.load(text, Loader=_AsWritten)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        told = " ".join(str(error).split())
        raise AnnotationError(f"{file}: not a YAML file ({told})") from error
    if not isinstance(config, dict):
        raise AnnotationError(f"{file}: holds no settings")
    lower = [key.lower() for key in config]
    if twice := next((key for key, count in Counter(lower).items() if count > 1), None):
        raise AnnotationError(f"{file}: {shown(twice)} is there twice, in capital and in small letters")
    return dict(zip(lower, config.values(), strict=True))


def _has_classes_and_splits(file: Path) -> bool:
    try:
        config = _read_yaml(file)
    except AnnotationError:
        return False
    names = {name for split in SPLITS for name in split_names(split)}
    return isinstance(config.get("names"), list | dict) and any(key in names for key in config)


def _of_yaml(file: Path) -> Settings:
    config = _read_yaml(file)
    splits: dict[str, list[str]] = {}
    made: dict[int, list[str]] = {}  # by identity: aliases are one value each, however often they are written
    for key, value in config.items():
        if key in ("names", "path", "nc", "download"):
            continue
        if id(value) not in made:
            some = {id(each): each for each in (value if isinstance(value, list) else [value])}.values()
            entries = [each for each in some if isinstance(each, str) and not _is_nothing(each)]
            made[id(value)] = list(dict.fromkeys(entries))
        if made[id(value)]:
            splits[key] = made[id(value)]
    base = config.get("path")
    return Settings(
        file=file,
        root=file.parent,
        names=_names_of(file, config),
        splits=splits if any(split_of(key) for key in splits) else {},
        base=base if isinstance(base, str) and not _is_nothing(base) else "",
        has_keypoints="kpt_shape" in config,
        class_count=int(count) if _is_number(count := config.get("nc")) else None,
    )


def _is_nothing(text: str) -> bool:
    return len(text) < 8 and text.lower() in _NOTHING


def _is_number(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value) is not None


def _names_of(file: Path, config: dict[str, Any]) -> list[str]:
    """The names of the classes, as they stand in the file, in the order of their numbers."""
    names = config.get("names")
    if isinstance(names, str) and not _is_nothing(names):
        other = in_any_case(file.parent, within(written_parts(names)) or [""])
        if other is None or not os.path.isfile(other):
            raise AnnotationError(
                f'{file}: "names" has to list the classes, such as [cat, dog]; it is {shown(names)}'
            )
        return _read_names(other)
    if not isinstance(names, list | dict):
        if other := _names_file(file.parent):
            return _read_names(other)
        nc = f" (only nc: {as_line(config['nc'], 60)})" if isinstance(config.get("nc"), str) else ""
        raise AnnotationError(
            f'{file}: has no "names"{nc}; add the names of the classes in the order of their numbers, such '
            "as names: [cat, dog], or put them into classes.txt, one a line"
        )
    numbered = names if isinstance(names, dict) else {str(i): name for i, name in enumerate(names)}
    if not all(isinstance(name, str) for name in numbered.values()):
        raise AnnotationError(f'{file}: "names" has to list one text for each class')
    by_number = {int(key): name for key, name in numbered.items() if _is_number(key)}
    if sorted(by_number) != list(range(len(numbered))):
        keys = shown([int(key) if _is_number(key) else key for key in islice(numbered, _MOST_TOLD)])
        raise AnnotationError(f'{file}: "names" has to number the classes from 0 on; it has {keys}')
    return [by_number[i] for i in range(len(by_number))]


def _of_darknet(file: Path) -> Settings:
    """What darknet's .data file says: lines such as "train = data/train.txt"."""
    pairs = [line.partition("=") for line in read_text(file).splitlines() if "=" in line]
    config = {key.strip().lower(): value.strip() for key, _, value in pairs}
    splits = {key: [value] for key, value in config.items() if split_of(key) and value}
    settings = Settings(file, file.parent, [], splits)
    written = [part for part in named_parts(written_parts(config.get("names", ""))) if part]
    for count in range(min(len(written), MOST_PARTS), 0, -1):
        found = in_any_case(file.parent, written[-count:])
        if found and os.path.isfile(found):
            return settings._replace(names=_read_names(found))
    other = _names_file(file.parent)
    if other is None:
        what = 'has no "names"'
        if written:
            what = f"the file {as_line(config['names'], 200)} with its names is not there"
        raise AnnotationError(f"{file}: {what}; put it beside, with the name of a class in each line")
    return settings._replace(names=_read_names(other))


def _names_file(root: Path) -> Path | None:
    """The text file that names the classes, in a dataset's folder or in one of its labels or images."""
    found: list[Path] = []
    for folder in _likely_folders(root):
        named = [file for file in files_of(folder, ".names") if folder == root]
        for file in [folder / name for name in _NAMES_FILES] + named:
            if (there := in_any_case(folder, [file.name])) and os.path.isfile(there):
                found.append(there)
                break
    contents = [_read_names(file) for file in found]
    for file, names in zip(found, contents, strict=True):
        longest = max(contents, key=len)
        if names != longest[: len(names)]:
            other = found[contents.index(longest)]
            raise AnnotationError(
                f"{file} numbers the classes otherwise than {other}: {_told(names)} and "
                f"{_told(longest)}; write a data.yaml for each part, or number them alike"
            )
    return found[contents.index(max(contents, key=len))] if found else None


def _likely_folders(root: Path) -> Iterator[Path]:
    """A dataset's folder and those of its images and labels, two deep."""
    yield root
    for name, folder in subfolders(root).items():
        if name in (*LABEL_FOLDERS, *IMAGE_FOLDERS) or split_of(name):
            yield folder
            for deeper, below in subfolders(folder).items():
                if deeper in (*LABEL_FOLDERS, *IMAGE_FOLDERS) or split_of(deeper):
                    yield below


def _read_names(file: Path) -> list[str]:
    """The names in a text file, one a line."""
    return [line.strip() for line in read_text(file).strip().splitlines()]


# --- Folders that tell it ---------------------------------------------------------------------------------


def _by_layout(root: Path, split: str) -> list[Path]:
    """The folders of a split's images, or files that list them, by their names alone."""
    top = subfolders(root)
    within = [folder for name, folder in top.items() if name in IMAGE_FOLDERS]
    # images/train, train/images, train; and of CVAT, obj_train_data.
    groups = [top, *map(subfolders, within)]
    for group in reversed(groups):
        for name, folder in group.items():
            if speaks_of(name, split) and name not in LABEL_FOLDERS:
                own = subfolders(folder)
                images = next((own[each] for each in IMAGE_FOLDERS if each in own), folder)
                return [Path(os.path.abspath(images))]
    lists = [file for folder in (root, *within) for file in files_of(folder, ".txt")]
    lists = [file for file in lists if split_of(file.stem) and _lists_images(file)]
    for file in lists:
        if speaks_of(file.stem, split):
            return [Path(os.path.abspath(file))]
    if split != "train" or lists or any(split_of(name) for group in groups for name in group):
        return []
    images = next((top[name] for name in IMAGE_FOLDERS if name in top), root)
    return [Path(os.path.abspath(images))]


def _lists_images(file: Path, *, most: bool = False) -> bool:
    """Whether the first line of a file, or most of those of its beginning, are names of images."""
    try:
        begin = read_bytes(file, _BEGINNING)
    except AnnotationError:
        return False
    lines = decode(begin).splitlines()[: -1 if len(begin) == _BEGINNING else None]
    named = [is_image_name(written_parts(line)[-1]) for line in lines if line.strip()]
    return bool(named) and (2 * sum(named) > len(named) if most else named[0])


def _there(root: Path) -> str:
    """What a folder holds, for messages."""
    names = [f"{folder.name}/" for folder in subfolders(root).values()]
    names += [file.name for suffix in (".yaml", ".yml", ".txt", ".data") for file in files_of(root, suffix)]
    return f"{root} holds {_told(names)}" if names else f"{root} holds no folders"


def _told(names: Sequence[object]) -> str:
    more = ", ..." if len(names) > _MOST_TOLD else ""
    return as_line(", ".join(map(str, names[:_MOST_TOLD])), 300) + more
