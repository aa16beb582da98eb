"""The state that a run goes on from: its bytes, and each value in it; of a network of a few weights."""

import copy
import io
import random
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fuzz.checkpoints import saved
from fuzz.engine import Case, some_bytes
from ssd.boxes import PUBLISHED_LAYOUT
from ssd.distributed import alone
from ssd.errors import CheckpointError
from ssd.model import SSD
from ssd.train.config import TrainConfig
from ssd.train.loop import close_epoch
from ssd.train.optim import make_optimizer
from ssd.train.state import Progress, Run, read_state, restore, save_state, with_choices_of

_FILE = "state.pt"


class _Network(nn.Sequential):
    """In place of an SSD: what a state asks of it."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.layout, self.num_classes = PUBLISHED_LAYOUT, 3


def _run(seed: int = 0) -> Run:
    """A run in the middle of its second epoch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cast("SSD", _Network())
    optimizer = make_optimizer(model, torch.device("cpu"), lr=0.1, momentum=0.9, weight_decay=0.01)
    for value in optimizer.state.values():
        value["momentum_buffer"] += 0.5
    progress = Progress(1, 2, 5, 0.25, [{"epoch": 1.0, "loss": 2.5, "AP": 0.25}], [1.5, 2.5, 4.0, 0.5], 0)
    data = {"class_names": ["cat", "cup"], "images": 8, "processes": 1, "batch_size": 2, "accumulate": 1}
    average = copy.deepcopy(model).requires_grad_(False)
    config = dict(vars(TrainConfig(precision="fp16")))
    return Run(model, average, optimizer, torch.amp.GradScaler("cpu"), progress, data, config)


@cache
def _seeds() -> list[Case]:
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_state(Path(folder, _FILE), _run())
        state = read_state(Path(folder, _FILE))
    between = copy.deepcopy(state)
    between["progress"] |= {"batch": 0, "sums": [0.0] * 4}
    old = copy.deepcopy(state)
    del old["layout"], old["config"]["layout"]
    return [{_FILE: saved(state)}, {_FILE: saved(between)}, {_FILE: saved(old, zipped=False)}]


def seeds() -> list[Case]:
    """In the middle of an epoch, between two, and of an earlier version."""
    return [dict(case) for case in _seeds()]


def mutate(rng: random.Random, case: Case) -> Case:
    """Other bytes, or other values in it."""
    if rng.random() < 0.2:
        return {_FILE: some_bytes(rng, case[_FILE])}
    state = torch.load(io.BytesIO(case[_FILE]), weights_only=True)
    for _ in range(rng.choice((1, 1, 1, 2))):
        state = _other(rng, state)
    return {_FILE: saved(state, zipped=rng.random() < 0.8)}


def promise(case: Case, folder: Path) -> str:
    """A state is put back whole, and the run goes on; or it is refused in a line, and nothing has changed."""
    path = folder / _FILE
    run = _run(seed=1)
    before, random_state = _all_of(run), torch.get_rng_state()
    try:
        state = read_state(path)
        restore(path, state, run)
    except CheckpointError as error:
        told = str(error)
        assert told.startswith(str(path)), told
        assert told.isprintable(), told
        assert len(told) < 1000, told
        assert _same(_all_of(run), before)
        assert torch.equal(torch.get_rng_state(), random_state)
        return "refused"
    assert _same(dict(run.model.state_dict()), dict(state["model"]))
    assert torch.equal(
        torch.get_rng_state(), torch.Generator().set_state(state["random"].contiguous()).get_state()
    )
    _go_on(run)
    save_state(path, run)
    return "restored"


def _go_on(run: Run) -> None:
    """A step, the end of the epoch, and its row as text: what training does with the values."""
    run.scaler.scale(run.model(torch.ones(2, 3, 4, 4)).square().mean()).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.progress.sums[3] += 1.0
    close_epoch(run, lambda step, seconds: 1 / (step + 2), alone(torch.device("cpu")))
    assert [f"{value:.6g}" for row in run.progress.history for value in row.values()]
    "".join(key for row in run.progress.history for key in row).encode()
    with_choices_of({"config": run.config}, TrainConfig())


def _all_of(run: Run) -> dict[str, Any]:
    momenta = [value["momentum_buffer"] for value in run.optimizer.state.values()]
    options = [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]
    weights = [run.model.state_dict(), run.average.state_dict() if run.average else None]
    return copy.deepcopy(
        {
            "weights": weights,
            "momenta": momenta,
            "options": options,
            "scaler": run.scaler.state_dict(),
            "progress": vars(run.progress),
        }
    )


def _same(a: Any, b: Any) -> bool:
    """Whether two values are equal to the bit; a NaN is like another."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b.to(a.dtype))
    return repr(a) == repr(b)


# --- Other values -----------------------------------------------------------------------------------------

_ODD = (
    *(None, True, 0, 1, -1, 2, 3, 2**31, 2**62, 10**500, 0.0, -0.5, 1e300, float("nan"), float("inf")),
    *("", "text", "a\x1b[2J\nb", "\ud800", "é" * 50_000, [], {}, (), [[]], {"a": {}}, {0: 1}, [0.5] * 4),
)


def _other(rng: random.Random, state: Any) -> Any:
    """The state with one of its values, or of the names in it, otherwise."""
    places = [
        (state, key, value) for state, key, value in _places(state) if rng.random() < 0.5 or key != "random"
    ]
    if not places or rng.random() < 0.02:
        return rng.choice((*_ODD, [state]))
    # By the kind of place: there are more tensors than all else.
    kinds = sorted({type(value).__name__ for *_, value in places})
    kind = rng.choice(kinds)
    holder, key, value = rng.choice([place for place in places if type(place[2]).__name__ == kind])
    way = rng.randrange(6)
    if way == 0:
        del holder[key]
    elif way == 1 and isinstance(holder, dict):
        holder[rng.choice(("a\x1b[2J\nb", "\ud800", "x" * 9999, 0, None, "update", "params"))] = value
    elif way == 2:
        holder[key] = copy.deepcopy(rng.choice(places)[2])
    elif isinstance(value, Tensor):
        holder[key] = _other_tensor(rng, value)
    else:
        holder[key] = copy.deepcopy(rng.choice(_ODD))
    return state


def _places(value: Any) -> list[tuple[Any, Any, Any]]:
    """Each dict or list with a key in it, and the value there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, each in items for place in [(value, key, each), *_places(each)]]


def _other_tensor(rng: random.Random, value: Tensor) -> Tensor:
    if not value.numel():
        return torch.zeros(3)
    ways: tuple[Callable[[], Tensor], ...] = (
        lambda: value.flatten()[:-1].clone(),
        lambda: value[None].clone(),
        lambda: value.double() * rng.choice((1, 1e300, float("nan"))),
        lambda: value.to(rng.choice((torch.int8, torch.int64, torch.complex64, torch.bool, torch.float16))),
        lambda: value.flatten()[:1].expand(value.shape if value.ndim else (10**9,)),
        lambda: torch.zeros(rng.choice(([0], [4 * 10**10, 0], [1] * 60))),
        lambda: torch.empty(value.shape, device="meta"),
        lambda: value.flatten().clone().fill_(255) if value.dtype == torch.uint8 else value * 0 - 1,
        lambda: torch.stack([value, value], -1)[..., 0],  # every other value in memory
    )
    return rng.choice(ways)()
