"""What was found in one image: a validated record that can be filtered, drawn and written."""

import base64
import colorsys
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
from PIL import Image, ImageDraw, ImageFont

from ssd.checkpoint import atomic_file
from ssd.labels import category_ids

CSV_COLUMNS = ("source", "name", "class_id", "score", "left", "top", "right", "bottom")

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

# Pixels of the shorter and the longer side under which a picture is enlarged before it is drawn on.
_SMALLEST_PICTURE = (160, 320)
_LARGEST_PREVIEW = 960
_GOLDEN_RATIO = 0.618034  # of the colour circle, between the hues of neighbouring classes
_SHADES = ((0.85, 0.95), (0.55, 1.0), (1.0, 0.65))  # saturation and value, for hues that come close again


class Detection(NamedTuple):
    """One detected object."""

    box: tuple[float, float, float, float]
    """Left, top, right and bottom in pixels of the image."""
    score: float
    class_id: int
    name: str


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
    """Path or URL of the image, if it has one."""
    image: Image.Image | None = field(default=None, repr=False)
    """The upright RGB image, for `draw`."""
    category_ids: tuple[int, ...] = field(default=(), repr=False)
    """The id of each class in COCO files; by default the official ones of COCO's 80 classes, and numbers
    from 1 for others."""

    def __post_init__(self) -> None:
        arrays: dict[str, npt.NDArray[Any]] = {
            "boxes": np.array(self.boxes, np.float32),
            "scores": np.array(self.scores, np.float32),
            "class_ids": _as_integers(self.class_ids),
        }
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "category_ids", tuple(self.category_ids) or category_ids(self.class_names))
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
        return replace(
            self, boxes=self.boxes[index], scores=self.scores[index], class_ids=self.class_ids[index]
        )

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
        width = max(len(name) for name in self.names)
        return "\n".join(
            f"{name:{width}}  {score:4.0%}  " + " ".join(f"{value:8.1f}" for value in box)
            for box, score, _, name in self
        )

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
        """Plain Python data: source, width, height, and the detections with name, class_id, score and box."""
        return {
            "source": self.source,
            "width": self.image_size[1],
            "height": self.image_size[0],
            "detections": [
                {"name": name, "class_id": class_id, "score": score, "box": list(box)}
                for box, score, class_id, name in self
            ],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def to_coco(self, image_id: int | str) -> list[dict[str, Any]]:
        """Entries of a COCO results file: bbox is xywh in pixels, category_id one of `category_ids`."""
        ids = self.category_ids
        sizes = _exact((self.boxes[:, 2:] - self.boxes[:, :2]).ravel())
        return [
            {
                "image_id": image_id,
                "category_id": ids[class_id],
                "bbox": [box[0], box[1], *sizes[2 * i : 2 * i + 2]],
                "score": score,
            }
            for i, (box, score, class_id, _) in enumerate(self)
        ]

    def to_yolo(self, scores: bool = False) -> str:
        """YOLO label lines: class id, then centre and size relative to the image.

        Args:
            scores: add the score at the end of each line; label files for training have none.
        """
        height, width = self.image_size
        lines = []
        for (left, top, right, bottom), score, class_id, _ in self:
            values = [(left + right) / 2 / width, (top + bottom) / 2 / height]
            values += [(right - left) / width, (bottom - top) / height] + ([score] if scores else [])
            lines.append(f"{class_id} {' '.join(f'{value:.6f}' for value in values)}\n")
        return "".join(lines)

    def to_csv(self, header: bool = True) -> str:
        """CSV lines: source, name, class_id, score, left, top, right, bottom."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if header:
            writer.writerow(CSV_COLUMNS)
        for box, score, class_id, name in self:
            writer.writerow([self.source, name, class_id, score, *box])
        return text.getvalue()

    def to_supervision(self) -> Any:
        """A `supervision.Detections`, with the names in ``data["class_name"]``."""
        try:
            import supervision  # noqa: PLC0415 (an extra)
        except ImportError as error:
            raise ImportError("supervision is not installed: pip install supervision") from error
        return supervision.Detections(
            xyxy=self.boxes.copy(),
            confidence=self.scores.copy(),
            class_id=self.class_ids.astype(int),
            data={"class_name": self.names},
        )

    # --- Drawing ---

    def draw(self) -> Image.Image:
        """The image with boxes and labels, as a new picture.

        Images with a side under 160 or both under 320 pixels are enlarged first, for labels to be readable.

        Raises:
            ValueError: these detections have no image.
        """
        if self.image is None:
            raise ValueError("these detections have no image to draw on")
        shorter, longer = sorted(self.image.size)
        factor = max(-(-_SMALLEST_PICTURE[0] // shorter), -(-_SMALLEST_PICTURE[1] // longer))
        size = (self.image.width * factor, self.image.height * factor)
        picture = self.image.resize(size, Image.Resampling.BICUBIC) if factor > 1 else self.image.copy()
        labels = [" ".join(f"{name} {score:.0%}".split()) for _, score, _, name in self]
        _draw_boxes(picture, self.boxes * factor, labels, [_color(i) for i in self.class_ids.tolist()])
        return picture

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the drawn picture; the suffix says the format. The source image is never overwritten.

        Returns:
            The path.

        Raises:
            ValueError: the path is the source image, its suffix is no known format, or there is no image.
        """
        path = Path(path)
        picture_format = Image.registered_extensions().get(path.suffix.lower())
        if picture_format not in Image.SAVE:
            raise ValueError(f"{path}: pictures end in .jpg, .png, .webp or another suffix that Pillow knows")
        if path.exists() and os.path.exists(self.source) and path.samefile(self.source):
            raise ValueError(f"{path} is the source image, which is never overwritten; save to another path")
        picture = self.draw()
        with atomic_file(path) as file:
            picture.save(file, picture_format, quality=92)
        return path

    def _preview(self) -> bytes:
        picture = self.draw()
        picture.thumbnail((_LARGEST_PREVIEW, _LARGEST_PREVIEW))
        data = io.BytesIO()
        picture.save(data, "PNG")
        return data.getvalue()

    def _repr_png_(self) -> bytes | None:
        return None if self.image is None else self._preview()

    def _repr_html_(self) -> str:
        picture = ""
        if self.image is not None:
            encoded = base64.b64encode(self._preview()).decode()
            picture = f'<img src="data:image/png;base64,{encoded}" style="max-width: 100%">'
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{score:.0%}</td>"
            + "".join(f"<td>{value:.1f}</td>" for value in box)
            + "</tr>"
            for box, score, _, name in self
        )
        head = "".join(f"<th>{title}</th>" for title in ("name", "score", "left", "top", "right", "bottom"))
        table = f"<table><tr>{head}</tr>{rows}</table>" if len(self) else "<p>no objects</p>"
        return f"<div>{picture}<p>{html.escape(self.source)}</p>{table}</div>"


def _as_integers(values: Any) -> IntArray:
    array = np.array(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"class ids must be integers; got {array.dtype}")
    return array.astype(np.int64)


def _exact(values: FloatArray) -> list[float]:
    """Python floats with the fewest digits that give the same float32 again (0.9, not 0.8999999761581421)."""
    return [float(str(value)) for value in values]


def _color(class_id: int) -> tuple[int, int, int]:
    """The colour of a class: the same in every picture, far from that of its neighbours."""
    shade = _SHADES[class_id // 27 % len(_SHADES)]
    red, green, blue = colorsys.hsv_to_rgb((0.58 + class_id * _GOLDEN_RATIO) % 1, *shade)
    return round(red * 255), round(green * 255), round(blue * 255)


def _draw_boxes(
    picture: Image.Image, boxes: FloatArray, labels: list[str], colors: list[tuple[int, int, int]]
) -> None:
    """Draw boxes and labels, best first, on a picture."""
    canvas = ImageDraw.Draw(picture)
    font_size = max(14.0, 0.028 * (picture.width * picture.height) ** 0.5)
    font = _font(font_size, labels)
    widest = max((canvas.textlength(label, font) for label in labels), default=0)
    if widest > 0.9 * picture.width:  # a narrow picture
        font = _font(max(9.0, font_size * 0.9 * picture.width / widest), labels)
    line = max(2, round(font_size / 7))
    for box, color in reversed(list(zip(boxes, colors, strict=True))):  # the best on top
        left, top, right, bottom = (float(value) for value in box)
        canvas.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=color, width=line)

    taken: list[tuple[float, float, float, float]] = []
    for box, label, color in zip(boxes, labels, colors, strict=True):
        place = _label_place(box, canvas.textbbox((0, 0), label, font), line, picture.size, taken)
        taken.append(place)
        canvas.rectangle(place, fill=color)
        red, green, blue = color
        dark = 0.299 * red + 0.587 * green + 0.114 * blue > 140  # ITU-R BT.601 luma
        offset = canvas.textbbox((0, 0), label, font)
        at = (place[0] - offset[0] + line, place[1] - offset[1] + line)
        canvas.text(at, label, "black" if dark else "white", font)


def _font(size: float, labels: list[str]) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font; for other letters than English ones the system's DejaVu Sans, if there is one."""
    if not all(label.isascii() for label in labels):
        with contextlib.suppress(OSError):
            return ImageFont.truetype("DejaVuSans.ttf", size)
    return ImageFont.load_default(size)


def _label_place(
    box: FloatArray,
    text: tuple[float, float, float, float],
    margin: int,
    picture: tuple[int, int],
    taken: list[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    """Where a label is whole and hides no other: above its box, inside it, below it, or at its right end."""
    width, height = text[2] - text[0] + 2 * margin, text[3] - text[1] + 2 * margin
    left, top, right, bottom = (float(value) for value in box)
    corners = [
        (left, top - height),
        (left, top),
        (left, bottom),
        (right - width, top - height),
        (left, bottom - height),
        (right - width, top),
    ]
    places = []
    for x, y in corners:
        x0 = min(max(x, 0), max(picture[0] - width - 1, 0))
        y0 = min(max(y, 0), max(picture[1] - height - 1, 0))
        places.append((x0, y0, x0 + width, y0 + height))
    for place in places:
        if not any(
            place[0] < other[2] and other[0] < place[2] and place[1] < other[3] and other[1] < place[3]
            for other in taken
        ):
            return place
    return places[0]
