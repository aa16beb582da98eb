"""Writing files: whole or not at all, under names that are free.

What is being written lies beside its place, as ``NAME.<8 hex digits>.tmp``, a file or a folder, with a lock
on it for as long as its process lives. The next one that writes NAME removes those without. Where a file
system has no hard links, a new name is first taken by an empty file.
"""

import contextlib
import errno
import io
import itertools
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

if sys.platform != "win32":  # which needs no locks: what is open there cannot be removed
    import fcntl

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SYNCED_BY_ITSELF = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)
"""What is said of folders on file systems that do not know fsync for them, or that may not be read."""

_RECENT = 3600.0  # seconds

_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What file systems say that have no hard links."""


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write that takes its name when the block ends, durably, and vanishes if it fails.

    It has no descriptor: libraries that write to that do not all look at how much was written.

    Raises:
        OSError: it cannot be written; the message says why, and what became of it.
    """
    path = Path(os.path.realpath(path))  # a link stays, and so does what it leads to for others
    mode = mode_of(path)
    clear_leftovers(path.parent, re.escape(_short(path.name)))
    with draft(path) as new:
        new.allow(mode)
        file = io.BufferedRandom(new)
        yield file
        file.flush()
        new.finish()
        with writing(path):
            os.replace(new.path, path)
    try:
        _sync_folder(path.parent)
    except OSError as error:
        what = f"{path.name} is written, but may be gone after a power failure"
        raise OSError(error.errno, f"{what} ({error.strerror} in its folder)", str(path)) from error


def write_file(path: str | os.PathLike[str], content: "ReadableBuffer") -> None:
    """Write a file by way of `atomic_file`.

    Raises:
        OSError: see there.
    """
    with atomic_file(path) as file:
        file.write(content)


def write_new(contents: Mapping[Path, "ReadableBuffer"]) -> None:
    """Write files under names that nothing has yet: all of them, or none; see `clear_leftovers`.

    Args:
        contents: by path; folders that are missing are made.

    Raises:
        FileExistsError: there is something under one of the names.
        OSError: one cannot be written; the message says which.
    """
    made = [folder for folder in {path.parent: None for path in contents} if not os.path.lexists(folder)]
    with contextlib.ExitStack() as stack:
        try:
            for folder in made:
                with writing(folder):
                    folder.mkdir(exist_ok=True)
            drafts = [stack.enter_context(draft(path)) for path in contents]
            for new, content in zip(drafts, contents.values(), strict=True):
                new.put(0, content)
                new.finish()
            if drafts:
                take_new([(new.path, path) for new, path in zip(drafts, contents, strict=True)])
        except BaseException:
            stack.close()
            for folder in reversed(made):
                with contextlib.suppress(OSError):  # others have written there
                    folder.rmdir()
            raise


def write_free(contents: Mapping[Path, "ReadableBuffer"]) -> list[Path]:
    """Write files that belong together: all of them, or none, under the first number that all have free.

    Args:
        contents: by path; where something has one of these names, all are called ``name-2.suffix`` and on.

    Returns:
        The paths.

    Raises:
        OSError: one cannot be written; the message says which.
    """
    for path in contents:
        clear_leftovers(path.parent, rf"{re.escape(_short(path.stem))}.*")
    for paths in zip(*map(numbered, contents), strict=True):
        if not any(map(os.path.lexists, paths)):
            with contextlib.suppress(FileExistsError):  # another process was faster
                write_new(dict(zip(paths, contents.values(), strict=True)))
                return list(paths)
    raise AssertionError  # mypy does not know that numbers do not end


def numbered(path: Path) -> Iterator[Path]:
    """The path, then ``name-2.suffix`` and on."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


# --- Drafts -----------------------------------------------------------------------------------------------


class Draft(io.FileIO):
    """A file that has not got its name yet; errors of writing it name what it is to become."""

    def __init__(self, path: Path, target: Path) -> None:
        super().__init__(os.fspath(path), "x+")
        self.path, self.target = path, target

    def fileno(self) -> int:
        """Not for others, which would write past `write`."""
        raise io.UnsupportedOperation("a draft has no descriptor")

    def write(self, content: "ReadableBuffer", /) -> int:
        """Write as much as goes; its number of bytes."""
        with writing(self.target):
            return os.write(super().fileno(), content)

    def put(self, position: int, content: "ReadableBuffer") -> None:
        """Write all of this from a position on, which is where the file then ends."""
        rest = memoryview(content).cast("B")
        self.seek(position)
        while rest:
            rest = rest[self.write(rest) :]
        self.truncate()

    def unlock(self) -> None:
        """Let go of the lock, which on SMB keeps others from reading; for writers that take turns anyway."""
        if sys.platform != "win32":
            with contextlib.suppress(OSError):
                fcntl.flock(super().fileno(), fcntl.LOCK_UN)

    def finish(self) -> None:
        """See that the content is on the disk."""
        with writing(self.target):
            os.fsync(super().fileno())
        if sys.platform == "win32":  # where what is open cannot be renamed
            self.close()

    def allow(self, mode: int | None) -> None:
        """Give it the permissions of the file that it replaces, as far as that goes."""
        if mode is not None and sys.platform != "win32":
            with contextlib.suppress(OSError):
                os.fchmod(super().fileno(), mode)

    def take_free(self) -> Path:
        """Take the first number of the name that is free; returns the path."""
        for path in numbered(self.target):
            if not os.path.lexists(path):
                with contextlib.suppress(FileExistsError):  # another process was faster
                    take_new([(self.path, path)])
                    return path
        raise AssertionError

    def is_ours(self) -> bool:
        """Whether it is locked and there; where locks are unknown, it is taken for that."""
        return _lock(super().fileno(), self.path) is not False


@contextlib.contextmanager
def draft(path: Path) -> Iterator[Draft]:
    """A new file beside a path, which vanishes when the block ends, unless it took another name.

    Raises:
        OSError: it cannot be made.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}")
    with writing(path):
        new = Draft(_temporary(path), path)
        while not new.is_ours():  # it was taken for a dead one's before it was locked
            new.close()
            new = Draft(_temporary(path), path)
    try:
        yield new
    finally:
        with contextlib.suppress(OSError):
            new.close()
        with contextlib.suppress(OSError):
            os.unlink(new.path)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A new folder beside a path, for what is to be moved there; it goes with the block.

    Raises:
        OSError: it cannot be made.
    """
    clear_leftovers(path.parent, re.escape(_short(path.name) or "new"))
    descriptor = None
    with writing(path):
        while True:
            folder = _temporary(path)
            folder.mkdir()
            if sys.platform == "win32":
                break
            with contextlib.suppress(FileNotFoundError):  # taken for a dead one's before it was locked
                descriptor = os.open(folder, os.O_RDONLY)
                if _lock(descriptor, folder) is not False:
                    break
                os.close(descriptor)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.parent / f"{_short(path.name) or 'new'}.{secrets.token_hex(4)}.tmp"


def _short(name: str) -> str:
    """As much of a name as leaves room for what makes it that of a draft."""
    return os.fsencode(name)[: 255 - len(".01234567.tmp")].decode(errors="ignore")


def mode_of(path: Path) -> int | None:
    """The permissions of a file; None if there is none.

    Raises:
        OSError: there is a device, a pipe or a socket.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        what = "a device or pipe, not a file to be replaced; nothing was written"
        raise OSError(errno.EINVAL, what, str(path))
    return stat.S_IMODE(status.st_mode)


def clear_leftovers(folder: Path, names: str = ".*") -> None:
    """Remove what killed processes left half written in a folder; what is being written stays.

    Where the file system has no locks, nothing is known of these, and all stay; on Windows files go that are
    an hour old.

    Args:
        folder: to look in.
        names: a regular expression of the names that were to be written.
    """
    pattern = re.compile(rf"(?:{names})\.[0-9a-f]{{8}}\.tmp", re.DOTALL)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in [each for each in entries if pattern.fullmatch(each.name)]:
            with contextlib.suppress(OSError):
                if sys.platform == "win32" and time.time() - entry.stat().st_mtime < _RECENT:
                    continue  # it is closed before it is renamed
                if entry.is_file(follow_symlinks=False):
                    _remove_unlocked(Path(entry.path), os.O_RDWR)  # NFS wants that for its locks
                elif entry.is_dir(follow_symlinks=False) and sys.platform != "win32":
                    _remove_unlocked(Path(entry.path), os.O_RDONLY)


def _remove_unlocked(path: Path, flags: int) -> None:
    if sys.platform == "win32":
        path.unlink()
        return
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if _lock(descriptor, path):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool | None:
    """Lock what is open, for as long as it is: True; False if another has it, or it is gone from its path.

    None: there are no locks here.
    """
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Some network file systems give a file another inode each time that they are asked.
        return os.path.samestat(os.fstat(descriptor), os.lstat(path)) or None
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:
        return None


# --- Taking names -----------------------------------------------------------------------------------------


def take_new(moves: Sequence[tuple[Path, Path]]) -> None:
    """Give whole files and folders their names, durably: all of them, or none.

    Args:
        moves: from where, to where, on one disk; a folder that is there and empty is taken.

    Raises:
        FileExistsError: there is something under one of the names.
        OSError: one cannot be renamed.
    """
    ours = [(os.lstat(source), path) for source, path in moves]
    for_message = moves[0][1]
    try:
        try:
            for source, for_message in moves:
                _take(source, for_message)
            for folder in {path.parent: None for _, path in moves}:
                _sync_folder(folder)
        except BaseException:
            for status, path in reversed(ours):
                with contextlib.suppress(OSError):
                    if os.path.samestat(status, os.lstat(path)):
                        shutil.rmtree(path) if path.is_dir() else os.unlink(path)
            raise
    except FileExistsError:
        raise
    except OSError as error:
        raise _told(error, for_message) from error


def _take(source: Path, path: Path) -> None:
    """Give a file or folder a name that nothing has; of a file, the earlier name may stay."""
    try:
        if sys.platform == "win32" or source.is_dir():
            os.rename(source, path)
            return
        try:
            os.link(source, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            try:
                os.replace(source, path)
            except BaseException:
                os.unlink(path)
                raise
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(f"{path} exists already; nothing was overwritten") from error
        raise


def replace_together(source: Path, target: Path, names: Sequence[str]) -> None:
    """Move files from a folder into another on the same disk, over those of their names: all or none.

    Args:
        source: the folder, which is new; it goes on to hold the earlier files.
        target: the other one, made if it is not there.
        names: of the files. The first is the one by which the others are found: it is gone while they are
            moved, so that a process that is killed leaves no mixture behind.

    Raises:
        OSError: one cannot be moved.
    """
    made = not os.path.lexists(target)
    done: list[tuple[Path, Path]] = []
    (source / "earlier").mkdir()
    target.mkdir(exist_ok=True)
    try:
        with _alone(target):
            away = [(target / name, source / "earlier" / name) for name in names]
            here = [(source / name, target / name) for name in reversed(names)]
            for before, after in [*(each for each in away if os.path.lexists(each[0])), *here]:
                os.replace(before, after)
                done.append((before, after))
    except BaseException:
        for before, after in reversed(done):
            shutil.move(after, before)  # which copies where it cannot rename
        if made:
            with contextlib.suppress(OSError):
                target.rmdir()
        raise
    _sync_folder(target)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within the block no other process is in such a block for this folder, where there are locks."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """See that the content of a file is on the disk.

    Raises:
        OSError: it could not be written.
    """
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """See that the names in a folder are on the disk."""
    if sys.platform == "win32":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _SYNCED_BY_ITSELF:
            raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Where a file cannot be written within the block, say which, and what became of it.

    Raises:
        OSError: with that message; of the same class, and a FileExistsError as it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, FileExistsError):
            raise
        raise _told(error, path) from error


def _told(error: OSError, path: Path) -> OSError:
    full = error.errno in _FULL
    reason = "No space left on the disk for" if full else f"{error.strerror or error} in writing"
    what = "the earlier one is whole" if os.path.lexists(path) else "nothing is left of it"
    return OSError(error.errno, f"{reason} {path.name}; {what}", str(path))


# --- Folders ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def run_folder(output: Path | None, verb: str) -> Iterator[Path]:
    """The folder for what a command writes: `output`, or by default a new ``runs/<verb>-N``.

    It is made when the block is entered, before any work, and removed if the block fails and nothing was
    written.

    Raises:
        OSError: it cannot be made or written to; see `make_folder`.
    """
    with gone_if_unused(Path("runs") if output is None else output):
        folder = new_run_folder(verb) if output is None else make_folder(output)
        try:
            yield folder
        except BaseException:
            if output is None:
                with contextlib.suppress(OSError):  # something was written
                    folder.rmdir()
            raise


@contextlib.contextmanager
def gone_if_unused(folder: Path) -> Iterator[None]:
    """If the block fails, a folder that it made, and those above, are removed unless something is in them."""
    made = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # others have written there
            for each in made:
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
