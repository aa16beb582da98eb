"""The evaluation transform: what the network was trained to see."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ssd.boxes import INPUT_SIZE

# ImageNet statistics of RGB in [0, 1], used by torchvision's ResNets and NVIDIA's training code.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def resize(image: Image.Image) -> Tensor:
    """The whole image squashed to the network's size, bilinear and antialiased, as published.

    torch's kernel is three times as fast as Pillow's, which the published code used; a value in some
    hundreds differs by 1 of 255.

    Args:
        image: mode RGB.

    Returns:
        uint8 ``[300, 300, 3]``.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    squashed = interpolate(pixels, (INPUT_SIZE, INPUT_SIZE), mode="bilinear", antialias=True)
    return squashed[0].permute(1, 2, 0).contiguous()


def normalize(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Network input from resized images, on their device.

    Args:
        images: uint8 ``[..., 300, 300, 3]``.
        dtype: of the result; computed in float32.

    Returns:
        ``[..., 3, 300, 300]``, a view of channels-last memory, normalised with ImageNet mean and deviation.
    """
    # Whole rows at a time: an inner loop of three channels is slow.
    width = images.shape[-2]
    mean, std = (torch.tensor(values).mul(255).repeat(width).to(images.device) for values in (MEAN, STD))
    rows = images.flatten(-2).to(torch.float32, copy=True).sub_(mean).div_(std).to(dtype)
    return rows.view(images.shape).movedim(-1, -3)


def evaluation_transform(image: Image.Image) -> Tensor:
    """Float32 ``[3, 300, 300]`` of an RGB image, as the network expects it."""
    return normalize(resize(image))
