"""What a text stands for: a file, a folder, a glob, a URL, a film, a camera; each a row of `SOURCES`."""

import glob
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ssd import web
from ssd.images import ImageSource, is_hidden, is_image_name
from ssd.signatures import HEAD, HEIC, HEIF_SUFFIXES, identify

_RTSP = ("rtsp://", "rtsps://")

FILM_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .qt .3gp .3g2 .mkv .webm .avi .wmv .asf .flv .f4v .mpg .mpeg .m2v .vob .ts .mts .m2ts "  # noqa: SIM905
    ".mxf .ogv .dv .y4m".split()
)
"""Of files that are taken for films when a folder is read."""


class Film(NamedTuple):
    """What has frames: a detector's stream takes each of them for an image."""

    path: str
    """Or the address of a live source: a camera's number or device, or an RTSP address."""
    is_animation: bool = False
    """Whether it is an image file that may have several frames, which Pillow reads."""
    is_live: bool = False
    """Whether frames come when they come, and are dropped where there are too many."""


class Frame(NamedTuple):
    """A frame of a film."""

    pixels: npt.NDArray[np.uint8]
    """``[H, W, 3]``: upright, RGB."""
    number: int
    """Among all frames of the film, counted from 0."""
    time: float
    """When it is shown, in seconds from the film's start."""
    taken: float | None = None
    """When it came from a live source, by `time.monotonic`."""


class Named(NamedTuple):
    """An image that is to be read, or a film, and what results and errors call it."""

    name: str
    image: ImageSource | Film | Frame
    """What `ssd.load_image` takes, most often the name itself; or a film, or a frame of it."""


class LeftOut(NamedTuple):
    """What a folder or glob holds that is not taken for an image."""

    name: str
    kind: str
    """Its suffix in lower case, as ".txt"; or what it is, as "dangling link"."""


_INSTALL_VIDEO = "pip install 'ssd300[video]'"


class Source(NamedTuple):
    """A kind of source."""

    claims: Callable[[str], bool]
    """Whether a text is of this kind."""
    find: Callable[[str], Iterable[Named | LeftOut]]
    """Its images, in order; they may come one after another, without an end."""
    is_listed: bool = True
    """Whether all of them are known at once, without reading any."""


def _is_one(text: str) -> bool:
    return web.is_url(text) or os.path.isfile(text)


def _one(text: str) -> Iterator[Named]:
    yield Named(text, text)


def is_film(text: str) -> bool:
    """Whether a file is a film: by its first bytes, or where these say nothing, by its suffix."""
    if not os.path.isfile(text):
        return False
    kind = None
    with suppress(OSError), open(text, "rb") as file:  # whoever reads it will say so
        kind = identify(file.read(HEAD))
    return _has_film_suffix(text) if kind is None else kind.is_film


def _has_film_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in FILM_SUFFIXES and not is_hidden(name)


def reads_films() -> bool:
    """Whether the package that reads films is installed."""
    return importlib.util.find_spec("av") is not None


def is_live(text: str) -> bool:
    """Whether a text is a camera, by its number or device, or an RTSP address."""
    if text.lower().startswith(_RTSP):
        return True
    is_camera = re.fullmatch(r"[0-9]{1,2}", text) is not None and not os.path.lexists(text)
    return is_camera or re.fullmatch(r"/dev/video[0-9]+", text) is not None


def without_password(text: str) -> str:
    """What results and messages call a source: an RTSP address without user and password.

    >>> without_password("rtsp://me:secret@host:554/cam")
    'rtsp://host:554/cam'
    """
    if not text.lower().startswith(_RTSP):
        return text
    scheme, _, rest = text.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _live(text: str) -> Iterator[Named]:
    yield Named(without_password(text), Film(text, is_live=True))


def _film(text: str) -> Iterator[Named]:
    yield Named(text, Film(text))


def _in_folder(folder: str) -> Iterator[Named | LeftOut]:
    return map(_judged, sorted(os.path.join(folder, entry) for entry in os.listdir(folder)))


def _matching(pattern: str) -> Iterator[Named | LeftOut]:
    pattern = _with_folders_by_name(pattern)
    below, deep, _ = pattern.partition("**")
    suffix = os.path.splitext(pattern)[1]
    named = bool(suffix) and not glob.has_magic(suffix)  # as in "*.dat", whose files are meant
    for path in sorted(glob.glob(pattern, recursive=True)):
        if not deep or not os.path.isdir(path):  # what is in it matches, too
            yield Named(path, path) if named and os.path.isfile(path) else _judged(path)
    for folder in glob.glob(f"{below}**{os.sep}", recursive=True) if deep else ():
        if not os.access(folder, os.R_OK | os.X_OK):  # which glob passes over
            yield LeftOut(folder, "folder without permission")


def _with_folders_by_name(pattern: str) -> str:
    """A pattern in which those folders stand for themselves that exist by their name, as "photos [1]"."""
    folder, last = os.path.split(pattern)
    if folder in ("", pattern):
        return pattern
    return os.path.join(glob.escape(folder) if os.path.isdir(folder) else _with_folders_by_name(folder), last)


def _judged(path: str) -> Named | LeftOut:
    if os.path.isdir(path):
        return LeftOut(path, "subfolder")
    if not os.path.isfile(path):
        return LeftOut(path, "dangling link" if os.path.islink(path) else "special file")
    if is_image_name(path):
        return Named(path, path)
    if _has_film_suffix(path) and reads_films():
        return Named(path, Film(path))
    return LeftOut(path, os.path.splitext(path)[1].lower() or "file without suffix")


SOURCES: dict[str, Source] = {
    "live": Source(is_live, _live),
    "film": Source(is_film, _film),
    "file or URL": Source(_is_one, _one),
    "folder": Source(os.path.isdir, _in_folder),
    "glob": Source(glob.has_magic, _matching),
}
"""Kinds by name; the first that claims a text gives its images."""


def named_film(text: str) -> Named | None:
    """The film or live source that a text is; None for another."""
    kind = source_of(text)
    found = kind.find(text) if kind in (SOURCES["film"], SOURCES["live"]) else ()
    return next((each for each in found if isinstance(each, Named)), None)


def source_of(text: str) -> Source:
    """The kind of source that a text is; what nothing claims is taken for a file that is not there."""
    return next((kind for kind in SOURCES.values() if kind.claims(text)), SOURCES["file or URL"])


def find_images(
    source: str | os.PathLike[str],
    on_left_out: Callable[[Counter[str]], None] | None = None,
    *,
    films: bool = False,
) -> Iterator[Named]:
    """The images that a path, URL, folder or glob stands for.

    A folder gives the image files in it (by suffix, not below it), sorted; a glob, which may hold ``**``,
    the image files that it matches, sorted; anything else itself, whether or not it exists.

    Args:
        source: the path, URL, folder or glob.
        on_left_out: called at the end with how many files of each kind (see `LeftOut`) a folder or glob holds
            besides, if it holds any; `left_out_line` puts that into words. Hidden files are not counted.
        films: give films, too, each as one `Film`. Else they are left out of folders, and a single one is
            given as an image, which it is not.

    >>> [image.name for image in find_images("https://example.org/cat.jpg")]
    ['https://example.org/cat.jpg']
    """
    text = os.fspath(source)
    kind = source_of(text)
    if kind in (SOURCES["film"], SOURCES["live"]) and not films:
        kind = SOURCES["file or URL"]
    yield from _without_left_out(kind.find(text), on_left_out, films=films)


def find_all(
    sources: Sequence[str], on_left_out: Callable[[Counter[str]], None] | None = None
) -> Iterator[Named]:
    """The images and films of several sources, as a command is given them.

    A single file is an image whatever its name. Of several, which may be what a shell made of ``photos/*``,
    those are left out that neither their suffix nor their content says to be images.

    Args:
        sources: as `find_images` takes them.
        on_left_out: as there, for all sources together.
    """

    def each() -> Iterator[Named | LeftOut]:
        for text in sources:
            kind = source_of(text)
            is_file = kind in (SOURCES["film"], SOURCES["file or URL"]) and os.path.exists(text)
            yield from [_by_content(text)] if is_file and len(sources) > 1 else kind.find(text)

    yield from _without_left_out(each(), on_left_out, films=True)


def _by_content(path: str) -> Named | LeftOut:
    judged = _judged(path)
    is_image = isinstance(judged, Named) and not isinstance(judged.image, Film)
    if not is_image and os.path.isfile(path):  # to open a pipe is to wait for its writer
        try:
            with open(path, "rb") as file:
                kind = identify(file.read(HEAD))
        except OSError:  # whoever reads it will say so
            return Named(path, path)
        if kind is not None and not kind.as_image:
            return Named(path, path)
        if kind is not None and kind.is_film and reads_films():
            return Named(path, Film(path))
    return judged


def _without_left_out(
    found: Iterable[Named | LeftOut], on_left_out: Callable[[Counter[str]], None] | None, *, films: bool
) -> Iterator[Named]:
    """What is an image, or a film where these are wanted; the rest is counted."""
    counts: Counter[str] = Counter()
    for each in found:
        if isinstance(each, Named) and isinstance(each.image, Film) and not films:
            counts[os.path.splitext(each.name)[1].lower()] += 1
        elif isinstance(each, Named):
            yield each
        elif not is_hidden(each.name):
            counts[each.kind] += 1
    if counts and on_left_out is not None:
        on_left_out(counts)


def left_out_line(where: str, counts: Counter[str]) -> str:
    """One line on what was left out, the most frequent first, with what helps.

    >>> left_out_line("photos/", Counter({".heic": 3, ".txt": 1, "subfolder": 2}))
    'left out of photos/: 3 .heic, 2 subfolders, 1 .txt (for .heic: pip install pillow-heif)'
    """
    parts = [f"{count:,} {_plural(kind, count)}" for kind, count in counts.most_common()]
    heif = sorted(HEIF_SUFFIXES & counts.keys())
    hint = f" (for {', '.join(heif)}: {HEIC.as_image.partition(',')[0]})" if heif else ""
    films = sorted(FILM_SUFFIXES & counts.keys())
    hint += f" (for {', '.join(films)}: {_INSTALL_VIDEO})" if films and not reads_films() else ""
    return f"left out of {where}: {', '.join(parts)}{hint}"


def _plural(kind: str, count: int) -> str:
    if count == 1 or kind.startswith("."):
        return kind
    first, _, rest = kind.partition(" without ")
    return f"{first}s without {rest}" if rest else f"{first}s"
