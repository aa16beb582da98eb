"""``ssd detect`` on films: what it writes, and what is left where it ends early."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys

import av
import numpy as np
import pytest
from conftest import SMALL_LAYOUT, command
from made_films import drawn, number_of, write_film
from PIL import Image

from ssd import checkpoint, video
from ssd.detector import Detector
from ssd.errors import ImageError
from ssd.frames import frames_of
from ssd.sources import Film

FRAMES = [drawn(i) for i in range(30)]
LEAST = 0.2
ALL = ("--score-threshold", "1")


@pytest.fixture(scope="module")
def tiny_file(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    checkpoint.save(path, tiny_model.state_dict(), ("cat", "cup", "person"), layout=SMALL_LAYOUT)
    return path


@pytest.fixture
def detect(run, tiny_file):
    def detect(*arguments, least=LEAST):
        options = (
            "--weights",
            tiny_file,
            "--score-threshold",
            least,
            "--precision",
            "fp32",
            "--output",
            "out",
        )
        return run("detect", *arguments, *options, weights=False)

    return detect


@pytest.fixture
def film(tmp_path):
    return write_film(tmp_path / "clip.mkv", FRAMES)


@pytest.fixture
def expected(tiny_model):
    return Detector(tiny_model, ("cat", "cup", "person"))(FRAMES, score_threshold=LEAST)


def numbers(path):
    return [number_of(each.pixels) for each in frames_of(Film(str(path)))]


def test_a_film(detect, film, tmp_path, expected):
    status, out, _ = detect("clip.mkv")
    assert status == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["clip.mp4", "detections.json"]
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [(each["source"], each["frame"], each["time"]) for each in written] == [
        ("clip.mkv", number, number / 25) for number in range(30)
    ]
    assert [each["detections"] for each in written] == [each.to_dict()["detections"] for each in expected]
    found = list(frames_of(Film(str(tmp_path / "out" / "clip.mp4"))))
    assert [each.time for each in found] == [number / 25 for number in range(30)]
    for each, frame, boxes in zip(found, FRAMES, expected, strict=True):
        picture = np.asarray(boxes.draw(enlarge=False)).astype(float)
        assert each.pixels.shape == picture.shape
        # The loss of H.264 is small beside what the boxes change.
        assert np.abs(each.pixels - picture).mean() < np.abs(each.pixels - frame.astype(float)).mean() / 2
    assert "clip.mkv frame 7 (0.280 s): " in out
    assert out.splitlines()[-1].startswith("30 images and frames, ")


@pytest.mark.parametrize("format", ["jsonl", "csv", "coco", "yolo"])
def test_formats(detect, film, tmp_path, expected, format):
    Image.fromarray(FRAMES[0]).save(tmp_path / "a.png")
    status, _, _ = detect("a.png", "clip.mkv", "--format", format, "--every", 10, "--no-images")
    assert status == 0
    out = tmp_path / "out"
    objects = [len(expected[number]) for number in (0, 10, 20)]
    assert sum(objects) > 0
    if format == "jsonl":
        lines = [json.loads(line) for line in (out / "detections.jsonl").read_text().splitlines()]
        assert [each.get("frame") for each in lines] == [None, 0, 10, 20]
        assert [len(each["detections"]) for each in lines] == [objects[0], *objects]
    elif format == "csv":
        with (out / "detections.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert {(row["frame"], row["time"]) for row in rows} == {
            ("", ""),
            ("0", "0.0"),
            ("10", "0.4"),
            ("20", "0.8"),
        }
        assert sum(row["frame"] == "20" for row in rows) == objects[2]
    elif format == "coco":
        entries = json.loads((out / "detections.json").read_text())
        assert len({each["image_id"] for each in entries}) == 4
        assert {(each["file_name"], each.get("frame"), each.get("time")) for each in entries} == {
            ("a.png", None, None),
            ("clip.mkv", 0, 0.0),
            ("clip.mkv", 10, 0.4),
            ("clip.mkv", 20, 0.8),
        }
    else:
        names = ["a.txt", "clip-000000.txt", "clip-000010.txt", "clip-000020.txt"]
        assert sorted(os.listdir(out / "labels")) == names
        assert (out / "labels" / "clip-000010.txt").read_text() == expected[10].to_yolo()


def test_photos_alone_have_no_columns_of_films(detect, tmp_path):
    Image.fromarray(FRAMES[0]).save(tmp_path / "a.png")
    detect("a.png", "--format", "csv", "--no-images")
    assert "frame" not in (tmp_path / "out" / "detections.csv").read_text()


def test_an_animation(detect, tmp_path):
    pictures = [Image.fromarray(each) for each in FRAMES[:4]]
    pictures[0].save("a.webp", save_all=True, append_images=pictures[1:], duration=80, lossless=True)
    assert detect("a.webp", "--format", "jsonl", "--all-frames", least=1)[0] == 0
    lines = (tmp_path / "out" / "detections.jsonl").read_text().splitlines()
    assert [json.loads(each)["time"] for each in lines] == [0, 0.08, 0.16, 0.24]
    assert numbers(tmp_path / "out" / "a.mp4") == [0, 1, 2, 3]
    assert detect("a.webp")[0] == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["a.mp4", "a.webp", "detections.json", "detections.jsonl"]


def test_nothing_is_overwritten(detect, film, tmp_path):
    for _ in range(2):
        assert detect("clip.mkv", "--format", "yolo", "--every", 15)[0] == 0
    assert sorted(os.listdir(tmp_path / "out")) == [
        "classes-2.txt",
        "classes.txt",
        "clip-2.mp4",
        "clip.mp4",
        "labels",
    ]
    names = ["clip-000000.txt", "clip-000015.txt", "clip-2-000000.txt", "clip-2-000015.txt"]
    assert sorted(os.listdir(tmp_path / "out" / "labels")) == names


def test_a_film_that_breaks_off(detect, film, tmp_path):
    content = film.read_bytes()
    film.write_bytes(content[: len(content) // 2])
    status, out, err = detect("clip.mkv", "--format", "jsonl", least=1)  # no box hides the number
    assert status == 1
    assert "ssd: left out the rest of clip.mkv: breaks off at " in err
    lines = (tmp_path / "out" / "detections.jsonl").read_text().splitlines()
    assert 5 < len(lines) < 25
    assert numbers(tmp_path / "out" / "clip.mp4") == list(range(len(lines)))
    assert f"{len(lines)} images and frames, " in out
    assert ", 1 left out" in out


def test_a_film_with_sound_that_is_left_out(detect, tmp_path):
    write_film(tmp_path / "clip.avi", FRAMES[:9], sound="adpcm_ms")
    with pytest.warns(UserWarning, match=r"^clip\.avi: MP4 cannot hold its sound, of adpcm_ms; ") as told:
        assert detect("clip.avi")[0] == 0
    assert len(told) == 1
    assert len(numbers(tmp_path / "out" / "clip.mp4")) == 9


def test_films_are_not_gone_on_with(run, film, tmp_path):
    (tmp_path / "run").mkdir()
    status, _, err = run("detect", film, "--resume", "run")
    assert status == 2
    text = " ".join(err.replace("│", " ").split())
    assert "for --resume: takes images that are known beforehand" in text
    assert "begin films anew, without it" in text
    assert "several processes" not in text


def test_a_film_of_an_odd_size(detect, tmp_path):
    pictures = [Image.new("RGB", (201, 161), color) for color in ("red", "blue")]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:])
    with pytest.warns(UserWarning, match=r"^a\.gif: the film with boxes is 202x162, not 201x161, ") as told:
        assert detect("a.gif", "--all-frames")[0] == 0
    assert len(told) == 1


def test_a_film_that_cannot_be_encoded(detect, tmp_path):
    """Its results are written all the same."""
    pictures = [Image.new("RGB", (20_000, 210), color) for color in ("red", "blue")]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:])
    status, out, err = detect("a.gif", "--all-frames", "--format", "jsonl")
    assert status == 1
    assert err.count("ssd: the film with boxes of a.gif ends early: ") == 1
    assert "does not encode pictures of 20000x210" in err
    assert os.listdir(tmp_path / "out") == ["detections.jsonl"]
    assert out.splitlines()[-1].startswith("2 images and frames, ")


def test_a_full_disk_ends_the_film_and_not_the_results(detect, film, tmp_path, monkeypatch):
    real, count = video.FilmWriter.add, []

    def add(self, picture, time):
        count.append(time)
        if len(count) > 20:
            self._file.failed = True
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, picture, time)

    monkeypatch.setattr(video.FilmWriter, "add", add)
    status, _, err = detect("clip.mkv", "--format", "jsonl")
    assert status == 1
    assert err.count("the film with boxes of clip.mkv ends early: No space left on device") == 1
    assert len((tmp_path / "out" / "detections.jsonl").read_text().splitlines()) == 30
    assert len(count) == 21  # nothing is written after the first error
    assert [each for each in os.listdir(tmp_path / "out") if each.endswith(".tmp")] == []


def test_ctrl_c(film, tmp_path, tiny_file):
    """What is done until then can be played and read."""
    write_film(tmp_path / "clip.mkv", [drawn(i % 250) for i in range(3000)])
    process = subprocess.Popen(
        command("detect", "clip.mkv", "--weights", tiny_file, "--output", "out", "--format", "jsonl", *ALL),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if "frame 60 " in line:
            process.send_signal(signal.SIGINT)
            break
    rest, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "results in out/detections.jsonl" in rest
    lines = [json.loads(each) for each in (tmp_path / "out" / "detections.jsonl").read_text().splitlines()]
    assert 60 < len(lines) < 3000
    assert [each["frame"] for each in lines] == list(range(len(lines)))
    found = []
    try:
        found.extend(numbers(tmp_path / "out" / "clip.mp4"))
    except ImageError as error:
        assert "within a picture" in str(error)
    assert [each % 250 for each in range(len(found))] == found
    assert len(found) >= 25


def test_films_beside_photos_in_a_folder(detect, tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(FRAMES[0]).save(tmp_path / "in" / "a.png")
    write_film(tmp_path / "in" / "b.mkv", FRAMES[:3])
    (tmp_path / "in" / "c.mp4").write_bytes(b"none")
    status, out, err = detect("in")
    assert status == 1
    assert "left out in/c.mp4: cannot be opened as a film" in err
    assert sorted(os.listdir(tmp_path / "out")) == ["a.png", "b.mp4", "detections.json"]
    assert out.splitlines()[-1].startswith("4 images and frames, ")


SOAK = """
import os, sys, threading
from dataclasses import replace
from pathlib import Path
import torch
from ssd.cli.coco_ids import ids_by_name
from ssd.cli.results import FreeNames, Results
from ssd.detector import Detector

def held():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), threading.active_count()

weights, film = sys.argv[1:]
torch.set_num_threads(1)
detector = Detector.load(weights, "cpu", "fp32")
one = (torch.tensor([[0.2, 0.2, 0.6, 0.6]]), torch.tensor([0.9]), torch.tensor([1]))
# The network itself would take minutes, and is soaked by benchmarks/soak.py.
detector.detect = lambda batch, options: detector.results(batch, [one] * len(batch), options)
names = FreeNames(Path("."), pictures=True, labels=None)
ids = ids_by_name([film])
with Results(Path("."), "csv", names, detector.class_names, ids, pictures=True, frames=True) as out:
    for found in detector.stream(film, batch_size=32):
        out.add(found if found.frame % 8 == 0 else replace(found, image=None))
        if (found.frame + 1) % 4000 == 0:
            print(*held())
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
def test_memory_is_flat_over_a_long_film(tmp_path, tiny_file):
    """20,000 frames of 9 kB, of which one of 8 is drawn on: if each were kept, it would be seen."""
    frames = [drawn(number, (64, 48)) for number in range(250)] * 80
    (tmp_path / "in").mkdir()
    write_film(tmp_path / "in" / "clip.mp4", frames, codec="mpeg4", pixels="yuv420p")
    code = [sys.executable, "-c", SOAK, str(tiny_file), "in/clip.mp4"]
    result = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, check=True)
    first, *_, last = held = [[int(each) for each in line.split()] for line in result.stdout.splitlines()]
    assert len(held) == 5
    assert last[0] - first[0] < 40e6, held  # all frames between are 147 MB
    assert held[-2][1:] == first[1:], held  # files and threads, before they end
    assert len((tmp_path / "detections.csv").read_text().splitlines()) == 20_001
    with av.open(str(tmp_path / "clip.mp4")) as film:
        assert film.streams.video[0].frames == 2500
