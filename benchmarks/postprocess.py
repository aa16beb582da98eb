"""Decoding and NMS against the published algorithm and torchvision's SSD, in one run.

python benchmarks/postprocess.py [--batch 8] [--rounds 15] [--published-rounds 7]

The logits are those of the reference figures: sparse, typical and dense. "published" is a plain
reimplementation of the published algorithm: a loop over images, one over classes, one over boxes.
"""

import argparse
from types import SimpleNamespace

import numpy as np
import torch
from timing import heading, medians, show
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_convert

from ssd.boxes import PUBLISHED_LAYOUT, decode
from ssd.postprocess import postprocess

REGIMES = {"sparse": (9, 2), "typical": (6, 1), "dense": (4, 2)}
IOU_THRESHOLD = 0.45
MAX_DETECTIONS = 200


def outputs(regime: str, batch: int) -> tuple[Tensor, Tensor]:
    background, scale = REGIMES[regime]
    random = np.random.RandomState(3001)
    boxes = PUBLISHED_LAYOUT.num_default_boxes
    loc = (0.5 * random.standard_normal((batch, 4, boxes))).astype(np.float32)
    conf = (scale * random.standard_normal((batch, 81, boxes))).astype(np.float32)
    conf[:, 0] += background
    return torch.from_numpy(loc), torch.from_numpy(conf)


def published(loc: Tensor, conf: Tensor, defaults: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The published algorithm, spelled out."""
    boxes = decode(loc.transpose(1, 2), defaults)
    scores = conf.transpose(1, 2).softmax(-1)
    return [published_single(*each) for each in zip(boxes, scores, strict=True)]


def published_iou(many: Tensor, one: Tensor) -> Tensor:
    """IoU in the published steps: expanded pairs, and sides below zero set by a mask."""
    a = many[:, None].expand(-1, len(one), -1)
    b = one[None].expand(len(many), -1, -1)
    sides = torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2])
    sides[sides < 0] = 0
    shared = sides[..., 0] * sides[..., 1]
    a_sides, b_sides = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    return shared / (a_sides[..., 0] * a_sides[..., 1] + b_sides[..., 0] * b_sides[..., 1] - shared)


def published_single(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found_boxes, found_scores, found_labels = [], [], []
    for label in range(1, scores.shape[1]):
        passing = scores[:, label] > 0.05
        class_boxes, class_scores = boxes[passing], scores[passing, label]
        order = class_scores.sort().indices[-200:]
        kept = []
        while len(order):
            best = order[-1].item()
            overlap = published_iou(class_boxes[order], class_boxes[best][None]).squeeze()
            order = order[overlap < IOU_THRESHOLD]
            kept.append(best)
        found_boxes.append(class_boxes[kept])
        found_scores.append(class_scores[kept])
        found_labels += [label] * len(kept)
    all_scores = torch.cat(found_scores)
    best = all_scores.sort().indices[-MAX_DETECTIONS:]
    return torch.cat(found_boxes)[best], torch.tensor(found_labels)[best], all_scores[best]


def torchvisions(loc: Tensor, conf: Tensor, defaults: Tensor) -> list[dict[str, Tensor]]:
    """torchvision's own method, given the same thresholds and the layout that it expects."""
    settings = SimpleNamespace(
        box_coder=BoxCoder(weights=(10.0, 10.0, 5.0, 5.0)),
        score_thresh=0.05,
        topk_candidates=200,
        nms_thresh=IOU_THRESHOLD,
        detections_per_img=MAX_DETECTIONS,
    )
    corners = box_convert(defaults, "cxcywh", "xyxy")
    heads = {"bbox_regression": loc.transpose(1, 2), "cls_logits": conf.transpose(1, 2)}
    anchors = [corners] * len(loc)
    return SSD.postprocess_detections(settings, heads, anchors, [(1, 1)] * len(loc))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--published-rounds", type=int, default=7)
    options = parser.parse_args()
    defaults = PUBLISHED_LAYOUT.default_boxes()
    print(heading())
    for regime in REGIMES:
        loc, conf = outputs(regime, options.batch)

        def ours(loc: Tensor = loc, conf: Tensor = conf) -> object:
            return postprocess(
                loc, conf, defaults, iou_threshold=IOU_THRESHOLD, max_detections=MAX_DETECTIONS
            )

        def theirs(loc: Tensor = loc, conf: Tensor = conf) -> object:
            return published(loc, conf, defaults)

        def vision(loc: Tensor = loc, conf: Tensor = conf) -> object:
            return torchvisions(loc, conf, defaults)

        for (_, scores, _), (_, _, expected) in zip(ours().per_image(), theirs(), strict=True):
            torch.testing.assert_close(scores, expected.flip(0), atol=1e-5, rtol=0)
        times = medians(
            {"ssd.postprocess": ours, "torchvision SSD.postprocess_detections": vision}, options.rounds
        )
        slow = medians({"ssd.postprocess": ours, "published": theirs}, options.published_rounds)
        # The slow one has its own rounds, in turn with ours; its ratio to ours is carried over.
        times["published"] = slow["published"] / slow["ssd.postprocess"] * times["ssd.postprocess"]
        show(f"{regime}, batch {options.batch}, ms an image", times, "ssd.postprocess", options.batch)


if __name__ == "__main__":
    main()
