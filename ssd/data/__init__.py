"""Labelled images: COCO, YOLO and VOC folders, recognised by their layout, as one dataset.

Boxes are xyxy in pixels of the upright image; labels count from 1, and 0 is left to the background.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssd.data.annotations import Annotations, Problem
    from ssd.data.dataset import DetectionDataset, annotations_of, as_targets, item_name, require_items
    from ssd.data.formats import FORMATS, SPLITS, Format, find_split, load
    from ssd.data.judge import is_without_images, listed, require_boxes, usable_for_evaluation
    from ssd.errors import AnnotationError

__all__ = [
    "FORMATS",
    "SPLITS",
    "AnnotationError",
    "Annotations",
    "DetectionDataset",
    "Format",
    "Problem",
    "annotations_of",
    "as_targets",
    "find_split",
    "is_without_images",
    "item_name",
    "listed",
    "load",
    "require_boxes",
    "require_items",
    "usable_for_evaluation",
]

_HOMES = {
    "FORMATS": "ssd.data.formats",
    "SPLITS": "ssd.data.formats",
    "AnnotationError": "ssd.errors",
    "Annotations": "ssd.data.annotations",
    "DetectionDataset": "ssd.data.dataset",
    "Format": "ssd.data.formats",
    "Problem": "ssd.data.annotations",
    "annotations_of": "ssd.data.dataset",
    "as_targets": "ssd.data.dataset",
    "find_split": "ssd.data.formats",
    "is_without_images": "ssd.data.judge",
    "item_name": "ssd.data.dataset",
    "listed": "ssd.data.judge",
    "load": "ssd.data.formats",
    "require_boxes": "ssd.data.judge",
    "require_items": "ssd.data.dataset",
    "usable_for_evaluation": "ssd.data.judge",
}


# Names are imported when first used (PEP 562): of these modules, only ssd.data.dataset needs torch.
def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ssd.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
