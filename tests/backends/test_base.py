import builtins
import copy
import json
import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import EXPORTS, OTHER_LAYOUTS, PHOTOS, SMALL_LAYOUT, made_model

from ssd import backends
from ssd.backends import BACKENDS, NMS, Backend, Metadata, Options
from ssd.backends.base import VERSION, network_input, of_file
from ssd.boxes import PUBLISHED_LAYOUT
from ssd.checkpoint import CheckpointError, save
from ssd.containers import checkpoint_kind
from ssd.detector import Detector
from ssd.errors import MissingExtra
from ssd.export import export
from ssd.images import load_image
from ssd.postprocess import NonFiniteError, postprocess
from ssd.transforms import MEAN, STD, normalize, resize

CPU = torch.device("cpu")
LOW = {"score_threshold": 0.3}


def close(a, b):
    return a.class_ids.tolist() == b.class_ids.tolist() and all(
        np.allclose(getattr(a, name), getattr(b, name), atol=tolerance)
        for name, tolerance in (("boxes", 0.1), ("scores", 1e-3))
    )


def made_up(**changes):
    values = {
        "name": "made up",
        "precision": "fp32",
        "device": CPU,
        "forward": lambda pixels: (),
        "backbone": "resnet18",
        "num_classes": 4,
        "layout": PUBLISHED_LAYOUT,
        "default_boxes": torch.zeros(1, 4),
    }
    return Backend(**values | changes)


# --- Exported files ---


@pytest.mark.slow
@pytest.mark.parametrize("key", EXPORTS)
def test_an_exported_file_gives_the_same_detections(exported, detector, photos, key):
    loaded = Detector.load(exported[key], "cpu", "fp32")
    assert (loaded.precision, loaded.device, loaded.class_names) == ("fp32", CPU, ("cat", "cup", "person"))
    paths = [photos / f"{name}.jpg" for name in PHOTOS]
    expected = detector(paths, **LOW)
    assert sum(map(len, expected)) > 10
    for size in (1, 2, 3):
        found = loaded(paths, batch_size=size, **LOW)
        assert all(close(a, b) for a, b in zip(found, expected, strict=True)), (key, size)
    assert len(loaded(paths[0], score_threshold=1.0)) == 0
    some = {"max_detections": 3} | ({} if "nms" in key else {"classes": ["person", "cat"]}) | LOW
    assert close(loaded(paths[0], **some), detector(paths[0], **some))


@pytest.mark.parametrize("key", ["onnx", "onnx nms", "openvino", "pt2", "torchscript nms"])
def test_a_network_of_another_layout(tiny_model, tiny_exported, photos, key):
    """It is exported, which proves it; loaded; and its detections are the model's."""
    loaded = Detector.load(tiny_exported[key], "cpu", "fp32")
    assert loaded.layout == loaded.backend.layout == SMALL_LAYOUT
    assert len(loaded.backend.default_boxes) == SMALL_LAYOUT.num_default_boxes
    paths = [photos / f"{name}.jpg" for name in PHOTOS]
    # Further down are scores that are equal to four digits, whose order is anybody's.
    low = {"score_threshold": 0.2, "max_detections": 8}
    expected = Detector(tiny_model, ("cat", "cup", "person"))(paths, **low)
    assert min(map(len, expected)) == 8
    for size in (1, 2, 3):
        found = loaded(paths, batch_size=size, **low)
        assert all(close(a, b) for a, b in zip(found, expected, strict=True)), (key, size)


@pytest.mark.parametrize("layout", ["512", "300 with other boxes"])
@pytest.mark.parametrize(
    "key",
    [
        None,
        *(
            pytest.param(key, marks=pytest.mark.slow)
            for key in ("onnx", "onnx nms", "openvino", "pt2", "torchscript nms")
        ),
    ],
)
def test_boxes_of_any_layout_are_those_of_the_model(layout, key, photos, tmp_path):
    """Of its checkpoint, and of that as each kind of file; computed here by the module as it is."""
    layout = OTHER_LAYOUTS[layout]
    model = made_model(layout=layout)
    weights = tmp_path / "model.safetensors"
    save(weights, model.state_dict(), ("cat", "cup", "person"), layout=layout)
    name, kind, options = EXPORTS[key] if key else ("", "", {})
    loaded = Detector.load(export(weights, tmp_path / name, kind, **options) if key else weights, CPU, "fp32")
    assert loaded.layout == layout
    for photo in (photos / f"{name}.jpg" for name in PHOTOS):
        image = load_image(photo)
        with torch.inference_mode():
            loc, conf = model(normalize(resize(image, layout.size)[None]))
            expected = postprocess(
                loc, conf, layout.default_boxes(), score_threshold=0.25, max_detections=10
            ).per_image()
        [(boxes, scores, class_ids)] = expected
        found = loaded(photo, score_threshold=0.25, max_detections=10)
        assert len(scores) > 5
        assert found.class_ids.tolist() == class_ids.tolist()
        np.testing.assert_allclose(found.scores, scores, atol=1e-3)
        np.testing.assert_allclose(found.boxes, boxes.clamp(0, 1) * torch.tensor(image.size * 2), atol=0.1)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("uint8", [True, False])
def test_batches_of_a_file_with_one_size_are_filled_up(count, uint8):
    seen = []

    def run(images):
        seen.append(images)
        return images.flatten(1).float().sum(1), -images.flatten(1).float().sum(1)

    metadata = Metadata(("a",), (), "resnet18", "fp32", uint8, 2, None, SMALL_LAYOUT)
    backend = of_file("made up", metadata, CPU, run)
    pixels = torch.arange(1, count + 1, dtype=torch.uint8)[:, None, None, None].expand(-1, 96, 96, 3)
    first, second = backend.forward(pixels)
    assert {len(images) for images in seen} == {2}
    assert {tuple(images.shape[1:]) for images in seen} == {(96, 96, 3) if uint8 else (3, 96, 96)}
    expected = network_input(pixels, metadata).flatten(1).float().sum(1)
    assert torch.equal(first, expected)
    assert torch.equal(second, -expected)


def test_every_kind_is_tried():
    assert {kind for _, kind, _ in EXPORTS.values()} == set(BACKENDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iou_threshold": 0.4}, "iou_threshold is 0.5, not 0.4"),
        ({"score_threshold": 0.01}, "score_threshold is at least 0.05; got 0.01"),
        ({"max_detections": 300}, "max_detections is at most 200; got 300"),
        ({"classes": ["cat"]}, "classes compete for its places"),
        ({"voting": True}, "voting and flips cannot reach the candidates"),
        ({"flips": True}, "voting and flips cannot reach the candidates"),
    ],
)
def test_options_that_a_file_with_nms_cannot_serve_are_named(tiny_exported, photos, options, message):
    loaded = Detector.load(tiny_exported["torchscript nms"])
    with pytest.raises(ValueError, match=rf"NMS is inside .* {message}.*export it without NMS"):
        loaded(photos / "coffee.jpg", **options)


def test_voting_and_flips_with_a_file_of_one_batch_size(tiny_model, photos):
    sizes = []

    def run(images):
        sizes.append(len(images))
        return tiny_model(images)

    names = ("cat", "cup", "person")
    metadata = Metadata(names, (), "resnet18", "fp32", False, 2, None, SMALL_LAYOUT)
    loaded = Detector(of_file("made up", metadata, CPU, run), names)
    paths = [photos / f"{name}.jpg" for name in PHOTOS]
    options = LOW | {"voting": True, "flips": True}
    found = loaded(paths, batch_size=3, **options)
    assert sizes == [2] * 4
    expected = Detector(tiny_model, names)(paths, **options)
    assert sum(map(len, expected)) > 10
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("key", ["onnx", "onnx nms", "openvino", "pt2", "torchscript nms"])
def test_tiles_go_through_a_file_as_through_the_model(tiny_model, tiny_exported, photos, key):
    """Whatever number of views the file takes at a time."""
    loaded = Detector.load(tiny_exported[key], "cpu", "fp32")
    paths = [photos / f"{name}.jpg" for name in PHOTOS]
    # Further down are scores that are equal to four digits, whose order is anybody's.
    options = {"score_threshold": 0.2, "max_detections": 8, "tiles": 300}
    expected = Detector(tiny_model, ("cat", "cup", "person"))(paths, **options)
    assert not close(expected[0], loaded(paths[0], **options | {"tiles": None}))
    found = loaded(paths, **options)
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("most", [0, 3 * 8732 + 1, 10**12])
def test_more_detections_than_there_can_be_are_refused(detector, photos, most):
    with pytest.raises(ValueError, match="max_detections must be "):
        detector(photos / "coffee.jpg", max_detections=most)
    for nms in (None, NMS()):
        with pytest.raises(ValueError, match="max_detections must be from 1 to 26,196"):
            made_up(nms=nms).require(Options(0.4, 0.5, most))
    made_up().require(Options(0.4, 0.5, 3 * 8732))


def test_a_precision_that_a_file_does_not_have_is_named(tiny_exported):
    for key in ("onnx", "pt2"):
        with pytest.raises(ValueError, match="computes in fp32, as it was exported, not in bf16"):
            Detector.load(tiny_exported[key], precision="bf16")
    with pytest.raises(ValueError, match="compiled already"):
        Detector.load(tiny_exported["onnx"], compile=True)


@pytest.mark.parametrize("key", ["onnx", "openvino", "pt2", "torchscript nms"])
def test_a_damaged_file_is_named(tiny_exported, tmp_path, key):
    original = tiny_exported[key]
    path = tmp_path / original.name
    if original.is_dir():
        path.mkdir()
        content = (original / "model.xml").read_bytes()
        (path / "model.xml").write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(original.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=str(path)):
        Detector.load(path)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".torchscript", ".xml"])
@pytest.mark.parametrize("right", [".pt", ".safetensors"])
def test_a_checkpoint_by_the_name_of_an_exported_file_is_told(tiny_model, tmp_path, suffix, right):
    save(tmp_path / f"w{right}", tiny_model.state_dict(), ("a", "b", "c"), layout=SMALL_LAYOUT)
    (tmp_path / f"w{right}").rename(tmp_path / f"w{suffix}")
    kind = "a checkpoint of torch" if right == ".pt" else "a safetensors file"
    with pytest.raises(CheckpointError, match=rf"w\{suffix}: this is {kind}; name it \{right}$"):
        Detector.load(tmp_path / f"w{suffix}")


@pytest.mark.parametrize("key", ["onnx", "pt2", "torchscript nms"])
def test_programs_are_no_checkpoints(tiny_exported, key):
    assert checkpoint_kind(tiny_exported[key]) == ""


@pytest.mark.parametrize(("kind", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_runtime_names_the_command(tiny_exported, monkeypatch, kind, package):
    path = tiny_exported[kind]
    real = builtins.__import__

    def without(name, *rest):
        if name == package:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=rf"pip install 'ssd300\[{kind}\]'"):
        Detector.load(path)


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_a_missing_writer_names_the_command(weights_file, tmp_path, monkeypatch, kind):
    real = builtins.__import__

    def without(name, *rest):
        if name == "onnxscript":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"pip install 'ssd300\[{kind}\]'"):
        export(weights_file, tmp_path / f"model{BACKENDS[kind].ending}", kind)
    assert not list(tmp_path.iterdir())


def test_what_is_no_exported_file_goes_to_the_checkpoints(tmp_path, weights_file):
    assert backends.kind_of(weights_file) is None
    assert backends.kind_of(tmp_path) is None
    assert backends.kind_of(tmp_path / "gone.onnx") is None
    with pytest.raises(FileNotFoundError, match=r"gone\.onnx"):
        Detector.load(tmp_path / "gone.onnx")
    with pytest.raises(FileNotFoundError, match=r"no exported file at .*gone\.onnx"):
        backends.load(tmp_path / "gone.onnx")


def test_kinds_are_known_by_name(tmp_path):
    for name in ("a.onnx", "B.PT2", "c.torchscript", "d.xml", "model.xml", "e.bin"):
        (tmp_path / name).touch()
    found = {path.name: backends.kind_of(path) for path in tmp_path.iterdir()}
    assert found == {
        "a.onnx": "onnx",
        "B.PT2": "pt2",
        "c.torchscript": "torchscript",
        "d.xml": "openvino",
        "model.xml": "openvino",
        "e.bin": None,
    }
    assert backends.kind_of(tmp_path) == "openvino"


def test_names_of_published_weights_are_not_files(tmp_path, monkeypatch, tiny_exported):
    shutil.copytree(tiny_exported["openvino"], tmp_path / "shapes")
    monkeypatch.chdir(tmp_path)
    assert "torch" in repr(Detector.load("shapes"))


# --- NMS in the file ---


def test_nan_is_marked_through_nms(tiny_exported, photos):
    """A file with NMS shows NaN and infinity in its scores; nothing found would be a plausible result."""
    loaded = Detector.load(tiny_exported["torchscript nms"])
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
    backend = made_up(nms=NMS())
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
    own = backend.finish(outputs, Options(0.1, 0.5, 3, None, (0.95, 0.1, 0.1))).per_image()
    assert [each[1].tolist() for each in own] == [pytest.approx([0.6, 0.5, 0.2]), pytest.approx([0.8])]
    nothing = backend.finish(outputs, Options(0.95, 0.5, 2)).per_image()
    assert [len(each[1]) for each in nothing] == [0, 0]


# --- Metadata ---


def test_metadata_survives_its_file():
    for nms in (None, NMS(0.1, 0.6, 50)):
        for layout in (PUBLISHED_LAYOUT, SMALL_LAYOUT):
            metadata = Metadata(("a", "b"), (7, 9), "resnet34", "int8", True, None, nms, layout)
            assert Metadata.from_json(metadata.to_json()) == metadata
            calibrated = replace(metadata, score_thresholds=(0.25, 0.5))
            assert Metadata.from_json(calibrated.to_json()) == calibrated


@pytest.mark.parametrize("thresholds", [[0.5], [0.5, 2], [0.5, "a"], [0.5, None], 0.5])
def test_thresholds_that_are_none_are_refused(thresholds):
    values = json.loads(
        Metadata(("a", "b"), (), "resnet34", "fp32", False, None, None, SMALL_LAYOUT).to_json()
    )
    with pytest.raises(ValueError, match="score_thresholds is"):
        Metadata.from_json(json.dumps(values | {"score_thresholds": thresholds}))


def test_metadata_says_how_to_prepare_an_image():
    """For those who run the file without this package."""
    metadata = Metadata(("a", "b"), (), "resnet34", "fp32", False, None, None, SMALL_LAYOUT)
    values = json.loads(metadata.to_json())
    assert values["version"] == VERSION == 3
    assert (values["size"], values["mean"], values["deviation"]) == (96, list(MEAN), list(STD))
    assert values["layout"]["maps"] == [12, 6, 3, 1]


FIRST = {
    "class_names": ["a", "b"],
    "category_ids": [],
    "backbone": "resnet18",
    "precision": "fp32",
    "uint8": False,
    "batch": None,
    "nms": None,
    "transform": "the whole image resized to 300x300 (bilinear, antialiased), ImageNet mean and deviation",
}
"""As files had it before it had a version."""


def test_metadata_of_the_first_version_is_of_the_published_layout():
    metadata = Metadata.from_json(json.dumps(FIRST))
    assert metadata == Metadata(("a", "b"), (), "resnet18", "fp32", False, None, None, PUBLISHED_LAYOUT)
    for changes in ({"transform": "other"}, {"layout": SMALL_LAYOUT.to_dict()}, {"size": 96}):
        with pytest.raises(ValueError, match="transform|layout|size"):
            Metadata.from_json(json.dumps(FIRST | changes))
    with pytest.raises(ValueError, match="it lacks uint8, and has nothing too much"):
        Metadata.from_json(json.dumps({key: value for key, value in FIRST.items() if key != "uint8"}))


@pytest.mark.parametrize(
    "lacks", [["proof"], ["proof", "calibration"], ["proof", "calibration", "score_thresholds"]]
)
def test_metadata_of_the_second_version_lacks_what_it_did_not_know(lacks):
    metadata = Metadata(("a", "b"), (), "resnet18", "fp32", False, None, None, SMALL_LAYOUT)
    values = {key: value for key, value in json.loads(metadata.to_json()).items() if key not in lacks}
    assert Metadata.from_json(json.dumps(values | {"version": 2})) == metadata
    with pytest.raises(ValueError, match=f"it lacks {', '.join(sorted(lacks))}, and has nothing too much"):
        Metadata.from_json(json.dumps(values))


LAYOUT = PUBLISHED_LAYOUT.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 10**12}, "its batch is impossible"),
        ({"batch": 0}, "its batch is impossible"),
        ({"batch": "2"}, "its batch is impossible"),
        ({"nms": {"score_threshold": "a", "iou_threshold": 0.5, "max_detections": 200}}, "its nms is"),
        ({"nms": {"score_threshold": 0.1, "iou_threshold": 2, "max_detections": 200}}, "its nms is"),
        ({"nms": {"score_threshold": 0.1, "iou_threshold": 0.5, "max_detections": 10**9}}, "its nms is"),
        ({"nms": {"score_threshold": 0.1, "iou_threshold": 0.5, "max_detections": 3 * 8732 + 1}}, "its nms"),
        ({"nms": "some"}, "its nms is"),
        ({"nms": {"score_threshold": 0.1}}, "its nms is"),
        ({"nms": {}}, "its nms is"),
        ({"class_names": "abc"}, "its class_names is no list"),
        ({"class_names": [1, None, {}]}, "its class_names is impossible"),
        ({"class_names": []}, "its class_names"),
        ({"category_ids": [1]}, "its category_ids is impossible"),
        ({"category_ids": ["x"] * 3}, "its category_ids is impossible"),
        ({"category_ids": "abc"}, "its category_ids is no list"),
        ({"backbone": [1]}, "its backbone is impossible"),
        ({"precision": "fp64"}, "its precision is impossible"),
        ({"uint8": 1}, "its uint8 is impossible"),
        ({"transform": "other"}, "it lacks nothing, and has transform too much"),
        ({"more": 1}, "it lacks nothing, and has more too much"),
        ({"size": 301}, "its size is 301; only 300 is supported"),
        ({"mean": [0.5, 0.5, 0.5]}, r"its mean is \[0.5, 0.5, 0.5\]; only \[0.485"),
        ({"deviation": None}, "its deviation is None"),
        ({"layout": LAYOUT | {"size": 10**9}}, "its layout is impossible: .*size"),
        ({"layout": LAYOUT | {"maps": [10**9]}}, "its layout is impossible"),
        ({"layout": LAYOUT | {"steps": ["a"] * 6}}, "its layout is impossible"),
        ({"layout": [1]}, "its layout is impossible"),
        ({"layout": None}, "its layout is impossible"),
        ({"version": 0}, "its version is impossible"),
        ({"version": "2"}, "its version is impossible"),
        ({"version": True}, "its version is impossible"),
        ({"version": 4}, r"of version 4, and this ssd300 knows up to 3; update it: pip install --upgrade"),
    ],
)
def test_hostile_metadata_is_refused(changes, message):
    values = json.loads(Metadata(("a", "b", "c"), (), "resnet18", "fp32", False, None, None).to_json())
    with pytest.raises(ValueError, match=message):
        Metadata.from_json(json.dumps(values | changes))


@pytest.mark.parametrize("text", ["", "[]", "3", "{", '{"version": 3}', "null"])
def test_what_is_no_metadata_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011 (some are the JSON parser's)
        Metadata.from_json(text)


# --- Copies and other processes ---


def test_a_copy_shares_the_network(detector):
    backend = detector.backend
    for other in (copy.copy(backend), copy.deepcopy(backend), replace(backend, name="other")):
        assert other is not backend
        assert other.forward is backend.forward
        assert other.default_boxes is backend.default_boxes
    assert copy.deepcopy(detector).backend.forward is backend.forward


def test_a_backend_made_by_hand_cannot_be_pickled():
    with pytest.raises(TypeError, match=r"'made up' cannot be pickled.*rebuild.*make it in each process"):
        pickle.dumps(made_up())
    assert copy.deepcopy(made_up()).name == "made up"


@pytest.mark.parametrize("key", ["onnx", "openvino", "pt2", "torchscript nms"])
def test_a_pickled_file_is_loaded_again(tiny_exported, photos, tmp_path, monkeypatch, key):
    """By its absolute path, in the same precision; the results are equal to the bit."""
    monkeypatch.chdir(tiny_exported[key].parent)
    loaded = Detector.load(tiny_exported[key].name, precision="bf16" if key == "openvino" else "auto")
    monkeypatch.chdir(tmp_path)
    again = pickle.loads(pickle.dumps(loaded))
    assert repr(again) == repr(loaded)
    assert again.backend.layout == loaded.backend.layout
    expected, found = loaded(photos / "coffee.jpg", **LOW), again(photos / "coffee.jpg", **LOW)
    assert len(expected) > 3
    for name in ("boxes", "scores", "class_ids"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))
    assert pickle.loads(pickle.dumps(again)).class_names == loaded.class_names


def test_a_pickled_file_that_has_changed_is_named(tiny_exported, tmp_path):
    path = tmp_path / "model.torchscript"
    shutil.copy(tiny_exported["torchscript nms"], path)
    pickled = pickle.dumps(Detector.load(path))
    export("shapes", path, "torchscript")
    with pytest.raises(CheckpointError, match=r"model\.torchscript: is another file than when"):
        pickle.loads(pickled)
    os.remove(path)
    with pytest.raises(FileNotFoundError, match=r"no exported file at .*model\.torchscript"):
        pickle.loads(pickled)
