"""Results and pictures, written as they come; nothing that exists is overwritten."""

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from ssd.detections import CSV_COLUMNS, Detections
from ssd.files import atomic_file, free_path

RESULT_FORMATS = {
    "json": "detections.json",
    "csv": "detections.csv",
    "coco": "detections.json",
    "yolo": "labels",
}
"""The file, or the folder, that each format of results is written to."""

_PICTURES = (".jpg", ".jpeg", ".png", ".webp")


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
        self._given: dict[str, str] = {}

    def __call__(self, source: str) -> str:
        """The name for a source, the same each time."""
        if source not in self._given:
            self._given[source] = self._next(source)
        return self._given[source]

    def _next(self, source: str) -> str:
        last = unquote(urlsplit(source).path) if "://" in source else source
        stem, suffix = os.path.splitext(os.path.basename(last))
        stem = re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", stem)
        stem = os.fsdecode(os.fsencode(stem)[:200]) or "image"
        suffix = suffix if suffix.lower() in _PICTURES else ".jpg"
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


class Results:
    """Writes results and pictures in one of `RESULT_FORMATS`.

    A results file takes its name when the block ends, also if it ends early.

    Args:
        folder: to write to.
        format: a name in `RESULT_FORMATS`.
        names: the name for the picture of a source.
        class_names: all that the model knows.
        image_ids: of COCO, by source; those that are not in it are numbered as they come.
        pictures: whether to write them.
    """

    def __init__(
        self,
        folder: Path,
        format: str,
        names: Callable[[str], str],
        class_names: Sequence[str],
        image_ids: dict[str, int],
        *,
        pictures: bool,
    ) -> None:
        self._folder, self._format, self._names, self._pictures = folder, format, names, pictures
        self._class_names, self._image_ids = class_names, image_ids
        self._stack = ExitStack()
        self._entries = 0
        path = folder / RESULT_FORMATS[format]
        self.path = path if format == "yolo" else free_path(path)

    def __enter__(self) -> "Results":
        if self._format == "yolo":
            self.path.mkdir(exist_ok=True)
            with atomic_file(free_path(self._folder / "classes.txt")) as file:  # what the numbers stand for
                file.write("".join(f"{name}\n" for name in self._class_names).encode())
        else:
            self._file: IO[bytes] = self._stack.enter_context(atomic_file(self.path))
            self._write(",".join(CSV_COLUMNS) + "\n" if self._format == "csv" else "[")
        return self

    def __exit__(self, *_: object) -> None:
        if self._format in ("json", "coco"):
            self._write("\n]\n" if self._entries else "]\n")
        self._stack.close()

    def add(self, found: Detections) -> None:
        """Write one result, and its picture if wanted and not written yet."""
        self.picture(found)
        if self._format == "yolo":
            stem = os.path.splitext(self._names(found.source))[0]
            with atomic_file(self.path / f"{stem}.txt") as file:
                file.write(found.to_yolo().encode())
        elif self._format == "csv":
            self._write(found.to_csv(header=False))
        elif self._format == "coco":
            image_id = self._image_ids.setdefault(found.source, len(self._image_ids) + 1)
            self._list(entry | {"file_name": found.source} for entry in found.to_coco(image_id))
        else:
            self._list([found.to_dict()])

    def picture(self, found: Detections) -> None:
        """Write the picture of a result that has its image, if pictures are wanted."""
        if self._pictures and found.image is not None:
            found.save(self._folder / self._names(found.source))

    def _list(self, entries: Iterable[dict[str, Any]]) -> None:
        for entry in entries:
            self._write((",\n" if self._entries else "\n") + json.dumps(entry, ensure_ascii=False))
            self._entries += 1

    def _write(self, text: str) -> None:
        # Names of files need not be Unicode; in JSON the replacement is the escape of the same code.
        self._file.write(text.encode(errors="backslashreplace"))


def coco_image_ids(sources: Sequence[str]) -> dict[str, int]:
    """COCO names files by image id (000000397133.jpg); where any name is not so, all are numbered."""
    stems = [os.path.splitext(os.path.basename(source))[0] for source in sources]
    if all(stem.isascii() and stem.isdigit() for stem in stems):
        ids = {source: int(stem) for source, stem in zip(sources, stems, strict=True)}
        if len(set(ids.values())) == len(ids):
            return ids
    return {source: number for number, source in enumerate(dict.fromkeys(sources), start=1)}
