"""Threads that work ahead of their caller, beside it, or behind it.

Items and results are waited for in a SimpleQueue, which can be interrupted at any moment: a KeyboardInterrupt
while one waits for a lock, a condition or a future can leave it taken, and its thread stuck.
"""

import atexit
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_PATIENCE = 3.0  # seconds that are waited for the end of what a thread is at, where no more is wanted


def ahead(
    items: Iterator[T], most: int, on_drop: Callable[[T], object] | None = None
) -> Generator[T, None, None]:
    """The items of an iterator, which goes on in a thread while they are used.

    Args:
        items: to be gone through; closed in its thread when this ends, however that comes.
        most: how many may be waiting.
        on_drop: if given, the thread never waits: where there are too many, it takes the oldest away and
            calls this with it.
    """
    thread = _Ahead(items, most, on_drop)
    try:
        yield from thread
    finally:
        thread.stop()
        thread.join(time.monotonic() + _PATIENCE)


class _Ahead(Generic[T]):
    def __init__(self, items: Iterator[T], most: int, on_drop: Callable[[T], object] | None) -> None:
        self._items, self._on_drop, self._process = items, on_drop, os.getpid()
        self._room: SimpleQueue[None] = SimpleQueue()
        self._ready: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()
        self._stopped = False
        for _ in range(most):
            self._room.put(None)
        self._thread = threading.Thread(target=self._work, name="ssd-ahead", daemon=True)
        self._thread.start()
        _running.add(self)

    def __iter__(self) -> Iterator[T]:
        while True:
            require_process(self._process)
            item = self._ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            self._room.put(None)
            yield item[0]
            del item  # a frame is large

    def _work(self) -> None:
        try:
            for item in self._items:
                self._make_room()
                if self._stopped:
                    break
                self._ready.put((item,))
                del item
            self._close()
            self._ready.put(None)
        except BaseException as error:
            self._close()
            self._ready.put(error)

    def _make_room(self) -> None:
        if self._on_drop is not None:
            with suppress(Empty):
                self._room.get_nowait()
                return
            with suppress(Empty):
                oldest = self._ready.get_nowait()
                assert isinstance(oldest, tuple)  # nothing comes after what else there is
                self._on_drop(oldest[0])
                return
        self._room.get()

    def _close(self) -> None:
        if isinstance(self._items, Generator):
            with suppress(Exception):
                self._items.close()

    def stop(self) -> None:
        """Have the thread end after what it does."""
        self._stopped = True
        self._room.put(None)

    def join(self, end: float) -> None:
        """Wait for its end, not longer than until a time of `time.monotonic`."""
        _join(self._thread, end)


class Behind:
    """Has a thread of its own do one thing after another, while one goes on.

    Args:
        do: with each thing. Once this raised an error, nothing more is done.
        most: how many things may be waiting.
    """

    def __init__(self, do: Callable[[T], object], most: int) -> None:
        self._room: SimpleQueue[None] = SimpleQueue()
        self._tasks: SimpleQueue[tuple[Any] | None] = SimpleQueue()
        self._over: SimpleQueue[None] = SimpleQueue()
        self.error: BaseException | None = None
        """What ended it early."""
        for _ in range(most):
            self._room.put(None)
        self._thread = threading.Thread(target=self._work, args=(do,), name="ssd-behind", daemon=True)
        self._thread.start()
        _running.add(self)

    def put(self, item: object) -> None:
        """Have this done next; waits where too many are waiting."""
        self._room.get()
        self._tasks.put((item,))

    def end(self) -> None:
        """Wait until all is done, or has failed."""
        self.stop()
        self._over.get()
        self._over.put(None)

    def _work(self, do: Callable[[Any], object]) -> None:
        while (task := self._tasks.get()) is not None:
            if self.error is None:
                try:
                    do(*task)
                except BaseException as error:
                    self.error = error
            del task  # a picture is large
            self._room.put(None)
        self._over.put(None)

    def stop(self) -> None:
        """Have the thread end after what it has to do."""
        self._tasks.put(None)

    def join(self, end: float) -> None:
        """Wait for its end, not longer than until a time of `time.monotonic`."""
        _join(self._thread, end)


class Outcome(SimpleQueue[T | BaseException]):
    """What a function in another thread gave or raised, to `get` once."""


class Readers:
    """Threads that do tasks, of which any may never end, such as reading from a pipe.

    Not those of an executor, for which Python's exit waits without an end.

    Args:
        most: how many threads.
    """

    def __init__(self, most: int) -> None:
        self._most, self._threads = most, list[threading.Thread]()
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        _running.add(self)

    def submit(self, task: Callable[[], None]) -> None:
        """Have it called in one of the threads."""
        self._tasks.put(task)
        if len(self._threads) < self._most:
            thread = threading.Thread(target=self._work, name="ssd-read", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # and the image that it holds

    def shutdown(self, *, wait: bool) -> None:
        """End the threads after all tasks; without waiting, after their present ones."""
        if not wait:
            self.stop()
            return
        self._end()
        self.join()

    def stop(self) -> None:
        """Have the threads end after their present tasks."""
        with suppress(Empty):
            while True:
                self._tasks.get_nowait()
        self._end()

    def _end(self) -> None:
        for _ in self._threads:
            self._tasks.put(None)

    def join(self, end: float = math.inf) -> None:
        """Wait for the threads' end, not longer than until a time of `time.monotonic`."""
        for thread in self._threads:
            _join(thread, end)


def submit(
    pool: "ThreadPoolExecutor | Readers", function: Callable[..., T], *args: Any, **options: Any
) -> Outcome[T]:
    """Have a function called in a thread of a pool."""
    outcome: Outcome[T] = Outcome()

    def run() -> None:
        try:
            outcome.put(function(*args, **options))
        except BaseException as error:
            outcome.put(error)

    pool.submit(run)
    return outcome


def require_process(number: int) -> None:
    """Refuse to go on in another process than that of this number.

    Raises:
        RuntimeError: this one was forked from it.
    """
    if os.getpid() != number:
        raise RuntimeError(
            "this stream was begun in the process that this one was forked from, and its threads are not "
            "here; begin it anew"
        )


def _join(thread: threading.Thread, end: float) -> None:
    thread.join(None if end == math.inf else max(0, end - time.monotonic()))


_running: "weakref.WeakSet[_Ahead[Any] | Behind | Readers]" = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    """One that came back from a decoder or from torch when Python is gone could abort the process."""
    end = time.monotonic() + _PATIENCE
    with suppress(KeyboardInterrupt):
        for each in list(_running):
            each.stop()
        for each in list(_running):
            each.join(end)
