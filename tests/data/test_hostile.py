"""Whatever the files of a dataset hold, it is read, or refused in a few short lines (`fuzz.annotations`)."""

import json
import os
import sys

import pytest
from fuzz.annotations import promise, seeds
from made_data import annotation, coco, plain

from ssd.data import AnnotationError, load
from ssd.data.builder import Builder
from ssd.errors import as_line, shown

COCO, VOC, YOLO = seeds()

NAMES = [
    *(
        "/",
        "//",
        ".",
        "..",
        "x" * 300 + ".jpg",
        "/".join(["y" * 200] * 30) + ".jpg",
        "z" * 10**6,
        "a/" * 5000,
    ),
    *("a\0.jpg", "\ud800.jpg", "\x1b[31m.jpg", "a\nb.jpg"),
]
TAGS = [
    *(
        "!!bool x",
        "!!int ''",
        "!!timestamp x",
        "!!binary x",
        "!!float x",
        "!!set {a}",
        "!!omap [a: b]",
        "!!map x",
    ),
    *(
        "!!python/object:os.system x",
        "!!python/tuple [a]",
        "!!merge x",
        "!!seq x",
        "!!str [a]",
        "!!null x",
        "*a",
    ),
]
NUMBERS = [
    *("1" * 5000, "-" + "9" * 4301, "1e999", "NaN", "-Infinity", "true", "null", '"x"', "[]", "{}"),
    *("[" * 900 + "]" * 900, '"' + "1" * 6000 + '"'),
]


def kept(case, folder):
    """What comes of a case, by its promise."""
    for name, content in case.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return promise({}, folder)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:12]))
def test_names_that_no_file_can_have(name, tmp_path):
    content = json.loads(COCO["train.json"])
    content["images"][1]["file_name"] = name
    assert kept(COCO | {"train.json": json.dumps(content)}, tmp_path / "coco") == "read, with problems"
    if "\n" not in name:
        list_of_names = {
            "data.yaml": "train: val.txt\nnames: [cat, dog]\n",
            "val.txt": f"images/val/c.jpg\n{name}\n",
        }
        assert kept(YOLO | list_of_names, tmp_path / "yolo") == "read, with problems"
        kept(VOC | {"ImageSets/Main/train.txt": f"{name}\na\nb\n"}, tmp_path / "voc")
    if name.isprintable():
        text = VOC["Annotations/a.xml"].decode()
        kept(VOC | {"Annotations/b.xml": text.replace("a.jpg", name)}, tmp_path / "xml")
        for key in ("train", "val", "path", "names"):
            settings = {"train": "images/train", "names": "[cat, dog]"} | {key: name}
            text = "\n".join(f"{each}: {value}" for each, value in settings.items())
            kept(YOLO | {"data.yaml": text}, tmp_path / key)


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_tags_make_no_values(tag, tmp_path):
    for key in ("train", "val", "path", "names", "nc", "kpt_shape", "? "):
        settings = {"train": "images/train", "names": "[cat, dog]"} | {key: tag}
        text = "\n".join(f"{each}: {value}" for each, value in settings.items())
        kept(YOLO | {"data.yaml": text}, tmp_path / key.strip("? ") / "x")


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number[:9])
def test_numbers_that_are_none(number, tmp_path):
    whole = (
        '{"images": [{"id": %s, "file_name": "a.jpg", "width": %s, "height": %s}], '
        '"annotations": [{"id": %s, "image_id": %s, "category_id": %s, "bbox": [%s, 1, 9, %s], '
        '"area": %s, "iscrowd": %s, "segmentation": %s}], '
        '"categories": [{"id": %s, "name": %s, "supercategory": %s}]}'
    )
    values = ["1", "40", "30", "1", "1", "1", "2", "9", "81", "0", "[]", "1", '"cat"', '"s"']
    for i in range(len(values)):
        changed = [*values[:i], number, *values[i + 1 :]]
        kept(COCO | {"train.json": whole % tuple(changed)}, tmp_path)
    for text in (f"nc: {number}\nnames: [cat]", f"names: {{{number}: cat}}", "names: {²: cat}"):
        kept(YOLO | {"data.yaml": f"train: images/train\n{text}\n"}, tmp_path / "yolo")
    kept(YOLO | {"labels/train/a.txt": f"{number} .5 .5 .1 .1\n0 {number} .5 .1 .1\n"}, tmp_path / "label")


def test_an_integer_of_thousands_of_digits_is_told_of_its_annotation(tmp_path):
    plain(tmp_path)
    text = json.dumps(coco(annotations=[annotation(), annotation(id=2, bbox=[1, 2, 3, 12345])]))
    (tmp_path / "train.json").write_text(text.replace("12345", "9" * 5000))
    (problem,) = [each for each in load(tmp_path).problems if each.fatal]
    assert str(problem) == "a.jpg, annotation 2: its bbox [1, 2, 3, inf] is not four finite numbers"


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes")
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing", "loop", "link to a device"])
def test_what_is_no_file_where_one_is_expected(kind, tmp_path):
    places = [
        *((COCO, each) for each in ("train.json", "train/a.jpg", "val.json", "_annotations.coco.json")),
        *((VOC, each) for each in ("Annotations/a.xml", "Annotations/x.xml", "JPEGImages/a.jpg")),
        *((VOC, each) for each in ("ImageSets/Main/train.txt", "train.txt")),
        *((YOLO, each) for each in ("data.yaml", "images/train/a.jpg", "labels/train/a.txt", "val.txt")),
        *((YOLO, each) for each in ("classes.txt", "data.yml", "images/train/x.jpg", "obj.names", "x.data")),
    ]
    for number, (case, place) in enumerate(places):
        folder = tmp_path / str(number)
        path = folder / place
        path.parent.mkdir(parents=True)
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to({"loop": path.name, "link to a device": "/dev/zero"}.get(kind, "nowhere"))
        kept({name: content for name, content in case.items() if name != place}, folder)


def test_values_that_nest_deeply(tmp_path):
    for name, text in {
        "train.json": "[" * 200_000,
        "data.yaml": "[ " * 100_000,
        "data.yml": "a: " + "{b: " * 900 + "}" * 900,
        "Annotations/a.xml": "<annotation>" + "<a>" * 100_000 + "</a>" * 100_000 + "</annotation>",
    }.items():
        assert kept({name: text}, tmp_path / name) == "refused"


def test_aliases_of_aliases_are_never_written_out(tmp_path):
    bomb = "".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9 if i else ['x'] * 9)}]\n" for i in range(9))
    for tail in (
        "names: *k8",
        "names: {0: *k8}",
        "nc: *k8",
        "names: [cat, dog]\npath: *k8\nval: *k8",
        "? *k8\n: 1",
    ):
        kept(
            YOLO | {"data.yaml": f"{bomb}train: images/train\n{tail}\n"},
            tmp_path / tail[:8] / tail[-2:].strip(),
        )
    anchors = "train: &here images/train\nval: *here\nnames: [cat, dog]\n"
    assert kept(YOLO | {"data.yaml": anchors}, tmp_path / "anchors") == "read"
    nested = ["x"]
    for _ in range(40):
        nested = [nested] * 9
    assert len(shown(nested)) <= 110


class Counted(str):
    """A text that counts how often it is compared with another one."""

    times = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        Counted.times += 1
        return str(self) == str(other)


@pytest.mark.parametrize("again", [False, True])
def test_classes_are_not_compared_with_each_other(again, tmp_path):
    names = [Counted(f"class {0 if again else i}") for i in range(300)]
    Counted.times = 0
    labels = Builder(tmp_path, tmp_path).set_classes(names, tuple(range(300)), None)
    assert labels == list(range(1, 301))
    assert Counted.times < 1500


def test_names_of_one_file_are_not_sorted_for_each(tmp_path):
    images = [{"id": i, "file_name": f"x{i}/a.jpg", "width": 100, "height": 80} for i in range(20_000)]
    plain(tmp_path, coco(images, []))
    found = load(tmp_path)
    assert sum(problem.kind == "missing image" for problem in found.problems) == 20_000


def test_class_names_are_text_of_some_length(tmp_path):
    plain(tmp_path, coco(categories=[{"id": 5, "name": "\ud800"}]))
    with pytest.raises(AnnotationError, match=r"the class name '\\ud800' was not saved as UTF-8"):
        load(tmp_path)
    plain(tmp_path, coco(categories=[{"id": 5, "name": "n" * 10**6}]))
    with pytest.raises(AnnotationError, match=r"has 1,000,000 characters; give it a name of 300 at most"):
        load(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="a colon is no letter there")
@pytest.mark.parametrize(
    "name", ["12:30:00.png", "a:b/c.png", "http:foo.png", "x::y.png", "C:/a.png", "c:d.png"]
)
def test_a_colon_is_a_letter(name, tmp_path):
    image = COCO["train/a.jpg"]
    content = json.loads(COCO["train.json"])
    content["images"][1] = {"id": 2, "file_name": name}
    files = {"train.json": json.dumps(content), "train/a.jpg": image, f"train/{name}": image}
    assert kept(files, tmp_path / "coco") == "read"
    found = load(tmp_path / "coco")
    assert found.file_names.tolist() == ["a.jpg", name]
    assert found.path(1) == tmp_path / "coco/train" / name
    assert not found.notes
    stem = name.removesuffix(".png")
    files = {
        "data.yaml": "train: t.txt\nnames: [cat]\n",
        "t.txt": f"{name}\nb.jpg\n",
        name: image,
        "b.jpg": image,
    }
    assert kept(files | {f"{stem}.txt": "0 .5 .5 .1 .1\n", "b.txt": ""}, tmp_path / "yolo") == "read"
    xml = VOC["Annotations/a.xml"].replace(b"a.jpg", name.encode())
    files = {"Annotations/q.xml": xml, f"JPEGImages/{name}": image}
    assert (
        kept(
            files | {"Annotations/b.xml": xml.replace(name.encode(), b"b.jpg"), "JPEGImages/b.jpg": image},
            tmp_path / "voc",
        )
        == "read"
    )


def test_a_drive_is_another_machines(tmp_path):
    content = json.loads(COCO["train.json"])
    content["images"][1]["file_name"] = "C:\\x\\b.jpg"
    assert kept(COCO | {"train.json": json.dumps(content)}, tmp_path) == "read"
    assert load(tmp_path).file_names.tolist() == ["a.jpg", "b.jpg"]


def test_messages_are_lines_that_a_terminal_can_show(tmp_path):
    error = AnnotationError("a\x1b[31m\u202e\ud800: wrong\n  " + "b" * 10**6)
    first, second = str(error).split("\n")
    assert first == r"a\x1b[31m\u202e\ud800: wrong"
    assert len(second) < 2000
    assert as_line("ä\t猫 🐈") == "ä\t猫 🐈"
