"""The SSD loss: smooth L1 on boxes, cross-entropy on classes with hard-negative mining."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd.boxes import encode

NEGATIVES_PER_POSITIVE = 3  # SSD paper, section 2.2; NVIDIA's Loss

LEAST_NEGATIVES = 8
"""Negatives that `BatchMultiBoxLoss` takes of each image at least."""


class Losses(NamedTuple):
    """The two terms of each image, float32 ``[N]``; the loss of a batch is the mean of their sum."""

    loc: Tensor
    conf: Tensor


class MultiBoxLoss(nn.Module):
    """What NVIDIA's SSD300 is trained with, in float32 whatever the model's precision.

    Of an image: smooth L1 summed over the offsets of its positives, plus cross-entropy summed over positives
    and the three times as many negatives with the highest, divided by the number of positives. An image
    without positives contributes 0.

    Nothing waits for the device, and no shape depends on values.

    Args:
        default_boxes: float32 cxcywh, normalised, ``[P, 4]``.
        class_weights: of the cross-entropy of each class's positives, float32 ``[C]``, with 1 for the
            background; None for 1 everywhere.
    """

    default_boxes: Tensor
    class_weights: Tensor | None

    def __init__(self, default_boxes: Tensor, class_weights: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("default_boxes", default_boxes, persistent=False)
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, loc: Tensor, conf: Tensor, boxes: Tensor, labels: Tensor) -> Losses:
        """Loss terms of each image of a batch.

        Args:
            loc: raw offsets ``[N, 4, P]``, any float dtype.
            conf: raw logits ``[N, C, P]``, background first, any float dtype.
            boxes: matched boxes, float32 cxcywh, normalised, ``[N, P, 4]``; see `ssd.boxes.match`.
            labels: their classes, int64 ``[N, P]``; 0 is background.
        """
        positive = labels > 0
        positives = positive.sum(1)
        zero = loc.new_zeros((), dtype=torch.float32)
        distance, cross_entropy = _errors(loc, conf, boxes, labels, self.default_boxes, self.class_weights)
        hardest = cross_entropy.where(~positive, zero).sort(dim=1, descending=True).values
        rank = torch.arange(labels.shape[1], device=labels.device)
        mined = hardest.where(rank < NEGATIVES_PER_POSITIVE * positives[:, None], zero)
        loc_loss = distance.where(positive, zero).sum(1)
        conf_loss = cross_entropy.where(positive, zero).sum(1) + mined.sum(1)
        count = positives.clamp(min=1)
        return Losses(loc_loss / count, conf_loss / count)


class BatchMultiBoxLoss(MultiBoxLoss):
    """`MultiBoxLoss` with negatives of the whole batch, so that images without objects teach, too.

    Three times as many negatives as the batch has positives are taken from all of its images together: those
    with the highest cross-entropy, wherever they are. Of each image, the hardest `LEAST_NEGATIVES` are among
    them in any case. All is divided by the positives of the mean image; at least by as many as go with
    `LEAST_NEGATIVES`, for batches with few. It is made of the same as `MultiBoxLoss`.
    """

    def forward(self, loc: Tensor, conf: Tensor, boxes: Tensor, labels: Tensor) -> Losses:
        """Loss terms of each image of a batch; arguments as of `MultiBoxLoss`."""
        positive = labels > 0
        positives = positive.sum()
        zero = loc.new_zeros((), dtype=torch.float32)
        distance, cross_entropy = _errors(loc, conf, boxes, labels, self.default_boxes, self.class_weights)
        hardness = cross_entropy.detach().where(~positive, -1)
        mined = _mined(hardness, NEGATIVES_PER_POSITIVE * positives) & ~positive
        count = (positives / len(labels)).clamp(min=LEAST_NEGATIVES / NEGATIVES_PER_POSITIVE)
        loc_loss = distance.where(positive, zero).sum(1)
        conf_loss = cross_entropy.where(positive | mined, zero).sum(1)
        return Losses(loc_loss / count, conf_loss / count)


def _mined(hardness: Tensor, count: Tensor) -> Tensor:
    """Which are the `count` hardest of all, or among the `LEAST_NEGATIVES` hardest of their row."""
    order = hardness.flatten().sort(descending=True).indices
    rank = torch.arange(len(order), device=order.device)
    mined = torch.empty_like(order, dtype=torch.bool).scatter_(0, order, rank < count).view_as(hardness)
    least = min(LEAST_NEGATIVES, hardness.shape[1])
    return mined.scatter_(1, hardness.topk(least, dim=1).indices, value=True)


def _errors(
    loc: Tensor,
    conf: Tensor,
    boxes: Tensor,
    labels: Tensor,
    default_boxes: Tensor,
    class_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Of each default box, in float32 ``[N, P]``: smooth L1 summed over its offsets, and cross-entropy."""
    distance = F.smooth_l1_loss(loc.float().transpose(1, 2), encode(boxes, default_boxes), reduction="none")
    return distance.sum(2), F.cross_entropy(conf.float(), labels, class_weights, reduction="none")


LOSSES: dict[str, Callable[..., nn.Module]] = {"batch": BatchMultiBoxLoss, "multibox": MultiBoxLoss}
"""Losses by name: each is made and called as `MultiBoxLoss`; with `class_weights` where those are chosen."""
