"""Proof that travels with exported files; what exporting itself proves is in test_export.py."""

import copy
import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import EXPORTS, LEFT_OUT, SMALL_LAYOUT, with_metadata

from ssd import backends, browser, proof
from ssd.backends import load
from ssd.errors import CheckpointError
from ssd.proof import SEED, seeded_images, verify
from ssd.transforms import normalize

pytest.importorskip("onnxruntime")


def test_images_are_the_same_everywhere():
    """Another digest on some machine or version would make every proof fail there."""
    digests = [hashlib.sha256(seeded_images(size).numpy().tobytes()).hexdigest()[:16] for size in (96, 300)]
    assert digests == ["004a59dded1c4e5b", "28bf2a9fc0a89fbd"]


QUICK = ("onnx", "onnx nms", "onnx batch", "openvino", "torchscript nms")


@pytest.mark.parametrize(
    "key", [key if key in QUICK else pytest.param(key, marks=pytest.mark.slow) for key in EXPORTS]
)
def test_every_kind_is_proved_again(tiny_exported, key):
    verdict = verify(tiny_exported[key])
    assert verdict.is_proved
    assert 0 < verdict.found.score < 1e-4
    carried = load(tiny_exported[key])[1].proof
    assert carried["seed"] == SEED
    assert carried["versions"] == verdict.versions
    assert 0 < carried["largest"]["score"] < 1e-3
    assert len(json.dumps(carried)) < 30_000


def test_what_the_reference_is(tiny_model, tiny_exported):
    """Against the model itself."""
    carried = load(tiny_exported["onnx"])[1].proof["reference"]
    with torch.no_grad():
        _, conf = tiny_model(
            (seeded_images(96).float() / 255 - torch.tensor([0.485, 0.456, 0.406])).permute(0, 3, 1, 2)
            / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        )
    np.testing.assert_allclose(carried["highest"], conf.softmax(1).amax(2), atol=1e-4)
    best = conf.softmax(1)[:, 1:].amax(1)
    np.testing.assert_allclose(np.array(carried["scores"])[:, 0], best[:, 0], atol=1e-4)
    assert np.shape(carried["scores"]) == (4, 12 * len(SMALL_LAYOUT.maps))


def in_the_layouts_order(model):
    """A backend of a model that gives boxes in the order of its layout, as files do."""
    return replace(backends.of_model(model), forward=lambda images: model(normalize(images)))


@pytest.mark.parametrize("level", range(len(SMALL_LAYOUT.maps)))
def test_a_bias_that_is_off_in_any_map_is_seen(tiny_model, tiny_exported, level):
    """As if a file had been damaged, or its runtime had a bug, in a place that little comes through."""
    _, metadata = load(tiny_exported["onnx"])
    worst = proof.Difference(0, 0, 0)
    reference = proof.proof_of(tiny_model, tiny_exported["onnx"], metadata, worst, "")["reference"]
    sound = in_the_layouts_order(tiny_model)
    assert proof._repeat(sound, reference).score < 1e-4
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.conf[level].bias[-1] += 0.5  # of the last class in the last shape of the map
    found = proof._repeat(in_the_layouts_order(model), reference)
    assert not proof._within(found, proof._allowed(metadata)), found


def scaled(path, target, factor):
    """A copy of an ONNX file with one layer's weights scaled."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path)
    name = next(node.input[1] for node in model.graph.node if node.op_type == "Conv")
    [weights] = [each for each in model.graph.initializer if each.name == name]
    values = onnx.numpy_helper.to_array(weights) * np.float32(factor)
    weights.CopyFrom(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, target)
    return target


@pytest.mark.parametrize("key", ["onnx", "onnx nms"])
@pytest.mark.parametrize("factor", [1.05, np.nan])
def test_an_altered_file_is_not_proved(tiny_exported, tmp_path, key, factor):
    assert not verify(scaled(tiny_exported[key], tmp_path / "model.onnx", factor)).is_proved


def test_an_altered_openvino_folder_is_not_proved(tiny_exported, tmp_path):
    for name in ("model.xml", "model.bin"):
        (tmp_path / name).write_bytes((tiny_exported["openvino"] / name).read_bytes())
    values = np.frombuffer((tmp_path / "model.bin").read_bytes(), np.uint8).copy()
    values[: 1 << 16] = 0
    (tmp_path / "model.bin").write_bytes(values.tobytes())
    assert not verify(tmp_path).is_proved


def test_a_file_of_an_earlier_version_says_so(tiny_exported, tmp_path):
    """It is used as ever, but it cannot be proved again."""
    second = {"version": 2, "proof": LEFT_OUT, "calibration": LEFT_OUT}
    path = with_metadata(tiny_exported["onnx"], tmp_path / "model.onnx", second)
    assert load(path)[1] == replace(load(tiny_exported["onnx"])[1], proof=None)
    with pytest.raises(
        CheckpointError, match=r"model\.onnx: carries no proof, as files that earlier versions"
    ):
        verify(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"largest": {"score": "a", "box": 1, "lost": 0}},
        {"reference": []},
        {"reference": {"highest": "a"}},
        {"allowed": {}},
        {"allowed": {"score": 10**400, "box": 1, "lost": 0}},
        {"versions": 3},
        {"reference": 1},
    ],
)
def test_a_proof_that_cannot_be_used_is_told(tiny_exported, tmp_path, changes):
    carried = load(tiny_exported["onnx"])[1].proof
    path = with_metadata(tiny_exported["onnx"], tmp_path / "model.onnx", {"proof": carried | changes})
    with pytest.raises(CheckpointError, match="its proof cannot be used"):
        verify(path)


def test_standalone_folders_and_pages(tiny_exported, tmp_path):
    model = tiny_exported["onnx nms"].read_bytes()
    (tmp_path / "model.onnx").write_bytes(model)
    assert verify(tmp_path).is_proved
    page = tmp_path / "page.html"
    page.write_bytes(browser._page({}, b"", model, b"var a;export{a as env};", b"\0asm"))
    assert verify(page).is_proved
    page.write_bytes(page.read_bytes().replace(b'id="model">', b'id="model">AAAA'))
    with pytest.raises(CheckpointError, match="no whole page"):
        verify(page)
