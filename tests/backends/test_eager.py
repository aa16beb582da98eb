import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from operator import methodcaller

import numpy as np
import pytest
import torch
import torch._inductor.config
from conftest import SMALL_LAYOUT

from ssd import backends, devices
from ssd.detector import Detector
from ssd.devices import native_precisions
from ssd.fused import Conv, FusedSSD, can_pack

CPU = torch.device("cpu")
LOW = {"score_threshold": 0.3}


@pytest.fixture(scope="module")
def pixels():
    values = torch.randint(0, 256, (3, 96, 96, 3), generator=torch.Generator().manual_seed(1))
    return values.byte()


def outputs(backend, pixels):
    with torch.inference_mode():
        return backend.forward(pixels)


def close(a, b):
    return a.class_ids.tolist() == b.class_ids.tolist() and all(
        np.allclose(getattr(a, name), getattr(b, name), atol=tolerance)
        for name, tolerance in (("boxes", 0.1), ("scores", 1e-3))
    )


def test_a_model_in_float64_runs_in_fp32(small_model, detector, photos):
    double = Detector(copy.deepcopy(small_model).double(), ("cat", "cup", "person"))
    assert double.precision == "fp32"
    assert close(double(photos / "coffee.jpg", **LOW), detector(photos / "coffee.jpg", **LOW))


def test_a_model_without_weights_is_refused(small_model):
    with pytest.raises(ValueError, match="no weights"):
        backends.of_model(copy.deepcopy(small_model).to("meta"))


def test_an_unknown_precision_is_named(tiny_model):
    with pytest.raises(ValueError, match="'int4' is none of auto, fp32"):
        backends.of_model(tiny_model, "int4")


def test_auto_falls_back_to_fp32(monkeypatch, weights_file):
    monkeypatch.setattr(devices, "native_precisions", lambda device: ("fp32",))
    assert Detector.load(weights_file, "cpu").precision == "fp32"


def test_compile_without_a_compiler(weights_file, tmp_path):
    # Where the name is a folder, torch gets PermissionError, and not FileNotFoundError, as it starts it.
    for name in ("/nonexistent", str(tmp_path)):
        missing = torch._inductor.config.patch({"cpp.cxx": (None, name)})
        with missing, pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler"):
            Detector.load(weights_file, "cpu", compile=True)


def test_a_default_device_does_not_matter(weights_file, detector, photos):
    with torch.device("meta"):
        found = Detector.load(weights_file, "cpu", "fp32")(photos / "coffee.jpg", **LOW)
    assert close(found, detector(photos / "coffee.jpg", **LOW))


def test_the_layout_is_the_models(tiny_model):
    backend = backends.of_model(tiny_model)
    assert backend.layout == SMALL_LAYOUT
    assert sorted(backend.default_boxes.tolist()) == sorted(SMALL_LAYOUT.default_boxes().tolist())


# --- In another process ---


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_pickled_one_gives_the_same_to_the_bit(tiny_model, pixels, precision):
    backend = backends.of_model(tiny_model, precision)
    again = pickle.loads(pickle.dumps(backend))
    assert (again.name, again.precision, again.device, again.backbone) == (
        "torch",
        precision,
        CPU,
        "resnet18",
    )
    assert (again.layout, again.num_classes) == (SMALL_LAYOUT, 4)
    assert torch.equal(again.default_boxes, backend.default_boxes)
    twice = pickle.loads(pickle.dumps(again))
    for other in (again, twice):
        for ours, theirs in zip(outputs(other, pixels), outputs(backend, pixels), strict=True):
            assert torch.equal(ours, theirs)


def test_in_a_spawned_process_it_gives_the_same_to_the_bit(tiny_model, pixels):
    backend = backends.of_model(tiny_model)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(methodcaller("forward", pixels), backend).result(timeout=120)
    for ours, theirs in zip(found, outputs(backend, pixels), strict=True):
        assert theirs.abs().max() > 0.5
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="torch has no oneDNN here")
def test_what_travels_is_not_packed_and_is_packed_again(tiny_model):
    """A packed weight means something only to the processor that packed it."""
    backend = backends.of_model(tiny_model)
    make, arguments = backend.__reduce__()
    [fused] = [value for value in arguments if isinstance(value, FusedSSD)]
    convs = [module for module in fused.modules() if isinstance(module, Conv)]
    assert convs
    assert all(conv._packed is None and conv.weight.numel() for conv in convs)
    again = make(*arguments)
    assert all(conv._packed is not None for conv in convs)
    assert again.forward is not backend.forward


def test_what_cannot_be_packed_there_runs_all_the_same(tiny_model, pixels, monkeypatch):
    """Packed here, and sent to a processor where torch has no such operations."""
    backend = backends.of_model(tiny_model)
    pickled = pickle.dumps(backend)
    monkeypatch.setattr("ssd.fused.can_pack", lambda *_: False)
    again = pickle.loads(pickled)
    for ours, theirs in zip(outputs(again, pixels), outputs(backend, pixels), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_backend_made_in_inference_mode_pickles_too(tiny_model, pixels):
    with torch.inference_mode():
        backend = backends.of_model(tiny_model)
    again = pickle.loads(pickle.dumps(backend))
    for ours, theirs in zip(outputs(again, pixels), outputs(backend, pixels), strict=True):
        assert torch.equal(ours, theirs)


def test_from_a_device_that_is_not_there_the_error_names_it(tiny_model, monkeypatch):
    make, (fused, backbone, precision, _, compile) = backends.of_model(tiny_model).__reduce__()
    with pytest.raises(ValueError, match="device 'cuda:0' cannot be used here; choose 'cpu'"):
        make(fused, backbone, precision, torch.device("cuda:0"), compile)


def test_a_compiled_one_is_compiled_again(tiny_model):
    """Nothing is compiled before there are images."""
    try:
        backend = backends.of_model(tiny_model, compile=True)
    except ValueError:
        pytest.skip("there is no C++ compiler")
    assert pickle.loads(pickle.dumps(backend)).name == "torch, compiled"


@pytest.mark.cuda
def test_from_a_gpu_weights_travel_by_the_cpu(tiny_model, pixels):
    backend = backends.of_model(copy.deepcopy(tiny_model).cuda())
    _, arguments = backend.__reduce__()
    [fused] = [value for value in arguments if isinstance(value, FusedSSD)]
    assert {value.device.type for value in (*fused.parameters(), *fused.buffers())} == {"cpu"}
    again = pickle.loads(pickle.dumps(backend))
    assert again.device == backend.device
    for ours, theirs in zip(outputs(again, pixels.cuda()), outputs(backend, pixels.cuda()), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_auto_precision():
    for device in [CPU, torch.device("meta")]:
        expected = "bf16" if "bf16" in native_precisions(device) else "fp32"
        assert devices.choose_precision("auto", device) == expected
    assert devices.choose_precision("fp16", CPU) == "fp16"
    with pytest.raises(ValueError, match="'int4' is none of auto, fp32"):
        devices.choose_precision("int4", CPU)
