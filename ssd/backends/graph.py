"""What is exported: a network from its input to its outputs, in operations that each kind of file knows."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssd.backends.base import NMS, Metadata
from ssd.boxes import decode
from ssd.choices import Precision
from ssd.devices import DTYPES
from ssd.fused import fuse
from ssd.model import SSD
from ssd.postprocess import MOST_PER_CLASS, overlap
from ssd.transforms import MEAN, STD


class Graph(nn.Module):
    """The network of a model in eval mode, with the input and the outputs that the metadata say.

    Args:
        model: to be exported.
        metadata: what goes in and comes out.
        suppress: what `greedy` computes.
    """

    mean: Tensor
    std: Tensor
    default_boxes: Tensor

    def __init__(
        self,
        model: SSD,
        metadata: Metadata,
        suppress: Callable[[Tensor, Tensor, float], Tensor],
    ) -> None:
        super().__init__()
        # int8 is made of the finished graph, in float32.
        self.dtype = DTYPES[cast(Precision, "fp32" if metadata.precision == "int8" else metadata.precision)]
        # torch.export does not keep channels-last weights as they are.
        self.network = fuse(model, self.dtype, pack=False).to(memory_format=torch.contiguous_format)
        self.layout = metadata.layout
        self.uint8, self.nms, self.suppress = metadata.uint8, metadata.nms, suppress
        self.register_buffer("mean", torch.tensor(MEAN).mul(255))
        self.register_buffer("std", torch.tensor(STD).mul(255))
        self.register_buffer("default_boxes", metadata.layout.default_boxes())
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Outputs of a batch, as `ssd.export.export` tells them.

        Args:
            images: uint8 ``[N, size, size, 3]``, or normalised float32 ``[N, 3, size, size]``.

        Returns:
            loc and conf, or with NMS the fields of `PaddedDetections`.
        """
        if self.uint8:
            images = ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)
        levels = self.network.levels(images.to(self.dtype))
        # The fused network's heads order channels by box of a cell; the layout orders default boxes so, too.
        merged = torch.cat(
            [
                level.unflatten(1, (boxes, -1)).transpose(1, 2).flatten(2)
                for level, boxes in zip(levels, self.layout.boxes_per_cell, strict=True)
            ],
            2,
        ).float()
        loc, conf = merged[:, :4], merged[:, 4:]
        return (loc, conf) if self.nms is None else self._detections(loc, conf, self.nms)

    def _detections(self, loc: Tensor, conf: Tensor, nms: NMS) -> tuple[Tensor, ...]:
        """What `ssd.postprocess` gives, in as many steps for any image; equal scores in any order."""
        candidates = min(MOST_PER_CLASS, self.layout.num_default_boxes)
        scores = conf.softmax(1)[:, 1:]
        scores = torch.where(scores > nms.score_threshold, scores, 0.0)
        scores, box = scores.topk(candidates, 2)  # [N, classes, candidates]
        boxes = decode(loc.transpose(1, 2), self.default_boxes)
        boxes = boxes.gather(1, box.flatten(1)[..., None].expand(-1, -1, 4))
        kept = self.suppress(
            boxes.unflatten(1, (-1, candidates)).flatten(0, 1), scores.flatten(0, 1), nms.iou_threshold
        )
        classes = scores.shape[1]
        best, index = kept.unflatten(0, (-1, classes)).flatten(1).topk(nms.max_detections, 1)
        real = best > 0
        # NaN and infinity in the outputs must not read as "nothing there": they make the scores NaN.
        poison = (loc.sum((1, 2)) + conf.sum((1, 2)))[:, None] * 0.0
        return (
            boxes.gather(1, index[..., None].expand(-1, -1, 4)) * real[..., None],
            best + poison,
            torch.div(index, candidates, rounding_mode="floor") * real,
            real.sum(1),
        )


def greedy(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Scores with 0 where greedy NMS drops the box.

    Args:
        boxes: xyxy ``[G, K, 4]``, in descending order of score in each of G groups.
        scores: ``[G, K]``; 0 marks what is no candidate.
        iou_threshold: in [0, 1].
    """
    keep = scores > 0
    worse = overlap(boxes, boxes, iou_threshold).triu(1)  # [G, i, j]: i may suppress j
    for i in range(scores.shape[1] - 1):
        keep = keep & ~(worse[:, i] & keep[:, i : i + 1])
    return torch.where(keep, scores, 0.0)


@torch.library.custom_op("ssd::suppress", mutates_args=())
def suppress(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """`greedy` as one operation of torch, which becomes ONNX's NonMaxSuppression."""
    return greedy(boxes, scores, iou_threshold)


@suppress.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return torch.empty_like(scores)


def example_input(metadata: Metadata) -> Tensor:
    """Zeros of the shape and type that the graph takes."""
    count = metadata.batch or 2  # torch.export takes a size of 1 for a constant
    size = metadata.layout.size
    if metadata.uint8:
        return torch.zeros(count, size, size, 3, dtype=torch.uint8)
    return torch.zeros(count, 3, size, size)


def output_names(metadata: Metadata) -> list[str]:
    """Of what the graph gives, in order."""
    return ["loc", "conf"] if metadata.nms is None else ["boxes", "scores", "class_ids", "counts"]


def dynamic_shapes(metadata: Metadata) -> Any:
    """Which of the input's sizes torch.export should leave open."""
    return {"images": {0: torch.export.Dim("batch")}} if metadata.batch is None else None
