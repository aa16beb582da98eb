"""``ssd detect --track``, ``--line``, ``--zone`` and ``--show``."""

import csv
import json
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import require_trackers
from made_films import drawn, write_film
from PIL import Image

from ssd.cli import window
from ssd.detections import Detections

FRAMES = [drawn(i) for i in range(12)]


@pytest.fixture
def film(tmp_path):
    return write_film(tmp_path / "clip.mkv", FRAMES)


def seen(frame, left):
    return {"boxes": [[left, 20, left + 20, 50]], "scores": [0.9], "class_ids": [0]}


@pytest.fixture
def found(monkeypatch):
    """A detector that sees one object in each frame, which goes to the right."""
    from ssd.detector import Detector

    def results(self, batch, found, options):
        return [
            Detections(
                **seen(each.frame, 5 + 6 * (each.frame or 0)),
                class_names=self.class_names,
                image_size=each.size[::-1],
                source=each.name,
                image=each.image,
                number=each.number,
                frame=each.frame,
                time=each.time,
            )
            for each in batch
        ]

    monkeypatch.setattr(Detector, "results", results)


@pytest.mark.parametrize("format", ["json", "jsonl", "csv", "coco", "yolo"])
def test_ids_and_counts_are_in_the_results(run, film, found, tmp_path, format):
    require_trackers()
    options = ("--line", "40,72,40,0", "--zone", "48,0,96,0,96,72,48,72", "--format", format)
    status, out, _ = run("detect", film, *options, "--output", "out", "--every", "2", "--batch-size", "4")
    assert status == 0
    assert out.splitlines()[-3:] == [
        f"6 images and frames, 6 detections, 1 tracked objects; results in {out_path(format)}",
        f"{film}: line 40,72,40,0: 0 in, 1 out",
        f"{film}: zone 48,0,96,0,96,72,48,72: 1 inside, 1 in all",
    ]
    ids = [-1, 1, 1, 1, 1, 1]
    folder = tmp_path / "out"
    line = {"line": [40, 72, 40, 0], "in": 0, "out": 1}
    zone = {"zone": [48, 0, 96, 0, 96, 72, 48, 72], "inside": 1, "total": 1}
    counts = json.loads((folder / "counts.json").read_text())
    assert counts == [{"source": str(film), "counts": [line, zone]}]
    if format == "yolo":
        lines = [path.read_text().split() for path in sorted((folder / "labels").iterdir())]
        assert [int(line[-1]) for line in lines] == ids
    elif format == "csv":
        with (folder / "detections.csv").open(newline="") as file:
            assert [int(row["track_id"]) for row in csv.DictReader(file)] == ids
    elif format == "coco":
        assert [each["track_id"] for each in json.loads((folder / "detections.json").read_text())] == ids
    else:
        text = (folder / f"detections.{format}").read_text()
        entries = json.loads(text) if format == "json" else [json.loads(line) for line in text.splitlines()]
        assert [each["detections"][0]["track_id"] for each in entries] == ids
        assert [each["counts"][0]["out"] for each in entries] == [0, 0, 0, 1, 1, 1]


def out_path(format):
    names = {"yolo": "labels", "csv": "detections.csv", "jsonl": "detections.jsonl"}
    ids = " (image ids count from 1, as the images come; --annotations FILE takes those of a dataset)"
    text = f"out/{names.get(format, 'detections.json')}{ids if format == 'coco' else ''}"
    return f"{text}, pictures in out, counts in out/counts.json"


def test_counts_that_cannot_be_written_are_told_and_shown(run, film, found, tmp_path, monkeypatch):
    require_trackers()

    def fail(contents):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssd.cli.detect.write_free", fail)
    status, out, err = run("detect", film, "--line", "40,72,40,0", "--output", "out", "--format", "csv")
    assert status == 1
    assert "ssd: left out out/counts.json: [Errno 28] No space left on device" in err
    assert out.splitlines()[-1] == f"{film}: line 40,72,40,0: 0 in, 1 out"
    assert (tmp_path / "out" / "detections.csv").is_file()


def test_films_share_no_ids(run, film, found, tmp_path):
    require_trackers()
    film.with_name("other.mkv").write_bytes(film.read_bytes())
    assert run("detect", "clip.mkv", "other.mkv", "--track", "--no-images", "--output", "out")[0] == 0
    entries = json.loads((tmp_path / "out" / "detections.json").read_text())
    ids = [(each["source"], each["detections"][0]["track_id"]) for each in entries]
    assert set(ids) == {("clip.mkv", -1), ("clip.mkv", 1), ("other.mkv", -1), ("other.mkv", 2)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--track",), "follows objects over the frames of films, and a.png is an image"),
        (("--line", "1,2,3"), "a line is two points: x1,y1,x2,y2; got 1,2,3"),
        (("--line", "1,2,3,x"), "could not convert string to float"),
        (("--zone", "1,2,3,4"), "a zone is three or more points"),
        (("--show", "--scaled-decoding", "--no-images"), "a window needs the whole image"),
    ],
)
def test_mistakes(run, tmp_path, options, message):
    if "--show" not in options:
        require_trackers()
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    status, _, err = run("detect", "a.png", *options)
    assert status == 2
    assert message in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "runs").exists()


def test_a_line_outside_of_the_film_ends_in_a_line(run, film):
    require_trackers()
    status, _, err = run("detect", film, "--line", "0,0,96,100")
    assert status == 1
    assert "has 96 x 72 pixels, and 0,0,96,100 reaches outside of it" in err


# --- The window -------------------------------------------------------------------------------------------


class FakeWindow:
    made: list = []

    def __init__(self, font):
        self.shown, self.is_closed = [], False
        FakeWindow.made.append(self)

    def show(self, found):
        self.shown.append(found.frame)
        return len(self.shown) < 5

    def close(self):
        self.is_closed = True


def test_q_ends_it_and_what_is_done_is_kept(run, film, found, tmp_path, monkeypatch):
    monkeypatch.setattr(window, "Window", FakeWindow)
    status, out, _ = run("detect", film, "--show", "--output", "out")
    assert status == 0
    assert "5 images and frames, 5 objects; results in" in out
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())) == 5
    assert (tmp_path / "out" / "clip.mp4").exists()
    made = FakeWindow.made.pop()
    assert made.shown == [0, 1, 2, 3, 4]
    assert made.is_closed


@pytest.mark.parametrize("reason", ["no display", "no tkinter"])
def test_without_a_window_one_hears_why(run, film, tmp_path, monkeypatch, reason):
    monkeypatch.delenv("DISPLAY", raising=False)
    if reason == "no tkinter":
        monkeypatch.setattr(window, "tkinter", None)
    elif window.tkinter is None or sys.platform in ("darwin", "win32"):
        pytest.skip("there is no tkinter, or always a display")
    status, _, err = run("detect", film, "--show")
    text = " ".join(err.replace("│", " ").split())
    assert status == 2
    assert ("there is no display to open a window on" if reason == "no display" else "python3-tk") in text
    assert not (tmp_path / "runs").exists()


def test_what_stands_in_the_corner():
    found = Detections([], [], [], ("cat",), (72, 96), source="a.mp4", frame=50, time=2.0)
    assert window.status(0, 0, found, 10) == "2.0 s"
    assert window.status(30, 2, found, 10) == "2.0 s, 15.0 frames/s"
    assert window.status(30, 2, replace(found, taken=9.75), 10) == "2.0 s, 15.0 frames/s, delay 0.25 s"
    assert window.status(0, 0, replace(found, frame=None, time=None), 10) == "a.mp4"


@pytest.fixture
def display(monkeypatch):
    pytest.importorskip("tkinter", reason="this Python has no tkinter")
    try:
        server = subprocess.Popen(
            ["Xvfb", "-displayfd", "1", "-screen", "0", "640x480x24"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    except FileNotFoundError:
        pytest.skip("there is no Xvfb (apt-get install xvfb)")
    try:
        number = server.stdout.readline().strip()
        if not number:
            pytest.skip("Xvfb does not start here")
        monkeypatch.setenv("DISPLAY", f":{number}")
        yield f":{number}"
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


def test_a_real_window(display):
    opened = window.Window()
    image = Image.new("RGB", (1600, 1200), (0, 90, 200))  # larger than the screen
    found = Detections([], [], [], ("cat",), (1200, 1600), source="a.mp4", image=image, frame=0, time=0.0)
    found = replace(found, taken=time.monotonic())
    assert opened.show(found)
    assert opened._root.winfo_width() <= 640
    from PIL import ImageGrab

    screen = np.asarray(ImageGrab.grab(xdisplay=display).convert("RGB"))
    assert ((screen == (0, 90, 200)).all(-1)).sum() > 0.5 * 480 * 360
    assert (screen[:30, :200] == 255).all(-1).any()  # the text in the corner
    for key in ("<Escape>", "<q>"):
        opened._is_open = True
        opened._root.focus_force()
        opened._root.update()
        opened._root.event_generate(key)
        assert not opened.show(found)
    opened.close()
