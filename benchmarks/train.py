"""Augmenting loader and training step against the published ones, in one run.

python benchmarks/train.py [--images FOLDER] [--backbone resnet50] [--rounds 7]

"published" is a plain reimplementation of NVIDIA DeepLearningExamples' SSD: its PIL pipeline (one crop
after another until one fits, flip, resize, colour jitter, normalise, encode) and its step in eager fp32
(NCHW, plain heads, loss with a double sort for mining), in a process of its own. Images are made-up scenes,
or the JPEG files of a folder, with ten random boxes each. The loaders run on one core.
"""

import argparse
import contextlib
import copy
import multiprocessing
import random
import tempfile
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timing import heading, medians, show
from torch import Tensor, nn
from torchvision.transforms import v2

from ssd import shapes
from ssd.augment import augment
from ssd.boxes import PUBLISHED_LAYOUT, match, to_corners
from ssd.choices import Recipe
from ssd.devices import native_precisions
from ssd.images import load_image
from ssd.loss import MultiBoxLoss
from ssd.model import SSD
from ssd.train import PRESETS, keep_memory
from ssd.train.optim import make_optimizer, update_average
from ssd.transforms import MEAN, STD, normalize

BATCH = 8
SIZE = PUBLISHED_LAYOUT.size
DEFAULTS = PUBLISHED_LAYOUT.default_boxes()
CORNERS = to_corners(DEFAULTS)

# --- The published pipeline -------------------------------------------------------------------------------

TO_INPUT = v2.Compose(
    [
        v2.Resize((SIZE, SIZE)),
        v2.ColorJitter(0.125, 0.5, 0.5, 0.05),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
)


def iou_matrix(a: Tensor, b: Tensor) -> Tensor:
    a, b = a[:, None].expand(-1, len(b), -1), b[None].expand(len(a), -1, -1)
    low, high = torch.max(a[..., :2], b[..., :2]), torch.min(a[..., 2:], b[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    return shared / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared)


def crop(image: Image.Image, boxes: Tensor, labels: Tensor) -> tuple[Image.Image, Tensor, Tensor]:
    while True:
        mode = random.choice((None, (0.1, 1), (0.3, 1), (0.5, 1), (0.7, 1), (0.9, 1), (-1, 2)))
        if mode is None:
            return image, boxes, labels
        w, h = random.uniform(0.3, 1), random.uniform(0.3, 1)
        if not 0.5 <= w / h <= 2:
            continue
        left, top = random.uniform(0, 1 - w), random.uniform(0, 1 - h)
        part = torch.tensor([[left, top, left + w, top + h]])
        iou = iou_matrix(boxes, part)[:, 0]
        if not ((iou > mode[0]) & (iou < mode[1])).all():
            continue
        x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
        inside = (x > left) & (x < left + w) & (y > top) & (y < top + h)
        if not inside.any():
            continue
        boxes = boxes[inside].clone()
        boxes = torch.max(torch.min(boxes, part[0, 2:].repeat(2)), part[0, :2].repeat(2))
        boxes = (boxes - part[0, :2].repeat(2)) / torch.tensor([w, h] * 2)
        width, height = image.size
        corners = (int(left * width), int(top * height), int((left + w) * width), int((top + h) * height))
        return image.crop(corners), boxes, labels[inside]


def encode(boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    iou = iou_matrix(boxes, CORNERS)
    best, which = iou.max(0)
    forced = iou.max(1).indices
    best.index_fill_(0, forced, 2.0)
    which[forced] = torch.arange(len(boxes))
    mask = best > 0.5
    matched, classes = CORNERS.clone(), torch.zeros(len(CORNERS), dtype=torch.long)
    classes[mask] = labels[which[mask]]
    matched[mask] = boxes[which[mask]]
    center, size = (matched[:, :2] + matched[:, 2:]) / 2, matched[:, 2:] - matched[:, :2]
    return torch.cat([center, size], 1), classes


def published_examples(files: list[Path], boxes: np.ndarray, labels: np.ndarray) -> None:
    for path in files:
        image = Image.open(path).convert("RGB")
        seen, truths, classes = crop(image, torch.from_numpy(boxes), torch.from_numpy(labels))
        if random.random() < 0.5:
            seen = seen.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            truths[:, [0, 2]] = 1 - truths[:, [2, 0]]
        TO_INPUT(seen)
        encode(truths, classes)


def our_examples(files: list[Path], boxes: np.ndarray, labels: np.ndarray, recipe: Recipe) -> None:
    """With what the step does later for the published pipeline's normalise and encode."""
    rng = np.random.default_rng(0)
    images, truths, classes = [], [], []
    for path in files:
        image = load_image(path)
        in_pixels = boxes * np.tile(image.size, 2).astype("f")
        pixels, found, kept = augment(image, in_pixels, labels, recipe, rng, SIZE)
        images.append(pixels)
        truths.append(torch.from_numpy(found))
        classes.append(torch.from_numpy(kept))
    normalize(torch.stack(images))
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    match(pad(truths), pad(classes), DEFAULTS)


# --- The published step -----------------------------------------------------------------------------------


def published_loss(loc: Tensor, conf: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
    defaults = DEFAULTS.t()[None]
    mask = labels > 0
    count = mask.sum(1)
    center = 10 * (boxes[:, :2] - defaults[:, :2]) / defaults[:, 2:]
    size = 5 * (boxes[:, 2:] / defaults[:, 2:]).log()
    offsets = torch.cat([center, size], 1)
    loc_loss = (mask.float() * F.smooth_l1_loss(loc, offsets, reduction="none").sum(1)).sum(1)
    entropy = F.cross_entropy(conf, labels, reduction="none")
    negatives = entropy.clone()
    negatives[mask] = 0
    rank = negatives.sort(1, descending=True).indices.sort(1).indices
    mined = rank < torch.clamp(3 * count, max=mask.shape[1])[:, None]
    conf_loss = (entropy * (mask.float() + mined.float())).sum(1)
    total = (loc_loss + conf_loss) * (count > 0).float() / count.float().clamp(min=1e-6)
    return total.mean()


class PublishedStep:
    def __init__(self, backbone: str, images: Tensor, boxes: Tensor, labels: Tensor) -> None:
        self._model = SSD(81, backbone, head_norm=False)
        self._optimizer = torch.optim.SGD(self._model.parameters(), 1e-6, 0.9, weight_decay=5e-4)
        self._images = normalize(images).contiguous()
        matched, self._labels = match(boxes, labels, DEFAULTS)
        self._boxes = matched.transpose(1, 2).contiguous()

    def __call__(self) -> None:
        loss = published_loss(*self._model(self._images), self._boxes, self._labels)
        loss.item()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def serve(connection: Connection, *arguments: object) -> None:
    step = PublishedStep(*arguments)
    with contextlib.suppress(EOFError):  # the end of the other process
        while True:
            connection.send(None)
            connection.recv()
            step()


class PublishedStepAlone:
    """In a process of its own, whose memory is handled as usual."""

    def __init__(self, *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, *arguments), daemon=True).start()
        self._connection.recv()

    def __call__(self) -> None:
        self._connection.send(None)
        self._connection.recv()


class OurStep:
    """As `train_epoch` of `ssd.train`, with matching; the default preset adds head norms and the average."""

    def __init__(
        self,
        backbone: str,
        images: Tensor,
        boxes: Tensor,
        labels: Tensor,
        *,
        preset: str,
        bf16: bool,
        compiled: bool = False,
    ) -> None:
        config = PRESETS[preset]
        self._model = SSD(81, backbone, config.head_norm).to(memory_format=torch.channels_last)
        self._average = copy.deepcopy(self._model) if config.ema else None
        self._forward = torch.compile(self._model) if compiled else self._model
        self._optimizer = make_optimizer(
            self._model,
            torch.device("cpu"),
            lr=1e-6,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self._scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        self._loss = MultiBoxLoss(DEFAULTS)
        self._batch, self._bf16 = (images, boxes, labels), bf16

    def __call__(self) -> None:
        images, boxes, labels = self._batch
        matched, classes = match(boxes, labels, DEFAULTS)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            loc, conf = self._forward(normalize(images))
        losses = self._loss(loc, conf, matched, classes)
        self._scaler.scale((losses.loc + losses.conf).mean()).backward()
        self._scaler.unscale_(self._optimizer)
        nn.utils.get_total_norm([each.grad for each in self._model.parameters()])
        self._scaler.step(self._optimizer)
        self._scaler.update(1.0)
        self._optimizer.zero_grad()
        if self._average:
            update_average(self._average, self._model, 0.999, 10_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of JPEG files; by default made-up scenes")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also steps through torch.compile")
    options = parser.parse_args()
    print(heading())
    keep_memory()  # as `ssd train` does
    threads = torch.get_num_threads()
    random.seed(0)
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 0.7, (10, 2))
    boxes = np.hstack([low, low + rng.uniform(0.05, 0.3, (10, 2))]).astype(np.float32)
    labels = rng.integers(1, 81, 10)

    with tempfile.TemporaryDirectory() as folder:
        if options.images is None:
            shapes.write_dataset(folder, 2 * BATCH, 0)
        files = sorted((options.images or Path(folder) / "train").glob("*.jpg"))[: 2 * BATCH]
        torch.set_num_threads(1)
        loaders = {
            "ssd, default recipe": lambda: our_examples(files, boxes, labels, "default"),
            "ssd, published recipe": lambda: our_examples(files, boxes, labels, "published"),
            "published": lambda: published_examples(files, boxes, labels),
        }
        times = medians(loaders, 3 * options.rounds)
        show("file to training example, one core, each", times, next(iter(loaders)), len(files))
        torch.set_num_threads(threads)

    pixels = torch.randint(0, 256, (BATCH, SIZE, SIZE, 3), dtype=torch.uint8)
    batch = (pixels, torch.from_numpy(boxes).repeat(BATCH, 1, 1), torch.from_numpy(labels).repeat(BATCH, 1))
    # Without such instructions a step in bf16 takes a minute.
    half = (True, False) if "bf16" in native_precisions(torch.device("cpu")) else (False,)
    steps = {
        f"ssd, {preset} preset, {'bf16' if bf16 else 'fp32'}": OurStep(
            options.backbone, *batch, preset=preset, bf16=bf16
        )
        for preset in PRESETS
        for bf16 in half
    }
    if options.compile:
        for preset in PRESETS:
            steps[f"ssd, {preset} preset, {'bf16' if half[0] else 'fp32'}, compiled"] = OurStep(
                options.backbone, *batch, preset=preset, bf16=half[0], compiled=True
            )
    ours = list(steps)
    steps["published, fp32"] = PublishedStepAlone(options.backbone, *batch)
    times = medians(steps, options.rounds)
    show(f"training step, {options.backbone}, batch {BATCH}", times, "published, fp32")
    for name in ours:
        print(f"  {name} is {times['published, fp32'] / times[name]:.2f} times as fast as the published step")


if __name__ == "__main__":
    main()
