"""The data formats that can be read: one row each. `load` and `find_split` only walk the table.

Another format is one file, with the functions of a row, and one row.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ssd.data import coco, voc, yolo
from ssd.data.annotations import Annotations
from ssd.data.builder import SPLITS
from ssd.data.folders import ANNOTATION_FOLDERS, IMAGE_FOLDERS, split_of, subfolders
from ssd.errors import AnnotationError, as_line
from ssd.signatures import HEAD, identify

__all__ = ["FORMATS", "SPLITS", "Format", "find_split", "load"]


@dataclass(frozen=True)
class Format:
    """How to read datasets of one kind; `path` is what the user gave, a folder or a file that exists."""

    titles: tuple[str, ...]
    """What messages call it, with a file by which it is known: "YOLO (data.yaml)"."""
    file: str | None
    """The kind of file that may stand for the folder, as in messages: "a YOLO data.yaml"; None for none."""
    is_at: Callable[[Path], bool]
    """``is_at(path)``: whether a path looks like one, so that `read` may tell what is wrong with it."""
    has_split: Callable[[Path, str], bool]
    """``has_split(path, split)``: whether it is one that has a split, as far as its files show."""
    read: Callable[..., Annotations]
    """``read(path, split, images, class_names)``; see `load`. Raises an AnnotationError where it cannot.

    ``follow=True`` comes with these where the user gives it."""


_MOST_TOLD = 10  # folders that a message lists

FORMATS = {
    "coco": Format(
        titles=("COCO (train.json + train/)", "Roboflow COCO"),
        file="a COCO .json file",
        is_at=coco.is_at,
        has_split=coco.has_split,
        read=coco.read,
    ),
    "yolo": Format(
        titles=("YOLO (data.yaml)",),
        file="a YOLO data.yaml",
        is_at=yolo.is_at,
        has_split=yolo.has_split,
        read=yolo.read,
    ),
    "voc": Format(
        titles=("VOC (Annotations/*.xml)",),
        file=None,
        is_at=voc.is_at,
        has_split=voc.has_split,
        read=voc.read,
    ),
}
"""By name, in the order in which they are tried."""


def load(
    path: str | os.PathLike[str],
    split: str = "train",
    *,
    images: str | os.PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
    follow: bool = False,
) -> Annotations:
    """Read the annotations of one split of a dataset of any format in `FORMATS`.

    Folders as the formats' own and as CVAT, Label Studio, Roboflow, FiftyOne, Supervisely, LabelImg,
    labelme2coco and makesense write them, such as: COCO (``train.json`` with ``train/``;
    ``annotations/instances_train2017.json`` with ``train2017/`` or ``images/train2017/``; Roboflow's
    ``train/_annotations.coco.json``; Label Studio's ``result.json`` with ``images/``), YOLO (``data.yaml``),
    VOC (``Annotations/*.xml``, ``JPEGImages/``, ``ImageSets/Main/train.txt`` or ``train.txt``; XML files
    beside the images). Names of splits and folders count in any case. What is of no split is "train", where
    nothing else is.

    Args:
        path: the dataset's folder, its ``data.yaml``, or one COCO JSON file.
        split: "train", "val" or "test"; of a single JSON file it is not asked.
        images: the folder of the images, where it cannot be found by the layout.
        class_names: the classes of a model, in its order; by default the dataset's own, by category id.
        follow: whether the dataset is trusted to name images anywhere on the disk. By default a name in a
            list or an annotation file only means a file in the folders that are given here, or that a
            ``data.yaml`` has as those of a split; links within them are followed in any case.

    Raises:
        AnnotationError: no dataset of a known layout, no such split, or files that cannot be read. What is
            wrong with single annotations is listed in `Annotations.problems` instead.
        FileNotFoundError: there is no such path.
    """
    root = Path(path)
    if not os.path.exists(root):
        raise FileNotFoundError(f"no dataset at {as_line(str(root))}")
    folder = None if images is None else Path(images)
    trust = {"follow": True} if follow else {}  # which formats of others need not know
    for data_format in FORMATS.values():
        if data_format.has_split(root, split):
            return data_format.read(root, split, folder, class_names, **trust)
    for data_format in FORMATS.values():
        if data_format.is_at(root):
            with _other_folder_told(root):
                return data_format.read(root, split, folder, class_names, **trust)
    if os.path.isfile(root):
        files = [each.file for each in FORMATS.values() if each.file]
        with root.open("rb") as opened:
            kind = identify(opened.read(HEAD))
        told = f"; this is {kind.name}" if kind else ""
        raise AnnotationError(f"{root}: a dataset is {_either(['a folder', *files])}{told}")
    titles = [title for each in FORMATS.values() for title in each.titles]
    raise AnnotationError(f"{root}: no dataset of a known layout: {_either(titles)}; {_told(root)}")


def find_split(path: str | os.PathLike[str], split: str) -> bool:
    """Whether a dataset has a split, as far as its files show; a single COCO file has only "train"."""
    return any(data_format.has_split(Path(path), split) for data_format in FORMATS.values())


@contextmanager
def _other_folder_told(root: Path) -> Iterator[None]:
    """Let a format tell what is wrong, with the folder that may be meant where there is no split at all."""
    try:
        yield
    except AnnotationError as error:
        other = None if os.path.isfile(root) or _is_dataset(root) else _within(root)
        if other is None or str(other) in str(error):
            raise
        raise AnnotationError(f"{error}; or give {other}, which is a dataset") from error


def _other_folder(root: Path) -> Path | None:
    """The folder that is a dataset, if it is one in this one, or that which this is a part of."""
    here = root.resolve()
    above = [here.parent, here.parent.parent] if _is_part(here) else []
    # "test_photos" may lie beside a dataset and be none of its own.
    above += [here.parent] if split_of(here.name) and here.name.isalnum() else []
    return next(filter(_is_dataset, above), None) or _within(root)


def _within(root: Path) -> Path | None:
    """The first folder in one, or in those in it, that is a dataset."""
    folders = _subfolders(root)
    deeper = [each for folder in folders for each in _subfolders(folder)]
    return next(filter(_is_dataset, [*folders, *deeper]), None)


def _subfolders(folder: Path) -> list[Path]:
    """Those that may be datasets: not a dataset's folder of annotations, which by itself looks like one."""
    found = [each for name, each in subfolders(folder).items() if name not in ANNOTATION_FOLDERS]
    return found[:_MOST_TOLD]


def _is_part(folder: Path) -> bool:
    """Whether a folder is called as one for images or annotations, or as a split in one."""
    parts = {*IMAGE_FOLDERS, *ANNOTATION_FOLDERS}
    names = (folder.name.lower(), folder.parent.name.lower())
    return names[0] in parts or (split_of(names[0]) is not None and names[1] in parts)


def _told(root: Path) -> str:
    """What a folder holds that is no dataset, and which folder in it is one."""
    try:
        entries = sorted(each for each in root.iterdir() if not each.name.startswith("."))
    except OSError as error:
        return f"it cannot be listed ({error.strerror})"
    folders = [each for each in entries if os.path.isdir(each)]
    suffixes = Counter(each.suffix.lower() or "without suffix" for each in entries if not os.path.isdir(each))
    files = [f"{count} {suffix}" for suffix, count in sorted(suffixes.items())]
    names = [each.name for each in folders[:_MOST_TOLD]] + (["..."] if len(folders) > _MOST_TOLD else [])
    if not entries:
        return "it is empty"
    told = f"it holds {', '.join([*files, *(f'{name}/' for name in names)])}"
    if other := _other_folder(root):
        return f"{told}; {other} is one: give that folder"
    file = next((each for each in entries if each.suffix.lower() == ".json" and os.path.isfile(each)), None)
    apart = coco.told_apart(file) if file else ""
    return f"{told}; {file.name} {apart}" if file and apart else told


def _is_dataset(folder: Path) -> bool:
    try:
        return any(find_split(folder, split) for split in SPLITS)
    except AnnotationError:
        return False


def _either(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]])
