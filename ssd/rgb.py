"""Pixels of any mode, type and range as upright RGB, a band of rows at a time to save memory."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from ssd.errors import ImageError, as_line

if TYPE_CHECKING:
    from torch import Tensor

# What is called for the bands of an array [H, W, C], as often as they are gone through.
Bands: TypeAlias = Callable[[], Iterator[npt.NDArray[Any]]]
ToBytes: TypeAlias = Callable[[npt.NDArray[Any]], npt.NDArray[np.uint8]]

_OVERSHOOT = 0.25  # by which floats may leave [0, 1], as resampling makes them do at edges ...
_MEAN_OVERSHOOT = 0.01  # ... and on average, above which they are of another range
_BAND = 1 << 20  # pixels that are converted at a time

# What makes an image of an EXIF orientation upright (EXIF 2.3, tag 0x0112).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright_rgb(image: Image.Image, orientation: int, name: str) -> Image.Image:
    """An upright RGB image: a new one, or the given one, which is not changed, if it is that already.

    Args:
        image: of any mode, with its pixels read.
        orientation: by EXIF's number, from 1 to 8.
        name: what errors and warnings call it.

    Raises:
        ImageError: its values are floats outside of [0, 1].
    """
    if image.mode == "RGB" and not image.has_transparency_data and orientation == 1:
        return image
    return _assembled(_rgb_bands(image, name), image.size, orientation)


def hwc_of_tensor(tensor: "Tensor", name: str) -> npt.NDArray[np.generic]:
    """The array ``[H, W]`` or ``[H, W, C]`` of a tensor ``[H, W]`` or ``[C, H, W]``.

    Raises:
        ImageError: it has other dimensions, or no numbers in memory.
    """
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


def hwc(values: npt.NDArray[np.generic], name: str) -> npt.NDArray[np.generic]:
    """An array ``[H, W]`` or ``[H, W, C]`` with three dimensions.

    Raises:
        ImageError: it has other dimensions, or other than 1, 3 or 4 channels.
    """
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.shape[2] not in (1, 3, 4):
        raise ImageError(
            f"{name}: an array is [H, W] or [H, W, C] with 1, 3 or 4 channels, one image at a time; "
            f"got shape {list(values.shape)}{_shape_advice(values.shape)}"
        )
    return values


def rgb_of_array(values: npt.NDArray[np.generic], name: str) -> Image.Image:
    """An RGB image of an array ``[H, W, C]``, of uint8, other integers, bool, or floats in [0, 1].

    Raises:
        ImageError: values are of another type or range.
    """
    height, width, _ = values.shape

    def bands() -> Iterator[npt.NDArray[Any]]:
        for top, bottom in _bands_of(width, height):
            yield values[top:bottom]

    return _assembled(_array_bands(bands, name), (width, height))


def _bands_of(width: int, height: int) -> Iterator[tuple[int, int]]:
    """Where bands of an image begin and end, which are converted one after another, to save memory."""
    rows = max(1, _BAND // width)
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def _rgb_bands(image: Image.Image, name: str) -> Iterator[Image.Image]:
    def bands() -> Iterator[Image.Image]:
        for top, bottom in _bands_of(*image.size):
            yield image.crop((0, top, image.width, bottom)) if bottom - top < image.height else image

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_bands(lambda: (np.asarray(band)[..., None] for band in bands()), name)
    if image.has_transparency_data:
        return _over_white((band if band.mode == "RGBA" else band.convert("RGBA") for band in bands()), name)
    return (band if band.mode == "RGB" else band.convert("RGB") for band in bands())


def _assembled(bands: Iterable[Image.Image], size: tuple[int, int], orientation: int = 1) -> Image.Image:
    """An upright image of its RGB bands, from top to bottom as they are stored.

    Not by ImageOps.exif_transpose: it writes the block anew, and fails where any other tag is odd.
    """
    width, height = size
    # Without the EXIF block, which would still say how it is to be turned.
    whole = Image.new("RGB", (height, width) if orientation >= 5 else size, None)
    top = 0
    for band in bands:
        along = top if orientation in (1, 2, 5, 8) else height - top - band.height
        top += band.height
        turned = band.transpose(UPRIGHT[orientation]) if orientation > 1 else band
        whole.paste(turned, (along, 0) if orientation >= 5 else (0, along))
    return whole


def _over_white(bands: Iterable[Image.Image], name: str) -> Iterator[Image.Image]:
    clear = True
    for band in bands:
        clear = clear and band.getchannel("A").getextrema() == (0, 0)
        white = Image.new("RGB", band.size, "white")
        white.paste(band, mask=band)
        yield white
    if clear:
        _warn(f"{name}: is transparent everywhere, so all that is seen of it is white")


def _warn(text: str) -> None:
    warnings.warn(as_line(text), stacklevel=2)


def _grey_bands(bands: Bands, name: str) -> Iterator[Image.Image]:
    """Of Pillow's wide modes: 16 bits, which mode I also holds, or floats."""
    low, high = _extrema(bands)
    if next(bands()).dtype == np.int32 and low >= 0 and high <= 65535:
        return _array_bands(lambda: (band.astype(np.uint16) for band in bands()), name)
    return _array_bands(bands, name)


def _array_bands(bands: Bands, name: str) -> Iterator[Image.Image]:
    def native() -> Iterator[npt.NDArray[Any]]:
        return (band.astype(band.dtype.newbyteorder("="), copy=False) for band in bands())

    to_uint8 = _to_uint8(native, name)
    images = (_image_of(to_uint8(band)) for band in native())
    return images if next(bands()).shape[2] != 4 else _over_white(images, name)


def _image_of(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _extrema(bands: Bands) -> tuple[Any, Any]:
    lows, highs = zip(*((band.min(), band.max()) for band in bands()), strict=True)
    return np.min(lows), np.max(highs)  # not Python's, which pass over NaN


def _shape_advice(shape: tuple[int, ...]) -> str:
    if len(shape) == 3 and shape[0] in (1, 3, 4):
        return "; put channels last: array.transpose(1, 2, 0)"
    if len(shape) == 4 and shape[0] == 1:
        return "; pass its only image: array[0]"
    if len(shape) == 4:
        return "; pass its images as a list: list(array)"
    return ""


def _to_uint8(bands: Bands, name: str) -> ToBytes:
    """What makes uint8 of each band of an array, all of which are judged first."""
    first = next(bands())
    if first.dtype == np.uint8:
        if first[0].max() <= 1 and _extrema(bands)[1] == 1:  # few need more than their first row
            _tell_dark(name, "its values reach only to 1", "if 1 is white, pass array.astype(bool)")
        return lambda band: band.astype(np.uint8, copy=False)
    if first.dtype == np.bool_:
        return lambda band: band.astype(np.uint8) * np.uint8(255)
    if first.dtype == np.uint16:
        high = int(_extrema(bands)[1])
        if 0 < high <= 4095:
            white = 255 if high <= 255 else 1023 if high <= 1023 else 4095
            scale = f"if {white} is white, scale it: (array * (65535 / {white})).astype(numpy.uint16)"
            _tell_dark(name, f"of 16 bits, its values reach only to {high}", scale)
        return lambda band: ((band.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if first.dtype.kind in "iu":
        low, high = map(int, _extrema(bands))
        _require_bytes(low, high, first.dtype, name)
        return lambda band: band.astype(np.uint8)
    if first.dtype.kind != "f":
        hint = (
            "; numpy.array(..., numpy.uint8) makes one of lists of numbers" if first.dtype == object else ""
        )
        raise ImageError(f"{name}: values are uint8, uint16 or floats in [0, 1]; got {first.dtype}{hint}")
    _require_unit_range(bands, name)
    return lambda band: np.rint(_clipped(band) * 255).astype(np.uint8)


def _tell_dark(name: str, what: str, advice: str) -> None:
    _warn(f"{name}: {what}, so it is seen as nearly black; {advice}")


def _require_bytes(low: int, high: int, dtype: "np.dtype[Any]", name: str) -> None:
    """Of integers of other types, as numpy makes of lists."""
    if low >= 0 and high <= 255:
        return
    hint = "scale them"
    if low >= 0 and high <= 65535:
        hint = "if 65,535 is white, pass them as uint16: array.astype(numpy.uint16); else scale them"
    raise ImageError(f"{name}: values of {dtype} lie in 0 to 255; these reach from {low} to {high}; {hint}")


def _require_unit_range(bands: Bands, name: str) -> None:
    def floats() -> Iterator[npt.NDArray[np.float32]]:
        with np.errstate(over="ignore"):
            for band in bands():
                yield band.astype(np.float32, copy=False)

    low, high = map(float, _extrema(floats))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError(f"{name}: float values lie in [0, 1]; these hold NaN or infinity")
    out = max(-low, high - 1)
    beyond = out > _OVERSHOOT
    if 0 < out <= _OVERSHOOT:
        sums = [(np.abs(_clipped(band) - band).sum(dtype=np.float64), band.size) for band in floats()]
        total, count = map(sum, zip(*sums, strict=True))
        beyond = total / count > _MEAN_OVERSHOOT
    if beyond:
        raise ImageError(
            f"{name}: float values lie in [0, 1]; these reach from {low:g} to {high:g}; "
            + _range_advice(low, high)
        )


def _clipped(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    return values.astype(np.float32, copy=False).clip(0, 1)


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
