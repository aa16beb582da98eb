"""Boxes and labels on pictures; letters of any script, as far as the fonts go that are here."""

import colorsys
import io
import math
import os
import shutil
import subprocess
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import groupby
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

# Pixels of the shorter and the longer side under which a picture is enlarged before it is drawn on.
_SMALLEST_PICTURE = (160, 320)
_CELL, _GAP = (480, 360), 8  # of a sheet of pictures, in pixels
_GOLDEN_RATIO = 0.618034  # of the colour circle, between the hues of neighbouring classes
_KEPT = 256  # labels that stay as they are drawn: those of a film come again in most of its frames ...
_MOST_KEPT = 1 << 16  # ... but for those of so many bytes, of very large pictures
_SHADES = ((0.85, 0.95), (0.55, 1.0), (1.0, 0.65))  # saturation and value, for hues that come close again


class Mark(NamedTuple):
    """A line or a polygon, and what stands beside it."""

    points: npt.NDArray[np.float64]
    """Its corners: x and y in pixels of the image, ``[N, 2]``."""
    text: str
    is_closed: bool
    """Whether it is a polygon; else an arrow on its middle points to its left."""


def draw_detections(
    image: Image.Image,
    boxes: FloatArray,
    labels: list[str],
    class_ids: IntArray,
    marks: Sequence[Mark] = (),
    *,
    font: str | os.PathLike[str] | None = None,
    in_place: bool = False,
    enlarge: bool = True,
) -> Image.Image:
    """A picture of an image with boxes and labels, best first.

    Images with a side under 160 or both under 320 pixels are enlarged first, for labels to be readable.

    Args:
        image: mode RGB; not changed, unless `in_place`.
        boxes: float32 xyxy in pixels of the image, ``[K, 4]``.
        labels: K texts.
        class_ids: int64 ``[K]``, or other ids, which choose the colours.
        marks: drawn below the boxes, with their texts at their upper left points.
        font: a font file for the labels; see `missing_letters`.
        in_place: draw on the image itself if it need not be enlarged, to save the memory of a copy.
        enlarge: whether small images are.

    Raises:
        OSError: the font cannot be read.
    """
    shorter, longer = sorted(image.size)
    factor = max(-(-_SMALLEST_PICTURE[0] // shorter), -(-_SMALLEST_PICTURE[1] // longer))
    factor = factor if enlarge else 1
    size = (image.width * factor, image.height * factor)
    if factor > 1:
        picture = image.resize(size, Image.Resampling.BICUBIC)
    else:
        picture = image if in_place else image.copy()
    fonts = _fonts_of(labels, font)
    marks = [each._replace(points=each.points * factor) for each in marks]
    for each in marks:
        _draw_mark(picture, each)
    corners = [each.points[each.points.sum(1).argmin()] for each in marks]
    taken = [
        _write(picture, (float(x), float(y)), each.text) for (x, y), each in zip(corners, marks, strict=True)
    ]
    colors = [class_color(i) for i in class_ids.tolist()]
    _draw_boxes(picture, boxes * factor, labels, colors, fonts, taken)
    return picture


def write_on(picture: Image.Image, text: str) -> None:
    """Write a line of plain letters into the upper left corner of a picture."""
    _write(picture, (0, 0), text)


def side_by_side(rows: Iterable[Sequence[Image.Image]], headings: Sequence[str]) -> Image.Image:
    """A sheet of pictures in columns, each under its heading; they are made as large as its cells."""
    top = 32
    fitted = [[ImageOps.contain(each, _CELL) for each in row] for row in rows]
    heights = [max(each.height for each in row) + _GAP for row in fitted]
    sheet = Image.new("RGB", (len(headings) * (_CELL[0] + _GAP) - _GAP, top + sum(heights)), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    for column, heading in enumerate(headings):
        left = column * (_CELL[0] + _GAP)
        canvas.text((left + _CELL[0] // 2, top // 2), heading, "black", font, anchor="mm")
        for number, row in enumerate(fitted):
            above, picture = top + sum(heights[:number]), row[column]
            sheet.paste(picture, (left + (_CELL[0] - picture.width) // 2, above))
    return sheet


def encoded(picture: Image.Image, picture_format: str = "JPEG", quality: int = 90) -> memoryview:
    """The content of a picture's file.

    Into a file that is open, Pillow's encoders do not see that the disk is full.
    """
    content = io.BytesIO()
    picture.save(content, picture_format, quality=quality)
    return content.getbuffer()


def class_color(class_id: int) -> tuple[int, int, int]:
    """The colour of a class: the same in every picture, far from that of its neighbours; grey below 0."""
    if class_id < 0:
        return 160, 160, 160
    shade = _SHADES[class_id // 27 % len(_SHADES)]
    red, green, blue = colorsys.hsv_to_rgb((0.58 + class_id * _GOLDEN_RATIO) % 1, *shade)
    return round(red * 255), round(green * 255), round(blue * 255)


def _draw_boxes(
    picture: Image.Image,
    boxes: FloatArray,
    labels: list[str],
    colors: list[tuple[int, int, int]],
    fonts: "dict[str, _FontFile | None]",
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Draw boxes and labels, best first, on a picture; labels keep off the areas that are taken."""
    canvas = ImageDraw.Draw(picture)
    font_size = _letter_size(picture)
    texts = _lay_out(labels, font_size, fonts)
    widest = max((text.length for text in texts), default=0)
    if widest > 0.9 * picture.width:  # a narrow picture
        texts = _lay_out(labels, max(9.0, font_size * 0.9 * picture.width / widest), fonts)
    line = max(2, round(font_size / 7))
    for box, color in reversed(list(zip(boxes, colors, strict=True))):  # the best on top
        left, top, right, bottom = (float(value) for value in box)
        canvas.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=color, width=line)

    taken = list(taken)
    for box, text, color in zip(boxes, texts, colors, strict=True):
        area = _label_area(box, text.box, line, picture.size, taken)
        taken.append(area)
        is_small = 3 * (area[2] - area[0]) * (area[3] - area[1]) < _MOST_KEPT
        draw = _kept_label if is_small else _label
        picture.paste(draw(text, color, line), (int(area[0]), int(area[1])))


def _label(text: "_Text", color: tuple[int, int, int], margin: int) -> Image.Image:
    left, top, right, bottom = text.box
    label = Image.new("RGB", (int(right - left) + 2 * margin + 1, int(bottom - top) + 2 * margin + 1), color)
    red, green, blue = color
    dark = 0.299 * red + 0.587 * green + 0.114 * blue > 140  # ITU-R BT.601 luma
    for run in text.runs:
        at = (margin - left + run.x, margin - top)
        ImageDraw.Draw(label).text(at, run.letters, "black" if dark else "white", run.font, anchor="ls")
    return label


_kept_label = lru_cache(_KEPT)(_label)


def _letter_size(picture: Image.Image) -> float:
    return max(14.0, 0.028 * math.sqrt(picture.width * picture.height))


def _draw_mark(picture: Image.Image, mark: Mark) -> None:
    """Draw white lines on black ones, which show on anything."""
    canvas, size = ImageDraw.Draw(picture), _letter_size(picture)
    points = [(float(x), float(y)) for x, y in mark.points]
    line = max(2, round(size / 7))
    lines = [[*points, points[0]] if mark.is_closed else points]
    middle = mark.points.mean(0)
    if not mark.is_closed:
        along = (mark.points[1] - mark.points[0]) / np.linalg.norm(mark.points[1] - mark.points[0])
        left = np.array([along[1], -along[0]])  # on a picture, where y grows downwards
        tip = middle + 1.2 * size * left
        wings = [tip - 0.5 * size * (left + side * along) for side in (-1, 1)]
        lines += [[tuple(middle), tuple(tip)], [tuple(wings[0]), tuple(tip), tuple(wings[1])]]
    for color, width in (("black", line + 4), ("white", line)):
        for each in lines:
            canvas.line(each, fill=color, width=width, joint="curve")


def _write(picture: Image.Image, at: tuple[float, float], text: str) -> tuple[float, float, float, float]:
    """Write plain letters on a black area, which is given, with its corner at a place or as near as fits."""
    canvas, size = ImageDraw.Draw(picture), _letter_size(picture)
    font = ImageFont.load_default(size)
    left, top, right, bottom = canvas.textbbox((0, 0), text, font)
    margin = size / 4
    width, height = right - left + 2 * margin, bottom - top + 2 * margin
    x, y = (max(0, min(a, b - c - 1)) for a, b, c in zip(at, picture.size, (width, height), strict=True))
    canvas.rectangle((x, y, x + width, y + height), fill="black")
    canvas.text((x + margin - left, y + margin - top), text, "white", font)
    return x, y, x + width, y + height


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


# --- Letters ----------------------------------------------------------------------------------------------


class _FontFile(NamedTuple):
    path: str
    """Empty for Pillow's own."""
    number: int = 0
    """Of the font, in a file of several."""


class _Run(NamedTuple):
    """Letters of one font, and where they begin."""

    x: float
    letters: str
    font: ImageFont.FreeTypeFont


class _Text(NamedTuple):
    runs: tuple[_Run, ...]
    length: float
    box: tuple[float, float, float, float]
    """What it covers, from the beginning of its base line."""


_PILLOWS_OWN = _FontFile("")

# Where there is no fontconfig, as on macOS and Windows: what comes with systems, for scripts of every kind.
_COMMON_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "segoeui.ttf", "tahoma.ttf", "Arial Unicode.ttf"),
    *("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc"),
    *("YuGothM.ttc", "malgun.ttf", "AppleSDGothicNeo.ttc", "simsun.ttc", "meiryo.ttc", "msjh.ttc"),
    *("NotoSansThai-Regular.ttf", "LeelawUI.ttf", "Thonburi.ttc", "NotoSansDevanagari-Regular.ttf"),
    *("Nirmala.ttf", "Nirmala.ttc", "Kohinoor.ttc", "NotoSansArabic-Regular.ttf", "GeezaPro.ttc"),
    *("NotoSansHebrew-Regular.ttf", "FreeSans.ttf", "seguisym.ttf", "Apple Symbols.ttf"),
)

_home_of: "dict[str, _FontFile | None]" = {}
"""Of each letter that was looked for, the system's font."""

_told: set[str] = set()
"""Letters of which a warning was given."""


def missing_letters(texts: Iterable[str], font: str | os.PathLike[str] | None = None) -> list[str]:
    """The letters of texts that no font here can draw, sorted; pictures have "?" in their place.

    A letter is drawn in the given font, else in Pillow's own, else in the first of the system's that has it:
    those of fontconfig in its order, or of some well-known names.

    Args:
        texts: any.
        font: a TrueType or OpenType file.

    Raises:
        OSError: the font cannot be read.

    >>> missing_letters(["cat", "dog"])
    []
    """
    fonts = _choose_fonts({letter for text in texts for letter in _composed(text)}, font)
    return sorted(letter for letter, home in fonts.items() if home is None)


def tell_missing(letters: list[str]) -> str:
    """What to say of letters that cannot be drawn; it is not said again in a warning."""
    _told.update(letters)
    some = " ".join(letters[:20]) + (f" and {len(letters) - 20} more" if len(letters) > 20 else "")
    return (
        f"no font here can draw {some} of the class names: pictures have ? in their place, results the "
        "names; give a font file that has them (font=..., or --font FILE)"
    )


def _composed(text: str) -> str:
    """A text with accents as part of their letters, which is how fonts have most of them."""
    return unicodedata.normalize("NFC", text)


def _fonts_of(labels: list[str], font: str | os.PathLike[str] | None) -> "dict[str, _FontFile | None]":
    """The font of each letter of the labels; where there is none, one hears of it once."""
    fonts = _choose_fonts({letter for label in labels for letter in _composed(label)}, font)
    missing = sorted(letter for letter, home in fonts.items() if home is None)
    if not _told.issuperset(missing):
        warnings.warn(tell_missing(missing), stacklevel=5)
    return fonts


def _choose_fonts(letters: set[str], font: str | os.PathLike[str] | None) -> "dict[str, _FontFile | None]":
    chosen: dict[str, _FontFile | None] = {}
    if font is not None:
        own = _FontFile(os.fspath(font))
        chosen |= dict.fromkeys(_covered(own, letters), own)
    rest = letters - chosen.keys()
    chosen |= dict.fromkeys(_pillows_letters(frozenset(rest)), _PILLOWS_OWN)
    rest = letters - chosen.keys()
    unknown = rest - _home_of.keys()
    for file in _system_fonts() if unknown else ():
        try:
            here = _covered(file, unknown)
        except OSError:  # not here, or of bitmaps
            continue
        _home_of.update(dict.fromkeys(here, file))
        unknown -= here
        if not unknown:
            break
    _home_of.update(dict.fromkeys(unknown))
    return chosen | {letter: _home_of[letter] for letter in rest}


@cache
def _pillows_letters(letters: frozenset[str]) -> set[str]:
    return _covered(_PILLOWS_OWN, letters)


def _covered(file: _FontFile, letters: Iterable[str]) -> set[str]:
    """Those of the letters that a font has."""
    face = _face(file, 32)

    def shape(letter: str) -> tuple[tuple[int, int], bytes]:
        mask = face.getmask(letter)
        return mask.size, bytes(mask)

    missing = shape("\U0010ffff")  # which is no letter, and will be none
    return {
        letter
        for letter in letters
        if not "\ud800" <= letter <= "\udfff"  # of a name that is no Unicode
        and (unicodedata.category(letter) in ("Zs", "Cf", "Cc") or shape(letter) != missing)
    }


def _face(file: _FontFile, size: float) -> ImageFont.FreeTypeFont:
    if file == _PILLOWS_OWN:
        return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))
    try:
        return ImageFont.truetype(file.path, size, file.number)
    except OSError as error:
        raise OSError(f"{file.path}: cannot be read as a font, TrueType or OpenType ({error})") from error


@cache
def _system_fonts() -> list[_FontFile]:
    """The fonts of the system, those first that are meant to be seen first."""
    return [*_fontconfigs(), *map(_FontFile, _COMMON_FONTS)]


def _fontconfigs() -> Iterator[_FontFile]:
    """Those of fontconfig: its order for text without serifs, in the language of the user."""
    program = shutil.which("fc-match")
    if program is None:
        return
    wanted = "sans:scalable=true:color=false"
    try:
        found = subprocess.run(
            [program, "--sort", "--format", "%{index}\t%{file}\n", wanted],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=20,  # it may have to list all fonts first
        )
    except (OSError, subprocess.SubprocessError):
        return
    for line in os.fsdecode(found.stdout).splitlines():
        index, _, path = line.partition("\t")
        if path and index.isdigit():
            yield _FontFile(path, int(index) & 0xFFFF)  # above are the variants of a variable font


def _lay_out(labels: list[str], size: float, fonts: "dict[str, _FontFile | None]") -> list[_Text]:
    return [_measured(_parts_of(label, fonts), size) for label in labels]


def _parts_of(label: str, fonts: "dict[str, _FontFile | None]") -> tuple[tuple[_FontFile, str], ...]:
    """A label in parts of one font; what joins or separates letters goes with what is before."""
    homes: list[tuple[_FontFile, str]] = []
    for letter in _composed(label):
        home = fonts[letter] or _PILLOWS_OWN
        if homes and unicodedata.category(letter) in ("Cf", "Mn", "Mc"):
            home = homes[-1][0]
        homes.append((home, letter if fonts[letter] else "?"))
    groups = groupby(homes, key=lambda each: each[0])
    return tuple((home, "".join(letter for _, letter in group)) for home, group in groups)


@lru_cache(_KEPT)
def _measured(parts: tuple[tuple[_FontFile, str], ...], size: float) -> _Text:
    runs: list[_Run] = []
    x = 0.0
    left = top = right = bottom = 0.0
    for home, letters in parts:
        face = _face(home, size)
        box = face.getbbox(letters, anchor="ls")
        left, right = (min(left, x + box[0]), max(right, x + box[2])) if runs else (box[0], box[2])
        top, bottom = (min(top, box[1]), max(bottom, box[3])) if runs else (box[1], box[3])
        runs.append(_Run(x, letters, face))
        x += face.getlength(letters)
    return _Text(tuple(runs), x, (left, top, right, bottom))
