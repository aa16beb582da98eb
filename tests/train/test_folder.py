import json
import sys
from dataclasses import replace

import pytest
import safetensors
from training import SMALL, rows

from ssd import checkpoint, shapes
from ssd.data import load
from ssd.detector import Detector
from ssd.train import fit


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
    }
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


def test_tensorboard_is_an_extra(images, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is an extra")
    fit(images, None, replace(SMALL, epochs=1), tmp_path, say=None, tensorboard=True)
    assert list(tmp_path.glob("events.out.tfevents.*"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'ssd300\[tensorboard\]'"):
        fit(images, None, SMALL, tmp_path / "b", say=None, tensorboard=True)


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
