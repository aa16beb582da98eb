"""From raw network outputs to detections: scores, threshold, per-class NMS, best first.

Everything runs over the whole batch at once, in float32, on the device of the outputs.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ssd.boxes import decode
from ssd.errors import NonFiniteError

# As published for validation.
SCORE_THRESHOLD = 0.05
IOU_THRESHOLD = 0.5
MOST_KEPT = 200
MOST_PER_CLASS = 200

VOTING_IOU = 0.65
"""Least IoU of a candidate with a box that it helps to place."""

MAX_DETECTIONS = 10_000_000
"""Most detections of an image that can be asked for: far above any layout, whose own bound backends have."""

# How many candidates of an image are compared with each other at a time, best first. Most images are
# done after one block; the cost of a block grows with its square.
_BLOCK = 256


class PaddedDetections(NamedTuple):
    """Detections of a batch: image ``n`` has ``counts[n]`` of them, best first; the rest is zeros."""

    boxes: Tensor
    """float32 xyxy, normalised, ``[N, D, 4]``; may reach outside [0, 1]."""
    scores: Tensor
    """float32 ``[N, D]``, descending."""
    class_ids: Tensor
    """int64 ``[N, D]``, counted from 0: the background has no number."""
    counts: Tensor
    """int64 ``[N]``."""

    def cpu(self) -> "PaddedDetections":
        """The same on the CPU: four transfers for the batch, each of which waits for the device."""
        return PaddedDetections(*(values.cpu() for values in self))

    def per_image(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """``(boxes [K, 4], scores [K], class_ids [K])`` of each image; K may be 0."""
        return [
            (boxes[:count], scores[:count], class_ids[:count])
            for boxes, scores, class_ids, count in zip(
                self.boxes, self.scores, self.class_ids, self.counts.tolist(), strict=True
            )
        ]


def postprocess(
    loc: Tensor,
    conf: Tensor,
    default_boxes: Tensor,
    *,
    score_threshold: float | Sequence[float] = SCORE_THRESHOLD,
    iou_threshold: float = IOU_THRESHOLD,
    max_detections: int = MOST_KEPT,
    max_per_class: int = MOST_PER_CLASS,
    classes: Sequence[int] | None = None,
    voting: bool = False,
) -> PaddedDetections:
    """Turn raw outputs into detections, as published: softmax, threshold, greedy NMS in each class, top n.

    A class keeps its `max_per_class` best candidates; of these a box stays while its IoU with every better
    one that stayed is below `iou_threshold`. Equal scores are ordered by class, then by default box.

    Args:
        loc: offsets ``[N, 4, B]``, any float dtype. Neither input is changed.
        conf: logits ``[N, C, B]``, background first, any float dtype.
        default_boxes: float32 cxcywh, normalised, ``[B, 4]``, on the same device.
        score_threshold: a candidate's probability must exceed this; in [0, 1]; or one for each class but the
            background.
        iou_threshold: in [0, 1].
        max_detections: most detections of an image, over all classes.
        max_per_class: most candidates of a class that take part in NMS.
        classes: 0-based class ids to look for, not negative; None for all.
        voting: place each box that stays at the mean, weighted by score, of those candidates that take part
            in NMS, are of its class and have an IoU of at least `VOTING_IOU` with it (Gidaris and Komodakis,
            arXiv 1505.01749, "Iterative localization"; their IoU is 0.5). Scores stay as they are.

    Returns:
        Detections padded to ``D = max_detections``.

    Raises:
        NonFiniteError: loc or conf holds NaN or infinity; it names the images of the batch.
        ValueError: shapes do not fit; or `max_detections` is not from 1 to `MAX_DETECTIONS`.
    """
    if loc.ndim != 3 or conf.ndim != 3 or loc.shape != (len(conf), 4, len(default_boxes)):
        raise ValueError(
            f"expected loc [N, 4, {len(default_boxes)}] and conf [N, C, {len(default_boxes)}]; "
            f"got {list(loc.shape)} and {list(conf.shape)}"
        )
    if not 1 <= max_detections <= MAX_DETECTIONS:
        raise ValueError(f"max_detections must be from 1 to {MAX_DETECTIONS:,}; got {max_detections:,}")
    loc, conf = loc.detach(), conf.detach()
    _require_finite(loc, conf)

    image, class_id, box, score = _candidates(conf, score_threshold, classes)
    column, counts = _column_in_row(image, len(conf))

    def padded(values: Tensor, fill: float) -> Tensor:
        return _pad(values, image, column, counts, fill)

    # Candidates come ordered by class, then default box; a stable sort keeps that among equal scores.
    scores, order = padded(score, -1).sort(dim=1, descending=True, stable=True)
    box, class_id = padded(box, 0).gather(1, order), padded(class_id, -1).gather(1, order)
    return _greedy_nms(
        loc,
        default_boxes,
        box,
        scores,
        class_id,
        counts,
        iou_threshold,
        max_detections,
        max_per_class,
        voting,
    )


def _require_finite(loc: Tensor, conf: Tensor) -> None:
    # One cheap pass: NaN and infinity survive a sum. It can overflow by itself, so ask again before raising.
    if bool((loc.sum(dtype=torch.float32) + conf.sum(dtype=torch.float32)).isfinite()):
        return
    fine = loc.isfinite().flatten(1).all(1) & conf.isfinite().flatten(1).all(1)
    images = (~fine).nonzero().flatten().cpu().tolist()
    if images:
        raise NonFiniteError(
            f"the network's outputs hold NaN or infinity for image {images} of the batch ({conf.dtype}); "
            "check the weights and the input, or use fp32 or bf16 if this is fp16",
            images,
        )


def _candidates(
    conf: Tensor, score_threshold: float | Sequence[float], classes: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image, class, default box and score of all that pass the threshold, sorted in this order."""
    # p_c > t implies exp(l_c) > t / (1 - t) * exp(l_background), so most boxes, which are background, are
    # left out before any exponential. The slack covers rounding; the softmax below decides.
    of_classes = tuple(score_threshold) if isinstance(score_threshold, Sequence) else ()
    lowest = float(min(of_classes) if isinstance(score_threshold, Sequence) else score_threshold)
    odds = lowest / (1 - lowest) if lowest < 1 else math.inf
    margin = math.log(odds) - 1e-3 if odds > 0 else -math.inf
    likely = conf[:, 1:].amax(1).float() - conf[:, 0].float() > margin
    image, box = likely.nonzero(as_tuple=True)
    column, counts = _column_in_row(image, len(conf))
    # Rows of equal length, although some boxes come twice: gather along memory is five times as fast as
    # picking the columns one by one. And of whole vectors: on CPUs softmax treats the rest of a row by other
    # code, which may round otherwise, and equal logits would not tie.
    boxes = _pad(box, image, column, counts, 0, multiple=16)
    scores = conf.gather(2, boxes[:, None].expand(-1, conf.shape[1], -1)).float().softmax(1)[:, 1:]
    if classes is not None:
        wanted = torch.zeros(scores.shape[1], dtype=torch.bool, device="cpu")
        wanted[list(classes)] = True
        scores = scores.where(wanted.to(scores.device)[:, None], 0)
    limits = scores.new_tensor(of_classes)[:, None] if of_classes else lowest
    image, class_id, column = (scores > limits).nonzero(as_tuple=True)
    real = column < counts[image]
    image, class_id, column = image[real], class_id[real], column[real]
    return image, class_id, boxes[image, column], scores[image, class_id, column]


def _column_in_row(image: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Where each entry stands among those of its image, and how many those are; `image` ascends."""
    counts = image.bincount(minlength=images)
    return torch.arange(len(image), device=image.device) - (counts.cumsum(0) - counts)[image], counts


def _pad(
    values: Tensor, image: Tensor, column: Tensor, counts: Tensor, fill: float, *, multiple: int = 1
) -> Tensor:
    """Values of all images in rows ``[N, K]``, one image each; K is above 0 and a multiple of `multiple`."""
    width = max(int(counts.max()), 1) if len(counts) else 1
    width = math.ceil(width / multiple) * multiple
    rows = values.new_full((len(counts), width), fill)
    rows[image, column] = values
    return rows


def _greedy_nms(
    loc: Tensor,
    default_boxes: Tensor,
    box: Tensor,
    scores: Tensor,
    class_ids: Tensor,
    counts: Tensor,
    iou_threshold: float,
    max_detections: int,
    max_per_class: int,
    voting: bool,
) -> PaddedDetections:
    """Greedy NMS over candidates ``[N, K]`` in descending order of score, a block of them at a time.

    A box depends only on better boxes of its class, so an image is done as soon as it has `max_detections`;
    but all candidates vote.
    """
    images, width = box.shape
    kept = PaddedDetections(
        default_boxes.new_zeros(images, max_detections, 4),
        scores.new_zeros(images, max_detections),
        class_ids.new_full((images, max_detections), -1),
        torch.zeros_like(counts),
    )
    most_id = int(class_ids.max()) if images else -1
    seen = class_ids.new_zeros(images, max(most_id, 0) + 1)  # candidates of each class
    votes: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, width, _BLOCK):
        full = bool(((kept.counts >= max_detections) | (counts <= start)).all())
        if full and not voting:
            break
        block = slice(start, start + _BLOCK)
        class_id = class_ids[:, block]
        index = box[:, block]
        boxes = decode(loc.gather(2, index[:, None].expand(-1, 4, -1)).transpose(1, 2), default_boxes[index])
        better = (class_id[:, :, None] == class_id[:, None, :]).tril(-1)  # [N, i, j]: j may suppress i
        rank = seen.gather(1, class_id.clamp(min=0)) + better.sum(2)
        alive = (class_id >= 0) & (rank < max_per_class)
        seen.scatter_add_(1, class_id.clamp(min=0), (class_id >= 0).long())
        if voting:
            votes.append((boxes, scores[:, block] * alive, class_id))
        if full:
            continue
        if start:
            most = int(kept.counts.max())
            rivals = class_id[:, :, None] == kept.class_ids[:, None, :most]
            alive &= ~(rivals & overlap(boxes, kept.boxes[:, :most], iou_threshold)).any(2)
        better &= overlap(boxes, boxes, iou_threshold)
        keep = survivors(better, alive)

        slot = kept.counts[:, None] + keep.cumsum(1) - 1
        row, column = (keep & (slot < max_detections)).nonzero(as_tuple=True)
        target = row, slot[row, column]
        kept.boxes[target] = boxes[row, column]
        kept.scores[target] = scores[:, block][row, column]
        kept.class_ids[target] = class_id[row, column]
        kept.counts.add_(keep.sum(1)).clamp_(max=max_detections)
    if votes:
        _vote(kept, votes)
    return kept._replace(class_ids=kept.class_ids.clamp(min=0))


def _vote(kept: PaddedDetections, votes: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Move boxes, in place, by candidates: of each block their boxes ``[N, K, 4]``, weights and class ids."""
    boxes = kept.boxes[:, : max(kept.counts.tolist(), default=0)]
    # In float64, as programs may have products of float32 computed in TF32 or bf16.
    sums = boxes.new_zeros(*boxes.shape[:2], 5, dtype=torch.float64)
    for candidates, weights, class_ids in votes:
        near = kept.class_ids[:, : boxes.shape[1], None] == class_ids[:, None, :]
        near &= overlap(boxes, candidates, VOTING_IOU)
        sums += (weights[:, None] * near).double() @ functional.pad(candidates, (0, 1), value=1).double()
    # Without area it has no IoU, and stays where it is.
    moved = (boxes[..., 2:] - boxes[..., :2]).prod(-1, keepdim=True) > 0
    boxes.copy_(torch.where(moved, sums[..., :4] / sums[..., 4:], boxes.double()))


def survivors(better: Tensor, alive: Tensor) -> Tensor:
    """What greedy NMS keeps: alive, and suppressed by nothing that is kept itself.

    Repeating the rule settles the boxes in order of score, so the result is the greedy one exactly; it takes
    as many rounds as the longest chain of suppressions, not as many as there are boxes.
    """
    keep = alive
    while True:
        update = alive & ~(better & keep[:, None, :]).any(2)
        if torch.equal(update, keep):
            return keep
        keep = update


def overlap(a: Tensor, b: Tensor, iou_threshold: float) -> Tensor:
    """Whether boxes ``[N, I, 4]`` and ``[N, J, 4]`` overlap too much: bool ``[N, I, J]``.

    Not ``iou >= threshold``: boxes without area have no IoU (NaN) and count as overlapping, as published.
    """
    ax, ay, ar, ab = a[:, :, None].unbind(-1)
    bx, by, br, bb = b[:, None].unbind(-1)
    shared = (ar.minimum(br) - ax.maximum(bx)).clamp_(min=0)
    shared *= (ab.minimum(bb) - ay.maximum(by)).clamp_(min=0)
    area = (ar - ax) * (ab - ay) + (br - bx) * (bb - by)
    return ~(shared / (area - shared) < iou_threshold)
