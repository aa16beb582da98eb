"""A disk that fails: the n-th call of a kind, below a folder, in this process."""

import builtins
import errno
import io
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHORT = 0
"""In place of an error: a write that writes half, and says so."""

_EVENTS = {
    "os.rename": "rename",
    "os.link": "link",
    "os.mkdir": "mkdir",
    "os.remove": "remove",
    "os.rmdir": "remove",
}
"""Of `sys.addaudithook`, which sees them whoever calls, C code too."""

KINDS = ("open", "write", "fsync", "rename", "link", "mkdir", "remove")


class Disk:
    """Fails one call.

    Args:
        folder: below which calls count.
        kind: one of `KINDS`; "open" is of opening for writing.
        number: of the call that fails, counted from 0.
        error: its errno, or SHORT.
        lasting: whether all later ones of the kind fail too, as on a disk that is full.
    """

    def __init__(self, folder: Path, kind: str, number: int, error: int, *, lasting: bool = False) -> None:
        self.folder, self.kind, self.number = os.path.realpath(folder), kind, number
        self.error, self.lasting = error, lasting
        self.calls: list[str] = []

    @property
    def has_failed(self) -> bool:
        return len(self.calls) > self.number

    def call(self, kind: str, path: object) -> bool:
        """Count a call; raises the error, or says that the write is to be short."""
        if kind != self.kind or not isinstance(path, str | bytes | os.PathLike):
            return False
        name = os.path.abspath(os.fsdecode(path))
        if not name.startswith(self.folder):
            return False
        self.calls.append(name)
        count = len(self.calls) - 1
        if not (count == self.number or (self.lasting and count > self.number)):
            return False
        if self.error == SHORT:
            return True
        raise OSError(self.error, os.strerror(self.error), name if kind != "write" else None)


_disk: Disk | None = None
_hooks: list[object] = []


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _disk is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            _disk.call("open", path)
    elif event in _EVENTS:
        _disk.call(_EVENTS[event], arguments[0])


_write, _fsync, _open = os.write, os.fsync, io.open


def _faulty_write(descriptor: int, content: object) -> int:
    if _disk and stat.S_ISREG(os.fstat(descriptor).st_mode) and _disk.call("write", _disk.folder):
        content = memoryview(content)[: max(1, len(memoryview(content)) // 2)]
    return _write(descriptor, content)


def _faulty_fsync(descriptor: int) -> None:
    if _disk:
        _disk.call("fsync", _disk.folder)
    _fsync(descriptor)


class _Raw(io.FileIO):
    def write(self, content: object) -> int:
        if _disk and _disk.call("write", self.name):
            content = memoryview(content)[: max(1, len(memoryview(content)) // 2)]
        return super().write(content)


def _faulty_open(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *rest, **more):
    inside = (
        _disk
        and not isinstance(file, int)
        and not more.get("opener")  # as tempfile's
        and os.path.abspath(os.fsdecode(file)).startswith(_disk.folder)
        and set(mode) & set("wxa+")
    )
    if not inside:
        return _open(file, mode, buffering, encoding, errors, newline, *rest, **more)
    raw = _Raw(os.fspath(file), mode.replace("b", "").replace("t", ""))
    buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)


@contextmanager
def failing(disk: Disk) -> Iterator[Disk]:
    """Within the block, the disk is this one."""
    global _disk  # noqa: PLW0603 (what is patched is the process's too)
    if not _hooks:
        sys.addaudithook(_audit)  # for good; it does nothing outside of such blocks
        _hooks.append(_audit)
    by_kernel = getattr(shutil, "_USE_CP_SENDFILE", None)
    os.write, os.fsync, io.open, builtins.open = _faulty_write, _faulty_fsync, _faulty_open, _faulty_open
    if by_kernel:
        shutil._USE_CP_SENDFILE = False
    _disk = disk
    try:
        yield disk
    finally:
        _disk = None
        os.write, os.fsync, io.open, builtins.open = _write, _fsync, _open, _open
        if by_kernel:
            shutil._USE_CP_SENDFILE = by_kernel


QUICK = [
    ("write", SHORT, False),
    ("write", errno.ENOSPC, True),
    ("open", errno.EACCES, False),
    ("fsync", errno.EIO, False),
    ("rename", errno.EIO, False),
    ("link", errno.ENOSPC, False),
    ("link", errno.EPERM, True),
    ("mkdir", errno.ENOSPC, True),
]
"""What to try of each command; "link" with EPERM is a disk without hard links."""

ALL = [
    (kind, error, lasting)
    for kind in KINDS
    for error in (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EINTR, *([SHORT] if kind == "write" else []))
    for lasting in (False, True)
    if not (lasting and error in (SHORT, errno.EINTR))  # which are there to be tried again
]
