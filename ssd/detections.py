"""What was found in one image: a validated record that can be filtered, drawn and written."""

import base64
import contextlib
import csv
import html
import io
import json
import operator
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, overload

import numpy as np
import numpy.typing as npt
from PIL import Image

from ssd.drawing import Mark, draw_detections, encoded
from ssd.errors import ImageError, MissingExtra
from ssd.files import write_file
from ssd.images import enough_memory
from ssd.labels import category_ids
from ssd.pixels import DECODED, Original

CSV_COLUMNS = ("source", "name", "class_id", "score", "left", "top", "right", "bottom")
FRAME_COLUMNS = ("frame", "time")
"""That come after these for films."""
TRACK_COLUMN = "track_id"
"""That comes last where objects are tracked."""

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

_LARGEST_PREVIEW = 960  # pixels of a side, in a notebook


class Detection(NamedTuple):
    """One detected object."""

    box: tuple[float, float, float, float]
    """Left, top, right and bottom in pixels of the image."""
    score: float
    class_id: int
    name: str


def _listed(points: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in points)


class LineCount(NamedTuple):
    """How many objects have crossed a line; see `ssd.tracking`."""

    line: tuple[float, ...]
    """x and y of its start and its end, in pixels of the film."""
    into: int
    """To the left of it, as one looks from its start to its end."""
    out: int
    """To the right of it."""

    def __str__(self) -> str:
        return f"{self.into} in, {self.out} out"

    @property
    def name(self) -> str:
        """What the command calls it."""
        return f"line {_listed(self.line)}"

    def to_dict(self) -> dict[str, Any]:
        """As it is written."""
        return {"line": list(self.line), "in": self.into, "out": self.out}


class ZoneCount(NamedTuple):
    """How many objects are in a zone; see `ssd.tracking`."""

    zone: tuple[float, ...]
    """x and y of its corners, in pixels of the film."""
    inside: int
    """In this frame."""
    total: int
    """That were in it up to now, each counted once."""

    def __str__(self) -> str:
        return f"{self.inside} inside, {self.total} in all"

    @property
    def name(self) -> str:
        """What the command calls it."""
        return f"zone {_listed(self.zone)}"

    def to_dict(self) -> dict[str, Any]:
        """As it is written."""
        return {"zone": list(self.zone), "inside": self.inside, "total": self.total}


class _ImageField:
    """The field `Detections.image`: what is kept as an `Original`, or as pixels, is one when asked for."""

    @overload
    def __get__(self, found: None, owner: type) -> None: ...
    @overload
    def __get__(self, found: "Detections", owner: type) -> Image.Image | None: ...
    def __get__(self, found: "Detections | None", owner: type) -> Image.Image | None:
        kept = None if found is None else vars(found)["image"]  # None is the default
        if isinstance(kept, Original):
            return kept.read()
        if isinstance(kept, np.ndarray):
            kept = vars(found)["image"] = Image.fromarray(kept)
        return kept

    def __set__(self, found: "Detections", value: object) -> None:
        is_default = isinstance(value, _ImageField)  # as dataclasses pass it
        vars(found)["image"] = None if is_default else value


@dataclass(frozen=True, eq=False)
class Detections:
    """The objects found in one image, best first.

    ``len(d)``, iteration and ``d[0]`` give `Detection`; a slice, boolean mask or array of indices gives
    `Detections`. The arrays cannot be written to.

    Raises:
        ValueError: shapes, ranges or class ids do not fit; the message says which.

    >>> found = Detections([[10, 20, 50, 60]], [0.9], [1], class_names=("cat", "dog"), image_size=(100, 200))
    >>> found
    Detections(1 dog)
    >>> found[0]
    Detection(box=(10.0, 20.0, 50.0, 60.0), score=0.9, class_id=1, name='dog')
    >>> len(found[found.scores > 0.95])
    0
    """

    boxes: FloatArray
    """float32 ``[K, 4]``: xyxy in pixels of the upright source image."""
    scores: FloatArray
    """float32 ``[K]`` in [0, 1]."""
    class_ids: IntArray
    """int64 ``[K]``, counted from 0: an index into `class_names`."""
    class_names: tuple[str, ...] = field(repr=False)
    """All names that the model knows."""
    image_size: tuple[int, int]
    """Height and width of the upright source image."""
    source: str = ""
    """Path or URL of the image; of one in a list or stream that has none, "image" and its number."""
    image: _ImageField = field(default=_ImageField(), repr=False)
    """The upright RGB image, for `draw`; None if there is none. Of a source in memory it is kept. That of a
    file is read again each time it is asked for: an ImageError says if the file is gone, or was changed."""
    category_ids: tuple[int, ...] = field(default=(), repr=False)
    """The id of each class in COCO files; by default the official ones of COCO's 80 classes, and numbers
    from 1 for others."""
    number: int | None = None
    """Of the image among those of its list or stream, counted from 0; None by itself."""
    frame: int | None = None
    """Of a film's frame, its number among all frames, counted from 0; None for other images."""
    time: float | None = None
    """When that frame is shown, in seconds from the film's start; None for other images."""
    track_ids: IntArray | None = field(default=None, repr=False)
    """int64 ``[K]``, of `Detector.track`: one number for each object over the frames of its film, from 1; -1
    where it is not known yet, as for what was seen but once. None where objects are not tracked."""
    counts: tuple[LineCount | ZoneCount, ...] = field(default=(), repr=False)
    """Of each line and zone that `Detector.track` counts at, up to this frame."""
    taken: float | None = field(default=None, repr=False)
    """When a camera's or stream's frame came, by `time.monotonic`; None for others."""

    def __post_init__(self) -> None:
        arrays: dict[str, npt.NDArray[Any]] = {
            "boxes": np.array(self.boxes, np.float32),
            "scores": np.array(self.scores, np.float32),
            "class_ids": _as_integers(self.class_ids),
        }
        if self.track_ids is not None:
            arrays["track_ids"] = _as_integers(self.track_ids, "track ids")
        object.__setattr__(self, "class_names", tuple(self.class_names))
        ids = tuple(map(operator.index, self.category_ids)) or category_ids(self.class_names)
        object.__setattr__(self, "category_ids", ids)
        object.__setattr__(self, "image_size", tuple(map(operator.index, self.image_size)))
        if len(self.category_ids) != len(self.class_names):
            raise ValueError(f"{len(self.class_names)} classes and {len(self.category_ids)} category ids")
        if arrays["boxes"].size == 0:
            arrays["boxes"] = arrays["boxes"].reshape(0, 4)
        for name, array in arrays.items():
            array.setflags(write=False)
            object.__setattr__(self, name, array)

        count = len(self.boxes)
        if self.boxes.shape != (count, 4):
            raise ValueError(f"boxes must be [K, 4]; got {list(self.boxes.shape)}")
        if self.scores.shape != (count,) or self.class_ids.shape != (count,):
            raise ValueError(
                f"{count} boxes need as many scores and class ids; "
                f"got {list(self.scores.shape)} and {list(self.class_ids.shape)}"
            )
        if self.track_ids is not None and self.track_ids.shape != (count,):
            raise ValueError(f"{count} boxes need as many track ids; got {list(self.track_ids.shape)}")
        if min(self.image_size) < 1:
            raise ValueError(f"image_size is height and width, both above 0; got {self.image_size}")
        if not np.isfinite(self.boxes).all():
            raise ValueError("boxes hold NaN or infinity")
        if (self.boxes[:, 2:] < self.boxes[:, :2]).any():
            raise ValueError(
                "boxes are left, top, right, bottom; in some of these right < left or bottom < top"
            )
        if not ((self.scores >= 0) & (self.scores <= 1)).all():
            raise ValueError("scores must be in [0, 1]")
        if count and not 0 <= self.class_ids.min() <= self.class_ids.max() < len(self.class_names):
            raise ValueError(
                f"class ids must be from 0 to {len(self.class_names) - 1}, one for each class name"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for array in (self.boxes, self.scores, self.class_ids, self.track_ids):
            if array is not None:
                array.setflags(write=False)  # which NumPy's own pickles forget

    def __len__(self) -> int:
        return len(self.boxes)

    def __iter__(self) -> Iterator[Detection]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, index: SupportsIndex) -> Detection: ...  # type: ignore[overload-overlap]
    @overload
    def __getitem__(self, index: "slice | list[bool] | list[int] | npt.NDArray[Any]") -> "Detections": ...
    def __getitem__(self, index: Any) -> "Detection | Detections":
        if not isinstance(index, slice):
            index = np.asarray(index)
            if index.size == 0:
                index = index.astype(np.int64)  # an empty list has no type of its own
            if index.ndim == 0:
                return self._single(operator.index(index))
        return self.changed(
            boxes=self.boxes[index],
            scores=self.scores[index],
            class_ids=self.class_ids[index],
            track_ids=None if self.track_ids is None else self.track_ids[index],
        )

    def changed(self, **values: Any) -> "Detections":
        """The same with other values; unlike `dataclasses.replace`, it does not read the image for that."""
        return replace(self, **{"image": self._kept, **values})

    def _single(self, index: int) -> Detection:
        class_id = int(self.class_ids[index])
        left, top, right, bottom = _exact(self.boxes[index])
        score = float(str(self.scores[index]))
        return Detection((left, top, right, bottom), score, class_id, self.class_names[class_id])

    def __repr__(self) -> str:
        return f"Detections({self.summary()})"

    def __str__(self) -> str:
        """A table with a row for each object."""
        if not len(self):
            return "no objects"
        names = self._numbered_names()
        width = max(map(len, names))
        return "\n".join(
            f"{name:{width}}  {score:4.0%}  " + " ".join(f"{value:8.1f}" for value in box)
            for (box, score, _, _), name in zip(self, names, strict=True)
        )

    def _numbered_names(self) -> list[str]:
        """The names of the objects, after the number of each that is tracked."""
        ids = [-1] * len(self) if self.track_ids is None else self.track_ids.tolist()
        return [f"#{i} {name}" if i >= 0 else name for i, name in zip(ids, self.names.tolist(), strict=True)]

    def widened(self, margin: float) -> "Detections":
        """The same with boxes that reach further on each side, by a share of their own width and height.

        They may reach outside of the image. With the margin of a detector's `calibration`, they hold the true
        ones as often as it says.

        >>> Detections([[10, 20, 50, 60]], [0.9], [0], ("cat",), (100, 200)).widened(0.1).boxes
        array([[ 6., 16., 54., 64.]], dtype=float32)
        """
        by = margin * (self.boxes[:, 2:] - self.boxes[:, :2])
        boxes = np.hstack([self.boxes[:, :2] - by, self.boxes[:, 2:] + by])
        return self.changed(boxes=boxes)

    @property
    def names(self) -> npt.NDArray[np.str_]:
        """The class name of each object, ``[K]``: ``found[found.names == "cat"]`` are the cats."""
        return np.array([self.class_names[i] for i in self.class_ids], dtype=np.str_)

    def summary(self) -> str:
        """How many of what, as in "2 person, 1 dog"; "no objects" for none."""
        counts = Counter(self.names.tolist()).most_common()
        return ", ".join(f"{count} {name}" for name, count in counts) or "no objects"

    # --- Writing ---

    def to_dict(self) -> dict[str, Any]:
        """Plain Python data: source, width, height, and the detections with name, class_id, score and box.

        Of a film, the frame and the time, too; where objects are tracked, the track_id of each, and the
        counts of lines and zones.
        """
        return {
            "source": self.source,
            **({} if self.frame is None else {"frame": self.frame, "time": self.time}),
            "width": self.image_size[1],
            "height": self.image_size[0],
            **({"counts": [each.to_dict() for each in self.counts]} if self.counts else {}),
            "detections": [
                {"name": name, "class_id": class_id, "score": score, "box": list(box)} | track
                for (box, score, class_id, name), track in zip(self, self._tracks(), strict=True)
            ],
        }

    def _tracks(self) -> list[dict[str, int]]:
        """What entries have of the id of each object: nothing where objects are not tracked."""
        if self.track_ids is None:
            return [{} for _ in range(len(self))]
        return [{TRACK_COLUMN: number} for number in self.track_ids.tolist()]

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def to_coco(self, image_id: SupportsIndex | str) -> list[dict[str, Any]]:
        """Entries of a COCO results file: bbox is xywh in pixels, category_id one of `category_ids`.

        Where objects are tracked, they have a track_id, too.

        Args:
            image_id: an integer, also NumPy's or torch's; or a text.

        Raises:
            TypeError: it is neither.
        """
        if not isinstance(image_id, str):
            try:
                image_id = operator.index(image_id)
            except TypeError as error:
                raise TypeError(f"image_id is an integer or a text; got {image_id!r:.60}") from error
        ids = self.category_ids
        sizes = _exact((self.boxes[:, 2:] - self.boxes[:, :2]).ravel())
        return [
            {
                "image_id": image_id,
                "category_id": ids[class_id],
                "bbox": [box[0], box[1], *sizes[2 * i : 2 * i + 2]],
                "score": score,
                **track,
            }
            for i, ((box, score, class_id, _), track) in enumerate(zip(self, self._tracks(), strict=True))
        ]

    def to_yolo(self, scores: bool = False) -> str:
        """YOLO label lines: class id, then centre and size relative to the image; last the id of a track.

        Args:
            scores: add the score at the end of each line; label files for training have none.
        """
        height, width = self.image_size
        lines = []
        for ((left, top, right, bottom), score, class_id, _), track in zip(self, self._tracks(), strict=True):
            values = [(left + right) / 2 / width, (top + bottom) / 2 / height]
            values += [(right - left) / width, (bottom - top) / height] + ([score] if scores else [])
            columns = [class_id, *(f"{value:.6f}" for value in values), *track.values()]
            lines.append(" ".join(map(str, columns)) + "\n")
        return "".join(lines)

    def to_csv(self, header: bool = True, *, frames: bool | None = None) -> str:
        """CSV lines: source, name, class_id, score, left, top, right, bottom; of a film, frame and time, too.

        Where objects are tracked, the last column is track_id.

        Args:
            header: whether the names of the columns come first.
            frames: whether there are columns for frame and time; by default of a film's frame alone.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        frames = self.frame is not None if frames is None else frames
        if header:
            writer.writerow(csv_columns(frames=frames, tracks=self.track_ids is not None))
        of_film = (self.frame, self.time) if frames else ()
        for (box, score, class_id, name), track in zip(self, self._tracks(), strict=True):
            writer.writerow([self.source, name, class_id, score, *box, *of_film, *track.values()])
        return text.getvalue()

    def to_supervision(self) -> Any:
        """A `supervision.Detections`, with the names in ``data["class_name"]``, and ids as `tracker_id`."""
        try:
            import supervision  # noqa: PLC0415 (an extra)
        except ImportError as error:
            raise MissingExtra("supervision") from error
        return supervision.Detections(
            xyxy=self.boxes.copy(),
            confidence=self.scores.copy(),
            class_id=self.class_ids.astype(int),
            tracker_id=None if self.track_ids is None else self.track_ids.astype(int),
            data={"class_name": self.names},
        )

    # --- Drawing ---

    @property
    def has_image(self) -> bool:
        """Whether there is an image to draw on, in memory or in a file that may be read again."""
        return self._kept is not None

    @property
    def _kept(self) -> Any:
        return vars(self)["image"]

    def draw(self, *, font: str | os.PathLike[str] | None = None, enlarge: bool = True) -> Image.Image:
        """The image with boxes and labels, as a new picture; with the lines and zones that count, if any.

        Colours are those of classes, or of tracked objects; what has no id yet is grey.

        Images with a side under 160 or both under 320 pixels are enlarged first, for labels to be readable.

        Args:
            font: a TrueType or OpenType file for the labels. By default Pillow's own, and for letters that it
                lacks a font of the system; names that no font can show are told in a warning, once.
            enlarge: whether small images are.

        Raises:
            ValueError: these detections have no image.
            ImageError: its file is gone, or was changed.
            OSError: the font cannot be read.
        """
        kept = self._kept
        ours = not isinstance(kept, Image.Image)
        image = Image.fromarray(kept) if isinstance(kept, np.ndarray) else self.image
        if image is None:
            raise ValueError("these detections have no image to draw on")
        labels = [
            " ".join(f"{name} {score:.0%}".split())
            for (_, score, _, _), name in zip(self, self._numbered_names(), strict=True)
        ]
        marks = [
            Mark(np.reshape(each[0], (-1, 2)), str(each), is_closed=isinstance(each, ZoneCount))
            for each in self.counts
        ]
        colors = self.class_ids if self.track_ids is None else self.track_ids
        return draw_detections(
            image, self.boxes, labels, colors, marks, font=font, in_place=ours, enlarge=enlarge
        )

    def _room(self) -> contextlib.AbstractContextManager[None]:
        """Within the block, the image may be read."""
        kept = self._kept
        return DECODED.taken(kept.pixels) if isinstance(kept, Original) else contextlib.nullcontext()

    def save(self, path: str | os.PathLike[str], *, font: str | os.PathLike[str] | None = None) -> Path:
        """Write the drawn picture; the suffix says the format. The source image is never overwritten.

        Args:
            path: where to.
            font: see `draw`.

        Returns:
            The path.

        Raises:
            ValueError: the path is the source image, its suffix is no known format, or there is no image.
            ImageError, OSError: see `draw`.
        """
        path = Path(path)
        _picture_format(path)
        own = self._kept.path if isinstance(self._kept, Original) else ""
        if path.exists() and any(map(path.samefile, filter(os.path.exists, (own, self.source)))):
            raise ValueError(f"{path} is the source image, which is never overwritten; save to another path")
        write_file(path, self.picture_for(path, font=font))
        return path

    def picture_for(
        self, path: str | os.PathLike[str], *, font: str | os.PathLike[str] | None = None
    ) -> memoryview:
        """The content that `save` would write to a path, whose suffix says the format; nothing is written.

        Raises:
            ValueError: the suffix is no known format, or there is no image.
            ImageError, OSError: see `draw`.
        """
        picture_format = _picture_format(Path(path))
        with self._room(), enough_memory(self.source, self.image_size[::-1]):
            return encoded(self.draw(font=font), picture_format, 92)

    def _preview(self) -> bytes:
        with self._room():
            picture = self.draw()
            picture.thumbnail((_LARGEST_PREVIEW, _LARGEST_PREVIEW))
        data = io.BytesIO()
        picture.save(data, "PNG")
        return data.getvalue()

    def _repr_png_(self) -> bytes | None:
        try:
            return self._preview() if self.has_image else None
        except ImageError:  # a notebook shows the rest
            return None

    def _repr_html_(self) -> str:
        picture = ""
        try:
            if self.has_image:
                encoded = base64.b64encode(self._preview()).decode()
                picture = f'<img src="data:image/png;base64,{encoded}" style="max-width: 100%">'
        except ImageError as error:
            picture = f"<p>{html.escape(str(error))}</p>"
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{score:.0%}</td>"
            + "".join(f"<td>{value:.1f}</td>" for value in box)
            + "</tr>"
            for (box, score, _, _), name in zip(self, self._numbered_names(), strict=True)
        )
        head = "".join(f"<th>{title}</th>" for title in ("name", "score", "left", "top", "right", "bottom"))
        table = f"<table><tr>{head}</tr>{rows}</table>" if len(self) else "<p>no objects</p>"
        return f"<div>{picture}<p>{html.escape(self.source)}</p>{table}</div>"


def _picture_format(path: Path) -> str:
    found = Image.registered_extensions().get(path.suffix.lower())
    if found not in Image.SAVE:
        raise ValueError(f"{path}: pictures end in .jpg, .png, .webp or another suffix that Pillow knows")
    return found


def csv_columns(*, frames: bool, tracks: bool) -> tuple[str, ...]:
    """The names of the columns of `Detections.to_csv`."""
    return (*CSV_COLUMNS, *(FRAME_COLUMNS if frames else ()), *((TRACK_COLUMN,) if tracks else ()))


def _as_integers(values: Any, what: str = "class ids") -> IntArray:
    array = np.array(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{what} must be integers; got {array.dtype}")
    return array.astype(np.int64)


def _exact(values: FloatArray) -> list[float]:
    """Python floats with the fewest digits that give the same float32 again (0.9, not 0.8999999761581421)."""
    return [float(str(value)) for value in values]
