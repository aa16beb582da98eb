"""From a config to ready objects: no other module of training reads the config's values."""

import copy
import os
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from ssd import checkpoint
from ssd.boxes import FITTED, LAYOUTS, PUBLISHED_LAYOUT, Layout, match
from ssd.choices import Precision
from ssd.data import (
    Annotations,
    DetectionDataset,
    annotations_of,
    listed,
    require_boxes,
    require_items,
    usable_for_evaluation,
)
from ssd.data.dataset import parts_of
from ssd.data.judge import notes_of
from ssd.devices import DTYPES, choose_precision, native_precisions
from ssd.distributed import World
from ssd.errors import AnnotationError, CheckpointError
from ssd.images import lacks_memory
from ssd.loss import LOSSES, Losses
from ssd.model import SSD, build, transfer
from ssd.tiles import in_tiles
from ssd.train.config import TrainConfig
from ssd.train.examples import EpochBatches, Examples, Loader, loading
from ssd.train.optim import freeze, learning_rate, make_optimizer
from ssd.train.state import Limits, Progress, Run, instead_of, read_state, restore, with_choices_of

_WITHOUT_VAL = (
    "there is no val split: nothing will be evaluated, and there will be no best weights, only the last. "
    "Make one, name one with --val, or hold images out with --val-fraction 0.2 (in Python, val=... of fit, "
    "and ssd.data.holdout.hold_out)"
)

_OWN_MEMORY = ("cuda",)  # types of devices that cannot swap: what does not fit is an error

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Normalised images ``[N, 3, size, size]`` to raw loc and conf, as `ssd.model.SSD`."""

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Losses]
"""Called as `ssd.loss.MultiBoxLoss`."""

Rate = Callable[[int, float], float]
"""The learning rate of a step, counted from 0, after some seconds of the run."""

Assign = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Boxes ``[N, M, 4]`` and labels ``[N, M]``, padded, to those of each default box, as `ssd.boxes.match`."""


@dataclass(frozen=True)
class Stage:
    """What images of one size are trained with."""

    size: int
    """Their width and height."""
    forward: Forward
    """The model, compiled or spread over processes where that was chosen."""
    loss: Loss
    assign: Assign


@dataclass(frozen=True)
class Setup:
    """All that training consists of, ready to go on."""

    run: Run
    introduction: tuple[str, ...]
    """What is told at the start: where weights come from, data, choices."""
    class_names: tuple[str, ...]
    category_ids: list[int]
    """The dataset's own id of each class, or none."""
    val: Annotations | Dataset[Any] | None
    """To evaluate on."""
    limits: Limits
    evaluate_every: int
    tiles: int | None
    """Side of those in which images are seen, in their pixels; None for whole images."""
    batches: EpochBatches
    loading: Callable[[], AbstractContextManager[Loader]]
    """What makes the loader of these."""
    stage: Callable[[bool], Stage]
    """That of images of half the size, or of the whole."""
    rate: Rate
    batch_size: int
    accumulate: int
    """Batches of a step."""
    precision: Precision
    memory_format: torch.memory_format
    """Of the images."""
    clip: float
    """Largest norm of all gradients; 0 for no limit."""
    decay: float
    """Of the moving average of the weights."""
    frozen: int
    """Stages of the trunk that stay as they are."""


def set_up(
    train: Dataset[Any],
    val: Annotations | Dataset[Any] | None,
    config: TrainConfig,
    state_file: Path,
    world: World,
    *,
    class_names: Sequence[str] | None,
    category_ids: Sequence[int] | None,
    resume: bool,
) -> Setup:
    """A run at its start, or where its state file left it; see `ssd.train.fit`."""
    require_items(train, "to train on")
    names, ids = classes_of(train, class_names, category_ids)
    val = usable_val(val, names)
    config = settle(config, world.device)
    _require_same_crowd(train, crowd=config.crowd)
    if (annotations := annotations_of(train)) is not None:
        require_boxes(annotations, crowd=config.crowd)
    batches = plan(len(train), config, world)  # type: ignore[arg-type]
    torch.manual_seed(config.seed)

    state = read_state(state_file) if resume else None
    if state:
        config = with_choices_of(state, config)
    else:
        require_free(state_file)
    run, origin = _begin(train, names, config, state_file, world, state)
    if config.patience and val is None:
        raise ValueError(f"patience {config.patience} needs images to evaluate on: a val split, or others")
    if run.progress.batch > len(batches):
        raise CheckpointError(
            f"{state_file} is damaged: {run.progress.batch} batches of an epoch of {len(batches)} are done. "
            f"{instead_of(state_file)}"
        )
    if not run.progress.batch:  # an epoch that begins may have other steps than those before it
        run.progress.step = run.progress.epoch * batches.steps
    config = replace(config, half_size=half_size_of(config, run.model.layout))
    run.config["half_size"] = config.half_size
    make_loss = loss_of(config, train, len(names), world.device)
    limits = Limits(config.epochs, config.time, config.patience, config.half_size or 0.0)
    is_half = limits.is_half(run.progress)
    if state and limits.wants_half(run.progress) and not is_half:
        _require_earlier_half_size(state, config)
    # A compiled network needs another amount, which only compiling would tell.
    if is_half and world.device.type in _OWN_MEMORY and not config.compile:
        require_memory(run.model, config, world.device)

    @lru_cache(maxsize=1)  # a run changes from one to the other once
    def stage(half: bool) -> Stage:
        return _stage(run.model.at_half_size() if half else run.model, config, make_loss, world)

    assert config.precision != "auto"
    return Setup(
        run=run,
        introduction=(origin, _describe(config, train, val, batches, world, run.progress, limits)),
        class_names=names,
        category_ids=ids,
        val=val,
        limits=limits,
        evaluate_every=config.evaluate_every,
        tiles=config.tiles,
        batches=batches,
        loading=partial(
            loading,
            Examples(train, len(names) + 1, config.augmentation, config.seed, config.tiles),
            batches,
            workers=config.workers or 0,
            pin_memory=world.device.type == "cuda",
        ),
        stage=stage,
        rate=rate_of(config, batches.steps * config.epochs, batches.images_per_step),
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        precision=config.precision,
        memory_format=torch.channels_last if config.channels_last else torch.contiguous_format,
        clip=config.clip,
        decay=config.ema,
        frozen=config.freeze,
    )


# --- Data -------------------------------------------------------------------------------------------------


def classes_of(
    train: Dataset[Any], class_names: Sequence[str] | None, category_ids: Sequence[int] | None
) -> tuple[tuple[str, ...], list[int]]:
    """Class names and category ids, the dataset's own where none are given.

    Raises:
        ValueError: there are no class names, or a dataset of ours has others.
    """
    annotations = annotations_of(train)
    names = class_names or getattr(train if annotations is None else annotations, "class_names", None)
    if not names:
        raise ValueError("pass class_names=..., one for each class but the background: the dataset has none")
    for part in parts_of(train):
        if isinstance(part, DetectionDataset) and part.class_names != tuple(names):
            raise ValueError(
                f"{part.annotations.source}: its classes are {_some(part.class_names)}, but those of "
                f"training are {_some(names)}; leave class_names out, or load each dataset with "
                "load(..., class_names=[...]) of these, in this order"
            )
    if annotations is not None:
        category_ids = category_ids or annotations.category_ids
    return tuple(names), [int(each) for each in category_ids or ()]


def _annotations_of_parts(train: Dataset[Any]) -> list[Annotations | None]:
    if isinstance(train, ConcatDataset):
        return [each for part in train.datasets for each in _annotations_of_parts(part)]
    return [annotations_of(train)]


def loss_of(
    config: TrainConfig, train: Dataset[Any], classes: int, device: torch.device
) -> Callable[[Tensor], Loss]:
    """What makes the loss of default boxes, with the weights of classes where there are any.

    Raises:
        ValueError: the boxes of each class cannot be counted; see `boxes_of_classes`.
    """
    loss = LOSSES[config.loss]
    if config.class_weights == "none":
        return loss
    weights = balanced_weights(boxes_of_classes(train, classes, crowd=config.crowd))
    return partial(loss, class_weights=weights.to(device))


def boxes_of_classes(train: Dataset[Any], classes: int, *, crowd: bool) -> npt.NDArray[np.int64]:
    """How many boxes of each class there are to train on: int64 ``[classes]``.

    Raises:
        ValueError: a dataset has no annotations to count without reading its images.
    """
    total = np.zeros(classes, np.int64)
    for annotations in _annotations_of_parts(train):
        if annotations is None:
            raise ValueError(
                "class_weights balanced counts the boxes of each class, for which it needs a "
                "ssd.data.DetectionDataset, or parts of such; leave class_weights out"
            )
        labels = annotations.labels[annotations.trained_on(crowd=crowd)]
        total += np.bincount(labels, minlength=classes + 1)[1:]
    return total


def balanced_weights(boxes: npt.NDArray[np.int64]) -> Tensor:
    """Weights of the classes in the loss: float32 ``[classes + 1]``, 1 for the background.

    Of a class with n boxes 1 / sqrt(n), as labels are sampled in Mahajan et al., "Exploring the Limits of
    Weakly Supervised Pretraining" (2018); scaled so that the mean box has 1, which keeps the balance
    of positives and negatives, and at most 10, since a few boxes would shake all weights. A class without
    boxes has 1.

    >>> balanced_weights(np.array([100, 4, 0]))
    tensor([1.0000, 0.8667, 4.3333, 1.0000])
    """
    known = boxes > 0
    weights = np.ones(len(boxes) + 1)
    rarity = boxes[known] ** -0.5
    weights[1:][known] = np.minimum(rarity * boxes.sum() / (boxes[known] * rarity).sum(), 10)
    return torch.from_numpy(weights).float()


def _some(names: Sequence[str]) -> str:
    """The names of classes, for messages."""
    return ", ".join(names[:10]) + (f", ... ({len(names)})" if len(names) > 10 else "")


def usable_val(
    val: Annotations | Dataset[Any] | None, names: tuple[str, ...]
) -> Annotations | Dataset[Any] | None:
    """What to evaluate on; that it cannot be used should not show after hours of training.

    Raises:
        AnnotationError: it is empty, of other classes, or cannot be used.
    """
    if val is None:
        return None
    for part in parts_of(val):
        theirs = annotations_of(part)
        if theirs is not None and theirs.class_names != names:
            raise AnnotationError(
                f"{theirs.source}: its classes are not those of training; read it with class_names=..."
            )
    if isinstance(val, Annotations):
        return usable_for_evaluation(val)
    # A dataset of ours has been judged when it was made, by its own leniency.
    require_items(val, "to evaluate on")
    annotations = annotations_of(val)
    return val if annotations is None else annotations


def _require_same_crowd(train: Dataset[Any], *, crowd: bool) -> None:
    """Require that a dataset of ours, which holds crowd boxes or not, is what the config says."""
    for part in parts_of(train):
        if isinstance(part, DetectionDataset) and part.annotations.crowd.any() and part.crowd != crowd:
            raise ValueError(
                f"the config says crowd={crowd}, but the DetectionDataset was made with "
                f"crowd={part.crowd}; make both the same"
            )


def plan(images: int, config: TrainConfig, world: World) -> EpochBatches:
    """The batches of this process.

    Raises:
        ValueError: the images are too few for a step.
    """
    batches = EpochBatches(
        images, batch_size=config.batch_size, accumulate=config.accumulate, seed=config.seed, world=world
    )
    if batches.steps == 0:
        parts = [f"batch_size {config.batch_size}"]
        parts += [f"accumulate {config.accumulate}"] if config.accumulate > 1 else []
        parts += [f"{world.size} processes"] if world.size > 1 else []
        raise ValueError(
            f"{images} images are too few for a step of {' x '.join(parts)}; use a smaller batch_size "
            "(at least 2, for BatchNorm), or add images"
        )
    return batches


# --- Choices ----------------------------------------------------------------------------------------------


def settle(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The config with everything automatic decided for a device.

    Raises:
        ValueError: something cannot be done on the device, or no layout or loss has the name.
    """
    if config.layout not in (None, *LAYOUTS, *FITTED):
        raise ValueError(f"layout {config.layout!r} is none of {', '.join([*LAYOUTS, *FITTED])}")
    if config.loss not in LOSSES:
        raise ValueError(f"loss {config.loss!r} is none of {', '.join(LOSSES)}")
    if config.sync_batchnorm and device.type != "cuda":
        raise ValueError("sync_batchnorm works on CUDA only; torch has none for the CPU")
    workers = config.workers
    if workers is None:
        workers = min(8, max(1, (os.cpu_count() or 1) // 2))
    precision = choose_precision(config.precision, device)
    layout = config.layout or (None if config.weights else "300")
    return replace(config, precision=precision, workers=workers, lr=config.peak_lr(), layout=layout)


def half_size_of(config: TrainConfig, layout: Layout) -> float:
    """The part of the run in which images are of half the size.

    Raises:
        ValueError: one is asked for, but the layout has no half.
    """
    if config.half_size and layout.halved() is None:
        raise ValueError(
            f"half_size {config.half_size}: a network of {layout.size} pixels and {len(layout.maps)} maps "
            "has no half; leave half_size out"
        )
    if config.half_size is not None:
        return config.half_size
    return 0.0 if config.weights or layout.halved() is None else 0.5


def _require_earlier_half_size(state: dict[str, Any], config: TrainConfig) -> None:
    if config.half_size != state["config"].get("half_size", 0.0):
        raise ValueError(
            f"half_size {config.half_size}: the run sees whole images already, and does not go back to those "
            "of half the size; leave half_size out"
        )


def rate_of(config: TrainConfig, total: int, images_per_step: int) -> Rate:
    """The learning rate of each step; of `total` steps, unless the run has a time."""
    choices: dict[str, Any] = {"peak": config.peak_lr() * images_per_step / 32}
    choices |= {"schedule": config.schedule, "milestones": config.milestones}

    def by_steps(step: int, seconds: float = 0.0) -> float:
        warmup = min(config.warmup, total // 10)
        return learning_rate(step, total, rise=(step + 1) / warmup if step < warmup else 1.0, **choices)

    def by_time(step: int, seconds: float) -> float:
        rise = max((step + 1) / max(config.warmup, 1), 10 * seconds / whole)
        return learning_rate(seconds, whole, rise=min(rise, 1.0), **choices)

    whole = 60 * (config.time or 0)
    return by_time if config.time else by_steps


# --- The network ------------------------------------------------------------------------------------------


def layout_of(
    name: str | None, train: Dataset[Any], *, crowd: bool = False, tiles: int | None = None
) -> Layout | None:
    """The layout of a name, fitted to the boxes to train on where it says so; None where nothing is named.

    Args:
        name: of `LAYOUTS` or `FITTED`.
        train: the images to train on.
        crowd: whether crowd boxes are trained on.
        tiles: side of the tiles in which images are seen.

    Raises:
        ValueError: the boxes are not known without reading the images, or there are none.
    """
    if name not in FITTED:
        return LAYOUTS[name] if name else None
    known = _annotations_of_parts(train)
    parts = [each.normalised_boxes(crowd=crowd) for each in known if each is not None]
    if None in known or not sum(len(boxes) for boxes, _ in parts):
        raise ValueError(
            f"layout {name} is fitted to boxes that are known, with the sizes of their images, before these "
            f"are read, as those of a ssd.data.DetectionDataset; there are none: choose layout {FITTED[name]}"
        )
    boxes, sizes = (torch.from_numpy(np.concatenate(each)) for each in zip(*parts, strict=True))
    return LAYOUTS[FITTED[name]].fitted(boxes if tiles is None else in_tiles(boxes, sizes, tiles))


def _name_of(layout: Layout) -> str | None:
    return next((name for name, known in LAYOUTS.items() if known == layout), None)


def new_network(config: TrainConfig, class_names: tuple[str, ...], layout: Layout | None) -> tuple[SSD, str]:
    """The network of a config, and a line that says where its weights come from.

    Args:
        config: its backbone, heads and weights.
        class_names: without the background.
        layout: of the network; None for that of the weights, or the published one without such.

    Raises:
        ValueError: the weights are of another backbone.
        CheckpointError, DownloadError, FileNotFoundError: they cannot be had.
    """
    if config.weights:
        return transfer(config.weights, class_names, backbone=config.backbone, layout=layout)
    layout = layout or PUBLISHED_LAYOUT
    backbone = config.backbone or "resnet50"
    try:
        model = SSD(len(class_names) + 1, backbone, config.head_norm, config.backbone_weights, layout)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise AnnotationError(
            f"there is not enough memory for a network of {len(class_names):,} classes; join some of them"
        ) from error
    origin = f"trunk from {config.backbone_weights}, the rest" if config.backbone_weights else "all weights"
    classes = _counted(len(class_names), "class", "classes")
    return model, f"SSD{layout.size} {backbone}, {classes}; {origin} from random values"


def saved_network(path: Path, state: dict[str, Any]) -> tuple[SSD, str]:
    """The network of a saved state; what it started from need not be there any more.

    Raises:
        CheckpointError: the state is of no such network.
    """
    try:
        found = checkpoint.describe(path, state["model"], {"layout": state.get("layout")})
        with torch.device("meta"):  # before the memory is taken
            checkpoint.require_fit(path, found.state_dict, build(found).state_dict())
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {instead_of(path)}") from None
    classes = _counted(found.num_classes - 1, "class", "classes")
    return build(found), f"SSD{found.layout.size} {found.backbone}, {classes}; all of it from {path}"


def require_free(file: Path) -> None:
    """Require that a new run does not take the place of another.

    Raises:
        FileExistsError: there is a state at `file`.
    """
    if file.exists():
        raise FileExistsError(f"{file.parent} holds a run already; resume it, or choose another folder")


def _begin(
    train: Dataset[Any],
    names: tuple[str, ...],
    config: TrainConfig,
    file: Path,
    world: World,
    state: dict[str, Any] | None,
) -> tuple[Run, str]:
    """A run at its start, or where its state file left it; and a line on where its weights come from."""
    if state:
        model, origin = saved_network(file, state)
    else:
        layout = layout_of(config.layout, train, crowd=config.crowd, tiles=config.tiles)
        model, origin = new_network(config, names, world.gather(layout)[0])  # one for all, to the bit
        config = replace(config, layout=config.layout or _name_of(model.layout))
    run = _start(model.to(world.device), config, world, names, len(train))  # type: ignore[arg-type]
    if state:
        restore(file, state, run)
    return run, origin


def _start(model: SSD, config: TrainConfig, world: World, names: tuple[str, ...], images: int) -> Run:
    if config.sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    freeze(model, config.freeze)
    average = copy.deepcopy(model).requires_grad_(False).eval() if config.ema else None
    optimizer = make_optimizer(
        model,
        world.device,
        lr=config.peak_lr(),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    # Also without fp16, with a scale of 1: it leaves out steps that are not finite, on the device.
    scale = 2.0**16 if config.precision == "fp16" else 1.0
    scaler = torch.amp.GradScaler(world.device.type, init_scale=scale)
    data = {"class_names": list(names), "images": images, "processes": world.size}
    data |= {"batch_size": config.batch_size, "accumulate": config.accumulate, "seed": config.seed}
    return Run(model, average, optimizer, scaler, Progress(), data, asdict(config))


def require_memory(model: SSD, config: TrainConfig, device: torch.device) -> None:
    """Require that a step on whole images fits a device's memory, by one of a copy of the network.

    Else a run that begins with images of half the size would fail where whole ones begin.

    Raises:
        ValueError: it does not.
    """
    try:
        _step_of_a_copy(model, config, device)
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        raise ValueError(
            f"batch_size {config.batch_size}: {device} has too little memory for a step on images of "
            f"{model.layout.size} pixels, which follow those of half the size; use a smaller batch_size, "
            "and accumulate for as many images in a step"
        ) from error
    if device.type == "cuda":
        torch.cuda.empty_cache()  # blocks of other sizes than the first half needs


def _step_of_a_copy(model: SSD, config: TrainConfig, device: torch.device) -> None:
    assert config.precision != "auto"
    tried, size, dtype = copy.deepcopy(model).train(), model.layout.size, DTYPES[config.precision]
    freeze(tried, config.freeze)
    images = torch.zeros(config.batch_size, 3, size, size, device=device)
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loc, conf = tried(images)
    (loc.float().sum() + conf.float().sum()).backward()


def _stage(model: SSD, config: TrainConfig, make_loss: Callable[[Tensor], Loss], world: World) -> Stage:
    default_boxes = model.layout.default_boxes().to(world.device)
    return Stage(
        model.layout.size,
        _wrap(model, world, compiled=config.compile),
        make_loss(default_boxes),
        partial(match, default_boxes=default_boxes, iou_threshold=config.iou_threshold),
    )


def _wrap(model: SSD, world: World, *, compiled: bool) -> Forward:
    forward: Any = model
    if world.size > 1:
        ids = [world.device.index] if world.device.type == "cuda" else None
        forward = nn.parallel.DistributedDataParallel(forward, device_ids=ids, gradient_as_bucket_view=True)
    # A stage has one shape; by itself, torch would compile the second for any.
    return torch.compile(forward, dynamic=False) if compiled else forward


def _files_of(annotations: Annotations) -> set[str]:
    """The images' paths, with links to folders resolved."""
    names = [os.path.split(name) for name in annotations.file_names.tolist()]
    folders = {below: os.path.realpath(annotations.root / below) for below, _ in set(names)}
    return {os.path.normcase(os.path.join(folders[below], name)) for below, name in names}


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _describe(
    config: TrainConfig,
    train: Dataset[Any],
    val: Annotations | Dataset[Any] | None,
    batches: EpochBatches,
    world: World,
    progress: Progress,
    limits: Limits,
) -> str:
    used = batches.steps * batches.images_per_step
    images = len(train)  # type: ignore[arg-type]
    steps, seen = _counted(batches.steps, "step", "steps"), _counted(images, "image", "images")
    lines = [f"{seen}, {steps} an epoch, {world.size} x {world.device}"]
    if used < images:
        out = "1 image sits" if images - used == 1 else f"{images - used} images sit"
        lines[0] += f"; {out} out each epoch, by chance, to fill all batches"
    annotations = annotations_of(train)
    if annotations is not None:
        if annotations.left_out:
            lines.append(f"left out of training ({listed(annotations.left_out)})")
        lines += [f"train: {line}" for line in notes_of(annotations, "training", crowd=config.crowd)]
    if val is None:
        lines.append(_WITHOUT_VAL)
    elif isinstance(val, Annotations):
        lines += [f"val: {line}" for line in notes_of(val, "evaluation")]
        if annotations is not None and (both := len(_files_of(annotations) & (files := _files_of(val)))):
            lines.append(
                f"val: {both} of its {len(files)} images are trained on, too; its numbers say little"
            )
    if config.precision not in native_precisions(world.device):
        lines.append(f"{world.device} has no instructions for {config.precision}; fp32 is many times as fast")
    lines.append(textwrap.fill("  ".join(f"{name}={value}" for name, value in asdict(config).items()), 110))
    if ending := limits.ending(progress):
        lines.append(ending)
    elif progress.step:
        lines.append(f"going on at epoch {progress.epoch + 1}, batch {progress.batch + 1}")
    return "\n".join(lines)
