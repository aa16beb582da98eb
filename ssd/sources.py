"""What a text stands for: a file, a folder, a glob, a URL; each kind is a row of `SOURCES`."""

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ssd import web
from ssd.images import ImageSource, is_image_name


class Named(NamedTuple):
    """An image that is to be read, and what results and errors call it."""

    name: str
    image: ImageSource
    """What `ssd.load_image` takes; most often the name itself."""


class Source(NamedTuple):
    """A kind of source."""

    claims: Callable[[str], bool]
    """Whether a text is of this kind."""
    find: Callable[[str], Iterable[Named]]
    """Its images, in order; they may come one after another, without an end."""
    is_listed: bool = True
    """Whether all of them are known at once, without reading any."""


def _is_one(text: str) -> bool:
    return web.is_url(text) or os.path.isfile(text)


def _one(text: str) -> Iterator[Named]:
    yield Named(text, text)


def _in_folder(folder: str) -> Iterator[Named]:
    return _image_files(os.path.join(folder, entry) for entry in os.listdir(folder))


def _matching(pattern: str) -> Iterator[Named]:
    return _image_files(glob.glob(pattern, recursive=True))


def _image_files(paths: Iterable[str]) -> Iterator[Named]:
    for path in sorted(paths):
        if is_image_name(path) and os.path.isfile(path):
            yield Named(path, path)


SOURCES: dict[str, Source] = {
    "file or URL": Source(_is_one, _one),
    "folder": Source(os.path.isdir, _in_folder),
    "glob": Source(glob.has_magic, _matching),
}
"""Kinds by name; the first that claims a text gives its images."""


def source_of(text: str) -> Source:
    """The kind of source that a text is; what nothing claims is taken for a file that is not there."""
    return next((kind for kind in SOURCES.values() if kind.claims(text)), SOURCES["file or URL"])


def find_images(source: str | os.PathLike[str]) -> Iterator[Named]:
    """The images that a path, URL, folder or glob stands for.

    A folder gives the image files in it (by suffix, not below it), sorted; a glob, which may hold ``**``,
    the image files that it matches, sorted; anything else itself, whether or not it exists.

    >>> [image.name for image in find_images("https://example.org/cat.jpg")]
    ['https://example.org/cat.jpg']
    """
    text = os.fspath(source)
    yield from source_of(text).find(text)
