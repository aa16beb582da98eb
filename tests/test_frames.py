"""Which frames are taken, and animations."""

import threading
from fractions import Fraction

import numpy as np
import pytest
from made_films import drawn, number_of, steady, write_film
from PIL import Image

from ssd import frames
from ssd.errors import ImageError, MissingExtra
from ssd.frames import Playback, checked, frames_of, with_frames
from ssd.images import load_image
from ssd.sources import Film, Frame, Named


@pytest.fixture(autouse=True)
def _no_thread_stays():
    before = threading.enumerate()
    yield
    assert threading.enumerate() == before


def chosen(times, **options):
    made = (Frame(None, number, float(time)) for number, time in enumerate(times))
    return [each.number for each in frames._chosen(made, checked(Playback(**options)))]


@pytest.mark.parametrize(
    ("times", "options", "expected"),
    [
        (steady(10), {}, list(range(10))),
        (steady(10), {"every": 3}, [0, 3, 6, 9]),
        (steady(30, Fraction(30)), {"max_fps": 30}, list(range(30))),
        (steady(30, Fraction(30)), {"max_fps": 20}, [n for n in range(30) if n % 3 != 1]),
        (steady(50, Fraction(25)), {"max_fps": 1}, [0, 25]),
        (steady(10, Fraction(5)), {"max_fps": 100}, list(range(10))),
        ([0, 0.1, 5, 5.1, 5.2, 5.5], {"max_fps": 4}, [0, 2, 5]),  # after a gap, it starts again
        (steady(12), {"every": 2, "max_fps": 6.25}, [0, 4, 8]),
    ],
)
def test_which_frames_are_taken(times, options, expected):
    assert chosen(times, **options) == expected


@pytest.mark.parametrize("options", [{"every": 0}, {"max_fps": 0}, {"max_fps": float("nan")}])
def test_nothing_to_be_seen(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        checked(Playback(**options))


# --- Films among images ---


def test_films_among_images(tmp_path):
    film = write_film(tmp_path / "a.mkv", [drawn(i) for i in range(3)])
    found = list(with_frames(["x.jpg", Film(str(film)), Named("y", Film(str(film))), "z.gif"]))
    assert [number for number, _ in found] == [0, 1, 1, 1, 2, 2, 2, 3]
    assert [source for _, source in (found[0], found[-1])] == ["x.jpg", "z.gif"]
    assert [(each.name, each.image.number, each.image.time) for _, each in found[1:4]] == [
        (str(film), number, number / 25) for number in range(3)
    ]


def test_paths_of_films_in_a_list(tmp_path):
    film = write_film(tmp_path / "a.mkv", [drawn(i) for i in range(2)])
    found = list(with_frames([film, str(film), "x.jpg"]))
    assert [(number, getattr(each, "name", each)) for number, each in found] == [
        *((number, str(film)) for number in (0, 0, 1, 1)),
        (2, "x.jpg"),
    ]


def test_the_error_of_a_film_comes_in_its_place(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no film at all")
    found = list(with_frames([Film(str(tmp_path / "a.mp4")), "x.jpg"]))
    assert found[1] == (1, "x.jpg")
    assert isinstance(found[0][1].image, ImageError)
    assert found[0][1].image.frames == 0


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ssd.video", None)
    monkeypatch.delattr("ssd.video", raising=False)
    with pytest.raises(ImportError):
        next(frames_of(Film("a.mp4")))
    assert "ssd300[video]" in str(MissingExtra("video"))


# --- Animations ---


def colors(count):
    return [Image.new("RGB", (12, 9), (40 * i, 255 - 40 * i, 7 * i)) for i in range(count)]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_animations(tmp_path, suffix):
    path, pictures = tmp_path / f"a{suffix}", colors(5)
    options = {"lossless": True} if suffix == ".webp" else {}
    durations = [40, 100, 40, 60, 20]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, **options)
    found = list(frames_of(Film(str(path), is_animation=True)))
    assert [(each.number, each.time) for each in found] == [
        (0, 0),
        (1, 0.04),
        (2, 0.14),
        (3, 0.18),
        (4, 0.24),
    ]
    for each, picture in zip(found, pictures, strict=True):
        assert np.array_equal(each.pixels, np.asarray(picture))
    assert np.array_equal(found[0].pixels, np.asarray(load_image(path)))
    assert len(list(with_frames([str(path)]))) == 1
    assert len(list(with_frames([str(path)], Playback(all_frames=True)))) == 5


def test_an_animation_that_is_cut_off(tmp_path):
    path = tmp_path / "a.gif"
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)) for _ in range(5)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    found = list(with_frames([str(path)], Playback(all_frames=True)))
    assert [each.image.number for _, each in found[:-1]] == [0, 1, 2]
    assert isinstance(found[-1][1].image, ImageError)
    assert found[-1][1].image.frames == 3


def test_the_number_is_read_from_a_frame():
    assert [number_of(drawn(i)) for i in range(200)] == list(range(200))
