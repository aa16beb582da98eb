"""Several processes, as torchrun starts them, over gloo."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssd import checkpoint, shapes
from ssd.distributed import LostContactError, World, join
from ssd.shapes import CLASSES


def torchrun(processes, *command, **options):
    """A torchrun of so many processes on this machine; each computes with one thread."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*launcher, f"--nproc-per-node={processes}", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": ""},
        **options,
    )


def run(processes, *command, **options):
    with torchrun(processes, *command, **options) as process:
        out, err = process.communicate(timeout=240)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Scenes of which some are empty, at random."""
    folder = tmp_path_factory.mktemp("scenes")
    shapes.write_dataset(folder, 12, 7, seed=1)
    content = json.loads((folder / "train.json").read_text())
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] % 3]
    (folder / "train.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def scene_weights(scene_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "scenes.safetensors"
    checkpoint.save(path, scene_model.state_dict(), CLASSES)
    return path


def test_alone_there_is_nothing_to_join(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join("cpu") as alone:
        assert alone == World(0, 1, torch.device("cpu"))
        assert alone.is_main
        assert alone.gather("x") == ["x"]
        assert alone.any(True)
        assert not alone.any(False)
        assert alone.sum(torch.ones(2)).tolist() == [1, 1]


def test_a_gpu_has_a_number(fake_cuda, monkeypatch):
    """torch.cuda.set_device takes no device without one."""
    chosen = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    with join() as alone:
        assert alone.device == torch.device("cuda", 0)
    assert chosen == [0]


def test_lost_contact_names_the_rank():
    two = World(1, 2, torch.device("cpu"))
    with pytest.raises(LostContactError, match="rank 1 of 2 lost contact"), two.contact():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), two.contact():
        raise RuntimeError("shapes cannot be multiplied")


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_training_with_images_that_are_empty_at_random(scenes, tmp_path, processes):
    options = ["--backbone", "resnet18", "--batch-size", "2", "--epochs", "2", "--workers", "0"]
    options += [
        "--precision",
        "fp32",
        "--evaluate-every",
        "2",
        "--output",
        tmp_path / "run",
        "--device",
        "cpu",
    ]
    code, out, err = run(processes, "-m", "ssd", "train", scenes, *options)
    assert code == 0, err
    assert f"{12 // (2 * processes)} steps an epoch, {processes} x cpu" in out
    assert out.count("epoch 2/2") == 1  # one process speaks
    found = checkpoint.read(tmp_path / "run" / "last.safetensors")
    assert found.class_names == CLASSES
    assert all(value.isfinite().all() for value in found.state_dict.values())
    assert "AP50" in (tmp_path / "run" / "metrics.csv").read_text()


def evaluate_and_detect(processes, scenes, weights, folder):
    """The files that two commands write, by name."""
    on_cpu = ["--device", "cpu", "--batch-size", "2"]
    command = ["evaluate", scenes, "--weights", weights, "--output", folder / "e"]
    code, _, err = run(processes, "-m", "ssd", *command, *on_cpu)
    assert code == 0, err
    command = ["detect", scenes / "val", "--weights", weights, "--output", folder / "d"]
    code, _, err = run(processes, "-m", "ssd", *command, *on_cpu)
    assert code == 0, err
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def files_of_one(scenes, scene_weights, tmp_path_factory):
    return evaluate_and_detect(1, scenes, scene_weights, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_evaluation_and_detection_give_identical_files(
    scenes, scene_weights, files_of_one, tmp_path, processes
):
    files = evaluate_and_detect(processes, scenes, scene_weights, tmp_path)
    assert len(files) == 10  # three files of results and seven pictures
    assert json.loads(files["e/detections.json"])
    assert files == files_of_one


KILLED = """
import os, signal, sys
from ssd.data import DetectionDataset, load
from ssd.distributed import join
from ssd.train import TrainConfig, fit, setup
config = TrainConfig(epochs=50, batch_size=2, backbone="resnet18", precision="fp32", workers=0)
real = setup.learning_rate
def rate(step, *rest, **values):
    if step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(step, *rest, **values)
setup.learning_rate = rate
with join("cpu") as world:
    fit(DetectionDataset(load(sys.argv[1], "train")), None, config, sys.argv[2], world=world)
"""


def test_a_killed_rank_ends_the_run_with_its_name(scenes, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    code, out, err = run(2, script, scenes, tmp_path / "run")
    assert code not in (0, None)
    assert re.search(r"rank\s*: 1", err)
    assert re.search(r"SIGKILL|-9", err)
    saved = checkpoint.read(Path(tmp_path / "run" / "last.safetensors"))  # of the epoch before
    assert saved.num_classes == 7
    assert "epoch 1/50" in out


def test_sigterm_saves_in_all_processes_and_resumes(scenes, tmp_path):
    options = ["--backbone", "resnet18", "--batch-size", "2", "--epochs", "40", "--workers", "0"]
    options += ["--precision", "auto", "--output", tmp_path / "run", "--device", "cpu"]
    with torchrun(2, "-m", "ssd", "train", scenes, *options, start_new_session=True) as process:
        for line in process.stdout:
            if line.startswith("epoch 1/40"):
                process.send_signal(signal.SIGTERM)
                break
        process.communicate(timeout=120)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["progress"]["epoch"] >= 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["config"]["epochs"] == 40
    command = ["train", "--resume", tmp_path / "run", "--epochs", str(state["progress"]["epoch"] + 1)]
    code, out, err = run(2, "-m", "ssd", *command, "--device", "cpu")
    assert code == 0, err
    assert "going on at epoch" in out
