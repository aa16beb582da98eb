import builtins
import copy
import io
import json
import os
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch._inductor.config
from conftest import PHOTOS

from ssd import backends
from ssd.backends import NMS, Backend, Metadata, Options
from ssd.checkpoint import CheckpointError
from ssd.detector import Detector
from ssd.model import native_precisions
from ssd.postprocess import NonFiniteError

CPU = torch.device("cpu")
LOW = {"score_threshold": 0.3}


FORMATS = ("onnx", "onnx nms", "onnx batch", "openvino", "openvino nms", "pt2", "torchscript nms")


def close(a, b):
    return a.class_ids.tolist() == b.class_ids.tolist() and all(
        np.allclose(getattr(a, name), getattr(b, name), atol=tolerance)
        for name, tolerance in (("boxes", 0.1), ("scores", 1e-3))
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_an_exported_file_gives_the_same_detections(exported, detector, photos, kind):
    loaded = Detector.load(exported[kind], "cpu", "fp32")
    assert (loaded.precision, loaded.device, loaded.class_names) == ("fp32", CPU, ("cat", "cup", "person"))
    paths = [photos / f"{name}.jpg" for name in PHOTOS]
    expected = detector(paths, **LOW)
    assert sum(map(len, expected)) > 10
    for size in (1, 2, 3):
        found = loaded(paths, batch_size=size, **LOW)
        assert all(close(a, b) for a, b in zip(found, expected, strict=True)), (kind, size)
    assert len(loaded(paths[0], score_threshold=1.0)) == 0
    some = {"max_detections": 3} | ({} if "nms" in kind else {"classes": ["person", "cat"]}) | LOW
    assert close(loaded(paths[0], **some), detector(paths[0], **some))


def test_repr_names_the_runtime(exported):
    assert repr(Detector.load(exported["onnx"])) == "Detector(3 classes, fp32, cpu, ONNX Runtime)"
    assert repr(Detector.load(exported["openvino"], precision="bf16")).endswith("bf16, cpu, OpenVINO)")


def test_openvino_chooses_as_torch_does(exported):
    expected = "bf16" if "bf16" in native_precisions(CPU) else "fp32"
    assert Detector.load(exported["openvino"]).precision == expected
    assert Detector.load(exported["openvino"] / "model.xml").precision == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iou_threshold": 0.4}, "iou_threshold is 0.5, not 0.4"),
        ({"score_threshold": 0.01}, "score_threshold is at least 0.05; got 0.01"),
        ({"max_detections": 300}, "max_detections is at most 200; got 300"),
        ({"classes": ["cat"]}, "classes compete for its places"),
    ],
)
def test_options_that_a_file_with_nms_cannot_serve_are_named(exported, photos, options, message):
    loaded = Detector.load(exported["onnx nms"])
    with pytest.raises(ValueError, match=rf"NMS is inside .* {message}.*export it without NMS"):
        loaded(photos / "coffee.jpg", **options)


def test_a_precision_that_a_file_does_not_have_is_named(exported):
    for kind in ("onnx", "pt2"):
        with pytest.raises(ValueError, match="computes in fp32, as it was exported, not in bf16"):
            Detector.load(exported[kind], precision="bf16")
    with pytest.raises(ValueError, match="compiled already"):
        Detector.load(exported["onnx"], compile=True)


@pytest.mark.parametrize("kind", ["onnx", "openvino", "pt2", "torchscript nms"])
def test_a_damaged_file_is_named(exported, tmp_path, kind):
    original = exported[kind]
    path = tmp_path / original.name
    if original.is_dir():
        path.mkdir()
        content = (original / "model.xml").read_bytes()
        (path / "model.xml").write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(original.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=str(path)):
        Detector.load(path)


def test_a_file_of_someone_else_is_named(tmp_path):
    onnx = pytest.importorskip("onnx")
    node = onnx.helper.make_node("Identity", ["images"], ["out"])
    ends = [onnx.helper.make_tensor_value_info(each, 1, [1]) for each in ("images", "out")]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(CheckpointError, match=r"other\.onnx: was not written by `ssd export`"):
        Detector.load(tmp_path / "other.onnx")


@pytest.mark.parametrize(("kind", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_runtime_names_the_command(exported, monkeypatch, kind, package):
    real = builtins.__import__

    def without(name, *rest):
        if name == package:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"pip install 'ssd300\[{kind}\]'"):
        Detector.load(exported[kind])


def test_what_is_no_exported_file_goes_to_the_checkpoints(tmp_path, weights_file):
    assert backends.format_of(weights_file) is None
    assert backends.format_of(tmp_path) is None
    assert backends.format_of(tmp_path / "gone.onnx") is None
    with pytest.raises(FileNotFoundError, match=r"gone\.onnx"):
        Detector.load(tmp_path / "gone.onnx")


def test_nan_is_marked_through_nms(exported, photos):
    """A file with NMS shows NaN and infinity in its scores; nothing found would be a plausible result."""
    loaded = Detector.load(exported["onnx nms"])
    run = loaded.backend.forward

    def broken(pixels):
        boxes, scores, class_ids, counts = run(pixels)
        return boxes, scores.where(torch.arange(len(pixels))[:, None] != 1, torch.nan), class_ids, counts

    loaded.backend = replace(loaded.backend, forward=broken)
    with pytest.raises(NonFiniteError, match=r"coffee\.jpg: .*NaN") as error:
        loaded([photos / "chelsea.jpg", photos / "coffee.jpg"])
    assert error.value.images == (1,)


def test_selection_from_more_detections():
    scores = torch.tensor([[0.9, 0.6, 0.5, 0.2], [0.8, 0.0, 0.0, 0.0]])
    backend = Backend(
        name="made up",
        precision="fp32",
        device=CPU,
        forward=lambda pixels: (),
        backbone="resnet18",
        num_classes=4,
        default_boxes=torch.zeros(1, 4),
        nms=NMS(),
    )
    outputs = (
        torch.arange(32.0).view(2, 4, 4),
        scores,
        torch.tensor([[0, 1, 2, 1], [2, 0, 0, 0]]),
        torch.tensor([4, 1]),
    )
    found = backend.finish(outputs, Options(0.5, 0.5, 2)).per_image()
    assert [each[1].tolist() for each in found] == [pytest.approx([0.9, 0.6]), pytest.approx([0.8])]
    assert found[0][2].tolist() == [0, 1]
    assert found[0][0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    nothing = backend.finish(outputs, Options(0.95, 0.5, 2)).per_image()
    assert [len(each[1]) for each in nothing] == [0, 0]


def test_metadata_survives_its_file():
    for nms in (None, NMS(0.1, 0.6, 50)):
        metadata = Metadata(("a", "b"), (7, 9), "resnet34", "int8", True, None, nms)
        assert Metadata.from_json(metadata.to_json()) == metadata


def test_auto_precision():
    for device in [CPU, torch.device("meta")]:
        expected = "bf16" if "bf16" in native_precisions(device) else "fp32"
        assert backends.choose_precision("auto", device) == expected
    assert backends.choose_precision("fp16", CPU) == "fp16"
    with pytest.raises(ValueError, match="'int4' is none of auto, fp32"):
        backends.choose_precision("int4", CPU)


def test_auto_falls_back_to_fp32(monkeypatch, weights_file):
    monkeypatch.setattr(backends, "native_precisions", lambda device: ("fp32",))
    assert Detector.load(weights_file, "cpu").precision == "fp32"


# --- Files from anywhere ---


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 10**12},
        {"batch": 0},
        {"batch": "2"},
        {"nms": {"score_threshold": "a", "iou_threshold": 0.5, "max_detections": 200}},
        {"nms": {"score_threshold": 0.1, "iou_threshold": 0.5, "max_detections": 10**9}},
        {"class_names": "abc"},
        {"class_names": [1, None, {}]},
        {"class_names": []},
        {"category_ids": [1]},
        {"category_ids": ["x"] * 3},
        {"backbone": [1]},
        {"precision": "fp64"},
        {"uint8": 1},
        {"transform": "other"},
        {"more": 1},
    ],
)
def test_hostile_metadata_is_refused(changes):
    values = json.loads(Metadata(("a", "b", "c"), (), "resnet18", "fp32", False, None, None).to_json())
    with pytest.raises((ValueError, TypeError)):
        Metadata.from_json(json.dumps(values | changes))


@pytest.mark.parametrize("changes", [{"uint8": True}, {"class_names": ["a", "b"]}, {"nms": vars(NMS())}])
def test_metadata_that_does_not_fit_the_graph_is_refused(exported, tmp_path, changes):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(exported["onnx"])
    [entry] = [each for each in model.metadata_props if each.key == backends.METADATA]
    entry.value = json.dumps(json.loads(entry.value) | changes)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match=r"model\.onnx: .* (says of itself|gives)"):
        Detector.load(tmp_path / "model.onnx")


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("place", ["weight", "sample"])
def test_pickles_in_a_pt2_are_not_loaded(exported, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    pickled = io.BytesIO()
    torch.save(Hostile(), pickled)
    with zipfile.ZipFile(exported["pt2"]) as old, zipfile.ZipFile("evil.pt2", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if place == "weight" and name.endswith("model_weights_config.json"):
                config = json.loads(content)
                next(iter(config["config"].values()))["use_pickle"] = True
                content = json.dumps(config).encode()
            if place == "weight" and name.endswith("/weight_0"):
                content = pickled.getvalue()
            if place == "sample" and name.endswith("sample_inputs/model.pt"):
                content = pickled.getvalue()
            new.writestr(name, content)
    with pytest.raises(CheckpointError, match=r"evil\.pt2: (holds more than tensors|not a whole)"):
        Detector.load("evil.pt2")
    assert not os.path.exists("pwned")


def test_names_of_published_weights_are_not_files(tmp_path, monkeypatch, exported):
    shutil.copytree(exported["openvino"], tmp_path / "shapes")
    monkeypatch.chdir(tmp_path)
    assert "torch" in repr(Detector.load("shapes"))


def test_openvino_does_not_claim_fp16(exported):
    if "fp16" in native_precisions(CPU):
        pytest.skip("this processor computes in fp16")
    with pytest.raises(ValueError, match="does not compute in fp16 on this processor"):
        Detector.load(exported["openvino"], precision="fp16")


# --- Models of any kind ---


def test_a_model_in_float64_runs_in_fp32(small_model, detector, photos):
    double = Detector(copy.deepcopy(small_model).double(), ("cat", "cup", "person"))
    assert double.precision == "fp32"
    assert close(double(photos / "coffee.jpg", **LOW), detector(photos / "coffee.jpg", **LOW))


def test_a_model_without_weights_is_refused(small_model):
    with pytest.raises(ValueError, match="no weights"):
        backends.of_model(copy.deepcopy(small_model).to("meta"))


def test_compile_without_a_compiler(weights_file):
    missing = torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent")})
    with missing, pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler"):
        Detector.load(weights_file, "cpu", compile=True)


def test_a_default_device_does_not_matter(weights_file, detector, photos):
    with torch.device("meta"):
        found = Detector.load(weights_file, "cpu", "fp32")(photos / "coffee.jpg", **LOW)
    assert close(found, detector(photos / "coffee.jpg", **LOW))
