"""What becomes of overlapping boxes: NMS, Soft-NMS, voting and flips on the same detector, by their AP.

python benchmarks/suppression.py [DATASET --weights FILE] [--images 200]

By default on drawn scenes, with the shapes weights; scores above 0.05, IoU 0.5, 200 detections. Soft-NMS
(Bodla et al. 2017, https://arxiv.org/abs/1704.04503) keeps boxes that overlap a better one and lowers their
scores, along a line or a Gaussian. It is not in the package, as voting gains more.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from timing import heading
from torchvision.ops import box_iou

from ssd.data import Annotations, load
from ssd.detections import Detections
from ssd.detector import Detector
from ssd.distributed import alone
from ssd.evaluate import detect_all, measure
from ssd.postprocess import IOU_THRESHOLD, MOST_KEPT, SCORE_THRESHOLD
from ssd.shapes import write_dataset

Floats = npt.NDArray[np.float32]


def gaussian(overlaps: Floats) -> Floats:
    return np.exp(-(overlaps**2) / 0.5)  # the paper's sigma


def line(overlaps: Floats) -> Floats:
    return np.where(overlaps >= 0.3, 1 - overlaps, 1)  # the paper's threshold


def hard(overlaps: Floats) -> Floats:
    return np.where(overlaps > IOU_THRESHOLD, 0, 1)


def lowered(boxes: Floats, scores: Floats, factor: object) -> Floats:
    """The scores after each box, best first, lowered those of the others by a factor of their overlaps."""
    overlaps = box_iou(torch.from_numpy(boxes), torch.from_numpy(boxes)).numpy()
    scores, waiting = scores.copy(), np.ones(len(scores), bool)
    while waiting.any():
        best = int(np.where(waiting, scores, -1).argmax())
        waiting[best] = False
        scores[waiting] *= factor(overlaps[best, waiting])
    return scores


def suppressed(found: Detections, factor: object) -> Detections:
    """Candidates of an image, each class by itself, after Soft-NMS or, by the factor `hard`, NMS."""
    scores = found.scores.copy()
    for class_id in np.unique(found.class_ids):
        of = found.class_ids == class_id
        scores[of] = lowered(found.boxes[of], scores[of], factor)
    best = np.argsort(-scores, kind="stable")[:MOST_KEPT]
    best = best[scores[best] > SCORE_THRESHOLD]
    return Detections(
        boxes=found.boxes[best],
        scores=scores[best],
        class_ids=found.class_ids[best],
        class_names=found.class_names,
        image_size=found.image_size,
    )


def compare(detector: Detector, data: Annotations) -> None:
    indices = range(len(data))
    every = {"score_threshold": SCORE_THRESHOLD, "iou_threshold": 1.0, "max_detections": 10_000}
    candidates = {i: detector(data.path(i), **every) for i in indices}
    by_us = partial(detect_all, detector, data, alone(detector.device))
    rows = {
        "NMS": by_us()[1],
        "NMS, one box after another, as a check": {i: suppressed(candidates[i], hard) for i in indices},
        "Soft-NMS, Gaussian": {i: suppressed(candidates[i], gaussian) for i in indices},
        "Soft-NMS, line": {i: suppressed(candidates[i], line) for i in indices},
        "voting": by_us(voting=True)[1],
        "flips": by_us(flips=True)[1],
        "voting and flips": by_us(voting=True, flips=True)[1],
    }
    for name, found in rows.items():
        metrics = measure(data, found).metrics
        print(f"{name:40}" + "  ".join(f"{key} {metrics[key]:.4f}" for key in ("AP", "AP50", "AP75")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", nargs="?", help="a folder of any format that ssd evaluate takes")
    parser.add_argument("--weights", default="shapes")
    parser.add_argument("--images", type=int, default=200)
    options = parser.parse_args()
    detector = Detector.load(options.weights)
    print(f"{heading()}\n{detector!r}")
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            write_dataset(folder, 1, options.images, seed=2026)
        data = load(Path(options.data or folder), "val", class_names=detector.class_names)
        compare(detector, data.select(range(min(options.images, len(data)))))


if __name__ == "__main__":
    main()
