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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeAlias, TypeGuard, TypeVar, Union, cast

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, PngImagePlugin

from ssd import web
from ssd.errors import ImageError
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

MAX_PIXELS = 178_956_970
"""Where Pillow refuses, 13,377 x 13,377: twice ``PIL.Image.MAX_IMAGE_PIXELS``. Where somebody has changed
that, it stands for twice the new number, or for no limit."""

MAX_ASPECT = 100
"""Most times that one side may be longer than the other."""

MAX_BYTES = 64 << 20
"""Most bytes that are read from a URL."""

_OVERSHOOT = 0.25  # by which floats may leave [0, 1], as resampling makes them do at edges ...
_MEAN_OVERSHOOT = 0.01  # ... and on average, above which they are of another range
_SHORT = 200  # letters of a name in messages

# What may begin the base64 text of an image: that of the signatures of JPEG, PNG, GIF and WebP.
_BASE64 = re.compile(r"/9j/4|iVBORw0KGgo|R0lGOD[ld]h|UklGR")

# What makes an image of an EXIF orientation upright (EXIF 2.3, tag 0x0112).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Tags of TIFF (6.0, TIFF/EP and DNG 1.4).
_NEW_SUBFILE_TYPE, _BITS_PER_SAMPLE, _SUB_IFDS, _SAMPLE_FORMAT, _DNG_VERSION = 254, 258, 330, 339, 50706

# Texts of a PNG in which its orientation may be.
_PNG_ORIENTATION = (b"Raw profile type exif", b"XML:com.adobe.xmp")

# Pillow reads an opened file when it is first used, and two threads must not do that at a time.
_LAZY_READ = threading.Lock()


def load_image(source: ImageSource, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image as upright RGB.

    EXIF orientation is applied to files and PIL images. Transparency is laid over white, with a warning where
    nothing else is left. 16-bit values are scaled to 8 bits. Of an animation, the first frame is taken.

    Formats are those of `DECODERS`, those whose openers were registered with Pillow by another package, and
    HEIC where pillow-heif is installed.

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
        image = _from_array(_tensor_to_array(source, name), name)
    elif isinstance(source, np.ndarray):
        image = _from_array(np.asarray(source), name)
    else:
        with _opened(source, name) as file:
            return _decode(file, name, least, max_pixels, on_open)
    return image, image.size


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
            return _use(file, "", MAX_PIXELS, lambda image: _orientation(image) >= 5)
    except Exception:  # decoders raise anything
        return False


def _size_from_header(image: Image.Image) -> tuple[int, int]:
    if isinstance(image, PngImagePlugin.PngImageFile) and not _has_notes(cast("IO[bytes]", image.fp)):
        return image.size  # else Pillow reads all pixels, for what may be behind them
    if image.format == "PNG" and "exif" not in image.info:
        image.load()
    # A TIFF's size is that of the upright image already.
    turned = image.format != "TIFF" and _orientation(image) >= 5
    return image.size[::-1] if turned else image.size


def _has_notes(file: IO[bytes]) -> bool:
    """Whether a PNG has a chunk that may tell its orientation, in front of its pixels or behind them."""
    place = file.tell()
    file.seek(8)
    found = False
    while not found and len(header := file.read(8)) == 8:
        found = header[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
        file.seek(int.from_bytes(header[:4], "big") + 4, os.SEEK_CUR)
    file.seek(place)
    return found


# --- Files ------------------------------------------------------------------------------------------------


@contextmanager
def _opened(source: object, name: str) -> Iterator[IO[bytes]]:
    """The file that a source is or names, to be read from its start."""
    if isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(source)
    elif isinstance(source, str) and (problem := _not_a_path(source)):
        raise ImageError(f"{shortened(name)}: {problem}")
    elif isinstance(source, str) and web.is_url(source):
        yield io.BytesIO(_read_url(source))
    elif source == "":
        raise ImageError(f"{name}: an empty path")
    elif isinstance(source, str | os.PathLike):
        with _open_path(Path(source), name) as file:
            yield file if file.seekable() else io.BytesIO(file.read())
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
    with _refusals(name):
        try:
            with _LAZY_READ:
                source.load()
        except (AssertionError, AttributeError) as error:
            raise ImageError(
                f"{name}: its file was closed before its pixels were read; read them first: image.load()"
            ) from error
        image = _upright_rgb(source, name)
        return image.copy() if image is source else image


def _decode(
    file: IO[bytes],
    name: str,
    least: int | None,
    max_pixels: int,
    on_open: Callable[[IO[bytes], int], object] | None,
) -> tuple[Image.Image, tuple[int, int]]:
    def decode(image: Image.Image) -> tuple[Image.Image, tuple[int, int]]:
        whole = image.size
        if least is not None:
            image.draft(None, (least, least))  # does nothing to other formats than JPEG
        if on_open is not None:
            on_open(file, image.width * image.height)
        upright = _upright_rgb(image, name)
        return upright, whole[::-1] if _orientation(image) >= 5 else whole

    with _refusals(name):
        return _use(file, name, max_pixels, decode)


def _use(
    file: IO[bytes],
    name: str,
    max_pixels: int,
    work: Callable[[Image.Image], T],
    attempts: tuple[tuple[bytes, ...], ...] = (_PNG_ORIENTATION, ()),
) -> T:
    """What `work` makes of an image file; a PNG with more text than Pillow reads is read without it."""
    try:
        with _open(file, name, max_pixels) as image:
            return work(image)
    except ImageError:
        raise
    except ValueError:  # Pillow's for a PNG's text or profile that is too large
        if not attempts or (plain := _png_without_texts(file, attempts[0])) is None:
            raise
        return _use(plain, name, max_pixels, work, attempts[1:])


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
            image = factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # as by Image.open: of another format
            continue
        if _is_raw(getattr(image, "tag_v2", {})):
            continue
        _require_shape(*image.size, name)
        _require_few_pixels(*image.size, name, max_pixels)
        _skip_pillows_limit(image)
        return image
    raise ImageError(f"{name}: {_what_it_is(file, head)}")


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
        image.im = Image.new(image.mode, getattr(image, "_tile_size", image.size)).im


def _png_without_texts(file: IO[bytes], kept: tuple[bytes, ...]) -> IO[bytes] | None:
    """A PNG file without its colour profile and texts, but for those of some keywords; None for others."""
    file.seek(0)
    signature = file.read(8)
    if signature != b"\x89PNG\r\n\x1a\n":
        return None
    plain = io.BytesIO(signature)
    plain.seek(0, os.SEEK_END)
    while len(header := file.read(8)) == 8:
        chunk = file.read(int.from_bytes(header[:4], "big") + 4)  # with its checksum
        is_text = header[4:] in (b"iCCP", b"tEXt", b"zTXt", b"iTXt")
        if not is_text or chunk.startswith(kept):
            plain.write(header + chunk)
    return plain


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Make an ImageError of anything that Pillow stumbles over."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name}: has more pixels than Pillow reads; make it smaller, or lift the limit: "
            "PIL.Image.MAX_IMAGE_PIXELS = None"
        ) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, struct.error, ...
        if isinstance(error, OSError) and error.errno is not None:  # a disk's or a network's
            raise
        raise ImageError(
            f"{name}: cannot be read ({error}); it is cut off, damaged or of a rare kind: "
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
    depths = "/".join(map(str, sorted(set(bits))))
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


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """An upright RGB image: a new one, or the given one, which is not changed, if it is that already."""
    _require_shape(*image.size, name)
    image.load()
    orientation = _orientation(image)
    # Not ImageOps.exif_transpose: it writes the block anew, and fails where any other tag is odd.
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
        # Else it would still say how it is to be turned, and whoever reads it next would turn it again.
        image.info = {key: value for key, value in image.info.items() if key == "transparency"}
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_array(_wide_grey(np.asarray(image)), name)
    if image.has_transparency_data:
        return _over_white(image if image.mode == "RGBA" else image.convert("RGBA"), name)
    return image if image.mode == "RGB" else image.convert("RGB")


def _over_white(image: Image.Image, name: str) -> Image.Image:
    if image.getchannel("A").getextrema() == (0, 0):
        warnings.warn(f"{name}: is transparent everywhere, so all that is seen of it is white", stacklevel=2)
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def _orientation(image: Image.Image) -> int:
    """EXIF's number for how the image is to be turned; from 5 on, width and height change places.

    1, for upright, where there is none, or none of EXIF's, as some cameras write.
    """
    with suppress(Exception):  # a block that cannot be read says nothing about orientation
        value = int(image.getexif().get(ExifTags.Base.Orientation, 1))
        return value if value in _UPRIGHT else 1
    return 1


def _wide_grey(values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Grey values of Pillow's wide modes: 16 bits, which mode I also holds, or floats."""
    if values.dtype == np.int32 and values.size and values.min() >= 0 and values.max() <= 65535:
        return values.astype(np.uint16)
    return values


def _is_tensor(source: object) -> "TypeGuard[Tensor]":
    # Whoever has a tensor has imported torch; whoever has none need not wait for it.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def _tensor_to_array(tensor: "Tensor", name: str) -> npt.NDArray[np.generic]:
    if tensor.ndim == 3:
        if tensor.shape[0] not in (1, 3, 4):
            last = tensor.shape[2] in (1, 3, 4)
            raise ImageError(
                f"{name}: a tensor is [C, H, W] with 1, 3 or 4 channels; got {list(tensor.shape)}"
                + ("; put channels first: tensor.permute(2, 0, 1)" if last else "")
            )
        tensor = tensor.permute(1, 2, 0)
    try:
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:  # sparse, meta, quantised ...
        raise ImageError(f"{name}: a tensor of uint8 or floats is needed ({error})") from error


def _from_array(values: npt.NDArray[np.generic], name: str) -> Image.Image:
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.shape[2] not in (1, 3, 4):
        raise ImageError(
            f"{name}: an array is [H, W] or [H, W, C] with 1, 3 or 4 channels, one image at a time; "
            f"got shape {list(values.shape)}{_shape_advice(values.shape)}"
        )
    _require_shape(values.shape[1], values.shape[0], name)
    pixels = _to_uint8(values.astype(values.dtype.newbyteorder("="), copy=False), name)
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return image if image.mode == "RGB" else _over_white(image, name)


def _shape_advice(shape: tuple[int, ...]) -> str:
    if len(shape) == 3 and shape[0] in (1, 3, 4):
        return "; put channels last: array.transpose(1, 2, 0)"
    if len(shape) == 4 and shape[0] == 1:
        return "; pass its only image: array[0]"
    if len(shape) == 4:
        return "; pass its images as a list: list(array)"
    return ""


def _to_uint8(values: npt.NDArray[np.generic], name: str) -> npt.NDArray[np.uint8]:
    if values.dtype == np.uint8:
        if values.size and values[0].max() <= 1 and values.max() == 1:  # few need more than their first row
            _tell_dark(name, "its values reach only to 1", "if 1 is white, pass array.astype(bool)")
        return cast("npt.NDArray[np.uint8]", values)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint16:
        high = int(values.max()) if values.size else 0
        if 0 < high <= 4095:
            white = 255 if high <= 255 else 1023 if high <= 1023 else 4095
            scale = f"if {white} is white, scale it: (array * (65535 / {white})).astype(numpy.uint16)"
            _tell_dark(name, f"of 16 bits, its values reach only to {high}", scale)
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if values.dtype.kind in "iu":
        return _integers_to_uint8(values, name)
    if values.dtype.kind != "f":
        hint = (
            "; numpy.array(..., numpy.uint8) makes one of lists of numbers" if values.dtype == object else ""
        )
        raise ImageError(f"{name}: values are uint8, uint16 or floats in [0, 1]; got {values.dtype}{hint}")
    return _floats_to_uint8(cast("npt.NDArray[np.floating[Any]]", values), name)


def _tell_dark(name: str, what: str, advice: str) -> None:
    warnings.warn(f"{name}: {what}, so it is seen as nearly black; {advice}", stacklevel=2)


def _integers_to_uint8(values: npt.NDArray[np.generic], name: str) -> npt.NDArray[np.uint8]:
    """Integers of other types, as numpy makes of lists."""
    low, high = int(values.min()), int(values.max())
    if low >= 0 and high <= 255:
        return values.astype(np.uint8)
    hint = "scale them"
    if low >= 0 and high <= 65535:
        hint = "if 65,535 is white, pass them as uint16: array.astype(numpy.uint16); else scale them"
    raise ImageError(
        f"{name}: values of {values.dtype} lie in 0 to 255; these reach from {low} to {high}; {hint}"
    )


def _floats_to_uint8(values: npt.NDArray[np.floating[Any]], name: str) -> npt.NDArray[np.uint8]:
    with np.errstate(over="ignore"):
        values = values.astype(np.float32, copy=False)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError(f"{name}: float values lie in [0, 1]; these hold NaN or infinity")
    pixels = values.clip(0, 1)
    if max(-low, high - 1) > _OVERSHOOT or np.abs(pixels - values).mean() > _MEAN_OVERSHOOT:
        raise ImageError(
            f"{name}: float values lie in [0, 1]; these reach from {low:g} to {high:g}; "
            + _range_advice(low, high)
        )
    result: npt.NDArray[np.uint8] = np.rint(pixels * 255).astype(np.uint8)
    return result


def _range_advice(low: float, high: float) -> str:
    """How floats become [0, 1] that were probably meant otherwise; resampling may have overshot a little."""
    if low >= -0.1 * high:
        if high <= 10:
            return "scale them, so that 0 is black and 1 is white"
        if high <= 280:
            return "if 255 is white, divide by 255, or pass uint8"
        return "divide by what is white: 65535 of 16 bits, 4095 of 12"
    if low >= -1.1 and high <= 1.1:
        return "if they were normalised to [-1, 1], undo it: (x + 1) / 2"
    if low >= -10 and high <= 10:
        return "if they were normalised, undo it: x * std + mean, with those of each channel"
    return "if a mean was subtracted, add it again; then scale them, so that 0 is black and 1 is white"


def _read_url(url: str) -> bytes:
    if not web.is_web_url(url):
        hint = "; pass the path itself" if url.lower().startswith("file:") else ""
        raise ImageError(f"{url}: only http and https URLs are read{hint}")
    try:
        with web.open_url(url) as response:
            if response.headers.get_content_type() == "text/html":
                raise ImageError(f"{url}: the server sent a web page, not an image")
            body = bytearray()
            for chunk in web.chunks(response):
                body += chunk
                if len(body) > MAX_BYTES:
                    raise ImageError(f"{url}: more than {MAX_BYTES >> 20} MiB; download it and pass the file")
            if response.length:  # what the server announced and did not send
                raise ImageError(f"{url}: the connection ended {response.length:,} bytes early")
    except web.READ_ERRORS as error:
        raise ImageError(f"{url}: {web.reason(error)}") from error
    return bytes(body)
