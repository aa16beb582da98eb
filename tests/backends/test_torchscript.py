import warnings

import pytest
import torch

from ssd.checkpoint import CheckpointError
from ssd.detector import Detector


def test_repr_names_the_runtime(tiny_exported):
    loaded = Detector.load(tiny_exported["torchscript nms"])
    assert repr(loaded) == "Detector(3 classes, fp32, cpu, TorchScript)"


def test_a_program_of_someone_else_is_named(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
        torch.jit.save(program, tmp_path / "other.torchscript")
    with pytest.raises(CheckpointError, match=r"other\.torchscript: was not written by `ssd export`"):
        Detector.load(tmp_path / "other.torchscript")
