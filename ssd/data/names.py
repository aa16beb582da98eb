"""What names in a dataset's files stand for: files within its folders, also by names of other machines."""

import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from ssd.errors import as_line

_URL = re.compile(r"[a-z][a-z0-9+.-]+:/+", re.IGNORECASE)  # two letters or more: one is a drive
_DRIVE = re.compile(r"[a-z]:/", re.IGNORECASE)
_SERVED = re.compile(r"/data/local-files/?\?(?:.*&)?d=([^&#]*)")  # Label Studio's way to files of its machine
_UPLOADED = re.compile(r"^[0-9a-f]{8}-(?=.)")  # what Label Studio puts before the name of an uploaded file

_MOST_TOLD = 5
_MOST_SHOWN = 200  # characters of a name that is no file's
_LONGEST = 4096  # characters of a name: systems have no longer path, and URLs are mostly shorter


class Found(NamedTuple):
    """What a written name stands for."""

    name: str
    """The file, relative to the folder, with "/". If there is none, what was written, for messages."""
    why: str = ""
    """Why no file can be told; empty where one was found, and where the name is that of one within the folder
    that is not there."""
    guessed: bool = False
    """Whether it was found by the last parts of the name, or by another spelling of it."""


class ImageFolder:
    """A folder of images, in which names of other machines are found again.

    A name stands for the file that it names within the folder; else for the one that most of its last parts
    fit, if that is one only. Links within the folder are followed. See `within` for files outside.

    Args:
        root: the folder; it need not exist.
        follow: whether a name may lead out of it.
    """

    def __init__(self, root: Path, *, follow: bool = False) -> None:
        self.root, self.follow = root, follow
        self._own = list(Path(os.path.abspath(root)).parts[1:])
        self._folders: dict[str, frozenset[str]] = {}
        self._files: list[str] | None = None
        self._by_whole: dict[str, list[str]] = {}
        self._by_last: list[dict[str, list[str]]] = []
        self._folder_names: set[str] = set()

    def find(self, written: str) -> Found:
        """The file that a name stands for.

        Separators of any system, absolute paths, drive letters, "..", URLs and percent-encoding are
        understood. Where no file is spelled so, letter case, then Unicode's ways to write one letter, then
        percent-encoding are not told apart.
        """
        shown = as_line(written, _MOST_SHOWN)
        if len(written) > _LONGEST:
            return Found(shown, f"names a file elsewhere: no path has {len(written):,} characters")
        exact = self.find_as_written(written)
        if exact is not None:
            return Found(exact)
        parts = written_parts(written)
        inside = within(parts)
        wanted = [part for part in named_parts(parts) if part]
        if not wanted:
            return Found(shown, "the name is empty")
        found = [file for file in self._fitting(wanted) if not self._is_of_another_folder(file, wanted)]
        if len(found) == 1:
            whole = [*self._own, *found[0].split("/")]
            return Found(found[0], guessed=whole != wanted)
        if found:
            some = ", ".join(found[:_MOST_TOLD]) + (", ..." if len(found) > _MOST_TOLD else "")
            return Found(
                shown,
                f"{len(found)} files of {self.root} are called so: {some}; write more of the path into the "
                "name, or give the folder that is meant with --images (images=...)",
            )
        if inside and shown == written:
            return Found("/".join(inside))
        remedy = "give the folder with the images with --images (images=...)"
        if _URL.match(written):
            what = "is a URL, and no file of its last part is"
        else:
            what = "names a file elsewhere, and none of its last part is"
            remedy += ", or --follow (follow=True) if you trust this dataset to name files anywhere"
        return Found(shown, f"{what} in {self.root}; {remedy}")

    def find_as_written(self, written: str) -> str | None:
        """The file that a name stands for as it is written, with separators of any system; or None."""
        if len(written) > _LONGEST:
            return None
        for parts in (written.split("/"), written_parts(written)):
            way = within(parts)
            if way and self._holds(way):
                return "/".join(way)
        outside = "/".join(written_parts(written)) if written[:5].lower() == "file:" else written
        if self.follow and within(outside.split("/")) is None and os.path.isfile(self.root / outside):
            return outside
        return None

    def _holds(self, parts: list[str]) -> bool:
        folder = "/".join(parts[:-1])
        if folder not in self._folders:
            self._folders[folder] = frozenset(_folders_and_files(self.root / folder)[1])
        return parts[-1] in self._folders[folder]

    def _fitting(self, wanted: list[str]) -> list[str]:
        """The files that most of the last parts fit; of several, those whose spelling is closest."""
        if self._files is None:
            self._files = list(files_below(self.root))
            for file in self._files:
                self._by_whole.setdefault(loose(file), []).append(file)
            self._folder_names = {part for each in self._by_whole for part in each.split("/")[-2:-1]}
        parts = loose("/".join(wanted)).split("/")
        found = self._by_whole.get("/".join(parts), []) or self._by_last_parts(parts)
        if not found and (own := without_upload(parts[-1])) != parts[-1]:
            found = self._by_last_parts([*parts[:-1], own])
        return _closest(found, wanted)

    def _by_last_parts(self, parts: list[str]) -> list[str]:
        found: list[str] = []
        for count in range(1, len(parts) + 1):
            more = self._last(count).get("/".join(parts[-count:]), [])
            if not more:
                break
            found = more
            if len(found) == 1:
                break
        return found

    def _last(self, count: int) -> dict[str, list[str]]:
        """All files by so many of their last parts, of which the folder's own path has the first."""
        while len(self._by_last) < count:
            above = loose("/".join(self._own)).split("/") if self._own else []
            table: dict[str, list[str]] = {}
            for whole, files in self._by_whole.items():
                parts = [*above, *whole.split("/")]
                table.setdefault("/".join(parts[-len(self._by_last) - 1 :]), []).extend(files)
            self._by_last.append(table)
        return self._by_last[count - 1]

    def _is_of_another_folder(self, file: str, wanted: list[str]) -> bool:
        """Whether the folder that was written is here, and the file is in another one."""
        if len(wanted) < 2:
            return False
        written, own = loose(wanted[-2]), loose([*self._own, *file.split("/")][-2])
        return written != own and written in self._folder_names


def written_parts(written: str) -> list[str]:
    """The folders and the name that make up a path or URL of any system; an absolute one begins with ""."""
    text = written.strip()[: _LONGEST + 1]
    served = _SERVED.search(text)
    if served:
        text = unquote(served[1])
    elif url := _URL.match(text):
        is_file = text[:5].lower() == "file:"
        text = "/" + unquote(text[url.end() :] if is_file else re.split("[?#]", text[url.end() :])[0])
    text = text.replace("\\", "/")
    if _DRIVE.match(text.removeprefix("/")):  # a file's URL has a slash before the drive
        text = text.removeprefix("/")[2:]
    return text.split("/")


def loose(name: str) -> str:
    """What two spellings of one name have in common."""
    return _composed(unquote(name, errors="surrogateescape").replace("\\", "/"))


def without_upload(name: str) -> str:
    """The name that a file had before Label Studio put eight digits before it.

    >>> without_upload("0a1b2c3d-photo.jpg")
    'photo.jpg'
    """
    return _UPLOADED.sub("", name)


def files_below(folder: Path) -> Iterator[str]:
    """The files in a folder and below it, sorted, relative to it, with "/"; links are followed.

    Each folder is listed once, however many links lead there; those that `folder` is in are not, nor is the
    whole disk. What is hidden is left out.
    """
    real = Path(os.path.realpath(folder))
    seen = {_identity(above) for above in (*real.parents, Path(real.anchor))}
    waiting = [("", str(folder))]
    while waiting:
        prefix, above = waiting.pop()
        identity = _identity(above)
        if identity is None or identity in seen:
            continue
        seen.add(identity)
        folders, files = _folders_and_files(above)
        yield from (prefix + name for name in files if not name.startswith("."))
        below = [name for name in reversed(folders) if not name.startswith(".")]
        waiting += [(f"{prefix}{name}/", os.path.join(above, name)) for name in below]


def within(parts: Sequence[str]) -> list[str] | None:
    """The parts of a path that stays in its folder, without "." and ".."; None of any other.

    This decides for all formats which files the names in a dataset can mean: those that it gives parts of, in
    a folder that the user named, or that the dataset has as one of a split's images; others only where the
    user says that names are to be followed.
    """
    if os.name == "nt":  # where a backslash separates, and a colon names a drive or a stream
        parts = [part for each in parts for part in each.split("\\")]
        if any(":" in part for part in parts):
            return None
    if not parts or not parts[0] or any("\0" in part for part in parts):
        return None
    kept: list[str] = []
    for part in parts:
        if part == ".." and not kept:
            return None
        if part == "..":
            kept.pop()
        elif part not in ("", "."):
            kept.append(part)
    return kept or None


def path_of(root: Path, name: str, *, follow: bool = False) -> Path | None:
    """The path of a name in a folder; None of one that leads out, unless it is to be followed."""
    inside = within(name.split("/"))
    if inside is not None:
        return root.joinpath(*inside)
    return root / name if follow and "\0" not in name else None


def named_parts(parts: list[str]) -> list[str]:
    """The parts of a path that name something."""
    kept: list[str] = []
    for part in parts:
        if part == "..":
            kept = kept[:-1]
        elif part != ".":
            kept.append(part)
    return kept


def is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether an entry is a folder, or a link to one; not one that cannot be followed."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _folders_and_files(folder: str | Path) -> tuple[list[str], list[str]]:
    """The folders in a folder and its files, sorted; nothing of one that cannot be read.

    A link that leads nowhere counts as a file, which can be told then; pipes and devices do not.
    """
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_folder(entry):
                    folders.append(entry.name)
                elif entry.is_symlink() or entry.is_file():
                    files.append(entry.name)
    except (OSError, ValueError):  # the latter of names that no file can have
        return [], []
    return sorted(folders), sorted(files)


def _identity(path: str | Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _closest(files: list[str], wanted: list[str]) -> list[str]:
    """Those files whose last parts are spelled most like those that were written."""
    if len(files) < 2:
        return files
    likeness = [tuple(_count_alike(file, wanted, spelling) for spelling in _SPELLINGS) for file in files]
    best = max(likeness)
    return [file for file, each in zip(files, likeness, strict=True) if each == best]


def _count_alike(file: str, wanted: list[str], spelling: Callable[[str], str]) -> int:
    """How many of the last parts are the same when spelled so."""
    count = 0
    for own, part in zip(reversed(file.split("/")), reversed(wanted), strict=False):
        if spelling(own) != spelling(part):
            break
        count += 1
    return count


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


_SPELLINGS: tuple[Callable[[str], str], ...] = (str, str.casefold, _composed)
"""What is told apart last is not told apart first."""
