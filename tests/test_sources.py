from pathlib import Path

import numpy as np
import pytest

from ssd.sources import SOURCES, Named, Source, find_images


def test_find_images(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt", "sub/c.webp"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")

    def found(source):
        return [str(Path(each.name).relative_to(tmp_path)) for each in find_images(source)]

    assert found(tmp_path) == ["a.png", "b.JPG"]
    assert found(f"{tmp_path}/**") == ["a.png", "b.JPG", "sub/c.webp"]
    assert found(f"{tmp_path}/*.png") == ["a.png"]
    assert found(f"{tmp_path}/*.bmp") == []
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
