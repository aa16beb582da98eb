"""Images at full size: where one can be read again, and how many pixels are in memory at a time."""

import contextlib
import io
import os
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import IO, cast

from PIL import Image

from ssd.errors import ImageError
from ssd.images import MAX_PIXELS, ImageSource, load_image


class Room:
    """Room for a number of pixels, which threads take and give back; who comes first is served first.

    An image that is larger than all of the room waits until it is alone.

    Args:
        pixels: that may be in memory at a time.
    """

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels
        self.reset()

    def reset(self) -> None:
        """All is free again, as in a forked process, where the threads that had taken some are not."""
        self._free = self.pixels
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, SimpleQueue[None]]] = deque()

    @contextlib.contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Wait for room, and have it within the block."""
        # Not a semaphore or a condition: a KeyboardInterrupt while waiting for one can leave its lock taken.
        ticket = min(pixels, self.pixels), SimpleQueue[None]()
        try:
            with self._lock:
                self._waiting.append(ticket)
                self._admit()
            ticket[1].get()
            yield
        finally:
            with self._lock:
                if ticket in self._waiting:  # interrupted
                    self._waiting.remove(ticket)
                else:
                    self._free += ticket[0]
                self._admit()

    def _admit(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            pixels, admitted = self._waiting.popleft()
            self._free -= pixels
            admitted.put(None)


DECODED = Room(64_000_000)
"""For images that detectors read and results draw, in this process: a quarter of a gigabyte as Pillow keeps
them. One of 50 megapixels at a time, or five of 12."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=DECODED.reset)


@dataclass(frozen=True)
class Original:
    """Where an image can be read again, so that its pixels need not be kept."""

    file: str | bytes
    """Its absolute path; or all of a file that has none, compressed as it came."""
    state: tuple[int, int] | None
    """Of the file at the path: its bytes, and when it was changed, in nanoseconds."""
    name: str
    """What errors call it."""
    size: tuple[int, int]
    """Width and height of the upright image."""
    max_pixels: int = MAX_PIXELS
    """See `ssd.load_image`."""
    opened: str = ""
    """The absolute path of a file that was given open."""

    @property
    def path(self) -> str:
        """The file on the disk, which a picture must not replace; empty if there is none."""
        return self.file if isinstance(self.file, str) else self.opened

    @property
    def pixels(self) -> int:
        """How many it has."""
        return self.size[0] * self.size[1]

    def read(self) -> Image.Image:
        """The upright RGB image, anew.

        Raises:
            ImageError: the file is gone, or another one than before.
        """
        if isinstance(self.file, str):
            try:
                state = _state(os.stat(self.file))
            except OSError as error:
                raise ImageError(f"{self.name}: cannot be read again ({error.strerror}); {_KEEP}") from error
            if state != self.state:
                raise ImageError(f"{self.name}: was changed since objects were detected in it; {_KEEP}")
        return load_image(self.file, name=self.name, max_pixels=self.max_pixels)


_KEEP = "results keep no pixels of a file, and read it again to draw; detect in it anew, or draw earlier"


def origin(source: ImageSource, file: IO[bytes]) -> tuple[str | bytes, tuple[int, int] | None]:
    """`file` and `state` of the `Original` of an image source that was opened as a file."""
    if isinstance(file, io.BytesIO):  # of a URL, or given as bytes or as a file
        return file.getvalue(), None
    return os.path.abspath(os.fsdecode(cast(str, source))), _state(os.fstat(file.fileno()))


def opened_path(source: object) -> str:
    """The absolute path of an open file; empty where there is none."""
    name = getattr(source, "name", None)
    return os.path.abspath(name) if isinstance(name, str) and os.path.isfile(name) else ""


def _state(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns
