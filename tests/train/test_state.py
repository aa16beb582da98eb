import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training import CPU, QUICK, SMALL, make_run

from ssd import checkpoint
from ssd.boxes import LAYOUTS
from ssd.train import fit
from ssd.train.optim import make_optimizer
from ssd.train.state import read_state, restore, save_state

HELPERS = str(Path(__file__).parent.parent)


def test_resuming_needs_a_state(images, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing to resume: there is no .*state\.pt"):
        fit(images, None, SMALL, tmp_path, resume=True, say=None)
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(checkpoint.CheckpointError, match=r"state\.pt: not the state of a run, or damaged"):
        fit(images, None, SMALL, tmp_path, resume=True, say=None)
    torch.save({"model": {}}, tmp_path / "state.pt")
    with pytest.raises(
        checkpoint.CheckpointError, match=r"not the state of a run; it has no average, config, data"
    ):
        fit(images, None, SMALL, tmp_path, resume=True, say=None)


def test_what_may_change_when_a_run_goes_on_holds_from_there_on(tmp_path):
    run = make_run()
    run.optimizer.param_groups[0]["lr"] = 0.123
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 4.0})
    save_state(tmp_path / "state.pt", run)
    state = read_state(tmp_path / "state.pt")
    same = make_run()
    restore(tmp_path / "state.pt", state, same)
    assert same.scaler.get_scale() == 4
    changed = replace(QUICK, momentum=0.5, weight_decay=0.1, precision="fp16")
    other = make_run(changed)
    other.optimizer = make_optimizer(other.model, CPU, lr=0.02, momentum=0.5, weight_decay=0.1)
    other.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    restore(tmp_path / "state.pt", state, other)
    assert [group["momentum"] for group in other.optimizer.param_groups] == [0.5, 0.5]
    assert [group["weight_decay"] for group in other.optimizer.param_groups] == [0.1, 0.0]
    assert other.scaler.get_scale() == 2.0**16


def test_another_order_in_memory_keeps_the_momentum_of_each_weight(tmp_path):
    run = make_run()
    for parameter in run.model.parameters():
        run.optimizer.state[parameter]["momentum_buffer"].copy_(torch.randn_like(parameter))
    save_state(tmp_path / "state.pt", run)
    other = make_run()
    other.model.to(memory_format=torch.channels_last)
    restore(tmp_path / "state.pt", read_state(tmp_path / "state.pt"), other)
    for before, after in zip(run.model.parameters(), other.model.parameters(), strict=True):
        momentum = other.optimizer.state[after]["momentum_buffer"]
        assert torch.equal(momentum, run.optimizer.state[before]["momentum_buffer"])
        assert momentum.stride() == after.stride()


def test_a_state_of_another_optimiser_is_gone_on_with(images, tmp_path):
    """That of apex has no fused, foreach and so on."""
    fit(images, None, replace(SMALL, epochs=1), tmp_path, say=None)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        for key in set(group) - {"params", "lr", "momentum", "dampening", "weight_decay", "nesterov"}:
            del group[key]
    torch.save(state, tmp_path / "state.pt")
    assert fit(images, None, SMALL, tmp_path, resume=True, say=None).finished


SAVING = """
import os, random, signal, sys, torch
from pathlib import Path
from ssd.train.state import read_state, restore, save_state
sys.path.append(sys.argv[2])
from training import make_run
torch.set_num_threads(1)  # what forks must have no other threads
def save_without_end(path, run, writer):
    for number in range(10**6):
        for parameter in run.model.parameters():
            parameter.data.fill_(number)
        run.progress.step = number
        save_state(path, run)
        os.write(writer, b".")
path, moments = Path(sys.argv[1]) / "state.pt", random.Random(1)
run, loaded = make_run(), make_run()
for _ in range(30):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_without_end(path, run, writer)
        finally:
            os._exit(1)
    os.close(writer)
    os.read(reader, 1)
    signal.sigtimedwait([], moments.uniform(0, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    restore(path, read_state(path), loaded)
    values = {v for each in loaded.model.parameters() for v in (each.min().item(), each.max().item())}
    assert values == {float(loaded.progress.step)}, values
    for leftover in path.parent.glob("state.pt.*"):
        leftover.unlink()
    print("whole")
"""


@pytest.mark.slow
def test_killed_while_saving_the_earlier_state_still_loads(tmp_path):
    """Thirty processes save without end, each killed at a random moment after its first save."""
    result = subprocess.run(
        [sys.executable, "-c", SAVING, str(tmp_path), HELPERS],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("whole") == 30


FULL = """
import resource, sys, torch
from pathlib import Path
from ssd import checkpoint
from ssd.train.state import save_state
sys.path.append(sys.argv[2])
from training import make_run
run = make_run()
model = run.model
folder = Path(sys.argv[1])
save_state(folder / "state.pt", run)
for suffix in ("safetensors", "pt"):
    checkpoint.save(folder / f"last.{suffix}", model.state_dict(), ("a", "b"))
before = {path.name: path.read_bytes() for path in folder.iterdir()}
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
for save in (
    lambda: save_state(folder / "state.pt", run),
    lambda: checkpoint.save(folder / "last.safetensors", model.state_dict(), ("a", "b")),
    lambda: checkpoint.save(folder / "last.pt", model.state_dict(), ("a", "b")),
):
    try:
        save()
    except OSError as error:
        print(error)
assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
"""


def test_a_full_disk_is_told_and_the_earlier_files_are_whole(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), HELPERS],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    for line, name in zip(lines, ("state.pt", "last.safetensors", "last.pt"), strict=True):
        assert f"No space left on the disk for {name}; the earlier one is whole" in line


def test_a_state_from_before_layouts_is_of_the_published_one(tmp_path):
    run = make_run()
    save_state(tmp_path / "state.pt", run)
    state = read_state(tmp_path / "state.pt")
    assert state["layout"] == LAYOUTS["300"].to_dict()
    del state["layout"], state["config"]["layout"], state["config"]["loss"]
    restored = make_run()
    restore(tmp_path / "state.pt", state, restored)
    other = make_run()
    other.config["layout"] = "512"
    with pytest.raises(
        checkpoint.CheckpointError, match="a run with layout 300, and goes on with it, not 512"
    ):
        restore(tmp_path / "state.pt", state, other)
