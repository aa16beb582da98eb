import csv
import json
import os

import pytest
from conftest import PHOTOS

from ssd.cli.results import FreeNames, coco_image_ids


def test_each_run_has_its_own_folder(run, photos, tmp_path):
    for _ in range(2):
        assert run("detect", photos / "coffee.jpg", "--no-images")[0] == 0
    assert sorted(os.listdir(tmp_path / "runs")) == ["detect-1", "detect-2"]
    assert os.listdir(tmp_path / "runs" / "detect-2") == ["detections.json"]


def test_csv(run, photos, tmp_path):
    run("detect", photos, "--format", "csv", "--output", "out", "--no-images")
    with (tmp_path / "out" / "detections.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["source"] for row in rows} <= {str(photos / f"{name}.jpg") for name in PHOTOS}
    assert {row["name"] for row in rows} <= {"cat", "cup", "person"}


def test_yolo(run, photos, tmp_path):
    run("detect", photos, "--format", "yolo", "--output", "out", "--score-threshold", "0.9")
    assert sorted(os.listdir(tmp_path / "out" / "labels")) == [f"{name}.txt" for name in sorted(PHOTOS)]
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\ncup\nperson\n"


def test_yolo_labels_are_named_as_the_photos_beside_them(run, photos, tmp_path):
    (tmp_path / "coffee.jpg").write_bytes((photos / "coffee.jpg").read_bytes())
    run("detect", "coffee.jpg", "--format", "yolo", "--output", ".", "--no-images")
    assert os.listdir(tmp_path / "labels") == ["coffee.txt"]


def test_coco(run, photos, tmp_path):
    for name in ("000000397133", "000000000025"):
        (tmp_path / f"{name}.jpg").write_bytes((photos / "coffee.jpg").read_bytes())
    run("detect", "*.jpg", "--format", "coco", "--output", "out")
    entries = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {(each["image_id"], each["file_name"]) for each in entries} == {
        (397133, "000000397133.jpg"),
        (25, "000000000025.jpg"),
    }
    assert {each["category_id"] for each in entries} <= {1, 2, 3}


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["a/000025.jpg", "000397133.jpg"], [25, 397133]),
        (["7.jpg", "x.jpg"], [1, 2]),
        (["a/7.jpg", "b/7.jpg"], [1, 2]),
        (["a/7.jpg", "a/7.jpg"], [7, 7]),
        (["\u0667.jpg"], [1]),
    ],
)
def test_coco_image_ids(names, ids):
    found = coco_image_ids(names)
    assert [found[name] for name in names] == ids


def test_sources_are_never_overwritten_and_equal_names_get_numbers(run, photos, tmp_path):
    for name in ("a/x.jpg", "b/x.jpg", "x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((photos / "coffee.jpg").read_bytes())
    before = (tmp_path / "a" / "x.jpg").read_bytes()
    status, _, _ = run("detect", "a/x.jpg", "b/x.jpg", "x.png", "--output", "a")
    assert status == 0
    assert (tmp_path / "a" / "x.jpg").read_bytes() == before
    assert sorted(os.listdir(tmp_path / "a")) == ["detections.json", "x-2.jpg", "x-3.jpg", "x.jpg", "x.png"]


def test_nothing_that_exists_is_overwritten(run, photos, tmp_path):
    keep = {"coffee.jpg": b"mine", "detections.json": b"mine", "labels/chelsea.txt": b"mine"}
    for name, content in keep.items():
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "out" / name).write_bytes(content)
    assert run("detect", photos, "--output", "out")[0] == 0
    assert run("detect", photos, "--output", "out", "--format", "yolo")[0] == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in keep} == keep
    assert {"coffee-2.jpg", "coffee-3.jpg", "detections-2.json", "chelsea.jpg", "chelsea-2.jpg"} <= set(
        os.listdir(tmp_path / "out")
    )
    assert sorted(os.listdir(tmp_path / "out" / "labels")) == [
        "astronaut-2.txt",
        "chelsea-2.txt",
        "chelsea.txt",
        "coffee-3.txt",
    ]


def test_names_that_are_long_or_not_unicode(run, photos, tmp_path):
    body = (photos / "coffee.jpg").read_bytes()
    names = [b"b\xff.jpg", b"l" * 250 + b".jpg", "图.jpg".encode()]
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(body)
    status, out, _ = run("detect", ".", "--output", "out", "--format", "json")
    assert status == 0, out
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert sorted(os.fsencode(os.path.basename(each["source"])) for each in written) == sorted(names)
    assert len(os.listdir(tmp_path / "out")) == 4


def test_a_source_keeps_its_name_and_links_to_nowhere_are_taken(tmp_path):
    (tmp_path / "x.jpg").symlink_to(tmp_path / "gone")
    names = FreeNames(tmp_path, pictures=True, labels=None)
    assert [names("a/x.jpg"), names("b/x.jpg"), names("a/x.jpg")] == ["x-2.jpg", "x-3.jpg", "x-2.jpg"]
    assert FreeNames(tmp_path, pictures=False, labels=None)("a/x.jpg") == "x.jpg"
