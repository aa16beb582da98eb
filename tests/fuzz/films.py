"""Films, which are no images but give theirs one by one, and animations, of which the first frame is one."""

import io
import math
import os
import random
import struct
import tempfile
import warnings
from collections import Counter
from functools import cache
from pathlib import Path

import av
import numpy as np
from made_films import drawn, write_film
from PIL import Image

import ssd
from fuzz.engine import Case, some_bytes
from ssd.errors import ImageError
from ssd.frames import frames_of
from ssd.sources import Film, find_all, find_images, is_film

SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".ts", ".jpg", ".png", ".gif", ".webp", "")
FILM_SUFFIXES = SUFFIXES[:6]


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def _ebml(kind: bytes) -> bytes:
    head = b"\x42\x86\x81\x01\x42\xf7\x81\x01\x42\x82" + bytes([0x80 | len(kind)]) + kind
    return b"\x1a\x45\xdf\xa3" + bytes([0x80 | len(head)]) + head + b"\x18\x53\x80\x67\x01" + b"\xff" * 7


@cache
def _films() -> tuple[bytes, ...]:
    media = _box(b"moov", _box(b"mvhd", bytes(100))) + _box(b"mdat", bytes(range(256)) * 8)
    packet = b"G\x40\0\x10" + b"\xff" * 184
    return (
        _box(b"ftyp", b"isom\0\0\2\0isomiso2avc1mp41") + media,
        _box(b"ftyp", b"mp42\0\0\0\0mp42isom") + media,
        _box(b"ftyp", b"qt  \0\0\0\0qt  ") + _box(b"wide", b"") + media,
        media,
        _box(b"mdat", bytes(4000)) + media,
        b"RIFF" + struct.pack("<I", 300) + b"AVI LIST" + struct.pack("<I", 192) + b"hdrlavih" + bytes(284),
        _ebml(b"matroska") + bytes(300),
        _ebml(b"webm") + bytes(300),
        b"\0\0\1\xba" + bytes(300),
        packet * 6,
        b"FLV\1\5\0\0\0\x09" + bytes(300),
    )


@cache
def _animations() -> tuple[bytes, ...]:
    frames = [Image.new("RGB", (12, 9), color) for color in ("red", "lime", "blue")]

    def made(kind: str, **options: object) -> bytes:
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
        return file.getvalue()

    return (
        made("GIF", optimize=False),
        made("WEBP", lossless=True),
        made("PNG"),
        made("PNG", default_image=True),
    )


@cache
def _playable() -> tuple[tuple[str, bytes], ...]:
    """Whole films of several containers and codecs, and their suffixes."""
    made = []
    for suffix, codec, pixels in (
        (".mp4", "libx264", "yuv420p"),
        (".mov", "mpeg4", "yuv420p"),
        (".mkv", "ffv1", "yuv420p10le"),
        (".webm", "libvpx-vp9", "yuv420p"),
        (".avi", "mjpeg", "yuvj420p"),
        (".ts", "mpeg2video", "yuv420p"),
    ):
        if codec in av.codecs_available:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"film{suffix}"
                write_film(path, [drawn(i, (48, 32)) for i in range(8)], codec=codec, pixels=pixels)
                made.append((suffix, path.read_bytes()))
    return tuple(made)


def _play(path: Path) -> str:
    """Every frame is a whole picture, in order; what breaks off says so in a line that names the film."""
    count = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damage that is passed over, and of ten bits
        try:
            for count, frame in enumerate(frames_of(Film(str(path)), max_pixels=1 << 22), start=1):
                assert frame.number == count - 1
                assert frame.pixels.dtype == np.uint8
                assert frame.pixels.shape[2] == 3
                assert frame.pixels.shape[0] * frame.pixels.shape[1] <= 1 << 22
                assert math.isfinite(frame.time)
                if count == 1000:  # a damaged length of time may be long
                    break
        except ImageError as error:
            told = str(error)
            assert told.startswith(f"{path}: "), told
            assert "\n" not in told, told
            return "breaks off" if count else "refused"
    return "played"


def seeds() -> list[Case]:
    playable = [{f"film{suffix}": content} for suffix, content in _playable()]
    films = [{f"film{SUFFIXES[i % len(SUFFIXES)]}": film} for i, film in enumerate(_films())]
    return [*playable, *films, *({"film.png": animation} for animation in _animations())]


def is_playable(case: Case) -> bool:
    """Whether it is one of the whole films."""
    ((name, content),) = case.items()
    return (os.path.splitext(name)[1], content) in _playable()


def mutate(rng: random.Random, case: Case) -> Case:
    """Another suffix, or other bytes behind the first ones, by which the kind is told."""
    ((name, content),) = case.items()
    if is_playable(case):
        return {name: some_bytes(rng, content)}
    name = f"film{rng.choice(SUFFIXES)}"
    if content in _films() and content[:1] != b"G":
        whole = rng.choice((32, 64, 128))
        return {name: content[:whole] + some_bytes(rng, content[whole:])}
    return {name: content if content in _films() else some_bytes(rng, content)}


def promise(case: Case, folder: Path) -> str:
    """A film gives whole frames, up to where it breaks off, and as an image is told as that, with the way to
    its pictures; an animation is read as its first frame, or refused; in a folder, files with the suffixes of
    films are left out and counted where images are wanted."""
    ((name, content),) = case.items()
    path = folder / name
    counts: Counter[str] = Counter()
    listed = [each.name for each in find_images(folder, counts.update)]
    suffix = path.suffix
    assert listed == ([] if suffix in FILM_SUFFIXES or not suffix else [str(path)])
    assert counts == ({} if listed else {suffix or "file without suffix": 1})
    assert [each.name for each in find_images(path)] == [str(path)]
    list(find_all([str(path), str(path)]))
    played = _play(path) if is_film(str(path)) else ""
    is_animation = content[:4] in (b"GIF8", b"\x89PNG") or content[8:12] == b"WEBP"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            image = ssd.load_image(path)
        except ImageError as error:
            told = str(error)
            assert told.startswith(f"{path}: "), told
            assert "\n" not in told, told
            if any(content[:32] == film[:32] for film in _films()):
                assert ": this is a video (" in told, told
                assert "ffmpeg -i FILE" in told, told
                return "told"
            assert content not in _animations(), error
            assert (suffix, content) not in _playable() or played == "played", played
            return played or "refused"
    assert is_animation, "a film is read as an image"
    if content in _animations():
        assert np.all(np.asarray(image) == (255, 0, 0)), "not the first frame"
    return "first frame"
