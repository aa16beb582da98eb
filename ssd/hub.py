"""What the torch.hub page of the published model promises: its two entrypoints and their behaviour.

New code is better served by `ssd.Detector`, which does not crop and gives boxes in the image's pixels.
"""

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssd import images
from ssd.boxes import PUBLISHED_LAYOUT
from ssd.choices import Precision
from ssd.errors import CheckpointError, ImageError
from ssd.labels import COCO_NAMES
from ssd.model import SSD, load_model, set_precision
from ssd.postprocess import postprocess

Array = npt.NDArray[Any]


def nvidia_ssd(
    pretrained: bool = True,
    weights: str | os.PathLike[str] | None = None,
    model_math: Precision = "fp32",
    force_reload: bool = False,
    progress: bool = True,
) -> SSD:
    """SSD300 with a ResNet-50 trunk, as published by NVIDIA on torch.hub; 0.25 AP on COCO val2017.

    Args:
        pretrained: load weights; the published ones, unless `weights` says which. They have no BatchNorm in
            the heads, so neither has the model. Without weights, the heads have BatchNorm.
        weights: a file, an http(s) URL or ``hf://owner/repo`` of a checkpoint, also of another backbone
            or other classes.
        model_math: fp32; fp16 or bf16 for convolutions in half precision and BatchNorm in fp32. The input
            has to be of that type: ``prepare_tensor(inputs, fp16=True)``, or ``tensor.bfloat16()``.
        force_reload: download the weights anew.
        progress: show a progress bar for a download.

    Returns:
        The model on the CPU, in training mode: call ``.to(device).eval()``. It maps images
        ``[N, 3, 300, 300]`` to loc ``[N, 4, 8732]`` and conf ``[N, 81, 8732]``.

    A process that is started with "spawn" and is handed the model imports its class, so `ssd` has to be found
    there: this works for models of torch.hub too, whose folder hubconf.py leaves on the path.

    Raises:
        DownloadError: the weights are not in the cache and cannot be downloaded.
        CheckpointError: the file is damaged, or of another network or layout.
    """
    if not pretrained and weights is None:
        model = SSD()
        set_precision(model, model_math)
        return model
    model, _ = load_model(weights or "coco", precision=model_math, force=force_reload, progress=progress)
    if model.layout != PUBLISHED_LAYOUT:
        raise CheckpointError(
            f"{weights} is of another layout than the published one, which is all that the hub's functions "
            "know: their boxes would be wrong; load it by ssd.Detector.load, or ssd.load_model"
        )
    return model


def nvidia_ssd_processing_utils() -> type["Processing"]:
    """The functions between images and the hub model; see `Processing`."""
    return Processing


class Processing:
    """Functions between images and the hub model, with the hub's transform: resize, centre crop, 128/128."""

    @staticmethod
    def load_image(image_path: images.ImageSource) -> Array:
        """An image as floats in [0, 1], HWC, RGB; of any source that `ssd.load_image` takes."""
        return np.asarray(images.load_image(image_path)) / 255.0

    @staticmethod
    def rescale(img: Array, input_height: int, input_width: int) -> Array:
        """Resize HWC floats so that the image just covers height x width, keeping its aspect."""
        import skimage.transform  # noqa: PLC0415 (half a second that only the hub's users pay)

        height, width = img.shape[:2]
        if max(height, width) > images.MAX_ASPECT * min(height, width):
            raise ImageError(f"{width}x{height} is too thin to be resized and cropped")
        aspect = width / height
        if aspect > 1:
            size = (input_height, int(aspect * input_height))
        else:
            size = (int(input_width / aspect), input_width)
        return np.asarray(skimage.transform.resize(img, size))  # type: ignore[no-untyped-call]

    @staticmethod
    def crop_center(img: Array, cropx: int, cropy: int) -> Array:
        """The middle `cropx` x `cropy` pixels of HWC data."""
        height, width = img.shape[:2]
        left, top = width // 2 - cropx // 2, height // 2 - cropy // 2
        return img[top : top + cropy, left : left + cropx]

    @staticmethod
    def normalize(img: Array, mean: float = 128, std: float = 128) -> Array:
        """Map [0, 1] to about [-1, 1]: ``(256 * img - mean) / std``."""
        return (img * 256 - mean) / std

    @staticmethod
    def prepare_input(img_uri: images.ImageSource) -> Array:
        """Load, rescale, crop and normalise an image: floats ``[300, 300, 3]`` in [-1, 1]."""
        img = Processing.load_image(img_uri)
        side = PUBLISHED_LAYOUT.size
        img = Processing.crop_center(Processing.rescale(img, side, side), side, side)
        return Processing.normalize(img)

    @staticmethod
    def prepare_tensor(
        inputs: "list[Array] | Array", fp16: bool = False, device: torch.device | str | None = None
    ) -> Tensor:
        """Stack prepared inputs ``[300, 300, 3]`` into ``[N, 3, 300, 300]``.

        Args:
            inputs: results of `prepare_input`.
            fp16: give float16, for a model with ``model_math="fp16"``; float32 otherwise.
            device: where to put it; by default CUDA where there is one, else the CPU.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        stacked = np.asarray(inputs, dtype=np.float32)
        if stacked.ndim != 4:
            raise ValueError(f"inputs are a list of [H, W, 3] arrays; stacked they are {list(stacked.shape)}")
        tensor = torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()
        return tensor.to(device, torch.float16 if fp16 else torch.float32)

    @staticmethod
    def decode_results(predictions: tuple[Tensor, Tensor]) -> list[list[Array]]:
        """Detections from the model's raw outputs: NMS at IoU 0.5, at most 20 an image, best first.

        Returns:
            For each image ``[boxes, classes, confidences]``: float32 ``[K, 4]``, left, top, right and bottom
            relative to the 300x300 input; int64 ``[K]``, counted from 1; float32 ``[K]``. K may be 0.

        Raises:
            NonFiniteError: the outputs hold NaN or infinity.
        """
        loc, conf = predictions
        defaults = PUBLISHED_LAYOUT.default_boxes().to(loc.device)
        found = postprocess(loc, conf, defaults, iou_threshold=0.5, max_detections=20)
        return [
            [boxes.numpy(), class_ids.numpy() + 1, scores.numpy()]
            for boxes, scores, class_ids in found.cpu().per_image()
        ]

    @staticmethod
    def pick_best(detections: list[Array], threshold: float = 0.3) -> list[Array]:
        """Keep the detections of one image whose confidence exceeds the threshold."""
        _, _, confidences = detections
        return [values[confidences > threshold] for values in detections]

    @staticmethod
    def get_coco_object_dictionary() -> list[str]:
        """COCO's 80 class names: class ``c`` of `decode_results` is called ``names[c - 1]``."""
        return list(COCO_NAMES)
