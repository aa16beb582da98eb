"""Watching a run: progress to see, losses that are not finite, and rows for loggers."""

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from ssd.distributed import World
from ssd.errors import MissingExtra, NonFiniteError
from ssd.terminal import is_watched
from ssd.train.examples import Batch, Loader
from ssd.train.state import Limits, Run, is_finite

Say = Callable[[str], object]

OnEpoch = Callable[[dict[str, float]], object]
"""Called with the row of each epoch that is done; see `ssd.train.fit`."""

MAX_SKIPPED = 10
"""After so many steps in a row with a loss that is not finite, training gives up."""

_LINE_SECONDS = 60  # between lines of progress where there is no bar
_LOOK_EVERY = 10  # steps between looks at the device's numbers, each of which waits for it
_MIN_SCALE = 2.0**-10  # of the loss in fp16; below this everything has overflowed for long


class Watch:
    """Looks at the numbers of an epoch's steps now and then, and shows how the run goes on.

    Args:
        run: that goes on; its sums and its count of skipped steps are kept up to date.
        loader: of the rest of the epoch.
        limits: what the run ends by.
        batch_size: images of a batch, in each process.
        fp16: whether the network computes in it, where gradients may overflow now and then.
        name_of: what messages call an item of the dataset, by its index.
        world: this process among those of the run.
        say: gets a line a minute where nobody sees the progress bar.
    """

    def __init__(
        self,
        run: Run,
        loader: Loader,
        *,
        limits: Limits,
        batch_size: int,
        fp16: bool,
        name_of: Callable[[int], str],
        world: World,
        say: Say,
    ) -> None:
        self._run, self._limits, self._fp16, self._name_of = run, limits, fp16, name_of
        self._images = batch_size * world.size
        self._every = 1 if world.device.type == "cpu" and world.size == 1 else _LOOK_EVERY
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []  # batches of the step under way
        self._pending: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.any_boxes = False
        """Whether an image of the batches so far had one."""
        self._any_bad = False
        self._last_bad = torch.tensor([]), torch.tensor([])
        self._first, self._batches = run.progress.batch, run.progress.batch + len(loader)
        self._start = self._since = self._said = time.perf_counter()
        self._say = None if is_watched() else say
        self._bar = tqdm(
            loader,
            desc=f"epoch {limits.numbered(run.progress.epoch + 1)}",
            unit="batch",
            total=self._batches,
            initial=self._first,
            leave=False,
            disable=not (world.is_main and is_watched()),
        )

    def batches(self) -> Iterator[Batch | Exception]:
        """What the loader gives, with a progress bar where a person sees one."""
        for batch in self._bar:
            if isinstance(batch, Batch):
                self.any_boxes = self.any_boxes or bool(batch.labels.any())
            yield batch

    def add(self, loc: Tensor, conf: Tensor, indices: Tensor) -> None:
        """Take note of a batch: its loss terms, float32 ``[N]``, and its images, int64 ``[N]``."""
        self._parts.append((loc, conf, indices))

    def step(self, norm: Tensor) -> None:
        """Take note of a step, made of the batches since the last one; now and then, look.

        Args:
            norm: of all gradients, float32 scalar.

        Raises:
            NonFiniteError: too many steps in a row were not finite.
        """
        loc, conf, indices = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        self._parts.clear()
        self._pending.append((loc, conf, norm, indices))
        if len(self._pending) >= self._every:
            self._look()

    def is_due(self) -> bool:
        """Whether the last step was one after which numbers were looked at."""
        return not self._pending

    def close(self) -> None:
        """Look at the rest; weights or statistics that are not finite stay so, and must not be saved.

        Raises:
            NonFiniteError: there are such, or too many steps in a row were not finite.
        """
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
        healthy = finite.all(1) & (norm.isfinite() | torch.tensor(self._fp16))
        for number, good in enumerate(healthy.tolist()):
            self._run.progress.skipped = 0 if good else self._run.progress.skipped + 1
            if not good:
                self._any_bad = True
                self._last_bad = finite[number], self._pending[number][3]
            if self._run.progress.skipped >= MAX_SKIPPED:
                self._give_up(*self._last_bad)
        if self._fp16 and self._run.scaler.get_scale() < _MIN_SCALE:
            self._give_up(finite[-1], self._pending[-1][3])
        sums, now = self._run.progress.sums, time.perf_counter()
        seen = (float(loc[finite].sum()), float(conf[finite].sum()), float(finite.sum()), now - self._since)
        for index, value in enumerate(seen):
            sums[index] += value
        self._since = now
        self._pending.clear()
        self._show(now)

    def _show(self, now: float) -> None:
        """Losses, rate and the time that the whole run will still take: in the bar, or in a line a minute."""
        progress = self._run.progress
        loc, conf = (each / max(progress.sums[2], 1.0) for each in progress.sums[:2])
        done = max(progress.batch - self._first, 1)
        least, most = (
            (epochs * self._batches - progress.batch) * (now - self._start) / done
            for epochs in self._limits.epochs_left(progress)
        )
        if self._limits.minutes is not None:
            least = most = max(self._limits.seconds - progress.seconds, 0)
        times = dict.fromkeys(str(datetime.timedelta(seconds=round(each))) for each in (least, most))
        images = done * self._images / (now - self._start)
        text = (
            f"loss {loc + conf:.3f} (loc {loc:.3f}, conf {conf:.3f})  "
            f"lr {self._run.optimizer.param_groups[0]['lr']:.2g}  {images:.1f} images/s  "
            f"all done in {' to '.join(times)}"
        )
        self._bar.set_postfix_str(text, refresh=False)
        if self._say and now - self._said >= _LINE_SECONDS and progress.batch < self._batches:
            self._said = now
            number = self._limits.numbered(progress.epoch + 1)
            self._say(f"epoch {number}  batch {progress.batch}/{self._batches}  {text}")

    def _give_up(self, finite: Tensor, indices: Tensor) -> None:
        bad = [
            int(i) for i, good in zip(indices, finite.tolist(), strict=True) if not good
        ] or indices.tolist()
        names = ", ".join(self._name_of(i) for i in bad[:4])
        raise NonFiniteError(
            f"the loss or its gradient was NaN or infinite (in {self._run.progress.skipped} steps in a row, "
            f"epoch {self._run.progress.epoch + 1}), the last time with {names}. Lower the learning rate, "
            "set clip, or use bf16 or fp32. What was saved before is as it was",
            bad,
        )


@contextlib.contextmanager
def tensorboard_hook(folder: str | os.PathLike[str]) -> Iterator[OnEpoch]:
    """What writes each epoch's row for TensorBoard, into a folder, within the block.

    Raises:
        MissingExtra: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("tensorboard") from error

    def write(row: dict[str, float]) -> None:
        for key, value in row.items():
            writer.add_scalar(key, value, int(row["epoch"]))
        writer.flush()

    with SummaryWriter(os.fspath(folder)) as writer:
        yield write
