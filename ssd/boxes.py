"""Default boxes, matching, and the coding between boxes and network outputs: pure functions.

Boxes are float32 in the last dimension, normalised by the image's width and height, as centre and
size (``cxcywh``) or as corners (``xyxy``). Conversions are torchvision's.
"""

import math

import torch
from torch import Tensor
from torchvision.ops import box_convert

# SSD300 as published for COCO: weiliu89/caffe (ssd branch), and NVIDIA DeepLearningExamples' dboxes300_coco.
INPUT_SIZE = 300
FEATURE_SIZES = (38, 19, 10, 5, 3, 1)
STEPS = (8, 16, 32, 64, 100, 300)
SCALES = (21, 45, 99, 153, 207, 261, 315)
ASPECT_RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
BOXES_PER_CELL = tuple(2 + 2 * len(ratios) for ratios in ASPECT_RATIOS)
NUM_DEFAULT_BOXES = sum(n * size * size for n, size in zip(BOXES_PER_CELL, FEATURE_SIZES, strict=True))
CENTER_VARIANCE = 0.1
SIZE_VARIANCE = 0.2

# exp() of a raw size offset is capped here, as in torchvision's and detectron2's box coders; a default
# box cannot grow more than 62.5 times, so nothing that a trained network predicts is touched.
MAX_LOG_GROWTH = math.log(1000 / 16)


def default_boxes() -> Tensor:
    """The 8,732 default boxes of SSD300, cxcywh, normalised, clamped to [0, 1].

    Returns:
        float32 ``[8732, 4]`` on the CPU, ordered by feature map, then shape, then row, then column.

    >>> default_boxes()[0]
    tensor([0.0133, 0.0133, 0.0700, 0.0700])
    """
    levels = []
    for size, step, scale, next_scale, ratios in zip(
        FEATURE_SIZES, STEPS, SCALES, SCALES[1:], ASPECT_RATIOS, strict=False
    ):
        small = scale / INPUT_SIZE
        between = math.sqrt(small * (next_scale / INPUT_SIZE))
        shapes = [(small, small), (between, between)]
        for ratio in ratios:
            wide = (small * math.sqrt(ratio), small / math.sqrt(ratio))
            shapes += [wide, wide[::-1]]
        # The cell is figure/step wide (37.5 cells for step 8), although the map has `size` of them.
        centers = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) / (INPUT_SIZE / step)
        cy, cx = torch.meshgrid(centers, centers, indexing="ij")
        grid = torch.stack([cx, cy], dim=-1).reshape(1, -1, 2).expand(len(shapes), -1, -1)
        sizes = torch.tensor(shapes, dtype=torch.float64, device="cpu")[:, None].expand(-1, grid.shape[1], -1)
        levels.append(torch.cat([grid, sizes], dim=-1).reshape(-1, 4))
    return torch.cat(levels).float().clamp(0, 1)


def match(
    boxes: Tensor, labels: Tensor, default_boxes: Tensor, iou_threshold: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Give each default box a ground truth, or the background.

    A default box takes the ground truth that it overlaps most, if their IoU exceeds `iou_threshold`. Each
    ground truth also takes the default box that it overlaps most; where two want the same one, the later
    has it.

    Args:
        boxes: ground truths, float32 xyxy, normalised, ``[M, 4]`` for one image or ``[N, M, 4]`` padded.
        labels: int64 ``[M]`` or ``[N, M]``; classes count from 1, and 0 marks padding. M may be 0.
        default_boxes: float32 cxcywh, normalised, ``[P, 4]``.
        iou_threshold: in [0, 1].

    Returns:
        The matched boxes, float32 cxcywh ``[P, 4]`` or ``[N, P, 4]``, which are the default boxes
        themselves where nothing matched, and their labels, int64 ``[P]`` or ``[N, P]``, 0 for background.

    Raises:
        ValueError: the shapes of boxes and labels do not fit.
    """
    if boxes.ndim not in (2, 3) or boxes.shape[-1] != 4 or labels.shape != boxes.shape[:-1]:
        raise ValueError(
            f"boxes must be [M, 4] or [N, M, 4] and labels [M] or [N, M]; "
            f"got {list(boxes.shape)} and {list(labels.shape)}"
        )
    if boxes.ndim == 2:
        matched, matched_labels = match(boxes[None], labels[None], default_boxes, iou_threshold)
        return matched[0], matched_labels[0]

    corners = box_convert(default_boxes, "cxcywh", "xyxy")
    batch, truths, count = *labels.shape, len(default_boxes)
    if truths == 0:
        background = labels.new_zeros(batch, count)
        return box_convert(corners, "xyxy", "cxcywh").expand(batch, -1, -1), background

    real = labels > 0  # [N, M]
    iou = _iou(boxes.reshape(-1, 4), corners).view(batch, truths, count)
    iou = iou.masked_fill_(~real[..., None], -1)
    best_iou, best_truth = iou.max(dim=1)  # [N, P]
    best_default = iou.max(dim=2).indices  # [N, M]

    # amax and not plain indexing: the later ground truth wins on every device, not just by luck on the CPU.
    order = torch.arange(truths, device=labels.device).where(real, -1)
    forced = labels.new_full((batch, count), -1).scatter_reduce(1, best_default, order, "amax")
    best_truth = forced.where(forced >= 0, best_truth)
    positive = (forced >= 0) | (best_iou > iou_threshold)

    matched = boxes.gather(1, best_truth[..., None].expand(-1, -1, 4))
    matched = matched.where(positive[..., None], corners)
    return box_convert(matched, "xyxy", "cxcywh"), labels.gather(1, best_truth) * positive


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """torchvision's box_iou of ``[I, 4]`` and ``[J, 4]``, by contiguous planes: much faster on a CPU."""
    ax, ay, ar, ab = a.t().contiguous()[..., None]
    bx, by, br, bb = b.t().contiguous()[:, None]
    shared = torch.minimum(ar, br).sub_(torch.maximum(ax, bx)).clamp_(min=0)
    shared *= torch.minimum(ab, bb).sub_(torch.maximum(ay, by)).clamp_(min=0)
    union = ((ar - ax) * (ab - ay) + (br - bx) * (bb - by)).sub_(shared)
    return shared.div_(union)


def encode(boxes: Tensor, default_boxes: Tensor) -> Tensor:
    """Offsets that the network should predict for boxes: the inverse of `decode`.

    Args:
        boxes: float32 cxcywh, normalised, ``[..., 4]``; sizes above 0.
        default_boxes: float32 cxcywh, normalised, ``[..., 4]``, broadcast against `boxes`.

    Returns:
        float32 ``[..., 4]``: centre distance in default sizes / 0.1, log of the size ratio / 0.2.
    """
    center = (boxes[..., :2] - default_boxes[..., :2]) / (default_boxes[..., 2:] * CENTER_VARIANCE)
    size = (boxes[..., 2:] / default_boxes[..., 2:]).log() / SIZE_VARIANCE
    return torch.cat([center, size], dim=-1)


def decode(offsets: Tensor, default_boxes: Tensor) -> Tensor:
    """Boxes from the network's offsets.

    Args:
        offsets: ``[..., 4]``, any float dtype; computed in float32.
        default_boxes: float32 cxcywh, normalised, ``[..., 4]``, broadcast against `offsets`.

    Returns:
        float32 ``[..., 4]``, xyxy, normalised; not clipped to the image.

    >>> decode(torch.zeros(1, 4), torch.tensor([[0.5, 0.5, 0.2, 0.4]]))
    tensor([[0.4000, 0.3000, 0.6000, 0.7000]])
    """
    offsets = offsets.float()
    center = offsets[..., :2] * CENTER_VARIANCE * default_boxes[..., 2:] + default_boxes[..., :2]
    growth = (offsets[..., 2:] * SIZE_VARIANCE).clamp(max=MAX_LOG_GROWTH)
    half = 0.5 * (growth.exp() * default_boxes[..., 2:])
    return torch.cat([center - half, center + half], dim=-1)
