"""Writing files: whole or not at all, under names that are free."""

import contextlib
import errno
import os
import secrets
import sys
import tempfile
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


@contextlib.contextmanager
def run_folder(output: Path | None, verb: str) -> Iterator[Path]:
    """The folder for what a command writes: `output`, or by default a new ``runs/<verb>-N``.

    It is made when the block is entered, before any work, and removed if the block fails and nothing was
    written.

    Raises:
        OSError: it cannot be made or written to; see `make_folder`.
    """
    above = [] if output is None else [output, *output.parents]
    made = [folder for folder in above or [Path("runs")] if not os.path.lexists(folder)]
    folder = new_run_folder(verb) if output is None else make_folder(output)
    try:
        yield folder
    except BaseException:
        with contextlib.suppress(OSError):  # others have written there
            for each in made if output is not None else [folder, *made]:
                each.rmdir()
        raise


def new_run_folder(verb: str) -> Path:
    """Make ``runs/<verb>-N``, with the first N that is free, in the current folder.

    Raises:
        OSError: see `make_folder`.
    """
    runs, number = make_folder(Path("runs")), 1
    while True:
        folder = runs / f"{verb}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def make_folder(folder: Path) -> Path:
    """Make a folder, and those above it, if it is not there; and try that files can be written in it.

    Raises:
        OSError: with what is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = _obstacle(folder) or getattr(error, "strerror", None) or str(error)
        raise OSError(
            f"cannot write to the folder {folder}: {reason}; mend that, or choose another with --output"
        ) from error
    return folder


def _obstacle(folder: Path) -> str:
    """What is in the place of a folder, or of one above it; empty where it is something else."""
    for path in (folder, *folder.parents):
        with contextlib.suppress(OSError, ValueError):
            if path.is_symlink() and not path.exists():
                return f"{path} is a link to {os.readlink(path)}, which is not there"
            if path.exists():
                return "" if path.is_dir() else f"{path} is a file"
    return ""
