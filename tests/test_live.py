"""Cameras and RTSP streams: what is claimed, what is lost and comes back, what is dropped."""

import threading
from queue import SimpleQueue

import numpy as np
import pytest
from made_films import drawn, number_of, write_film
from rtsp_server import RtspServer

from ssd import frames, video
from ssd.cli.results import FreeNames
from ssd.detector import Detector
from ssd.errors import ImageError
from ssd.frames import Playback, frames_of, with_frames
from ssd.sources import Film, Frame, Named, find_all, find_images

NAME = "rtsp://127.0.0.1/cam"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(video, "FIRST_PAUSE", 0)


@pytest.fixture
def film(tmp_path):
    how = {"codec": "libx264", "pixels": "yuv420p", "options": {"g": "5", "bf": "0"}}
    return write_film(tmp_path / "a.ts", [drawn(i) for i in range(30)], **how)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("0", "0"),
        ("12", "12"),
        ("/dev/video0", "/dev/video0"),
        ("rtsp://host/cam", "rtsp://host/cam"),
        ("RTSP://me:se@cret@host:554/a/b@c?d", "RTSP://host:554/a/b@c?d"),
        ("rtsps://me:secret@host", "rtsps://host"),
    ],
)
def test_live_sources_and_their_names(tmp_path, monkeypatch, text, name):
    monkeypatch.chdir(tmp_path)
    assert list(find_images(text, films=True)) == [Named(name, Film(text, is_live=True))]
    assert list(find_all([text, "gone.jpg"]))[0] == Named(name, Film(text, is_live=True))


@pytest.mark.parametrize("text", ["100", "0.jpg", "/dev/video", "1e3", "http://host/cam"])
def test_what_is_not_live(text):
    assert list(find_images(text, films=True)) == [Named(text, text)]


def test_a_file_that_is_called_by_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0").write_bytes(b"")
    assert list(find_images("0", films=True)) == [Named("0", "0")]


def test_names_of_results(tmp_path):
    names = FreeNames(tmp_path, pictures=True, labels=None)
    assert [names(text) for text in ("rtsp://host:554/cam1", "0", "/dev/video0")] == [
        "cam1.jpg",
        "0.jpg",
        "video0.jpg",
    ]


def test_a_stream_that_is_lost_and_comes_back(film):
    """The server is gone after each film; numbers and times go on."""
    pauses, found = [], []
    with (
        RtspServer([film, film]) as server,
        pytest.warns(UserWarning, match="cam: was lost") as told,
        pytest.raises(ImageError, match="cam: was lost after frame") as error,
    ):
        found.extend(video.live(server.address, NAME, retries=3, wait=pauses.append))
    assert server.connections == 2
    numbers = [number_of(each.pixels) for each in found]
    first = numbers.index(0, 1)
    assert numbers[:first] == list(range(first))
    assert numbers[first:] == list(range(len(numbers) - first))
    assert first > 25
    assert [each.number for each in found] == list(range(len(found)))
    times = [each.time for each in found]
    assert times[:3] == [0, 0.04, 0.08]
    assert times == sorted(times)
    assert [text.message.args[0].partition("; ")[2] for text in told] == [
        f"opened again in 0 s, {number} of 3 times" for number in (1, 1, 2, 3)
    ]
    assert not any("secret" in str(each.message) for each in told)
    assert "secret" not in str(error.value)


def test_pauses_grow(film, monkeypatch):
    monkeypatch.setattr(video, "FIRST_PAUSE", 1.0)
    pauses = []
    with (
        RtspServer([film]) as server,
        pytest.warns(UserWarning, match="was lost"),
        pytest.raises(ImageError, match="does not come back"),
    ):
        list(video.live(server.address, NAME, retries=7, wait=pauses.append))
    assert pauses == [1, 2, 4, 8, 16, 30, 30]


@pytest.mark.filterwarnings("ignore:.*was lost")
def test_who_stops_does_not_wait_for_a_pause(film):
    with RtspServer([film]) as server:
        assert len(list(video.live(server.address, NAME, wait=lambda _: True))) > 25


def test_what_cannot_be_opened():
    with RtspServer([]) as server:
        pass
    with pytest.raises(ImageError, match=r"cam: cannot be opened \(Connection refused\)"):
        next(video.live(server.address, NAME))
    with pytest.raises(ImageError, match=r"/dev/video99: cannot be opened"):
        next(frames_of(Film("/dev/video99", is_live=True)))


def test_frames_that_come_too_fast_are_dropped_and_counted(monkeypatch):
    made, go = SimpleQueue(), SimpleQueue()

    def live(*_, **__):
        for number in range(20):
            yield Frame(drawn(number), number, number / 25)
            if number == 0:
                go.get()
        made.put(None)

    monkeypatch.setattr(video, "live", live)
    found = frames_of(Film("0", is_live=True), Playback(every=2))
    assert next(found).number == 0
    go.put(None)
    made.get()  # of 2, 4 ... 18 there are all, and nobody has taken any
    with pytest.warns(UserWarning, match="^0: 7 frames were dropped, as newer ones came before they"):
        assert [each.number for each in found] == [16, 18]


@pytest.mark.filterwarnings("ignore:.*(was lost|dropped)")
def test_detection_on_a_stream(film, tiny_model):
    detector = Detector(tiny_model, ("cat", "cup", "person"))
    errors = []
    with RtspServer([film]) as server:
        stream = detector.stream(
            server.address, retries=0, on_error=lambda name, error: errors.append((name, error))
        )
        found = list(stream)
    assert 0 < len(found) <= 30
    name = server.address.replace("user:secret@", "")
    assert {each.source for each in found} == {name}
    numbers = [each.frame for each in found]
    assert numbers == sorted(set(numbers))
    assert [number_of(np.asarray(each.image)) for each in found] == numbers
    ((where, error),) = errors
    assert where == name
    assert error.frames == len(found)
    assert not [each for each in threading.enumerate() if each.name == "ssd-ahead"]


@pytest.mark.parametrize("kind", ["named", "film", "text"])
def test_an_error_is_named_without_the_password(kind):
    text = "rtsp://me:secret@127.0.0.1:9/x"
    film = Film(text, is_live=True)
    source = {"named": Named("rtsp://127.0.0.1:9/x", film), "film": film, "text": text}[kind]
    ((_, broken),) = with_frames([source])
    assert broken.name == "rtsp://127.0.0.1:9/x"
    assert "secret" not in str(broken.image)
    assert frames.ALL.retries == 5
