"""YOLO: data.yaml names the classes and the image folders; each image has a text file of relative boxes."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ssd.data.annotations import Annotations
from ssd.data.builder import Builder, finite_numbers, number, read_text, split_names
from ssd.data.judge import NOT_A_BOX, UNKNOWN_CATEGORY, UNREADABLE, upright_sizes
from ssd.errors import AnnotationError
from ssd.images import is_image_name


def is_at(path: Path) -> bool:
    """Whether a path is a YAML file, or a folder that holds a data.yaml."""
    return _config_file(path) is not None


def has_split(path: Path, split: str) -> bool:
    """Whether data.yaml names a split and its images are there.

    Raises:
        AnnotationError: it is no YAML file.
    """
    file = _config_file(path)
    if file is None:
        return False
    config = _read_yaml(file)
    try:
        listings = _listings(file, config, split)
    except AnnotationError:  # Roboflow's files name splits that were not exported
        return False
    return any(True for listing in listings for _ in _images_of(listing))  # the first image will do


def read(path: Path, split: str, images: Path | None, class_names: Sequence[str] | None) -> Annotations:
    """Read a split: ``data.yaml``, with labels in ``labels/`` beside ``images/``."""
    file = _config_file(path)
    if file is None:
        raise AnnotationError(f"{path}: holds no data.yaml")
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
    paths = _image_paths(file, config, split)
    root = Path(os.path.commonpath([image.parent for image in paths])) if paths else file.parent

    builder = Builder(file, root, follow_links=True)
    ordered = [str(numbered[i]) for i in range(len(numbered))]
    labels = builder.set_classes(ordered, tuple(range(len(ordered))), class_names)
    for image, size in zip(paths, upright_sizes(paths), strict=True):
        name = image.relative_to(root)
        index = builder.add_image(str(name), name.with_suffix("").as_posix(), *(size or (None, None)))
        if size is None and image.is_file():
            builder.problem(UNREADABLE, str(name), "", "its size, which its boxes need, cannot be read")
        label_file = _label_file(image, file.parent)
        if size is None or not label_file.is_file():
            continue  # a background image
        for line_number, line in enumerate(read_text(label_file).splitlines(), start=1):
            values = [number(word) for word in line.split()]
            if "kpt_shape" in config:  # what follows the box are key points, not a polygon
                values = values[:5]
            if values:
                _line(values, f"{label_file.name}:{line_number}", index, size, labels, builder)
    hint = ""
    if paths:
        hint = f"those of {paths[0].name} were looked for in {_label_file(paths[0], file.parent)}"
    return builder.build(labels_hint=hint)


def _line(
    values: list[float],
    tag: str,
    image: int,
    size: tuple[int, int],
    labels: list[int],
    builder: Builder,
) -> None:
    if len(values) > 6 and len(values) % 2:  # a polygon: its box
        xs, ys = values[1::2], values[2::2]
        corners = (min(xs), min(ys), max(xs), max(ys))
    elif len(values) in (5, 6):  # the sixth is a confidence
        x, y, w, h = values[1:5]
        corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    else:
        corners = (math.nan,) * 4
    box = finite_numbers([value * side for value, side in zip(corners, size * 2, strict=True)], 4)
    if box is None:
        message = f"not a class and the four numbers of a box: {values[:8]}"
        builder.problem(NOT_A_BOX, builder.names[image], tag, message)
    elif values[0] not in range(len(labels)):
        message = f"its class {values[0]:g} is none of 0 to {len(labels) - 1}"
        builder.problem(UNKNOWN_CATEGORY, builder.names[image], tag, message)
    else:
        builder.add_box(image, tag, box, labels[int(values[0])])


def _config_file(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix.lower() in (".yaml", ".yml") else None
    names = ("data.yaml", "data.yml", "dataset.yaml")
    return next((path / name for name in names if (path / name).is_file()), None)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(read_text(file))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise AnnotationError(f"{file}: not a YAML file ({error})") from error
    if not isinstance(config, dict):
        raise AnnotationError(f"{file}: holds no settings")
    return config


def _image_paths(file: Path, config: dict[str, Any], split: str) -> list[Path]:
    """The images of a split: those of a folder sorted, those of a list as they are listed."""
    found: list[Path] = []
    for listing in _listings(file, config, split):
        found += sorted(_images_of(listing)) if listing.is_dir() else _images_of(listing)
    return [Path(os.path.abspath(path)) for path in found]


def _listings(file: Path, config: dict[str, Any], split: str) -> list[Path]:
    """The folders of a split's images, and text files that list them.

    Raises:
        AnnotationError: there is no such split, or one of them is not there.
    """
    entries = next((config[key] for key in split_names(split) if config.get(key)), None)
    if entries is None:
        raise AnnotationError(f"{file}: there is no {split} split")
    base = file.parent / str(config.get("path") or "")
    base = base if base.is_dir() else file.parent
    found = []
    for entry in map(str, entries if isinstance(entries, list) else [entries]):
        # Roboflow writes "../train/images" for a folder that lies beside its data.yaml.
        candidates = (base / entry, file.parent / entry, base / entry.removeprefix("../"))
        listing = next((path for path in candidates if path.is_dir() or path.is_file()), None)
        if listing is None:
            raise AnnotationError(f"{file}: there is no folder {entry}")
        found.append(listing)
    return found


def _images_of(listing: Path) -> Iterator[Path]:
    """The images of a folder, also below it, in any order; or those that a text file lists."""
    if listing.is_dir():
        yield from (path for path in listing.rglob("*") if is_image_name(path.name))
    else:
        yield from (listing.parent / line.strip() for line in read_text(listing).split("\n") if line.strip())


def _label_file(image: Path, dataset: Path) -> Path:
    """Where an image's labels are: in labels/ for images/ (of the dataset, not above), else beside it."""
    parts = list(image.parts)
    root = os.path.abspath(dataset)  # as images are given: without ".."
    above = len(Path(root).parts) if image.is_relative_to(root) else 0
    for i in range(len(parts) - 2, above - 1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            return Path(*parts).with_suffix(".txt")
    within = image.parent / "labels" / f"{image.stem}.txt"
    return within if within.is_file() else image.with_suffix(".txt")
