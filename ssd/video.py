"""Films by PyAV: frames upright, in RGB of 8 bits, with the times that the film gives them; and new films."""

import errno
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

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

FIRST_PAUSE = 1.0
"""Seconds until a live source that was lost is opened again; the next pause is twice as long, and so on."""

_LONGEST_PAUSE = 30.0  # seconds
_TIMEOUT = 10.0  # seconds that a live source may be silent
_BUFFER = 1 << 18  # bytes that are read of a file at a time
# Titles and the like may be in any encoding; PyAV 19 takes them so by itself.
_ANY_TEXT: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
_DURATION = re.compile(
    r"([0-9]{1,9}):([0-9]{1,9}):([0-9]{1,9}(?:\.[0-9]{1,9})?)\0*"
)  # as FFmpeg and mkvmerge write it
_SHORTFALL = Fraction(1, 2)  # seconds by which a film may be shorter than it says
_TRANSFER_PQ, _TRANSFER_HLG = 16, 18  # of ITU-T H.273, table 3
_BT709, _UNSPECIFIED, _BT601 = 1, 2, 5  # matrix coefficients, as there in table 4
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
        # For sizes that change on the way, whose memory FFmpeg takes before a frame is seen here.
        context.options = {"max_pixels": str(2 * max(max_pixels, context.width * context.height) + 65_536)}
        clock, reading = _Clock(container, stream), _Packets(container, stream, path)
        turned: str | None = None
        number = 0
        for each in reading.frames():
            require_size(each.width, each.height, path, max_pixels)
            if turned is None:
                turned = _note(each, context.color_trc)
                if turned:
                    warnings.warn(as_line(f"{path}: {turned}"), stacklevel=2)
            reading.shown = Frame(
                upright(_rgb(each, context.color_trc), _display_matrix(each)), number, float(clock.of(each))
            )
            yield reading.shown
            number += 1
        if not number:
            raise ImageError(
                f"{path}: none of its pictures can be decoded; it is damaged, or has no key frame: get it "
                "again"
            )


def live(
    address: str,
    name: str,
    *,
    retries: int = 5,
    max_pixels: int = MAX_PIXELS,
    wait: Callable[[float], object] = time.sleep,
) -> Iterator[Frame]:
    """The frames of a camera or an RTSP stream, without an end; the first one's time is 0.

    Where it is lost, it is opened again, after pauses that grow, with a warning each time.

    Args:
        address: a camera's number, its device, or an RTSP address.
        name: what messages call it.
        retries: how often in a row it is opened again before it is given up.
        max_pixels: see `decoded`.
        wait: for so many seconds; if it gives True, there is no more to be done.

    Raises:
        ImageError: it cannot be opened, or was given up.
    """
    number, lost, begin, shown = 0, 0, 0.0, 0.0
    while True:
        reason = "it ended"
        try:
            with _live_container(address) as container:
                stream = video_stream(container, name)
                clock = _Clock(container, stream, from_zero=False)
                first: Fraction | None = None
                for each in _decodable(container, stream):
                    require_size(each.width, each.height, name, max_pixels)
                    at = clock.of(each)
                    if first is None:
                        begin = begin or time.monotonic()
                        first, since = at, 0.0
                        if number:  # by our clock, as the new connection's has another start
                            since = max(time.monotonic() - begin, shown + float(clock.step))
                    lost = 0
                    pixels = upright(_rgb(each, stream.codec_context.color_trc), _display_matrix(each))
                    shown = since + float(at - first)
                    yield Frame(pixels, number, shown, time.monotonic())
                    number += 1
        except ImageError:
            raise
        except (av.FFmpegError, OSError) as error:
            reason = _reason(error)
        if not number:
            raise ImageError(f"{name}: cannot be opened ({reason}); see that it is there, and not in use")
        if lost == retries:
            raise ImageError(f"{name}: was lost after frame {number - 1} ({reason}), and does not come back")
        pause = min(FIRST_PAUSE * 2**lost, _LONGEST_PAUSE)
        lost += 1
        text = f"{name}: was lost ({reason}); opened again in {pause:g} s, {lost} of {retries} times"
        warnings.warn(as_line(text), stacklevel=2)
        if wait(pause):
            return


def _decodable(container: Any, stream: Any) -> Iterator[Any]:
    for packet in container.demux(stream):
        with suppress(av.FFmpegError):  # before the first key frame, or after something was lost on the way
            yield from packet.decode()


def _live_container(address: str) -> Any:
    if "://" in address:
        options = {"rtsp_transport": "tcp", "protocol_whitelist": "rtsp,rtsps,rtp,srtp,tcp,udp,tls,crypto"}
        return av.open(address, options=options, timeout=_TIMEOUT, **_ANY_TEXT)
    if sys.platform == "darwin":
        return av.open(address, format="avfoundation", timeout=_TIMEOUT)
    device = f"/dev/video{address}" if address.isdigit() else address
    return av.open(device, format="video4linux2", timeout=_TIMEOUT)


@contextmanager
def _container(file: IO[bytes], name: str) -> Iterator[Any]:
    """An open film."""
    # As an open file, and of known readers: whatever stands in it, nothing else is opened.
    options = {"format_whitelist": ",".join(DEMUXERS), "protocol_whitelist": "none"}
    try:
        container = av.open(file, options=options, buffer_size=_BUFFER, **_ANY_TEXT)
    except (av.FFmpegError, ValueError, OSError) as error:
        if not _is_damage(error):
            raise
        if not file.seek(0, os.SEEK_END):
            raise ImageError(f"{name}: is an empty file; get it again") from error
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
        self._count, self._end = 0, Fraction(0)
        self._damaged: set[object] = set()  # the times of pictures, that each may count once; or the packets
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
                self._add_damaged(packet)
            else:
                yield from self._decode(packet)
        if broken:
            yield from self._decode(None)  # what the decoder still has
        if broken or (broken := self._missing()):
            raise self._error(broken)
        if self._damaged:
            what = "pictures are damaged: they look wrong, or were left out"
            text = f"{self._name}: at least {len(self._damaged)} of {self._count} {what}"
            warnings.warn(as_line(text), stacklevel=2)

    def _decode(self, packet: Any) -> Iterator[Any]:
        try:
            for frame in self._stream.decode(packet):
                if frame.is_corrupt:  # what the decoder lacked, it has made up from other pictures
                    self._add_damaged(frame)
                yield frame
        except av.EOFError:  # it has given all already
            return
        except av.FFmpegError:
            self._add_damaged(packet)

    def _add_damaged(self, of: Any) -> None:
        at = None if of is None else of.pts
        self._damaged.add((self._count,) if at is None else at)

    def _note(self, packet: Any) -> None:
        if not packet.size:  # which has the decoder give what it still has
            self._is_cut, self._ends_cut = False, self._is_cut
            return
        self._count += 1
        if packet.is_corrupt and self._container.format.name == "mpegts":  # any error of transmission
            self._add_damaged(packet)
        else:
            self._is_cut = packet.is_corrupt
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
        if written := _DURATION.fullmatch(stream.metadata.get("DURATION", "")):
            hours, minutes, seconds = written.groups()
            return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)
        alone = len(container.streams) == 1
        return Fraction(container.duration, av.time_base) if alone and container.duration else None
    return None


class _Clock:
    """The seconds of frames from the film's start, exactly as the file has them."""

    def __init__(self, container: Any, stream: Any, *, from_zero: bool = True) -> None:
        starts = [
            each.start_time * each.time_base
            for each in (*container.streams.video, *container.streams.audio)
            if from_zero and each.start_time is not None and each.time_base
        ]
        self.start = min(starts, default=Fraction(0))
        self.step = 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)
        self._next = Fraction(0)

    def of(self, frame: Any) -> Fraction:
        """The time of a frame; where it has none, that which its rate gives it."""
        at = frame.pts if frame.pts is not None else frame.dts
        time = self._next if at is None else at * frame.time_base - self.start
        self._next = time + self.step
        return time


# --- Pixels -----------------------------------------------------------------------------------------------


def _note(frame: Any, transfer: int) -> str:
    """What is said of how a film is converted; empty for what is as usual."""
    if curve := {_TRANSFER_PQ: "PQ", _TRANSFER_HLG: "HLG"}.get(transfer):
        return f"has a high dynamic range ({curve}), which is mapped to the usual one"
    bits = max(each.bits for each in frame.format.components)
    return f"has {bits} bits a value, of which 8 are taken" if bits > 8 else ""


def _rgb(frame: Any, transfer: int) -> npt.NDArray[np.uint8]:
    """uint8 ``[H, W, 3]`` of a frame as it is stored, whose stream has these transfer characteristics."""
    matrix = None
    if frame.colorspace == _UNSPECIFIED and frame.height >= _HD and not frame.format.is_rgb:
        matrix = _BT709
    if transfer in (_TRANSFER_PQ, _TRANSFER_HLG):
        values: npt.NDArray[np.uint8] = _to_sdr(transfer)[_pixels(frame, "rgb48le", matrix)]
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
    every = frame.side_data
    for each in map(every.__getitem__, range(len(every))):  # looping over it gives its keys from PyAV 19 on
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


# --- Writing ----------------------------------------------------------------------------------------------


class FilmWriter:
    """Writes pictures as an MP4 film, with the times and the sound of the film that they are made of.

    H.264 where the installed PyAV encodes it, else MPEG-4. At any moment what is in the file can be played;
    it is fragmented until `close`. Sides of odd length get one more row or column, like the last: H.264 has
    them only with colours of full resolution (4:4:4), which phones and browsers do not play.

    Args:
        file: to write to; never read, and not closed.
        size: width and height of the pictures.
        like: path of the film whose times, pixels' shape and sound it is to have; None for none.
    """

    def __init__(self, file: IO[bytes], size: tuple[int, int], like: str | None = None) -> None:
        self._file, self._last = _Careful(file), -1
        self.size = size[0] + size[0] % 2, size[1] + size[1] % 2
        """Width and height of the film."""
        self._stack = ExitStack()
        try:
            source = None if like is None else self._opened(like)
            # The head waits for the first pictures, for it says when they begin.
            flags = "hybrid_fragmented+delay_moov"
            options = {"movflags": flags, "frag_duration": "1000000"}  # a second
            self._film = av.open(self._file, "w", format="mp4", options=options)
            self._stack.push(lambda *_: self._end_file())
            self._pictures = self._picture_stream(source, size)
            self._sound = self._sound_of(source, like)
        except BaseException:
            self._stack.close()
            raise

    def _opened(self, path: str) -> Any:
        file = self._stack.enter_context(Path(path).open("rb"))  # noqa: SIM115
        container = self._stack.enter_context(_container(file, path))
        return container, video_stream(container, path)

    def _picture_stream(self, source: Any, size: tuple[int, int]) -> Any:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        base, rate, shape = Fraction(1, 90_000), Fraction(25), None
        if source is not None:
            like = source[1]
            base, rate = like.time_base, Fraction(like.average_rate or like.guessed_rate or rate)
            shape = like.sample_aspect_ratio
            if shape and (like.codec_context.width, like.codec_context.height) != size:
                shape = 1 / shape  # it was turned
        if codec == "mpeg4" and base.denominator > 65_535:  # more than that it cannot count
            base = Fraction(1, 60_000)
        stream: Any = self._film.add_stream(codec, rate=rate.limit_denominator(65_535))
        stream.width, stream.height = self.size
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.time_base, context.max_b_frames = base, 0
        context.gop_size = max(1, min(250, round(2 * rate)))
        context.colorspace = _BT709 if size[1] >= _HD else _BT601
        if shape:
            context.sample_aspect_ratio = shape
        if codec == "libx264":
            stream.options = {"crf": "20", "preset": "veryfast", "rc-lookahead": "10"}
        else:
            context.qmin = context.qmax = 3
        try:
            context.open()
        except av.FFmpegError as error:
            text = f"{codec} does not encode pictures of {size[0]}x{size[1]} ({_reason(error)})"
            raise ImageError(text) from error
        return stream

    def _sound_of(self, source: Any, name: str | None) -> Iterator[tuple[Fraction, Any]]:
        """The packets of the sound with their times, for the film."""
        if source is None or not source[0].streams.audio:
            return iter(())
        container, pictures = source
        sound = container.streams.audio[0]
        try:
            stream = self._film.add_stream_from_template(sound)
        except (av.FFmpegError, ValueError) as error:
            text = f"MP4 cannot hold its sound, of {sound.codec_context.name}; the film with boxes has none"
            warnings.warn(as_line(f"{name}: {text} ({_reason(error)})"), stacklevel=2)
            return iter(())
        start = _Clock(container, pictures).start

        def packets() -> Iterator[tuple[Fraction, Any]]:
            with suppress(av.FFmpegError, OSError):  # where the film breaks off, which its pictures tell
                for packet in container.demux(sound):
                    if packet.size and packet.pts is not None and packet.dts is not None:
                        base = packet.time_base
                        packet.pts -= round(start / base)
                        packet.dts -= round(start / base)
                        packet.stream = stream
                        if packet.dts >= 0:  # else it would shift all that comes after
                            yield packet.pts * base, packet

        return packets()

    def add(self, picture: Image.Image, time: float) -> None:
        """Write the next picture, RGB, which is shown from a time on, in seconds from the film's start.

        Raises:
            OSError: it cannot be written.
        """
        context = self._pictures.codec_context
        pixels = np.asarray(picture)
        if pixels.shape[0] % 2 or pixels.shape[1] % 2:
            pixels = np.pad(pixels, ((0, picture.height % 2), (0, picture.width % 2), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_numpy_buffer(pixels, "rgb24")
        frame = frame.reformat(*self.size, format="yuv420p", dst_colorspace=context.colorspace)
        self._last = max(self._last + 1, round(Fraction(time) / context.time_base))
        frame.pts, frame.time_base = self._last, context.time_base
        with _as_os_errors():
            for at, packet in self._sound:
                self._film.mux(packet)
                if at > self._last * context.time_base:
                    break
            self._film.mux(self._pictures.encode(frame))

    def close(self) -> None:
        """End the film with what it has; its sound ends with the pictures.

        Raises:
            OSError: the rest cannot be written; what is in the file can be played all the same.
        """
        with self._stack:
            if not self._file.failed:
                with _as_os_errors():
                    self._film.mux(self._pictures.encode(None))

    def _end_file(self) -> None:
        with suppress(OSError) if self._file.failed else nullcontext(), _as_os_errors():
            self._film.close()


@contextmanager
def _as_os_errors() -> Iterator[None]:
    try:
        yield
    except av.FFmpegError as error:
        if error.errno in errno.errorcode:
            raise OSError(error.errno, _reason(error)) from error
        raise OSError(_reason(error)) from error  # one of FFmpeg's own


def is_playable(path: str | os.PathLike[str]) -> bool:
    """Whether a film has a picture; one whose file was full too early has none."""
    try:
        return next(decoded(os.fspath(path)), None) is not None
    except (ImageError, OSError):
        return False


class _Careful:
    """A file for FFmpeg to write to: all or nothing more.

    Once something was not written, nothing else is: the last thing that a film gets is a new head in place of
    that by which it can be played, as far as it goes.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.failed = file, False
        self.seek, self.tell = file.seek, file.tell

    def write(self, content: Any) -> int:
        if self.failed:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rest = memoryview(content).cast("B")
        length = len(rest)
        self.failed = True  # also where this is interrupted
        while rest:
            rest = rest[self._file.write(rest) :]
        self.failed = False
        return length
