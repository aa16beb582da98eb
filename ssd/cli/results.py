"""Results and pictures, written as they come; nothing that exists is overwritten."""

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ssd.cli.coco_ids import CocoIds
from ssd.detections import Detections, csv_columns
from ssd.errors import UserError, as_line
from ssd.files import Draft, clear_leftovers, draft, write_free, write_new, writing
from ssd.sources import is_film
from ssd.threads import Behind

RESULT_FORMATS = {
    "json": "detections.json",
    "jsonl": "detections.jsonl",
    "csv": "detections.csv",
    "coco": "detections.json",
    "yolo": "labels",
}
"""The file, or the folder, that each format of results is written to."""

_PICTURES = ("jpg", "jpeg", "png", "webp")
_BEHIND = 4  # pictures of a film that wait to be written
_LINES = ("csv", "jsonl")
"""Formats whose entries are lines, so that nothing has to end the file."""


class FreeNames:
    """Names for the picture of each source, whose stem is also that of its labels: each of them once.

    Args:
        folder: of the pictures.
        pictures: whether pictures will be written.
        labels: folder of the label files; None if there will be none.
    """

    def __init__(self, folder: Path, *, pictures: bool, labels: Path | None) -> None:
        self._folder, self._pictures, self._labels = folder, pictures, labels
        self._taken: set[str] = set()
        self.given: dict[str, str] = {}
        """The name of each source that has one."""
        self.is_resumed = False
        """Whether the run goes on: what a name has may be what a process wrote that was then killed."""

    def __call__(self, source: str) -> str:
        """The name for a source, the same each time."""
        return self.given[source] if source in self.given else self.another(source)

    def another(self, source: str) -> str:
        """Another name for a source: the one that it had is now something else's."""
        self.given[source] = self._next(source)
        return self.given[source]

    def take_over(self, given: dict[str, str]) -> None:
        """Take the names that another process gives to all sources."""
        self.given = dict(given)
        self._taken = {os.path.splitext(name)[0].casefold() for name in given.values()}

    def _next(self, source: str) -> str:
        last = unquote(urlsplit(source).path) if "://" in source else source
        stem, suffix = os.path.splitext(os.path.basename(last))
        stem = re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", stem)
        stem = os.fsdecode(os.fsencode(stem)[:200]) or "image"
        suffix = suffix if suffix.lower()[1:] in _PICTURES else ".jpg"
        number = 1
        while True:
            numbered = stem if number == 1 else f"{stem}-{number}"
            if numbered.casefold() not in self._taken and not self._exists(numbered, suffix):
                self._taken.add(numbered.casefold())
                return f"{numbered}{suffix}"
            number += 1

    def _exists(self, stem: str, suffix: str) -> bool:
        return (self._pictures and os.path.lexists(self._folder / f"{stem}{suffix}")) or (
            self._labels is not None and os.path.lexists(self._labels / f"{stem}.txt")
        )


def _hold(files: Mapping[Path, Any]) -> bool:
    """Whether files with these contents are there."""
    return all(path.is_file() and path.read_bytes() == bytes(content) for path, content in files.items())


class Results:
    """Writes results and pictures in one of `RESULT_FORMATS`, beside what is there.

    A results file takes its name when the block ends, also if it ends early.

    Args:
        folder: to write to.
        format: a name in `RESULT_FORMATS`.
        names: for pictures and labels.
        class_names: all that the model knows.
        coco_ids: of images and classes; results of images without one are left out of that format.
        pictures: whether to write them: of a film, a film.
        font: of their labels; see `Detections.draw`.
        frames: whether there are films, for which CSV has columns of its own.
        tracks: whether objects are tracked, as well.
        on_film_error: called with the source and the error where its film cannot be written, or not whole;
            results go on.
    """

    def __init__(
        self,
        folder: Path,
        format: str,
        names: FreeNames,
        class_names: Sequence[str],
        coco_ids: CocoIds,
        *,
        pictures: bool,
        font: Path | None = None,
        frames: bool = False,
        tracks: bool = False,
        on_film_error: Callable[[str, Exception], object] = lambda name, error: None,
    ) -> None:
        self._frames, self._tracks, self._on_film_error = frames, tracks, on_film_error
        self._film: _Film | None = None
        self.has_pictures = False
        """Whether there are any, of films those that can be played."""
        self._folder, self._format, self.names, self._pictures = folder, format, names, pictures
        self._class_names, self._coco_ids, self._font = class_names, coco_ids, font
        self._stack = ExitStack()  # of what the block holds
        self._file: Draft | None = None
        self._end = 0
        self._has_entries = False
        self.path = folder / RESULT_FORMATS[format]
        """Of the results; once the block has ended, the name that the file has taken."""

    def __enter__(self) -> "Results":
        clear_leftovers(self._folder, rf"(?i:.*\.({'|'.join(_PICTURES)}|mp4))|(?:detections|classes).*")
        if self._format == "yolo":
            clear_leftovers(self.path)
            made = not os.path.lexists(self.path)
            self.path.mkdir(exist_ok=True)
            names = "".join(f"{name}\n" for name in self._class_names)  # what the numbers stand for
            try:
                write_free({self._folder / "classes.txt": names.encode()})
            except BaseException:
                if made:
                    with suppress(OSError):
                        self.path.rmdir()
                raise
        else:
            columns = csv_columns(frames=self._frames, tracks=self._tracks)
            head = {"csv": f"{','.join(columns)}\n", "jsonl": ""}.get(self._format, "[").encode()
            with ExitStack() as stack:
                self._file = stack.enter_context(draft(self.path))
                self._file.put(0, head + self._last())
                self._stack = stack.pop_all()
            self._end = len(head)
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            try:
                self._end_film()
            finally:
                if self._file:
                    self._file.put(self._end, self._last())  # where an entry was cut, that is gone
                    self._file.finish()
                    self.path = self._file.take_free()

    def add(self, found: Detections) -> None:
        """Write one result, and what it has files of its own for."""
        self.write_own(found)
        self.enter(found)

    def write_own(self, found: Detections) -> None:
        """Write the picture of a result that has its image, if pictures are wanted, and its labels.

        Of a film's frame, write the picture into a film, and labels of the frame's own.
        """
        if self._film and self._film.source != found.source:
            self._end_film()
        if found.frame is not None:
            self._write_frame(found)
            return
        name = self.names(found.source)
        picture = found.picture_for(name, font=self._font) if self._pictures and found.has_image else None
        labels = found.to_yolo().encode() if self._format == "yolo" else None
        while True:
            label_file = self.path / f"{os.path.splitext(name)[0]}.txt"
            contents = {self._folder / name: picture, label_file: labels}
            files = {path: content for path, content in contents.items() if content is not None}
            try:
                write_new(files)
                self.has_pictures = self.has_pictures or picture is not None
                return
            except FileExistsError:  # another process was faster
                if self.names.is_resumed and _hold(files):
                    return
                name = self.names.another(found.source)

    def _write_frame(self, found: Detections) -> None:
        if self._pictures and found.has_image:
            if not self._film:
                stem = os.path.splitext(self.names(found.source))[0]
                self._film = _Film(found.source, self._folder / f"{stem}.mp4")
            try:
                self._film.add(found, self._font)
            except (OSError, UserError) as error:
                self._on_film_error(found.source, error)
        labels = found.to_yolo().encode() if self._format == "yolo" else None
        while labels is not None:
            stem = os.path.splitext(self.names(found.source))[0]
            try:
                write_new({self.path / f"{stem}-{found.frame:06d}.txt": labels})
                return
            except FileExistsError:
                self.names.another(found.source)

    def _end_film(self) -> None:
        film, self._film = self._film, None
        if film:
            try:
                film.end()
            except (OSError, UserError) as error:
                self._on_film_error(film.source, error)
            self.has_pictures = self.has_pictures or film.is_kept

    def enter(self, found: Detections) -> None:
        """Write one result into the file of all, if there is one."""
        if self._format == "csv":
            self._append(found.to_csv(header=False, frames=self._frames))
        elif self._format == "jsonl":
            self._append(found.to_json() + "\n")
        elif self._format == "coco":
            image_id = self._coco_ids.of(found.source, found.frame)
            if image_id is not None:
                found = replace(
                    found, image=None, category_ids=self._coco_ids.categories or found.category_ids
                )
                of: dict[str, Any] = {"file_name": found.source}
                of |= {} if found.frame is None else {"frame": found.frame, "time": found.time}
                self._list([entry | of for entry in found.to_coco(image_id)])
        elif self._format == "json":
            self._list([found.to_dict()])

    def _list(self, entries: list[dict[str, Any]]) -> None:
        texts = [json.dumps(entry, ensure_ascii=False) for entry in entries]
        if texts:
            self._append((",\n" if self._has_entries else "\n") + ",\n".join(texts))
            self._has_entries = True

    def _append(self, text: str) -> None:
        """Write a whole entry, or leave the file as it was."""
        assert self._file
        # Names of files need not be Unicode; in JSON the replacement is the escape of the same code.
        content = text.encode(errors="backslashreplace")
        try:
            # With what ends the file, for which there is then room on the disk whatever comes.
            self._file.put(self._end, content + b"\n]\n" * (self._format not in _LINES))
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise OSError(error.errno, f"{reason} for its results in {self.path.name}") from error
        self._end += len(content)

    def _last(self) -> bytes:
        """What ends the file."""
        return b"" if self._format in _LINES else b"\n]\n" if self._has_entries else b"]\n"


class _Film:
    """A film that is being written, a few pictures behind, by a thread of its own.

    It takes its name when it ends, be it early or because no more can be written, if it can be played.
    """

    def __init__(self, source: str, path: Path) -> None:
        self.source, self._path = source, path
        self._stack = ExitStack()
        self._draft: Draft | None = None
        self._writer: Any = None
        self._thread: Behind | None = None
        self._is_told = False
        self.is_kept = False
        """Whether it ended, and can be played."""

    def add(self, found: Detections, font: Path | None) -> None:
        """Write the picture of a frame, unless an earlier one could not be written.

        Raises:
            OSError: it, or an earlier one, cannot be written; this comes but once.
        """
        if self._is_told:
            return
        self._is_told = True  # also where this is interrupted
        if self._thread is None:
            from ssd.video import FilmWriter  # noqa: PLC0415 (an extra)

            like = self.source if is_film(self.source) else None
            self._draft = self._stack.enter_context(draft(self._path))
            size = found.image_size[::-1]
            self._writer = FilmWriter(self._draft, size, like)
            if self._writer.size != size:
                text = "{}: the film with boxes is {}x{}, not {}x{}, as most players play even sizes alone"
                warnings.warn(as_line(text.format(self.source, *self._writer.size, *size)), stacklevel=2)
            self._thread = Behind(self._write, _BEHIND)
        picture = found.draw(font=font, enlarge=False)
        self._thread.put((picture, found.time))
        if self._thread.error:
            raise self._thread.error
        self._is_told = False

    def _write(self, picture_and_time: tuple[Any, float]) -> None:
        with writing(self._path):
            self._writer.add(*picture_and_time)

    def end(self) -> None:
        """End it; what can be played takes its name.

        Raises:
            OSError: its end cannot be written; what can be played has taken its name all the same.
        """
        from ssd.video import is_playable  # noqa: PLC0415 (an extra)

        with self._stack:
            if self._thread is None or self._draft is None:
                return
            try:
                self._thread.end()
                self._writer.close()
                if self._thread.error and not self._is_told:
                    raise self._thread.error
            finally:
                if is_playable(self._draft.path):
                    with suppress(OSError):
                        self._draft.finish()
                    self._draft.take_free()
                    self.is_kept = True
