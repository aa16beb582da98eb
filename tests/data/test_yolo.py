from pathlib import Path

import numpy as np
import pytest
from made_data import BOX, as_yolo

from ssd.data import AnnotationError, DetectionDataset, load


def test_yolo_names_must_be_numbered(tmp_path):
    as_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: {1: dog, 2: cat}\n")
    with pytest.raises(AnnotationError, match="number the classes from 0"):
        load(tmp_path)


def test_images_of_one_name_in_two_folders_have_two_ids(tmp_path):
    for folder in ("s1", "s2"):
        as_yolo(tmp_path, f"images/{folder}")
    (tmp_path / "data.yaml").write_text("train: [images/s1, images/s2]\nnames: [dog, cat]\n")
    assert load(tmp_path).image_ids == ("s1/a", "s2/a")


def test_yolo_lines_that_are_wrong(tmp_path):
    as_yolo(tmp_path)
    lines = [
        "1 0.25 0.5 0.3 0.5",
        "",
        "1 0.25 0.5 0.3",
        "x 0.2 0.2 0.1 0.1",
        "9 0.2 0.2 0.1 0.1",
        "0 nan 0 1 1",
    ]
    lines += ["0 0.5 0.5 0 0.2", "0 0.1 0.1 0.5 0.1 0.5 0.6", "0.5 0.2 0.2 0.1 0.1"]
    (tmp_path / "labels/train/a.txt").write_text("\n".join(lines))
    found = load(tmp_path)
    kinds = [(problem.annotation, problem.kind) for problem in found.problems]
    assert kinds == [
        ("a.txt:3", "not a box"),
        ("a.txt:4", "unknown category id"),
        ("a.txt:5", "unknown category id"),
        ("a.txt:6", "not a box"),
        ("a.txt:9", "unknown category id"),
        ("a.txt:7", "zero area"),
    ]
    _, target = DetectionDataset(found, lenient=True)[0]
    np.testing.assert_allclose(target["boxes"], [BOX, [10, 8, 50, 48]])  # the second is a polygon's


def test_yolo_images_whose_size_cannot_be_read_are_refused(tmp_path):
    as_yolo(tmp_path)
    (tmp_path / "images/train/b.jpg").write_bytes(b"no image")
    (tmp_path / "labels/train/b.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    found = load(tmp_path)
    assert [(each.kind, each.file) for each in found.problems] == [("unreadable image", "b.jpg")]
    with pytest.raises(AnnotationError, match=r"unreadable image: 1"):
        DetectionDataset(found)
    assert len(DetectionDataset(found, lenient=True)) == 1


def test_yolos_folders_are_its_own(tmp_path):
    as_yolo(tmp_path)
    with pytest.raises(AnnotationError, match=r"data\.yaml: names the image folders itself"):
        load(tmp_path, images=tmp_path)


def test_yaml_cannot_run_code(tmp_path):
    (tmp_path / "data.yaml").write_text("names: !!python/object/apply:os.mkdir [owned]\n")
    with pytest.raises(AnnotationError, match="not a YAML file"):
        load(tmp_path)
    assert not Path("owned").exists()
