"""The choices of a training run. Its fields are also the options of the command; torch is not needed."""

import ast
import inspect
import math
import textwrap
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Literal, get_args, get_origin

from ssd.choices import LEAST_TILE, Backbone, Precision, Recipe

_LONGEST = 5_000_000  # minutes; ten years


@dataclass(frozen=True)
class TrainConfig:
    """All choices of a training run; it is saved with every checkpoint.

    The text below a field is what ``ssd train --help`` says of its option.

    Raises:
        ValueError: a value is out of range; the message names the field.
    """

    epochs: int = 90
    """Times that each image is seen; see `time`."""
    half_size: float | None = None
    """Part of the run, at its start, with images half as wide and high: a third of the network's time.

    By default 0.5, and 0 where `weights` are given, or `layout` has no half."""
    batch_size: int = 8
    """Images in the network at a time, in each process; at least 2, for BatchNorm."""
    accumulate: int = 1
    """Batches whose gradients make one step of the optimiser."""
    lr: float | None = None
    """Highest learning rate, for 32 images a step; it is scaled to the images of a step.

    By default 0.08, and a tenth of that where `weights` are given."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of SGD, except on biases and norms."""
    warmup: int = 300
    """Steps in which the learning rate rises linearly; at most a tenth of the run."""
    schedule: Literal["cosine", "multistep"] = "cosine"
    """How the learning rate falls: to 0 along a cosine, or to a tenth at each of the milestones."""
    milestones: tuple[float, ...] = (43 / 65, 54 / 65)
    """Parts of the whole run after which the rate falls, for multistep; as 0.66,0.83."""
    augmentation: Recipe = "default"
    """Recipe of augmentation."""
    ema: float = 0.999
    """Decay of the moving average of the weights that is evaluated and saved; 0 for none."""
    clip: float = 0.0
    """Largest norm of all gradients; 0 for no limit."""
    loss: str = "batch"
    """Name of the loss: batch takes negatives where the batch has the hardest, multibox image by image.

    With multibox, as published, images without objects teach nothing."""
    iou_threshold: float = 0.5
    """Overlap (IoU) above which a default box takes a ground truth."""
    precision: Literal["auto", Precision] = "auto"
    """Precision of the network; auto is bf16 where the device computes it natively, else fp32."""
    layout: str | None = None
    """Name of the layout of default boxes, which is also the size of the input.

    By default that of `weights`, or 300."""
    backbone: Backbone | None = None
    """Trunk of the network; by default that of `weights`, or resnet50."""
    weights: str | None = None
    """Starting point: coco, shapes, a file, a URL or hf://owner/repo.

    Class heads are kept if the classes are the same."""
    backbone_weights: str | None = None
    """Starting point of the trunk alone: imagenet, a name of torchvision's, a file, or hf://owner/repo/file."""
    head_norm: bool = field(default=True, metadata={"flags": "--head-norm/--plain-heads"})
    """BatchNorm in the heads, where `weights` does not decide it."""
    freeze: int = 0
    """Stages of the trunk that stay as they are: 1 is the stem, 2 to 4 are layer1 to layer3."""
    sync_batchnorm: bool = False
    """BatchNorm over all processes; CUDA only."""
    channels_last: bool = True
    """Memory of the network and its images ordered channels-last, which most processors prefer."""
    compile: bool = False
    """Run the network through torch.compile."""
    crowd: bool = False
    """Train on crowd boxes too, as NVIDIA's code does.

    In Python, the `DetectionDataset` is to be made likewise."""
    workers: int | None = None
    """Processes that read and augment images; by default half of the cores, at most 8."""
    evaluate_every: int = 5
    """Epochs between evaluations; the last epoch is always evaluated."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    time: float | None = None
    """Minutes after which the run ends, evaluated as usual, in place of `epochs`, which then do not count.

    Training and evaluations between its epochs take part, also those before the run was resumed; the learning
    rate falls over this time. A run that was interrupted does then not end with the same weights as one that
    was not."""
    patience: int = 0
    """Epochs without a higher AP after which the run ends, at an evaluation; 0 for never."""
    tiles: int | None = None
    """Side, in pixels, of the tiles in which larger images are seen, for small objects; by default whole.

    Evaluations see the whole image and its tiles, as `ssd detect --tiles` does."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weights of the classes in the loss: balanced makes rare ones count more.

    Those are 1 / sqrt(boxes of the class in the training split), scaled so that the mean box counts 1,
    and at most 10."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))  # a list, where they come from JSON
        least = {"epochs": 1, "batch_size": 2, "accumulate": 1, "evaluate_every": 1, "tiles": LEAST_TILE}
        least |= dict.fromkeys(("momentum", "weight_decay", "warmup", "ema", "clip", "freeze"), 0)
        least |= dict.fromkeys(("patience", "seed", "half_size", "workers"), 0)
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise ValueError(f"{name} must be at least {low}; got {value}")
        if self.lr is not None and not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr must be above 0; got {self.lr}")
        if self.time is not None and not 0 < self.time <= _LONGEST:
            raise ValueError(f"time must be above 0 and at most {_LONGEST:,} minutes; got {self.time}")
        if max(self.ema, self.momentum, self.half_size or 0) >= 1:
            raise ValueError("ema, momentum and half_size must be below 1")
        if self.freeze > 4:
            raise ValueError(f"freeze is at most 4, the whole trunk; got {self.freeze}")
        if not 0 <= self.iou_threshold <= 1:
            raise ValueError(f"iou_threshold must be in [0, 1]; got {self.iou_threshold}")
        if not all(0 < each < 1 for each in self.milestones):
            raise ValueError(f"milestones are parts of the run, between 0 and 1; got {self.milestones}")
        for each in fields(self):
            value, known = getattr(self, each.name), field_choices(each.type)
            if known and value not in known and not (value is None and NoneType in get_args(each.type)):
                raise ValueError(f"{each.name} {value!r} is none of {', '.join(known)}")

    def peak_lr(self) -> float:
        """The highest learning rate for 32 images a step."""
        return self.lr if self.lr is not None else 0.008 if self.weights else 0.08


def field_choices(kind: object) -> tuple[str, ...]:
    """The names that a field's type allows; empty where it is no Literal, or one or None.

    >>> field_choices(Literal["cosine", "multistep"] | None), field_choices(float)
    (('cosine', 'multistep'), ())
    """
    for part in (kind, *get_args(kind)):
        if get_origin(part) is Literal:
            return get_args(part)
    return ()


def field_docs(kind: type) -> dict[str, str]:
    """The text below each field of a dataclass, by the field's name; nothing where there is no source file.

    >>> field_docs(TrainConfig)["momentum"]
    'Momentum of SGD.'
    """
    try:
        source = inspect.getsource(kind)
    except OSError:
        return {}
    (tree,) = ast.parse(textwrap.dedent(source)).body
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for statement, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            match below:
                case ast.Expr(ast.Constant(str(text))):
                    docs[statement.target.id] = inspect.cleandoc(text)
    return docs


PRESETS = {
    "default": TrainConfig(),
    # NVIDIA DeepLearningExamples, SSD300 v1.1: `main.py`'s defaults and the 65 epochs of its README.
    "published": TrainConfig(
        epochs=65,
        half_size=0.0,
        lr=2.6e-3,
        schedule="multistep",
        augmentation="published",
        loss="multibox",
        ema=0.0,
        head_norm=False,
        crowd=True,
    ),
}
"""Configurations by name; ``dataclasses.replace(PRESETS["published"], epochs=20)`` changes one."""
