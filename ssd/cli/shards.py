"""Results of several processes, kept as they come: from the files of all, a run goes on and is merged.

Beside the results there is a folder ``unfinished`` for as long as not all are there: what the run is, and
JSON Lines of each process. A line is whole or does not count: a process may be killed at any moment.
"""

import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssd.detections import Detections
from ssd.errors import UserError, as_line
from ssd.files import write_file, writing

UNFINISHED = "unfinished"


class ResumeError(UserError, ValueError):
    """A run cannot go on; the message says why."""


class Shards:
    """The folder `UNFINISHED` of a folder of results."""

    def __init__(self, folder: Path) -> None:
        self._results = folder
        self._folder = folder / UNFINISHED
        self._note = self._folder / "run.json"
        self._places: dict[str, tuple[Path, int]] = {}
        self._own: Path | None = None

    def begin(self, settings: Mapping[str, Any], names: Mapping[str, str]) -> None:
        """Note what the run is; in one of the processes, before the others write.

        Raises:
            ResumeError: a run is unfinished here.
        """
        if os.path.lexists(self._folder):
            raise ResumeError(
                f"{self._results} holds a run that is not finished; --resume {self._results} goes on with "
                "it, and another --output leaves it"
            )
        self._folder.mkdir()
        write_file(self._note, json.dumps({"settings": settings, "names": names}).encode())

    def resume(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """Find what is written; gives the names of the pictures.

        Raises:
            ResumeError: there is no unfinished run, or it has other settings.
        """
        try:
            note = json.loads(self._note.read_bytes())
            before = dict(note["settings"])
            names = {str(key): str(name) for key, name in note["names"].items()}
        except FileNotFoundError:
            raise ResumeError(f"{self._results} holds no unfinished run; leave --resume out") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ResumeError(f"{self._note} is not what ssd detect wrote ({error})") from error
        now = json.loads(json.dumps(settings))  # as it comes back: lists for tuples
        if other := [key for key in now if before.get(key) != now[key]]:
            was = ", ".join(f"{key} {before.get(key)!r}, not {now[key]!r}" for key in other)
            raise ResumeError(
                f"the run in {self._results} was begun with {as_line(was, 400)}; to go on, give the same"
            )
        self._find_places()
        return names

    @property
    def done(self) -> Collection[str]:
        """The sources whose results are written, as `resume` or `merge` found them."""
        return self._places.keys()

    def add(self, found: Detections) -> None:
        """Write a result into this process's own file.

        Raises:
            OSError: it cannot be written; the message says why.
        """
        if self._own is None:
            self._own = self._folder / f"{secrets.token_hex(8)}.jsonl"
        line = {
            "source": found.source,
            "size": found.image_size,
            # To the bit: JSON has the shortest text that gives the same float64.
            "boxes": found.boxes.tolist(),
            "scores": found.scores.tolist(),
            "class_ids": found.class_ids.tolist(),
        }
        content = f"{json.dumps(line)}\n".encode()
        with writing(self._own), self._own.open("ab", buffering=0) as file:
            while content:
                content = content[file.write(content) :]

    def merge(
        self, listed: Sequence[str], class_names: tuple[str, ...], category_ids: tuple[int, ...]
    ) -> Iterator[Detections]:
        """The results of all processes, when all have ended, in the order of `listed`; one at a time."""
        self._find_places()
        return (self._read(name, class_names, category_ids) for name in listed if name in self._places)

    def _find_places(self) -> None:
        for file in sorted(self._folder.glob("*.jsonl")):
            self._places |= {each["source"]: (file, place) for place, each in _lines(file)}

    def _read(self, name: str, class_names: tuple[str, ...], category_ids: tuple[int, ...]) -> Detections:
        path, place = self._places[name]
        with path.open("rb") as file:
            file.seek(place)
            line = json.loads(file.readline())
        return Detections(
            np.array(line["boxes"], np.float32).reshape(-1, 4),
            np.array(line["scores"], np.float32),
            np.array(line["class_ids"], np.int64),
            class_names=class_names,
            image_size=tuple(line["size"]),
            source=name,
            category_ids=category_ids,
        )

    def finish(self) -> None:
        """Remove all of it; the results are written elsewhere."""
        self._note.unlink(missing_ok=True)  # first: without it nothing goes on from the rest
        shutil.rmtree(self._folder, ignore_errors=True)


def rest(listed: Sequence[str], done: Collection[str], batch_size: int) -> list[int]:
    """The numbers of the batches of `listed` of which not all is done.

    Batches stay whole, so that a run that went on gives what one without a stop does, to the bit.

    >>> rest(["a", "b", "c", "d", "e"], {"a", "b", "c"}, 2)
    [1, 2]
    """
    starts = range(0, len(listed), batch_size)
    return [
        i
        for i, at in enumerate(starts)
        if not done or any(name not in done for name in listed[at : at + batch_size])
    ]


def _lines(file: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """Whole lines, and where each begins; what a killed process cut is left out."""
    place = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                each = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                each = None
            if isinstance(each, dict) and isinstance(each.get("source"), str):
                yield place, each
            place += len(line)
