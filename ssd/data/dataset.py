"""Annotations and their images as a torch Dataset, and what an item of any such dataset holds."""

import bisect
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from ssd.data.annotations import Annotations
from ssd.data.judge import require_size, usable_for_training
from ssd.errors import AnnotationError
from ssd.images import load_image


class DetectionDataset(Dataset[tuple[Image.Image, dict[str, Any]]]):
    """Images with boxes for training and evaluation.

    An item is an upright RGB image and a dict: "boxes", float32 xyxy in pixels, clipped, ``[M, 4]``, and
    "labels", int64 ``[M]`` from 1. Training takes any other torch Dataset whose items are like that (images
    of any kind that `ssd.load_image` reads, tensors for boxes and labels), too.

    Args:
        annotations: see `ssd.data.load`.
        lenient: leave out annotations that cannot be used, and images that are missing, that are none, that
            are labelled twice and differently, or that have another size than their annotations say, instead
            of refusing them. An image that turns out to be damaged within stops training in any case; `ssd
            check` finds it.
        crowd: keep crowd boxes, as NVIDIA's training code does.

    Raises:
        AnnotationError: with the first of the problems, unless `lenient`.
    """

    def __init__(self, annotations: Annotations, *, lenient: bool = False, crowd: bool = False) -> None:
        self.annotations = annotations = usable_for_training(annotations, lenient=lenient)
        self.class_names = annotations.class_names
        self.crowd = crowd
        self._kept = annotations.trained_on(crowd=crowd)

    def __len__(self) -> int:
        return len(self.annotations)

    def name(self, index: int) -> str:
        """The file of an item, for messages."""
        return str(self.annotations.root / str(self.annotations.file_names[index]))

    def __getitem__(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        image = load_image(self.annotations.path(index))
        require_size(self.annotations, index, image.size)
        part = self.annotations.of_image(index)
        kept = self._kept[part]
        boxes = self.annotations.boxes[part][kept]
        boxes = boxes.clip(0, [*image.size, *image.size]).astype(np.float32)
        seen = (boxes[:, 2:] > boxes[:, :2]).all(1)  # files that give no image size may have boxes outside
        return image, {"boxes": boxes[seen], "labels": self.annotations.labels[part][kept][seen]}


def annotations_of(dataset: Annotations | Dataset[Any]) -> Annotations | None:
    """The annotations of a dataset, also of a Subset, as `torch.utils.data.random_split` gives; or None."""
    if isinstance(dataset, Subset):
        whole = annotations_of(dataset.dataset)
        return None if whole is None else whole.select(dataset.indices)
    if isinstance(dataset, DetectionDataset):
        return dataset.annotations
    return dataset if isinstance(dataset, Annotations) else None


def parts_of(dataset: Annotations | Dataset[Any]) -> list[Any]:
    """The datasets that one is made of by torch's Subset and ConcatDataset; any other is its only part."""
    if isinstance(dataset, Subset):
        return parts_of(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return [part for each in dataset.datasets for part in parts_of(each)]
    return [dataset]


def _origin(dataset: Dataset[Any], index: int) -> tuple[Dataset[Any], int]:
    """Which part of a dataset an item comes from, and its index there."""
    if isinstance(dataset, Subset):
        return _origin(dataset.dataset, dataset.indices[index])
    if isinstance(dataset, ConcatDataset):
        index = range(len(dataset))[index]  # negative ones count from the end
        number = bisect.bisect_right(dataset.cumulative_sizes, index)
        before = dataset.cumulative_sizes[number - 1] if number else 0
        return _origin(dataset.datasets[number], index - before)
    return dataset, index


def item_name(dataset: Dataset[Any], index: int) -> str:
    """What messages call an item of any dataset: its file, if the dataset has a method ``name(index)``."""
    part, within = _origin(dataset, index)
    name = getattr(part, "name", None)
    return str(name(within)) if callable(name) else f"item {index if part is dataset else within}"


def require_in_pixels(
    boxes: npt.NDArray[np.float32], size: tuple[int, int], dataset: Dataset[Any], index: int
) -> None:
    """Require boxes that are in their image, where nobody has judged them before.

    Args:
        boxes: xyxy in pixels ``[M, 4]``; they may reach over the image's edge.
        size: of the image, width and height in pixels.
        dataset: that the item is from; the boxes of a `DetectionDataset` are known to be sound.
        index: of the item.

    Raises:
        AnnotationError: a box is wholly outside, or all of them seem to be normalised.
    """
    if not len(boxes) or type(_origin(dataset, index)[0]) is DetectionDataset:
        return
    name, (width, height) = item_name(dataset, index), size
    outside = (boxes[:, :2] >= size).any(1) | (boxes[:, 2:] <= 0).any(1)
    if outside.any():
        raise AnnotationError(
            f"{name}: the box {boxes[outside][0].tolist()} (xyxy in pixels) is outside its image of "
            f"{width}x{height}; boxes have to be of the image's own size, upright"
        )
    if min(size) > 2 and boxes.min() >= 0 and boxes.max() <= 1:
        raise AnnotationError(
            f"{name}: its boxes, such as {boxes[0].tolist()}, seem to be parts of the image of "
            f"{width}x{height}; boxes are in pixels"
        )


def require_items(dataset: Annotations | Dataset[Any], purpose: str) -> int:
    """How many images a dataset has.

    Args:
        dataset: of which the length is asked.
        purpose: for the message, such as "to evaluate on".

    Raises:
        AnnotationError: it has none.
    """
    count = len(dataset)  # type: ignore[arg-type]
    if not count:
        where = f"{dataset.source}: " if isinstance(dataset, Annotations) else ""
        raise AnnotationError(f"{where}there are no images {purpose}: the dataset is empty")
    return count


def as_targets(target: Mapping[str, Any], name: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Boxes and labels of an item of any dataset, checked.

    Args:
        target: "boxes", xyxy in pixels ``[M, 4]``, and "labels", ``[M]`` from 1; tensors, arrays or lists.
            Where M is 0, any shape without elements will do. Boxes that are torchvision's BoundingBoxes may
            be XYWH or CXCYWH. A target that has "image_id" alone, as torchvision's wrapped CocoDetection
            gives for an image without annotations, has no boxes.
        name: what messages call the item.

    Returns:
        Boxes, float32 xyxy ``[M, 4]``, and labels, int64 ``[M]``.

    Raises:
        AnnotationError: other shapes, boxes that are not finite, have no area or are rotated, labels that are
            no whole numbers or below 1.
    """
    if isinstance(target, Mapping) and set(target) == {"image_id"}:
        target = {"boxes": [], "labels": []}
    if not isinstance(target, Mapping) or not {"boxes", "labels"} <= set(target):
        raise AnnotationError(f"{name}: {_told_target(target)}")
    boxes, labels = target["boxes"], target["labels"]
    box_format = _box_format(boxes, name)
    boxes, labels = as_array(boxes, f"{name}: its boxes"), as_array(labels, f"{name}: its labels")
    boxes = boxes if boxes.size else boxes.reshape(0, 4)
    labels = labels if labels.size else labels.reshape(0)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise AnnotationError(f"{name}: boxes are [M, 4] (xyxy in pixels); got {list(boxes.shape)}")
    boxes = _as_corners(boxes, box_format)
    if labels.ndim != 1:
        raise AnnotationError(f"{name}: labels are [M], one for each box; got {list(labels.shape)}")
    if len(boxes) != len(labels):
        raise AnnotationError(f"{name}: {len(boxes)} boxes and {len(labels)} labels")
    if not np.isfinite(labels).all() or (labels != np.floor(labels)).any():
        raise AnnotationError(f"{name}: labels are whole numbers; got {labels.tolist()[:10]}")
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused
        boxes = boxes.astype(np.float32)
    sound = np.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    if not sound.all():
        bad = boxes[~sound][0]
        raise AnnotationError(f"{name}: the box {bad.tolist()} (xyxy) is not finite or has no area")
    if len(labels) and labels.min() < 1:
        raise AnnotationError(f"{name}: labels count from 1 (0 is the background); got {labels.min()}")
    return boxes, labels.astype(np.int64)


def _told_target(target: object) -> str:
    """What is wrong with a target that is none."""
    what = f"a {type(target).__name__}"
    if isinstance(target, Mapping):
        what = f"one with {', '.join(map(repr, list(target)[:8])) or 'nothing'}"
    raw = isinstance(target, list) or (isinstance(target, Mapping) and set(target) == {"annotation"})
    remedy = "; torchvision's datasets give that with wrap_dataset_for_transforms_v2(dataset)" if raw else ""
    return f'a target is a dict with "boxes" and "labels", not {what}{remedy}'


def _box_format(boxes: object, name: str) -> str:
    """The format that torchvision's BoundingBoxes say they are in; that of all others is XYXY.

    Raises:
        AnnotationError: boxes are rotated.
    """
    found = getattr(getattr(boxes, "format", None), "value", "XYXY")
    if found not in ("XYXY", "XYWH", "CXCYWH"):
        raise AnnotationError(
            f"{name}: its boxes are rotated ({found}); give the upright box around each of them, as XYXY"
        )
    return str(found)


def _as_corners(boxes: npt.NDArray[Any], box_format: str) -> npt.NDArray[Any]:
    """xyxy of boxes ``[M, 4]`` in a format of `_box_format`."""
    if box_format == "XYXY":
        return boxes
    boxes = boxes.astype(np.float64)
    first, size = boxes[:, :2], boxes[:, 2:]
    first = first - size / 2 if box_format == "CXCYWH" else first
    return np.concatenate([first, first + size], axis=1)


def as_array(values: object, what: str) -> npt.NDArray[Any]:
    """Numbers of a target, as a tensor, an array or a list, as an array.

    Raises:
        AnnotationError: they are no numbers, or rows of different lengths; `what` begins the message.
    """
    try:
        if isinstance(values, Tensor):
            values = values.detach().cpu()
            values = values.double() if values.is_floating_point() else values  # numpy has no bfloat16
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise AnnotationError(f"{what} are no array of numbers ({error})") from error
    if array.dtype.kind not in "biuf":
        raise AnnotationError(f"{what} are no numbers, but {array.dtype}")
    return array
