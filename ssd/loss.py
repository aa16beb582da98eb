"""The SSD loss: smooth L1 on boxes, cross-entropy on classes with hard-negative mining."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd.boxes import encode

NEGATIVES_PER_POSITIVE = 3  # SSD paper, section 2.2; NVIDIA's Loss


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
    """

    default_boxes: Tensor

    def __init__(self, default_boxes: Tensor) -> None:
        super().__init__()
        self.register_buffer("default_boxes", default_boxes, persistent=False)

    def forward(self, loc: Tensor, conf: Tensor, boxes: Tensor, labels: Tensor) -> Losses:
        """Loss terms of each image of a batch.

        Args:
            loc: raw offsets ``[N, 4, P]``, any float dtype.
            conf: raw logits ``[N, C, P]``, background first, any float dtype.
            boxes: matched boxes, float32 cxcywh, normalised, ``[N, P, 4]``; see `ssd.boxes.match`.
            labels: their classes, int64 ``[N, P]``; 0 is background.
        """
        loc, conf = loc.float(), conf.float()
        positive = labels > 0
        positives = positive.sum(1)
        zero = loc.new_zeros(())

        cross_entropy = F.cross_entropy(conf, labels, reduction="none")  # [N, P]
        hardest = cross_entropy.where(~positive, zero).sort(dim=1, descending=True).values
        rank = torch.arange(labels.shape[1], device=labels.device)
        mined = hardest.where(rank < NEGATIVES_PER_POSITIVE * positives[:, None], zero)
        conf_loss = cross_entropy.where(positive, zero).sum(1) + mined.sum(1)

        distance = F.smooth_l1_loss(
            loc.transpose(1, 2), encode(boxes, self.default_boxes), reduction="none"
        ).sum(2)
        loc_loss = distance.where(positive, zero).sum(1)

        count = positives.clamp(min=1)
        return Losses(loc_loss / count, conf_loss / count)


LOSSES: dict[str, Callable[[Tensor], nn.Module]] = {"multibox": MultiBoxLoss}
"""Losses by name: each is made of the default boxes, and called as `MultiBoxLoss`."""
