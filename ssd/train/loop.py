"""The training loop: epochs of steps, evaluations between them, and stopping when asked to."""

import contextlib
import copy
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ssd.backends import of_model
from ssd.data import Annotations, item_name
from ssd.detector import Detector
from ssd.devices import DTYPES, usable_device
from ssd.distributed import World, alone
from ssd.errors import AnnotationError, ImageError, LostContactError
from ssd.evaluate import Evaluation, best_thresholds, detect_all, measure_once
from ssd.train.config import TrainConfig
from ssd.train.examples import Batch, Loader, whole_steps
from ssd.train.folder import RunFolder
from ssd.train.optim import freeze, update_average
from ssd.train.setup import Assign, Forward, Loss, Rate, Setup, Stage, set_up
from ssd.train.state import Limits, Progress, Run
from ssd.train.watch import OnEpoch, Say, Watch, tensorboard_hook
from ssd.transforms import normalize

_WITHOUT_BOXES = (
    "no image of the first epoch had a box, so the network learns nothing but background; see that the "
    'dataset gives "boxes" and "labels"'
)
_WITHOUT_CURVES = "pip install 'ssd300[plots]' would draw curves.png"


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


class Clock:
    """Counts the seconds of a run; all of its processes take those of rank 0, at the same moments.

    Args:
        progress: of the run; its seconds are kept up to date.
        world: this process among those of the run.
    """

    def __init__(self, progress: Progress, world: World) -> None:
        self._progress, self._world, self._since = progress, world, monotonic()

    def look(self, asked: bool) -> bool:
        """Count up to now; gives whether any process was asked to stop. It does not wait for the device."""
        now = monotonic()
        told = self._world.gather((self._progress.seconds + now - self._since, asked))
        self._since = now
        self._progress.seconds = told[0][0]
        return any(each for _, each in told)


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    finished: bool
    """Whether it came to its end: all epochs, its time, or its patience; else it can be continued."""
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
    on_epoch: OnEpoch | None = None,
) -> Result:
    """Train an SSD, or go on with it.

    The folder gets ``config.json``, ``metrics.csv``, ``curves.png`` (with the extra `plots`),
    ``last.safetensors`` and ``best.safetensors`` (highest AP), ``samples/`` with truth and detections on
    validation images, and ``state.pt`` for resuming. Ctrl-C and SIGTERM save and return; continued, a run
    without `time` gives on the CPU the same weights as one that was never interrupted.

    Args:
        train: gives images and targets; see `ssd.data.DetectionDataset`. Boxes of other datasets are looked
            at when they are read: one outside its image, or in parts of it, is an error.
        val: to evaluate on; None for no evaluation.
        config: all other choices.
        folder: of the run; made if it is not there.
        class_names: one for each class but the background; by default `train.class_names`.
        category_ids: the dataset's own id of each class, for COCO output.
        world: this process among those of the run, from `ssd.distributed.join`.
        resume: go on with the run in `folder`, with this config from there on; what cannot change is refused.
        say: gets lines of text; None for silence.
        source: where the data came from; noted in ``config.json``.
        tensorboard: also write for TensorBoard, into the folder.
        on_epoch: called in the main process after the files of each epoch are written, with its row, a dict
            of numbers by the names of the columns of ``metrics.csv``, of which those of METRICS are only in
            rows of epochs that were evaluated. For loggers; what it raises is raised here, and the run can be
            resumed with the next epoch. For MLflow::

                with mlflow.start_run():
                    fit(..., on_epoch=lambda row: mlflow.log_metrics(row, step=int(row["epoch"])))

            and for Weights & Biases::

                with wandb.init(project="boats") as logged:
                    fit(..., on_epoch=lambda row: logged.log(row, step=int(row["epoch"])))

    Raises:
        ValueError: too few images for a step; classes other than the dataset's own; or a choice that does not
            fit the device or the weights.
        NonFiniteError: the loss stays NaN or infinite; the message names the images. What was saved stays.
        AnnotationError, ImageError, FileNotFoundError: an item cannot be used; the message names it.
        LostContactError: a process that reads images has died, or another of the run; what to do is said.
        CheckpointError, DownloadError: starting weights or the state cannot be used.
        MissingExtra: TensorBoard is not installed.
    """
    world = world or alone(usable_device())
    folder = Path(folder)
    say = say if world.is_main and say else lambda text: None
    ready = set_up(
        train,
        val,
        config,
        folder / "state.pt",
        world,
        class_names=class_names,
        category_ids=category_ids,
        resume=resume,
    )
    run, names = ready.run, ready.class_names
    files = RunFolder(folder, names, ready.category_ids, is_main=world.is_main)
    with contextlib.ExitStack() as closing:
        hooks = [closing.enter_context(tensorboard_hook(folder))] if tensorboard and world.is_main else []
        hooks += [on_epoch] if on_epoch and world.is_main else []
        files.write_config(run.config, source)
        for line in ready.introduction:
            say(line)
        measured, thresholds = _go_on(ready, files, folder, partial(item_name, train), hooks, world, say)
    detector = Detector(copy.deepcopy(run.evaluated()).cpu(), names, ready.category_ids, thresholds)
    finished = bool(ready.limits.ending(run.progress))
    return Result(finished, measured, run.progress.best, folder, detector)


def _go_on(
    ready: Setup,
    files: RunFolder,
    folder: Path,
    name_of: Callable[[int], str],
    hooks: Sequence[OnEpoch],
    world: World,
    say: Say,
) -> tuple[Evaluation | None, tuple[float, ...]]:
    """Epochs up to the end of the run, or until it is asked to stop.

    Gives the last evaluation, and the score thresholds of the weights as they are, if there are any.
    """
    run, limits = ready.run, ready.limits
    measured: Evaluation | None = None
    thresholds: tuple[float, ...] = ()
    curves = True
    stop, clock, half = Stop(), Clock(run.progress, world), False

    def is_over() -> bool:
        """Whether the epoch is: the time of the run, or of its half size, is up, or a stop was asked for."""
        stop.asked = clock.look(stop.asked)
        return stop.asked or run.progress.seconds >= limits.seconds * (limits.half_size if half else 1)

    with stop.listening(), ready.loading() as loader:
        while not limits.ending(run.progress):
            half = limits.is_half(run.progress)
            stage, thresholds = ready.stage(half), ()
            with _saving(run, files, folder, world):
                _train(ready, stage, loader, name_of, is_over, world, say)
            is_over()
            if stop.asked:
                break
            number = run.progress.epoch + 1
            is_last = limits.is_last(number, run.progress)
            due = ready.val is not None and (number % ready.evaluate_every == 0 or is_last)
            if due:
                files.write_state(run)  # an evaluation may take long, or fail
            run.progress.half_epochs += half
            row = close_epoch(run, ready.rate, world)
            if due:
                measured, thresholds = _evaluate(ready, files, world)
                row |= measured.metrics
                is_over()  # for the time that this took
            if curves and (due or is_last):
                curves = files.write_curves(run.progress.history)
                if not curves:
                    say(_WITHOUT_CURVES)
            files.write_epoch(run, row, thresholds)
            say(_line(row, limits, stage.size if half else None))
            for hook in hooks:
                hook(dict(row))
            ending = limits.ending(run.progress)
            if ending and (limits.minutes is not None or not is_last):  # the last epoch needs no explanation
                say(ending)
        if stop.asked and not limits.ending(run.progress):  # it may have come in the last evaluation
            saved = files.write_state(run)
            what = "everything is saved" if saved else "the weights hold NaN, so only earlier ones are saved"
            say(f"stopped; {what}. Go on with: ssd train --resume {shlex.quote(str(folder))}")
    return measured, thresholds


def _train(
    ready: Setup,
    stage: Stage,
    loader: Loader,
    name_of: Callable[[int], str],
    is_over: Callable[[], bool],
    world: World,
    say: Say,
) -> None:
    """The rest of the epoch under way; if it is the first, seen whole, and had no boxes, say so."""
    run, batches = ready.run, ready.batches
    batches.epoch, batches.start, batches.size = run.progress.epoch, run.progress.batch, stage.size
    watch = Watch(
        run,
        loader,
        limits=ready.limits,
        batch_size=ready.batch_size,
        fp16=ready.precision == "fp16",
        name_of=name_of,
        world=world,
        say=say,
    )
    train_epoch(
        run,
        stage.forward,
        stage.loss,
        whole_steps(watch.batches(), ready.accumulate),
        ready.rate,
        assign=stage.assign,
        accumulate=ready.accumulate,
        dtype=DTYPES[ready.precision],
        memory_format=ready.memory_format,
        clip=ready.clip,
        decay=ready.decay,
        frozen=ready.frozen,
        watch=watch,
        is_over=is_over,
        world=world,
    )
    whole = batches.start == 0 and run.progress.batch == len(batches)
    if run.progress.epoch == 0 and whole and not world.any(watch.any_boxes):
        say(_WITHOUT_BOXES)


@contextlib.contextmanager
def _saving(run: Run, files: RunFolder, folder: Path, world: World) -> Iterator[None]:
    """Within the block, an image that can be mended, or a reading process, is no reason to lose the epoch."""
    try:
        yield
    except (ImageError, AnnotationError, OSError):
        if world.size == 1:
            files.write_state(run)
        raise
    except LostContactError as error:
        if world.size == 1 and files.write_state(run):
            raise LostContactError(
                f"{error}. The epoch so far is saved; go on with: "
                f"ssd train --resume {shlex.quote(str(folder))} --workers 0"
            ) from error
        raise


def _evaluate(ready: Setup, files: RunFolder, world: World) -> tuple[Evaluation, tuple[float, ...]]:
    """Measure the run as it is, find the score thresholds of its classes, and draw samples."""
    assert ready.val is not None
    model = ready.run.evaluated()
    world.share_weights(model)
    detector = Detector(of_model(model, ready.precision), ready.class_names)
    truth, found = detect_all(detector, ready.val, world, batch_size=ready.batch_size, tiles=ready.tiles)
    measured = measure_once(truth, found, world)
    files.write_samples(detector, ready.val, ready.run.progress.epoch, ready.tiles)
    return measured, best_thresholds(truth, found)


def train_epoch(
    run: Run,
    forward: Forward,
    loss: Loss,
    batches: Iterable[Batch],
    rate: Rate,
    *,
    assign: Assign,
    accumulate: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    clip: float,
    decay: float,
    frozen: int,
    watch: Watch,
    is_over: Callable[[], bool],
    world: World,
) -> None:
    """The rest of an epoch, until its end or until it is over. Nothing in a step waits for the device.

    Args:
        run: whose weights and progress change.
        forward: its model.
        loss, assign: of each image, and what each default box should find.
        batches: of whole steps, on the CPU.
        rate: the learning rate of a step.
        accumulate: batches of a step.
        dtype: that the network computes in.
        memory_format: of the images; channels-last ones would make the whole network compute so.
        clip: largest norm of all gradients; 0 for no limit.
        decay: of the moving average, where the run has one.
        frozen: stages of the trunk that stay as they are.
        watch: takes note of each batch and step.
        is_over: asked after some of the steps.
        world: this process among those of the run.
    """
    device, progress, optimizer, scaler = world.device, run.progress, run.optimizer, run.scaler
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    run.model.train()
    freeze(run.model, frozen)
    for batch in batches:
        # Equal for all processes: each has as many batches, and an empty image has a loss, too.
        last = (progress.batch + 1) % accumulate == 0
        images = normalize(batch.images.to(device, non_blocking=True))
        images = images.contiguous(memory_format=memory_format)
        boxes, labels = (each.to(device, non_blocking=True) for each in (batch.boxes, batch.labels))
        matched, classes = assign(boxes, labels)
        with world.contact(), contextlib.nullcontext() if last else _no_sync(forward):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loc, conf = forward(images)
            losses = loss(loc, conf, matched, classes)
            scaler.scale((losses.loc + losses.conf).mean() / accumulate).backward()
        progress.batch += 1
        watch.add(losses.loc.detach(), losses.conf.detach(), batch.indices)
        if not last:
            continue
        for group in optimizer.param_groups:
            group["lr"] = rate(progress.step, progress.seconds)
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        if clip:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        scaler.step(optimizer)  # leaves a step out where a gradient is not finite
        scaler.update(None if dtype == torch.float16 else 1.0)
        optimizer.zero_grad()
        if run.average:
            update_average(run.average, run.model, decay, progress.step)
        progress.step += 1
        watch.step(norm)
        if watch.is_due() and is_over():
            break
    watch.close()


def close_epoch(run: Run, rate: Rate, world: World) -> dict[str, float]:
    """The row of an epoch that is done, which is added to the history."""
    progress = run.progress
    loc, conf, images, seconds = world.sum(torch.tensor(progress.sums, device=world.device)).tolist()
    progress.epoch, progress.batch, progress.sums = progress.epoch + 1, 0, [0.0] * 4
    row = {
        "epoch": float(progress.epoch),
        "lr": rate(progress.step - 1, progress.seconds),
        "loss": (loc + conf) / max(images, 1),
        "loc_loss": loc / max(images, 1),
        "conf_loss": conf / max(images, 1),
        "images_per_second": images * world.size / seconds,
    }
    progress.history.append(row)
    return row


def _no_sync(forward: Any) -> contextlib.AbstractContextManager[None]:
    return forward.no_sync() if hasattr(forward, "no_sync") else contextlib.nullcontext()


def _line(row: Mapping[str, float], limits: Limits, half: int | None) -> str:
    """An epoch in words, with the size of its images where that is half of the network's."""
    at = f" at {half} pixels" if half else ""
    text = (
        f"epoch {limits.numbered(int(row['epoch']))}{at}  loss {row['loss']:.3f} (loc {row['loc_loss']:.3f}, "
        f"conf {row['conf_loss']:.3f})  lr {row['lr']:.2g}  {row['images_per_second']:.1f} images/s"
    )
    return text + (f"  AP {row['AP']:.3f}  AP50 {row['AP50']:.3f}" if "AP" in row else "")
