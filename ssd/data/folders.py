"""Where tools put what: names of splits in any case, folders in any case, and which folder has the images."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from ssd.data.builder import SPLITS, Builder
from ssd.data.judge import UNREADABLE
from ssd.data.names import files_below, is_folder, path_of, written_parts
from ssd.errors import ImageError
from ssd.images import is_image_name, load_image

ANNOTATION_FOLDERS = (
    *("annotations", "annotation", "annots", "anns", "ann"),
    *("labels", "label", "xml", "xmls", "json"),
)
"""Folders in which annotation files lie, beside the folder of their images."""

IMAGE_FOLDERS = ("images", "jpegimages", "image", "imgs", "img", "data", "photos", "pictures")
"""Folders in which images lie, beside their annotation files."""

_ASKED = 40  # images for which a folder is asked
_MOST_FILES = 10_000  # among which an image is looked for where a file names a folder outside


def split_of(name: str) -> str | None:
    """The split that a name speaks of: "val" of "instances_Validation2017"; None of none or of several.

    >>> split_of("instances_Train"), split_of("valset"), split_of("latest"), split_of("train_val")
    ('train', 'val', None, None)
    """
    words = {word.removesuffix("set") for word in re.findall(r"[^\W\d_]+", name.lower())}
    found = [split for split, names in SPLITS.items() if words & set(names)]
    return found[0] if len(found) == 1 else None


def speaks_of(name: str, split: str) -> bool:
    """Whether a file or folder is called like a split; one that is none of the usual has to be called so."""
    return split_of(name) == split if split in SPLITS else name.lower() == split.lower()


def subfolders(folder: Path) -> dict[str, Path]:
    """The folders in a folder by their names in lower case, sorted, without hidden ones; {} if it is none."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if is_folder(entry))
    except (OSError, ValueError):  # the latter of names that no file can have
        return {}
    # Of "images" and "Images", the first in lower case.
    return {name.lower(): folder / name for name in names if not name.startswith((".", "__"))}


def files_of(folder: Path, suffix: str) -> list[Path]:
    """The files in a folder that have a suffix, in any case, sorted, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.lower().endswith(suffix)]
    except (OSError, ValueError):
        return []
    return [folder / name for name in sorted(names) if name[0] != "." and os.path.isfile(folder / name)]


def dataset_of(file: Path) -> Path:
    """The folder that an annotation file's images are somewhere in: that above ``annotations/``."""
    above = [file.parent, file.parent.parent]
    return next((each.parent for each in above if each.name.lower() in ANNOTATION_FOLDERS), file.parent)


def image_folders(base: Path, titles: Iterable[str]) -> Iterator[Path]:
    """Folders of a dataset that may be those of one annotation file's images, the most telling first.

    Args:
        base: the dataset's folder.
        titles: what a folder of just these images may be called, such as "train2017", in any case.
    """
    top = subfolders(base)
    general = [top[name] for name in IMAGE_FOLDERS if name in top]
    within = [subfolders(folder) for folder in general]
    for title in dict.fromkeys(each.lower() for each in titles):
        yield from (folders[title] for folders in within if title in folders)
        if title in top:
            own = subfolders(top[title])
            yield from (own[name] for name in IMAGE_FOLDERS if name in own)
            yield top[title]
    yield from general
    yield base


def most_telling(folders: Iterable[Path], names: Sequence[str], *, follow: bool = False) -> Path | None:
    """The first of the folders that have the most of some images; None if none has any.

    Args:
        folders: where the images may be.
        names: of all images, as their annotation file has them.
        follow: whether those may lead out.
    """
    some = names[:: len(names) // _ASKED + 1]
    written = ["/".join(written_parts(name)) for name in some]
    last = [name.rsplit("/", 1)[-1] for name in written]
    best, most = None, (0, 0)
    for folder in dict.fromkeys(folders):
        found = (_count(folder, written, follow=follow), _count(folder, last))
        if found > most:
            best, most = folder, found
    return best


def images_below(folder: Path) -> list[str]:
    """The images in a folder and below it, relative to it, with "/"."""
    return [name for name in files_below(folder) if is_image_name(name)]


def images_in(folder: Path) -> list[str]:
    """The names of the images in a folder, without those below it; none if it cannot be listed."""
    try:
        return sorted(name for name in os.listdir(folder) if is_image_name(name))
    except (OSError, ValueError):
        return []


def holds_images(folder: Path) -> bool:
    """Whether there are images among the first files in a folder and below it."""
    return any(is_image_name(name) for name in islice(files_below(folder), _MOST_FILES))


def holds_all(folder: str, *datasets: str) -> bool:
    """Whether a folder is that of the user, the disk's own, or one that a dataset is in: none of images.

    Args:
        folder, datasets: absolute.
    """
    real = Path(os.path.realpath(folder))
    own = map(os.path.realpath, (*datasets, os.path.expanduser("~")))
    if real.parent == real or real.parts[1] in ("proc", "sys"):  # which lead everywhere, without an end
        return True
    return any(Path(each).is_relative_to(real) for each in own)


def judge_unread(builder: Builder) -> None:
    """Judge images whose names end as those of no image that is read, such as HEIC photos.

    Args:
        builder: with the images.
    """
    for name in dict.fromkeys(builder.names):
        path = path_of(builder.root, name, follow=builder.follow)
        if is_image_name(name) or path is None or not os.path.isfile(path):
            continue
        try:
            load_image(path, name=name)
        except ImageError as error:
            builder.problem(UNREADABLE, name, "", str(error).removeprefix(f"{name}: "))


def _count(folder: Path, names: Sequence[str], *, follow: bool = False) -> int:
    paths = (path_of(folder, name, follow=follow) for name in names)
    return sum(path is not None and os.path.isfile(path) for path in paths)
