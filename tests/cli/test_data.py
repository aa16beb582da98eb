import json
import re

from made_data import annotation, coco, picture, plain

from ssd.data import FORMATS, Format
from ssd.data.builder import Builder


def test_shapes_and_check(run, tmp_path):
    status, out, _ = run("shapes", "s", "--images", "5", "--seed", "2")
    assert status == 0
    assert out.startswith("5 scenes to train on and 1 to evaluate on in s; circle, square")
    status, out, _ = run("check", "s")
    assert status == 0
    assert "train: nothing wrong" in out


def test_problems_are_listed_and_the_status_says_so(run, tmp_path):
    plain(tmp_path / "d", coco(annotations=[annotation(), annotation(id=2, category_id=99)]))
    status, out, _ = run("check", "d")
    assert status == 1
    assert "train: unknown category id: 1" in out
    status, out, _ = run("check", "d", "--json")
    assert status == 1
    assert json.loads(out)["fatal"] == 1
    run("shapes", "s", "--images", "5")
    (tmp_path / "s" / "train" / "000003.jpg").unlink()
    (tmp_path / "s" / "train" / "000003.jpg").symlink_to(tmp_path / "gone.jpg")
    status, out, _ = run("check", "s")
    assert status == 1
    assert "train: missing image: 1" in out
    assert "a link" in out


def test_a_toy_format_is_checked_by_the_command(run, tmp_path, monkeypatch):
    """One row: a folder with a file that says how many grey images to pretend to have."""

    def read(path, split, images, class_names):
        builder = Builder(path / "toy.txt", path)
        builder.set_classes(["cat"], (1,), class_names)
        for name in ("a.jpg", "b.jpg"):
            index = builder.add_image(name, name, 100, 80)
            builder.add_box(index, name, (10, 20, 40, 60), 1)
        return builder.build()

    def is_at(path):
        return (path / "toy.txt").is_file()

    row = Format(("Toy",), None, is_at, lambda path, split: is_at(path) and split == "train", read)
    monkeypatch.setitem(FORMATS, "toy", row)
    picture(tmp_path / "d" / "a.jpg")
    picture(tmp_path / "d" / "b.jpg", quality=50)
    (tmp_path / "d" / "toy.txt").touch()
    status, out, err = run("check", "d")
    assert status == 0, err
    assert re.search(r"cat +2\n", out)
    assert "train: nothing wrong" in out


def test_the_splits_that_can_be_read_are_told_beside_one_that_cannot(run, tmp_path):
    run("shapes", "s", "--images", "5")
    text = (tmp_path / "s" / "val.json").read_text()
    (tmp_path / "s" / "val.json").write_text(text[:-30])
    status, out, _ = run("check", "s")
    assert status == 1
    assert "train: nothing wrong" in out
    assert re.search(r"^val: cannot be read: .*val\.json", out, re.MULTILINE)
    status, out, _ = run("check", "s", "--json")
    assert list(json.loads(out)["unread"]) == ["val"]
    (tmp_path / "s" / "val.json").write_text(text)
    (tmp_path / "s" / "train.json").unlink()
    status, out, _ = run("check", "s")
    assert status == 1
    assert re.search(r"^train: cannot be read: .*no train split", out, re.MULTILINE)
    status, out, err = run("check", tmp_path / "nowhere")
    assert (status, out) == (1, "")
    assert "no dataset at" in err
