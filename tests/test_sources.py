import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssd import sources
from ssd.sources import SOURCES, Named, Source, find_all, find_images, left_out_line


@pytest.fixture
def folder(tmp_path):
    """A folder as people have them."""
    for name in (
        "a.jpg",
        "b.JFIF",
        "IMG_1.HEIC",
        "IMG_2.heic",
        "notes.txt",
        "README",
        "._a.jpg",
        ".DS_Store",
        "Thumbs.db",
        "sub/c.webp",
        "sub/d.mov",
    ):
        path = tmp_path / "photos" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"")
    return tmp_path / "photos"


@pytest.fixture(autouse=True)
def without_heif(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)


def found(source, find=find_images):
    """Names below the folder "photos", and what was left out."""
    told = []
    images = [each.name.partition("photos" + os.sep)[2] for each in find(source, told.append)]
    assert len(told) <= 1
    return images, told[0] if told else None


def test_find_images(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt", "sub/c.webp"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")

    def below(source):
        return [str(Path(each.name).relative_to(tmp_path)) for each in find_images(source)]

    assert below(tmp_path) == ["a.png", "b.JPG"]
    assert below(f"{tmp_path}/**") == ["a.png", "b.JPG", "sub/c.webp"]
    assert below(f"{tmp_path}/*.png") == ["a.png"]
    assert below(f"{tmp_path}/*.bmp") == []
    assert list(find_images("gone.jpg")) == [Named("gone.jpg", "gone.jpg")]
    assert [each.image for each in find_images("http://x.org/a[1].jpg")] == ["http://x.org/a[1].jpg"]


def test_a_file_whose_name_looks_like_a_glob(tmp_path):
    path = tmp_path / "photo [1].jpg"
    path.write_bytes(b"")
    assert [each.name for each in find_images(path)] == [str(path)]


def test_a_toy_source_by_one_row(detector, monkeypatch):
    """Pictures of one colour, as many as the text says; they are made as they are asked for."""

    def squares(text):
        for i in range(int(text.removeprefix("squares:"))):
            yield Named(f"square {i}", np.full((64, 64, 3), 50 * i, np.uint8))

    kind = Source(lambda text: text.startswith("squares:"), squares, is_listed=False)
    monkeypatch.setitem(SOURCES, "squares", kind)
    found = list(detector.stream("squares:3"))
    assert [(each.source, each.number) for each in found] == [(f"square {i}", i) for i in range(3)]


@pytest.mark.parametrize("text", ["gone.jpg", "no/folder/", "C:\\photos\\cat.jpg"])
def test_what_nothing_claims_is_a_file_that_is_not_there(text):
    assert list(find_images(text)) == [Named(text, text)]


# --- What is left out ---


def test_what_a_folder_leaves_out_is_counted(folder):
    counts = {".heic": 2, ".txt": 1, "file without suffix": 1, "subfolder": 1}
    assert found(folder) == (["a.jpg", "b.JFIF"], counts)
    assert found(f"{folder}/*") == (["a.jpg", "b.JFIF"], counts)
    deep = {".heic": 2, ".txt": 1, "file without suffix": 1, ".mov": 1}
    assert found(f"{folder}/**") == (["a.jpg", "b.JFIF", "sub/c.webp"], deep)


def test_nothing_left_out_is_not_told(folder):
    assert found(f"{folder}/*.jpg") == (["a.jpg"], None)
    assert found(f"{folder}/a.jpg") == (["a.jpg"], None)
    assert found(f"{folder}/sub/*.webp") == (["sub/c.webp"], None)


def test_a_suffix_that_is_written_in_a_pattern_is_meant(folder):
    assert found(f"{folder}/*.heic") == (["IMG_2.heic"], None)
    assert found(f"{folder}/notes.txt") == (["notes.txt"], None)


@pytest.mark.parametrize(
    ("counts", "line"),
    [
        ({".txt": 1}, "left out of photos: 1 .txt"),
        ({".txt": 1, ".mov": 1200}, "left out of photos: 1,200 .mov, 1 .txt"),
        ({"subfolder": 1, "dangling link": 2}, "left out of photos: 2 dangling links, 1 subfolder"),
        ({"file without suffix": 2}, "left out of photos: 2 files without suffix"),
        ({"folder without permission": 1}, "left out of photos: 1 folder without permission"),
        ({".heic": 1}, "left out of photos: 1 .heic (for .heic: pip install pillow-heif)"),
    ],
)
def test_the_line_on_what_was_left_out(counts, line):
    assert left_out_line("photos", Counter(counts)) == line


def test_links(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.png").write_bytes(b"")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "file.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    (folder / "gone.png").symlink_to(tmp_path / "elsewhere" / "gone.png")
    (folder / "round.png").symlink_to(folder / "round.png")
    images, counts = found(folder)
    assert images == ["a.jpg", "b.JFIF", "file.png"]
    assert counts["dangling link"] == 2
    assert counts["subfolder"] == 2
    assert [Path(each.name).name for each in find_images(folder / "linked")] == ["x.png"]
    assert found(f"{folder}/*.png") == (["file.png"], {"dangling link": 2})


def test_folders_that_cannot_be_read_are_told(folder, monkeypatch):
    real = os.access  # root may read everything
    monkeypatch.setattr(sources.os, "access", lambda path, mode: "sub" not in path and real(path, mode))
    assert found(f"{folder}/**/*.webp")[1] == {"folder without permission": 1}


# --- Names that look like patterns ---


def test_folders_whose_names_look_like_globs(tmp_path):
    folder = tmp_path / "photos" / "trip [1]" / "day*"
    folder.mkdir(parents=True)
    (folder / "a [2].jpg").write_bytes(b"")
    (folder / "[3].png").write_bytes(b"")
    (tmp_path / "photos" / "trip 1").mkdir()
    both = ["trip [1]/day*/[3].png", "trip [1]/day*/a [2].jpg"]
    assert found(folder) == (both, None)
    assert found(f"{folder}/*") == (both, None)
    assert found(f"{folder}/*.png") == (both[:1], None)
    assert found(f"{tmp_path}/photos/trip [1]/**/*.jpg") == (both[1:], None)
    assert found(folder / "[3].png") == (both[:1], None)


# --- Several sources, as a shell gives them ---


def test_what_a_shell_makes_of_a_pattern(folder):
    Image.new("RGB", (2, 2)).save(folder / "scan", "PNG")
    named = sorted(str(path) for path in folder.iterdir() if not path.name.startswith("."))
    images, counts = found(named, find_all)
    assert images == ["a.jpg", "b.JFIF", "scan", "sub/c.webp", "sub/d.mov"]
    assert counts == {".heic": 2, ".txt": 1, "file without suffix": 1}


def test_a_single_file_is_tried_whatever_its_name(folder):
    assert found([str(folder / "notes.txt")], find_all) == (["notes.txt"], None)
    assert list(find_all(["gone.txt", "gone.jpg"])) == [
        Named("gone.txt", "gone.txt"),
        Named("gone.jpg", "gone.jpg"),
    ]


def test_a_toy_source_may_leave_out_too(monkeypatch):
    def some(text):
        yield Named("one", np.zeros((2, 2, 3), np.uint8))
        yield sources.LeftOut("two", "black frame")

    monkeypatch.setitem(SOURCES, "toy", Source(lambda text: text == "toy:", some))
    told = []
    assert [each.name for each in find_images("toy:", told.append)] == ["one"]
    assert told == [{"black frame": 1}]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_among_several_is_left_out(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.jpg")
    told = []
    found = find_all([str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")], told.append)
    assert [each.name for each in found] == [str(tmp_path / "b.jpg")]
    assert told == [{"special file": 1}]
