"""What people choose by name where torch does the work: the names, for which nobody need wait for torch."""

from typing import Literal, get_args

Backbone = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
BACKBONES: tuple[Backbone, ...] = get_args(Backbone)

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

Recipe = Literal["default", "published", "none"]
"""Of augmentation; see `ssd.augment.STEPS`."""

LEAST_TILE = 32
"""Least side of tiles, in pixels; smaller ones are many."""
