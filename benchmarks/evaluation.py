"""COCO evaluation of made-up detections: pycocotools against what `ssd.evaluate` uses, in one run.

python benchmarks/evaluation.py [--images 5000] [--detections 100] [--rounds 3]

80 classes, 7 boxes an image as in COCO val2017, 100 detections an image: jittered boxes and noise. Times are
of `evaluate.measure`, from detections to the twelve numbers. With 3 rounds the run takes about ten minutes.
"""

import argparse
from pathlib import Path
from unittest import mock

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from timing import heading, medians, show

from ssd import evaluate
from ssd.data import Annotations
from ssd.detections import Detections
from ssd.labels import COCO_NAMES

SIZE = (480, 640)
BOXES = 7


def made_up(images: int, detections: int) -> tuple[Annotations, dict[int, Detections]]:
    rng = np.random.default_rng(0)
    truth = random_boxes(rng, images * BOXES)
    labels = rng.integers(1, 81, images * BOXES)
    annotations = Annotations(
        root=Path(),
        source=Path("made-up"),
        class_names=COCO_NAMES,
        category_ids=tuple(range(1, 81)),
        file_names=np.array([f"{i}.jpg" for i in range(images)]),
        image_ids=tuple(range(images)),
        sizes=np.full((images, 2), SIZE),
        starts=np.arange(images + 1) * BOXES,
        boxes=truth,
        labels=labels,
        crowd=rng.random(images * BOXES) < 0.01,
        areas=(truth[:, 2:] - truth[:, :2]).prod(1),
        usable=np.ones(images * BOXES, np.bool_),
        problems=(),
    )
    found = {}
    for i in range(images):
        near = truth[i * BOXES : (i + 1) * BOXES]
        near = near + rng.normal(0, 6, (4, *near.shape)).clip(-20, 20)
        near = near.reshape(-1, 4)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        boxes = np.concatenate([near, random_boxes(rng, detections - len(near))])
        guesses = np.tile(labels[i * BOXES : (i + 1) * BOXES] - 1, 4)
        classes = np.concatenate([guesses, rng.integers(0, 80, detections - len(near))])
        scores = np.sort(rng.random(detections).astype(np.float32))[::-1]
        found[i] = Detections(
            boxes=boxes.astype(np.float32),
            scores=scores.copy(),
            class_ids=classes.astype(np.int64),
            class_names=COCO_NAMES,
            image_size=SIZE,
        )
    return annotations, found


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    sides = np.exp(rng.uniform(np.log(10), np.log(300), (count, 2)))
    corner = rng.random((count, 2)) * (np.array([640, 480]) - sides)
    return np.concatenate([corner, corner + sides], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(heading())
    annotations, found = made_up(options.images, options.detections)

    def ours() -> object:
        return evaluate.measure(annotations, found)

    def reference() -> object:
        with mock.patch.object(evaluate, "_coco_package", return_value=(COCO, COCOeval)):
            return evaluate.measure(annotations, found)

    a, b = ours(), reference()
    assert all(abs(a.metrics[name] - b.metrics[name]) < 1e-12 for name in a.metrics), (a.metrics, b.metrics)
    print(f"the same numbers: AP {a.metrics['AP']:.4f}")
    times = medians({"ssd.evaluate": ours, "pycocotools": reference}, options.rounds)
    show(f"{options.images} images, {options.detections} detections each", times, "ssd.evaluate")


if __name__ == "__main__":
    main()
