"""Official COCO metrics of a detector on a dataset."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from ssd.backends import Options
from ssd.calibration import (
    Calibration,
    Cuts,
    Reliability,
    best_cut,
    conformal_margin,
    cuts,
    fit_scores,
    reliability,
)
from ssd.data.annotations import Annotations
from ssd.data.dataset import annotations_of, as_array, as_targets, item_name, require_items
from ssd.data.judge import MISSHAPEN, listed, require_size
from ssd.detections import Detections
from ssd.detector import Detector
from ssd.distributed import World, alone
from ssd.errors import AnnotationError, as_line
from ssd.postprocess import IOU_THRESHOLD, MOST_KEPT, SCORE_THRESHOLD
from ssd.sources import Named

FOUND_AT = 0.5
"""The IoU from which on a detection finds a box."""

CROWD = -2
"""What `finds` gives of a detection that is left aside, as it lies on a crowd."""

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
"""What the twelve numbers of COCOeval.summarize are, in its order."""

METRICS = tuple(MEANINGS)


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
        """Plain data, for JSON."""
        return asdict(self)

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
    rows = zip(
        annotations.images_of_boxes().tolist(),
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
    matched = match(annotations, found)
    thresholds = []
    for class_id in range(len(annotations.class_names)):
        cut = matched.cuts(class_id)
        best = best_cut(cut)[0] if cut.f1.any() else None
        thresholds.append(Options.score_threshold if best is None else float(cut.thresholds[best]))
    return tuple(thresholds)


class Matches(NamedTuple):
    """All detections that count, and what each finds."""

    scores: npt.NDArray[np.float32]
    class_ids: npt.NDArray[np.int64]
    """From 0."""
    finds: npt.NDArray[np.int64]
    """The number of the box among all of the annotations; -1 for none."""
    found_boxes: npt.NDArray[np.float32]
    """Those of the detections, xyxy, ``[K, 4]``."""
    images: npt.NDArray[np.int64]
    """The index of each one's image."""
    boxes: npt.NDArray[np.int64]
    """How many boxes each class has, without crowd."""

    @property
    def hits(self) -> npt.NDArray[np.bool_]:
        """Which of the detections find a box."""
        return self.finds >= 0

    def cuts(self, class_id: int) -> Cuts:
        """What each score would do as the threshold of a class."""
        mine = self.class_ids == class_id
        return cuts(self.scores[mine], self.hits[mine], int(self.boxes[class_id]), SCORE_THRESHOLD)


def match(annotations: Annotations, found: Mapping[int, Detections]) -> Matches:
    """What detections find at an IoU of 0.5, as COCO's metrics have it; see `best_thresholds`."""
    classes = len(annotations.class_names)
    counts = np.bincount(annotations.labels[~annotations.crowd], minlength=classes + 1)[1:]
    none = np.zeros(0, np.int64)
    numbers = np.concatenate([none, *(finds(annotations, i, each) for i, each in found.items())])
    images = np.concatenate([none, *(np.full(len(each), i) for i, each in found.items())])
    scores = np.concatenate([np.zeros(0, np.float32), *(each.scores for each in found.values())])
    class_ids = np.concatenate([none, *(each.class_ids for each in found.values())])
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(each.boxes for each in found.values())])
    counting = numbers != CROWD
    return Matches(
        scores[counting], class_ids[counting], numbers[counting], boxes[counting], images[counting], counts
    )


@dataclass(frozen=True)
class ClassThreshold:
    """The threshold of a class, and what it does on the images that it was found on."""

    threshold: float
    precision: float
    recall: float
    boxes: int
    reached: bool
    """Whether it is as good as wanted."""
    problem: str = ""
    """What is in the way, if it is not."""


@dataclass(frozen=True)
class Calibrated:
    """What detections on a dataset say of a detector's scores and boxes."""

    classes: dict[str, ClassThreshold]
    calibration: Calibration
    before: Reliability
    """Of scores."""
    after: Reliability
    """Of probabilities: of each half of the images those that a fit to the other half gives."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "classes": {name: asdict(row) for name, row in self.classes.items()},
            "calibration": self.calibration.to_dict(),
            "calibration_error": {"before": self.before.error, "after": self.after.error},
        }


def calibrated(
    annotations: Annotations,
    found: Mapping[int, Detections],
    *,
    precision: float | None = None,
    recall: float | None = None,
    coverage: float = 0.9,
) -> Calibrated:
    """Thresholds of classes, probabilities for scores and a margin for boxes; see `ssd.calibration`.

    Args:
        annotations, found: as `detect_all` gives them, of images that were not trained on.
        precision, recall: what each class shall have, one of them; else its highest F1 is taken.
        coverage: of boxes with the margin, between 0 and 1, over all detections that find an object, whatever
            their score: which of them count must not depend on the thresholds that these images chose.
    """
    matched = match(annotations, found)
    classes = {
        name: _class_threshold(matched.cuts(k), int(matched.boxes[k]), precision, recall)
        for k, name in enumerate(annotations.class_names)
    }
    true = annotations.boxes[matched.finds[matched.hits]]
    temperature, bias = fit_scores(matched.scores, matched.hits)
    margin = conformal_margin(matched.found_boxes[matched.hits], true, coverage)
    return Calibrated(
        classes,
        Calibration(temperature, bias, margin, coverage, int(matched.hits.sum())),
        reliability(matched.scores, matched.hits),
        reliability(_crosswise(matched), matched.hits),
    )


def _class_threshold(cut: Cuts, boxes: int, precision: float | None, recall: float | None) -> ClassThreshold:
    if not cut.f1.any():
        problem = "nothing of it was found; the default is kept"
        return ClassThreshold(Options.score_threshold, 0.0, 0.0, boxes, False, problem)
    best, reached = best_cut(cut, precision, recall)
    wanted = f"precision of {precision:g}" if precision is not None else f"recall of {recall}"
    problem = "" if reached else f"no threshold reaches a {wanted}; this comes nearest"
    threshold, precise, found = (
        float(column[best]) for column in (cut.thresholds, cut.precision, cut.recall)
    )
    return ClassThreshold(threshold, precise, found, boxes, reached, problem)


def _crosswise(matched: Matches) -> npt.NDArray[np.float32]:
    """The probability of each detection by a fit to the images of the other half: even and odd ones."""
    probabilities = np.zeros(len(matched.scores), np.float32)
    for half in (matched.images % 2 == 0, matched.images % 2 == 1):
        fit = Calibration(*fit_scores(matched.scores[~half], matched.hits[~half]))
        probabilities[half] = fit.probabilities(matched.scores[half])
    return probabilities


def finds(
    annotations: Annotations, i: int, found: Detections, *, of_any_class: bool = False
) -> npt.NDArray[np.int64]:
    """What an image's detections find: best first, each the free box that it overlaps most, by 0.5 or more.

    Args:
        annotations: the ground truth.
        i: the index of the image.
        found: its K detections, best first.
        of_any_class: whether a detection also finds boxes of other classes.

    Returns:
        ``[K]``: the number of the box among all of the annotations; -1 for none, `CROWD` for a crowd.
    """
    from pycocotools import mask  # noqa: PLC0415

    part, numbers = annotations.of_image(i), np.full(len(found), -1)
    crowd, labels = annotations.crowd[part], annotations.labels[part] - 1
    if not len(labels) or not len(found):
        return numbers
    corners = (found.boxes.astype(np.float64), annotations.boxes[part].astype(np.float64))
    boxes, truth = (np.hstack([each[:, :2], each[:, 2:] - each[:, :2]]) for each in corners)
    overlaps = mask.iou(boxes, truth, crowd)  # of crowd boxes, the part of the detection that they cover
    if not of_any_class:
        overlaps = np.where(found.class_ids[:, None] == labels, overlaps, 0)
    free = ~crowd
    for k in np.flatnonzero(overlaps.max(1) >= FOUND_AT):
        best = int(np.where(free, overlaps[k], -1).argmax())
        if free[best] and overlaps[k, best] >= FOUND_AT:
            free[best], numbers[k] = False, part.start + best
        elif (overlaps[k, crowd] >= FOUND_AT).any():
            numbers[k] = CROWD
    return numbers


def coco_results(annotations: Annotations, found: Mapping[int, Detections]) -> list[dict[str, Any]]:
    """Detections as a COCO results file has them, with the dataset's own image and category ids."""
    return [
        entry
        for i, each in found.items()
        for entry in replace(each, category_ids=annotations.category_ids).to_coco(annotations.image_ids[i])
    ]
