import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import SMALL_LAYOUT
from PIL import Image
from torchvision.ops import box_iou

from ssd import export, proof
from ssd.backends import Metadata, graph, load
from ssd.detector import Detector
from ssd.export import ExportError
from ssd.proof import prove
from ssd.shapes import draw_scene


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for number in range(24):
        draw_scene(np.random.default_rng(number))[0].save(folder / f"{number:03}.jpg", quality=90)
    return folder


def metadata(**changes):
    values = {"class_names": ("cat", "cup", "person"), "category_ids": (), "backbone": "resnet18"}
    values |= {"precision": "fp32", "uint8": False, "batch": None, "nms": None}
    return Metadata(**values | changes)


# --- Proof ---


@pytest.mark.parametrize("nms", [False, True])
@pytest.mark.parametrize("off", [0.5, np.nan])
def test_an_export_that_differs_is_refused_and_removed(weights_file, tmp_path, monkeypatch, nms, off):
    """As if the exporter had a bug: one coordinate in one head is off, of boxes that nothing shows here."""
    original = graph.Graph

    def broken(*arguments):
        made = original(*arguments)
        made.network.heads[1].bias[1] += off
        return made

    monkeypatch.setattr(graph, "Graph", broken)
    path = tmp_path / "model.torchscript"
    path.write_text("earlier")
    with pytest.raises(ExportError, match=r"in fp32 .* (score|box) (nan|0\.\d+) \(allowed \d.*removed"):
        export.export(weights_file, path, "torchscript", nms=nms)
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


FULL = """
import resource, sys
from ssd.export import export
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
for name in sys.argv[2:]:
    try:
        export(sys.argv[1], name, "openvino" if name.endswith("ir") else name.rsplit(".")[-1])
    except OSError as error:
        print(error.strerror)
"""


@pytest.mark.parametrize(
    ("earlier", "new"),
    [
        (["model.torchscript"], ["new.torchscript"]),
        pytest.param(["model.onnx", "model.pt2"], ["ir"], marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_told_and_the_earlier_files_are_whole(weights_file, tmp_path, earlier, new):
    for name in earlier:
        (tmp_path / name).write_text("earlier")
    names = earlier + new
    command = [sys.executable, "-c", FULL, weights_file, *(tmp_path / name for name in names)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(names)
    for line, name in zip(lines, names, strict=True):
        what = "the earlier one is whole" if name in earlier else "nothing is left of it"
        assert line == f"No space left on the disk for {name}; {what}"
    assert sorted(path.name for path in tmp_path.iterdir()) == earlier
    assert all((tmp_path / name).read_text() == "earlier" for name in earlier)


def test_differences_are_measured(tiny_model, tiny_exported):
    path = tiny_exported["pt2"]
    _, its_own = load(path)
    found = prove(tiny_model, path, its_own)
    assert 0 < found.score < 1e-4
    assert 0 < found.box < 1e-3
    assert found.lost == 0
    with pytest.raises(ExportError, match="does not say the same of itself"):
        prove(tiny_model, path, metadata(layout=SMALL_LAYOUT, batch=3))


def test_an_image_to_try_has_nothing_on_it():
    """Shipped weights find nothing on the first one, so every export of them is tried on an empty result."""
    empty = Image.fromarray(proof._images_to_try(300)[0].numpy())
    assert len(Detector.load("shapes", "cpu")(empty)) == 0


# --- Formats and precisions ---


@pytest.mark.parametrize(
    ("format", "precision"),
    [
        pytest.param("onnx", "fp16", marks=pytest.mark.slow),
        pytest.param("pt2", "bf16", marks=pytest.mark.slow),
        ("torchscript", "bf16"),
    ],
)
def test_half_precisions(tmp_path, scenes, format, precision):
    path = export.export("shapes", tmp_path / f"model.{format}", format, precision=precision, uint8=True)
    loaded, reference = Detector.load(path, "cpu"), Detector.load("shapes", "cpu", "fp32")
    assert loaded.precision == precision
    found, expected = loaded(scenes / "005.jpg"), reference(scenes / "005.jpg")
    assert len(expected) > 1
    assert found.class_ids.tolist() == expected.class_ids.tolist()
    np.testing.assert_allclose(found.scores, expected.scores, atol=0.02)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=3)
    assert path.stat().st_size < 17e6  # ResNet-18 in two bytes a weight


@pytest.mark.parametrize(
    "format",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("onnx", "openvino", "pt2")), "torchscript"],
)
def test_shipped_weights_in_fp32(tmp_path, scenes, format):
    path = tmp_path / ("ir" if format == "openvino" else f"model.{format}")
    loaded = Detector.load(export.export("shapes", path, format), "cpu", "fp32")
    reference = Detector.load("shapes", "cpu", "fp32")
    assert loaded.class_names == reference.class_names
    for found, expected in zip(loaded.stream(scenes), reference.stream(scenes), strict=True):
        assert found.class_ids.tolist() == expected.class_ids.tolist()
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.1)


def test_int8(tmp_path, scenes):
    path = export.export("shapes", tmp_path / "ir", "openvino", precision="int8", calibrate=scenes)
    assert (path / "model.bin").stat().st_size < 11e6  # of 28 MB in fp32; the heads stay so
    loaded, reference = Detector.load(path), Detector.load("shapes", "cpu", "fp32")
    assert loaded.precision == "int8"
    for found, expected in zip(loaded.stream(scenes), reference.stream(scenes), strict=True):
        sure, rest = expected[expected.scores > 0.8], found[found.scores > 0.6]
        for box, _, class_id, _ in sure:
            same = torch.from_numpy(rest.boxes[rest.class_ids == class_id])
            assert box_iou(same, torch.tensor([box])).max() > 0.8
    with pytest.raises(ValueError, match="computes in int8, as it was exported, not in fp32"):
        Detector.load(path, precision="fp32")


def test_an_earlier_export_is_replaced_and_other_folders_are_not(weights_file, tmp_path):
    folder = tmp_path / "ir"
    folder.mkdir()
    for name in ("model.xml", "model.bin"):
        (folder / name).write_text("earlier")
    export.export(weights_file, folder, "openvino")
    assert {each.name for each in folder.iterdir()} == {"model.xml", "model.bin"}
    assert Detector.load(folder).class_names == ("cat", "cup", "person")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no folder of an earlier export"):
        export.export(weights_file, folder, "openvino")
    assert (folder / "notes.txt").exists()


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("onnx", {"precision": "int8"}, "onnx holds fp32, fp16, not int8; int8 goes with openvino"),
        ("openvino", {"precision": "int8"}, "int8 needs calibrate"),
        ("onnx", {"calibrate": "photos"}, "calibrate is for int8"),
        ("onnx", {"batch": 0}, "batch must be a whole number, at least 1"),
        ("tflite", {}, "'tflite' is none of onnx, openvino"),
        ("pt2", {}, r"has to end in \.pt2"),
    ],
)
def test_choices_that_do_not_go_together(weights_file, tmp_path, format, options, message):
    with pytest.raises(ValueError, match=message):
        export.export(weights_file, tmp_path / "model.onnx", format, **options)
    assert not list(tmp_path.iterdir())


def test_calibration_needs_images(weights_file, tmp_path):
    with pytest.raises(ValueError, match="no images to calibrate with"):
        export.export(weights_file, tmp_path / "ir", "openvino", precision="int8", calibrate=tmp_path)


def test_calibration_images_are_spread_over_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_CALIBRATION", 4)
    for value in range(10):
        Image.new("RGB", (40, 30), (value * 20,) * 3).save(tmp_path / f"{value}.png")
    picked = export.calibration_images(tmp_path, 300)
    assert picked[:, 0, 0, 0].tolist() == [0, 60, 120, 180]


# --- Files ---


def test_what_is_exported_already(tiny_exported, tmp_path):
    with pytest.raises(ValueError, match="is exported already"):
        export.export(tiny_exported["pt2"], tmp_path / "model.onnx")


def test_what_a_run_measured_goes_along(tiny_exported, tmp_path):
    (tmp_path / "best.safetensors").write_bytes(tiny_exported.weights.read_bytes())
    (tmp_path / "metrics.csv").write_text("epoch,AP,AP50\n1,0.25,0.5\n")
    made = export.export(tmp_path, tmp_path / "model.torchscript", "torchscript")
    assert export.verify(made).accuracy.startswith("0.250 AP, 0.500 AP50 on the val split of its dataset")
