"""What torchrun set up: ranks, devices, passing things between processes. One process is a world of one."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssd.devices import usable_device
from ssd.errors import LostContactError

TIMEOUT = datetime.timedelta(minutes=10)
"""How long a process waits for the others, for example while rank 0 writes, before it gives up."""

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Which of the run's processes this one is."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def share(self, count: int, batch_size: int) -> list[int]:
        """The indices, of `count`, that are this process's: every so many-th batch, without overlap.

        Batches are those of a single process, so that results do not depend on the number of processes.

        >>> World(1, 2, torch.device("cpu")).share(7, 2)
        [2, 3, 6]
        """
        return [i for i in range(count) if i // batch_size % self.size == self.rank]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, on every one of them; any plain data."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        with self.contact():
            dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.sum(torch.tensor(float(flag), device=self.device)).item() > 0 if self.size > 1 else flag

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            with self.contact():
                dist.all_reduce(values)
        return values

    def share_weights(self, model: nn.Module) -> None:
        """Give every process the parameters and buffers of rank 0."""
        if self.size > 1:
            with self.contact():
                for value in model.state_dict().values():
                    dist.broadcast(value, 0)

    @contextlib.contextmanager
    def contact(self) -> Iterator[None]:
        """Say who lost whom where torch only says that a connection was closed."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if self.size == 1 or not _is_about_contact(error):
                raise
            raise LostContactError(
                f"rank {self.rank} of {self.size} lost contact with another rank, which has died or hangs; "
                f"torchrun's report below names it. What is saved can be continued with --resume ({error})"
            ) from error


def alone(device: torch.device) -> World:
    """The world of a process that is by itself.

    Raises:
        ValueError: torchrun started several; each would do all of the work.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "torchrun started several processes, of which each would do all of the work: "
            "within `with ssd.distributed.join() as world:`, pass world=world"
        )
    return World(0, 1, device)


def _is_about_contact(error: Exception) -> bool:
    if isinstance(error, dist.DistError):
        return True
    # gloo raises plain RuntimeErrors, which nothing but their text tells from those of the network.
    words = ("connection", "timed out", "timeout", "gloo", "nccl", "socket", "peer", "reset")
    return any(word in str(error).lower() for word in words)


@contextlib.contextmanager
def join(device: torch.device | str | None = None, timeout: datetime.timedelta = TIMEOUT) -> Iterator[World]:
    """Join the processes that torchrun started; without torchrun, a world of one.

    Args:
        device: by default CUDA where there is one (each process its own), else the CPU.
        timeout: how long to wait for another process.

    Raises:
        ValueError: there is no such device here.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = usable_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        yield World(0, 1, chosen)
        return
    # Plain data goes through gloo, also between GPUs.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timeout)
    try:
        yield World(rank, size, chosen)
    finally:
        dist.destroy_process_group()
