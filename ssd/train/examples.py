"""Training examples: augmented images with their boxes, in batches whose order depends on the seed alone."""

import contextlib
import multiprocessing.connection
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from ssd.augment import augment
from ssd.choices import Recipe
from ssd.data import as_targets, item_name
from ssd.data.dataset import require_in_pixels
from ssd.distributed import World
from ssd.errors import AnnotationError, ImageError, ImageMemoryError, LostContactError
from ssd.images import lacks_memory, load_image


class Batch(NamedTuple):
    """What the loader gives: some examples."""

    images: Tensor
    """uint8 ``[N, size, size, 3]``."""
    boxes: Tensor
    """float32 xyxy, normalised, ``[N, M, 4]``, padded."""
    labels: Tensor
    """int64 ``[N, M]``; 0 is padding."""
    indices: Tensor
    """int64 ``[N]``: which items of the dataset they are."""

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory (called by DataLoader)."""
        return Batch(*(values.pin_memory() for values in self))


_LESS_MEMORY = (
    "fewer processes need less (--workers 1; with --workers 0 the training process itself reads), and so do "
    "smaller images and a smaller --batch-size"
)

Example = tuple[Tensor, Tensor, Tensor, int]
"""Image, boxes and labels as in `Batch`, and the index in the dataset."""


class Key(NamedTuple):
    """What an example is made by."""

    epoch: int
    item: int
    """Its number in the dataset."""
    size: int
    """Width and height of the image."""


class Examples(Dataset[Example | Exception]):
    """Augmented examples of a dataset, by `Key`: the same ones in any process, in any order.

    An item that cannot be used is given as its exception: raised in a worker, it would come with the worker's
    traceback for a message.

    Args:
        dataset: gives an image and its "boxes" and "labels"; see `ssd.data.DetectionDataset`.
        num_classes: with the background.
        recipe: a name in `ssd.augment.STEPS`.
        seed: of the augmentation.
        tiles: side of the tiles that are shown of larger images; None for whole ones.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        num_classes: int,
        recipe: Recipe,
        seed: int,
        tiles: int | None = None,
    ) -> None:
        self.dataset, self.num_classes, self.recipe = dataset, num_classes, recipe
        self.seed, self.tiles = seed, tiles

    def __getitem__(self, key: Key) -> Example | Exception:
        try:
            return self._example(*key)
        except ImageMemoryError as error:
            return ImageError(f"{error}; {_LESS_MEMORY}")
        except (ImageError, AnnotationError, OSError) as error:
            return error
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            name = item_name(self.dataset, key.item)
            return ImageError(f"{name}: there is not enough memory to read it; {_LESS_MEMORY}")

    def _example(self, epoch: int, index: int, size: int) -> Example:
        name = item_name(self.dataset, index)
        source, target = self.dataset[index]
        boxes, labels = as_targets(target, name)
        if len(labels) and labels.max() >= self.num_classes:
            raise AnnotationError(
                f"{name}: label {labels.max()}, but there are {self.num_classes - 1} classes"
            )
        rng = np.random.default_rng((self.seed, epoch, index))
        try:
            image = load_image(source, name=name)
        except TypeError as error:
            raise ImageError(f"{name}: {error}") from error
        require_in_pixels(boxes, image.size, self.dataset, index)
        pixels, boxes, labels = augment(image, boxes, labels, self.recipe, rng, size, self.tiles)
        return pixels, torch.from_numpy(boxes), torch.from_numpy(labels), index


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


class EpochBatches(Sampler[list[Key]]):
    """This process's batches of an epoch: a shuffle that depends on seed and epoch alone, without a rest.

    Every process has as many. `epoch`, `start` (batches to pass over) and `size` (of the images) are set
    before each iteration.

    Args:
        images: of the dataset.
        batch_size: images of a batch.
        accumulate: batches of a step.
        seed: of the order.
        world: this process among those of the run.
    """

    def __init__(self, images: int, *, batch_size: int, accumulate: int, seed: int, world: World) -> None:
        self._images, self._batch_size, self._accumulate = images, batch_size, accumulate
        self._seed, self._world = seed, world
        self.epoch = self.start = self.size = 0
        self.images_per_step = batch_size * accumulate * world.size
        """Images, of all processes, that a step of the optimiser sees."""
        self.steps = images // self.images_per_step
        """Steps of the optimiser in an epoch."""

    def __len__(self) -> int:
        return self.steps * self._accumulate - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.random.default_rng((self._seed, self.epoch)).permutation(self._images)
        size, world = self._batch_size, self._world
        for number in range(self.start, self.steps * self._accumulate):
            first = (number * world.size + world.rank) * size
            yield [Key(self.epoch, int(index), self.size) for index in order[first : first + size]]


class Loader:
    """Gives batches, epoch by epoch; a process of the loader's that has died is told when its batch is due.

    torch's handler of SIGCHLD raises wherever the main thread stands, which may be half-way through a step of
    the optimiser, or the handling of another error. It is set aside until `close`: torch also looks for dead
    processes itself, where a batch is late.

    Args:
        loader: of batches, or of exceptions in their place.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._handler: Any = None  # torch's

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch | Exception]:
        try:
            iterator = iter(self._loader)
            self._set_handler_aside()
            yield from iterator
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            yield LostContactError(self._told_death(error))
        except (OSError, EOFError) as error:  # a worker died while it handed a batch over
            yield LostContactError(self._told_death(error))

    def close(self) -> None:
        """End the processes, and give torch's handler back."""
        # Not left to the garbage collector: an exception that someone keeps, as notebooks do, keeps the
        # loader too, and at its exit Python would wait for ever for workers that ignore SIGTERM.
        if (iterator := getattr(self._loader, "_iterator", None)) is not None:
            iterator._shutdown_workers()
            for worker in iterator._workers:
                if worker.is_alive():  # it waits for a lock of a worker that was killed
                    worker.kill()
        if self._handler is not None:
            signal.signal(signal.SIGCHLD, self._handler)
            self._handler = None

    def _set_handler_aside(self) -> None:
        if not self._loader.num_workers or not hasattr(signal, "SIGCHLD"):
            return
        main = threading.current_thread() is threading.main_thread()
        if main and callable(handler := signal.getsignal(signal.SIGCHLD)):
            self._handler = handler
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _told_death(self, error: Exception) -> str:
        """What to say and do when a worker died."""
        workers = getattr(getattr(self._loader, "_iterator", None), "_workers", [])
        ended = multiprocessing.connection.wait([each.sentinel for each in workers], timeout=5)
        for each in workers:
            if each.sentinel in ended:
                each.join(timeout=5)  # a sentinel is closed a moment before the process has its status
        codes = [each.exitcode for each in workers if each.exitcode is not None]
        reason = _told_exit(codes[0]) if codes else str(error) or type(error).__name__
        if reason == "SIGBUS":
            remedy = "--workers 0 does without shared memory, and docker run --shm-size gives more of it"
        else:
            remedy = f"where memory ran out, {_LESS_MEMORY}"
        return f"a process that reads images has died ({reason}); {remedy}"


def _told_exit(code: int) -> str:
    """The name of the signal that ended a process, or its status."""
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"status {code}"


def loading(
    examples: Examples, batches: EpochBatches, *, workers: int, pin_memory: bool
) -> contextlib.closing[Loader]:
    """The loader of all epochs, which gives a `Batch`, or an exception; its workers end with the block.

    Args:
        examples: to load.
        batches: which of them, epoch by epoch.
        workers: processes that load; with 0, this one does.
        pin_memory: for a GPU.
    """
    inner: DataLoader[Any] = DataLoader(
        examples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_interrupts,
    )
    return contextlib.closing(Loader(inner))


def _ignore_interrupts(worker: int) -> None:
    # A terminal's Ctrl-C, and torchrun's or a scheduler's SIGTERM, reach all processes of the group; the main
    # one decides when to stop, and without it these end by themselves.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def whole_steps(batches: Iterable[Batch | Exception], accumulate: int) -> Iterator[Batch]:
    """The batches, step by step: all of a step's are there before its first one is given.

    So one that cannot be read, whose exception is raised, comes between two steps.
    """
    step: list[Batch] = []
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        step.append(batch)
        if len(step) == accumulate:
            yield from step
            step.clear()
