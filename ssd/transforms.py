"""The evaluation transform: an image resized to the network's input, and normalised."""

from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

# ImageNet statistics of RGB in [0, 1], used by torchvision's ResNets and NVIDIA's training code.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_BAND = 1_000_000  # pixels that are turned into an array at a time


def describe_transform(size: int) -> str:
    """What images a network is trained on, for people who read a checkpoint."""
    return f"the whole image resized to {size}x{size} (bilinear, antialiased), ImageNet mean and deviation"


def resize(image: Image.Image | npt.NDArray[np.uint8], size: int) -> Tensor:
    """The whole image squashed to the network's size, bilinear and antialiased, as published.

    torch's kernel is three times as fast as Pillow's, which the published code used; a value in some
    hundreds differs by 1 of 255.

    Args:
        image: mode RGB; or its pixels, uint8 ``[H, W, 3]``, which need no copy.
        size: width and height of the result.

    Returns:
        uint8 ``[size, size, 3]``.
    """
    if isinstance(image, np.ndarray):
        image = np.ascontiguousarray(image)
        height, width = image.shape[:2]
    else:
        width, height = image.size
    rows = max(1, _BAND // width)
    if height > rows:
        # The kernel makes rows narrow before it makes columns short, with uint8 between: the same in parts,
        # which need not be all in memory as arrays.
        tops = range(0, height, rows)
        bands = (_rows(image, top, min(top + rows, height)) for top in tops)
        narrow = torch.cat([_squash(band, len(band), size) for band in bands])
    else:
        narrow = torch.from_numpy(image if isinstance(image, np.ndarray) else np.array(image))
    return _squash(narrow, size, size).contiguous()


def _rows(image: Image.Image | npt.NDArray[np.uint8], top: int, bottom: int) -> Tensor:
    if isinstance(image, Image.Image):
        image = np.array(image.crop((0, top, image.width, bottom)))
        top, bottom = 0, len(image)
    return torch.from_numpy(image[top:bottom])


def _squash(pixels: Tensor, height: int, width: int) -> Tensor:
    squashed = interpolate(pixels.permute(2, 0, 1)[None], (height, width), mode="bilinear", antialias=True)
    return squashed[0].permute(1, 2, 0)


def normalize(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Network input from resized images, on their device.

    Args:
        images: uint8 ``[..., H, W, 3]``.
        dtype: of the result; computed in float32.

    Returns:
        ``[..., 3, H, W]``, a view of channels-last memory, normalised with ImageNet mean and deviation.
    """
    # Whole rows at a time: an inner loop of three channels is slow.
    width = images.shape[-2]
    mean, std = _statistics(images.device, width)
    rows = images.flatten(-2).to(torch.float32, copy=True).sub_(mean).div_(std).to(dtype)
    return rows.view(images.shape).movedim(-1, -3)


@cache
@torch.inference_mode(False)
def _statistics(device: torch.device, width: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a row of pixels; kept, since bringing them to a GPU waits for it."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device="cpu").mul(255).repeat(width).to(device)
        for values in (MEAN, STD)
    )
    return mean, std


def evaluation_transform(image: Image.Image, size: int) -> Tensor:
    """Float32 ``[3, size, size]`` of an RGB image, as the network expects it."""
    return normalize(resize(image, size))
