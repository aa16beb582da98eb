"""Another data format is one file and one row: here boxes.csv, which lists images, boxes and classes."""

import importlib.util
import textwrap

import numpy as np
import pytest
from made_data import picture

from ssd.check import check_dataset
from ssd.data import FORMATS, AnnotationError, DetectionDataset, Format, find_split, load

TOY = '''
"""Boxes in a CSV file: <split>.csv with the columns image, left, top, right, bottom, class."""

import csv

from ssd.data.builder import Builder, number
from ssd.data.judge import NOT_A_BOX
from ssd.errors import AnnotationError


def is_at(path):
    return any(path.glob("*.csv"))


def has_split(path, split):
    return (path / f"{split}.csv").is_file()


def read(path, split, images, class_names):
    file = path / f"{split}.csv"
    if not file.is_file():
        raise AnnotationError(f"{path}: there is no {split} split")
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    builder = Builder(file, images or path / split)
    names = sorted({row["class"] for row in rows})
    labels = builder.set_classes(names, tuple(range(1, len(names) + 1)), class_names)
    indices = {}
    for line, row in enumerate(rows, start=2):
        name = row["image"]
        if name not in indices:
            indices[name] = builder.add_image(name, name, None, None)
        box = tuple(number(row[side]) for side in ("left", "top", "right", "bottom"))
        if all(abs(value) < 1e9 for value in box):
            builder.add_box(indices[name], f"line {line}", box, labels[names.index(row["class"])])
        else:
            builder.problem(NOT_A_BOX, name, f"line {line}", f"{box} is not four numbers")
    return builder.build()
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The one file, in the place of a module of ssd.data, and the one row."""
    file = tmp_path / "toy.py"
    file.write_text(textwrap.dedent(TOY))
    spec = importlib.util.spec_from_file_location("toy", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    row = Format(("Toy (train.csv + train/)",), None, module.is_at, module.has_split, module.read)
    monkeypatch.setitem(FORMATS, "toy", row)
    return tmp_path / "data"


def write(folder, split, *lines):
    picture(folder / split / "a.jpg")
    picture(folder / split / "b.jpg", (50, 50))
    text = "\n".join(["image,left,top,right,bottom,class", *lines])
    (folder / f"{split}.csv").write_text(text)


def test_it_is_found_and_read(toy):
    write(toy, "train", "b.jpg,1,2,30,40,dog", "a.jpg,10,20,40,60,cat", "b.jpg,5,5,20,20,cat")
    assert [find_split(toy, split) for split in ("train", "val")] == [True, False]
    found = load(toy, "train")
    assert found.class_names == ("cat", "dog")
    assert found.sizes.tolist() == [[50, 50], [100, 80]]
    dataset = DetectionDataset(found)
    image, target = dataset[0]
    assert image.size == (50, 50)
    np.testing.assert_array_equal(target["boxes"], [[1, 2, 30, 40], [5, 5, 20, 20]])
    assert target["labels"].tolist() == [2, 1]
    assert load(toy, "train", class_names=("dog", "bird", "cat")).labels.tolist() == [1, 3, 3]
    with pytest.raises(AnnotationError, match="there is no val split"):
        load(toy, "val")


def test_it_is_judged_as_every_other(toy):
    write(
        toy,
        "train",
        "a.jpg,10,20,40,60,cat",
        "a.jpg,9,9,9,9,cat",
        "gone.jpg,1,1,2,2,cat",
        "a.jpg,x,1,2,3,cat",
    )
    found = load(toy)
    kinds = {each.kind for each in found.problems}
    assert kinds == {"zero area", "missing image", "not a box"}
    report = check_dataset({"train": found})
    assert report.fatal == 3
    assert "annotation line 3: the box at (9, 9), 0 wide and 0 high, has no area" in str(report)
    with pytest.raises(AnnotationError, match="--lenient"):
        DetectionDataset(found)
    assert len(DetectionDataset(found, lenient=True)) == 1


def test_it_is_among_those_that_messages_name(toy):
    toy.mkdir()
    with pytest.raises(AnnotationError, match=r"VOC \(Annotations/\*\.xml\) or Toy \(train\.csv \+ train/\)"):
        load(toy)
