"""Training: one config, one loop, a run folder from which everything can be continued."""

import contextlib
import copy
import csv
import ctypes
import datetime
import io
import json
import math
import os
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from tqdm import tqdm

from ssd import __version__, checkpoint
from ssd.backends import choose_precision, of_model
from ssd.boxes import default_boxes, match
from ssd.checkpoint import CheckpointError, atomic_file, is_watched
from ssd.data import (
    AnnotationError,
    Annotations,
    DetectionDataset,
    annotations_of,
    as_targets,
    listed,
    require_boxes,
    usable_for_evaluation,
)
from ssd.detector import Detector
from ssd.distributed import World, alone, usable_device
from ssd.evaluate import Evaluation, evaluate
from ssd.images import ImageError, load_image
from ssd.loss import MultiBoxLoss
from ssd.model import DTYPES, SSD300, Backbone, native_precisions, transfer
from ssd.postprocess import NonFiniteError
from ssd.transforms import RECIPES, augment, normalize

MAX_SKIPPED = 10
"""After so many steps in a row with a loss that is not finite, training gives up."""

Say = Callable[[str], object]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h

_LINE_SECONDS = 60  # between lines of progress where there is no bar
_CHECK_EVERY = 10  # steps between looks at the device's numbers, each of which waits for it
_MIN_SCALE = 2.0**-10  # of the loss in fp16; below this everything has overflowed for long


@dataclass(frozen=True)
class TrainConfig:
    """All choices of a training run; it is saved with every checkpoint.

    Raises:
        ValueError: a value is out of range; the message names the field.
    """

    epochs: int = 60
    """Times that every image is seen."""
    batch_size: int = 8
    """Images in the network at a time, in each process; at least 2, for BatchNorm."""
    accumulate: int = 1
    """Batches whose gradients make one step of the optimiser."""
    lr: float | None = None
    """Highest learning rate, for 32 images a step; it is scaled to the images of a step. By default
    0.08, and a tenth of that where `weights` are given."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 5e-4
    """Of SGD, except on biases and norms."""
    warmup: int = 300
    """Iterations in which the learning rate rises linearly; at most a tenth of all."""
    schedule: Literal["cosine", "multistep"] = "cosine"
    """How the learning rate falls: to 0 along a cosine, or to a tenth at each of `milestones`."""
    milestones: tuple[float, ...] = (43 / 65, 54 / 65)
    """Parts of the whole run; for multistep."""
    augmentation: str = "default"
    """A recipe of `ssd.transforms.RECIPES`."""
    ema: float = 0.999
    """Decay of the moving average of the weights that is evaluated and saved; 0 for none."""
    clip: float = 0.0
    """Largest norm of all gradients; 0 for no limit."""
    iou_threshold: float = 0.5
    """At which a default box takes a ground truth."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Of the network; auto is bf16 where the device computes it natively, else fp32."""
    backbone: Backbone | None = None
    """By default that of `weights`, or resnet50."""
    weights: str | None = None
    """Starting point: "coco", a path or a URL. Class heads are kept if the classes are the same."""
    backbone_weights: str | None = None
    """Starting point of the trunk alone: "imagenet", a name of torchvision's, or a file."""
    head_norm: bool = True
    """BatchNorm in the heads, where `weights` does not decide it."""
    freeze: int = 0
    """Stages of the trunk that stay as they are: 1 is the stem, 2 to 4 are layer1 to layer3."""
    sync_batchnorm: bool = False
    """BatchNorm over all processes; CUDA only."""
    channels_last: bool = True
    """Memory layout of the network."""
    compile: bool = False
    """Run the network through torch.compile."""
    crowd: bool = False
    """Train on crowd boxes too, as NVIDIA's code does; a `DetectionDataset` is to be made likewise."""
    workers: int | None = None
    """Processes that read and augment images; by default half of the cores, at most 8."""
    evaluate_every: int = 5
    """Epochs between evaluations; the last epoch is always evaluated."""
    seed: int = 0
    """Of weights, order and augmentation."""

    def __post_init__(self) -> None:
        least: dict[str, float] = {"epochs": 1, "batch_size": 2, "accumulate": 1, "evaluate_every": 1}
        least |= dict.fromkeys(("momentum", "weight_decay", "warmup", "ema", "clip", "freeze", "seed"), 0)
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be at least {low}; got {getattr(self, name)}")
        if self.lr is not None and not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr must be above 0; got {self.lr}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers must be at least 0; got {self.workers}")
        if self.ema >= 1 or self.momentum >= 1:
            raise ValueError("ema and momentum must be below 1")
        if self.freeze > 4:
            raise ValueError(f"freeze is at most 4, the whole trunk; got {self.freeze}")
        if not 0 <= self.iou_threshold <= 1:
            raise ValueError(f"iou_threshold must be in [0, 1]; got {self.iou_threshold}")
        if not all(0 < each < 1 for each in self.milestones):
            raise ValueError(f"milestones are parts of the run, between 0 and 1; got {self.milestones}")
        choices: dict[str, Sequence[str]] = {
            "augmentation": list(RECIPES),
            "schedule": ("cosine", "multistep"),
        }
        choices["precision"] = ("auto", *DTYPES)
        if self.backbone is not None:
            choices["backbone"] = get_args(Backbone)
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(known)}")

    def images_per_step(self, world: World) -> int:
        """Images, of all processes, that a step of the optimiser sees."""
        return self.batch_size * self.accumulate * world.size

    def peak_lr(self) -> float:
        """The highest learning rate for 32 images a step."""
        return self.lr if self.lr is not None else 0.008 if self.weights else 0.08


PRESETS = {
    "default": TrainConfig(),
    # NVIDIA DeepLearningExamples, SSD300 v1.1: `main.py`'s defaults and the 65 epochs of its README.
    "published": TrainConfig(
        epochs=65,
        lr=2.6e-3,
        schedule="multistep",
        augmentation="published",
        ema=0.0,
        head_norm=False,
        crowd=True,
    ),
}
"""Configurations by name; ``dataclasses.replace(PRESETS["published"], epochs=20)`` changes one."""


# --- Examples ---------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What the loader gives: examples of one step."""

    images: Tensor
    """uint8 ``[N, 300, 300, 3]``."""
    boxes: Tensor
    """float32 xyxy, normalised, ``[N, M, 4]``, padded."""
    labels: Tensor
    """int64 ``[N, M]``; 0 is padding."""
    indices: Tensor
    """int64 ``[N]``: places in the dataset."""

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory (called by DataLoader)."""
        return Batch(*(values.pin_memory() for values in self))


Example = tuple[Tensor, Tensor, Tensor, int]
"""Image, boxes and labels as in `Batch`, and the place in the dataset."""


class Examples(Dataset[Example | Exception]):
    """Augmented examples of a dataset, by (epoch, index): the same ones in any process, in any order.

    An item that cannot be used is given as its exception: raised in a worker, it would come with the worker's
    traceback for a message.

    Args:
        dataset: gives an image and its "boxes" and "labels"; see `ssd.data.DetectionDataset`.
        num_classes: with the background.
        recipe: a name in `ssd.transforms.RECIPES`.
        seed: of the augmentation.
    """

    def __init__(self, dataset: Dataset[Any], num_classes: int, recipe: str, seed: int) -> None:
        self.dataset, self.num_classes, self.recipe, self.seed = dataset, num_classes, recipe, seed

    def __getitem__(self, key: tuple[int, int]) -> Example | Exception:
        try:
            return self._example(*key)
        except (ImageError, AnnotationError, OSError) as error:
            return error

    def _example(self, epoch: int, index: int) -> Example:
        name = item_name(self.dataset, index)
        source, target = self.dataset[index]
        boxes, labels = as_targets(target, name)
        if len(labels) and labels.max() >= self.num_classes:
            raise AnnotationError(
                f"{name}: label {labels.max()}, but there are {self.num_classes - 1} classes"
            )
        rng = np.random.default_rng((self.seed, epoch, index))
        image, boxes, labels = augment(load_image(source, name=name), boxes, labels, self.recipe, rng)
        return image, torch.from_numpy(boxes), torch.from_numpy(labels), index


def item_name(dataset: Dataset[Any], index: int) -> str:
    """What messages call an item of a dataset: its file, if it says so."""
    if isinstance(dataset, Subset):
        return item_name(dataset.dataset, dataset.indices[index])
    name = getattr(dataset, "name", None)
    return str(name(index)) if callable(name) else f"item {index}"


def collate(items: Sequence[Example | Exception]) -> Batch | Exception:
    """A batch of examples, with boxes padded to the most that one of them has; or the first exception."""
    examples: list[Example] = []
    for item in items:
        if isinstance(item, Exception):
            return item
        examples.append(item)
    images, boxes, labels, indices = zip(*examples, strict=True)
    return Batch(
        torch.stack(images),
        nn.utils.rnn.pad_sequence(list(boxes), batch_first=True),
        nn.utils.rnn.pad_sequence(list(labels), batch_first=True),
        torch.tensor(indices),
    )


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """This process's batches of an epoch: a shuffle that depends on seed and epoch alone, without a rest.

    Every process has as many. `epoch` and `start` (batches to pass over) are set before each iteration.
    """

    def __init__(self, images: int, config: TrainConfig, world: World) -> None:
        self._images, self._config, self._world = images, config, world
        self.epoch = self.start = 0
        self.steps = images // config.images_per_step(world)

    def __len__(self) -> int:
        return self.steps * self._config.accumulate - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self._config.seed, self.epoch)).permutation(self._images)
        size, world = self._config.batch_size, self._world
        for number in range(self.start, self.steps * self._config.accumulate):
            first = (number * world.size + world.rank) * size
            yield [(self.epoch, int(index)) for index in order[first : first + size]]


# --- The pieces of a step ---------------------------------------------------------------------------------


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: weights that decay, and biases and norms that do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [each for each in trainable if each.dim() > 1], "weight_decay": weight_decay},
        {"params": [each for each in trainable if each.dim() <= 1], "weight_decay": 0.0},
    ]


def learning_rate(config: TrainConfig, step: int, total: int, images_per_step: int) -> float:
    """The learning rate of a step, counted from 0, of `total`."""
    rate = config.peak_lr() * images_per_step / 32
    warmup = min(config.warmup, total // 10)
    if step < warmup:
        rate *= (step + 1) / warmup
    if config.schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * step / total))
    return float(rate * 0.1 ** sum(step >= milestone * total for milestone in config.milestones))


def freeze(model: SSD300, stages: int) -> None:
    """Keep the first stages of the trunk as they are: no gradients, and BatchNorm in eval mode.

    To be called after each ``model.train()``.
    """
    trunk = model.feature_extractor.feature_extractor
    for module in trunk[: (0, 4, 5, 6, 7)[stages]]:
        module.eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move averaged weights and statistics towards the model's, faster in the first steps."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    old, new = list(average.state_dict().values()), list(model.state_dict().values())
    floats = [i for i, value in enumerate(old) if value.is_floating_point()]
    torch._foreach_lerp_([old[i] for i in floats], [new[i] for i in floats], weight)


def is_finite(model: nn.Module) -> bool:
    """Whether all weights and statistics are."""
    return all(bool(value.isfinite().all()) for value in model.state_dict().values())


def make_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """SGD: apex's fused one on CUDA where it can be imported, else torch's."""
    groups = parameter_groups(model, config.weight_decay)
    if device.type == "cuda":
        try:
            from apex.optimizers import FusedSGD  # noqa: PLC0415

            return FusedSGD(groups, lr=config.peak_lr(), momentum=config.momentum)  # type: ignore[no-any-return]
        except ImportError:
            pass
    fused = device.type in ("cuda", "cpu")
    optimizer = torch.optim.SGD(groups, lr=config.peak_lr(), momentum=config.momentum, fused=fused)
    for group in groups:
        for parameter in group["params"]:
            # torch leaves this memory as it finds it if the very first step is left out.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def keep_memory() -> bool:
    """Have the C library keep what this process frees, for the rest of its life; False where it cannot.

    Each step frees the blocks that the next one takes. glibc gives large ones back to the system, which then
    clears every page anew. ``ssd train`` calls this; a process that does more than training may want its
    memory back instead.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


# --- State ------------------------------------------------------------------------------------------------


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
    """All that a run consists of besides its config; what `save_state` writes."""

    model: SSD300
    average: SSD300 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    data: dict[str, Any]
    """What an epoch under way depends on: class names, images, and how they make batches."""

    def evaluated(self) -> SSD300:
        """The model that is evaluated and saved."""
        return self.average or self.model


def save_state(path: Path, run: Run, config: TrainConfig) -> None:
    """Write everything that continuing needs, whole or not at all."""
    state = {
        "version": __version__,
        "config": asdict(config),
        "data": run.data,
        "progress": asdict(run.progress),
        "model": run.model.state_dict(),
        "average": run.average.state_dict() if run.average else None,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "random": torch.get_rng_state(),
    }
    with atomic_file(path) as file:
        file.write(checkpoint.torch_bytes(state))


def read_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote.

    Raises:
        CheckpointError: the file is damaged, or something else.
        FileNotFoundError: there is none.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {each.name for each in fields(Run)} | {"config", "random"}
        missing -= set(state)
    except FileNotFoundError:
        raise FileNotFoundError(f"nothing to resume: there is no {path}") from None
    except Exception as error:
        raise CheckpointError(f"{path}: not the state of a run, or damaged ({error})") from None
    if missing:
        raise CheckpointError(f"{path}: not the state of a run; it has no {', '.join(sorted(missing))}")
    return cast("dict[str, Any]", state)


def restore(path: Path, state: dict[str, Any], run: Run, config: TrainConfig) -> None:
    """Put a run where `save_state` left it; what `config` changes holds from there on.

    Raises:
        CheckpointError: the state is another network's, or of choices that do not fit.
    """
    for name in ("backbone", "weights", "backbone_weights", "head_norm", "freeze"):
        before, wanted = state["config"].get(name), getattr(config, name)
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
    checkpoint.check(path, state["model"], run.model.state_dict())
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
        if state["config"]["precision"] == config.precision:
            run.scaler.load_state_dict(state["scaler"])
        run.progress = Progress(**state["progress"])
        torch.set_rng_state(state["random"])
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} does not fit these choices ({error})") from None
    for parameter, values in run.optimizer.state.items():
        # The fused optimiser walks through memory, so the layout has to be the parameter's.
        values["momentum_buffer"] = torch.empty_like(parameter).copy_(values["momentum_buffer"])


class Stop:
    """Set by the first Ctrl-C or SIGTERM; a second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take over both signals for the time of the block; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: object) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# --- The loop ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    finished: bool
    """Whether all epochs are done; else it can be continued."""
    evaluation: Evaluation | None
    """The last one of this call, if there was any."""
    best: float
    """Highest AP; -1 without evaluation."""
    folder: Path
    detector: Detector
    """With the weights of the last epoch, on the CPU, in fp32."""


def fit(
    train: Dataset[Any],
    val: Annotations | Dataset[Any] | None,
    config: TrainConfig,
    folder: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    category_ids: Sequence[int] | None = None,
    world: World | None = None,
    resume: bool = False,
    say: Say | None = print,
    source: Mapping[str, Any] | None = None,
    tensorboard: bool = False,
) -> Result:
    """Train an SSD300, or go on with it.

    The folder gets ``config.json``, ``metrics.csv``, ``last.safetensors`` and ``best.safetensors`` (highest
    AP), ``samples/`` with detections on validation images, and ``state.pt`` for resuming. Ctrl-C and SIGTERM
    save and return; continued, a run gives on the CPU the same weights as one that was never interrupted.

    Args:
        train: gives images and targets; see `ssd.data.DetectionDataset`.
        val: to evaluate on; None for no evaluation.
        config: all other choices.
        folder: of the run; made if it is not there.
        class_names: one for each class but the background; by default `train.class_names`.
        category_ids: the dataset's own id of each class, for COCO output.
        world: this process among those of the run, from `ssd.distributed.world`.
        resume: go on with the run in `folder`, with this config from there on; what cannot change is refused.
        say: gets lines of text; None for silence.
        source: where the data came from; noted in ``config.json``.
        tensorboard: also write for TensorBoard, into the folder.

    Raises:
        ValueError: too few images for a step; or a choice that does not fit the device.
        NonFiniteError: the loss stays NaN or infinite; the message names the images. What was saved stays.
        AnnotationError, ImageError, FileNotFoundError: an item cannot be used; the message names it.
        CheckpointError, DownloadError: starting weights or the state cannot be used.
    """
    world = world or alone(usable_device())
    folder = Path(folder)
    names, ids = _classes(train, class_names, category_ids)
    val = _checked(val, names)
    say = say if world.is_main and say else _quiet
    config = settle(config, world.device)
    batches = _plan(train, config, world)
    total = batches.steps * config.epochs
    torch.manual_seed(config.seed)

    run, origin = _begin(train, names, config, folder / "state.pt", world, resume=resume)
    if not run.progress.batch:  # an epoch that begins may have other steps than those before it
        run.progress.step = run.progress.epoch * batches.steps
    writer = _Writer(folder, names, ids, config, is_main=world.is_main, tensorboard=tensorboard)
    writer.config(source)
    for line in (origin, _describe(config, train, batches, world, run.progress)):
        say(line)

    examples = Examples(train, len(names) + 1, config.augmentation, config.seed)
    forward = _wrap(run.model, config, world)
    measured: Evaluation | None = None
    stop = Stop()
    with stop.listening(), _loading(examples, batches, config, world) as loader:
        while run.progress.epoch < config.epochs:
            batches.epoch, batches.start = run.progress.epoch, run.progress.batch
            try:
                train_epoch(run, forward, loader, config, world, total, stop, say)
            except (ImageError, AnnotationError, OSError):
                if world.size == 1:  # an image that can be mended is no reason to lose the epoch
                    writer.state(run)
                raise
            stop.asked = world.any(stop.asked)
            if stop.asked:
                break
            due = _is_evaluated(run.progress.epoch + 1, config)
            if val is not None and due:
                writer.state(run)  # an evaluation may take long, or fail
            row = _close_epoch(run, config, total, world)
            if val is not None and due:
                world.share_weights(run.evaluated())
                detector = _detector(run.evaluated(), names, config, world.device)
                measured = evaluate(detector, val, world, batch_size=config.batch_size)
                row |= measured.metrics
                writer.samples(detector, val, run.progress.epoch)
            writer.epoch(run, row)
            say(_line(row, config))
        if stop.asked:
            saved = writer.state(run)
            what = "everything is saved" if saved else "the weights hold NaN, so only earlier ones are saved"
            say(f"stopped; {what}. Go on with: ssd train --resume {folder}")
    finished = run.progress.epoch >= config.epochs
    detector = Detector(copy.deepcopy(run.evaluated()).cpu(), names, ids)
    return Result(finished, measured, run.progress.best, folder, detector)


def _classes(
    train: Dataset[Any], class_names: Sequence[str] | None, category_ids: Sequence[int] | None
) -> tuple[tuple[str, ...], list[int]]:
    """Class names and category ids, the dataset's own where none are given."""
    annotations = annotations_of(train)
    names = class_names or getattr(train if annotations is None else annotations, "class_names", None)
    if not names:
        raise ValueError("pass class_names=..., one for each class but the background: the dataset has none")
    if annotations is not None:
        require_boxes(annotations)
        category_ids = category_ids or annotations.category_ids
    return tuple(names), [int(each) for each in category_ids or ()]


def _same_crowd(train: Dataset[Any], config: TrainConfig) -> None:
    """Require that a dataset of ours, which holds crowd boxes or not, is what the config says."""
    while isinstance(train, Subset):
        train = train.dataset
    if isinstance(train, DetectionDataset) and train.annotations.crowd.any() and train.crowd != config.crowd:
        raise ValueError(
            f"the config says crowd={config.crowd}, but the DetectionDataset was made with "
            f"crowd={train.crowd}; make both the same"
        )


def _begin(
    train: Dataset[Any],
    names: tuple[str, ...],
    config: TrainConfig,
    file: Path,
    world: World,
    *,
    resume: bool,
) -> tuple[Run, str]:
    """A run at its start, or where its state file left it; and a line on where its weights come from."""
    if file.exists() and not resume:
        raise FileExistsError(f"{file.parent} holds a run already; resume it, or choose another folder")
    state = read_state(file) if resume else None
    model, origin = rebuild(file, state) if state else build(config, names)
    run = _start(model.to(world.device), config, world, names, len(train))  # type: ignore[arg-type]
    if state:
        restore(file, state, run, config)
    return run, origin


def _checked(
    val: Annotations | Dataset[Any] | None, names: tuple[str, ...]
) -> Annotations | Dataset[Any] | None:
    """What to evaluate on; that it cannot be used should not show after hours of training."""
    annotations = None if val is None else annotations_of(val)
    if annotations is None:
        return val
    if annotations.class_names != names:
        raise AnnotationError(
            f"{annotations.source}: its classes are not those of training; read it with class_names=..."
        )
    # A dataset has been judged when it was made, by its own leniency.
    return usable_for_evaluation(annotations) if isinstance(val, Annotations) else annotations


def _is_evaluated(epoch: int, config: TrainConfig) -> bool:
    return epoch % config.evaluate_every == 0 or epoch == config.epochs


def train_epoch(
    run: Run,
    forward: Callable[[Tensor], tuple[Tensor, Tensor]],
    loader: DataLoader[Any],
    config: TrainConfig,
    world: World,
    total: int,
    stop: Stop,
    say: Say,
) -> None:
    """The rest of an epoch, until its end or until asked to stop. Nothing in a step waits for the device."""
    device, progress, optimizer, scaler = world.device, run.progress, run.optimizer, run.scaler
    boxes_there = default_boxes().to(device)
    loss_of = MultiBoxLoss(boxes_there)
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    run.model.train()
    freeze(run.model, config.freeze)
    watch = _Watch(run, loader, config, world, say)
    for batch in watch:
        # Equal for all processes: each has as many batches, and an empty image still has a loss, of 0.
        last = (progress.batch + 1) % config.accumulate == 0
        images = normalize(batch.images.to(device, non_blocking=True))
        # Channels-last images would make the whole network compute so.
        images = images if config.channels_last else images.contiguous()
        boxes, labels = (each.to(device, non_blocking=True) for each in (batch.boxes, batch.labels))
        matched, classes = match(boxes, labels, boxes_there, config.iou_threshold)
        with world.contact(), contextlib.nullcontext() if last else _no_sync(forward):
            with torch.autocast(device.type, DTYPES[config.precision], enabled=config.precision != "fp32"):
                loc, conf = forward(images)
            losses = loss_of(loc, conf, matched, classes)
            loss = (losses.loc + losses.conf).mean() / config.accumulate
            scaler.scale(loss).backward()
        progress.batch += 1
        watch.add(losses.loc.detach(), losses.conf.detach(), batch.indices)
        if not last:
            continue
        rate = learning_rate(config, progress.step, total, config.images_per_step(world))
        for group in optimizer.param_groups:
            group["lr"] = rate
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        if config.clip:
            nn.utils.clip_grads_with_norm_(parameters, config.clip, norm)
        scaler.step(optimizer)  # leaves a step out where a gradient is not finite
        scaler.update(None if config.precision == "fp16" else 1.0)
        optimizer.zero_grad()
        if run.average:
            update_average(run.average, run.model, config.ema, progress.step)
        progress.step += 1
        watch.step(norm)
        if watch.is_due() and world.any(stop.asked):
            break
    watch.close()


def settle(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The config with everything automatic decided for a device.

    Raises:
        ValueError: something cannot be done on the device.
    """
    if config.sync_batchnorm and device.type != "cuda":
        raise ValueError("sync_batchnorm works on CUDA only; torch has none for the CPU")
    precision = config.precision
    if precision == "auto":
        precision = choose_precision(precision, device)
    workers = config.workers
    if workers is None:
        workers = min(8, max(1, (os.cpu_count() or 1) // 2))
    return replace(config, precision=precision, workers=workers, lr=config.peak_lr())


def build(config: TrainConfig, class_names: tuple[str, ...]) -> tuple[SSD300, str]:
    """The network of a config, and a line that says where its weights come from."""
    num_classes = len(class_names) + 1
    if config.weights:
        return transfer(config.weights, class_names, backbone=config.backbone)
    backbone = config.backbone or "resnet50"
    model = SSD300(num_classes, backbone, config.head_norm, config.backbone_weights)
    origin = f"trunk from {config.backbone_weights}, the rest" if config.backbone_weights else "all weights"
    return model, f"SSD300 {backbone}, {len(class_names)} classes; {origin} from random values"


def rebuild(path: Path, state: dict[str, Any]) -> tuple[SSD300, str]:
    """The network of a saved state; what it started from need not be there any more."""
    found = checkpoint.describe(path, state["model"])
    model = SSD300(found.num_classes, cast(Backbone, found.backbone), found.head_norm)
    return model, f"SSD300 {found.backbone}, {found.num_classes - 1} classes; all of it from {path}"


def _plan(train: Dataset[Any], config: TrainConfig, world: World) -> EpochBatches:
    _same_crowd(train, config)
    images = len(train)  # type: ignore[arg-type]
    batches = EpochBatches(images, config, world)
    if batches.steps == 0:
        parts = [f"batch_size {config.batch_size}"]
        parts += [f"accumulate {config.accumulate}"] if config.accumulate > 1 else []
        parts += [f"{world.size} processes"] if world.size > 1 else []
        raise ValueError(
            f"{images} images are too few for a step of {' x '.join(parts)}; use a smaller batch_size "
            "(at least 2, for BatchNorm), or add images"
        )
    return batches


def _start(model: SSD300, config: TrainConfig, world: World, names: tuple[str, ...], images: int) -> Run:
    if config.sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    freeze(model, config.freeze)
    average = copy.deepcopy(model).requires_grad_(False).eval() if config.ema else None
    # Also without fp16, with a scale of 1: it leaves out steps that are not finite, on the device.
    scale = 2.0**16 if config.precision == "fp16" else 1.0
    scaler = torch.amp.GradScaler(world.device.type, init_scale=scale)
    data = {"class_names": list(names), "images": images, "processes": world.size}
    data |= {"batch_size": config.batch_size, "accumulate": config.accumulate, "seed": config.seed}
    return Run(model, average, make_optimizer(model, config, world.device), scaler, Progress(), data)


def _wrap(model: SSD300, config: TrainConfig, world: World) -> Any:
    forward: Any = model
    if world.size > 1:
        ids = [world.device.index] if world.device.type == "cuda" else None
        forward = nn.parallel.DistributedDataParallel(forward, device_ids=ids, gradient_as_bucket_view=True)
    return torch.compile(forward) if config.compile else forward


def _no_sync(forward: Any) -> contextlib.AbstractContextManager[None]:
    return forward.no_sync() if hasattr(forward, "no_sync") else contextlib.nullcontext()


@contextlib.contextmanager
def _loading(
    examples: Examples, batches: EpochBatches, config: TrainConfig, world: World
) -> Iterator[DataLoader[Any]]:
    """The loader of all epochs; its worker processes end with the block."""
    loader: DataLoader[Any] = DataLoader(
        examples,
        batch_sampler=batches,
        num_workers=config.workers or 0,
        collate_fn=collate,
        pin_memory=world.device.type == "cuda",
        persistent_workers=bool(config.workers),
        worker_init_fn=_ignore_interrupts,
    )
    try:
        yield loader
    finally:
        # Not left to the garbage collector: an exception that someone keeps, as notebooks do, keeps the
        # loader too, and at its exit Python would wait for ever for workers that ignore SIGTERM.
        if (iterator := getattr(loader, "_iterator", None)) is not None:
            iterator._shutdown_workers()


def _ignore_interrupts(worker: int) -> None:
    # A terminal's Ctrl-C, and torchrun's or a scheduler's SIGTERM, reach all processes of the group; the main
    # one decides when to stop, and without it these end by themselves.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _detector(model: SSD300, names: tuple[str, ...], config: TrainConfig, device: torch.device) -> Detector:
    precision = choose_precision(config.precision, device)
    return Detector(of_model(model.to(device), precision), names)


def _close_epoch(
    run: Run,
    config: TrainConfig,
    total: int,
    world: World,
) -> dict[str, float]:
    """The row of an epoch that is done, which is added to the history."""
    progress = run.progress
    loc, conf, images, seconds = world.sum(torch.tensor(progress.sums, device=world.device)).tolist()
    progress.epoch, progress.batch, progress.sums = progress.epoch + 1, 0, [0.0] * 4
    row = {
        "epoch": float(progress.epoch),
        "lr": learning_rate(config, progress.step - 1, total, config.images_per_step(world)),
        "loss": (loc + conf) / max(images, 1),
        "loc_loss": loc / max(images, 1),
        "conf_loss": conf / max(images, 1),
        "images_per_second": images * world.size / seconds,
    }
    progress.history.append(row)
    return row


# --- Watching and writing ---------------------------------------------------------------------------------


class _Watch:
    """Looks at the numbers of the steps now and then: progress to see, and losses that are not finite."""

    def __init__(
        self, run: Run, loader: DataLoader[Any], config: TrainConfig, world: World, say: Say
    ) -> None:
        self._run, self._config, self._dataset = run, config, loader.dataset.dataset  # type: ignore[attr-defined]
        self._processes = world.size
        self._every = 1 if world.device.type == "cpu" and world.size == 1 else _CHECK_EVERY
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []  # batches of the step under way
        self._pending: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._any_bad = False
        self._last_bad = torch.tensor([]), torch.tensor([])
        self._first, self._batches = run.progress.batch, run.progress.batch + len(loader)
        self._start = self._since = self._said = time.perf_counter()
        self._say = None if is_watched() else say
        self._bar = tqdm(
            loader,
            desc=f"epoch {run.progress.epoch + 1}/{config.epochs}",
            unit="batch",
            total=self._batches,
            initial=self._first,
            leave=False,
            disable=not (world.is_main and is_watched()),
        )

    def __iter__(self) -> Iterator[Batch]:
        """The loader's batches, with a progress bar where a person sees one.

        All of a step's batches are there before it begins: one that cannot be read breaks no step.
        """
        step: list[Batch] = []
        for batch in self._bar:
            if isinstance(batch, Exception):
                raise batch
            step.append(batch)
            if len(step) == self._config.accumulate:
                yield from step
                step.clear()

    def add(self, loc: Tensor, conf: Tensor, indices: Tensor) -> None:
        """Take note of a batch."""
        self._parts.append((loc, conf, indices))

    def step(self, norm: Tensor) -> None:
        """Take note of a step, made of the batches since the last one; now and then, look."""
        loc, conf, indices = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        self._parts.clear()
        self._pending.append((loc, conf, norm, indices))
        if len(self._pending) >= self._every:
            self._look()

    def is_due(self) -> bool:
        """Whether the last step was one after which numbers were looked at."""
        return not self._pending

    def close(self) -> None:
        """Look at the rest; weights or statistics that are not finite stay so, and must not be saved."""
        self._look()
        self._bar.close()
        if self._any_bad and not is_finite(self._run.model):
            self._give_up(*self._last_bad)

    def _look(self) -> None:
        if not self._pending:
            return
        loc = torch.stack([each[0] for each in self._pending]).cpu()  # [steps, N]; waits for the device
        conf = torch.stack([each[1] for each in self._pending]).cpu()
        norm = torch.stack([each[2] for each in self._pending]).cpu()
        finite = (loc + conf).isfinite()
        healthy = finite.all(1) & (norm.isfinite() | torch.tensor(self._config.precision == "fp16"))
        for number, good in enumerate(healthy.tolist()):
            self._run.progress.skipped = 0 if good else self._run.progress.skipped + 1
            if not good:
                self._any_bad = True
                self._last_bad = finite[number], self._pending[number][3]
            if self._run.progress.skipped >= MAX_SKIPPED:
                self._give_up(*self._last_bad)
        if self._config.precision == "fp16" and self._run.scaler.get_scale() < _MIN_SCALE:
            self._give_up(finite[-1], self._pending[-1][3])
        sums, now = self._run.progress.sums, time.perf_counter()
        seen = (float(loc[finite].sum()), float(conf[finite].sum()), float(finite.sum()), now - self._since)
        for place, value in enumerate(seen):
            sums[place] += value
        self._since = now
        self._pending.clear()
        self._show(now)

    def _show(self, now: float) -> None:
        """Losses, rate and the time that the whole run will still take: in the bar, or in a line a minute."""
        progress, config = self._run.progress, self._config
        loc, conf = (each / max(progress.sums[2], 1.0) for each in progress.sums[:2])
        left = (config.epochs - progress.epoch) * self._batches - progress.batch
        done = max(progress.batch - self._first, 1)
        seconds = left * (now - self._start) / done
        images = done * config.batch_size * self._processes / (now - self._start)
        text = (
            f"loss {loc + conf:.3f} (loc {loc:.3f}, conf {conf:.3f})  "
            f"lr {self._run.optimizer.param_groups[0]['lr']:.2g}  {images:.1f} images/s  "
            f"all done in {datetime.timedelta(seconds=round(seconds))}"
        )
        self._bar.set_postfix_str(text, refresh=False)
        if self._say and now - self._said >= _LINE_SECONDS and progress.batch < self._batches:
            self._said = now
            self._say(
                f"epoch {progress.epoch + 1}/{config.epochs}  batch {progress.batch}/{self._batches}  {text}"
            )

    def _give_up(self, finite: Tensor, indices: Tensor) -> None:
        bad = [
            int(i) for i, good in zip(indices, finite.tolist(), strict=True) if not good
        ] or indices.tolist()
        names = ", ".join(item_name(self._dataset, i) for i in bad[:4])
        raise NonFiniteError(
            f"the loss or its gradient was NaN or infinite (in {self._run.progress.skipped} steps in a row, "
            f"epoch {self._run.progress.epoch + 1}), the last time with {names}. Lower the learning rate, "
            "set clip, or use bf16 or fp32. What was saved before is as it was",
            bad,
        )


class _Writer:
    """Writes the run folder, in the main process."""

    def __init__(
        self,
        folder: Path,
        names: tuple[str, ...],
        category_ids: list[int],
        config: TrainConfig,
        *,
        is_main: bool,
        tensorboard: bool,
    ) -> None:
        self._is_main = is_main
        self._folder, self._names, self._category_ids, self._config = folder, names, category_ids, config
        self._board: Any = None
        if tensorboard and is_main:
            try:
                from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415
            except ImportError as error:
                raise ImportError("TensorBoard is an extra: pip install 'ssd300[tensorboard]'") from error
            self._board = SummaryWriter(str(folder))

    def config(self, source: Mapping[str, Any] | None) -> None:
        """Write down what the run is."""
        if not self._is_main:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / "config.json"
        if source is None and file.exists():  # a run goes on that may have been started by the command
            with contextlib.suppress(ValueError, KeyError, TypeError):
                source = json.loads(file.read_bytes())["data"]
        notes = {
            "config": asdict(self._config),
            "class_names": self._names,
            "category_ids": self._category_ids,
            "data": source,
        }
        with atomic_file(file) as new:
            new.write(json.dumps(notes, indent=2).encode())

    def state(self, run: Run) -> bool:
        """Write what resuming starts from; False if it holds NaN, and is better not kept."""
        if self._is_main and is_finite(run.model):
            save_state(self._folder / "state.pt", run, self._config)
            return True
        return not self._is_main

    def epoch(self, run: Run, row: dict[str, float]) -> None:
        """Metrics, weights, and last the state: what resuming starts from is never ahead of the rest."""
        best = row.get("AP", -1.0) > run.progress.best
        run.progress.best = max(run.progress.best, row.get("AP", -1.0))
        if not self._is_main:
            return
        if self._board:
            for key, value in row.items():
                self._board.add_scalar(key, value, int(row["epoch"]))
            self._board.flush()
        columns = list(dict.fromkeys(key for each in run.progress.history for key in each))
        table = io.StringIO()
        rows = csv.DictWriter(table, columns, lineterminator="\n")
        rows.writeheader()
        rows.writerows({key: f"{value:.6g}" for key, value in each.items()} for each in run.progress.history)
        with atomic_file(self._folder / "metrics.csv") as file:
            file.write(table.getvalue().encode())
        for name in ("last", "best") if best else ("last",):
            checkpoint.save(
                self._folder / f"{name}.safetensors",
                run.evaluated().state_dict(),
                self._names,
                category_ids=self._category_ids,
                config=asdict(self._config),
            )
        self.state(run)

    def samples(self, detector: Detector, val: Annotations | Dataset[Any], epoch: int) -> None:
        """Draw the detections on four validation images, side by side."""
        if not self._is_main:
            return
        count = len(val)  # type: ignore[arg-type]
        places = sorted({count * k // 4 for k in range(4)})
        sources = [val.path(i) if isinstance(val, Annotations) else val[i][0] for i in places]
        pictures = [found.draw() for found in detector(sources)]
        width, height = 480, 360
        sheet = Image.new("RGB", (2 * width, -(-len(pictures) // 2) * height), "white")
        for k, picture in enumerate(pictures):
            small = ImageOps.contain(picture, (width, height))
            left, top = (
                k % 2 * width + (width - small.width) // 2,
                k // 2 * height + (height - small.height) // 2,
            )
            sheet.paste(small, (left, top))
        (self._folder / "samples").mkdir(exist_ok=True)
        with atomic_file(self._folder / "samples" / f"epoch-{epoch:03}.jpg") as file:
            sheet.save(file, "JPEG", quality=90)


def _line(row: dict[str, float], config: TrainConfig) -> str:
    text = (
        f"epoch {row['epoch']:.0f}/{config.epochs}  loss {row['loss']:.3f} (loc {row['loc_loss']:.3f}, "
        f"conf {row['conf_loss']:.3f})  lr {row['lr']:.2g}  {row['images_per_second']:.1f} images/s"
    )
    return text + (f"  AP {row['AP']:.3f}  AP50 {row['AP50']:.3f}" if "AP" in row else "")


def _describe(
    config: TrainConfig, train: Dataset[Any], batches: EpochBatches, world: World, progress: Progress
) -> str:
    shown = {each.name: getattr(config, each.name) for each in fields(config)}
    used = batches.steps * config.images_per_step(world)
    images = len(train)  # type: ignore[arg-type]
    lines = [f"{images} images, {batches.steps} steps an epoch, {world.size} x {world.device}"]
    if used < images:
        lines[0] += f"; {images - used} images sit out each epoch, by chance, to fill all batches"
    annotations = annotations_of(train)
    if annotations is not None and annotations.left_out:
        lines.append(f"left out of training ({listed(annotations.left_out)})")
    if config.precision not in native_precisions(world.device):
        lines.append(f"{world.device} has no instructions for {config.precision}; fp32 is many times as fast")
    lines.append(textwrap.fill("  ".join(f"{name}={value}" for name, value in shown.items()), 110))
    if progress.epoch >= config.epochs:
        lines.append(f"all {config.epochs} epochs are done already; --epochs asks for more")
    elif progress.step:
        lines.append(f"going on at epoch {progress.epoch + 1}, batch {progress.batch + 1}")
    return "\n".join(lines)


def _quiet(text: str) -> None:
    pass
