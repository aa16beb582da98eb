import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from made_data import BOX, EVERY_FOLDER, VOC_XML, annotation, as_voc, as_yolo, coco, picture, plain

import ssd.data
from ssd.data import AnnotationError, DetectionDataset, find_split, load
from ssd.data.formats import FORMATS, Format


@pytest.mark.parametrize("folder", EVERY_FOLDER)
def test_layouts_are_recognised_and_give_the_same(tmp_path, folder):
    annotations = load(folder(tmp_path), "train")
    assert not annotations.problems
    dataset = DetectionDataset(annotations)
    image, target = dataset[0]
    assert image.size == (100, 80)
    np.testing.assert_allclose(target["boxes"], [BOX])
    assert target["boxes"].dtype == np.float32
    assert [dataset.class_names[label - 1] for label in target["labels"]] == ["cat"]
    assert find_split(folder(tmp_path / "again"), "train")


@pytest.mark.parametrize("folder", EVERY_FOLDER)
def test_splits_that_are_not_there(tmp_path, folder):
    path = folder(tmp_path)
    if path.suffix != ".json" and folder not in (as_yolo,):
        assert not find_split(path, "test")
        with pytest.raises(AnnotationError, match="there is no test"):
            load(path, "test")


def test_explicit_paths(tmp_path):
    picture(tmp_path / "photos" / "a.jpg")
    (tmp_path / "labels.json").write_text(json.dumps(coco()))
    assert len(DetectionDataset(load(tmp_path / "labels.json", images=tmp_path / "photos"))) == 1


def test_no_dataset(tmp_path):
    with pytest.raises(AnnotationError, match="no dataset of a known layout"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    (tmp_path / "x.json").write_text("[1")
    with pytest.raises(AnnotationError, match=r"x\.json: not a JSON file"):
        load(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(AnnotationError, match="a COCO file has the lists"):
        load(tmp_path / "x.json")
    (tmp_path / "data.yaml").write_text("a: [")
    with pytest.raises(AnnotationError, match="not a YAML file"):
        load(tmp_path)


def test_messages_name_every_format_of_the_table(tmp_path, monkeypatch):
    (tmp_path / "x.txt").touch()
    with pytest.raises(AnnotationError) as error:
        load(tmp_path)
    known = "COCO (train.json + train/), Roboflow COCO, YOLO (data.yaml) or VOC (Annotations/*.xml)"
    assert str(error.value) == f"{tmp_path}: no dataset of a known layout: {known}; it holds 1 .txt"
    with pytest.raises(AnnotationError) as error:
        load(tmp_path / "x.txt")
    known = "a folder, a COCO .json file or a YOLO data.yaml"
    assert str(error.value) == f"{tmp_path / 'x.txt'}: a dataset is {known}"
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04" + b"0" * 60)
    with pytest.raises(AnnotationError, match="a dataset is .*; this is a zip archive$"):
        load(tmp_path / "x.zip")
    (tmp_path / "x.zip").unlink()
    never = Format(("Toy (toy.bin)",), "a toy.bin", lambda path: False, lambda path, split: False, None)
    monkeypatch.setitem(FORMATS, "toy", never)
    with pytest.raises(AnnotationError, match=r"VOC \(Annotations/\*\.xml\) or Toy \(toy\.bin\)"):
        load(tmp_path)
    with pytest.raises(AnnotationError, match=r"a YOLO data\.yaml or a toy\.bin"):
        load(tmp_path / "x.txt")


def test_what_is_wrong_with_a_split_is_told_by_its_own_format(tmp_path):
    plain(tmp_path / "coco")
    with pytest.raises(AnnotationError, match=r"there is no val split; it has train \(train.json\)$"):
        load(tmp_path / "coco", "val")
    as_yolo(tmp_path / "yolo")
    assert not find_split(tmp_path / "yolo", "val")
    with pytest.raises(AnnotationError, match=r"data\.yaml: there is no folder images/nowhere"):
        load(tmp_path / "yolo", "val")
    as_voc(tmp_path / "voc" / "VOC2007")
    shutil.copytree(tmp_path / "voc" / "VOC2007", tmp_path / "voc" / "VOC2012")
    assert not find_split(tmp_path / "voc", "train")
    with pytest.raises(AnnotationError, match="holds several datasets; give one of [^;]*$"):
        load(tmp_path / "voc")


def test_what_a_folder_holds_that_is_no_dataset(tmp_path):
    def told():
        with pytest.raises(AnnotationError) as error:
            load(tmp_path)
        return str(error.value).rsplit("; it ", 1)[-1]

    assert told() == "is empty"
    for name in ("a.jpg", "b.JPG", "README", "deep/1/2/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert told() == "holds 2 .jpg, 1 without suffix, deep/"
    (tmp_path / "deep" / "data.yaml").write_text("a: [")
    assert told() == "holds 2 .jpg, 1 without suffix, deep/"
    (tmp_path / "deep" / "data.yaml").unlink()
    as_voc(tmp_path / "deep" / "1")
    assert told() == f"holds 2 .jpg, 1 without suffix, deep/; {tmp_path / 'deep'} is one: give that folder"


def test_a_dataset_one_or_two_folders_deeper_is_named(tmp_path):
    as_yolo(tmp_path / "a" / "b" / "b")
    for given in ("a/b", "a"):
        with pytest.raises(AnnotationError) as error:
            load(tmp_path / given)
        assert str(error.value).endswith(
            (
                f"; or give {tmp_path}/a/b/b, which is a dataset",
                f"; {tmp_path}/a/b/b is one: give that folder",
            )
        )


@pytest.mark.parametrize("part", ["images", "labels", "images/train", "labels/train"])
def test_of_a_part_of_a_dataset_the_whole_is_named(tmp_path, part):
    root = as_yolo(tmp_path.resolve() / "ds")
    root = root.parent if root.is_file() else root
    with pytest.raises(AnnotationError) as error:
        load(root / part)
    assert str(error.value).endswith(f"; {root} is one: give that folder")


def test_a_dataset_whose_file_is_wrong_is_told_of_itself(tmp_path):
    as_voc(tmp_path)
    for file in (tmp_path / "ImageSets" / "Main").iterdir():
        file.unlink()
    (tmp_path / "ImageSets" / "Main" / "other_.txt").write_text("")
    (tmp_path / "ImageSets" / "Main" / "mine_.txt").write_text("")
    with pytest.raises(AnnotationError, match=r"there is no train split; the lists are [^;]*$"):
        load(tmp_path)


def test_folders_of_other_tools_are_told_with_the_remedy(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"shapes": [], "imagePath": "a.jpg"}))
    (tmp_path / "b.json").write_text("[")
    with pytest.raises(AnnotationError, match="2 .json; a.json seems to be labelme's.* labelme2coco$"):
        load(tmp_path)
    (tmp_path / "a.json").unlink()
    with pytest.raises(AnnotationError, match=r"it holds 1 \.json$"):
        load(tmp_path)


def test_the_folder_of_a_split_is_told_as_a_part(tmp_path):
    plain(tmp_path)
    with pytest.raises(
        AnnotationError, match=f"{re.escape(str(tmp_path.resolve()))} is one: give that folder"
    ):
        load(tmp_path / "train")
    (tmp_path / "test_photos").mkdir()
    with pytest.raises(AnnotationError, match="it is empty$"):
        load(tmp_path / "test_photos")


@pytest.mark.parametrize("folder", ["x.json", "x.yaml", "x.xml"])
def test_folders_that_are_called_like_files(tmp_path, folder):
    for name in ("a", "labels", "Annotations", "annotations"):
        (tmp_path / folder / name / "train.json").mkdir(parents=True)
        (tmp_path / folder / name / "data.yaml").mkdir()
        (tmp_path / folder / name / "a.xml").mkdir()
    with pytest.raises(AnnotationError, match="no dataset of a known layout"):
        load(tmp_path / folder)
    plain(tmp_path / folder)
    assert len(load(tmp_path / folder)) == 1


def sloppy(folder):
    """A COCO and a VOC dataset with many things that are wrong."""
    names = [f"{letter}.jpg" for letter in "abcdefgh"]
    images = [{"id": k // 2, "file_name": name} for k, name in enumerate(names)]
    boxes = [annotation(id=k % 5, image_id=k % 6, category_id=k % 7, bbox=[k]) for k in range(20)]
    categories = [{"id": k % 4, "name": name} for k, name in enumerate("zyxwvutsr")]
    plain(folder / "coco", coco(images, boxes, categories), names)
    for k, name in enumerate("zyxwvutsr"):
        (folder / "voc" / "Annotations").mkdir(parents=True, exist_ok=True)
        picture(folder / "voc" / "JPEGImages" / f"{name}.png")
        text = VOC_XML.format(name=f"{name}.jpg", difficult=0).replace("cat", f"{name}&amp;")
        (folder / "voc" / "Annotations" / f"{name}.xml").write_text(text[: -k * 30 or None])
    (folder / "voc" / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "voc" / "ImageSets" / "Main" / "train.txt").write_text("z\ny\nx\nr\nq\np\no\n")


def test_what_is_told_does_not_depend_on_the_seed_of_hashes(tmp_path):
    sloppy(tmp_path)
    code = "import sys; from ssd.data import load\n"
    code += "for each in map(load, sys.argv[1:]): print(each, *each.problems, *each.notes, sep='\\n')"
    folders = [str(tmp_path / name) for name in ("coco", "voc")]
    told = [
        subprocess.run(
            [sys.executable, "-c", code, *folders],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        for seed in ("0", "1", "2")
    ]
    assert told[0].returncode == 0, told[0].stderr
    assert told[0].stdout.count("\n") > 20
    assert len({each.stdout for each in told}) == 1


def test_a_split_of_any_name(tmp_path):
    plain(tmp_path)
    (tmp_path / "train.json").rename(tmp_path / "mini.json")
    (tmp_path / "train").rename(tmp_path / "mini")
    assert len(load(tmp_path, "mini")) == 1


def test_reading_annotations_needs_no_torch():
    code = "import sys, ssd.data; ssd.data.load, ssd.data.usable_for_evaluation, ssd.data.AnnotationError\n"
    code += "assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_there():
    assert set(ssd.data.__all__) == set(dir(ssd.data))
    for name in ssd.data.__all__:
        assert getattr(ssd.data, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = ssd.data.lod
