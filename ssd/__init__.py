"""SSD300 object detection with a ResNet trunk.

>>> import ssd
>>> sorted(ssd.__all__)[:3]
['AnnotationError', 'CheckpointError', 'Detection']
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ssd.detections import Detection, Detections
    from ssd.detector import Detector
    from ssd.errors import (
        AnnotationError,
        CheckpointError,
        DownloadError,
        ImageError,
        MissingExtra,
        NonFiniteError,
        UserError,
    )
    from ssd.images import load_image
    from ssd.model import SSD, SSD300, load_model

__all__ = [
    "SSD",
    "SSD300",
    "AnnotationError",
    "CheckpointError",
    "Detection",
    "Detections",
    "Detector",
    "DownloadError",
    "ImageError",
    "MissingExtra",
    "NonFiniteError",
    "UserError",
    "load_image",
    "load_model",
]

_HOMES = {
    "SSD": "model",
    "SSD300": "model",
    "AnnotationError": "errors",
    "CheckpointError": "errors",
    "Detection": "detections",
    "Detections": "detections",
    "Detector": "detector",
    "DownloadError": "errors",
    "ImageError": "errors",
    "MissingExtra": "errors",
    "NonFiniteError": "errors",
    "UserError": "errors",
    "load_image": "images",
    "load_model": "model",
}


# Names and modules are imported when first used (PEP 562), so that `ssd --help` need not wait for torch.
def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"ssd.{_HOMES[name]}"), name)
    if not name.startswith("_") and find_spec(f"ssd.{name}"):
        return import_module(f"ssd.{name}")
    raise AttributeError(f"module 'ssd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
