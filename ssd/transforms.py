"""The evaluation transform: what the network was trained to see."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssd.boxes import INPUT_SIZE

# ImageNet statistics of RGB in [0, 1], used by torchvision's ResNets and NVIDIA's training code.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def resize(image: Image.Image) -> Tensor:
    """The whole image squashed to the network's size, bilinear and antialiased, as published.

    Args:
        image: mode RGB.

    Returns:
        uint8 ``[300, 300, 3]``.
    """
    squashed = image.resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(squashed))


def normalize(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Network input from resized images, on their device.

    Args:
        images: uint8 ``[..., 300, 300, 3]``.
        dtype: of the result; computed in float32.

    Returns:
        ``[..., 3, 300, 300]``, a view of channels-last memory, normalised with ImageNet mean and deviation.
    """
    mean, std = (torch.tensor(values).mul(255).to(images.device) for values in (MEAN, STD))
    return images.float().sub_(mean).div_(std).to(dtype).movedim(-1, -3)


def evaluation_transform(image: Image.Image) -> Tensor:
    """Float32 ``[3, 300, 300]`` of an RGB image, as the network expects it."""
    return normalize(resize(image))
