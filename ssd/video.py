"""Reading films with PyAV: every frame upright, in RGB of 8 bits, with the time that the film gives it."""

import errno
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ssd.errors import ImageError, MissingExtra, as_line
from ssd.images import MAX_PIXELS, require_size
from ssd.sources import Frame

try:
    import av
except ImportError as error:
    raise MissingExtra("video") from error

DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2",
    "matroska,webm",
    *("avi", "asf", "flv", "mpeg", "mpegts", "mpegvideo", "mxf", "ogg", "dv", "yuv4mpegpipe"),
    *("h264", "hevc", "m4v", "ivf", "obu", "mjpeg", "gif", "apng"),
)
"""FFmpeg's readers that may run: of files that hold their film. Others, as those of playlists, open what a
file names."""

_BUFFER = 1 << 18  # bytes that are read of a file at a time
_SHORTFALL = Fraction(1, 2)  # seconds by which a film may be shorter than it says
_TRANSFER_PQ, _TRANSFER_HLG = 16, 18  # of ITU-T H.273, table 3
_BT709, _UNSPECIFIED = 1, 2  # matrix coefficients, as there in table 4
_HD = 720  # rows from which on a film that does not say it is taken to be of BT.709, as players do
_SDR_WHITE = 203  # nits, of ITU-R BT.2408


def decoded(path: str, *, max_pixels: int = MAX_PIXELS) -> Iterator[Frame]:
    """All frames of a film's file, as they are shown.

    They are turned and mirrored as the file says. Values of more than 8 bits are scaled, and high dynamic
    range is mapped to the usual one, both with a warning. Times are the stream's own, from the film's start.

    Args:
        path: of the file; FFmpeg's readers in `DEMUXERS` may read it.
        max_pixels: most pixels of a frame; see `ssd.load_image`.

    Raises:
        ImageError: it is no film, has no pictures or too large ones, or breaks off; then after the frames
            before that, and the message says where.
        FileNotFoundError: there is no such file.
    """
    with open(path, "rb") as file, _container(file, path) as container:
        stream = video_stream(container, path)
        context = stream.codec_context
        require_size(context.width, context.height, path, max_pixels)
        context.thread_type = "AUTO"
        clock, reading = _Clock(container, stream), _Packets(container, stream, path)
        turned: str | None = None
        number = 0
        for each in reading.frames():
            require_size(each.width, each.height, path, max_pixels)
            if turned is None:
                turned = _note(each)
                if turned:
                    warnings.warn(as_line(f"{path}: {turned}"), stacklevel=2)
            reading.shown = Frame(upright(_rgb(each), _display_matrix(each)), number, float(clock.of(each)))
            yield reading.shown
            number += 1
        if not number:
            raise ImageError(
                f"{path}: none of its pictures can be decoded; it is damaged, or has no key frame: get it "
                "again"
            )


@contextmanager
def _container(file: IO[bytes], name: str) -> Iterator[Any]:
    """An open film."""
    # As an open file, and of known readers: whatever stands in it, nothing else is opened.
    options = {"format_whitelist": ",".join(DEMUXERS), "protocol_whitelist": "none"}
    try:
        container = av.open(file, options=options, buffer_size=_BUFFER, metadata_errors="replace")
    except (av.FFmpegError, ValueError, OSError) as error:
        if not _is_damage(error):
            raise
        raise ImageError(
            f"{name}: cannot be opened as a film ({_reason(error)}); it is cut off, damaged or of a kind "
            "that is not read: get it again, or convert it, as by: ffmpeg -i FILE film.mp4"
        ) from error
    try:
        yield container
    finally:
        container.close()


def video_stream(container: Any, name: str) -> Any:
    """The stream of a film that is its pictures, and not a cover.

    Raises:
        ImageError: there is none.
    """
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            if stream.codec_context is None or not stream.codec_context.codec.name:
                raise ImageError(f"{name}: its pictures are of a kind that PyAV does not decode; convert it")
            return stream
    raise ImageError(f"{name}: is a file without moving pictures, such as sound alone; pass a film")


def _is_damage(error: Exception) -> bool:
    """Whether an error is of what stands in a file; else it is the disk's."""
    # An invalid argument is a place in the file that damage has made up.
    return isinstance(error, av.FFmpegError | ValueError) or getattr(error, "errno", None) == errno.EINVAL


def _reason(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error)).partition("; last error log")[0]


class _Packets:
    """The packets of a stream, decoded; it knows whether the file breaks off."""

    def __init__(self, container: Any, stream: Any, name: str) -> None:
        self._container, self._stream, self._name = container, stream, name
        self._count, self._damaged, self._end = 0, 0, Fraction(0)
        self._is_cut = self._ends_cut = False  # the last packet
        self.shown: Frame | None = None
        """The last frame that was given."""

    def frames(self) -> Iterator[Any]:
        """All frames that can be decoded.

        Raises:
            ImageError: the file breaks off; when all frames before that are given.
        """
        broken = ""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except (av.FFmpegError, OSError) as error:
                if not _is_damage(error):
                    raise
                broken = _reason(error)
                break
            self._note(packet)
            if self._is_cut:  # an error in a decoder of several threads costs what the others hold
                self._damaged += 1
            else:
                yield from self._decode(packet)
        if broken:
            yield from self._decode(None)  # what the decoder still has
        if broken or (broken := self._missing()):
            raise self._error(broken)
        if self._damaged:
            text = f"{self._name}: {self._damaged} of {self._count} packets are damaged and were left out"
            warnings.warn(as_line(text), stacklevel=2)

    def _decode(self, packet: Any) -> Iterator[Any]:
        try:
            yield from self._stream.decode(packet)
        except av.EOFError:  # it has given all already
            return
        except av.FFmpegError:
            self._damaged += 1

    def _note(self, packet: Any) -> None:
        if not packet.size:  # which has the decoder give what it still has
            self._is_cut, self._ends_cut = False, self._is_cut
            return
        self._count += 1
        # In a transport stream that stands for any error of transmission.
        self._is_cut = packet.is_corrupt and self._container.format.name != "mpegts"
        at = packet.pts if packet.pts is not None else packet.dts
        if at is not None:
            self._end = max(self._end, (at + (packet.duration or 0)) * packet.time_base)

    def _missing(self) -> str:
        """What the file says to hold and does not; empty if that is all there."""
        stream = self._stream
        if self._is_cut or self._ends_cut:
            return "it ends within a picture"
        if stream.frames:  # of other files than MP4, the number may be a little wrong
            exact = "mp4" in self._container.format.name
            if self._count < (stream.frames if exact else stream.frames * 0.99 - 1):
                return f"it ends after {self._count:,} of {stream.frames:,} pictures"
        else:
            promised = _duration(self._container, stream)
            if promised is not None and self._end < promised - _SHORTFALL:
                return f"it ends after {float(self._end):.2f} of {float(promised):.2f} s"
        return ""

    def _error(self, reason: str) -> ImageError:
        if self.shown is None:
            where = "before its first picture"
        else:
            where = f"at {self.shown.time:.2f} s, after frame {self.shown.number}"
        return ImageError(
            f"{self._name}: breaks off {where} ({reason}); it is cut off or damaged: get it again, or "
            "go on with what there is"
        )


def _duration(container: Any, stream: Any) -> Fraction | None:
    """The seconds at which a stream ends, as the head of its file says; None where that says nothing."""
    if container.format.name.startswith("matroska"):
        text = stream.metadata.get("DURATION", "")
        try:
            hours, minutes, seconds = text.split(":")
            return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds.strip("\0"))
        except ValueError:
            alone = len(container.streams) == 1
            return Fraction(container.duration, av.time_base) if alone and container.duration else None
    return None


class _Clock:
    """The seconds of frames from the film's start, exactly as the file has them."""

    def __init__(self, container: Any, stream: Any) -> None:
        starts = [
            each.start_time * each.time_base
            for each in (*container.streams.video, *container.streams.audio)
            if each.start_time is not None and each.time_base
        ]
        self._start = min(starts, default=Fraction(0))
        self._step = 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)
        self._next = Fraction(0)

    def of(self, frame: Any) -> Fraction:
        """The time of a frame; where it has none, that which its rate gives it."""
        at = frame.pts if frame.pts is not None else frame.dts
        time = self._next if at is None else at * frame.time_base - self._start
        self._next = time + self._step
        return time


# --- Pixels -----------------------------------------------------------------------------------------------


def _note(frame: Any) -> str:
    """What is said of how a film is converted; empty for what is as usual."""
    if curve := {_TRANSFER_PQ: "PQ", _TRANSFER_HLG: "HLG"}.get(frame.color_trc):
        return f"has a high dynamic range ({curve}), which is mapped to the usual one"
    bits = max(each.bits for each in frame.format.components)
    return f"has {bits} bits a value, of which 8 are taken" if bits > 8 else ""


def _rgb(frame: Any) -> npt.NDArray[np.uint8]:
    """uint8 ``[H, W, 3]`` of a frame as it is stored."""
    matrix = None
    if frame.colorspace == _UNSPECIFIED and frame.height >= _HD and not frame.format.is_rgb:
        matrix = _BT709
    if frame.color_trc in (_TRANSFER_PQ, _TRANSFER_HLG):
        values: npt.NDArray[np.uint8] = _to_sdr(frame.color_trc)[_pixels(frame, "rgb48le", matrix)]
        return values
    return _pixels(frame, "rgb24", matrix)


def _pixels(frame: Any, format: str, matrix: int | None) -> npt.NDArray[Any]:
    return np.asarray(frame.reformat(format=format, src_colorspace=matrix).to_ndarray())


@cache
def _to_sdr(transfer: int) -> npt.NDArray[np.uint8]:
    """For each value of 16 bits of high dynamic range, that of the usual range: uint8 ``[65536]``."""
    values = np.linspace(0, 1, 1 << 16)
    if transfer == _TRANSFER_PQ:  # SMPTE ST 2084, in nits
        power = values ** (32 / 2523)
        light = 10_000 * (np.maximum(power - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * power)) ** (
            8192 / 1305
        )
    else:  # ITU-R BT.2100, for a display of 1,000 nits
        a, b = 0.17883277, 0.28466892
        c = 0.5 - a * math.log(4 * a)
        light = 1000 * np.where(values <= 0.5, values**2 / 3, (np.exp((values - c) / a) + b) / 12) ** 1.2
    light = light / _SDR_WHITE
    light *= (1 + light / 25) / (1 + light)  # Reinhard, extended: 5,000 nits are white
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(255 * np.clip(srgb, 0, 1)).astype(np.uint8)


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """How a picture is to be turned: a, b, c, d of ``x' = a x + c y``, ``y' = b x + d y``, times 65536."""
    for each in frame.side_data:
        if each.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(each, np.int32)[:5].tolist()
            return a, b, c, d
    return 1 << 16, 0, 0, 1 << 16


def upright(pixels: npt.NDArray[Any], matrix: tuple[int, int, int, int]) -> npt.NDArray[Any]:
    """An image ``[H, W, C]``, turned by quarters and mirrored as a display matrix says.

    >>> upright(np.array([[[1], [2]]]), (0, 1, -1, 0)).tolist()  # a quarter to the right
    [[[1]], [[2]]]
    """
    a, b, c, d = matrix
    if abs(b) > abs(a):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
