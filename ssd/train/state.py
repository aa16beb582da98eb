"""The state of a run: what it consists of, saved whole and put back."""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ssd import __version__
from ssd.checkpoint import require_fit, torch_bytes
from ssd.errors import CheckpointError
from ssd.files import atomic_file
from ssd.model import SSD
from ssd.train.config import TrainConfig

_LASTING = ("backbone", "weights", "backbone_weights", "head_norm", "freeze", "layout")
"""Choices that a run keeps to its end."""

_OF_OLD = {"layout": "300", "loss": "multibox"}  # of states that do not say theirs


@dataclass
class Progress:
    """Where a run stands."""

    epoch: int = 0
    """Of the next batch, counted from 0."""
    batch: int = 0
    """Batches of that epoch that are done."""
    step: int = 0
    """Steps of the optimiser."""
    best: float = -1.0
    """Highest AP."""
    history: list[dict[str, float]] = field(default_factory=list)
    """A row for each finished epoch."""
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    """Of the losses of the epoch under way: loc, conf, images, seconds."""
    skipped: int = 0
    """Steps in a row, up to the last one, that were not finite."""


@dataclass
class Run:
    """All that a run consists of; what `save_state` writes."""

    model: SSD
    average: SSD | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    data: dict[str, Any]
    """What an epoch under way depends on: class names, images, and how they make batches."""
    config: dict[str, Any]
    """The choices that it was made of, by name, for the files that note them."""

    def evaluated(self) -> SSD:
        """The model that is evaluated and saved."""
        return self.average or self.model


def is_finite(model: nn.Module) -> bool:
    """Whether all weights and statistics are."""
    return all(bool(value.isfinite().all()) for value in model.state_dict().values())


def save_state(path: Path, run: Run) -> None:
    """Write everything that continuing needs, whole or not at all."""
    state = {
        "version": __version__,
        "config": run.config,
        "data": run.data,
        "progress": asdict(run.progress),
        "layout": run.model.layout.to_dict(),
        "model": run.model.state_dict(),
        "average": run.average.state_dict() if run.average else None,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "random": torch.get_rng_state(),
    }
    with atomic_file(path) as file:
        file.write(torch_bytes(state))


def read_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote; "layout" is missing from states of earlier versions.

    Raises:
        CheckpointError: the file is damaged, or something else.
        FileNotFoundError: there is none.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {each.name for each in fields(Run)} | {"random"}
        missing -= set(state)
    except FileNotFoundError:
        raise FileNotFoundError(f"nothing to resume: there is no {path}") from None
    except Exception as error:
        raise CheckpointError(f"{path}: not the state of a run, or damaged ({error})") from None
    if missing:
        raise CheckpointError(f"{path}: not the state of a run; it has no {', '.join(sorted(missing))}")
    return cast("dict[str, Any]", state)


def with_loss_of(state: dict[str, Any], config: TrainConfig) -> TrainConfig:
    """The config, with the loss that a run has which began before there was another."""
    return config if "loss" in state["config"] else replace(config, loss=_OF_OLD["loss"])


def restore(path: Path, state: dict[str, Any], run: Run) -> None:
    """Put a run where `save_state` left it; what its config changes holds from there on.

    Raises:
        CheckpointError: the state is another network's, or of choices that do not fit.
    """
    earlier = _OF_OLD | state["config"]
    for name in _LASTING:
        before, wanted = earlier.get(name), run.config[name]
        if before != wanted:
            raise CheckpointError(
                f"{path} is of a run with {name} {before}, and goes on with it, not {wanted}"
            )
    saved, now = state["data"], run.data
    if saved["class_names"] != now["class_names"]:
        raise CheckpointError(f"{path} is of other classes: {', '.join(saved['class_names'][:10])}")
    if state["progress"]["batch"] and saved != now:
        changed = ", ".join(f"{key} {saved[key]} (now {now[key]})" for key in saved if saved[key] != now[key])
        raise CheckpointError(f"{path} is from the middle of an epoch, which has to go on with {changed}")
    require_fit(path, state["model"], run.model.state_dict())
    if (state["average"] is None) != (run.average is None):
        raise CheckpointError(f"{path}: ema cannot be switched on or off in a run that has begun")
    try:
        run.model.load_state_dict(state["model"])
        if run.average:
            run.average.load_state_dict(state["average"])
        # Its options stay this optimiser's: the state may be of apex's, or of another device.
        groups = run.optimizer.param_groups
        chosen = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        run.optimizer.load_state_dict(state["optimizer"])
        for group, options in zip(run.optimizer.param_groups, chosen, strict=True):
            group.update(options)
        if earlier["precision"] == run.config["precision"]:
            run.scaler.load_state_dict(state["scaler"])
        run.progress = Progress(**state["progress"])
        torch.set_rng_state(state["random"])
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} does not fit these choices ({error})") from None
    for parameter, values in run.optimizer.state.items():
        # The fused optimiser walks through memory, so its order has to be the parameter's.
        values["momentum_buffer"] = torch.empty_like(parameter).copy_(values["momentum_buffer"])
