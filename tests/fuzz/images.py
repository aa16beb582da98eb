"""Files of the eight formats that are read, taken apart, changed, and put together again."""

import io
import random
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, features

import ssd
from fuzz.engine import Case, some_bytes
from ssd.errors import ImageError
from ssd.images import MAX_ASPECT, upright_size

MAX_PIXELS = 1 << 22
PNG = b"\x89PNG\r\n\x1a\n"


@cache
def _seeds() -> tuple[tuple[str, bytes], ...]:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
    rgba = Image.fromarray(pixels)
    rgb, grey, few = rgba.convert("RGB"), rgba.convert("L"), rgba.convert("RGB").quantize(9)
    wide = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    floats = Image.fromarray(pixels[..., 0].astype(np.float32) / 255)
    turned, more = Image.Exif(), {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    turned[0x0112] = 6

    def made(image: Image.Image, kind: str, **options: object) -> tuple[str, bytes]:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return f"photo.{kind.lower()}", file.getvalue()

    runs = b"".join(bytes([30, row, 0, 0]) for row in range(20)) + b"\0\1"
    header = struct.pack("<IiiHHIIIIII", 40, 30, 20, 1, 8, 1, len(runs), 0, 0, 256, 0)
    table = bytes(range(256)) * 4
    rle = b"BM" + struct.pack("<IHHI", 14 + len(header + table + runs), 0, 0, 14 + len(header + table))
    files = [
        made(rgb, "JPEG", exif=turned),
        made(rgb, "JPEG", progressive=True, subsampling=0),
        made(grey, "JPEG", restart_marker_blocks=1),
        made(rgb.convert("CMYK"), "JPEG"),
        made(rgb, "PNG", exif=turned),
        made(rgba, "PNG", **more),
        made(few, "PNG", transparency=3),
        made(wide, "PNG"),
        made(rgb, "WEBP", exif=turned),
        made(rgba, "WEBP", lossless=True),
        made(rgb, "WEBP", **more),
        made(few, "GIF", transparency=3),
        made(rgb, "GIF", **more),
        made(rgb, "BMP"),
        made(few, "BMP"),
        ("photo.bmp", rle + header + table + runs),
        made(rgb, "TIFF", exif=turned),
        made(rgba, "TIFF", compression="tiff_lzw"),
        made(rgb, "TIFF", compression="jpeg", **more),
        made(wide, "TIFF", compression="tiff_deflate"),
        made(floats, "TIFF"),
        made(rgb, "PPM"),
        made(wide, "PPM"),
        ("photo.ppm", b"P3 # of text\n2 2\n7\n" + b"1 2 3 4 5 6 7 0 1 2 3 4\n"),
    ]
    if features.check("avif"):
        files += [made(rgb, "AVIF", exif=turned), made(rgba, "AVIF")]
    return tuple(files)


def seeds() -> list[Case]:
    return [{name: content} for name, content in _seeds()]


def mutate(rng: random.Random, case: Case) -> Case:
    ((name, content),) = case.items()
    for start, take_apart, put_together, extras in _FORMATS:
        if content.startswith(start) and rng.random() < 0.7:
            pieces = take_apart(content)
            for _ in range(rng.choice((1, 1, 2, 4))):
                _change(rng, pieces, extras)
            content = put_together(pieces)
            break
    else:
        content = some_bytes(rng, content)
    suffix = rng.choice((".jpg", ".tif", ".png", ""))
    return {name if rng.random() < 0.9 else f"photo{suffix}": content[: 1 << 20]}


def promise(case: Case, folder: Path) -> str:
    """An image file, by its path or as its bytes, is read as an upright RGB image of the size that
    `upright_size` tells, or refused in one line that names it."""
    ((name, content),) = case.items()
    path = folder / name
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        results = [_load(source) for source in (path, content, io.BytesIO(content))]
        size = upright_size(path, max_pixels=MAX_PIXELS)
    foreign = [str(each.message) for each in told if not str(each.message).startswith("the photo: ")]
    assert not foreign, f"warnings of others: {foreign}"
    first = results[0]
    if isinstance(first, str):
        for each in results:
            assert isinstance(each, str), "refused by its path, and read from its bytes"
            assert each.startswith("the photo: "), each
            assert each.isprintable(), each
            assert len(each) < 1000, each
        return "refused"
    assert first.mode == "RGB"
    assert 1 <= first.width * first.height <= MAX_PIXELS
    assert max(first.size) <= MAX_ASPECT * min(first.size)
    assert size == first.size, f"the header says {size}, the image is {first.size}"
    for other in results[1:]:
        assert isinstance(other, Image.Image), other
        assert np.array_equal(np.asarray(first), np.asarray(other)), "path and bytes give different pixels"
    return "read"


def _load(source: Path | bytes | io.BytesIO) -> Image.Image | str:
    try:
        return ssd.load_image(source, name="the photo", max_pixels=MAX_PIXELS)
    except ImageError as error:
        return str(error)


# --- Formats, as pieces -----------------------------------------------------------------------------------


def _change(rng: random.Random, pieces: list[bytes], extras: list[bytes]) -> None:
    at = rng.randrange(len(pieces) or 1)
    way = rng.randrange(6) if pieces else 0
    if way == 0:
        pieces.insert(at, rng.choice(extras))
    elif way == 1:
        del pieces[at]
    elif way == 2:
        pieces[at:at] = [pieces[at]] * rng.choice((1, 2, 300))
    elif way == 3:
        other = rng.randrange(len(pieces))
        pieces[at], pieces[other] = pieces[other], pieces[at]
    elif pieces[at][:4] == b"IDAT" and way == 4:
        pieces[at] = b"IDAT" + zlib.compress(some_bytes(rng, _unpacked(pieces[at][4:])))
    else:
        pieces[at] = some_bytes(rng, pieces[at], 1 << 16)


def _unpacked(packed: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, 1 << 16)
    except zlib.error:
        return packed


def _png_apart(content: bytes) -> list[bytes]:
    pieces, at = [], 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        pieces.append(content[at + 4 : at + 8 + length])
        at += 12 + length
    return pieces


def _png_together(pieces: list[bytes]) -> bytes:
    return PNG + b"".join(
        struct.pack(">I", max(0, len(each) - 4)) + each + struct.pack(">I", zlib.crc32(each))
        for each in pieces
    )


def _jpeg_apart(content: bytes) -> list[bytes]:
    """Each marker with what follows it, up to the next one that is no part of the pixels."""
    return re.findall(rb"\xFF[^\x00\xD0-\xD7\xFF](?:[^\xFF]|\xFF[\x00\xD0-\xD7])*", content, re.DOTALL)


def _riff_apart(content: bytes) -> list[bytes]:
    pieces, at = [], 12
    while at + 8 <= len(content):
        length = int.from_bytes(content[at + 4 : at + 8], "little")
        pieces.append(content[at : at + 4] + content[at + 8 : at + 8 + length])
        at += 8 + length + length % 2
    return pieces


def _riff_together(pieces: list[bytes]) -> bytes:
    body = b"".join(
        each[:4].ljust(4) + struct.pack("<I", len(each[4:])) + each[4:] + bytes(len(each) % 2)
        for each in pieces
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _gif_apart(content: bytes) -> list[bytes]:
    """The header with its table of colours, then each extension or image; sub-blocks stay together."""
    table = 3 << (content[10] % 8 + 1) if content[10] & 128 else 0
    pieces, at = [content[: 13 + table]], 13 + table
    while at < len(content) and content[at] in (0x21, 0x2C):
        start = at
        if content[at] == 0x21:
            at += 2
        else:
            flags = content[at + 9]
            at += 11 + (3 << (flags % 8 + 1) if flags & 128 else 0)
        while at < len(content) and content[at]:
            at += 1 + content[at]
        at += 1
        pieces.append(content[start:at])
    return [*pieces, content[at:]]


def _tiff_apart(content: bytes) -> list[bytes]:
    """What is before the first directory, its entries, and what is behind it."""
    start = int.from_bytes(content[4:8], "little") + 2
    end = start + 12 * int.from_bytes(content[start - 2 : start], "little")
    entries = [content[at : at + 12] for at in range(start, end, 12)]
    return [content[: start - 2], *entries, content[end:]]


def _tiff_together(pieces: list[bytes]) -> bytes:
    first, last = (pieces[0], pieces[-1]) if len(pieces) > 1 else (b"", b"")
    entries = b"".join(each[:12].ljust(12, b"\0") for each in pieces[1:-1])
    return first + struct.pack("<H", len(entries) // 12 % 65536) + entries + last


def _bmp_apart(content: bytes) -> list[bytes]:
    """The numbers of the header, and the rest."""
    return [content[:2], *(content[at : at + 2] for at in range(2, 54, 2)), content[54:]]


def _exif(orientation: int) -> bytes:
    return b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0) + bytes(4)


_LARGE = zlib.compress(bytes(1_100_000))
_XMP = b"<x:xmpmeta tiff:Orientation='8'/>"
_TURNS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 255)

_FORMATS: list[tuple[bytes, Callable[[bytes], list[bytes]], Callable[[list[bytes]], bytes], list[bytes]]] = [
    (
        PNG,
        _png_apart,
        _png_together,
        [
            *(b"eXIf" + _exif(turn) for turn in _TURNS),
            b"iTXtXML:com.adobe.xmp\0\0\0\0\0" + _XMP,
            b"zTXtComment\0\0" + _LARGE,
            b"iCCPprinter\0\0" + _LARGE,
            b"acTL" + bytes(8),
            b"acTL" + struct.pack(">II", 2, 0),
            b"fcTL" + struct.pack(">IIIIIHHBB", 0, 9, 9, 30, 30, 1, 1, 0, 0),
            b"tRNS" + bytes(6),
            b"IDAT",
            b"IEND",
            b"PLTE" + bytes(range(9)),
        ],
    ),
    (
        b"\xff\xd8",
        _jpeg_apart,
        b"".join,
        [
            *(
                b"\xff\xe1" + struct.pack(">H", 8 + len(_exif(turn))) + b"Exif\0\0" + _exif(turn)
                for turn in _TURNS
            ),
            b"\xff\xda\0\x08\1\1\0\1\x3f\0",
            b"\xff\xe2\0\x10MPF\0II*\0\x08\0\0\0\0\0",
            b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\2",
            b"\xff\xdd\0\4\0\0",
            b"\xff\xd9",
        ],
    ),
    (
        b"RIFF",
        _riff_apart,
        _riff_together,
        [
            *(b"EXIF" + _exif(turn) for turn in _TURNS),
            b"VP8X\x2c\0\0\0\x1d\0\0\x13\0\0",
            b"VP8X\x2c\0\0\0\xff\xff\xff\xff\xff\xff",
            b"ALPH\0",
            b"ANIM" + bytes(6),
            b"XMP " + _XMP,
        ],
    ),
    (
        b"GIF8",
        _gif_apart,
        b"".join,
        [
            b"\x21\xfe\5ours!\0",
            b"\x21\xf9\4\1\0\0\0\0",
            b"\x21\xff\x0bNETSCAPE2.0\3\1\0\0\0",
            b"\x2c\0\0\0\0\xff\xff\xff\xff\0\2\2\x44\1\0",
        ],
    ),
    (
        b"II*\0",
        _tiff_apart,
        _tiff_together,
        [
            *(struct.pack("<HHIHH", 0x0112, 3, 1, turn, 0) for turn in _TURNS),
            *(
                struct.pack("<HHII", tag, 4, 1, value)
                for tag in (256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 322, 323, 330, 339)
                for value in (0, 1, 2, 7, 65535, 2**32 - 1)
            ),
        ],
    ),
    (b"BM", _bmp_apart, b"".join, [bytes(2), b"\xff\xff", b"\1\0", b"\0\x80"]),
    (b"P", bytes.split, b" ".join, [b"0", b"-1", b"65535", b"65536", b"#", b"\n", b"9" * 5000]),
]
