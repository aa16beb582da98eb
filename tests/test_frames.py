"""The thread that is ahead, which frames are taken, and animations."""

import os
import threading
from fractions import Fraction
from queue import SimpleQueue

import numpy as np
import pytest
from made_films import drawn, number_of, steady, write_film
from PIL import Image

from ssd import frames
from ssd.errors import ImageError, MissingExtra
from ssd.frames import Behind, Playback, ahead, checked, frames_of, with_frames
from ssd.images import load_image
from ssd.sources import Film, Frame, Named


def threads():
    return [each for each in threading.enumerate() if each.name in ("ssd-frames", "ssd-behind")]


@pytest.fixture(autouse=True)
def _no_thread_stays():
    before = threads()
    yield
    assert threads() == before


# --- The thread ---


def test_items_come_in_their_order():
    assert list(ahead(iter(range(100)), 3)) == list(range(100))
    assert list(ahead(iter(()), 3)) == []


def test_only_so_many_are_made_ahead():
    made, asked = [], SimpleQueue()

    def items():
        for number in range(20):
            made.append(number)
            asked.put(number)
            yield number

    found = ahead(items(), 3)
    assert next(found) == 0
    for _ in range(5):  # three that wait, the one that was taken, and the one for which there is no room
        asked.get()
    assert len(made) <= 6
    found.close()
    assert len(made) <= 6


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise ImageError("film: breaks off")

    found = ahead(items(), 3)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(ImageError, match="breaks off"):
        next(found)


@pytest.mark.parametrize("way", ["close", "error", "lost"])
def test_the_thread_ends_with_its_consumer(way):
    closed = SimpleQueue()

    def items():
        try:
            while True:
                yield 0
        finally:
            closed.put(threading.current_thread().name)

    found = ahead(items(), 2)
    next(found)
    assert threads()
    if way == "close":
        found.close()
    elif way == "error":
        with pytest.raises(KeyboardInterrupt):
            found.throw(KeyboardInterrupt)
    del found
    assert closed.get() == "ssd-frames"  # what it reads is closed where it is used


def test_live_items_are_dropped_oldest_first():
    made, dropped, go = SimpleQueue(), [], SimpleQueue()

    def items():
        yield from range(10)
        made.put(None)
        go.get()

    found = frames._Ahead(items(), 3, dropped.append)
    made.get()  # nobody has taken any, and all ten are made
    assert dropped == [0, 1, 2, 3, 4, 5, 6]
    go.put(None)
    assert list(found) == [7, 8, 9]
    found.join(float("inf"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_in_a_forked_process_it_says_so():
    found = ahead(iter(range(9)), 2)
    next(found)
    pid = os.fork()
    if not pid:
        try:
            next(found)
        except RuntimeError as error:
            os._exit(7 if "begin it anew" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    found.close()


def test_what_is_done_behind_is_done_in_order():
    done = []
    behind = Behind(done.append, 3)
    for number in range(100):
        behind.put(number)
    behind.end()
    assert done == list(range(100))
    assert behind.error is None
    behind.join(float("inf"))


def test_one_waits_for_what_is_behind():
    begun, go = SimpleQueue(), SimpleQueue()

    def do(number):
        begun.put(number)
        go.get()

    behind = Behind(do, 2)
    behind.put(0)
    behind.put(1)
    waiting = threading.Thread(target=behind.put, args=(2,))
    waiting.start()
    assert begun.get() == 0
    waiting.join(0.05)
    assert waiting.is_alive()
    for _ in range(3):
        go.put(None)
    waiting.join()
    behind.end()
    behind.join(float("inf"))


def test_nothing_is_done_after_an_error():
    done = []

    def do(number):
        done.append(number)
        if number == 1:
            raise OSError("the disk is full")

    behind = Behind(do, 1)
    for number in range(9):
        behind.put(number)
    behind.end()
    assert done == [0, 1]
    assert str(behind.error) == "the disk is full"
    behind.join(float("inf"))


# --- Which frames ---


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
