"""COCO: a JSON file for each split and a folder of images; also as Roboflow, CVAT, Label Studio write it."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssd.data.annotations import Annotations
from ssd.data.builder import SPLITS, Builder, finite_numbers, split_names, stays_inside
from ssd.data.judge import NOT_A_BOX, UNKNOWN_CATEGORY, is_without_images
from ssd.errors import AnnotationError


def is_at(path: Path) -> bool:
    """Whether a path is a JSON file, or a folder that holds a COCO file for one of the usual splits."""
    return _is_json(path) or any(_find(path, split) for split in SPLITS)


def has_split(path: Path, split: str) -> bool:
    """Whether a folder holds a COCO file for a split; a single file has only "train"."""
    return split == "train" if _is_json(path) else _find(path, split) is not None


def read(path: Path, split: str, images: Path | None, class_names: Sequence[str] | None) -> Annotations:
    """Read a split of a folder, or a single file, of which the split is not asked.

    Where `images` is not given, they are looked for beside the file, and where its file names start from.
    """
    found = (path, _images_beside(path)) if _is_json(path) else _find(path, split)
    if found is None:
        others = ", ".join(other for other in SPLITS if _find(path, other))
        raise AnnotationError(f"{path}: there is no {split} split; it has {others}")
    file, beside = found
    if images is not None:
        return read_file(file, images, class_names)
    annotations = read_file(file, beside, class_names)
    if len(annotations) and is_without_images(annotations):
        first = str(annotations.file_names[0])
        other = next((each for each in (file.parent, file.parent.parent) if (each / first).is_file()), None)
        annotations = read_file(file, other, class_names) if other else annotations
    return annotations


def read_file(file: Path, folder: Path, class_names: Sequence[str] | None = None) -> Annotations:
    """Read a COCO JSON file whose images are in a folder; see `ssd.data.load`."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{file}: not a JSON file ({error})") from error
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise AnnotationError(f'{file}: a COCO file has the lists "images", "annotations" and "categories"')

    builder = Builder(file, folder)
    used = {str(entry.get("category_id")) for entry in content["annotations"] if isinstance(entry, dict)}
    labels = _classes(content["categories"], used, builder, class_names)
    indices = _images(content["images"], builder)
    seen: Counter[str] = Counter()
    for number, entry in enumerate(content["annotations"]):
        if isinstance(entry, dict):
            tag = str(entry.get("id", f"#{number}"))
            seen[tag] += 1
            _annotation(entry, tag, indices, labels, builder)
        else:
            builder.problem(NOT_A_BOX, str(file), f"#{number}", "is not an object")
    twice = [tag for tag, count in seen.items() if count > 1]
    if twice:
        message = f"{len(twice)} annotation ids are used more than once, as {twice[0]}; they are told apart"
        builder.problem("duplicate annotation id", str(file), "", message, fatal=False)
    return builder.build()


def _is_json(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".json"


def _find(root: Path, split: str) -> tuple[Path, Path] | None:
    """The JSON file of a split and its image folder, if a folder holds COCO annotations for it."""
    files = _files(root, split)
    for file in files:
        stem = file.stem.removeprefix("instances_")
        base = root if file.parent.name == "annotations" else file.parent
        if file.name == "_annotations.coco.json":
            return file, file.parent
        names = (stem, *split_names(split))
        folders = [base / above / name for name in names for above in ("", "images")] + [base / "images"]
        for folder in folders:
            if folder.is_dir():
                return file, folder
    return (files[0], root / split) if files else None  # all of its images are missing, then


def _files(root: Path, split: str) -> list[Path]:
    """The files that may be a split's, most telling first."""
    found = []
    for name in split_names(split):
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


def _classes(
    categories: list[Any], used: set[str], builder: Builder, class_names: Sequence[str] | None
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


def _images(images: list[Any], builder: Builder) -> dict[str, int]:
    """The index of each image id, as text."""
    indices: dict[str, int] = {}
    for number, image in enumerate(images):
        if not isinstance(image, dict) or "file_name" not in image or "id" not in image:
            message = f"image entry {number} has no file_name or id"
            builder.problem("bad image entry", str(builder.source), "", message)
            continue
        key, name = str(image["id"]), str(image["file_name"])
        if not stays_inside(name):
            raise AnnotationError(
                f"{builder.source}: the file name {name!r} (image {key}) leads out of {builder.root}"
            )
        if key in indices:
            builder.problem("duplicate image id", name, "", f"its id {key} is also another image's")
        else:
            indices[key] = builder.add_image(name, image["id"], image.get("width"), image.get("height"))
    return indices


def _annotation(
    entry: dict[str, Any], tag: str, indices: dict[str, int], labels: dict[str, int], builder: Builder
) -> None:
    image = indices.get(str(entry.get("image_id")))
    label = labels.get(str(entry.get("category_id")))
    box = finite_numbers(entry.get("bbox"), 4)
    if image is None:
        message = f"its image_id {entry.get('image_id')!r} is no image's"
        builder.problem("unknown image id", str(builder.source), tag, message)
    elif label is None:
        message = f"its category_id {entry.get('category_id')!r} is no category's"
        builder.problem(UNKNOWN_CATEGORY, builder.names[image], tag, message)
    elif box is None:
        message = f"its bbox {str(entry.get('bbox'))[:60]} is not four finite numbers"
        builder.problem(NOT_A_BOX, builder.names[image], tag, message)
    else:
        left, top, width, height = box
        area = finite_numbers([entry.get("area")], 1)
        builder.add_box(
            image,
            tag,
            (left, top, left + width, top + height),
            label,
            crowd=entry.get("iscrowd") in (1, "1"),
            area=area[0] if area else None,
        )


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isascii() and text.removeprefix("-").isdigit() and len(text) < 19
