"""Films of drawn shapes that move, written with PyAV; what each frame shows is known."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

RATE = Fraction(25)


def drawn(number: int, size: tuple[int, int] = (96, 72)) -> np.ndarray:
    """uint8 ``[H, W, 3]``: a square that goes to the right and a circle that goes down, on a background of
    which the number can be read: see `number_of`."""
    width, height = size
    picture = Image.new("RGB", size, (number % 16 * 10, number // 16 % 16 * 10, 60))
    canvas = ImageDraw.Draw(picture)
    left, top = number * 3 % (width - 20), number * 2 % (height - 20)
    canvas.rectangle((left, height // 2, left + 16, height // 2 + 16), fill=(250, 250, 40))
    canvas.ellipse((width // 2, top, width // 2 + 18, top + 18), fill=(40, 200, 250))
    return np.asarray(picture)


def number_of(pixels: np.ndarray) -> int:
    """The number of a frame of `drawn`, by its corner; also after lossy compression."""
    red, green, _ = np.asarray(pixels)[:4, :4].reshape(-1, 3).astype(float).mean(0)
    return round(red / 10) + 16 * round(green / 10)


def steady(count: int, rate: Fraction = RATE) -> list[Fraction]:
    """The times of so many frames at a rate."""
    return [Fraction(number) / rate for number in range(count)]


def write_film(
    path: Path,
    frames: Sequence[np.ndarray],
    times: Sequence[Fraction] | None = None,
    *,
    codec: str = "ffv1",
    pixels: str = "bgr0",
    base: Fraction | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    tags: dict[str, int] | None = None,
    sound: bool | str = False,
) -> Path:
    """Write frames with their times in seconds; by default without any loss. Sound is AAC, or of a codec."""
    times = list(times or steady(len(frames)))
    base = base or 1 / RATE
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.options = options or {}
        stream.codec_context.time_base = base
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if sound:
            tone = file.add_stream("aac" if sound is True else sound, rate=16_000, layout="mono")
            for at in range(0, int(16_000 * (times[-1] + times[1])), 1024):
                wave = np.sin(np.arange(at, at + 1024) / 6).astype(np.float32)[None]
                samples = av.AudioFrame.from_ndarray(wave, "fltp", "mono")
                samples.sample_rate, samples.pts, samples.time_base = 16_000, at, Fraction(1, 16_000)
                file.mux(tone.encode(samples))
            file.mux(tone.encode(None))
        for pixels_of_one, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels_of_one, "rgb24")
            ticks = time / base
            assert ticks.denominator == 1
            frame.pts, frame.time_base = int(ticks), base
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path
