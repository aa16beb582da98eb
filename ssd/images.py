"""Reading images of any kind as upright RGB; every refusal is an `ImageError` that names the image."""

import errno
import importlib
import io
import math
import os
import re
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeAlias, TypeGuard, TypeVar, Union, cast

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, PngImagePlugin

from ssd import web
from ssd.errors import ImageError, ImageMemoryError, as_line
from ssd.rgb import UPRIGHT, hwc, hwc_of_tensor, rgb_of_array, upright_rgb
from ssd.signatures import DEVELOP, HEAD, HEIC, HEIF, HEIF_SUFFIXES, identify

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Readable(Protocol):
    """An open file, or what is read as one."""

    def read(self) -> bytes:
        """The bytes up to its end."""


# Not with "|", which takes no name in quotes.
ImageSource: TypeAlias = Union[
    str, os.PathLike[str], bytes, Readable, Image.Image, npt.NDArray[np.generic], "Tensor"
]

DECODERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Those of Pillow's own decoders that may run; the others (EPS and its kind start programs) never do."""

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jif .jfif .jfi .pjp .pjpeg .mpo .png .apng .webp .gif .bmp .dib .tif .tiff "  # noqa: SIM905
    ".ppm .pgm .pbm .pnm .avif".split()
)
"""Of files that are read; see `is_image_name` for those of openers that are registered with Pillow."""

ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
"""Those of the formats whose files may be animations."""

MAX_PIXELS = 178_956_970
"""Where Pillow refuses, 13,377 x 13,377: twice ``PIL.Image.MAX_IMAGE_PIXELS``. Where somebody has changed
that, it stands for twice the new number, or for no limit."""

MAX_ASPECT = 100
"""Most times that one side may be longer than the other."""

MAX_BYTES = 64 << 20
"""Most bytes that are read from a URL or a pipe."""

MAX_SCANS = 100
"""Of a JPEG of as many pixels as are read, as libtiff allows; the fewer pixels, the more. Each goes over all
pixels, however few bytes it has."""

_SHORT = 200  # letters of a name in messages

# Bytes that a pixel takes while it is decoded and converted, at most; decoders of some formats keep more.
_BYTES, _BYTES_OF = 8, {"JPEG": 12, "MPO": 12, "TIFF": 12, "WEBP": 16, "AVIF": 16}

# What may begin the base64 text of an image: that of the signatures of JPEG, PNG, GIF and WebP.
_BASE64 = re.compile(r"/9j/4|iVBORw0KGgo|R0lGOD[ld]h|UklGR")

# Pillow's words for a lack of memory, and torch's.
_NO_MEMORY = re.compile("out of memory|allocate memory", re.IGNORECASE)

# Tags of TIFF (6.0, TIFF/EP and DNG 1.4).
_NEW_SUBFILE_TYPE, _BITS_PER_SAMPLE, _SUB_IFDS, _SAMPLE_FORMAT, _DNG_VERSION = 254, 258, 330, 339, 50706

_PNG = b"\x89PNG\r\n\x1a\n"

# Chunks of a PNG in which its orientation may be, and the keywords of such texts.
_PNG_NOTES = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
_PNG_ORIENTATION = (b"Raw profile type exif", b"XML:com.adobe.xmp")

# What follows a JPEG's FF where that is neither a part of the pixels nor their restart.
_JPEG_MARKER = re.compile(rb"\xFF([^\x00\xD0-\xD7\xFF])")

# As in `warnings.filters`.
_PILLOWS_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

# Pillow reads an opened file when it is first used, and two threads must not do that at a time.
_LAZY_READ = threading.Lock()


def load_image(source: ImageSource, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image as upright RGB.

    EXIF orientation is applied to files and PIL images. Transparency is laid over white, with a warning where
    nothing else is left. 16-bit values are scaled to 8 bits. Of an animation, the first frame is taken.

    Formats are those of `DECODERS`, those whose openers were registered with Pillow by another package, and
    HEIC where pillow-heif is installed.

    Reading a file takes up to 8 bytes of memory for each of its pixels; TIFF and progressive JPEG up to 12,
    WebP and AVIF up to 16.

    Args:
        source: a path; an http(s) URL; the bytes of an image file; an open file, or anything with ``read()``,
            in binary mode, which is read from its start where it can be; a PIL image; an array ``[H, W]`` or
            ``[H, W, C]``; a tensor ``[H, W]`` or ``[C, H, W]``. Arrays and tensors have C = 1, 3 (RGB) or 4
            (RGBA) channels, of integers from 0 to 255, uint16, or floats in [0, 1]; floats that leave it a
            little, as resampling makes them do, are clipped.
        name: what errors call the image; by default the path, the URL, or what kind of object it is.
        max_pixels: most pixels of a file, which tell how much memory its decoding needs; see `MAX_PIXELS`.
            What is in memory already may have any number.

    Returns:
        A PIL image of mode RGB.

    Raises:
        ImageError: not an image, truncated, empty, too large or too thin, a URL that is not http(s) or does
            not give an image.
        ImageMemoryError: there is not enough memory for it.
        FileNotFoundError: there is no such file.
        TypeError: not a kind of source that is known.
    """
    return load_scaled(source, None, name=name, max_pixels=max_pixels)[0]


def load_scaled(
    source: ImageSource,
    least: int | None,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    on_open: Callable[[IO[bytes], int], object] | None = None,
) -> tuple[Image.Image, tuple[int, int]]:
    """An image as by `load_image`, but JPEG files decoded at 1/2, 1/4 or 1/8 of their size where they can be.

    Large photos are read several times as fast; their pixels differ a little from those of the whole image.

    Args:
        source, name, max_pixels: see `load_image`.
        least: that both sides must keep; None to decode at full size.
        on_open: called with the open file and the number of pixels that it will be decoded to, before that;
            not for what is in memory already. More than once where a first attempt fails.

    Returns:
        The image, and the width and height that it has at full size.

    Raises:
        ImageError, FileNotFoundError, TypeError: see `load_image`.
    """
    name = name or source_name(source)
    if isinstance(source, Image.Image):
        image = _of_pil_image(source, name)
    elif _is_tensor(source):
        image = _of_array(hwc_of_tensor(source, name), name)
    elif isinstance(source, np.ndarray):
        image = _of_array(np.asarray(source), name)
    else:
        with _opened(source, name) as file:
            return _decode(file, name, least, max_pixels, on_open)
    return image, image.size


def load_frames(
    path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[Image.Image, float]]:
    """Each frame of an animation as `load_image` gives the first, and how many seconds it is shown.

    An image that does not move is one frame.

    Raises:
        ImageError, ImageMemoryError, FileNotFoundError: see `load_image`; where the file breaks off, after
            the frames before that.
    """
    name = os.fspath(path)
    with _opened(path, name) as file:
        with _refusals(name), _without_pillows_warnings():
            image = _open(file, name, max_pixels)
            count = getattr(image, "n_frames", 1) if image.format in ANIMATED else 1
        for number in range(count):
            with _refusals(name), _without_pillows_warnings():
                with _decoding(image.format, image.size, name):
                    image.seek(number)
                    image.load()
                    seconds = float(image.info.get("duration") or 0) / 1000
                frame = upright_rgb(image, _orientation(image), name)
                frame = frame.copy() if frame is image else frame
            yield frame, seconds


def require_size(width: int, height: int, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse what has no pixels, is too thin, or has more pixels than are to be decoded.

    Raises:
        ImageError: it is.
    """
    _require_shape(width, height, name)
    _require_few_pixels(width, height, name, max_pixels)


def source_path(source: object) -> str:
    """The path or URL of an image source; empty if it has none."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(cast(str, source))
    return os.fspath(getattr(source, "filename", "")) if isinstance(source, Image.Image) else ""


def source_name(source: object) -> str:
    """What to call an image source: its path or URL, or the kind of object that it is."""
    named = getattr(source, "name", "") if _is_readable(source) else ""  # that of a pipe is a number
    return source_path(source) or (isinstance(named, str) and named) or type(source).__name__


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image when a folder is read.

    By its suffix: one of `SUFFIXES`, or of an opener that another package has registered with Pillow.
    """
    suffix = os.path.splitext(name)[1].lower()
    format = Image.EXTENSION.get(suffix)
    known = (
        suffix in SUFFIXES
        or (suffix in HEIF_SUFFIXES and _reads_heif())
        or (format is not None and format in _registered_formats())
    )
    return known and not is_hidden(name)


def is_animation_name(name: str) -> bool:
    """Whether a file of this name may be an animation, by its suffix."""
    return os.path.splitext(name)[1].lower() in (".gif", ".webp", ".png", ".apng", ".avif")


def is_hidden(name: str) -> bool:
    """Whether a file is not meant to be seen: what macOS ("._photo.jpg") and Windows leave beside photos."""
    base = os.path.basename(name)
    return base.startswith(".") or base.lower() in ("thumbs.db", "desktop.ini")


def upright_size(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> tuple[int, int] | None:
    """Width and height of the image that `load_image` gives, from the file's header; None if it has none."""
    try:
        with open(path, "rb") as file:
            return _use(file, "", max_pixels, _size_from_header)
    except Exception:  # decoders raise anything
        return None


def is_turned(path: str | os.PathLike[str]) -> bool:
    """Whether width and height of a file's image change places to make it upright; False if it has none."""
    try:
        with open(path, "rb") as file:
            return _use(file, "", MAX_PIXELS, lambda image: _orientation(_header_of(image)) >= 5)
    except Exception:  # decoders raise anything
        return False


def _size_from_header(image: Image.Image) -> tuple[int, int]:
    # A TIFF's size is that of the upright image already.
    turned = image.format != "TIFF" and _orientation(_header_of(image)) >= 5
    return image.size[::-1] if turned else image.size


def _header_of(image: Image.Image) -> Image.Image:
    """An image with all that may tell its orientation, for which Pillow reads all pixels of a PNG."""
    if not isinstance(image, PngImagePlugin.PngImageFile):
        return image
    file, pixels = cast("IO[bytes]", image.fp), False
    place = file.tell()
    notes = io.BytesIO(_PNG)
    notes.seek(0, os.SEEK_END)
    for kind, content in _png_chunks(file):
        if kind == b"IEND" or (kind == b"fcTL" and pixels and image.is_animated):  # the next frame
            break
        pixels = pixels or kind == b"IDAT"
        if kind in (b"IHDR", *_PNG_NOTES):
            data = content()
            notes.write(struct.pack(">I", len(data)) + kind + data)
            notes.write(struct.pack(">I", zlib.crc32(kind + data)))
    file.seek(place)
    notes.write(bytes(4) + b"IDAT")
    notes.seek(0)
    header = Image.Image()
    header.info = PngImagePlugin.PngImageFile(notes).info
    return header


def _png_chunks(file: IO[bytes]) -> Iterator[tuple[bytes, Callable[[], bytes]]]:
    """The kind of each chunk of a PNG, and what reads its content."""
    end, at = file.seek(0, os.SEEK_END), len(_PNG)
    while at + 8 <= end:
        file.seek(at)
        header = file.read(8)
        if not re.fullmatch(rb"\w{4}", header[4:]):  # where Pillow reads no further
            return
        start, length = at + 8, int.from_bytes(header[:4], "big")

        def content(start: int = start, length: int = min(length, end - start)) -> bytes:
            file.seek(start)
            return file.read(length)

        yield header[4:], content
        at = start + length + 4


# --- Files ------------------------------------------------------------------------------------------------


@contextmanager
def _opened(source: object, name: str) -> Iterator[IO[bytes]]:
    """The file that a source is or names, to be read from its start."""
    if isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(source)
    elif isinstance(source, str) and (problem := _not_a_path(source)):
        raise ImageError(f"{shortened(name)}: {problem}")
    elif isinstance(source, str) and web.is_url(source):
        yield io.BytesIO(read_url(source))
    elif source == "":
        raise ImageError(f"{name}: an empty path")
    elif isinstance(source, str | os.PathLike):
        with _open_path(Path(source), name) as file:
            yield file if file.seekable() else io.BytesIO(_read_pipe(file, name))
    elif _is_readable(source):
        yield io.BytesIO(_read_file(source, name))
    else:
        raise TypeError(
            "an image is a path, URL, bytes, open file, PIL image, array or tensor; "
            f"got {type(source).__name__}"
        )


def _open_path(path: Path, name: str) -> IO[bytes]:
    try:
        if not path.is_dir():
            return path.open("rb")
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENAMETOOLONG, errno.EINVAL):
            raise
        raise ImageError(
            f"{shortened(name)!r}: no possible path ({_reason(error)}); of an image itself, pass the bytes"
        ) from error
    raise ImageError(f"{name}: is a folder, not an image; a detector's stream takes folders")


def _read_pipe(file: IO[bytes], name: str) -> bytes:
    content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ImageError(f"{name}: gives more than {MAX_BYTES >> 20} MiB; write it to a file, and pass that")
    return content


def _is_readable(source: object) -> "TypeGuard[Readable]":
    return callable(getattr(source, "read", None))


def _read_file(file: Readable, name: str) -> bytes:
    with suppress(AttributeError, OSError, ValueError):  # not every stream can be read again
        file.seek(0)  # type: ignore[attr-defined]
    try:
        content = file.read()
    except (UnicodeDecodeError, io.UnsupportedOperation) as error:
        raise ImageError(f"{name}: is open as text, or not for reading; open files with mode 'rb'") from error
    except ValueError as error:
        raise ImageError(f"{name}: {error}; open the file again") from error  # it was closed
    if not isinstance(content, bytes | bytearray | memoryview):
        raise ImageError(
            f"{name}: its read() gives {type(content).__name__}, not bytes; open files with mode 'rb', "
            "and await what is asynchronous"
        )
    return bytes(content)


def _not_a_path(text: str) -> str:
    """What a text is that stands for neither a path nor a URL that is opened, and what to do; or nothing."""
    if text[:5].lower() == "data:":
        return "a data: URL, not a path; pass the bytes in it: urllib.request.urlopen(TEXT).read()"
    if _BASE64.match(text.lstrip()) and not os.path.exists(text):
        return "the text of an image in base64, not a path; pass its bytes: base64.b64decode(TEXT)"
    return ""


def shortened(name: str) -> str:
    """A name for messages, which may be an image itself that was passed as text."""
    return name if len(name) <= _SHORT else f"{name[: _SHORT // 4]}...{name[-_SHORT // 4 :]}"


def _reason(error: BaseException) -> str:
    """An error's text, without the path, which may be as long as an image."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _of_pil_image(source: Image.Image, name: str) -> Image.Image:
    _require_shape(*source.size, name)
    with _refusals(name), _decoding(source.format, source.size, name):
        try:
            with _LAZY_READ:
                source.load()
        except (AssertionError, AttributeError) as error:
            raise ImageError(
                f"{name}: its file was closed before its pixels were read; read them first: image.load()"
            ) from error
        image = upright_rgb(source, _orientation(source), name)
        return image.copy() if image is source else image


def _decode(
    file: IO[bytes],
    name: str,
    least: int | None,
    max_pixels: int,
    on_open: Callable[[IO[bytes], int], object] | None,
) -> tuple[Image.Image, tuple[int, int]]:
    def decode(image: Image.Image) -> tuple[Image.Image, int, tuple[int, int], str | None]:
        whole = image.size
        if image.info.get("progressive"):
            _require_few_scans(file, image, name, max_pixels)
        if least is not None:
            image.draft(None, (least, least))  # does nothing to other formats than JPEG
        if on_open is not None:
            on_open(file, image.width * image.height)
        with _decoding(image.format, image.size, name):
            _skip_pillows_limit(image)
            image.load()
        # Not the image of the file: some keep their decoder, with all pixels once more, as long as they live.
        return image._new(image.im), _orientation(image), whole, image.format

    with _refusals(name):
        image, orientation, whole, format = _use(file, name, max_pixels, decode)
        size = whole[::-1] if orientation >= 5 else whole
        with enough_memory(name, size, format):
            return upright_rgb(image, orientation, name), size


@contextmanager
def enough_memory(name: str, size: tuple[int, int], format: str | None = None) -> Iterator[None]:
    """Make an `ImageMemoryError` of a lack of memory while an image is worked on.

    Args:
        name: what the error calls it.
        size: its width and height.
        format: Pillow's name of it, of a file that is decoded.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, ImageMemoryError) or not lacks_memory(error):
            raise
        raise _no_memory(name, size, format) from error


@contextmanager
def _decoding(format: str | None, size: tuple[int, int], name: str) -> Iterator[None]:
    """As `enough_memory`, for decoders, some of which say of a lack of memory that the file is damaged."""
    with enough_memory(name, size, format):
        try:
            yield
        except OSError as error:
            if error.errno is None:
                try:
                    np.empty(_most_bytes(size, format), np.uint8)
                except MemoryError:
                    raise _no_memory(name, size, format) from error
            raise


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had: Python's, a system's, Pillow's or torch's."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


def _most_bytes(size: tuple[int, int], format: str | None) -> int:
    return math.prod(size) * _BYTES_OF.get(format or "", _BYTES)


def _no_memory(name: str, size: tuple[int, int], format: str | None) -> ImageMemoryError:
    hint = ", or end other programs"
    if format in ("JPEG", "MPO"):
        hint += ", or have it read small: ssd detect --no-images --scaled-decoding"
    return ImageMemoryError(
        f"{name}: there is not enough memory for its {size[0]}x{size[1]} pixels, which may take "
        f"{_most_bytes(size, format) / 1e6:,.0f} MB; make it smaller{hint}"
    )


def _use(
    file: IO[bytes],
    name: str,
    max_pixels: int,
    work: Callable[[Image.Image], T],
    attempts: tuple[tuple[bytes, ...], ...] = (_PNG_ORIENTATION, ()),
) -> T:
    """What `work` makes of an image file; a PNG with more text than Pillow reads is read without it."""
    try:
        with _without_pillows_warnings(), _open(file, name, max_pixels) as image:
            return work(image)
    except ImageError:
        raise
    except ValueError:  # Pillow's for a PNG's text or profile that is too large
        if not attempts or (plain := _png_without_texts(file, attempts[0])) is None:
            raise
        return _use(plain, name, max_pixels, work, attempts[1:])


@contextmanager
def _without_pillows_warnings() -> Iterator[None]:
    """They name no file, and tell of small damage; as errors, they would hide the image."""
    # Not by catch_warnings, which threads would leave in one another's state.
    filters = cast("list[Any]", warnings.filters)
    filters.insert(0, _PILLOWS_WARNINGS)
    try:
        yield
    finally:
        with suppress(ValueError):  # another thread has put its own list in place
            filters.remove(_PILLOWS_WARNINGS)


def _open(file: IO[bytes], name: str, max_pixels: int) -> Image.Image:
    """The image of a file, before its pixels are read.

    Not by Image.open, whose limit of pixels is a setting of the whole process.
    """
    file.seek(0)
    head = file.read(HEAD)
    kind = identify(head)
    if kind in (HEIC, HEIF):
        _reads_heif()
    # A raw photo may begin as a TIFF does, of which the first image is a small one.
    own = [format for format in DECODERS if format != "TIFF" or kind is None or not kind.as_image]
    for format in (*own, *_registered_formats()):
        if format not in Image.OPEN:
            Image.init()
        factory, accepts = Image.OPEN.get(format, (None, None))
        accepted = accepts is None or accepts(head[:16])  # a text says what is missing on this machine
        if factory is None or not accepted or isinstance(accepted, str):
            continue
        file.seek(0)
        try:
            if format == "WEBP":  # which takes memory for all pixels at once
                size = _webp_size(head)
                _require_few_pixels(*size, name, max_pixels)
                with _decoding(format, size, name):
                    image = factory(file, "")
            else:
                image = factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # as by Image.open: of another format
            continue
        if _is_raw(getattr(image, "tag_v2", {})):
            continue
        require_size(*image.size, name, max_pixels)
        return image
    raise ImageError(f"{name}: {_what_it_is(file, head)}")


def _webp_size(head: bytes) -> tuple[int, int]:
    """Width and height by the header of a WebP file."""

    def number(at: int, length: int) -> int:
        return int.from_bytes(head[at : at + length], "little")

    if head[12:16] == b"VP8X":
        return number(24, 3) + 1, number(27, 3) + 1
    if head[12:16] == b"VP8L":
        return number(21, 4) % (1 << 14) + 1, number(21, 4) // (1 << 14) % (1 << 14) + 1
    return number(26, 2) % (1 << 14), number(28, 2) % (1 << 14)


def _registered_formats() -> list[str]:
    """Formats whose openers are no part of Pillow: whoever registered them wants them to be used."""
    return [
        name
        for name, (factory, _) in list(Image.OPEN.items())
        if name not in DECODERS and getattr(factory, "__module__", "").partition(".")[0] != "PIL"
    ]


def _reads_heif() -> bool:
    """Whether HEIC is read: pillow-heif is installed, or another package has registered an opener."""
    there = not {"HEIC", "HEIF"}.isdisjoint(Image.OPEN)
    if not there:
        with suppress(ImportError):
            importlib.import_module("pillow_heif").register_heif_opener()
            there = True
    return there


def _is_raw(tags: Any) -> bool:
    """Whether a TIFF's tags are those of a raw photo, of which the first image is a small one to look at."""
    return _DNG_VERSION in tags or (tags.get(_NEW_SUBFILE_TYPE) == 1 and _SUB_IFDS in tags)


def _skip_pillows_limit(image: Image.Image) -> None:
    """Keep Pillow from asking once more when it reads the pixels, with the limit of the whole process."""
    limit = Image.MAX_IMAGE_PIXELS
    if image.format == "TIFF" and limit and image.width * image.height > limit:
        image.im = Image.new(image.mode, getattr(image, "_tile_size", image.size), None).im


def _require_few_scans(file: IO[bytes], image: Image.Image, name: str, max_pixels: int) -> None:
    place = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(place)
    at, scans = 2, 0
    while (marker := _JPEG_MARKER.search(content, at)) and marker[1] != b"\xd9":
        scans += marker[1] == b"\xda"
        at = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2], "big")
    most = max(MAX_SCANS, MAX_SCANS * max_pixels // (image.width * image.height))
    if scans > most:
        raise ImageError(
            f"{name}: a JPEG of {scans:,} scans, each of which goes over its {image.width}x{image.height} "
            f"pixels; up to {most:,} are read: save it anew as JPEG or PNG"
        )


def _png_without_texts(file: IO[bytes], kept: tuple[bytes, ...]) -> IO[bytes] | None:
    """A PNG file without its colour profile and texts, but for those of some keywords; None for others."""
    file.seek(0)
    if file.read(len(_PNG)) != _PNG:
        return None
    plain = io.BytesIO(_PNG)
    plain.seek(0, os.SEEK_END)
    for kind, content in _png_chunks(file):
        data = content()
        is_text = kind in (b"iCCP", b"tEXt", b"zTXt", b"iTXt")
        if not is_text or data.startswith(kept):
            plain.write(struct.pack(">I", len(data)) + kind + data + file.read(4))
    return plain


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Make an ImageError of anything that Pillow stumbles over."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name}: has more pixels than Pillow reads; make it smaller, or lift the limit: "
            "PIL.Image.MAX_IMAGE_PIXELS = None"
        ) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, struct.error, ...
        if lacks_memory(error):
            raise ImageMemoryError(
                f"{name}: there is not enough memory to read it; make it smaller, or end other programs"
            ) from error
        # A disk's or a network's; but an invalid argument is a place in the file that damage has made up.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            error.filename = error.filename or name
            raise
        raise ImageError(
            f"{name}: cannot be read ({_reason(error)}); it is cut off, damaged or of a rare kind: "
            "get it again, or save it anew as JPEG or PNG"
        ) from error


def _what_it_is(file: IO[bytes], head: bytes) -> str:
    """What a file is that no decoder takes, and what to do."""
    kind = identify(head)
    if not head:
        return "the file is empty"
    if kind is None:
        formats = ", ".join((*DECODERS, *_registered_formats()))
        return f"not an image of a format that is read ({formats}), or damaged at its start"
    if kind.as_image and not (kind in (HEIC, HEIF) and _reads_heif()):
        return f"this is {kind.name}; {kind.as_image}"
    tags = _tiff_tags(file)
    if _is_raw(tags):
        return f"this is a raw photo (DNG, NEF, ARW ...); {DEVELOP}"
    if _BITS_PER_SAMPLE in tags:
        return (
            f"begins as a TIFF with {_tiff_layout(tags)}, and cannot be read: it is of a kind that Pillow "
            "does not know, or damaged; save it with 8 bits, or pass the array that another package, such as "
            "tifffile, reads from it"
        )
    return (
        f"begins as {kind.name}, and cannot be read: it is cut off, damaged or of a rare kind; "
        "get it again, or save it anew as JPEG or PNG"
    )


def _tiff_tags(file: IO[bytes]) -> Any:
    """The tags of a TIFF's first image by number; none of another file."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2  # noqa: PLC0415 (seldom needed)

    with suppress(Exception):
        file.seek(0)
        tags = ImageFileDirectory_v2(file.read(8))
        file.seek(tags.next)
        tags.load(file)
        return tags
    return {}


def _tiff_layout(tags: Any) -> str:
    """What pixels are, as in "3 channels of 32 bits (floats)"."""
    bits = tags[_BITS_PER_SAMPLE]
    numbers = {2: " (signed integers)", 3: " (floats)"}.get(tags.get(_SAMPLE_FORMAT, (1,))[0], "")
    depths = as_line("/".join(map(str, sorted(set(bits))[:10])), 80)
    return f"{len(bits)} channel{'s'[: len(bits) != 1]} of {depths} bits{numbers}"


def _require_shape(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name}: {width}x{height} has no pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{name}: {width}x{height} is too thin to be seen in a square; one side may be {MAX_ASPECT} "
            "times the other: cut it into pieces"
        )


def _require_few_pixels(width: int, height: int, name: str, max_pixels: int) -> None:
    limit: int | None = max_pixels
    if max_pixels == MAX_PIXELS:
        limit = Image.MAX_IMAGE_PIXELS and 2 * Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ImageError(
            f"{name}: {width}x{height} is more than {limit:,} pixels; make it smaller or, if you trust it, "
            f"allow it: max_pixels={width * height}, or ssd detect --max-pixels {width * height}"
        )


def _orientation(image: Image.Image) -> int:
    """EXIF's number for how the image is to be turned; from 5 on, width and height change places.

    1, for upright, where there is none, or none of EXIF's, as some cameras write.
    """
    with suppress(Exception):  # a block that cannot be read says nothing about orientation
        value = int(image.getexif().get(ExifTags.Base.Orientation, 1))
        return value if value in UPRIGHT else 1
    return 1


def _is_tensor(source: object) -> "TypeGuard[Tensor]":
    # Whoever has a tensor has imported torch; whoever has none need not wait for it.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def _of_array(values: npt.NDArray[np.generic], name: str) -> Image.Image:
    values = hwc(values, name)
    size = values.shape[1], values.shape[0]
    _require_shape(*size, name)
    with enough_memory(name, size):
        return rgb_of_array(values, name)


def read_url(
    url: str,
    *,
    max_bytes: int | None = None,
    public_only: bool = False,
    is_wanted: Callable[[], bool] = lambda: True,
) -> bytes:
    """The content of an http(s) URL.

    Args:
        url: of an image.
        max_bytes: most that are read; by default `MAX_BYTES`.
        public_only: refuse private addresses; see `ssd.web.open_url`.
        is_wanted: asked while it is read; once it says no, what was read so far is given.

    Raises:
        ImageError: it cannot be read; the message names it and says why.
    """
    if url.lower().startswith(("rtsp:", "rtsps:")):  # its address may hold a password
        name = re.sub("//.*@", "//", url)
        raise ImageError(f"{name}: an RTSP stream, not an image; detector.stream(...) and ssd detect take it")
    if not web.is_web_url(url):
        hint = "; pass the path itself" if url.lower().startswith("file:") else ""
        raise ImageError(f"{url}: only http and https URLs are read{hint}")
    most = MAX_BYTES if max_bytes is None else max_bytes
    try:
        with web.open_url(url, public_only=public_only) as response:
            if response.headers.get_content_type() == "text/html":
                raise ImageError(f"{url}: the server sent a web page, not an image")
            body = bytearray()
            for chunk in web.chunks(response):
                body += chunk
                if len(body) > most:
                    raise ImageError(f"{url}: more than {most >> 20} MiB; download it and pass the file")
                if not is_wanted():
                    break
    except web.READ_ERRORS as error:
        raise ImageError(f"{url}: {web.reason(error)}") from error
    return bytes(body)
