"""Labelled images: COCO, YOLO and VOC folders, recognised by their layout, as one dataset.

Boxes are xyxy in pixels of the upright image; labels count from 1, and 0 is left to the background.
"""

import json
import math
import os
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import yaml
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ssd.images import SUFFIXES, is_image_name, load_image, upright_size

SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
"""The names under which folders keep each split."""

LOST = ("missing image", "unreadable image", "wrong size")
"""Problems that leave an image out, where that is allowed."""

MISSHAPEN = ("inverted box", "zero area", "box outside")
"""Problems of boxes that are not trained on, but count in evaluation, as in the official code."""

Format = Literal["coco", "yolo", "voc"]


class AnnotationError(ValueError):
    """Annotations cannot be used; the message names the file and the annotations, and says why."""


@dataclass(frozen=True)
class Problem:
    """Something in a dataset that is wrong, or that one may want to know."""

    kind: str
    """A short name, the same for all of its kind, such as "zero area"."""
    file: str
    """The image, or the annotation file."""
    annotation: str
    """The annotation's id, or its place in the file; empty where the problem is the file's."""
    message: str
    fatal: bool = True
    """Whether training refuses it."""

    def __str__(self) -> str:
        place = f"{self.file}, annotation {self.annotation}" if self.annotation else self.file
        return f"{place}: {self.message}"


@dataclass(frozen=True)
class Annotations:
    """What the files of one split say, in flat arrays; image i has the boxes from ``starts[i]`` on."""

    root: Path
    """The folder of the images."""
    source: Path
    """The annotation file, or the folder of them."""
    format: Format
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    """The file's own id of each class, or numbers from 1 where those are no integers."""
    file_names: npt.NDArray[np.str_]
    """``[N]``, relative to `root`."""
    image_ids: tuple[int | str, ...]
    sizes: npt.NDArray[np.int64]
    """Width and height ``[N, 2]``; 0 where the file does not say."""
    starts: npt.NDArray[np.int64]
    """``[N + 1]``."""
    boxes: npt.NDArray[np.float64]
    """xyxy in pixels as the file says, not clipped, ``[T, 4]``."""
    labels: npt.NDArray[np.int64]
    """``[T]``, counted from 1."""
    crowd: npt.NDArray[np.bool_]
    """``[T]``: COCO's iscrowd, VOC's difficult. Not trained on, and ignored by evaluation."""
    areas: npt.NDArray[np.float64]
    """``[T]``: COCO's area, by which sizes are told apart; the box's where the file has none."""
    usable: npt.NDArray[np.bool_]
    """``[T]``: whether a box can be trained on; `problems` says why not."""
    problems: tuple[Problem, ...] = field(repr=False)
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Where bad ones are allowed: how many images and boxes are not used, by what is wrong with them."""

    def __len__(self) -> int:
        return len(self.file_names)

    def is_without_images(self) -> bool:
        """Whether no image is where it should be."""
        return sum(problem.kind == "missing image" for problem in self.problems) >= len(self)

    def path(self, i: int) -> Path:
        """The file of an image.

        Raises:
            AnnotationError: a link in its name leads out of the image folder.
        """
        path = self.root / str(self.file_names[i])
        # YOLO's and VOC's images were found by listing the folder; COCO's names come from the file.
        if self.format == "coco" and not path.resolve().is_relative_to(self.root.resolve()):
            raise AnnotationError(f"{self.source}: {self.file_names[i]} leads out of {self.root}")
        return path

    def without(self, names: set[str]) -> "Annotations":
        """The same without some images and their boxes."""
        return self.select([i for i, name in enumerate(self.file_names.tolist()) if name not in names])

    def without_lost(self) -> "Annotations":
        """The same without the images that cannot be used."""
        lost = {problem.file for problem in self.problems if problem.kind in LOST}
        return self.without(lost) if lost else self

    def select(self, images: Sequence[int]) -> "Annotations":
        """Some of the images, by their places and in that order, with their boxes."""
        kept = np.arange(len(self))[np.asarray(images, np.int64).reshape(-1)]  # from the end, where negative
        counts = np.diff(self.starts)[kept]
        starts = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
        boxes = np.repeat(self.starts[kept] - starts[:-1], counts) + np.arange(starts[-1])
        gone = set(self.file_names.tolist()) - set(self.file_names[kept].tolist())
        return replace(
            self,
            file_names=self.file_names[kept],
            image_ids=tuple(self.image_ids[i] for i in kept),
            sizes=self.sizes[kept],
            starts=starts,
            boxes=self.boxes[boxes],
            labels=self.labels[boxes],
            crowd=self.crowd[boxes],
            areas=self.areas[boxes],
            usable=self.usable[boxes],
            problems=tuple(each for each in self.problems if each.file not in gone),
        )

    def of_image(self, i: int) -> slice:
        """Where the boxes of an image are."""
        i = range(len(self))[i]  # negative ones count from the end
        return slice(int(self.starts[i]), int(self.starts[i + 1]))


class DetectionDataset(Dataset[tuple[Image.Image, dict[str, Any]]]):
    """Images with boxes for training and evaluation.

    An item is an upright RGB image and a dict: "boxes", float32 xyxy in pixels, clipped, ``[M, 4]``, and
    "labels", int64 ``[M]`` from 1. Training takes any other torch Dataset whose items are like that (images
    of any kind that `ssd.load_image` reads, tensors for boxes and labels), too.

    Args:
        annotations: see `load`.
        lenient: leave out annotations that cannot be used, and images that are missing, that are none, or
            that have another size than their annotations say, instead of refusing them. An image that turns
            out to be damaged within stops training in any case; `ssd check` finds it.
        crowd: keep crowd boxes, as NVIDIA's training code does.

    Raises:
        AnnotationError: with the first of the problems, unless `lenient`.
    """

    def __init__(self, annotations: Annotations, *, lenient: bool = False, crowd: bool = False) -> None:
        if lenient:
            annotations = _with_image_problems(annotations)
        self.annotations = annotations = _used(annotations, lenient=lenient)
        self.class_names = annotations.class_names
        self.crowd = crowd
        self._kept = annotations.usable & (~annotations.crowd | crowd)

    def __len__(self) -> int:
        return len(self.annotations)

    def name(self, index: int) -> str:
        """The file of an item, for messages."""
        return str(self.annotations.root / str(self.annotations.file_names[index]))

    def __getitem__(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        image = load_image(self.annotations.path(index))
        check_size(self.annotations, index, image.size)
        part = self.annotations.of_image(index)
        kept = self._kept[part]
        boxes = self.annotations.boxes[part][kept]
        boxes = boxes.clip(0, [*image.size, *image.size]).astype(np.float32)
        seen = (boxes[:, 2:] > boxes[:, :2]).all(1)  # files that give no image size may have boxes outside
        return image, {"boxes": boxes[seen], "labels": self.annotations.labels[part][kept][seen]}


def annotations_of(dataset: "Annotations | Dataset[Any]") -> Annotations | None:
    """The annotations of a dataset, also of a Subset, as `torch.utils.data.random_split` gives; or None."""
    if isinstance(dataset, Subset):
        whole = annotations_of(dataset.dataset)
        return None if whole is None else whole.select(dataset.indices)
    if isinstance(dataset, DetectionDataset):
        return dataset.annotations
    return dataset if isinstance(dataset, Annotations) else None


def check_size(annotations: Annotations, i: int, size: tuple[int, int]) -> None:
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


def _with_image_problems(annotations: Annotations) -> Annotations:
    """With those problems of the images that show in their headers, which are not read otherwise."""
    known = {each.file for each in annotations.problems if each.kind in LOST}
    places = [i for i, name in enumerate(annotations.file_names.tolist()) if name not in known]
    problems = []
    for i, size in zip(places, _upright_sizes([annotations.path(i) for i in places]), strict=True):
        name = str(annotations.file_names[i])
        if size is None:
            problems.append(Problem("unreadable image", name, "", "is no image, or a damaged one"))
            continue
        try:
            check_size(annotations, i, size)
        except AnnotationError as error:
            problems.append(Problem("wrong size", name, "", str(error)))
    return replace(annotations, problems=(*annotations.problems, *problems))


def listed(counts: Mapping[str, int]) -> str:
    """Kinds of problems with their numbers, as text."""
    return ", ".join(f"{kind}: {count}" for kind, count in counts.items())


def _used(annotations: Annotations, *, lenient: bool, tolerated: Sequence[str] = ()) -> Annotations:
    """What is left without images that cannot be used; fatal problems, but for some kinds, become a count.

    Raises:
        AnnotationError: there are such problems, of which it has the first ten, and it is not `lenient`; or
            there is no image that can be used.
    """
    missing = sum(problem.kind in LOST for problem in annotations.problems)
    if len(annotations) - missing <= 0:
        raise AnnotationError(
            f"{annotations.source}: no images that can be read in {annotations.root}; if they are elsewhere, "
            "give their folder with --images (images=...), or --val-images for what is evaluated on"
        )
    fatal = [each for each in annotations.problems if each.fatal and each.kind not in tolerated]
    counts = Counter(problem.kind for problem in fatal)
    if fatal and not lenient:
        more = f"\n  and {len(fatal) - 10} more" if len(fatal) > 10 else ""
        raise AnnotationError(
            f"{annotations.source} has annotations that cannot be used ({listed(counts)}); correct them, or "
            "leave them out with --lenient (lenient=True):\n  " + "\n  ".join(map(str, fatal[:10])) + more
        )
    used = annotations.without_lost()
    rest = tuple(each for each in used.problems if not each.fatal or each.kind in tolerated)
    return replace(used, problems=rest, left_out=Counter(annotations.left_out) + counts)


def require_boxes(annotations: Annotations) -> None:
    """Require something to train on.

    Raises:
        AnnotationError: no image has a box that can be used.
    """
    if not annotations.usable.any():
        hint = ""
        if annotations.format == "yolo" and len(annotations):
            first = annotations.root / str(annotations.file_names[0])
            hint = (
                f"; those of {first.name} were looked for in {_yolo_labels(first, annotations.source.parent)}"
            )
        raise AnnotationError(
            f"{annotations.source}: no boxes to train on in {len(annotations)} images{hint}"
        )


# --- Finding ----------------------------------------------------------------------------------------------


def load(
    path: str | os.PathLike[str],
    split: str = "train",
    *,
    images: str | os.PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> Annotations:
    """Read the annotations of one split of a dataset.

    Layouts: COCO (``train.json`` with ``train/``; ``annotations/instances_train2017.json`` with
    ``train2017/`` or ``images/train2017/``; Roboflow's ``train/_annotations.coco.json``), YOLO
    (``data.yaml``), VOC (``Annotations/*.xml``, ``JPEGImages/``, ``ImageSets/Main/train.txt``).

    Args:
        path: the dataset's folder, its ``data.yaml``, or one COCO JSON file.
        split: "train", "val" or "test"; of a single JSON file it is not asked.
        images: the folder of the images, where it cannot be found by the layout.
        class_names: the classes of a model, in its order; by default the dataset's own, by category id.

    Raises:
        AnnotationError: no dataset of a known layout, no such split, or files that cannot be read. What is
            wrong with single annotations is listed in `Annotations.problems` instead.
        FileNotFoundError: there is no such path.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"no dataset at {root}")
    if root.is_file() and root.suffix.lower() == ".json":
        return _load_coco(root, _images_beside(root), images, class_names)
    if root.is_file() and root.suffix.lower() in (".yaml", ".yml"):
        return read_yolo(root, split, class_names, images)
    if root.is_file():
        raise AnnotationError(f"{root}: a dataset is a folder, a COCO .json file or a YOLO data.yaml")
    found = find_coco(root, split)
    if found:
        return _load_coco(*found, images, class_names)
    config = _yolo_config(root)
    if config:
        return read_yolo(config, split, class_names, images)
    if _voc_folder(root) or any(root.glob("*/*.xml")):
        return read_voc(root, split, class_names, Path(images) if images else None)
    known = "COCO (train.json + train/), Roboflow COCO, YOLO (data.yaml) or VOC (Annotations/*.xml)"
    if any(find_coco(root, other) for other in SPLITS):
        known = f"{split} split; it has {', '.join(other for other in SPLITS if find_coco(root, other))}"
        raise AnnotationError(f"{root}: there is no {known}")
    raise AnnotationError(f"{root}: no dataset of a known layout: {known}")


def _load_coco(
    file: Path, beside: Path, images: str | os.PathLike[str] | None, class_names: Sequence[str] | None
) -> Annotations:
    """A COCO file with its images: in the folder that is given, beside it, or where its names start from."""
    if images is not None:
        return read_coco(file, Path(images), class_names)
    found = read_coco(file, beside, class_names)
    if len(found) and found.is_without_images():
        first = str(found.file_names[0])
        other = next((each for each in (file.parent, file.parent.parent) if (each / first).is_file()), None)
        found = read_coco(file, other, class_names) if other else found
    return found


def find_split(path: str | os.PathLike[str], split: str) -> bool:
    """Whether a dataset has a split, as far as its files show; a single COCO file has only "train"."""
    root = Path(path)
    if root.is_file() and root.suffix.lower() == ".json":
        return split == "train"
    config = root if root.is_file() else _yolo_config(root)
    if not root.is_file() and find_coco(root, split):
        return True
    if config:
        settings = _read_yaml(config)
        try:
            return bool(_yolo_paths(config, settings, split))
        except AnnotationError:  # Roboflow's files name splits that were not exported
            return False
    try:
        return bool(_voc_files(root, split))
    except AnnotationError:
        return False


def usable_for_evaluation(annotations: Annotations, *, lenient: bool = False) -> Annotations:
    """Require what an honest evaluation needs; boxes without area stay in it, as in the official code.

    Raises:
        AnnotationError: missing images, unknown ids or numbers that are none, unless `lenient`, which leaves
            those images and annotations out, and counts them in `Annotations.left_out`.
    """
    if lenient:
        annotations = _with_image_problems(annotations)
    return _used(annotations, lenient=lenient, tolerated=MISSHAPEN)


def find_coco(root: Path, split: str) -> tuple[Path, Path] | None:
    """The JSON file of a split and its image folder, if a folder holds COCO annotations for it."""
    files = _coco_files(root, split)
    for file in files:
        stem = file.stem.removeprefix("instances_")
        base = root if file.parent.name == "annotations" else file.parent
        if file.name == "_annotations.coco.json":
            return file, file.parent
        names = (stem, *SPLITS.get(split, (split,)))
        folders = [base / place / name for name in names for place in ("", "images")] + [base / "images"]
        for folder in folders:
            if folder.is_dir():
                return file, folder
    return (files[0], root / split) if files else None  # all of its images are missing, then


def _coco_files(root: Path, split: str) -> list[Path]:
    """The files that may be a split's, most telling first."""
    found = []
    for name in SPLITS.get(split, (split,)):
        found += [root / f"{name}.json", root / name / "_annotations.coco.json"]
        found += [root / "annotations" / f"{name}.json"]
        # Of several years, the last one whose images are there.
        found += sorted((root / "annotations").glob(f"instances_{name}*.json"), reverse=True)
    if split == "train":
        found.append(root / "annotations" / "instances_default.json")  # CVAT's only one
    return [file for file in found if file.is_file()]


def _images_beside(file: Path) -> Path:
    """The image folder of a COCO file that is given by itself."""
    stem = file.stem.removeprefix("instances_")
    above = file.parent.parent
    for folder in (file.parent / stem, file.parent / "images", above / stem, above / "images"):
        if folder.is_dir() and file.name != "_annotations.coco.json":
            return folder
    return file.parent


# --- COCO -------------------------------------------------------------------------------------------------


def read_coco(file: Path, folder: Path, class_names: Sequence[str] | None = None) -> Annotations:
    """Read a COCO JSON file; see `load`."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{file}: not a JSON file ({error})") from error
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise AnnotationError(f'{file}: a COCO file has the lists "images", "annotations" and "categories"')

    builder = _Builder(file, folder, "coco")
    used = {str(entry.get("category_id")) for entry in content["annotations"] if isinstance(entry, dict)}
    labels = _coco_classes(content["categories"], used, builder, class_names)
    places = _coco_images(content["images"], builder)
    seen: Counter[str] = Counter()
    for number, entry in enumerate(content["annotations"]):
        if isinstance(entry, dict):
            tag = str(entry.get("id", f"#{number}"))
            seen[tag] += 1
            _coco_annotation(entry, tag, places, labels, builder)
        else:
            builder.problem("not a box", str(file), f"#{number}", "is not an object")
    twice = [tag for tag, count in seen.items() if count > 1]
    if twice:
        message = f"{len(twice)} annotation ids are used more than once, as {twice[0]}; they are told apart"
        builder.problem("duplicate annotation id", str(file), "", message, fatal=False)
    return builder.build()


def _coco_classes(
    categories: list[Any], used: set[str], builder: "_Builder", class_names: Sequence[str] | None
) -> dict[str, int]:
    """The label of each category id, as text: files mix "1" and 1."""
    names: dict[str, str] = {}
    groups = {str(each.get("supercategory")) for each in categories if isinstance(each, dict)}
    for category in categories:
        if not isinstance(category, dict) or "id" not in category:
            raise AnnotationError(f"{builder.source}: a category without an id: {str(category)[:100]}")
        key, name = str(category["id"]), str(category.get("name", category["id"]))
        # Roboflow lists the group of its classes as category 0, often under the name of one of them.
        if key in used or name not in groups or str(category.get("supercategory")) == name:
            names[key] = name
    if all(map(_is_whole, names)):
        names = dict(sorted(names.items(), key=lambda item: int(item[0])))
        category_ids = tuple(map(int, names))
    else:
        category_ids = tuple(range(1, len(names) + 1))
    labels = builder.set_classes(list(names.values()), category_ids, class_names)
    return dict(zip(names, labels, strict=True))


def _coco_images(images: list[Any], builder: "_Builder") -> dict[str, int]:
    """The place of each image id, as text."""
    places: dict[str, int] = {}
    for number, image in enumerate(images):
        if not isinstance(image, dict) or "file_name" not in image or "id" not in image:
            message = f"image entry {number} has no file_name or id"
            builder.problem("bad image entry", str(builder.source), "", message)
            continue
        key, name = str(image["id"]), str(image["file_name"])
        if not _stays_inside(name):
            raise AnnotationError(
                f"{builder.source}: the file name {name!r} (image {key}) leads out of {builder.root}"
            )
        if key in places:
            builder.problem("duplicate image id", name, "", f"its id {key} is also another image's")
        else:
            places[key] = builder.add_image(name, image["id"], image.get("width"), image.get("height"))
    return places


def _coco_annotation(
    entry: dict[str, Any], tag: str, places: dict[str, int], labels: dict[str, int], builder: "_Builder"
) -> None:
    place = places.get(str(entry.get("image_id")))
    label = labels.get(str(entry.get("category_id")))
    box = _numbers(entry.get("bbox"), 4)
    if place is None:
        message = f"its image_id {entry.get('image_id')!r} is no image's"
        builder.problem("unknown image id", str(builder.source), tag, message)
    elif label is None:
        message = f"its category_id {entry.get('category_id')!r} is no category's"
        builder.problem("unknown category id", builder.names[place], tag, message)
    elif box is None:
        message = f"its bbox {str(entry.get('bbox'))[:60]} is not four finite numbers"
        builder.problem("not a box", builder.names[place], tag, message)
    else:
        left, top, width, height = box
        area = _numbers([entry.get("area")], 1)
        builder.add_box(
            place,
            tag,
            (left, top, left + width, top + height),
            label,
            crowd=entry.get("iscrowd") in (1, "1"),
            area=area[0] if area else None,
        )


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isascii() and text.removeprefix("-").isdigit() and len(text) < 19


def _stays_inside(name: str) -> bool:
    """Whether a relative path, as written, cannot leave its folder (on any system)."""
    parts = PurePosixPath(name.replace("\\", "/"))
    return (
        bool(name)
        and "\0" not in name
        and not parts.is_absolute()
        and ".." not in parts.parts
        and (":" not in parts.parts[0] if parts.parts else False)
    )


def _numbers(values: object, count: int) -> tuple[float, ...] | None:
    """The values as finite floats, or None if they are not `count` numbers."""
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        return None
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return None
    # Far beyond any image, and float32 squares it; JSON's integers have no limit at all.
    return tuple(map(float, values)) if all(abs(value) < 1e9 for value in values) else None


# --- YOLO -------------------------------------------------------------------------------------------------


def read_yolo(
    file: Path,
    split: str,
    class_names: Sequence[str] | None = None,
    images: str | os.PathLike[str] | None = None,
) -> Annotations:
    """Read a split of a YOLO dataset: ``data.yaml``, with labels in ``labels/`` beside ``images/``."""
    if images is not None:
        raise AnnotationError(f"{file}: names the image folders itself; change it there, not with --images")
    config = _read_yaml(file)
    if not isinstance(config.get("names"), list | dict):
        raise AnnotationError(f'{file}: a YOLO data.yaml has "names" and the folders of its splits')
    names = config["names"]
    numbered = dict(enumerate(names)) if isinstance(names, list) else names
    if set(numbered) != set(range(len(numbered))):
        raise AnnotationError(
            f'{file}: "names" has to number the classes from 0 on; it has {list(numbered)[:20]}'
        )
    paths = _yolo_paths(file, config, split)
    root = Path(os.path.commonpath([path.parent for path in paths])) if paths else file.parent

    builder = _Builder(file, root, "yolo")
    ordered = [str(numbered[i]) for i in range(len(numbered))]
    labels = builder.set_classes(ordered, tuple(range(len(ordered))), class_names)
    for path, size in zip(paths, _upright_sizes(paths), strict=True):
        name = path.relative_to(root)
        place = builder.add_image(str(name), name.with_suffix("").as_posix(), *(size or (None, None)))
        if size is None and path.is_file():
            builder.problem(
                "unreadable image", str(name), "", "its size, which its boxes need, cannot be read"
            )
        label_file = _yolo_labels(path, file.parent)
        if size is None or not label_file.is_file():
            continue  # a background image
        for number, line in enumerate(_text(label_file).splitlines(), start=1):
            values = [_number(field) for field in line.split()]
            if "kpt_shape" in config:  # what follows the box are key points, not a polygon
                values = values[:5]
            if values:
                _yolo_line(values, f"{label_file.name}:{number}", place, size, labels, builder)
    return builder.build()


def _yolo_line(
    values: list[float],
    tag: str,
    place: int,
    size: tuple[int, int],
    labels: list[int],
    builder: "_Builder",
) -> None:
    if len(values) > 6 and len(values) % 2:  # a polygon: its box
        xs, ys = values[1::2], values[2::2]
        corners = (min(xs), min(ys), max(xs), max(ys))
    elif len(values) in (5, 6):  # the sixth is a confidence
        x, y, w, h = values[1:5]
        corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    else:
        corners = (math.nan,) * 4
    box = _numbers([value * side for value, side in zip(corners, size * 2, strict=True)], 4)
    if box is None:
        message = f"not a class and the four numbers of a box: {values[:8]}"
        builder.problem("not a box", builder.names[place], tag, message)
    elif values[0] not in range(len(labels)):
        message = f"its class {values[0]:g} is none of 0 to {len(labels) - 1}"
        builder.problem("unknown category id", builder.names[place], tag, message)
    else:
        builder.add_box(place, tag, box, labels[int(values[0])])


def _yolo_config(root: Path) -> Path | None:
    return next(
        (root / name for name in ("data.yaml", "data.yml", "dataset.yaml") if (root / name).is_file()), None
    )


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(_text(file))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise AnnotationError(f"{file}: not a YAML file ({error})") from error
    if not isinstance(config, dict):
        raise AnnotationError(f"{file}: holds no settings")
    return config


def _yolo_paths(file: Path, config: dict[str, Any], split: str) -> list[Path]:
    folders = next((config[key] for key in SPLITS.get(split, (split,)) if config.get(key)), None)
    if folders is None:
        raise AnnotationError(f"{file}: there is no {split} split")
    base = file.parent / str(config.get("path") or "")
    base = base if base.is_dir() else file.parent
    return [path for entry in _as_list(folders) for path in _yolo_images(file, base, str(entry))]


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _yolo_images(file: Path, base: Path, entry: str) -> list[Path]:
    # Roboflow writes "../train/images" for a folder that lies beside its data.yaml.
    for candidate in (base / entry, file.parent / entry, base / entry.removeprefix("../")):
        if candidate.is_dir():
            found = sorted(path for path in candidate.rglob("*") if is_image_name(path.name))
            return [Path(os.path.abspath(path)) for path in found]
        if candidate.is_file():
            lines = _text(candidate).split("\n")
            return [Path(os.path.abspath(candidate.parent / line.strip())) for line in lines if line.strip()]
    raise AnnotationError(f"{file}: there is no folder {entry}")


def _yolo_labels(image: Path, dataset: Path) -> Path:
    """Where an image's labels are: in labels/ for images/ (of the dataset, not above), else beside it."""
    parts = list(image.parts)
    root = os.path.abspath(dataset)  # as images are given: without ".."
    above = len(Path(root).parts) if image.is_relative_to(root) else 0
    for place in range(len(parts) - 2, above - 1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            return Path(*parts).with_suffix(".txt")
    within = image.parent / "labels" / f"{image.stem}.txt"
    return within if within.is_file() else image.with_suffix(".txt")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _upright_sizes(paths: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Width and height of images after EXIF rotation, from their headers; None where there is none."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(upright_size, paths))


# --- VOC --------------------------------------------------------------------------------------------------


def read_voc(
    root: Path, split: str, class_names: Sequence[str] | None = None, images: Path | None = None
) -> Annotations:
    """Read a split of a Pascal VOC dataset, or of one that has XML files beside the images.

    Corners count from 1 and are part of the box, as in VOC's own files.
    """
    folder, files, every = _voc_files(root, split)
    if images is None:
        beside = [folder.parent / name for name in ("JPEGImages", "images", "Images")]
        images = next((each for each in beside if each.is_dir()), folder)
    trees = {path: _xml(path) for path in {*every, *files}}
    found = {(each.findtext("name") or "").strip() for tree in trees.values() for each in tree.iter("object")}
    builder = _Builder(folder, images, "voc")
    ordered = sorted(found - {""})
    labels = dict(
        zip(
            ordered, builder.set_classes(ordered, tuple(range(1, len(ordered) + 1)), class_names), strict=True
        )
    )
    for path in files:
        tree = trees[path]
        name = _voc_image(images, path.stem, tree.findtext("filename") or "")
        size = [_number(tree.findtext(f"size/{side}")) for side in ("width", "height")]
        place = builder.add_image(name, path.stem, *size)
        for number, entry in enumerate(tree.iter("object"), start=1):
            _voc_object(entry, f"{path.name}:{number}", place, labels, builder)
    return builder.build()


def _voc_image(images: Path, stem: str, written: str) -> str:
    """The image of an annotation file: one that is called like it, or the one it names, wherever that was.

    Copies of annotation files often still name the first one's image.
    """
    last = written.strip().replace("\\", "/").rsplit("/", 1)[-1].replace("\0", "")
    if PurePosixPath(last).stem == stem and (images / last).is_file():
        return last
    for suffix in sorted(SUFFIXES):
        for candidate in (f"{stem}{suffix}", f"{stem}{suffix.upper()}"):
            if (images / candidate).is_file():
                return candidate
    return last or f"{stem}.jpg"


def _voc_folder(root: Path) -> Path | None:
    """The folder of annotations; of a devkit, that of its only year."""
    for pattern in ("Annotations", "annotations", "*/Annotations"):
        found = [folder for folder in root.glob(pattern) if any(folder.glob("*.xml"))]
        if len(found) > 1:
            years = ", ".join(str(folder.parent) for folder in found)
            raise AnnotationError(f"{root}: holds several datasets; give one of {years}")
        if found:
            return found[0]
    return root if any(root.glob("*.xml")) else None


def _voc_files(root: Path, split: str) -> tuple[Path, list[Path], list[Path]]:
    """The folder of annotations, the files of a split, and all files, which tell the classes."""
    names = SPLITS.get(split, (split,))
    folder = _voc_folder(root)
    if folder is None:
        folder = next((root / name for name in names if (root / name).is_dir()), root / split)
        files, every = sorted(folder.glob("*.xml")), sorted(root.glob("*/*.xml"))
    else:
        every = sorted(folder.glob("*.xml"))
        lists = folder.parent / "ImageSets" / "Main"
        wanted = (*names, "trainval") if split == "train" else names
        chosen = next((lists / f"{name}.txt" for name in wanted if (lists / f"{name}.txt").is_file()), None)
        if chosen is not None:
            stems = [line.split()[0] for line in _text(chosen).splitlines() if line.split()]
            files = [folder / f"{stem}.xml" for stem in stems if _stays_inside(stem)]
        else:
            files = every if split == "train" and not lists.is_dir() else []
    if not files:
        raise AnnotationError(f"{root}: there is no {split} split")
    return folder, files, every


def _voc_object(entry: ET.Element, tag: str, place: int, labels: dict[str, int], builder: "_Builder") -> None:
    label = labels.get((entry.findtext("name") or "").strip())
    corners = [_number(entry.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
    box = _numbers(corners, 4)
    if label is None:
        builder.problem("unknown category id", builder.names[place], tag, "the object has no name")
    elif box is None:
        message = f"its bndbox {corners} is not four finite numbers"
        builder.problem("not a box", builder.names[place], tag, message)
    else:
        difficult = (entry.findtext("difficult") or "0").strip() == "1"
        left, top, right, bottom = box
        builder.add_box(place, tag, (left - 1, top - 1, right, bottom), label, crowd=difficult)


def _xml(path: Path) -> ET.Element:
    try:
        return ET.parse(path).getroot()
    except FileNotFoundError:
        raise AnnotationError(f"{path}: listed in ImageSets, but there is no such file") from None
    except (ET.ParseError, ValueError, LookupError) as error:  # the latter of unknown encodings
        raise AnnotationError(f"{path}: not an XML file ({error})") from error


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


# --- Putting together -------------------------------------------------------------------------------------


class _Builder:
    """Collects what a reader finds, and judges every box by the same rules."""

    def __init__(self, source: Path, root: Path, format: Format) -> None:
        self.source, self.root, self.format = source, root, format
        self.names: list[str] = []
        self._ids: list[int | str] = []
        self._sizes: list[tuple[int, int]] = []
        self._boxes: list[tuple[float, ...]] = []
        self._rows: list[tuple[int, int, bool, float | None, str]] = []
        self._problems: list[Problem] = []

    def problem(self, kind: str, file: str, annotation: str, message: str, *, fatal: bool = True) -> None:
        self._problems.append(Problem(kind, file, annotation, message, fatal))

    def set_classes(
        self, names: Sequence[str], category_ids: tuple[int, ...], wanted: Sequence[str] | None
    ) -> list[int]:
        """Settle the classes; the label of each of the dataset's categories."""
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice or not names:
            what = f"two categories are called {twice[0]!r}" if twice else "there are no categories"
            raise AnnotationError(f"{self.source}: {what}")
        if wanted is None:
            self._class_names, self._category_ids = tuple(names), category_ids
        else:
            unknown = [name for name in names if name not in wanted]
            if unknown:
                raise AnnotationError(
                    f"{self.source}: the categories {', '.join(unknown[:5])} are none of the classes "
                    f"{', '.join(wanted[:10])}{' ...' if len(wanted) > 10 else ''}"
                )
            ids = dict(zip(names, category_ids, strict=True))
            free = iter(i for i in range(1, 2 * len(wanted) + len(ids) + 1) if i not in ids.values())
            self._class_names = tuple(wanted)
            self._category_ids = tuple(ids[name] if name in ids else next(free) for name in wanted)
        return [self._class_names.index(name) + 1 for name in names]

    def add_image(self, name: str, image_id: int | str, width: object, height: object) -> int:
        size = _numbers([width, height], 2)
        self._sizes.append((int(size[0]), int(size[1])) if size and min(size) >= 1 else (0, 0))
        self.names.append(name)
        self._ids.append(image_id)
        return len(self.names) - 1

    def add_box(
        self,
        image: int,
        tag: str,
        box: tuple[float, ...],
        label: int,
        *,
        crowd: bool = False,
        area: float | None = None,
    ) -> None:
        self._boxes.append(box)
        self._rows.append((image, label, crowd, area, tag))

    def build(self) -> Annotations:
        self._find_missing()
        self._find_repeated()
        self._find_sizes()
        rows = self._rows
        image = np.array([row[0] for row in rows], np.int64)
        order = np.argsort(image, kind="stable")
        boxes = np.array(self._boxes, np.float64).reshape(-1, 4)[order]
        image = image[order]
        tags = [rows[i][4] for i in order]
        labels = np.array([rows[i][1] for i in order], np.int64)
        usable = self._judge(boxes, labels, image, tags)
        extent = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        given = np.array([np.nan if rows[i][3] is None else rows[i][3] for i in order], np.float64)
        counts = np.bincount(image, minlength=len(self.names))
        return Annotations(
            root=self.root,
            source=self.source,
            format=self.format,
            class_names=self._class_names,
            category_ids=self._category_ids,
            file_names=np.array(self.names, np.str_),
            image_ids=tuple(self._ids),
            sizes=np.array(self._sizes, np.int64).reshape(-1, 2),
            starts=np.concatenate([[0], counts.cumsum()]).astype(np.int64),
            boxes=boxes,
            labels=labels,
            crowd=np.array([rows[i][2] for i in order], np.bool_),
            areas=np.where(np.isnan(given), extent, given),
            usable=usable,
            problems=tuple(self._problems),
        )

    def _find_missing(self) -> None:
        # One listing of a folder, not a question to the file system for every image.
        folders = {os.path.dirname(name) for name in self.names}
        there: dict[str, set[str]] = {}
        for folder in folders:
            try:
                there[folder] = set(os.listdir(self.root / folder))
            except OSError:
                there[folder] = set()
        for name in self.names:
            folder, last = os.path.split(name)
            if last not in there[folder]:
                self.problem("missing image", name, "", f"there is no such file in {self.root}")

    def _find_repeated(self) -> None:
        for name, count in Counter(self.names).items():
            if count > 1:
                message = f"is listed {count} times; what one entry labels is background to the others"
                self.problem("image listed twice", name, "", message, fatal=False)

    def _find_sizes(self) -> None:
        """Read sizes that the files do not give, without which nobody knows which boxes lie outside."""
        unknown = [i for i, size in enumerate(self._sizes) if size == (0, 0)]
        paths = [self.root / self.names[i] for i in unknown]
        for i, size in zip(unknown, _upright_sizes(paths), strict=True):
            self._sizes[i] = size or (0, 0)

    def _judge(
        self,
        boxes: npt.NDArray[np.float64],
        labels: npt.NDArray[np.int64],
        image: npt.NDArray[np.int64],
        tags: list[str],
    ) -> npt.NDArray[np.bool_]:
        size = np.array(self._sizes, np.float64).reshape(-1, 2)[image]
        size[size == 0] = np.inf
        narrow = boxes.astype(np.float32)  # what training computes with
        extent = (narrow[:, 2:] - narrow[:, :2]).astype(np.float64)
        inverted = (extent < 0).any(1)
        zero = ~inverted & (extent == 0).any(1)
        visible = np.minimum(boxes[:, 2:], size) - np.maximum(boxes[:, :2], 0)
        outside = ~inverted & ~zero & (visible <= 0).any(1)
        reaches = (
            ~inverted & ~zero & ~outside & ((boxes[:, :2] < -1).any(1) | (boxes[:, 2:] > size + 1).any(1))
        )
        keys = np.column_stack([image, labels, boxes])
        _, first = np.unique(keys, axis=0, return_index=True)
        again = np.ones(len(boxes), np.bool_)
        again[first] = False
        kinds: tuple[tuple[Any, str, str, bool], ...] = (
            (inverted, "inverted box", "has a negative size", True),
            (zero, "zero area", "has no area", True),
            (outside, "box outside", "lies outside the image of {size}", True),
            (reaches, "box reaches outside", "reaches outside the image of {size}; it is clipped", False),
            (again, "duplicate box", "is there twice, with the same class", False),
        )
        for mask, kind, what, fatal in kinds:
            for i in mask.nonzero()[0].tolist():
                (left, top), (width, height) = boxes[i, :2].tolist(), extent[i].tolist()
                image_size = "x".join(f"{side:g}" for side in size[i])
                message = f"the box at ({left:g}, {top:g}), {width:g} wide and {height:g} high, "
                self.problem(
                    kind, self.names[image[i]], tags[i], message + what.format(size=image_size), fatal=fatal
                )
        usable: npt.NDArray[np.bool_] = ~(inverted | zero | outside)
        return usable


def as_targets(target: Mapping[str, Any], name: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Boxes ``[M, 4]`` and labels ``[M]`` of an item of any dataset, checked.

    Raises:
        AnnotationError: shapes that do not fit, boxes that are not finite or have no area, labels below 1.
    """
    try:
        boxes, labels = target["boxes"], target["labels"]
    except (KeyError, TypeError) as error:
        raise AnnotationError(f'{name}: a target is a dict with "boxes" and "labels"') from error
    boxes = np.asarray(boxes.cpu() if isinstance(boxes, Tensor) else boxes, np.float32).reshape(-1, 4)
    labels = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels, np.int64).reshape(-1)
    if len(boxes) != len(labels):
        raise AnnotationError(f"{name}: {len(boxes)} boxes and {len(labels)} labels")
    if not np.isfinite(boxes).all() or not (boxes[:, 2:] > boxes[:, :2]).all():
        bad = boxes[~(np.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1))][0]
        raise AnnotationError(f"{name}: the box {bad.tolist()} (xyxy) is not finite or has no area")
    if len(labels) and labels.min() < 1:
        raise AnnotationError(f"{name}: labels count from 1 (0 is the background); got {labels.min()}")
    return boxes, labels
