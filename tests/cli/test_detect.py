import errno
import json
import os
import signal
import struct
import subprocess
import threading
from itertools import combinations

import numpy as np
import pytest
from conftest import PHOTOS, SMALL_LAYOUT, command
from PIL import Image

from ssd import checkpoint, detections, drawing, files
from ssd.cli.detect import _names
from ssd.cli.results import FreeNames, Results
from ssd.detector import Detector
from ssd.sources import SOURCES, Named, Source


def test_detect_a_folder(run, photos, tmp_path, weights_file):
    status, out, err = run("detect", photos)
    assert status == 0
    folder = tmp_path / "runs" / "detect-1"
    assert sorted(os.listdir(folder)) == [*(f"{name}.jpg" for name in sorted(PHOTOS)), "detections.json"]
    written = json.loads((folder / "detections.json").read_text())
    expected = [each.to_dict() for each in Detector.load(weights_file).stream(photos, score_threshold=0.35)]
    assert written == expected
    assert sum(len(each["detections"]) for each in written) > 0
    lines = out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(f"{photos / 'astronaut.jpg'}: ")
    assert lines[-1].startswith("3 images, ")
    assert lines[-1].endswith("; results in runs/detect-1/detections.json, pictures in runs/detect-1")
    assert "it/s" not in err
    with Image.open(folder / "coffee.jpg") as picture:
        assert picture.size == (600, 400)


def test_one_image_is_shown_as_a_table(run, photos):
    _, out, _ = run("detect", photos / "coffee.jpg", "--max-detections", 2)
    assert len([line for line in out.splitlines() if "%" in line]) == 2


def test_one_bad_image_never_stops_the_rest(run, photos, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    status, out, err = run("detect", "bad.jpg", photos / "coffee.jpg", "gone.jpg", "--output", "out")
    assert status == 1
    assert "left out bad.jpg: this is a text file" in err
    assert "left out gone.jpg: no such file" in err
    assert "1 image, " in out
    assert "2 left out" in out
    assert sorted(os.listdir(tmp_path / "out")) == ["coffee.jpg", "detections.json"]


def test_only_bad_images(run, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"")
    status, out, _ = run("detect", "bad.jpg", "--output", "out")
    assert status == 1
    assert "0 images, 0 objects, 1 left out; results in out/detections.json" in out
    assert json.loads((tmp_path / "out" / "detections.json").read_text()) == []


def test_urls_and_globs(run, photos, server, tmp_path):
    url = server.serve("/some%20photo.jpg?x=1", (photos / "coffee.jpg").read_bytes(), kind="image/jpeg")
    status, _, _ = run("detect", url, f"{photos}/c*.jpg", "--output", "out")
    assert status == 0
    assert sorted(os.listdir(tmp_path / "out")) == [
        "chelsea.jpg",
        "coffee.jpg",
        "detections.json",
        "some photo.jpg",
    ]


def test_classes_and_precision(run, photos, tmp_path):
    status, _, _ = run(
        "detect", photos, "--classes", "cat, person", "--precision", "bf16", "--output", "out", "--no-images"
    )
    assert status == 0
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {found["name"] for each in written for found in each["detections"]} <= {"cat", "person"}


def test_a_picture_that_cannot_be_written_never_stops_the_rest(run, photos, tmp_path):
    Image.new("RGB", (9000, 100)).save(tmp_path / "wide.webp")  # enlarged, it is too wide for WebP
    status, out, err = run("detect", "wide.webp", photos / "coffee.jpg", "--output", "out")
    assert status == 1
    assert "left out wide.webp" in err
    assert "1 image, " in out
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())) == 1


def test_results_are_kept_when_something_unforeseen_happens(run, photos, tmp_path, monkeypatch):
    def fail_on_chelsea(found, **options):
        if "chelsea" in found.source:
            raise RuntimeError("unforeseen")
        return original(found, **options)

    original = detections.Detections.draw
    monkeypatch.setattr(detections.Detections, "draw", fail_on_chelsea)
    with pytest.raises(RuntimeError, match="unforeseen"):
        run("detect", photos, "--output", "out")
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())) == 1


def test_missing_weights_end_in_a_line(run, photos, tmp_path):
    status, _, err = run("detect", photos, weights=False)
    assert status == 1
    assert err.splitlines()[0].startswith("downloading https://api.ngc.nvidia.com/")
    assert err.splitlines()[1].startswith("ssd: could not download https://api.ngc.nvidia.com/")
    assert "--weights" in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()
    status, _, err = run("detect", photos, "--weights", "gone.pt", weights=False)
    assert status == 1
    assert err.startswith("ssd: no weights at gone.pt")


def test_damaged_weights_end_in_a_line(run, photos, tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"PK\x03\x04")
    status, _, err = run("detect", photos, "--weights", "bad.pt", weights=False)
    assert status == 1
    assert err.startswith("ssd: bad.pt: damaged")


def test_a_terminal_has_a_progress_bar(photos, tmp_path, weights_file):
    pty, fcntl, termios = (
        pytest.importorskip(name) for name in ("pty", "fcntl", "termios")
    )  # not on Windows
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        command("detect", photos, "--weights", weights_file),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=terminal,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(main, 4096):
            shown += chunk
    except OSError:  # the terminal is gone when its last user is
        pass
    os.close(main)
    assert process.wait(60) == 0
    assert b"3/3" in shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_keep_what_is_done(photos, tmp_path, server, weights_file, number):
    """The third image never comes; the first two are there when the command is interrupted."""
    asked = threading.Event()

    def stall(handler):
        asked.set()
        server.closing.wait(60)

    server.pages["/slow.jpg"] = stall
    process = subprocess.Popen(
        command(
            "detect",
            photos / "coffee.jpg",
            photos / "chelsea.jpg",
            server.url("/slow.jpg"),
            *("--weights", weights_file, "--output", "out", "--batch-size", 1, "--no-images"),
        ),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd(), "PYTHONUNBUFFERED": "1"},
    )
    assert asked.wait(60)
    lines = [process.stdout.readline() for _ in range(2)]
    process.send_signal(number)
    out = process.stdout.readline()
    server.closing.set()  # not earlier: the command would see what came first
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "coffee.jpg" in lines[0]
    assert "2 images" in out
    assert "1 not reached" in out
    assert rest == ""
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())) == 2


@pytest.mark.parametrize("is_listed", [True, False])
def test_a_toy_source_by_one_row(run, tmp_path, monkeypatch, is_listed):
    """Its images may come one after another, so that nobody knows how many there are."""

    def squares(text):
        for i in range(int(text.removeprefix("squares:"))):
            yield Named(f"square {i}", np.full((64, 64, 3), 50 * i, np.uint8))

    kind = Source(lambda text: text.startswith("squares:"), squares, is_listed=is_listed)
    monkeypatch.setitem(SOURCES, "squares", kind)
    status, out, _ = run("detect", "squares:3", "squares:2", "--output", "out")
    assert status == 0
    assert out.splitlines()[-1].startswith("3 images, ")
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [each["source"] for each in written] == ["square 0", "square 1", "square 2"]
    assert {"square 0.jpg", "square 1.jpg", "square 2.jpg"} < set(os.listdir(tmp_path / "out"))
    status, _, _ = run("detect", "squares:2", "--output", "coco", "--format", "coco", "--score-threshold", 0)
    assert status == 0
    entries = json.loads((tmp_path / "coco" / "detections.json").read_text())
    assert {(each["image_id"], each["file_name"]) for each in entries} == {(1, "square 0"), (2, "square 1")}


class Second:
    """The second of two processes; the first one has begun to write when this one asks for names."""

    rank, size, is_main = 1, 2, False

    def __init__(self, folder, listed):
        self.folder, self.listed = folder, listed

    def gather(self, value):
        first = FreeNames(self.folder, pictures=True, labels=None)
        names = {name: first(name) for name in self.listed}
        (self.folder / names[self.listed[0]]).touch()
        return [names, value]


def test_processes_take_the_names_that_the_main_one_gives(tmp_path):
    listed = ["a/x.jpg", "b/x.jpg"]
    names = _names(tmp_path, "json", listed, Second(tmp_path, listed), pictures=True)
    assert [names(name) for name in listed] == ["x.jpg", "x-2.jpg"]


def test_folders_are_made_before_the_work(run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("ssd.cli.detect.load_detector", lambda *_, **__: pytest.fail("too early"))
    (tmp_path / "runs").symlink_to(tmp_path / "not mounted")
    status, _, err = run("detect", photos)
    assert status == 1
    assert err == (
        f"ssd: cannot write to the folder runs: runs is a link to {tmp_path / 'not mounted'}, which is not "
        "there; mend that, or choose another with --output\n"
    )
    (tmp_path / "out").touch()
    assert "is a file" in " ".join(run("detect", photos, "--output", "out")[2].replace("│", "").split())


def test_what_was_found_is_shown_where_it_cannot_be_written(run, photos, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    # The disk is full when a picture is written ...
    monkeypatch.setattr(Results, "write_own", full)
    status, out, err = run("detect", photos / "coffee.jpg")
    assert status == 1
    assert len([line for line in out.splitlines() if "%" in line]) > 0
    assert f"left out {photos / 'coffee.jpg'}: [Errno 28] No space left" in err
    assert "0 images, 0 objects, 1 left out" in out
    # ... or when the file of all results is.
    monkeypatch.setattr(Results, "add", lambda *_: None)
    monkeypatch.setattr(files.os, "fsync", full)
    status, out, err = run("detect", photos)
    assert status == 1
    assert len(out.splitlines()) == 4
    assert out.splitlines()[-1].endswith("objects; the results are not written")
    assert "ssd: [Errno 28] No space left on the disk for detections.json" in err
    assert os.listdir("runs") == ["detect-1"]


def test_what_a_folder_leaves_out_is_one_line(run, photos, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "c.mp3"):
        (folder / name).touch()
    (folder / "coffee.jpg").write_bytes((photos / "coffee.jpg").read_bytes())
    status, _, err = run("detect", "photos", "--no-images")
    assert (status, err) == (0, "ssd: left out of photos: 2 .txt, 1 .mp3\n")
    status, _, err = run("detect", *map(str, sorted(folder.iterdir())), "--no-images")
    assert (status, err) == (0, "ssd: left out of the sources: 2 .txt, 1 .mp3\n")


def test_the_limit_of_pixels(run, photos):
    status, _, err = run("detect", photos / "coffee.jpg", "--no-images", "--max-pixels", 239_999)
    assert status == 1
    assert "240000" in err
    assert run("detect", photos / "coffee.jpg", "--no-images", "--max-pixels", 240_000)[0] == 0


def test_names_that_cannot_be_drawn_are_told_and_written(run, photos, tmp_path, small_model, monkeypatch):
    monkeypatch.setattr(drawing, "_system_fonts", list)
    monkeypatch.setattr(drawing, "_home_of", {})
    names = ("\u732b", "\u676f", "person")
    checkpoint.save(tmp_path / "own.safetensors", small_model.state_dict(), names)
    options = ("--weights", "own.safetensors", "--output", "out")
    status, _, err = run("detect", photos / "coffee.jpg", *options)
    assert status == 0
    assert err.startswith("ssd: no font here can draw \u676f \u732b of the class names: pictures have ?")
    assert len(err.splitlines()) == 1
    [written] = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {each["name"] for each in written["detections"]} & set(names)
    assert run("detect", photos / "coffee.jpg", *options, "--no-images")[2] == ""
    (tmp_path / "bad.ttf").write_bytes(b"x")
    status, _, err = run("detect", photos / "coffee.jpg", *options, "--font", "bad.ttf")
    assert status == 1
    assert err.startswith("ssd: bad.ttf: cannot be read as a font, TrueType or OpenType")


def test_classes_that_name_none_are_a_mistake(run, photos):
    status, _, err = run("detect", photos / "coffee.jpg", "--classes", ",")
    assert status == 2
    assert "names no class" in err


def test_tiles_are_those_of_the_detector(run, photos, weights_file, tmp_path):
    status, _, _ = run("detect", photos, "--no-images", "--output", tmp_path / "out", "--tiles", 200)
    assert status == 0
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    expected = Detector.load(weights_file).stream(photos, tiles=200, score_threshold=0.35)
    assert [len(each["detections"]) for each in found] == [len(each) for each in expected]
    status, _, err = run("detect", photos, "--no-images", "--tiles", 200, "--scaled-decoding")
    assert status == 2
    assert "tiles need the whole image" in err


def test_voting_and_flips_are_those_of_the_detector(run, photos, weights_file, tmp_path):
    written = []
    for options in ((), ("--voting",), ("--flips",), ("--voting", "--flips")):
        out = tmp_path / f"out{len(written)}"
        status, _, _ = run("detect", photos, "--no-images", "--output", out, *options)
        assert status == 0
        written.append(json.loads((out / "detections.json").read_text()))
        wanted = {name[2:]: True for name in options}
        expected = Detector.load(weights_file).stream(photos, score_threshold=0.35, **wanted)
        assert written[-1] == [each.to_dict() for each in expected]
    assert all(a != b for a, b in combinations(written, 2))


def test_thresholds_of_the_weights(run, photos, tmp_path, tiny_model):
    names, limits = ("cat", "cup", "person"), (1.0, 0.3, 1.0)
    for name, thresholds in (("own", limits), ("none", ())):
        checkpoint.save(
            tmp_path / f"{name}.safetensors",
            tiny_model.state_dict(),
            names,
            layout=SMALL_LAYOUT,
            score_thresholds=thresholds,
        )
    command = ("detect", photos / "coffee.jpg", "--no-images", "--score-threshold", "calibrated", "--weights")
    status, _, err = run(*command, "own.safetensors", weights=False)
    assert status == 0, err
    (written,) = json.loads((tmp_path / "runs" / "detect-1" / "detections.json").read_text())
    found = Detector.load(tmp_path / "own.safetensors")(photos / "coffee.jpg", score_threshold=0.3)
    expected = [each.score for each in found if each.name == "cup"]
    assert expected
    assert [each["score"] for each in written["detections"]] == pytest.approx(expected)
    status, _, err = run(*command, "none.safetensors", weights=False)
    assert status == 2
    assert "these weights have none" in " ".join(err.replace("│", " ").split())
    for wrong in ("1.5", "nan", "best"):
        status, _, err = run("detect", photos, "--score-threshold", wrong)
        assert status == 2
        told = f"'{wrong}' is neither a number from 0 to 1 nor \"calibrated\""
        assert told in " ".join(err.replace("│", " ").split())
