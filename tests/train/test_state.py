import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fuzz import states
from fuzz.engine import made
from training import CPU, QUICK, SMALL, make_run

from ssd import checkpoint
from ssd.boxes import LAYOUTS
from ssd.train import fit
from ssd.train.optim import make_optimizer
from ssd.train.state import read_state, restore, save_state, with_choices_of

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
    del state["layout"], state["config"]["layout"], state["config"]["loss"], state["config"]["half_size"]
    assert with_choices_of(state, replace(QUICK, half_size=0.5)).half_size == 0.5  # judged in setup.py
    config = with_choices_of(state, replace(QUICK, half_size=None))
    assert (QUICK.layout, config.layout, config.loss, config.half_size) == (None, "300", "multibox", 0.0)
    restored = make_run(config)
    restore(tmp_path / "state.pt", state, restored)
    other = make_run()
    other.config["layout"] = "512"
    with pytest.raises(
        checkpoint.CheckpointError, match="a run with layout 300, and goes on with it, not 512"
    ):
        restore(tmp_path / "state.pt", state, other)


# --- Damaged ones ---


def test_of_300_damaged_states_each_is_put_back_whole_or_changes_nothing(tmp_path):
    outcomes = Counter()
    for number in range(300):
        case = made("states", seed=1, number=number)
        (tmp_path / "state.pt").write_bytes(case["state.pt"])
        outcomes[states.promise(case, tmp_path)] += 1
    assert outcomes["refused"] > 100
    assert outcomes["restored"] > 30


def put(state, place, value):
    *above, last = place.split("/")
    for key in above:
        state = state[int(key) if key.isdigit() else key]
    state[last] = value


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("config", 5, "its config is 5"),
        ("config/precision", None, "its config/precision is None"),
        ("config/layout", torch.zeros(2), "its config is "),
        ("data/class_names", "ab", "its data/class_names is 'ab'"),
        ("progress/epoch", "1", "its progress/epoch is '1'"),
        ("progress/epoch", True, "its progress/epoch is True"),
        ("progress/batch", -1, "its progress/batch is -1"),
        ("progress/step", 10**300, r"its progress/step is 10+\.+0+"),
        ("progress/best", float("nan"), "its progress/best is nan"),
        ("progress/history", [{"epoch": "x"}], r"its progress/history is \[{'epoch': 'x'}\]"),
        ("progress/sums", [0.0] * 3, r"its progress/sums is \[0\.0, 0\.0, 0\.0\]"),
        ("progress/more", 1, "its progress is "),
        ("progress/seconds", None, "its progress is "),
        ("progress/seconds", -1.0, "its progress is "),
        ("progress/seconds", float("inf"), "its progress is "),
        ("progress/epoch", 1, "parts of its progress contradict each other"),
        ("progress/batch", 1, "parts of its progress contradict each other"),
        ("layout", {"size": 300}, "its network is of another layout, or other classes"),
        ("model", None, "its model is None"),
        ("average", {"a": 1}, "its average is {'a': 1}"),
        ("optimizer/param_groups", [], r"its optimizer is of \[\] parameters"),
        ("optimizer/param_groups", {}, "its optimizer/param_groups is {}"),
        ("optimizer/state", {"a": 1}, "its optimizer/state is {'a': 1}"),
        (
            "optimizer/state/0/momentum_buffer",
            torch.zeros(2),
            r"\(momentum\) does not fit the network: .*is \[2\]",
        ),
        ("scaler/scale", 0.0, "its scaler is {"),
        ("random", torch.zeros(5056, dtype=torch.uint8), r"its random is tensor\("),
        ("random", torch.zeros(1, dtype=torch.uint8).expand(10**12), "its random is "),
    ],
)
def test_what_is_damaged_is_told_by_its_place_and_nothing_has_changed(tmp_path, place, value, told):
    path, run = tmp_path / "state.pt", states._run()
    save_state(path, run)
    state = read_state(path)
    state["progress"] |= {"epoch": 0, "batch": 0, "history": [], "sums": [0.0] * 4}
    put(state, place, value)
    other = states._run(seed=1)
    before, random_state = states._all_of(other), torch.get_rng_state()
    with pytest.raises(checkpoint.CheckpointError, match=told) as caught:
        restore(path, state, other)
    assert str(caught.value).startswith(str(path))
    assert states._same(states._all_of(other), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    instead = f"start a new run from the weights beside it: --weights {tmp_path / 'last.safetensors'}"
    assert str(caught.value).endswith(instead)


def test_a_state_of_more_batches_than_an_epoch_has_is_damaged(images, tmp_path):
    fit(images, None, replace(SMALL, epochs=1), tmp_path, say=None)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    state["progress"] |= {"batch": 4, "sums": [1.0] * 4}
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(checkpoint.CheckpointError, match="is damaged: 4 batches of an epoch of 3 are done"):
        fit(images, None, SMALL, tmp_path, resume=True, say=None)


def test_the_network_of_a_state_is_judged_before_memory_is_taken_for_it(images, tmp_path, monkeypatch):
    fit(images, None, replace(SMALL, epochs=1), tmp_path, say=None)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    state["model"]["conf.0.weight"] = torch.zeros(6 * 10**5, 1, 1, 1)  # of 11 GB, were it whole
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(checkpoint.CheckpointError, match=r"does not fit the network: .*conf\.0\.weight is"):
        fit(images, None, SMALL, tmp_path, resume=True, say=None)
