"""Official COCO metrics of a detector on a dataset."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from ssd.backends import Options
from ssd.data.annotations import Annotations
from ssd.data.dataset import annotations_of, as_array, as_targets, item_name, require_items
from ssd.data.judge import MISSHAPEN, listed, require_size
from ssd.detections import Detections
from ssd.detector import Detector
from ssd.distributed import World, alone
from ssd.errors import AnnotationError, as_line
from ssd.postprocess import IOU_THRESHOLD, MOST_KEPT, SCORE_THRESHOLD
from ssd.sources import Named

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""The twelve numbers of COCOeval.summarize, in its order; -1 where there is nothing to measure."""

_FOUND_AT = 0.5  # IoU

MEANINGS = {
    "AP": "IoU 0.50:0.95, all sizes",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "small, area below 32 x 32",
    "APm": "medium, up to 96 x 96",
    "APl": "large",
    "AR1": "recall, 1 detection an image",
    "AR10": "recall, 10 detections",
    "AR100": "recall, 100 detections",
    "ARs": "recall, small",
    "ARm": "recall, medium",
    "ARl": "recall, large",
}


@dataclass(frozen=True)
class Evaluation:
    """What a detector reached on a dataset."""

    metrics: dict[str, float]
    """By the names of `METRICS`, in [0, 1]; -1 where nothing could be measured."""
    per_class: dict[str, dict[str, float]]
    """Of each class: "AP", "AP50", and the number of "boxes" (without crowd)."""
    images: int
    boxes: int
    detections: int
    left_out: dict[str, int] = field(default_factory=dict)
    """Images and annotations that could not be used and do not count, by what is wrong with them."""
    sizes_by_box: int = field(default=0, compare=False)
    """Boxes that are small, medium or large by their own area: no other, or an impossible one, is given."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; without the thresholds, which are the weights' own."""
        return {key: value for key, value in asdict(self).items() if key != "score_thresholds"}

    def __str__(self) -> str:
        wide = max(len("class"), *(len(as_line(name)) for name in self.per_class))
        lines = [f"{self.images} images, {self.boxes} boxes, {self.detections} detections"]
        if self.left_out:
            lines.append(f"left out of these numbers ({listed(self.left_out)})")
        if self.sizes_by_box:
            lines.append(
                f"small, medium and large are by the area of the box for {self.sizes_by_box} of {self.boxes} "
                "boxes, for which no area, or none that can be right, is given"
            )
        lines.append("")
        lines += [f"{name:6} {_cell(self.metrics[name])}  {MEANINGS[name]}" for name in METRICS]
        lines += ["", f"{'class':{wide}}  {'boxes':>7}  {'AP':>6}  {'AP50':>6}"]
        lines += [
            f"{as_line(name):{wide}}  {row['boxes']:7.0f}  {_cell(row['AP'])}  {_cell(row['AP50'])}"
            for name, row in self.per_class.items()
        ]
        return "\n".join(lines)


def _cell(value: float) -> str:
    return f"{value:6.3f}" if value >= 0 else "     -"


def detect_all(
    detector: Detector,
    dataset: Annotations | Dataset[Any],
    world: World,
    *,
    batch_size: int = 8,
    score_threshold: float = SCORE_THRESHOLD,
    iou_threshold: float = IOU_THRESHOLD,
    tiles: int | None = None,
    voting: bool = False,
    flips: bool = False,
    on_done: Callable[[], object] = lambda: None,
) -> tuple[Annotations, dict[int, Detections]]:
    """Detect on every image of a dataset; each process does its share, without overlap, and all get all.

    Args:
        detector: of the dataset's classes.
        dataset: `ssd.data.load`'s annotations, or any Dataset that training takes.
        world: this process among those of the run.
        batch_size: images in the network at a time.
        score_threshold, iou_threshold: of the detections, as published for validation.
        tiles, voting, flips: see `Detector.__call__`.
        on_done: called after each image of this process.

    Returns:
        The ground truth, and detections by the index of their image.

    Raises:
        ImageError, FileNotFoundError: an image cannot be read.
        AnnotationError: the dataset is empty, or has other classes; an image has another size than its
            annotations were made for; an item holds no boxes, labels, "iscrowd" or "area" that fit.
    """
    if (annotations := annotations_of(dataset)) is not None:
        dataset = annotations
    count = require_items(dataset, "to evaluate on")
    if isinstance(dataset, Annotations) and dataset.class_names != detector.class_names:
        raise AnnotationError(
            f"{dataset.source}: read with class_names=detector.class_names; the classes are others"
        )
    mine = world.share(count, batch_size)
    targets: dict[int, Target] = {}

    def sources() -> Iterator[Path | Named]:
        for i in mine:
            if isinstance(dataset, Annotations):
                yield dataset.path(i)
            else:
                name = item_name(dataset, i)
                image, target = dataset[i]
                targets[i] = _as_truth(target, name)
                yield Named(name, image)

    found = {}
    results = detector.stream(
        sources(),
        batch_size=batch_size,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        max_detections=MOST_KEPT,
        tiles=tiles,
        voting=voting,
        flips=flips,
    )
    for i, each in zip(mine, results, strict=True):
        if isinstance(dataset, Annotations):
            require_size(dataset, i, (each.image_size[1], each.image_size[0]))
        found[i] = replace(each, image=None)  # thousands of images do not fit the memory
        on_done()
    merged: dict[int, Detections] = {}
    for share, some in world.gather((found, targets)):
        merged |= share
        targets |= some
    truth = dataset if isinstance(dataset, Annotations) else _from_targets(targets, detector.class_names)
    return truth, {i: merged[i] for i in sorted(merged)}


def evaluate_detector(
    detector: Detector,
    dataset: Annotations | Dataset[Any],
    world: World | None = None,
    *,
    batch_size: int = 8,
    tiles: int | None = None,
    voting: bool = False,
    flips: bool = False,
) -> Evaluation:
    """Detect on every image of a dataset and measure with the official COCO code; see `detect_all`.

    All images count, with and without boxes.
    """
    world = world or alone(detector.device)
    truth, found = detect_all(
        detector, dataset, world, batch_size=batch_size, tiles=tiles, voting=voting, flips=flips
    )
    return measure_once(truth, found, world)


def measure_once(annotations: Annotations, found: Mapping[int, Detections], world: World) -> Evaluation:
    """`measure` in the main process, for all."""
    measured = world.gather(measure(annotations, found) if world.is_main else None)[0]
    assert measured is not None
    return measured


Target = tuple[
    npt.NDArray[np.float64],
    npt.NDArray[np.int64],
    npt.NDArray[np.bool_],
    npt.NDArray[np.float64],
    npt.NDArray[np.bool_],
]


def _as_truth(target: Mapping[str, Any], name: str) -> Target:
    """Boxes, labels, crowd and areas of an item, as torchvision's datasets call them; and which are given."""
    boxes, labels = as_targets(target, name)
    crowd = _column(target, "iscrowd", np.zeros(len(labels)), name)
    areas = _column(target, "area", (boxes[:, 2:] - boxes[:, :2]).prod(1), name)
    given = np.full(len(labels), "area" in target)
    return boxes.astype(np.float64), labels, crowd.astype(np.bool_), areas.astype(np.float64), given


def _column(target: Mapping[str, Any], key: str, default: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """What an item says of each of its boxes; the default, which has the right length, where it does not."""
    values = as_array(target.get(key, default), f'{name}: its "{key}"')
    if values.shape != default.shape and (values.size or len(default)):
        raise AnnotationError(
            f'{name}: "{key}" is [M], a number for each of its {len(default)} boxes; got {list(values.shape)}'
        )
    return values.reshape(-1)


def _from_targets(targets: Mapping[int, Target], class_names: tuple[str, ...]) -> Annotations:
    order = sorted(targets)
    boxes, labels, crowd, areas, given = (
        np.concatenate([targets[i][part] for i in order]) for part in range(5)
    )
    if len(labels) and labels.max() > len(class_names):
        raise AnnotationError(f"the dataset has a label {labels.max()}, the model {len(class_names)} classes")
    return Annotations(
        root=Path(),
        source=Path("dataset"),
        class_names=class_names,
        category_ids=tuple(range(1, len(class_names) + 1)),
        file_names=np.array([f"item {i}" for i in order], np.str_),
        image_ids=tuple(order),
        sizes=np.zeros((len(order), 2), np.int64),
        starts=np.cumsum([0, *(len(targets[i][1]) for i in order)]),
        boxes=boxes,
        labels=labels,
        crowd=crowd,
        areas=areas,
        areas_given=given,
        usable=np.ones(len(labels), np.bool_),
        problems=(),
    )


def measure(annotations: Annotations, found: Mapping[int, Detections]) -> Evaluation:
    """Official COCO numbers of detections.

    Images, annotations and categories are numbered anew, so that ids of any kind count.

    Args:
        annotations: the ground truth; all of it counts, crowd boxes as what is ignored.
        found: detections by the index of their image; images that are not in it have none.
    """
    detections = sum(len(each) for each in found.values())
    if not detections:
        warnings.warn("nothing was detected in any image, so all metrics are 0", stacklevel=2)
    run = run_coco(annotations, found)
    precision = run.eval["precision"]  # [IoU, recall, class, area, most]
    real = annotations.labels[~annotations.crowd]
    per_class = {
        name: {
            "AP": _mean(precision[:, :, k, 0, 2]),
            "AP50": _mean(precision[0, :, k, 0, 2]),
            "boxes": int((real == k + 1).sum()),
        }
        for k, name in enumerate(annotations.class_names)
    }
    return Evaluation(
        metrics={name: float(value) for name, value in zip(METRICS, run.stats, strict=False)},
        per_class=per_class,
        images=len(annotations),
        boxes=len(real),
        detections=detections,
        left_out={kind: n for kind, n in annotations.left_out.items() if kind not in MISSHAPEN},
        sizes_by_box=_sizes_by_box(annotations),
    )


def _sizes_by_box(annotations: Annotations) -> int:
    """How many boxes, without crowd, have no area but their own; 0 where nobody asked."""
    given = annotations.areas_given
    return int((~given & ~annotations.crowd).sum()) if len(given) == len(annotations.labels) else 0


def run_coco(annotations: Annotations, found: Mapping[int, Detections]) -> Any:
    """The COCOeval of detections, accumulated and summarised; see `measure`."""
    coco, evaluator = _coco_package()
    with contextlib.redirect_stdout(io.StringIO()):
        truth, results = coco(), coco()
        truth.dataset = _truth(annotations)
        results.dataset = truth.dataset | {"annotations": _results(found)}
        truth.createIndex()
        results.createIndex()
        run = evaluator(truth, results, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def _coco_package() -> tuple[Any, Any]:
    """The classes COCO and COCOeval: faster-coco-eval's where installed, else those of pycocotools."""
    if find_spec("faster_coco_eval"):
        from faster_coco_eval import COCO, COCOeval_faster  # noqa: PLC0415

        return COCO, COCOeval_faster
    from pycocotools.coco import COCO  # noqa: PLC0415
    from pycocotools.cocoeval import COCOeval  # noqa: PLC0415

    return COCO, COCOeval


def _truth(annotations: Annotations) -> dict[str, Any]:
    image = np.repeat(np.arange(len(annotations)), np.diff(annotations.starts))
    rows = zip(
        image.tolist(),
        annotations.labels.tolist(),
        annotations.boxes.tolist(),
        annotations.areas.tolist(),
        annotations.crowd.tolist(),
        strict=True,
    )
    return {
        "images": [{"id": i + 1} for i in range(len(annotations))],
        "categories": [{"id": k, "name": name} for k, name in enumerate(annotations.class_names, start=1)],
        "annotations": [
            {
                "id": number,
                "image_id": i + 1,
                "category_id": label,
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "area": area,
                "iscrowd": int(crowd),
            }
            for number, (i, label, box, area, crowd) in enumerate(rows, start=1)
        ],
    }


def _results(found: Mapping[int, Detections]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i, each in found.items():
        boxes = each.boxes.astype(np.float64).tolist()
        for (left, top, right, bottom), score, class_id in zip(
            boxes, each.scores.tolist(), each.class_ids.tolist(), strict=True
        ):
            rows.append(
                {
                    "id": len(rows) + 1,
                    "image_id": i + 1,
                    "category_id": class_id + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                    "score": score,
                }
            )
    return rows


def _mean(precision: Any) -> float:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else -1.0


def best_thresholds(annotations: Annotations, found: Mapping[int, Detections]) -> tuple[float, ...]:
    """The score of each class above which its detections have the highest F1 at an IoU of 0.5.

    F1 is twice the detections that find a box, divided by all detections and all boxes. Boxes are found as
    COCO's metrics have it: by the detections of an image, best first, each the free box of its class that it
    overlaps most; crowd boxes, and what finds them, do not count.

    Args:
        annotations, found: as for `measure`.

    Returns:
        Each half-way between the lowest score that is to be kept and the next one, in [0, 1]; of equal F1
        the highest. A class in which nothing is found has the default, `Options.score_threshold`.
    """
    hits = np.concatenate(
        [np.zeros(0, np.int64), *(_hits(annotations, i, each) for i, each in found.items())]
    )
    scores, class_ids = (
        np.concatenate([np.zeros(0, np.float32), *(getattr(each, name) for each in found.values())])
        for name in ("scores", "class_ids")
    )
    boxes = np.bincount(annotations.labels[~annotations.crowd], minlength=len(annotations.class_names) + 1)
    thresholds = []
    for class_id, count in enumerate(boxes[1:].tolist()):
        mine = (class_ids == class_id) & (hits >= 0)
        thresholds.append(_best_threshold(scores[mine].astype(np.float32), hits[mine], count))
    return tuple(thresholds)


def _hits(annotations: Annotations, i: int, found: Detections) -> npt.NDArray[np.int64]:
    """Of each detection of an image 1 if it finds a box of its class, else 0; -1 if it finds a crowd."""
    from pycocotools import mask  # noqa: PLC0415

    part, hits = annotations.of_image(i), np.zeros(len(found), np.int64)
    crowd, labels = annotations.crowd[part], annotations.labels[part] - 1
    if not len(labels) or not len(found):
        return hits
    corners = (found.boxes.astype(np.float64), annotations.boxes[part].astype(np.float64))
    boxes, truth = (np.hstack([each[:, :2], each[:, 2:] - each[:, :2]]) for each in corners)
    # Of crowd boxes it gives the part of the detection that they cover.
    overlaps = np.where(found.class_ids[:, None] == labels, mask.iou(boxes, truth, crowd), 0)
    free = ~crowd
    for k in np.flatnonzero(overlaps.max(1) >= _FOUND_AT):  # best first
        best = int(np.where(free, overlaps[k], -1).argmax())
        if free[best] and overlaps[k, best] >= _FOUND_AT:
            free[best], hits[k] = False, 1
        elif (overlaps[k, crowd] >= _FOUND_AT).any():
            hits[k] = -1
    return hits


def _best_threshold(scores: npt.NDArray[np.float32], hits: npt.NDArray[np.int64], boxes: int) -> float:
    """That of a class, from the scores of all its detections and what they find."""
    if not hits.any():
        return Options.score_threshold
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    lowest = np.float32(SCORE_THRESHOLD)  # nothing below was looked at
    lowest = lowest if lowest < scores[-1] else scores[-1] / 2
    following = np.append(scores[1:], lowest)
    f1 = 2 * hits[order].cumsum() / (np.arange(1, len(scores) + 1) + boxes)
    best = int(np.where(scores > following, f1, -1).argmax())  # equal scores stay or go together
    middle = (scores[best] + following[best]) / np.float32(2)
    return float(middle if middle < scores[best] else following[best])


def coco_results(annotations: Annotations, found: Mapping[int, Detections]) -> list[dict[str, Any]]:
    """Detections as a COCO results file has them, with the dataset's own image and category ids."""
    return [
        entry
        for i, each in found.items()
        for entry in replace(each, category_ids=annotations.category_ids).to_coco(annotations.image_ids[i])
    ]
