"""Pascal VOC: an XML file for each image, whose lists of names make the splits; or beside the images."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ssd.data.annotations import Annotations
from ssd.data.builder import Builder, finite_numbers, number, read_text, split_names, stays_inside
from ssd.data.judge import NOT_A_BOX, UNKNOWN_CATEGORY
from ssd.errors import AnnotationError
from ssd.images import SUFFIXES


def is_at(path: Path) -> bool:
    """Whether a folder holds XML files where VOC has them, or in folders of their own.

    Raises:
        AnnotationError: it holds several datasets.
    """
    return _folder(path) is not None or any(path.glob("*/*.xml"))


def has_split(path: Path, split: str) -> bool:
    """Whether there are XML files of a split."""
    try:
        return bool(_files(path, split))
    except AnnotationError:
        return False


def read(path: Path, split: str, images: Path | None, class_names: Sequence[str] | None) -> Annotations:
    """Read a split of a Pascal VOC dataset, or of one that has XML files beside the images.

    Corners count from 1 and are part of the box, as in VOC's own files.
    """
    folder, files, every = _files(path, split)
    if images is None:
        beside = [folder.parent / name for name in ("JPEGImages", "images", "Images")]
        images = next((each for each in beside if each.is_dir()), folder)
    trees = {file: _read_xml(file) for file in {*every, *files}}
    found = {(each.findtext("name") or "").strip() for tree in trees.values() for each in tree.iter("object")}
    builder = Builder(folder, images, follow_links=True)
    ordered = sorted(found - {""})
    numbers = builder.set_classes(ordered, tuple(range(1, len(ordered) + 1)), class_names)
    labels = dict(zip(ordered, numbers, strict=True))
    for file in files:
        tree = trees[file]
        name = _image_name(images, file.stem, tree.findtext("filename") or "")
        size = [number(tree.findtext(f"size/{side}")) for side in ("width", "height")]
        index = builder.add_image(name, file.stem, *size)
        for count, entry in enumerate(tree.iter("object"), start=1):
            _object(entry, f"{file.name}:{count}", index, labels, builder)
    return builder.build()


def _image_name(images: Path, stem: str, written: str) -> str:
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


def _folder(root: Path) -> Path | None:
    """The folder of annotations; of a devkit, that of its only year."""
    for pattern in ("Annotations", "annotations", "*/Annotations"):
        found = [folder for folder in root.glob(pattern) if any(folder.glob("*.xml"))]
        if len(found) > 1:
            years = ", ".join(str(folder.parent) for folder in found)
            raise AnnotationError(f"{root}: holds several datasets; give one of {years}")
        if found:
            return found[0]
    return root if any(root.glob("*.xml")) else None


def _files(root: Path, split: str) -> tuple[Path, list[Path], list[Path]]:
    """The folder of annotations, the files of a split, and all files, which tell the classes."""
    names = split_names(split)
    folder = _folder(root)
    if folder is None:
        folder = next((root / name for name in names if (root / name).is_dir()), root / split)
        files, every = sorted(folder.glob("*.xml")), sorted(root.glob("*/*.xml"))
    else:
        every = sorted(folder.glob("*.xml"))
        lists = folder.parent / "ImageSets" / "Main"
        wanted = (*names, "trainval") if split == "train" else names
        chosen = next((lists / f"{name}.txt" for name in wanted if (lists / f"{name}.txt").is_file()), None)
        if chosen is not None:
            stems = [line.split()[0] for line in read_text(chosen).splitlines() if line.split()]
            files = [folder / f"{stem}.xml" for stem in stems if stays_inside(stem)]
        else:
            files = every if split == "train" and not lists.is_dir() else []
    if not files:
        raise AnnotationError(f"{root}: there is no {split} split")
    return folder, files, every


def _object(entry: ET.Element, tag: str, image: int, labels: dict[str, int], builder: Builder) -> None:
    label = labels.get((entry.findtext("name") or "").strip())
    corners = [number(entry.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
    box = finite_numbers(corners, 4)
    if label is None:
        builder.problem(UNKNOWN_CATEGORY, builder.names[image], tag, "the object has no name")
    elif box is None:
        message = f"its bndbox {corners} is not four finite numbers"
        builder.problem(NOT_A_BOX, builder.names[image], tag, message)
    else:
        difficult = (entry.findtext("difficult") or "0").strip() == "1"
        left, top, right, bottom = box
        builder.add_box(image, tag, (left - 1, top - 1, right, bottom), label, crowd=difficult)


def _read_xml(file: Path) -> ET.Element:
    try:
        return ET.parse(file).getroot()
    except FileNotFoundError:
        raise AnnotationError(f"{file}: listed in ImageSets, but there is no such file") from None
    except (ET.ParseError, ValueError, LookupError) as error:  # the latter of unknown encodings
        raise AnnotationError(f"{file}: not an XML file ({error})") from error
