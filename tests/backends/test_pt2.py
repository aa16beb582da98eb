import io
import json
import os
import zipfile

import pytest
import torch

from ssd.checkpoint import CheckpointError
from ssd.detector import Detector


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("place", ["weight", "sample"])
def test_pickles_are_not_loaded(tiny_exported, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    pickled = io.BytesIO()
    torch.save(Hostile(), pickled)
    with zipfile.ZipFile(tiny_exported["pt2"]) as old, zipfile.ZipFile("evil.pt2", "w") as new:
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


def test_a_program_of_someone_else_is_named(tmp_path):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "other.pt2")
    with pytest.raises(CheckpointError, match=r"other\.pt2: was not written by `ssd export`"):
        Detector.load(tmp_path / "other.pt2")
