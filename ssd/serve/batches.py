"""Detection for many callers at a time: images that wait go through the network together."""

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from ssd.backends import Options
from ssd.detections import Detections
from ssd.detector import Detector, Input, Reading
from ssd.images import MAX_BYTES, MAX_PIXELS, read_url
from ssd.sources import Named

_MAX_READERS = 8  # threads; with sixteen, fewer photos a second are read (docs/performance.md)
_FETCHERS = 8  # threads, which wait for other servers most of the time


class Busy(Exception):
    """As many images as may be under way are so already."""


@dataclass
class Counts:
    """What was done since the start."""

    images: int = 0
    batches: int = 0
    reading: float = 0.0
    """Seconds, of all threads."""
    detecting: float = 0.0
    """Seconds."""


@dataclass(eq=False)
class _Job:
    name: str
    content: bytes | str
    """Of an image file; or its URL."""
    options: Options
    future: "Future[Detections]" = field(default_factory=Future)
    input: Input | None = None


class Batches:
    """A detector with a queue: threads read images, and one detects on those that are ready, in batches.

    Images of a batch have the same options. While others are still being read, a batch that is not full
    waits for them, but not for long.

    Args:
        detector: of any backend.
        batch_size: most images in the network at a time.
        max_wait: most seconds that an image waits for a batch to fill.
        most: images that may be under way; those that come then are refused.
        max_pixels: see `ssd.load_image`.
        max_bytes: most that are read from a URL.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        batch_size: int = 8,
        max_wait: float = 0.01,
        most: int = 64,
        max_pixels: int = MAX_PIXELS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.detector, self.batch_size, self.most = detector, batch_size, most
        self.counts = Counts()
        self.under_way = 0
        self._max_wait, self._max_bytes, self._how = max_wait, max_bytes, Reading(max_pixels)
        self._reading = 0
        self._ready: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._readers = ThreadPoolExecutor(min(_MAX_READERS, os.cpu_count() or 1), "ssd-read")
        self._fetchers = ThreadPoolExecutor(_FETCHERS, "ssd-fetch")
        self._worker = ThreadPoolExecutor(1, "ssd-detect")

    def submit(
        self, images: Sequence[tuple[str, bytes | str]], options: Options
    ) -> "list[Future[Detections]]":
        """Have objects detected in images, all of which are taken or none.

        A future that is cancelled leaves the queue, unless its image is in the network already. What a future
        raises is what reading and detecting raise, and concerns its image alone.

        Args:
            images: of each its name for results and errors, and the content of its file, or an http(s) URL.
            options: of `Detector.options`.

        Raises:
            Busy: there is no room for them.
        """
        jobs = [_Job(name, content, options) for name, content in images]
        with self._changed:
            if self.under_way + len(jobs) > self.most:
                raise Busy
            self.under_way += len(jobs)
        for job in jobs:
            if isinstance(job.content, str):
                self._fetchers.submit(self._fetch, job)
            else:
                self._begin(job)
        return [job.future for job in jobs]

    def close(self) -> None:
        """End the threads, after all that is under way."""
        for each in (self._fetchers, self._readers, self._worker):
            each.shutdown()

    def _begin(self, job: _Job) -> None:
        with self._changed:
            self._reading += 1
        self._readers.submit(self._read, job)

    def _fetch(self, job: _Job) -> None:
        try:
            assert isinstance(job.content, str)
            if not job.future.cancelled():
                job.content = read_url(
                    job.content,
                    max_bytes=self._max_bytes,
                    public_only=True,
                    is_wanted=lambda: not job.future.cancelled(),
                )
        except BaseException as error:
            self._end(job, error)
        else:
            self._begin(job)

    def _read(self, job: _Job) -> None:
        start, problem = time.perf_counter(), None
        try:
            if not job.future.cancelled():
                job.input = self.detector.read(Named(job.name, job.content), how=self._how)
        except BaseException as error:
            problem = error
        with self._changed:
            self._reading -= 1
            self.counts.reading += time.perf_counter() - start
            if job.input is not None:
                self._ready.append(job)
            self._changed.notify_all()
        if job.input is None:
            self._end(job, problem)
        else:
            self._worker.submit(self._work)

    def _work(self) -> None:
        """Detect on the images that are ready, if those before have left any."""
        batch = self._next()
        wanted = [job for job in batch if job.future.set_running_or_notify_cancel()]
        start = time.perf_counter()
        self._detect(wanted)
        with self._changed:
            self.counts.detecting += time.perf_counter() - start
            self.counts.images += len(wanted)
            self.counts.batches += bool(wanted)
        for job in set(batch) - set(wanted):
            self._end(job)

    def _next(self) -> list[_Job]:
        with self._changed:
            end = time.monotonic() + self._max_wait
            while (
                0 < len(batch := self._alike()) < self.batch_size
                and self._reading
                and (left := end - time.monotonic()) > 0
            ):
                self._changed.wait(left)
            for job in batch:
                self._ready.remove(job)
            return batch

    def _alike(self) -> list[_Job]:
        return [job for job in self._ready if job.options == self._ready[0].options][: self.batch_size]

    def _detect(self, jobs: list[_Job]) -> None:
        try:
            found = (
                self.detector.detect([job.input for job in jobs if job.input], jobs[0].options)
                if jobs
                else []
            )
        except BaseException as error:
            if len(jobs) == 1:
                self._end(jobs[0], error)
                return
            for job in jobs:  # whichever it was: it is not to cost the others
                self._detect([job])
        else:
            for job, result in zip(jobs, found, strict=True):
                self._end(job, result)

    def _end(self, job: _Job, outcome: Detections | BaseException | None = None) -> None:
        with self._changed:
            self.under_way -= 1
        if outcome is None or not (job.future.running() or job.future.set_running_or_notify_cancel()):
            return
        if isinstance(outcome, BaseException):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)
