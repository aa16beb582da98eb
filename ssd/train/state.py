"""The state of a run: what it consists of, saved whole and put back."""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssd import __version__, containers
from ssd.boxes import PUBLISHED_LAYOUT, Layout
from ssd.checkpoint import require_fit, torch_bytes
from ssd.errors import CheckpointError, as_line, shown
from ssd.files import atomic_file
from ssd.model import SSD
from ssd.train.config import TrainConfig

_LASTING = ("backbone", "weights", "backbone_weights", "head_norm", "freeze", "layout")
"""Choices that a run keeps to its end."""

_OF_OLD = {"layout": "300", "loss": "multibox", "half_size": 0.0}  # of states that do not say theirs

_MOST_FOR_WHOLE = 4  # times the time of an epoch at half the size: the pixels are so many more


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
    seconds: float = 0.0
    """That training and evaluations have taken."""
    half_epochs: int = 0
    """Finished epochs of images of half the size."""


@dataclass(frozen=True)
class Limits:
    """What a run ends by."""

    epochs: int
    minutes: float | None
    """In place of epochs, where there are any."""
    patience: int
    """Epochs without a higher AP; 0 for any number."""
    half_size: float = 0.0
    """Part of the run, at its start, in which images are of half the size."""

    def is_half(self, progress: Progress) -> bool:
        """Whether the images of the epoch under way are of half the size.

        A run that is made longer does not go back to that.
        """
        return progress.epoch <= progress.half_epochs and self.wants_half(progress)

    def wants_half(self, progress: Progress) -> bool:
        """The same, but for runs that have seen whole images."""
        if self.minutes is None:
            return progress.epoch < int(self.half_size * self.epochs)
        return progress.seconds < self.half_size * self.seconds

    def epochs_left(self, progress: Progress) -> tuple[int, int]:
        """Of all epochs those that are not done, at least and at most, in such as the one under way.

        Where that is at half the size, one at the whole takes as long if reading images is what takes time,
        and up to four times as long if the network is.

        >>> Limits(60, None, 0, half_size=0.5).epochs_left(Progress(epoch=20, half_epochs=20))
        (40, 130)
        """
        half = int(self.half_size * self.epochs) - progress.epoch if self.is_half(progress) else 0
        left = self.epochs - progress.epoch - half
        return half + left, half + left * (_MOST_FOR_WHOLE if half else 1)

    @property
    def seconds(self) -> float:
        """That the run may take."""
        return math.inf if self.minutes is None else 60 * self.minutes

    def is_last(self, epoch: int, progress: Progress) -> bool:
        """Whether an epoch, counted from 1, is the run's last, whatever its AP."""
        return progress.seconds >= self.seconds or (self.minutes is None and epoch >= self.epochs)

    def ending(self, progress: Progress) -> str:
        """Why a run is at its end, and what goes on with it; empty where it is not, or within an epoch."""
        if progress.batch:
            return ""
        if progress.seconds >= self.seconds:
            return (
                f"ended: the {self.seconds / 60:g} minutes are used up; --resume with a longer --time goes on"
            )
        if self.is_last(progress.epoch, progress):
            return f"all {self.epochs} epochs are done already; --epochs asks for more"
        reached = {epoch: row["AP"] for epoch, row in enumerate(progress.history, start=1) if "AP" in row}
        best = max(reached, key=lambda epoch: reached[epoch], default=0)  # the first of equals
        without = progress.epoch - max(best, progress.half_epochs)  # at half the size, AP says less
        # Where there is nothing to measure, AP is -1.
        is_measured = progress.epoch in reached and not self.is_half(progress)
        if is_measured and reached[best] >= 0 and without >= self.patience > 0:
            return (
                f"ended: the AP of epoch {best}, {reached[best]:.3f}, was not exceeded in {without} epochs; "
                f"a --patience above {without}, or 0, goes on"
            )
        return ""

    def numbered(self, epoch: int) -> str:
        """An epoch, counted from 1, as people read it.

        >>> Limits(60, None, 0).numbered(3), Limits(60, 30.0, 0).numbered(3)
        ('3/60', '3')
        """
        return f"{epoch}/{self.epochs}" if self.minutes is None else str(epoch)


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
        state, _ = containers.read(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"nothing to resume: there is no {path}") from None
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: not the state of a run, or damaged ({error}). {instead_of(path)}"
        ) from None
    _require_state(path, state)
    return cast("dict[str, Any]", state)


def with_choices_of(state: dict[str, Any], config: TrainConfig) -> TrainConfig:
    """The config with what the run has: its layout, if none is named, and what there was no choice of."""
    earlier = _OF_OLD | state["config"]
    first = {"loss": earlier["loss"]} if "loss" not in state["config"] else {}
    if config.half_size is None:
        first["half_size"] = earlier["half_size"]
    return replace(config, layout=config.layout or earlier["layout"], **first)


def restore(path: Path, state: dict[str, Any], run: Run) -> None:
    """Put a run where `save_state` left it; what its config changes holds from there on.

    All of the state is judged before anything of the run, or torch's random numbers, is changed.

    Raises:
        CheckpointError: the state is damaged, another network's, or of choices that do not fit.
    """
    _require_state(path, state)
    _require_same_choices(path, state, run)
    try:
        require_fit(path, state["model"], run.model.state_dict())
        if run.average:
            require_fit(f"{path} (average)", state["average"], run.average.state_dict())
        momenta = _momenta(path, state["optimizer"], run)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {instead_of(path)}") from None

    run.model.load_state_dict(state["model"])
    if run.average:
        run.average.load_state_dict(state["average"])
    # All else of the optimiser stays as it is: the state may be of apex's, or of another device.
    for parameter, momentum in momenta:
        run.optimizer.state[parameter] = {"momentum_buffer": momentum}
    if state["scaler"] and state["config"]["precision"] == run.config["precision"]:
        run.scaler.load_state_dict(state["scaler"])
    run.progress = Progress(**copy.deepcopy(state["progress"]))
    torch.set_rng_state(state["random"].contiguous())


# --- Judging ----------------------------------------------------------------------------------------------


def _require_state(path: Path, state: object) -> None:
    """Require all that is in a state to be of the kinds that `save_state` writes, whatever the run."""
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not the state of a run, but {shown(state)}")
    missing = {*(each.name for each in fields(Run)), "random"} - set(state)
    if missing:
        raise CheckpointError(f"{path}: not the state of a run; it has no {', '.join(sorted(missing))}")
    for place, is_right in _KINDS.items():
        value: Any = state
        for key in place.split("/"):
            value = value.get(key)
        if not is_right(value):
            raise CheckpointError(f"{path} is damaged: its {place} is {shown(value)}. {instead_of(path)}")
    progress, seconds = state["progress"], state["progress"]["sums"][3]
    has_seconds = seconds > 0 if progress["batch"] else seconds >= 0
    if len(progress["history"]) != progress["epoch"] or not has_seconds:
        raise CheckpointError(
            f"{path} is damaged: parts of its progress contradict each other. {instead_of(path)}"
        )


def instead_of(path: Path) -> str:
    """What to do about a damaged state, for messages."""
    return (
        "Put back an earlier copy of the file, or start a new run from the weights beside it: "
        f"--weights {path.with_name('last.safetensors')}"
    )


def _require_same_choices(path: Path, state: dict[str, Any], run: Run) -> None:
    earlier = _OF_OLD | state["config"]
    for name in _LASTING:
        before, wanted = earlier.get(name), run.config[name]
        if before != wanted:
            theirs = as_line(str(before), 60)
            raise CheckpointError(
                f"{path} is of a run with {name} {theirs}, and goes on with it, not {wanted}"
            )
    saved, now = state["data"], run.data
    names = saved["class_names"]
    if names != now["class_names"]:
        listed = ", ".join(as_line(name, 60) for name in names[:10])
        raise CheckpointError(f"{path} is of other classes: {listed}")
    if state["progress"]["batch"] and saved != now:
        changed = ", ".join(
            f"{as_line(key, 60)} {shown(saved.get(key))} (now {now.get(key)})"
            for key in saved | now
            if saved.get(key) != now.get(key)
        )
        raise CheckpointError(f"{path} is from the middle of an epoch, which has to go on with {changed}")
    if (state["average"] is None) != (run.average is None):
        raise CheckpointError(f"{path}: ema cannot be switched on or off in a run that has begun")
    if _layout_of(state) != run.model.layout or run.model.num_classes != len(names) + 1:
        raise CheckpointError(
            f"{path} is damaged: its network is of another layout, or other classes, than its choices. "
            f"{instead_of(path)}"
        )


def _layout_of(state: dict[str, Any]) -> Layout | None:
    try:
        return Layout.from_dict(state["layout"]) if "layout" in state else PUBLISHED_LAYOUT
    except (ValueError, TypeError):
        return None


def _momenta(path: Path, saved: dict[str, Any], run: Run) -> list[tuple[nn.Parameter, Tensor]]:
    """Each parameter with its momentum out of a state of the optimiser; 0 before the first step."""
    groups = run.optimizer.param_groups
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    counts = [[len(group["params"]) for group in each] for each in (saved["param_groups"], groups)]
    if (
        counts[0] != counts[1]
        or len(set(numbers)) != len(numbers)
        or not saved["state"].keys() <= set(numbers)
    ):
        raise CheckpointError(f"{path}: its optimizer is of {shown(counts[0])} parameters, not {counts[1]}")
    parameters = [each for group in groups for each in group["params"]]
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    of_each = {
        parameter: saved["state"][number]["momentum_buffer"]
        for number, parameter in zip(numbers, parameters, strict=True)
        if saved["state"].get(number, {}).get("momentum_buffer") is not None
    }
    require_fit(
        f"{path} (momentum)",
        {names[parameter]: momentum for parameter, momentum in of_each.items()},
        {names[parameter]: parameter for parameter in of_each},
    )
    momenta = []
    for parameter in parameters:
        # The fused optimiser walks through memory, so its order has to be the parameter's.
        momentum = torch.zeros_like(parameter)
        momenta.append((parameter, momentum.copy_(of_each[parameter]) if parameter in of_each else momentum))
    return momenta


_MOST = 10**12  # of anything that is counted


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < _MOST)


def _is_between(least: float, most: float) -> Callable[[object], bool]:
    return lambda value: _is_number(value) and least <= cast("float", value) <= most


def _is_whole_between(least: int, most: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _is_dict(is_key: Callable[[Any], bool], is_value: Callable[[Any], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(is_key(k) and is_value(v) for k, v in value.items())


def _is_list(is_one: Callable[[Any], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(is_one, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _is_plain(value: object) -> bool:
    """Whether it is a value that choices have; such compare with others."""
    parts = value if isinstance(value, list | tuple) else [value]
    return all(each is None or isinstance(each, str | int | float) for each in parts)


def _is_random_state(value: object) -> bool:
    now = torch.get_rng_state()
    if not isinstance(value, Tensor) or (value.dtype, value.shape) != (now.dtype, now.shape):
        return False
    try:
        torch.Generator().set_state(value.contiguous())
    except (RuntimeError, TypeError):
        return False
    return True


def _is_scaler(value: object) -> bool:
    """Whether it is the state of a scaler of gradients, or of one that is switched off."""
    return isinstance(value, dict) and (
        not value or all(is_right(value.get(name)) for name, is_right in _SCALER.items())
    )


_SCALER = {
    "scale": _is_between(1e-45, 3e38),
    "growth_factor": _is_between(1, 1e6),
    "backoff_factor": _is_between(1e-6, 1),
    "growth_interval": _is_whole_between(1, 2**31 - 1),
    "_growth_tracker": _is_whole_between(0, 2**31 - 1),
}
_is_choices = _is_dict(_is_text, _is_plain)
_is_weights = _is_dict(_is_text, _is_tensor)
_KINDS: dict[str, Callable[[Any], bool]] = {
    "config": _is_choices,
    "config/precision": _is_text,
    "data": _is_choices,
    "data/class_names": _is_list(_is_text),
    # States of earlier versions have no seconds, and no epochs at half the size.
    "progress": lambda value: (
        isinstance(value, dict)
        and value.keys() | {"seconds", "half_epochs"} == {each.name for each in fields(Progress)}
        and _is_between(0, _MOST)(value.get("seconds", 0))
        and _is_count(value.get("half_epochs", 0))
    ),
    **{f"progress/{name}": _is_count for name in ("epoch", "batch", "step", "skipped")},
    "progress/best": _is_between(-1, 1),
    "progress/history": _is_list(_is_dict(lambda key: _is_text(key) and key.isprintable(), _is_number)),
    "progress/sums": lambda value: _is_list(_is_number)(value) and len(value) == 4,
    "model": _is_weights,
    "average": lambda value: value is None or _is_weights(value),
    "optimizer": _is_dict(_is_text, lambda value: True),
    "optimizer/state": _is_dict(
        _is_count,
        lambda value: isinstance(value, dict) and isinstance(value.get("momentum_buffer"), Tensor | None),
    ),
    "optimizer/param_groups": _is_list(
        lambda value: isinstance(value, dict) and _is_list(_is_count)(value.get("params"))
    ),
    "scaler": _is_scaler,
    "random": _is_random_state,
}
"""What each part of a state has to be; a "/" leads into a dict."""
