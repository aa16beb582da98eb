"""COCO: a JSON file for each split and a folder of images, in the layouts of the tools that write it."""

import json
import math
import mmap
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ssd.data.annotations import Annotations
from ssd.data.builder import SPLITS, Builder, finite_numbers, number, read_text, split_names
from ssd.data.folders import (
    ANNOTATION_FOLDERS,
    dataset_of,
    files_of,
    image_folders,
    images_below,
    images_in,
    judge_unread,
    most_telling,
    speaks_of,
    split_of,
    subfolders,
)
from ssd.data.judge import NOT_A_BOX, UNKNOWN_CATEGORY, upright_sizes
from ssd.data.names import within
from ssd.data.outlines import Box, around_segmentation, turned
from ssd.errors import AnnotationError, as_line, shown

BAD_IMAGE = "bad image entry"
BAD_CATEGORY = "bad category"
SAME_ID = "duplicate image id"

_USUAL = ("_annotations.coco", "instances", "annotations", "labels", "result", "dataset", "coco")
"""What tools call the file where it is the only one, in lower case."""

_NO_BOXES = ("captions", "panoptic", "stuff", "densepose")
"""How COCO's files begin that hold no boxes of objects, and lie beside those that do."""

_UNNAMED = 7
"""From this rank on, no name tells the split; see `_rank`."""

_KEYPOINTS = 20
"""The rank of COCO's files of key points, which have boxes, too, where there are no others."""

_LEAST_BOXES = 2  # that reach outside, before all are taken for corners

_SNIFFED = 50  # files of a folder that are looked into; labelme keeps one for each image

_OTHERS = (
    ({"shapes", "imagePath"}, "labelme's, of one image; convert the folder, as by labelme2coco"),
    ({"data", "annotations"}, "Label Studio's own; export as COCO, YOLO or Pascal VOC there"),
    ({"image_id", "category_id", "score"}, "COCO's of detections, not of annotations"),
    ({"image", "annotations"}, "CreateML's; export as COCO"),
    ({"_via_img_metadata"}, "a project of VIA; export as COCO there"),
    ({"regions", "filename"}, "VIA's own; export as COCO there"),
)
"""What other JSON files are, by keys of theirs or of their first entry."""


# --- Which file, which folder -----------------------------------------------------------------------------


def is_at(path: Path) -> bool:
    """Whether a path is a JSON file, or a folder that holds a COCO file."""
    return _is_json(path) or any(_ranked(path, split) for split in SPLITS)


def has_split(path: Path, split: str) -> bool:
    """Whether a folder holds a COCO file for a split; a single file has only "train"."""
    return split == "train" if _is_json(path) else bool(_ranked(path, split))


def read(
    path: Path,
    split: str,
    images: Path | None,
    class_names: Sequence[str] | None,
    *,
    follow: bool = False,
) -> Annotations:
    """Read a split of a folder, or a single file, of which the split is not asked.

    Where `images` is not given, they are in that folder beside the file, or where its file names start from,
    that has the most of them.
    """
    file = path if _is_json(path) else _file(path, split)
    content = _content(file)
    names = [_written(each) for each in content["images"] if isinstance(each, dict)]
    folder = images or _folder(file, path, split, names, follow=follow)
    return _read_content(content, Builder(file, folder, follow=follow), class_names)


def _is_json(path: Path) -> bool:
    return path.suffix.lower() == ".json" and os.path.isfile(path)


def _file(root: Path, split: str) -> Path:
    """The file of a split.

    Raises:
        AnnotationError: there is none, or several might be.
    """
    ranked = _ranked(root, split)
    if not ranked:
        raise AnnotationError(f"{root}: there is no {split} split; {_told_files(root)}")
    best = min(ranked)
    files = ranked[best]
    if best >= _UNNAMED:  # which of several folders is meant no name tells, either
        firsts = {file.parent: file for rank in sorted(ranked, reverse=True) for file in ranked[rank][::-1]}
        files = [file for file in files if file.parent == files[0].parent]
        files += [file for folder, file in firsts.items() if folder != files[0].parent]
    if len(files) > 1 and best == 0:  # of several years, the last one whose images are there
        return next((file for file in files if _own_folders(file)), files[0])
    if len(files) > 1:
        several = ", ".join(str(file.relative_to(root)) for file in files[:10])
        raise AnnotationError(
            f"{root}: any of several files may be the {split} split: {several}; give the path of one, or of "
            f'its folder, or call it "{split}.json"'
        )
    return files[0]


def _told_files(root: Path) -> str:
    """What messages say of the files that are there."""
    found = {split: next(iter(_ranked(root, split).values()), []) for split in SPLITS}
    own = [f"{split} ({files[0].relative_to(root)})" for split, files in found.items() if files]
    others = [file for file in _json_files(root) if not any(file in files for files in found.values())]
    told = f"it has {', '.join(own)}" if own else "it has none"
    if others:
        names = ", ".join(str(file.relative_to(root)) for file in others[:5])
        told += f"; other JSON files: {names}{' ...' if len(others) > 5 else ''}"
    return told


def _standard_files(root: Path) -> list[Path]:
    """The JSON files of a folder and of those for annotations in it."""
    folders = [root, *(folder for name, folder in subfolders(root).items() if name in ANNOTATION_FOLDERS)]
    return [file for folder in folders for file in files_of(folder, ".json")]


def _json_files(root: Path) -> Iterator[Path]:
    """The JSON files of a folder, of the folders in it, and of those for annotations there."""
    yield from files_of(root, ".json")
    for name, folder in subfolders(root).items():
        yield from files_of(folder, ".json")
        for inner, deeper in subfolders(folder).items():
            if name in ANNOTATION_FOLDERS or inner in ANNOTATION_FOLDERS:
                yield from files_of(deeper, ".json")


def _ranked(root: Path, split: str) -> dict[int, list[Path]]:
    """The files that may be a split's, by how little their names tell it; see `_rank`."""
    standard = [file for file in _standard_files(root) if _rank(file, root, split) == 0]
    if standard:  # without a look into the folders of images
        # A name without a year comes before the latest year.
        year = {file: int(re.sub(r"\D", "", _bare(file)) or 9999) for file in standard}
        return {0: sorted(standard, key=lambda file: (file.parent != root, -year[file]))}
    files = list(_json_files(root))
    of_boxes = {file.parent for file in files if file.stem.lower().startswith("instances")}
    by_folder: dict[Path, list[tuple[int, Path]]] = defaultdict(list)
    for file in files:
        rank = _rank(file, root, split)
        if rank is not None and not (rank >= _KEYPOINTS and file.parent in of_boxes):
            by_folder[file.parent].append((rank, file))
    ranked: dict[int, list[Path]] = defaultdict(list)
    for some in by_folder.values():
        # The usual names are looked into first.
        some.sort(key=lambda each: (each[0], each[1].stem.lower() not in _USUAL, each[1].name))
        for rank, file in some[:_SNIFFED]:
            if _looks_like_coco(file):
                ranked[rank].append(file)
    return dict(sorted(ranked.items()))


def _bare(file: Path) -> str:
    """The name of a file, in lower case, without what says that it holds boxes."""
    beginning = r"^(instances|image_info|person_keypoints)_|^_?annotations\."
    return re.sub(beginning + r"|\.coco$", "", file.stem.lower())


def _rank(file: Path, root: Path, split: str) -> int | None:
    """How little the names of a file and of its folders tell that it is of a split.

    Returns:
        0 for a standard name in a standard place, 1 for a name that speaks of the split, from 4 where only
        that of a folder does, from `_UNNAMED` where nothing does, and more for COCO's other files; None where
        it is of another split, or holds no boxes.
    """
    stem, bare = file.stem.lower(), _bare(file)
    if stem.startswith(_NO_BOXES):
        return None
    other = 10 if stem.startswith("image_info") else _KEYPOINTS if stem.startswith("person_keypoints") else 0
    above = [folder for folder in file.parents if folder.is_relative_to(root) and folder != root]
    standard = not above or (len(above) == 1 and above[0].name.lower() in ANNOTATION_FOLDERS)
    names = "|".join(map(re.escape, split_names(split)))
    if standard and not other and re.fullmatch(rf"({names})\d*", bare, re.IGNORECASE):
        return 0
    usual = 0 if stem.startswith("instances") else 1 if stem in _USUAL else 2
    for distance, name in enumerate([bare, *(folder.name for folder in above)]):
        if speaks_of(name, split):
            return other + 1 + (3 + usual if distance else 0)
        if split_of(name):
            return None
    return other + _UNNAMED + usual if split == "train" else None


def _looks_like_coco(file: Path) -> bool:
    """Whether a JSON file speaks of images and categories, as far as words tell."""
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
            return wide or (content.find(b'"images"') >= 0 and content.find(b'"categories"') >= 0)
    except (OSError, ValueError):  # the latter of an empty file
        return False


def _own_folders(file: Path) -> list[Path]:
    """Folders that are called like the file."""
    bare = _bare(file)
    return [each for each in image_folders(dataset_of(file), [bare]) if each.name.lower() == bare]


def _folder(file: Path, root: Path, split: str, names: Sequence[str], *, follow: bool) -> Path:
    """The folder of a file's images.

    Args:
        file: the annotation file.
        root: the dataset's folder, or the file, if it was given by itself.
        split: which it is.
        names: of the images, as the file has them.
        follow: whether those may lead out.
    """
    base = dataset_of(file)
    titles = [_bare(file), *split_names(split)]
    titles += [file.parent.name] if file.parent.name.lower() not in ANNOTATION_FOLDERS else []
    found = list(image_folders(base, titles))
    # Names may start from a folder above.
    above = [file.parent, *(each for each in [file.parent.parent] if each.is_relative_to(root))]
    best = most_telling([*found, *above], names, follow=follow)
    # Where none is in its place, the message names a folder that should have them.
    return found[0] if best is None else best


# --- What it says -----------------------------------------------------------------------------------------


def _content(file: Path) -> dict[str, Any]:
    """The lists of a COCO file; None for annotations that are not there, as in a test set's.

    Raises:
        AnnotationError: it is none.
    """
    text = read_text(file)
    if not text or text.isspace():
        raise AnnotationError(f"{file}: not a JSON file, but an empty one")
    try:
        content = _parsed(text)
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{file}: not a JSON file ({error})") from error
    what = f'{file}: a COCO file has the lists "images", "annotations" and "categories"'
    found = content if isinstance(content, dict) else {}
    found.setdefault("annotations", None)
    kinds = {"images": list, "annotations": list | None, "categories": list}
    lost = [key for key, kind in kinds.items() if not isinstance(found.get(key), kind)]
    if "images" in lost:
        what += f"; this one {_what_else(content)}"
    elif lost:
        what += f"; this one has no {' and no '.join(lost)}"
    if lost:
        raise AnnotationError(what)
    return found


def _parsed(text: str) -> Any:
    """What JSON says.

    Raises:
        ValueError, RecursionError: it is none.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python refuses integers of thousands of digits; what holds infinity is told
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 999 else math.inf)


def told_apart(file: Path) -> str:
    """What messages say of a JSON file of another tool that is known; empty for any other file."""
    try:
        content = _parsed(read_text(file))
    except (AnnotationError, ValueError, RecursionError):
        return ""
    return _of_another(content)


def _what_else(content: object) -> str:
    """What messages say of a JSON file that is none of COCO's."""
    has_none = "has no images" if isinstance(content, dict) else "is no object, but a list or a value"
    return _of_another(content) or has_none


def _of_another(content: object) -> str:
    first: object = content
    if isinstance(content, list) and content:
        first = content[0]
    candidates = [content, first, *(list(content.values())[:1] if isinstance(content, dict) else [])]
    for each in candidates:
        told = next((told for keys, told in _OTHERS if isinstance(each, dict) and keys <= each.keys()), None)
        if told:
            return f"seems to be {told}"
    return ""


def _read_content(
    content: dict[str, Any], builder: Builder, class_names: Sequence[str] | None
) -> Annotations:
    entries = content["annotations"] or []
    used = {_key(entry.get("category_id")) for entry in entries if isinstance(entry, dict)}
    categories = _classes(content["categories"], used, builder, class_names)
    indices = _images(content["images"], entries, builder)
    seen: Counter[str] = Counter()
    wrong = "in parts of the image" if _are_fractions(entries) else ""
    if not wrong and _are_corners(entries, indices, content["images"], builder):
        wrong = "corners (xyxy)"
    for place, entry in enumerate(entries):
        if isinstance(entry, dict):
            tag = _key(entry.get("id", f"#{place}"))
            seen[tag] += 1
            _annotation(entry, tag, indices, categories, builder, wrong=wrong)
        else:
            builder.problem(NOT_A_BOX, str(builder.source), f"#{place}", "is not an object")
    unlabelled = content["annotations"] is None
    content.clear()  # of a large file it takes more memory than all that is kept of it
    del entries
    twice = [tag for tag, count in seen.items() if count > 1]
    if twice:
        message = f"{len(twice)} annotation ids are used more than once, as {twice[0]}; they are told apart"
        builder.problem("duplicate annotation id", str(builder.source), "", message, fatal=False)
    if unlabelled:
        builder.note(
            f"{builder.source} has no annotations: all its {len(builder.names)} images are unlabelled"
        )
    _note_unlisted(builder)
    judge_unread(builder)
    return builder.build()


def _note_unlisted(builder: Builder) -> None:
    """Note images that lie among those that are listed."""
    root = builder.root
    if root == dataset_of(builder.source):  # of which only some folders may be this split's
        folders = sorted({os.path.dirname(name) for name in builder.names if within(name.split("/"))})
        there = [os.path.join(folder, name) for folder in folders for name in images_in(root / folder)]
    else:
        there = images_below(root)
    unlisted = sorted(set(there) - set(builder.names))
    if unlisted:
        builder.note(
            f"{len(unlisted)} images in {root} are not in {builder.source.name}, such as {unlisted[0]}, and "
            "not used"
        )


def _key(value: object) -> str:
    """An id as text: files have "1" in one place and 1, or 1.0, in another."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, str | int | float) else shown(value)


class _Category(NamedTuple):
    name: str
    label: int | None
    """As `Builder.set_classes` gives it."""


def _classes(
    categories: list[Any], used: set[str], builder: Builder, class_names: Sequence[str] | None
) -> dict[str, _Category]:
    """The category of each id that is of one only."""
    names: dict[str, str] = {}
    groups = {_key(each.get("supercategory")) for each in categories if isinstance(each, dict)}
    unclear: set[str] = set()
    for place, category in enumerate(categories):
        if not isinstance(category, dict) or category.get("id") is None:
            message = f"category {place} has no id: {shown(category)}"
            builder.problem(BAD_CATEGORY, str(builder.source), "", message, fatal=False)
            continue
        key = _key(category["id"])
        name = _key(category["id"] if category.get("name") is None else category["name"]).strip()
        if key not in used and _is_no_class(category, name, groups):
            continue
        if names.setdefault(key, name) != name:
            message = f"the category id {key} is that of {shown(names[key])} and of {shown(name)}"
            builder.problem(BAD_CATEGORY, str(builder.source), "", message, fatal=key in used)
            unclear.add(key)
    if categories and not names:
        raise AnnotationError(f"{builder.source}: {_why_no_categories(categories)}")
    if all(map(_is_whole, names)):
        names = dict(sorted(names.items(), key=lambda item: int(item[0])))
        category_ids = tuple(map(int, names))
    else:
        category_ids = tuple(range(1, len(names) + 1))
    labels = builder.set_classes(list(names.values()), category_ids, class_names)
    found = {key: _Category(names[key], label) for key, label in zip(names, labels, strict=True)}
    return {key: category for key, category in found.items() if key not in unclear}


def _why_no_categories(categories: list[Any]) -> str:
    """Why no class comes of categories."""
    shape = 'COCO has {"id": 1, "name": "cat"}'
    no_object = next((each for each in categories if not isinstance(each, dict)), None)
    if no_object is not None:
        return f"its categories are no objects, but {_as_json(no_object)}; {shape}"
    without = next((each for each in categories if each.get("id") is None), None)
    if without is not None:
        return f"its categories have no id, as {_as_json(without)}; {shape}"
    return f"nothing uses its categories, and none names a class, as {_as_json(categories[0])}"


def _as_json(value: object) -> str:
    """The beginning of a value as JSON, of which no more is made."""
    return as_line("".join(islice(json.JSONEncoder().iterencode(value), 40))[:100])


def _is_no_class(category: dict[str, Any], name: str, groups: set[str]) -> bool:
    """Whether a category that nothing uses is no class: without a name, the background, or a group."""
    if category.get("name") is None or name.lower().strip("_ ") in ("background", "ignore", ""):
        return True
    # Roboflow lists the group of its classes as category 0, often under the name of one of them.
    return name in groups and _key(category.get("supercategory")) != name


def _written(image: dict[str, Any]) -> str:
    """The name of an image as it is written; LVIS has its URL only."""
    name = image.get("file_name") or image.get("coco_url")
    return _key(name) if name and isinstance(name, str | int | float) else ""


def _images(images: list[Any], annotations: list[Any], builder: Builder) -> dict[str, int | None]:
    """The index of each image id; None of an id that several images have."""
    names: dict[str, list[str]] = defaultdict(list)
    sound = []
    for place, entry in enumerate(images):
        found = entry if isinstance(entry, dict) else {}
        if not _written(found) or not isinstance(found.get("id"), str | int | float):
            message = f"image entry {place} has no file_name or id: {shown(entry)}"
            builder.problem(BAD_IMAGE, str(builder.source), "", message)
            continue
        sound.append(found)
        names[_key(found["id"])].append(_written(found))
    several = {key: sorted(set(each))[:2] for key, each in names.items() if len(set(each)) > 1}
    counts = Counter(_key(each.get("image_id")) for each in annotations if several and isinstance(each, dict))
    indices: dict[str, int | None] = {}
    for entry in sound:
        key, name = _key(entry["id"]), _written(entry)
        if key in several:
            indices[key] = None
            other = next(each for each in several[key] if each != name)
            message = (
                f"its id {key} is also that of {as_line(other, 200)}; to which of them its {counts[key]} "
                "annotations belong cannot be told. Give each image an id of its own"
            )
            builder.problem(SAME_ID, as_line(name), "", message)
        elif key in indices:
            builder.problem(SAME_ID, as_line(name), "", f"is listed twice with the id {key}", fatal=False)
        else:
            indices[key] = builder.add_image(name, entry["id"], entry.get("width"), entry.get("height"))
    return indices


def _annotation(
    entry: dict[str, Any],
    tag: str,
    indices: dict[str, int | None],
    categories: dict[str, _Category],
    builder: Builder,
    *,
    wrong: str,
) -> None:
    """Add an annotation, or what is wrong with it; `wrong` says what all boxes are that are not COCO's."""
    key = _key(entry.get("image_id"))
    if key not in indices:
        message = f"its image_id {shown(entry.get('image_id'))} is no image's"
        builder.problem("unknown image id", str(builder.source), tag, message)
        return
    image = indices[key]
    if image is None:
        return  # told with the image
    category = categories.get(_key(entry.get("category_id")))
    if category is None:
        message = f"its category_id {shown(entry.get('category_id'))} is not that of a category"
        builder.problem(UNKNOWN_CATEGORY, builder.names[image], tag, message)
        return
    box = _box(entry)
    if box is None:
        message = f"its bbox {shown(entry.get('bbox'))} is not four finite numbers"
        if entry.get("segmentation"):
            message += ", and its segmentation is no mask and no polygons of three points or more"
        builder.problem(NOT_A_BOX, builder.names[image], tag, message)
        return
    if wrong:
        message = f"its bbox {shown(entry.get('bbox'))} seems to be {wrong}, as all are"
        builder.problem(
            NOT_A_BOX, builder.names[image], tag, f"{message}; COCO has x, y, width, height in pixels"
        )
        return
    area = finite_numbers([entry.get("area")], 1)
    crowd = entry.get("iscrowd") in (1, "1")
    builder.add_box(
        image,
        tag,
        box,
        category.label,
        category=category.name,
        crowd=crowd,
        area=area[0] if area else None,
    )


def _box(entry: dict[str, Any]) -> Box | None:
    """The box of an annotation, xyxy: that of its segmentation where it has none with an area itself."""
    given = _four(entry.get("bbox"))
    if given is None or 0 in given[2:]:
        # Some tools leave bbox out, or empty, or at 0, 0, 0, 0.
        around = around_segmentation(entry.get("segmentation"))
        if around is not None or given is None:
            return around
    left, top, width, height = given
    box = (left, top, left + width, top + height)
    attributes = entry.get("attributes")
    rotation = attributes.get("rotation") if isinstance(attributes, dict) else None
    if rotation is None:
        return box
    degrees = finite_numbers([number(rotation) if isinstance(rotation, str) else rotation], 1)
    return turned(box, degrees[0]) if degrees else box


def _are_fractions(entries: list[Any]) -> bool:
    """Whether all boxes are within the first pixel, even as corners, and not of whole numbers only."""
    boxes = (_four(entry.get("bbox")) for entry in entries if isinstance(entry, dict))
    found = False
    for box in filter(None, boxes):
        if max(box) > 1.001:
            return False
        found = found or not all(value.is_integer() for value in box)
    return found


def _are_corners(
    entries: list[Any], indices: dict[str, int | None], images: list[Any], builder: Builder
) -> bool:
    """Whether all boxes seem to be xyxy: by the areas that are given, or as else many would reach outside."""
    boxes: list[tuple[float, ...]] = []
    keys: list[str] = []
    asked, as_corners, as_sides = 0, 0, 0
    for entry in entries:
        box = _four(entry.get("bbox")) if isinstance(entry, dict) else None
        if box is None:
            continue
        left, top, right, bottom = box
        if right <= left or bottom <= top or min(left, top) < -1:
            return False
        area = finite_numbers([entry.get("area")], 1)
        if area and area[0] > 0:
            asked += 1
            as_corners += math.isclose(area[0], (right - left) * (bottom - top), rel_tol=1e-3, abs_tol=0.01)
            as_sides += math.isclose(area[0], right * bottom, rel_tol=1e-3, abs_tol=0.01)
        boxes.append(box)
        keys.append(_key(entry.get("image_id")))
    if 2 * max(as_corners, as_sides) > asked and as_corners != as_sides:
        return as_corners > as_sides
    if len(boxes) < _LEAST_BOXES:
        return False
    sizes = _sizes(set(keys), indices, images, builder)
    outside = 0
    for (left, top, right, bottom), key in zip(boxes, keys, strict=True):
        width, height = sizes.get(key, (math.inf, math.inf))
        if right > width + 1 or bottom > height + 1:
            return False
        outside += left + right > width + 1 or top + bottom > height + 1
    return outside >= max(_LEAST_BOXES, len(boxes) / 3)


def _sizes(
    keys: set[str], indices: dict[str, int | None], images: list[Any], builder: Builder
) -> dict[str, tuple[float, ...]]:
    """Width and height of images by their ids, as the file says them, or else the images."""
    entries = {_key(each.get("id")): each for each in images if isinstance(each, dict)}
    sizes = {}
    for key in keys & entries.keys():
        index = indices.get(key)
        size = finite_numbers([entries[key].get("width"), entries[key].get("height")], 2)
        unknown = not (size and min(size) >= 1)
        path = None if index is None or not unknown else builder.path(index)
        if path is not None:
            size = upright_sizes([path])[0]
        if size and min(size) >= 1:
            sizes[key] = size
    return sizes


def _four(value: object) -> tuple[float, ...] | None:
    """Four finite numbers, also as text."""
    found = finite_numbers(value, 4)
    if found is None and isinstance(value, str):
        value = re.split(r"[\s,;]+", value.strip(" []()"))
    if found is None and isinstance(value, list) and any(isinstance(each, str) for each in value):
        found = finite_numbers([number(each) if isinstance(each, str) else each for each in value], 4)
    return found


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isascii() and text.removeprefix("-").isdigit() and len(text) < 19
