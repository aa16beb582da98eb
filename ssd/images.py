"""Reading images of any kind as upright RGB; every refusal is an `ImageError` that names the image."""

import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeAlias, TypeGuard, Union, cast

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from ssd import web
from ssd.errors import ImageError

if TYPE_CHECKING:
    from torch import Tensor

# Not with "|", which takes no name in quotes.
ImageSource: TypeAlias = Union[str, os.PathLike[str], bytes, Image.Image, npt.NDArray[np.generic], "Tensor"]

DECODERS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Pillow's decoders that may run; the others (EPS and its kind start other programs) never do."""

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .png .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .avif .mpo".split()  # noqa: SIM905
)
MAX_PIXELS = 178_956_970
"""Twice Pillow's warning level, where Pillow itself refuses: 13,377 x 13,377."""

MAX_ASPECT = 100
"""Most times that one side may be longer than the other."""

MAX_BYTES = 64 << 20
"""Most bytes that are read from a URL."""


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

# Pillow reads an opened file when it is first used, and two threads must not do that at a time.
_LAZY_READ = threading.Lock()


def load_image(source: ImageSource, *, name: str | None = None) -> Image.Image:
    """Read an image as upright RGB.

    EXIF orientation is applied to files and PIL images. Transparency is laid over white. 16-bit values are
    scaled to 8 bits. Of an animation, the first frame is taken.

    Args:
        source: a path; an http(s) URL; the bytes of an image file; a PIL image; an array ``[H, W]`` or
            ``[H, W, C]``; a tensor ``[H, W]`` or ``[C, H, W]``. Arrays and tensors have C = 1, 3 (RGB) or 4
            (RGBA) channels, of uint8, uint16, or floats in [0, 1].
        name: what errors call the image; by default the path, the URL, or what kind of object it is.

    Returns:
        A PIL image of mode RGB.

    Raises:
        ImageError: not an image, truncated, empty, too large or too thin, a URL that is not http(s) or does
            not give an image.
        FileNotFoundError: there is no such file.
        TypeError: not a kind of source that is known.
    """
    return load_scaled(source, None, name=name)[0]


def load_scaled(
    source: ImageSource, least: int | None, *, name: str | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """An image as by `load_image`, but JPEG files decoded at 1/2, 1/4 or 1/8 of their size where they can be.

    Large photos are read several times as fast; their pixels differ a little from those of the whole image.

    Args:
        source, name: see `load_image`.
        least: that both sides must keep; None to decode at full size.

    Returns:
        The image, and the width and height that it has at full size.

    Raises:
        ImageError, FileNotFoundError, TypeError: see `load_image`.
    """
    name = name or source_name(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(source), name, least)
    if isinstance(source, str) and web.is_url(source):
        return _decode(io.BytesIO(_read_url(source)), name, least)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            raise ImageError(f"{name}: is a folder, not an image; a detector's stream takes folders")
        try:
            file = path.open("rb")
        except ValueError as error:
            raise ImageError(f"{name!r}: no possible path ({error})") from error
        with file:
            return _decode(file, name, least)
    elif isinstance(source, Image.Image):
        with _refusals(name):
            with _LAZY_READ:
                source.load()
            image = _upright_rgb(source, name)
            image = image.copy() if image is source else image
    elif _is_tensor(source):
        image = _from_array(_tensor_to_array(source, name), name)
    elif isinstance(source, np.ndarray):
        image = _from_array(np.asarray(source), name)
    else:
        raise TypeError(
            f"an image is a path, URL, bytes, PIL image, array or tensor; got {type(source).__name__}"
        )
    return image, image.size


def source_path(source: object) -> str:
    """The path or URL of an image source; empty if it has none."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(cast(str, source))
    return os.fspath(getattr(source, "filename", "")) if isinstance(source, Image.Image) else ""


def source_name(source: object) -> str:
    """What to call an image source: its path or URL, or the kind of object that it is."""
    return source_path(source) or type(source).__name__


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image when a folder is read."""
    hidden = os.path.basename(name).startswith(".")  # macOS leaves "._photo.jpg" beside photos
    return not hidden and os.path.splitext(name)[1].lower() in SUFFIXES


def upright_size(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Width and height of the image that `load_image` gives, from the file's header; None if it has none."""
    try:
        with Image.open(path, formats=DECODERS) as image:
            # A TIFF's size is that of the upright image already.
            turned = image.format != "TIFF" and _orientation(image) >= 5
            return image.size[::-1] if turned else image.size
    except Exception:  # decoders raise anything
        return None


def _decode(file: IO[bytes], name: str, least: int | None) -> tuple[Image.Image, tuple[int, int]]:
    with _refusals(name):
        try:
            image = Image.open(file, formats=DECODERS)
        except UnidentifiedImageError as error:
            raise ImageError(f"{name}: {_what_it_is(file)}") from error
        with image:
            whole = image.size
            _check_shape(*whole, name)
            if least is not None:
                image.draft(None, (least, least))  # does nothing to other formats than JPEG
            upright = _upright_rgb(image, name)
            return upright, whole[::-1] if _orientation(image) >= 5 else whole


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Make an ImageError of anything that Pillow stumbles over."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: more than {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, struct.error, ...
        raise ImageError(f"{name}: the file is damaged or cut off ({error})") from error


def _what_it_is(file: IO[bytes]) -> str:
    file.seek(0)
    head = file.read(512)
    if not head:
        return "the file is empty"
    if head.lstrip()[:1] == b"<":
        return "this is a web page or other markup, not an image"
    return f"not an image of a known format ({', '.join(DECODERS)}), or damaged at its start"


def _check_shape(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name}: {width}x{height} has no pixels")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: {width}x{height} is more than {MAX_PIXELS:,} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{name}: {width}x{height} is too thin; one side may be {MAX_ASPECT} times the other"
        )


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """An upright RGB image: a new one, or the given one, which is not changed, if it is that already."""
    _check_shape(*image.size, name)
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
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """EXIF's number for how the image is to be turned; from 5 on, width and height change places."""
    with suppress(Exception):  # a block that cannot be read says nothing about orientation
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
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
            raise ImageError(
                f"{name}: a tensor is [C, H, W] with 1, 3 or 4 channels; got {list(tensor.shape)}"
            )
        tensor = tensor.permute(1, 2, 0)
    try:
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:  # sparse, meta, quantised ...
        raise ImageError(f"{name}: a tensor of uint8 or floats is needed ({error})") from error


def _from_array(values: npt.NDArray[np.generic], name: str) -> Image.Image:
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.shape[2] not in (1, 3, 4):
        raise ImageError(
            f"{name}: an array is [H, W] or [H, W, C] with 1, 3 or 4 channels, one image at a time; "
            f"got shape {list(values.shape)}"
        )
    _check_shape(values.shape[1], values.shape[0], name)
    pixels = _to_uint8(values, name)
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return image if image.mode == "RGB" else _upright_rgb(image, name)


def _to_uint8(values: npt.NDArray[np.generic], name: str) -> npt.NDArray[np.uint8]:
    if values.dtype == np.uint8:
        return cast("npt.NDArray[np.uint8]", values)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint16:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if not np.issubdtype(values.dtype, np.floating):
        raise ImageError(f"{name}: values are uint8, uint16 or floats in [0, 1]; got {values.dtype}")
    # The negated form also refuses NaN.
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):
        raise ImageError(
            f"{name}: float values lie in [0, 1]; these reach from {low:g} to {high:g}; divide by 255?"
        )
    return np.rint(values.astype(np.float32) * 255).astype(np.uint8)


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
