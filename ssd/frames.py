"""Frames of films and animations as images by name, decoded ahead in a thread of their own."""

import math
import os
import threading
import warnings
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from typing import Any, NamedTuple, cast

import numpy as np

from ssd.errors import as_line
from ssd.images import MAX_PIXELS, is_animation_name, load_frames
from ssd.sources import Film, Frame, Named, named_film, without_password
from ssd.threads import ahead

_AHEAD, _AHEAD_LIVE = 4, 2  # frames that are decoded before they are asked for
_SAME = 1e-6  # seconds by which times may differ that are meant to be the same


class Playback(NamedTuple):
    """Which frames of a film are looked at."""

    every: int = 1
    """One of so many."""
    max_fps: float | None = None
    """At most so many a second of the film's own time; None for all."""
    retries: int = 5
    """How often in a row a live source that was lost is opened again, after growing pauses."""
    all_frames: bool = False
    """Whether all frames of animated images are taken, or the first alone."""


ALL = Playback()


def checked(playback: Playback) -> Playback:
    """The same.

    Raises:
        ValueError: it leaves nothing to be seen.
    """
    if playback.every < 1:
        raise ValueError(f"every must be at least 1; got {playback.every}")
    if playback.max_fps is not None and not 0 < playback.max_fps < math.inf:
        raise ValueError(f"max_fps must be above 0; got {playback.max_fps}")
    if playback.retries < 0:
        raise ValueError(f"retries must be at least 0; got {playback.retries}")
    return playback


def frames_of(
    film: Film, playback: Playback = ALL, *, name: str = "", max_pixels: int = MAX_PIXELS
) -> Generator[Frame, None, None]:
    """The frames of a film, in their order.

    A thread of its own decodes them, a few ahead; it ends when the iterator ends or is closed. Of a live
    source those are dropped, oldest first, that are not taken before newer ones come; how many is told in a
    warning at the end.

    Args:
        film: to be read.
        playback: which of its frames.
        name: what messages call a live source; by default its address.
        max_pixels: most pixels of a frame; see `ssd.load_image`.

    Raises:
        ImageError: the file is no film, is too large, or breaks off; then after the frames before that. Or a
            live source cannot be opened, or was lost for good.
        FileNotFoundError: there is no such file.
        MissingExtra: the package that reads films is not installed.
    """
    name, gone, dropped = name or film.path, threading.Event(), Counter[str]()
    with ExitStack() as stack:
        frames = ahead(
            _chosen(_opened(film, name, playback, max_pixels, gone), playback),
            _AHEAD_LIVE if film.is_live else _AHEAD,
            (lambda _: dropped.update(frames=1)) if film.is_live else None,
        )
        stack.callback(_tell_dropped, name, dropped)
        stack.enter_context(closing(frames))
        stack.callback(gone.set)
        yield from frames


def _opened(
    film: Film, name: str, playback: Playback, max_pixels: int, gone: threading.Event
) -> Iterator[Frame]:
    if film.is_animation:
        return _animation(film.path, max_pixels)
    from ssd import video  # noqa: PLC0415 (an extra)

    if film.is_live:
        return video.live(film.path, name, retries=playback.retries, max_pixels=max_pixels, wait=gone.wait)
    return video.decoded(film.path, max_pixels=max_pixels)


def _tell_dropped(name: str, dropped: Counter[str]) -> None:
    if count := dropped["frames"]:
        what = "frame was" if count == 1 else "frames were"
        text = f"{name}: {count:,} {what} dropped, as newer ones came before it could be looked at"
        warnings.warn(as_line(text.replace(" it ", " they ") if count > 1 else text), stacklevel=2)


def with_frames(
    sources: Iterable[Any], playback: Playback = ALL, *, max_pixels: int = MAX_PIXELS
) -> Generator[tuple[int, Any], None, None]:
    """Images and the frames of films, with the number of the source that each is of.

    Where a film fails, its error comes, as the image of its name, after the frames before; how many these
    are is in its `frames`.
    """
    for number, each in enumerate(sources):
        is_text = isinstance(each, str | os.PathLike)
        source = (is_text and named_film(os.fspath(each))) or each
        film, given = _film_of(source, playback), 0
        if film is None:
            yield number, source
            continue
        name = source.name if isinstance(source, Named) else without_password(film.path)
        try:
            with closing(frames_of(film, playback, name=name, max_pixels=max_pixels)) as frames:
                for frame in frames:
                    yield number, Named(name, frame)
                    given += 1
        except Exception as error:
            vars(error)["frames"] = given
            yield number, Named(name, cast(Any, error))


def has_frames(source: object, *, all_frames: bool = False) -> bool:
    """Whether a source of a stream is a film, or an animation of which all frames are taken."""
    return _film_of(source, Playback(all_frames=all_frames)) is not None


def _film_of(source: object, playback: Playback) -> Film | None:
    """The film that a source is; None for an image."""
    image = source.image if isinstance(source, Named) else source
    if isinstance(image, Film):
        return image
    if playback.all_frames and isinstance(image, str | os.PathLike) and is_animation_name(os.fspath(image)):
        return Film(os.fspath(image), is_animation=True)
    return None


def _animation(path: str, max_pixels: int) -> Iterator[Frame]:
    at = 0.0
    for number, (image, seconds) in enumerate(load_frames(path, max_pixels=max_pixels)):
        yield Frame(np.array(image), number, round(at, 3))  # durations are whole milliseconds
        at += seconds


def _chosen(frames: Iterator[Frame], playback: Playback) -> Iterator[Frame]:
    due = -math.inf
    for frame in frames:
        if frame.number % playback.every or frame.time < due - _SAME:
            continue
        if playback.max_fps is not None:
            step = 1 / playback.max_fps
            # From the time that was due, not from that of a frame that came later: else 20 of 30 become 15.
            due = (due if frame.time - due < step else frame.time) + step
        yield frame
