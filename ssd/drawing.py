"""Boxes and labels on pictures."""

import colorsys
import contextlib

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

# Pixels of the shorter and the longer side under which a picture is enlarged before it is drawn on.
_SMALLEST_PICTURE = (160, 320)
_GOLDEN_RATIO = 0.618034  # of the colour circle, between the hues of neighbouring classes
_SHADES = ((0.85, 0.95), (0.55, 1.0), (1.0, 0.65))  # saturation and value, for hues that come close again


def draw_detections(
    image: Image.Image, boxes: FloatArray, labels: list[str], class_ids: IntArray
) -> Image.Image:
    """A new picture of an image with boxes and labels, best first.

    Images with a side under 160 or both under 320 pixels are enlarged first, for labels to be readable.

    Args:
        image: mode RGB; not changed.
        boxes: float32 xyxy in pixels of the image, ``[K, 4]``.
        labels: K texts.
        class_ids: int64 ``[K]``, which choose the colours.
    """
    shorter, longer = sorted(image.size)
    factor = max(-(-_SMALLEST_PICTURE[0] // shorter), -(-_SMALLEST_PICTURE[1] // longer))
    size = (image.width * factor, image.height * factor)
    picture = image.resize(size, Image.Resampling.BICUBIC) if factor > 1 else image.copy()
    _draw_boxes(picture, boxes * factor, labels, [class_color(i) for i in class_ids.tolist()])
    return picture


def class_color(class_id: int) -> tuple[int, int, int]:
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
        area = _label_area(box, canvas.textbbox((0, 0), label, font), line, picture.size, taken)
        taken.append(area)
        canvas.rectangle(area, fill=color)
        red, green, blue = color
        dark = 0.299 * red + 0.587 * green + 0.114 * blue > 140  # ITU-R BT.601 luma
        offset = canvas.textbbox((0, 0), label, font)
        at = (area[0] - offset[0] + line, area[1] - offset[1] + line)
        canvas.text(at, label, "black" if dark else "white", font)


def _font(size: float, labels: list[str]) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font; for other letters than English ones the system's DejaVu Sans, if there is one."""
    if not all(label.isascii() for label in labels):
        with contextlib.suppress(OSError):
            return ImageFont.truetype("DejaVuSans.ttf", size)
    return ImageFont.load_default(size)


def _label_area(
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
    areas = []
    for x, y in corners:
        x0 = min(max(x, 0), max(picture[0] - width - 1, 0))
        y0 = min(max(y, 0), max(picture[1] - height - 1, 0))
        areas.append((x0, y0, x0 + width, y0 + height))
    for area in areas:
        if not any(
            area[0] < other[2] and other[0] < area[2] and area[1] < other[3] and other[1] < area[3]
            for other in taken
        ):
            return area
    return areas[0]
