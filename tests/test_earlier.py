"""What version 0.1.0 wrote is still read and means the same, and results are still written alike.

earlier/README.md says what there is.
"""

import csv
import json
import lzma
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from earlier.make import SCORE_THRESHOLD, pixels

import ssd
from ssd import backends, checkpoint, cli
from ssd.data import DetectionDataset, load
from ssd.train import TrainConfig, fit

EARLIER = Path(__file__).parent / "earlier"
EXPECTED = json.loads((EARLIER / "expected.json").read_text())
FILES = list(EXPECTED["files"])
CHECKPOINTS = [name for name in FILES if name.startswith("checkpoints")]
RAW = [name for name in FILES if name.startswith("exports") and "loc" in EXPECTED["files"][name]]
RUNTIMES = {".onnx": "onnxruntime", "": "openvino"}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def unpack(name, folder):
    """A file of the earlier version, or a folder of them, in a folder of the test."""
    source = EARLIER / name
    if not source.is_dir():
        source = source.with_name(f"{source.name}.xz")
    for file in source.iterdir() if source.is_dir() else [source]:
        target = folder / file.relative_to(EARLIER)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".xz":
            target.with_suffix("").write_bytes(lzma.decompress(file.read_bytes()))
        else:
            shutil.copy(file, target)
    return folder / name


def unpack_exported(name, folder):
    """An exported file; skips the test where what reads it is not there."""
    suffix = Path(name).suffix
    if suffix in RUNTIMES:
        pytest.importorskip(RUNTIMES[suffix])
    elif version(torch.__version__) < version(EXPECTED["torch"]):
        pytest.skip("written by a later torch, which promises nothing to earlier ones")
    return unpack(name, folder)


def version(text):
    return tuple(int(number) for number in text.split("+")[0].split(".")[:2])


def assert_outputs(loc, conf, expected, tolerance=5e-4):
    """By itself, what sums in another order make of float32: up to 1.6e-4 from processor to processor."""
    for found, name in ((loc, "loc"), (conf, "conf")):
        np.testing.assert_allclose(
            found[0, :, EXPECTED["places"]], expected[name], atol=tolerance, rtol=tolerance
        )


def outputs_of(model):
    """Of the input of the expected numbers, which is normalised here as ImageNet's."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = ((pixels() / 255 - mean) / std).astype(np.float32).transpose(2, 0, 1)[None]
    with torch.inference_mode():
        return model.eval()(torch.from_numpy(images))


# --- Checkpoints and exported files ---


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_give_the_network_and_its_outputs(name, tmp_path):
    model, found = ssd.load_model(unpack(name, tmp_path))
    normed = name.endswith("normed.safetensors")
    assert (model.backbone, model.num_classes, model.head_norm) == ("resnet18", 3, normed)
    assert found.class_names == ("cat", "dog")
    assert found.category_ids == ((7, 9) if normed else ())
    assert found.config == ({"epochs": 1} if normed else {})
    assert_outputs(*outputs_of(model), EXPECTED["files"][name])


@pytest.mark.parametrize("name", RAW)
def test_exported_files_give_the_raw_outputs(name, tmp_path):
    backend, _ = backends.load(unpack_exported(name, tmp_path), torch.device("cpu"), "fp32")
    with torch.inference_mode():
        outputs = backend.forward(torch.from_numpy(pixels())[None])
    assert_outputs(*outputs, EXPECTED["files"][name])


@pytest.mark.parametrize("name", FILES)
def test_all_files_detect_the_same(name, tmp_path):
    path = unpack(name, tmp_path) if name in CHECKPOINTS else unpack_exported(name, tmp_path)
    detector = ssd.Detector.load(path, "cpu", "fp32")
    assert detector.class_names == ("cat", "dog")
    assert detector.category_ids == (() if name.endswith("plain.pt") else (7, 9))
    found = detector(pixels(), score_threshold=SCORE_THRESHOLD)
    expected = EXPECTED["files"][name]["detections"]
    assert [each.name for each in found] == [each["name"] for each in expected]
    np.testing.assert_allclose(found.scores, [each["score"] for each in expected], atol=1e-4)
    np.testing.assert_allclose(found.boxes, [each["box"] for each in expected], atol=1e-2)


# --- Runs ---


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_ended(folder, before, expected):
    """A step after the state, another order of sums makes less than two percent; in a whole epoch, BatchNorm
    over two images makes so much more of it that only the loss can be compared."""
    first, second = rows(folder)
    assert {key: first[key] for key in before} == before
    assert float(second["loss"]) == pytest.approx(expected["loss"], rel=0.02)
    model, found = ssd.load_model(folder / "last.safetensors")
    assert (found.class_names, found.category_ids) == (("cat", "dog"), (7, 9))
    if expected is EXPECTED["runs"]["run"]:
        assert_outputs(*outputs_of(model), expected, tolerance=0.02)


@pytest.mark.parametrize("name", EXPECTED["runs"])
def test_fit_goes_on_with_a_run(name, tmp_path):
    """In the middle of an epoch, and between two."""
    folder = unpack("run", tmp_path)
    if name != "run":
        shutil.copy(unpack(f"{name}/state.pt", tmp_path), folder / "state.pt")
    (before,) = rows(folder)
    values = json.loads((folder / "config.json").read_text())["config"]
    config = TrainConfig(**values | {"milestones": tuple(values["milestones"])})
    images = DetectionDataset(load(EARLIER / "pets", "train"))
    result = fit(images, None, config, folder, resume=True, say=None)
    assert result.finished
    assert_ended(folder, before, EXPECTED["runs"][name])
    assert checkpoint.read(folder / "last.safetensors").config["seed"] == values["seed"]


def test_the_command_goes_on_with_a_run(tmp_path, monkeypatch):
    """With the data and the choices that its folder names."""
    folder = unpack("run", tmp_path)
    (before,) = rows(folder)
    shutil.copytree(EARLIER / "pets", tmp_path / "pets")
    command(monkeypatch, tmp_path, "train", "--resume", "run", "--device", "cpu")
    assert_ended(folder, before, EXPECTED["runs"]["run"])
    assert float(rows(folder)[1]["AP"]) >= 0


# --- Results ---


def command(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["ssd", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert not exit.value.code


def assert_same_files(folder, expected):
    """All files are there, and differ in nothing but the last digits of numbers, and what is new."""
    names = [sorted(each.relative_to(root) for each in root.rglob("*")) for root in (folder, expected)]
    assert names[0] == names[1]
    for name in names[0]:
        if (folder / name).is_file():
            ours, theirs = (root.joinpath(name).read_text() for root in (folder, expected))
            ours = ours.replace('"sizes_by_box": 0, ', "")
            assert NUMBER.sub("number", ours) == NUMBER.sub("number", theirs)
            numbers = [[float(each) for each in NUMBER.findall(text)] for text in (ours, theirs)]
            np.testing.assert_allclose(*numbers, atol=1e-3, rtol=0)


@pytest.mark.parametrize("form", ["json", "csv", "coco", "yolo"])
def test_results_are_written_alike(form, tmp_path, monkeypatch):
    shutil.copytree(EARLIER / "scenes", tmp_path / "scenes")
    options = ["--weights", "shapes", "--device", "cpu", "--precision", "fp32", "--no-images"]
    command(monkeypatch, tmp_path, "detect", "scenes/val", *options, "--format", form, "--output", "out")
    assert_same_files(tmp_path / "out", EARLIER / "results" / form)


def test_an_evaluation_is_written_alike(tmp_path, monkeypatch):
    shutil.copytree(EARLIER / "scenes", tmp_path / "scenes")
    options = ["--weights", "shapes", "--device", "cpu", "--precision", "fp32", "--output", "out"]
    command(monkeypatch, tmp_path, "evaluate", "scenes", *options)
    assert_same_files(tmp_path / "out", EARLIER / "evaluation")
