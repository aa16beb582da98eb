"""Every command that writes, on a disk that fails at each of its calls in turn; see `faults`.

What was there before stays as it is, what is new is as on a good disk or absent, nothing temporary stays, and
the exit status and what is said of it are true.
"""

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import SMALL_LAYOUT
from faults import ALL, QUICK, Disk, failing
from made_films import drawn, write_film
from PIL import Image
from training import SMALL, make_run

from ssd import benchmark, checkpoint, cli, export, pretrained, shapes, triton
from ssd.backends import BACKENDS, Metadata
from ssd.boxes import LAYOUTS
from ssd.cli.evaluate import detect_all
from ssd.data import DetectionDataset, load
from ssd.detector import Detector
from ssd.errors import ImageError, UserError
from ssd.train import fit
from ssd.train.state import save_state
from ssd.video import decoded

EARLIER = b"earlier"


@dataclass
class Outcome:
    """Of a command."""

    status: int
    out: str
    err: str


def ssd(*arguments):
    """Runs the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", ["ssd", *map(str, arguments)])
        with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit:
            cli.main()
    return Outcome(exit.value.code or 0, out.getvalue(), err.getvalue())


def api(function, *arguments, **options):
    """Calls a function, whose errors of ours, or of the disk, are what a command would end in."""
    try:
        function(*arguments, **options)
    except (UserError, OSError) as error:
        return Outcome(1, "", f"ssd: {error}\n")
    return Outcome(0, "", "")


def pictures_in(film):
    """How many pictures of a film can be played."""
    count = 0
    with contextlib.suppress(ImageError):
        for _ in decoded(str(film)):
            count += 1
    return count


def files_of(folder):
    """Contents by name; of safetensors, whose header comes in any order, what it says; of films, how many
    pictures."""
    files = {}
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if path.suffix == ".safetensors" and content != EARLIER:
                size = int.from_bytes(content[:8], "little")
                content = (json.loads(content[8 : 8 + size]), content[8 + size :])
            # Encoders of several threads may give other bytes when a machine is busy.
            if path.suffix == ".mp4" and content != EARLIER:
                content = pictures_in(path)
            # Both have the seconds of an epoch, and an earlier state may be the last.
            if path.name == "state.pt" and content != EARLIER:
                content = sorted(torch.load(io.BytesIO(content), weights_only=True))
            if path.name == "metrics.csv":
                content = [line.count(b",") for line in content.split(b"\n")]
            files[path.relative_to(folder).as_posix()] = content
    return files


def judge(outcome, before, good, now, disk):
    """`good`: what is there after the command on a good disk."""
    told = f"{disk.kind} {disk.number} of {disk.calls}: {outcome}"
    for name, content in before.items():
        allowed = (content, good[name])  # what is replaced is the earlier one, or the new one
        assert now.get(name) in allowed, f"{name} was lost; {told}"
    for name in now.keys() - before.keys():
        assert name in good, f"{name} was left; {told}"
        if name.endswith(".mp4"):
            assert now[name] > 0, f"{name} cannot be played; {told}"
        elif not re.search(r"detections(-2)?\.(jsonl?|csv)$", name):  # which may lack what is left out
            assert now[name] == good[name], f"{name} is not whole; {told}"
    assert outcome.status in (0, 1), told
    if outcome.status == 0:
        absent = good.keys() - now.keys()
        assert not [name for name in absent if not name.endswith(".sha256")], told  # a download does without
        assert all(now[name] == good[name] for name in now), f"not all is new; {told}"
    else:
        line = outcome.err.splitlines()[-1]
        assert line.startswith("ssd: "), told
        assert re.search(r"\w\.\w+|'[^']+'$|folder \S+:", line), told  # which file


def attack(command, folder, faults, *, also=lambda outcome, now, good: None):
    """Run a command with each fault at each of its calls, always from what the folder holds now."""
    before = files_of(folder)
    stored = Path(tempfile.mkdtemp())
    shutil.copytree(folder, stored / "was")

    def reset():
        shutil.rmtree(folder)
        shutil.copytree(stored / "was", folder)
        os.chdir(folder)

    os.chdir(folder)
    outcome = command()
    assert outcome.status == 0, outcome
    good = files_of(folder)
    assert good != before
    tried = 0
    for kind, error, lasting in faults:
        for number in itertools.count():
            reset()
            with failing(Disk(folder, kind, number, error, lasting=lasting)) as disk:
                outcome = command()
            if not disk.has_failed:
                assert (outcome.status, files_of(folder)) == (0, good), outcome
                break
            tried += 1
            now = files_of(folder)
            if kind == "remove":  # what cannot be removed stays, for the next one that writes there
                now = {name: each for name, each in now.items() if not re.search(r"\.tmp(/|$)", name)}
            judge(outcome, before, good, now, disk)
            also(outcome, now, good)
    assert tried
    shutil.rmtree(stored)


@pytest.fixture(params=[pytest.param(QUICK, id="quick"), pytest.param(ALL, id="all", marks=pytest.mark.slow)])
def faults(request):
    return request.param


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return Detector(tiny_model, ("cat", "cup", "person"))


@pytest.fixture
def two_images(tmp_path):
    """Outside of the disk that fails."""
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 256, (40, 330, 3), np.uint8)).save(tmp_path / "in" / f"{name}.jpg")
    return tmp_path / "in"


@pytest.mark.parametrize("format", ["json", "csv", "coco", "yolo"])
def test_detect(folder, two_images, tiny, faults, format, monkeypatch):
    monkeypatch.setattr("ssd.cli.detect.load_detector", lambda *_, **__: tiny)
    (folder / "out" / "labels").mkdir(parents=True)
    for name in ("a.jpg", "detections.json", "labels/b.txt"):
        (folder / "out" / name).write_bytes(EARLIER)

    def counts_are_true(outcome, now, good):
        if not (said := re.search(r"^(\d) images?, (\d+) objects?", outcome.out, re.MULTILINE)):
            return
        done = int(said[1])
        pictures = [name for name in now.keys() - {"out/a.jpg"} if name.endswith(".jpg")]
        assert len(pictures) >= done
        if "not written" in outcome.out:
            return
        if format == "yolo":
            labels = [name for name in now.keys() - {"out/labels/b.txt"} if name.startswith("out/labels/")]
            assert len(labels) == done
            assert {Path(name).stem for name in labels} == {Path(name).stem for name in pictures}
            return
        (results,) = [name for name in now if re.match(r"out/detections(-2.json|.csv)$", name)]
        assert f"results in {results}" in outcome.out
        text = now[results].decode()
        if format == "json":
            assert [len(json.loads(text)), sum(len(each["detections"]) for each in json.loads(text))] == [
                done,
                int(said[2]),
            ]
        elif format == "coco":
            assert len(json.loads(text)) == int(said[2])
        else:
            assert text.count("\n") == int(said[2]) + 1

    options = ("--output", "out", "--format", format, "--score-threshold", 0.05, "--max-detections", 3)
    attack(lambda: ssd("detect", two_images, *options), folder, faults, also=counts_are_true)


@pytest.mark.parametrize(
    "format", ["jsonl", *(pytest.param(each, marks=pytest.mark.slow) for each in ("csv", "yolo"))]
)
def test_detect_films(folder, tmp_path, tiny, faults, format, monkeypatch):
    """Whatever fails, what there is of a film can be played up to a place, and results are whole entries."""
    times = [number * Fraction(12, 25) for number in range(4)]
    film = write_film(tmp_path / "clip.mkv", [drawn(number) for number in range(4)], times)
    one = (torch.tensor([[0.2, 0.2, 0.6, 0.6]]), torch.tensor([0.9]), torch.tensor([1]))
    monkeypatch.setattr(  # the network is not what is tried
        tiny, "detect", lambda batch, options: tiny.results(batch, [one] * len(batch), options)
    )
    monkeypatch.setattr("ssd.cli.detect.load_detector", lambda *_, **__: tiny)
    (folder / "out" / "labels").mkdir(parents=True)
    (folder / "out" / "clip.mp4").write_bytes(EARLIER)

    def what_is_there_is_true(outcome, now, good):
        if not (
            said := re.search(r"^(\d+) images? (?:or|and) frames?, (\d+) objects", outcome.out, re.MULTILINE)
        ):
            return
        done = int(said[1])
        assert done == 4 or outcome.status == 1
        lines = now.get(f"out/detections.{format}", b"").splitlines()
        if "not written" in outcome.out:
            pass
        elif format == "jsonl":
            frames = [json.loads(line)["frame"] for line in lines]
            assert frames == sorted(set(frames))
            assert len(frames) == done
        elif format == "csv":
            assert len(lines) == int(said[2]) + 1
        else:
            assert sum(name.endswith(".txt") and "labels/" in name for name in now) == done
        if now.get("out/clip-2.mp4") not in (None, good["out/clip-2.mp4"]):
            assert "the film with boxes of" in outcome.err
        if "not written" not in outcome.out:
            assert ("out/clip-2.mp4" in now) == ("pictures in out" in outcome.out)

    options = ("--output", "out", "--format", format)
    attack(lambda: ssd("detect", film, *options), folder, faults, also=what_is_there_is_true)


def test_demo(folder, faults, tiny, monkeypatch):
    monkeypatch.setattr(Detector, "load", lambda *_, **__: tiny)
    (folder / "out").mkdir()
    (folder / "out" / "detections.jpg").write_bytes(EARLIER)

    def both_or_none(outcome, now, good):
        assert len(now) in (1, 3)
        assert ("picture in out/detections-2.jpg" in outcome.out) == (outcome.status == 0)

    attack(lambda: ssd("demo", "--output", "out"), folder, faults, also=both_or_none)


def test_shapes(folder, faults, monkeypatch):
    scene = shapes.draw_scene(np.random.default_rng(0))
    monkeypatch.setattr(shapes, "draw_scene", lambda rng: scene)
    (folder / "mine.txt").write_bytes(EARLIER)

    def again(outcome, now, good):
        assert len(now) in (1, len(good))
        if outcome.status and len(now) == 1:  # the same command may be given again
            assert ssd("shapes", "s", "--images", 2, "--val", 1).status == 0

    attack(lambda: ssd("shapes", "s", "--images", 2, "--val", 1), folder, faults, also=again)


@pytest.mark.parametrize("plots", [pytest.param(True, marks=pytest.mark.slow), False])
def test_evaluate(folder, tmp_path, faults, plots, monkeypatch):
    """Another detector than `tiny`, which does not know the classes of scenes."""
    if plots:
        pytest.importorskip("matplotlib", reason="matplotlib is an extra")
    shapes.write_dataset(tmp_path / "data", 0, 2, seed=1)
    known = Detector.load("shapes")
    monkeypatch.setattr("ssd.cli.evaluate.load_detector", lambda *_, **__: known)
    found = {}

    def once(*arguments, **options):  # the network is not what is tried
        found.setdefault("found", detect_all(*arguments, **options))
        return found["found"]

    monkeypatch.setattr("ssd.cli.evaluate.detect_all", once)
    command = ["evaluate", tmp_path / "data", "--output", "out", *(["--plots"] if plots else [])]
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_bytes(EARLIER)

    def all_or_none(outcome, now, good):
        assert len(now) in (1, len(good))
        assert "IoU 0.50:0.95, all sizes" in outcome.out or "cannot write to the folder" in outcome.err
        if len(now) == 1:  # the same command may be given again
            assert ssd(*command).status == 0

    attack(lambda: ssd(*command), folder, faults, also=all_or_none)


@pytest.mark.parametrize("format", ["torchscript", "openvino"])
def test_export(folder, weights_file, faults, format, monkeypatch):
    """Of one file, and of two; what writes and proves them is another's."""

    class Writer:
        @staticmethod
        def write(model, path, metadata, pictures):
            if format == "openvino":
                path.mkdir()

            def save(_):
                for name in [path / each for each in BACKENDS[format].folder] or [path]:
                    name.write_bytes(b"new " + name.suffix.encode() * 100)

            save(metadata)
            return save

    monkeypatch.setattr(export, "import_module", lambda name: Writer)
    monkeypatch.setattr(export, "prove", lambda *_: None)
    monkeypatch.setattr(export, "proof_of", lambda *_: {})
    monkeypatch.setattr(export, "verify", lambda _: SimpleNamespace(is_proved=True))
    loaded = export.load_model(weights_file)
    monkeypatch.setattr(export, "load_model", lambda path: loaded)
    path = folder / ("ir" if format == "openvino" else "model.torchscript")
    for name in [path / each for each in BACKENDS[format].folder] or [path]:
        name.parent.mkdir(exist_ok=True)
        name.write_bytes(EARLIER)

    def no_mixture(outcome, now, good):
        assert len({content[:3] for content in now.values()}) == 1

    command = ("export", weights_file, "--format", format, "--output", path.name)
    attack(lambda: ssd(*command), folder, faults, also=no_mixture)


def test_triton(folder, faults, monkeypatch, tmp_path):
    metadata = Metadata(("cat",), (), "resnet18", "fp32", False, None, None, SMALL_LAYOUT)
    monkeypatch.setattr(triton, "load", lambda *_: (None, metadata))
    (tmp_path / "model.onnx").write_bytes(b"onnx" * 1000)
    (folder / "models" / "another").mkdir(parents=True)
    (folder / "models" / "another" / "config.pbtxt").write_bytes(EARLIER)

    def all_or_none(outcome, now, good):
        assert len(now) in (1, len(good))

    attack(
        lambda: api(triton.write_triton, tmp_path / "model.onnx", "models"), folder, faults, also=all_or_none
    )


def test_scenes_to_measure_on(folder, faults):
    (folder / "scenes").mkdir()
    attack(lambda: api(benchmark.draw_images, Path("scenes"), 2), folder, QUICK[:2])


def test_pictures(folder, faults, tiny):
    found = tiny(Image.fromarray(np.zeros((170, 330, 3), np.uint8)))
    for name in ("a.jpg", "b.png", "c.webp"):
        (folder / name).write_bytes(EARLIER)

    def save():
        for name in ("a.jpg", "b.png", "c.webp"):
            found.save(name)

    attack(lambda: api(save), folder, faults)


def test_checkpoints_and_states(folder, faults):
    """A network's last layer does for all of it."""
    run = make_run()
    state = {"conf.0.weight": torch.zeros(12, 1, 3, 3)}
    run.model.state_dict = lambda *_, **__: state
    names = ("last.safetensors", "last.pt")

    def save():
        for name in names:
            checkpoint.save(name, state, ("a", "b"))
        save_state(Path("state.pt"), run)

    for name in (*names, "state.pt"):
        (folder / name).write_bytes(EARLIER)
    attack(lambda: api(save), folder, faults)


def test_downloads(folder, faults, server, monkeypatch):
    body = safetensors.torch.save({"a": torch.zeros(100)})
    url = server.serve("/weights.safetensors", body)
    monkeypatch.setenv("TORCH_HOME", str(folder))
    (folder / "mine.txt").write_bytes(EARLIER)

    def fetch():
        with pretrained.loading(pretrained.fetch(url, progress=False), url):
            pass

    def whole_or_nothing(outcome, now, good):
        if outcome.status:
            assert pretrained.fetch(url, progress=False).read_bytes() == body

    attack(lambda: api(fetch), folder, faults, also=whole_or_nothing)


@pytest.mark.slow
def test_train(folder, tmp_path, monkeypatch, request):
    monkeypatch.setitem(LAYOUTS, "small", SMALL_LAYOUT)
    shapes.write_dataset(tmp_path / "data", 4, 1, seed=5)
    images, val = DetectionDataset(load(tmp_path / "data", "train")), load(tmp_path / "data", "val")
    (folder / "run").mkdir()
    (folder / "run" / "notes.txt").write_bytes(EARLIER)

    def train():
        fit(images, val, config, "run", say=None)

    config = replace(SMALL, epochs=1, evaluate_every=1)
    attack(lambda: api(train), folder, QUICK[1:3])
