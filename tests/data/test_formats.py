import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from made_data import BOX, EVERY_FOLDER, as_voc, as_yolo, coco, picture, plain

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
    assert str(error.value) == f"{tmp_path}: no dataset of a known layout: {known}"
    with pytest.raises(AnnotationError) as error:
        load(tmp_path / "x.txt")
    known = "a folder, a COCO .json file or a YOLO data.yaml"
    assert str(error.value) == f"{tmp_path / 'x.txt'}: a dataset is {known}"
    never = Format(("Toy (toy.bin)",), "a toy.bin", lambda path: False, lambda path, split: False, None)
    monkeypatch.setitem(FORMATS, "toy", never)
    with pytest.raises(AnnotationError, match=r"VOC \(Annotations/\*\.xml\) or Toy \(toy\.bin\)"):
        load(tmp_path)
    with pytest.raises(AnnotationError, match=r"a YOLO data\.yaml or a toy\.bin"):
        load(tmp_path / "x.txt")


def test_what_is_wrong_with_a_split_is_told_by_its_own_format(tmp_path):
    plain(tmp_path / "coco")
    with pytest.raises(AnnotationError, match="there is no val split; it has train$"):
        load(tmp_path / "coco", "val")
    as_yolo(tmp_path / "yolo")
    assert not find_split(tmp_path / "yolo", "val")
    with pytest.raises(AnnotationError, match=r"data\.yaml: there is no folder images/nowhere"):
        load(tmp_path / "yolo", "val")
    as_voc(tmp_path / "voc" / "VOC2007")
    shutil.copytree(tmp_path / "voc" / "VOC2007", tmp_path / "voc" / "VOC2012")
    assert not find_split(tmp_path / "voc", "train")
    with pytest.raises(AnnotationError, match="holds several datasets; give one of"):
        load(tmp_path / "voc")


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
