"""Writing files: whole or not at all, under names that are free."""

import contextlib
import errno
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], suffix: str = ".tmp") -> Iterator[IO[bytes]]:
    """A file to write that takes its name when the block ends, durably, and vanishes if it fails.

    Raises:
        OSError: it cannot be written; where the disk is full, the message says so.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}")
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{suffix}")
    with full_disk_told(path):
        try:
            with temporary.open("x+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    if sys.platform != "win32":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def full_disk_told(path: Path) -> Iterator[None]:
    """Where the disk gets full within the block, which writes `path`, say so and what became of it.

    Raises:
        OSError: with that message.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        what = "the earlier one is whole" if path.exists() else "nothing is left of it"
        raise OSError(error.errno, f"No space left on the disk for {path.name}; {what}", str(path)) from error


def free_path(path: Path) -> Path:
    """The path, or if it exists the first of ``name-2.suffix`` and on that does not."""
    candidate, number = path, 2
    while os.path.lexists(candidate):
        candidate, number = path.with_name(f"{path.stem}-{number}{path.suffix}"), number + 1
    return candidate


def new_run_folder(verb: str) -> Path:
    """Make ``runs/<verb>-N``, with the first N that is free, in the current folder."""
    number = 1
    while True:
        folder = Path("runs") / f"{verb}-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder
