"""The table of kinds of exported files, and that a row and a module are all that another kind takes."""

import pickle
import subprocess
import sys
import textwrap
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import SMALL_LAYOUT
from PIL import Image
from typer.testing import CliRunner

from ssd import backends, checkpoint, cli, export
from ssd.backends import BACKENDS, Kind
from ssd.detector import Detector

NAMES = ("cat", "cup", "person")


def test_the_table_needs_no_torch():
    code = "import sys, ssd.backends; assert ssd.backends.BACKENDS; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_name_is_there():
    assert dir(backends) == sorted(backends.__all__)
    for name in (*backends.__all__, *backends.__all__):  # twice, for importing a module binds its name
        assert callable(getattr(backends, name)) or name == "BACKENDS"
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = backends.lod


@pytest.mark.parametrize("name", BACKENDS)
def test_every_kind_has_what_others_use(name):
    kind = BACKENDS[name]
    module = import_module(kind.module)
    assert callable(module.load_file)
    assert callable(module.write)
    assert "fp32" in kind.precisions
    assert set(kind.precisions) <= set(export.TOLERANCES)
    assert kind.ending == kind.ending.lower()
    assert kind.ending.startswith("." if not kind.folder else "_")


TOY = """
    import torch

    from ssd.backends.base import of_file, parse_metadata
    from ssd.model import SSD


    def write(model, path, metadata, images):
        def save(metadata):
            torch.save({"weights": model.state_dict(), "notes": metadata.to_json()}, path)

        save(metadata)
        return save


    def load_file(path, device, precision):
        content = torch.load(path, weights_only=True)
        metadata = parse_metadata(path, content["notes"])
        model = SSD(len(metadata.class_names) + 1, metadata.backbone, False, layout=metadata.layout)
        model.load_state_dict(content["weights"])
        return of_file("toy runtime", metadata, torch.device("cpu"), model.eval()), metadata
"""


def test_another_kind_is_a_module_and_a_row(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "toy_backend.py").write_text(textwrap.dedent(TOY))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(BACKENDS, "toy", Kind(".toy", ("fp32",), "toy_backend"))
    weights = tmp_path / "weights.safetensors"
    checkpoint.save(weights, tiny_model.state_dict(), NAMES, layout=SMALL_LAYOUT)
    path = export.export(weights, tmp_path / "model.toy", "toy")
    assert backends.kind_of(path) == "toy"
    loaded = Detector.load(path)
    assert repr(loaded) == "Detector(3 classes, fp32, cpu, toy runtime)"
    photo = np.random.default_rng(0).integers(0, 256, (80, 120, 3), np.uint8)
    expected = Detector(tiny_model, NAMES)(photo, score_threshold=0.2)
    assert len(expected) > 3
    for detector in (loaded, pickle.loads(pickle.dumps(loaded))):
        found = detector(photo, score_threshold=0.2)
        assert found.class_ids.tolist() == expected.class_ids.tolist()
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.01)
    with pytest.raises(ValueError, match=r"toy holds fp32, not fp16; fp16 goes with onnx and pt2"):
        export.export(weights, tmp_path / "model.toy", "toy", precision="fp16")
    with pytest.raises(ValueError, match=r"has to end in \.toy"):
        export.export(weights, tmp_path / "model.onnx", "toy")


def test_another_kind_is_known_to_the_command(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "toy_backend.py").write_text(textwrap.dedent(TOY))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(BACKENDS, "toy", Kind(".toy", ("fp32",), "toy_backend"))
    checkpoint.save("w.safetensors", tiny_model.state_dict(), NAMES, layout=SMALL_LAYOUT)
    Image.new("RGB", (80, 60)).save("photo.png")
    run = CliRunner()
    result = run.invoke(cli.app, ["export", "w.safetensors", "--format", "toy"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert "w.toy (" in result.stdout
    result = run.invoke(cli.app, ["detect", "photo.png", "--weights", "w.toy", "--output", "out"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert (tmp_path / "out" / "detections.json").is_file()


def test_a_package_that_a_kind_without_an_extra_misses_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_backend.py").write_text("import no_such_package")
    (tmp_path / "model.broken").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(BACKENDS, "broken", Kind(".broken", ("fp32",), "broken_backend"))
    with pytest.raises(ImportError, match="no_such_package"):
        backends.load(tmp_path / "model.broken", torch.device("cpu"))
