import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssd import backends, export
from ssd.backends import NMS, Metadata
from ssd.checkpoint import CheckpointError
from ssd.detector import Detector
from ssd.export import ExportError, Graph, greedy, prove, write_triton
from ssd.postprocess import postprocess
from ssd.shapes import draw_scene

CPU = torch.device("cpu")


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


# --- The graph ---


def one_by_one(boxes, scores, iou_threshold):
    """Greedy NMS of one group, spelled out."""
    kept = []
    for i, score in enumerate(scores):
        overlaps = []
        for j in kept:
            sides = np.minimum(boxes[i, 2:], boxes[j, 2:]) - np.maximum(boxes[i, :2], boxes[j, :2])
            shared = np.prod(np.clip(sides, 0, None))
            areas = [np.prod(boxes[k, 2:] - boxes[k, :2]) for k in (i, j)]
            overlaps.append(shared / (sum(areas) - shared))
        if score > 0 and not any(overlap >= iou_threshold for overlap in overlaps):
            kept.append(i)
    return kept


@pytest.mark.parametrize("suppress", [greedy, export._suppress])
def test_greedy_equals_a_loop(suppress):
    rng = np.random.default_rng(0)
    corner = rng.random((6, 30, 2)).astype(np.float32)
    boxes = np.concatenate([corner, corner + rng.uniform(0.1, 0.6, (6, 30, 2))], 2).astype(np.float32)
    scores = np.sort(rng.random((6, 30)).astype(np.float32))[:, ::-1].copy()
    scores[:, 25:] = 0
    scores[5] = 0
    found = suppress(torch.from_numpy(boxes), torch.from_numpy(scores), 0.5).numpy()
    for group in range(6):
        kept = one_by_one(boxes[group], scores[group], 0.5)
        assert np.flatnonzero(found[group]).tolist() == kept
        assert np.array_equal(found[group][kept], scores[group][kept])
    assert 5 < (found[0] > 0).sum() < 25


def test_the_graph_equals_the_postprocess(small_model):
    graph = Graph(small_model, metadata(uint8=True, nms=NMS(0.05, 0.5, 50)), greedy)
    images = export._images_to_try()[1:4]
    with torch.inference_mode():
        boxes, scores, class_ids, counts = graph(images)
        raw = Graph(small_model, metadata(uint8=True), greedy)(images)
        expected = postprocess(*raw, graph.default_boxes, max_detections=50)
    assert counts.tolist() == expected.counts.tolist()
    torch.testing.assert_close(scores, expected.scores)
    torch.testing.assert_close(boxes, expected.boxes)
    assert torch.equal(class_ids, expected.class_ids)


def test_nan_in_the_network_makes_the_scores_nan(small_model):
    graph = Graph(small_model, metadata(nms=NMS()), greedy)
    images = torch.zeros(2, 3, 300, 300)
    images[1, 0, 5, 5] = torch.nan
    with torch.inference_mode():
        _, scores, _, _ = graph(images)
    assert scores[0].isfinite().all()
    assert scores[1].isnan().any()


# --- Proof ---


@pytest.mark.parametrize("nms", [False, True])
@pytest.mark.parametrize("off", [0.5, np.nan])
def test_an_export_that_differs_is_refused_and_removed(weights_file, tmp_path, monkeypatch, nms, off):
    """As if the exporter had a bug: one coordinate in one head is off, of boxes that nothing shows here."""
    original = export._network

    def broken(*arguments):
        graph = original(*arguments)
        graph.network.heads[1].bias[1] += off
        return graph

    monkeypatch.setattr(export, "_network", broken)
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


def test_a_full_disk_is_told_and_the_earlier_files_are_whole(weights_file, tmp_path):
    names = ["model.onnx", "model.pt2", "model.torchscript", "new.torchscript", "ir"]
    for name in names[:3]:
        (tmp_path / name).write_text("earlier")
    command = [sys.executable, "-c", FULL, weights_file, *(tmp_path / name for name in names)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 5
    for line, name in zip(lines, names, strict=True):
        what = "the earlier one is whole" if name in names[:3] else "nothing is left of it"
        assert line == f"No space left on the disk for {name}; {what}"
    assert sorted(each.name for each in tmp_path.iterdir()) == names[:3]
    assert all((tmp_path / name).read_text() == "earlier" for name in names[:3])


def test_differences_are_measured(small_model, exported):
    path = exported["pt2"]
    found = prove(small_model, path, metadata())
    assert 0 < found.score < 1e-4
    assert 0 < found.box < 1e-3
    assert found.lost == 0
    with pytest.raises(ExportError, match="does not say the same of itself"):
        prove(small_model, path, metadata(batch=3))


def test_an_image_to_try_has_nothing_on_it():
    """Shipped weights find nothing on the first one, so every export of them is tried on an empty result."""
    empty = Image.fromarray(export._images_to_try()[0].numpy())
    assert len(Detector.load("shapes", "cpu")(empty)) == 0


# --- Formats and precisions ---


@pytest.mark.parametrize(
    ("format", "precision"), [("onnx", "fp16"), ("pt2", "bf16"), ("torchscript", "bf16")]
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


@pytest.mark.parametrize("format", ["onnx", "openvino", "pt2", "torchscript"])
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
            assert np.abs(rest.boxes[rest.class_ids == class_id] - box).max(1).min() < 8
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
    picked = export.calibration_images(tmp_path)
    assert picked[:, 0, 0, 0].tolist() == [0, 60, 120, 180]


# --- Triton ---


def test_triton_repository(exported, tmp_path):
    onnx = pytest.importorskip("onnx")
    path = exported["onnx nms"]
    home = write_triton(path, tmp_path / "models")
    assert (home / "1" / "model.onnx").read_bytes() == path.read_bytes()
    assert (home / "labels.txt").read_text() == "cat\ncup\nperson\n"
    config = (home / "config.pbtxt").read_text()
    assert 'name: "ssd300"' in config
    assert '{ name: "images", data_type: TYPE_UINT8, dims: [300, 300, 3] }' in config
    assert '{ name: "counts", data_type: TYPE_INT64, dims: [1], reshape: { shape: [] } }' in config
    graph = onnx.load(path).graph
    for end in (*graph.input, *graph.output):
        kind = {1: "FP32", 2: "UINT8", 7: "INT64"}[end.type.tensor_type.elem_type]
        dims = [each.dim_value for each in end.type.tensor_type.shape.dim][1:]
        assert f'name: "{end.name}", data_type: TYPE_{kind}, dims: {dims or [1]}' in config
    with pytest.raises(FileExistsError, match="has a model ssd300 already"):
        write_triton(path, tmp_path / "models")


def test_triton_with_one_batch_size(exported, tmp_path):
    home = write_triton(exported["onnx batch"], tmp_path / "models", "mine")
    config = (home / "config.pbtxt").read_text()
    assert "max_batch_size: 0" in config
    assert 'name: "images", data_type: TYPE_UINT8, dims: [2, 300, 300, 3]' in config
    assert 'name: "conf", data_type: TYPE_FP32, dims: [2, 4, 8732]' in config


def test_only_standard_operators(exported):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(exported["onnx nms"])
    assert {node.domain for node in model.graph.node} == {""}
    assert [each.domain for each in model.opset_import] == [""]
    assert sum(node.op_type == "NonMaxSuppression" for node in model.graph.node) == 1
    assert not model.functions
    notes = {each.key: each.value for each in model.metadata_props}
    assert json.loads(notes["ssd300"])["class_names"] == ["cat", "cup", "person"]


def test_triton_takes_only_our_files(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(CheckpointError):
        write_triton(tmp_path / "model.onnx", tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_backends_and_export_know_the_same_formats():
    assert set(backends.SUFFIXES.values()) == set(export.PRECISIONS)


@pytest.mark.parametrize("name", ["../up", 'a"b', "", ".."])
def test_names_that_triton_would_not_take(weights_file, tmp_path, name):
    with pytest.raises(ValueError, match="letters, digits"):
        write_triton(tmp_path / "model.onnx", tmp_path, name)


def test_triton_takes_no_other_format(exported, tmp_path):
    with pytest.raises(CheckpointError, match=r"\.onnx file"):
        write_triton(exported["torchscript nms"], tmp_path / "models")


def test_what_is_exported_already(exported, tmp_path):
    with pytest.raises(ValueError, match="is exported already"):
        export.export(exported["pt2"], tmp_path / "model.onnx")


def test_the_snippet_of_the_documents_runs(exported, photos, tmp_path, monkeypatch, capsys):
    """docs/export.md, ONNX without this package."""
    pytest.importorskip("onnxruntime")
    text = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    shutil.copy(exported["onnx nms"], tmp_path / "shapes.onnx")
    shutil.copy(photos / "coffee.jpg", tmp_path / "scene.jpg")
    monkeypatch.chdir(tmp_path)
    [snippet] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(snippet, "export.md", "exec"), {})
    assert "[[" in capsys.readouterr().out
