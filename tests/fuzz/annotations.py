"""Datasets as COCO, VOC and YOLO write them: values, names and files that are wrong."""

import io
import json
import random
import xml.etree.ElementTree as ET
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fuzz.engine import OUTSIDE, Case, some_bytes
from ssd.check import check_dataset, read_splits
from ssd.data import DetectionDataset
from ssd.data.annotations import Annotations
from ssd.data.judge import lost_images
from ssd.errors import AnnotationError, ImageError, UserError

_OUT = OUTSIDE.decode()
NAMES = (
    *("", " ", "/", "//", ".", "..", "a.jpg", "b.jpg", "A.JPG", "a", "a.png", "x/a.jpg", "a.jpg/", "./a.jpg"),
    *(
        "12:30:00.png",
        "a:b/c.jpg",
        "C:\\x\\a.jpg",
        "C:a.jpg",
        "http:a.jpg",
        "x::y.jpg",
        "a%2ejpg",
        "a\\b.jpg",
    ),
    *("a\0.jpg", "\ud800.jpg", "\x1b[31m.jpg", "a\nb.jpg", "\u202egpj.a", "x" * 300 + ".jpg", "y/" * 3000),
    *(
        f"{_OUT}/marker.jpg",
        f"file://{_OUT}/marker.jpg",
        f"/proc/self/cwd/..{_OUT}/marker.heic",
        "/etc/passwd",
    ),
    *(
        "../outside/marker.jpg",
        "..\\outside\\marker.jpg",
        "%2e%2e/outside/marker.jpg",
        "../outside/marker.heic",
    ),
    *("~", "null", "http://127.0.0.1:9/a.jpg", "s3://a/a.jpg", "/data/local-files/?d=../outside/marker.jpg"),
)
"""Of images, folders and classes, as nobody should write them."""

NUMBERS = (
    *(0, 1, -1, 0.5, 1.0, 2, 99, 1e9, -1e9, 1e308, 1e999, -1e999, float("nan"), 2**31, 2**63, 10**400),
    *(True, False, None, "", "1", "1e5", "nan", "٣", "1_0", "x", [], {}, [1], [[]], {"a": 1}, "9" * 5000),
)
"""In the place of a number, also what is none."""

_XML = (
    "<annotation><filename>{name}</filename><size><width>40</width><height>30</height></size><object>"
    "<name>{of}</name><difficult>0</difficult><bndbox><xmin>5</xmin><ymin>6</ymin><xmax>25</xmax>"
    "<ymax>20</ymax></bndbox></object><object><name>dog</name><polygon><x1>1</x1><y1>2</y1><x2>9</x2><y2>3</y2>"
    "<x3>8</x3><y3>9</y3></polygon></object></annotation>"
)
_YAML = "path: .\ntrain: images/train\nval: val.txt\nnc: 2\nnames:\n  0: cat\n  1: dog\n"


def picture() -> bytes:
    """An image file of 40x30."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def yolo() -> Case:
    """A YOLO dataset, with a folder of images to train on, and a list of those to evaluate on."""
    image, label = picture(), b"0 0.5 0.5 0.2 0.4\ndog 0.4 0.4 0.1 0.1 0.9 0.9\n1,0.2,0.2,0.1,0.1\n"
    files = {f"images/train/{name}.jpg": image for name in "ab"} | {"images/val/c.jpg": image}
    labels = {f"labels/train/{name}.txt": label for name in "ab"} | {"labels/val/c.txt": label}
    return {**files, **labels, "val.txt": b"images/val/c.jpg\n", "data.yaml": _YAML.encode()}


def seeds() -> list[Case]:
    image = picture()
    segmentation: Any = [[5, 6, 25, 6, 25, 20]]
    entries = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 6, 20, 14], "area": 280, "iscrowd": 0},
        {"id": 2, "image_id": 2, "category_id": 3, "bbox": [], "segmentation": segmentation},
        {
            "id": 3,
            "image_id": 2,
            "category_id": 3,
            "segmentation": {"counts": [31, 4, 1165], "size": [30, 40]},
        },
    ]
    coco = {
        "images": [
            {"id": i, "file_name": f"{name}.jpg", "width": 40, "height": 30} for i, name in enumerate("ab", 1)
        ],
        "annotations": entries,
        "categories": [{"id": 1, "name": "cat", "supercategory": "pets"}, {"id": 3, "name": "dog"}],
    }
    voc = {f"Annotations/{name}.xml": _XML.format(name=f"{name}.jpg", of="cat").encode() for name in "abc"}
    lists = {"ImageSets/Main/train.txt": b"a\nb\n", "ImageSets/Main/val.txt": b"c\n"}
    return [
        {"train.json": json.dumps(coco).encode(), "train/a.jpg": image, "train/b.jpg": image},
        {**voc, **lists, **{f"JPEGImages/{name}.jpg": image for name in "abc"}},
        yolo(),
    ]


def mutate(rng: random.Random, case: Case) -> Case:
    new = dict(case)
    for _ in range(rng.choice((1, 1, 2, 4))):
        texts = sorted(name for name in new if not name.endswith((".jpg", "/", "@")))
        name = rng.choice(texts) if texts and rng.random() < 0.9 else rng.choice(sorted(new) or ["a.json"])
        content = new.get(name, b"")
        if rng.random() < 0.1 or name.endswith(("/", "@")):
            move(rng, new, name)
        elif rng.random() < 0.15:
            new[name] = some_bytes(rng, content)
        elif name.endswith(".json"):
            new[name] = _of_json(rng, content)
        elif name.endswith(".xml"):
            new[name] = _of_xml(rng, content)
        else:
            new[name] = of_lines(rng, content)
    return new


def move(rng: random.Random, case: Case, name: str) -> None:
    """Put something else in the place of a file, or the file in another place."""
    content = case.pop(name, b"")
    plain = name.rstrip("/@")
    way = rng.randrange(6)
    if way == 0:
        case[f"{plain}/"] = b""
    elif way == 1:
        case[f"{plain}@"] = rng.choice(
            (b"nowhere", plain.rsplit("/", 1)[-1].encode(), b"/dev/zero", b".", b"/")
        )
    elif way == 2:
        case[f"{plain.rsplit('.', 1)[0]}{rng.choice(('.TXT', '.xml', '.json', '.heic', ''))}"] = content
    elif way == 3:
        case[f"{rng.choice(('a', 'train', 'labels', 'x'))}/{plain}"] = content
    elif way == 4:
        case[plain] = b""
    for each in [each for each in case if each.startswith(f"{plain}/") and each != f"{plain}/"]:
        case.pop(each)  # no folder can be where a file is
    parents = {"/".join(each.split("/")[:i]) for each in case for i in range(1, each.count("/") + 1)}
    for each in parents:
        if f"{each}/" not in case:
            case.pop(each, None)
            case.pop(f"{each}@", None)


def of_lines(rng: random.Random, content: bytes) -> bytes:
    """Lines and words of a text file otherwise."""
    lines = content.decode(errors="replace").split("\n")
    at = rng.randrange(len(lines))
    words = lines[at].split(" ")
    way = rng.randrange(5)
    if way == 0:
        lines[at] = rng.choice(NAMES)
    elif way == 1:
        lines[at:at] = lines[at : at + 1] * rng.choice((1, 3, 200))
    elif way == 2:
        del lines[at]
    else:
        values = (*NAMES, *map(str, NUMBERS)) if way == 3 else tuple(map(str, (0.5, 1, 0, -1, 1e9)))
        words[rng.randrange(len(words))] = rng.choice(values)
        lines[at] = " ".join(words)
    return "\n".join(lines).encode(errors="surrogatepass")


def _of_json(rng: random.Random, content: bytes) -> bytes:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return some_bytes(rng, content)
    places: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        each = waiting.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        places += [(each, key) for key in keys]
        waiting += [each[key] for key in keys]
    if not places:
        return some_bytes(rng, content)
    parent, key = rng.choice(places)
    way = rng.randrange(7)
    if way == 0:
        del parent[key]
    elif way == 1 and isinstance(parent, list):
        parent[key:key] = [deepcopy(parent[key])] * rng.choice((1, 2, 100))
    elif way == 2:
        other, place = rng.choice(places)
        parent[key] = deepcopy(other[place])
    elif way == 3:
        parent[key] = [deepcopy(parent[key])]
    else:
        parent[key] = rng.choice(NAMES if way == 4 or isinstance(parent[key], str) else NUMBERS)
    return json.dumps(tree).encode()[: 1 << 20]


def _of_xml(rng: random.Random, content: bytes) -> bytes:
    try:
        tree = ET.fromstring(content)
    except (ET.ParseError, ValueError):
        return some_bytes(rng, content)
    parents = [each for each in tree.iter() if len(each)]
    if not parents:
        return some_bytes(rng, content)
    parent = rng.choice(parents)
    at = rng.randrange(len(parent))
    way = rng.randrange(6)
    if way == 0:
        del parent[at]
    elif way == 1:
        parent[at:at] = [deepcopy(parent[at]) for _ in range(rng.choice((1, 2, 100)))]
    elif way == 2:
        parent[at] = deepcopy(rng.choice(list(tree.iter())))
    elif way == 3:
        parent[at].tag = rng.choice(("object", "name", "bndbox", "annotation", "path", "filename", "x1"))
    else:
        text = str(rng.choice(NAMES if way == 4 else NUMBERS))
        parent[at].text = "".join(each for each in text if each >= " " and not "\ud800" <= each <= "\udfff")
    return ET.tostring(tree)[: 1 << 20]


_MOST_ITEMS = 20  # that are looked at


def promise(case: Case, folder: Path) -> str:
    """A dataset is read, with files in its folder and boxes in their images, or refused in a few short lines;
    what the check does not refuse is trained on."""
    try:
        splits, unread = read_splits(folder)
    except (UserError, FileNotFoundError) as error:
        _require_shown(str(error))
        return "refused"
    report = check_dataset(splits, unread=unread)
    _require_shown(str(report), lines=10_000)
    json.dumps(report.to_dict())
    for annotations in splits.values():
        _require_sound(annotations, folder)
    if "train" not in splits:
        return "refused"
    refused = any(
        problem.fatal for split in report.splits if split.name == "train" for problem in split.problems
    )
    try:
        _require_items(DetectionDataset(splits["train"]))
    except (AnnotationError, ImageError) as error:
        _require_shown(str(error))
        assert refused, f"the check found nothing, but training says {error}"
    else:
        seen = 2 <= len(splits["train"]) <= _MOST_ITEMS and splits["train"].usable.any()
        assert not refused or not seen, report
    try:
        _require_items(DetectionDataset(splits["train"], lenient=True))
    except (AnnotationError, ImageError) as error:
        _require_shown(str(error))
        return "read, not lenient"
    return "read, with problems" if refused else "read"


def _require_shown(text: str, lines: int = 30) -> None:
    parts = text.split("\n")
    assert len(parts) <= lines
    for line in parts:
        assert len(line) <= 1000, f"a line of {len(line)} characters: {line[:300]}"
        line.encode()
        assert not any((each < " " and each != "\t") or each in "\x7f\x9b\u202e" for each in line), repr(line)


def _require_sound(annotations: Annotations, folder: Path) -> None:
    assert np.isfinite(annotations.boxes).all()
    assert np.isfinite(annotations.areas).all()
    assert (annotations.labels >= 1).all()
    assert (annotations.labels <= len(annotations.class_names)).all()
    lost = lost_images(annotations.problems)
    for i, name in enumerate(annotations.file_names.tolist()):
        if name not in lost:
            path = annotations.path(i)
            assert path.is_relative_to(folder), path
            assert path.is_file(), path


def _require_items(dataset: DetectionDataset) -> None:
    for image, target in (dataset[i] for i in range(min(len(dataset), _MOST_ITEMS))):
        boxes, (width, height) = target["boxes"], image.size
        assert (boxes >= 0).all()
        assert (boxes <= [width, height, width, height]).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
