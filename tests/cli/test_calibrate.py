"""``ssd calibrate``: from a dataset to weights that know what their scores are worth."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import safetensors
import torch
from training import ALONE
from typer.testing import CliRunner

import ssd
from ssd import checkpoint, pretrained
from ssd.cli import app
from ssd.evaluate import calibrated, detect_all
from ssd.shapes import write_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_dataset(folder, 1, 24, 7)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_what_is_kept_and_what_it_does(data, tmp_path):
    made = tmp_path / "new" / "made.safetensors"
    done = run("calibrate", "shapes", data, "--output", made, "--plots", "--coverage", "0.8")
    assert done.exit_code == 0, done.output
    assert "circle" in done.output
    assert "expected calibration error" in done.output
    assert made.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    before, after = (checkpoint.read(path) for path in (pretrained.fetch("shapes"), made))
    assert all(torch.equal(value, after.state_dict[key]) for key, value in before.state_dict.items())
    assert after.class_names == before.class_names
    assert len(after.score_thresholds) == 6
    assert after.calibration.coverage == 0.8
    assert after.calibration.margin > 0

    plain, detector = ssd.Detector.load("shapes", "cpu", "fp32"), ssd.Detector.load(made, "cpu", "fp32")
    image = sorted((data / "val").iterdir())[1]
    # With a number nothing changes, to the bit; calibrated, boxes of the thresholds have probabilities.
    raw, same = (each(image, score_threshold=0.05) for each in (plain, detector))
    assert np.array_equal(raw.scores, same.scores)
    assert np.array_equal(raw.boxes, same.boxes)
    found = detector(image, score_threshold="calibrated")
    kept = raw.scores > np.float32(detector.score_thresholds)[raw.class_ids]
    assert kept.any()
    assert np.array_equal(found.boxes, raw.boxes[kept])
    assert np.array_equal(found.scores, detector.calibration.probabilities(raw.scores[kept]))
    assert not np.array_equal(found.scores, raw.scores[kept])
    wide = found.widened(detector.calibration.margin)
    assert (wide.boxes[:, :2] < found.boxes[:, :2]).all()


def test_readers_of_before_load_it(data, tmp_path):
    """They look at the entries of the file that they know, which are what they were."""
    made = tmp_path / "made.safetensors"
    assert run("calibrate", "shapes", data, "--output", made).exit_code == 0
    with (
        safetensors.safe_open(made, "pt") as new,
        safetensors.safe_open(pretrained.fetch("shapes"), "pt") as old,
    ):
        assert set(new.metadata()) - set(old.metadata()) <= {"calibration", "score_thresholds", "layout"}
        assert new.metadata()["class_names"] == old.metadata()["class_names"]
        assert set(new.keys()) == set(old.keys())


def test_numbers_for_programs(data, tmp_path):
    options = ["--target-recall", "0.5", "--precision", "fp32", "--json"]
    done = run("calibrate", "shapes", data, *options, "--output", tmp_path / "x.safetensors")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert all(row["recall"] >= 0.5 or not row["reached"] for row in facts["classes"].values())
    assert any(row["reached"] for row in facts["classes"].values())
    assert facts["calibration_error"]["after"] >= 0
    assert facts["precision"] == "fp32"
    detector = ssd.Detector.load("shapes", "cpu", "fp32")
    truth = ssd.data.load(data, "val", class_names=detector.class_names)
    expected = calibrated(*detect_all(detector, truth, ALONE), recall=0.5)
    assert facts["classes"] == expected.to_dict()["classes"]


def test_tiles_are_those_of_the_detector(tmp_path):
    """As of weights that were trained on tiles, whose scores are those of tiles."""
    write_dataset(tmp_path / "data", 1, 3, 7)
    options = ["--precision", "fp32", "--json", "--tiles", "200", "--output", tmp_path / "x.safetensors"]
    done = run("calibrate", "shapes", tmp_path / "data", *options)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["tiles"] == 200
    assert "--score-threshold calibrated --tiles 200" in " ".join(done.stderr.split())
    detector = ssd.Detector.load("shapes", "cpu", "fp32")
    truth = ssd.data.load(tmp_path / "data", "val", class_names=detector.class_names)
    expected, whole = (calibrated(*detect_all(detector, truth, ALONE, tiles=each)) for each in (200, None))
    assert facts["classes"] == expected.to_dict()["classes"] != whole.to_dict()["classes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--target-precision", "0.9", "--target-recall", "0.9"],
            "one of --target-precision and --target-re",
        ),
        (["--precision", "0.9"], "0.9"),
        (["--coverage", "1"], "above 0 and below 1"),
        (["--plots", "--output", "made.png"], "made.png would be the diagram"),
    ],
)
def test_usage(options, message, data):
    done = run("calibrate", "shapes", data, *options)
    assert done.exit_code == 2
    assert message in done.output


def test_nothing_is_overwritten(data, tmp_path):
    (tmp_path / "made.safetensors").write_bytes(b"mine")
    done = run("calibrate", "shapes", data, "--output", tmp_path / "made.safetensors")
    assert done.exit_code == 2
    assert "is there already" in " ".join(done.output.split())
    assert (tmp_path / "made.safetensors").read_bytes() == b"mine"


def test_a_fit_that_makes_it_worse_is_told(data, tmp_path, monkeypatch):
    told, results = "take more images", []

    def turned(*args, **kwargs):
        made = calibrated(*args, **kwargs)
        results.append(replace(made, before=made.after, after=made.before) if results else made)
        return results[-1]

    monkeypatch.setattr("ssd.cli.calibrate.calibrated", turned)
    outputs = [
        run("calibrate", "shapes", data, "--output", tmp_path / f"{name}.safetensors").output for name in "ab"
    ]
    assert [told in each for each in outputs] == [each.after.error > each.before.error for each in results]
    assert results[0].after.error != results[0].before.error


def test_a_folder_for_the_weights_that_cannot_be_made_is_told_before_the_work(data, tmp_path):
    """And one that was made goes where the work fails."""
    assert run("calibrate", "shapes", tmp_path, "--output", tmp_path / "x" / "made.safetensors").exit_code
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").touch()
    done = run("calibrate", "shapes", data, "--output", tmp_path / "file" / "made.safetensors")
    assert "is a file; mend that, or choose another with --output" in str(done.exception)
    assert "threshold" not in done.output


def test_plots_need_an_extra_before_the_work(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run("calibrate", "shapes", data, "--plots", "--output", tmp_path / "made.safetensors")
    assert "ssd300[plots]" in str(done.exception)
    assert list(tmp_path.glob("made*")) == []
