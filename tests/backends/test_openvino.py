import subprocess
import sys

import pytest
import torch

from ssd.detector import Detector
from ssd.devices import native_precisions

CPU = torch.device("cpu")


def test_it_chooses_as_torch_does(tiny_exported):
    expected = "bf16" if "bf16" in native_precisions(CPU) else "fp32"
    assert Detector.load(tiny_exported["openvino"]).precision == expected
    assert Detector.load(tiny_exported["openvino"] / "model.xml").precision == expected


def test_repr_names_the_runtime_and_what_it_computes_in(tiny_exported):
    assert repr(Detector.load(tiny_exported["openvino"], precision="bf16")).endswith("bf16, cpu, OpenVINO)")


def test_it_computes_in_fp16_where_it_says_so_itself(tiny_exported):
    openvino = pytest.importorskip("openvino")
    path = tiny_exported["openvino"]
    if "FP16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        assert Detector.load(path, precision="fp16").precision == "fp16"
    else:
        with pytest.raises(ValueError, match="does not compute in fp16 on this processor"):
            Detector.load(path, precision="fp16")


def test_it_does_not_claim_fp16(tiny_exported, monkeypatch):
    """On a processor for which OpenVINO does not say that it has fp16."""
    openvino = pytest.importorskip("openvino")
    path = tiny_exported["openvino"]
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "BF16", "INT8"])
    with pytest.raises(ValueError, match="does not compute in fp16 on this processor"):
        Detector.load(path, precision="fp16")


def test_it_runs_on_the_cpu_only(tiny_exported):
    from ssd.backends import load

    with pytest.raises(ValueError, match="runs on the CPU here, not on cuda"):
        load(tiny_exported["openvino"], torch.device("cuda"))


def test_a_signal_is_survived_after_detectors_are_gone(tiny_exported):
    """With AMX, each runtime of OpenVINO brings a stack for signals, and may put back one that is gone."""
    code = """if True:
        import gc, os, signal, sys
        from ssd import Detector
        heard = []
        signal.signal(signal.SIGINT, lambda *_: heard.append(True))
        first, second = (Detector.load(sys.argv[1]) for _ in range(2))
        del first
        gc.collect()
        del second
        gc.collect()
        os.kill(os.getpid(), signal.SIGINT)
        assert heard
    """
    assert (
        subprocess.run([sys.executable, "-c", code, tiny_exported["openvino"]], check=False).returncode == 0
    )
