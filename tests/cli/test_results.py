import csv
import errno
import json
import os
import re
import subprocess

import pytest
from conftest import PHOTOS, command

from ssd import files
from ssd.cli import results
from ssd.cli.results import FreeNames


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


@pytest.mark.parametrize("format", ["json", "coco", "yolo"])
def test_names_that_another_command_takes_meanwhile(run, photos, tmp_path, monkeypatch, format):
    """Picture and labels of a source keep one stem; what is printed is what was taken."""
    theirs = {"coffee.jpg", "labels/chelsea.txt", "detections.json", "detections-2.json"}
    write_new, put = results.write_new, files.Draft.put

    def after_another(contents):
        for path in contents:
            write_theirs(path)
        write_new(contents)

    def write_theirs(path):
        name = path.relative_to(tmp_path / "out").as_posix()
        if name in theirs and not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"theirs")

    def put_after_another(draft, *content):
        if format != "yolo":
            for name in theirs & {"detections.json", "detections-2.json"}:
                write_theirs(tmp_path / "out" / name)
        put(draft, *content)

    monkeypatch.setattr(results, "write_new", after_another)
    monkeypatch.setattr(files.Draft, "put", put_after_another)
    status, out, err = run("detect", photos, "--output", tmp_path / "out", "--format", format)
    assert (status, err) == (0, "")
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    mine = written - theirs
    assert {(tmp_path / "out" / name).read_bytes() for name in theirs & written} == {b"theirs"}
    pictures = {name[:-4] for name in mine if name.endswith(".jpg")}
    if format == "yolo":
        assert pictures == {"astronaut", "chelsea-2", "coffee-2"}
        assert {name[7:-4] for name in mine if name.startswith("labels/")} == pictures
    else:
        assert pictures == {"astronaut", "chelsea", "coffee-2"}
        assert f"results in {tmp_path / 'out' / 'detections-3.json'}" in out
        assert len(json.loads((tmp_path / "out" / "detections-3.json").read_text())) > 0


@pytest.mark.slow
def test_four_commands_at_once_write_what_each_alone_would(photos, tmp_path, weights_file):
    alone = command("detect", photos, "--weights", weights_file, "--score-threshold", 0.35, "--output")
    processes = [
        subprocess.Popen([*alone, "out"], cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    told = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    names = sorted(re.search(r"results in out/(\S+), pictures", out)[1] for out in told)
    assert names == ["detections-2.json", "detections-3.json", "detections-4.json", "detections.json"]
    assert len({(tmp_path / "out" / name).read_bytes() for name in names}) == 1
    for name in PHOTOS:
        found = [path.read_bytes() for path in (tmp_path / "out").glob(f"{name}*.jpg")]
        assert (len(found), len(set(found))) == (4, 1)
    assert len(os.listdir(tmp_path / "out")) == 16


def test_what_does_not_fit_is_left_out_and_the_rest_is_whole(run, photos, tmp_path, monkeypatch):
    """The disk is full for the second image's results, of which half is written."""
    put = files.Draft.put

    def half(draft, position, content):
        if b"chelsea" in content:
            put(draft, position, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        put(draft, position, content)

    monkeypatch.setattr(files.Draft, "put", half)
    status, out, err = run("detect", photos, "--output", "out")
    assert status == 1
    assert "2 images, " in out
    assert "chelsea.jpg: [Errno 28] No space left on device for its results in detections.json" in err
    listed = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [os.path.basename(each["source"]) for each in listed] == ["astronaut.jpg", "coffee.jpg"]


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
