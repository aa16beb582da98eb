import json
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import safetensors
from conftest import SMALL_LAYOUT
from PIL import Image
from torch.utils.data import Subset
from training import SMALL, fake_evaluations, fit_cut_short, rows

from ssd import checkpoint, plots, shapes
from ssd.data import DetectionDataset, load
from ssd.detector import Detector
from ssd.model import SSD
from ssd.train import fit, folder


def test_a_run_and_its_folder(scenes, images, tmp_path, capsys):
    val = load(scenes, "val", class_names=images.class_names)
    config = replace(SMALL, epochs=3, evaluate_every=2)
    result = fit(images, val, config, tmp_path / "run", category_ids=range(11, 17))
    assert result.finished
    assert result.evaluation is not None
    folder = result.folder
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "config.json",
        "metrics.csv",
        "last.safetensors",
        "best.safetensors",
        "state.pt",
        "samples/epoch-002.jpg",
        "samples/epoch-003.jpg",
    } | ({"curves.png"} if find_spec("matplotlib") else set())
    epochs = rows(folder)
    assert [row["epoch"] for row in epochs] == ["1", "2", "3"]
    assert [bool(row["AP"]) for row in epochs] == [False, True, True]
    terms = [float(epochs[2][name]) for name in ("loc_loss", "conf_loss")]
    assert float(epochs[2]["loss"]) == pytest.approx(sum(terms), rel=1e-4)

    found = checkpoint.read(folder / "last.safetensors")
    assert found.class_names == shapes.CLASSES
    assert found.category_ids == tuple(range(11, 17))
    assert found.config["batch_size"] == 2
    with safetensors.safe_open(folder / "last.safetensors", "pt") as file:
        assert "96x96" in file.metadata()["transform"]
    saved = json.loads((folder / "config.json").read_text())
    assert saved["config"]["lr"] == 0.02
    detector = Detector.load(folder / "best.safetensors")
    detected = detector(val.path(0), score_threshold=0.01)
    assert detected.category_ids == tuple(range(11, 17))
    assert result.detector(val.path(0)).class_names == shapes.CLASSES

    out = capsys.readouterr().out
    assert "all weights from random values" in out
    assert "6 images, 3 steps an epoch" in out
    assert "epoch 3/3  loss" in out
    assert "momentum=0.9" in out


@pytest.fixture
def drawn(monkeypatch):
    """The histories of which curves were drawn."""
    histories, real = [], plots.draw_curves
    monkeypatch.setattr(
        "ssd.train.folder.draw_curves", lambda history: histories.append([*history]) or real(history)
    )
    return histories


def test_curves_are_of_the_whole_history_at_each_evaluation_and_at_the_end(
    scenes, images, drawn, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib", reason="matplotlib is an extra")
    config, two, val = replace(SMALL, epochs=4, evaluate_every=2), Subset(images, [0, 1]), load(scenes, "val")
    fake_evaluations(monkeypatch, [0.1])
    fit_cut_short(images, 5, val, config, tmp_path)
    assert [len(each) for each in drawn] == [2]
    fit(two, None, config, tmp_path, say=None, resume=True)
    assert [len(each) for each in drawn] == [2, 4]
    assert [f"{row['loss']:.6g}" for row in drawn[1]] == [row["loss"] for row in rows(tmp_path)]
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG"


def test_without_matplotlib_a_run_goes_on_and_says_once_what_would_draw(
    scenes, images, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    fake_evaluations(monkeypatch, [0.1, 0.2])
    lines, two, val = [], Subset(images, [0, 1]), load(scenes, "val")
    fit(two, val, replace(SMALL, evaluate_every=1), tmp_path, say=lines.append)
    assert lines.count("pip install 'ssd300[plots]' would draw curves.png") == 1
    assert len(rows(tmp_path)) == 2
    assert not (tmp_path / "curves.png").exists()


def test_samples_are_the_truth_beside_the_detections(scenes, tmp_path, monkeypatch):
    val, sheets = load(scenes, "val"), []
    monkeypatch.setattr(
        "ssd.train.folder.side_by_side", lambda rows, headings: sheets.append([*rows]) or sheets[-1][0][0]
    )
    of_boxes = []
    real = folder.draw_detections
    monkeypatch.setattr(
        "ssd.train.folder.draw_detections", lambda *values: of_boxes.append(values) or real(*values)
    )
    detector = Detector(SSD(7, "resnet18", layout=SMALL_LAYOUT), val.class_names)
    kept = folder.RunFolder(tmp_path, val.class_names, [], is_main=True)
    inverted = replace(val, boxes=val.boxes[:, [2, 3, 0, 1]])
    annotated = DetectionDataset(val)
    for truth in (val, inverted, [annotated[i] for i in range(3)]):  # any dataset will do
        kept.write_samples(detector, truth, 7)
    assert [len(each) for each in sheets] == [3, 3, 3]
    for number, (image, boxes, labels, class_ids) in enumerate(of_boxes):
        part = val.of_image(number % 3)
        np.testing.assert_allclose(boxes, val.boxes[part], atol=1e-4)
        assert labels == [val.class_names[k - 1] for k in val.labels[part]]
        assert class_ids.tolist() == (val.labels[part] - 1).tolist()
        assert image.size == tuple(val.sizes[number % 3])
    assert (tmp_path / "samples" / "epoch-007.jpg").exists()


def test_tensorboard_is_an_extra(images, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is an extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(Subset(images, [0, 1]), None, SMALL, tmp_path, say=None, tensorboard=True)
    events = EventAccumulator(str(tmp_path)).Reload()
    for name, values in ((name, [row[name] for row in rows(tmp_path)]) for name in ("lr", "loss")):
        scalars = events.Scalars(name)
        assert [each.step for each in scalars] == [1, 2]
        assert [each.value for each in scalars] == pytest.approx([float(each) for each in values], rel=1e-5)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'ssd300\[tensorboard\]'"):
        fit(images, None, SMALL, tmp_path / "b", say=None, tensorboard=True)
    assert not (tmp_path / "b" / "config.json").exists()


def test_thresholds_are_saved_with_the_weights_that_were_evaluated(scenes, images, tmp_path, monkeypatch):
    fake_evaluations(monkeypatch, [0.1, 0.2])
    config, two, val = replace(SMALL, epochs=4, evaluate_every=2), Subset(images, [0, 1]), load(scenes, "val")
    result = fit_cut_short(images, 7, val, config, tmp_path)  # in epoch 4
    found = [checkpoint.read(tmp_path / f"{name}.safetensors") for name in ("last", "best")]
    assert [each.score_thresholds for each in found] == [(), (0.3,) * 6]
    assert result.detector.score_thresholds == ()
    result = fit(two, val, config, tmp_path, say=None, resume=True)
    found = [checkpoint.read(tmp_path / f"{name}.safetensors") for name in ("last", "best")]
    assert [each.score_thresholds for each in found] == [(0.3,) * 6] * 2
    assert result.detector.score_thresholds == (0.3,) * 6


def test_a_run_is_not_overwritten(images, tmp_path):
    fit(images, None, replace(SMALL, epochs=1), tmp_path, say=None)
    with pytest.raises(FileExistsError, match="holds a run already"):
        fit(images, None, SMALL, tmp_path, say=None)


def test_what_a_killed_run_left_goes_when_it_goes_on(images, tmp_path):
    fit(images, None, replace(SMALL, epochs=1), tmp_path, say=None)
    before = {path.name for path in tmp_path.iterdir()}
    (tmp_path / "samples").mkdir()
    for name in ("state.pt", "best.safetensors", "samples/epoch-001.jpg"):
        (tmp_path / f"{name}.0123abcd.tmp").touch()
    fit(images, None, replace(SMALL, epochs=2), tmp_path, say=None, resume=True)
    assert {path.name for path in tmp_path.iterdir()} == before | {"samples"}
    assert list((tmp_path / "samples").iterdir()) == []
