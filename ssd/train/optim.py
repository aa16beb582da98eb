"""What changes weights: the optimiser, its learning rate, what it leaves alone, and the moving average."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ssd.model import SSD


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: weights that decay, and biases and norms that do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [each for each in trainable if each.dim() > 1], "weight_decay": weight_decay},
        {"params": [each for each in trainable if each.dim() <= 1], "weight_decay": 0.0},
    ]


def make_optimizer(
    model: nn.Module, device: torch.device, *, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD: apex's fused one on CUDA where it can be imported, else torch's."""
    groups = parameter_groups(model, weight_decay)
    if device.type == "cuda":
        try:
            from apex.optimizers import FusedSGD  # noqa: PLC0415

            return FusedSGD(groups, lr=lr, momentum=momentum)  # type: ignore[no-any-return]
        except ImportError:
            pass
    fused = device.type in ("cuda", "cpu")
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=fused)
    for group in groups:
        for parameter in group["params"]:
            # torch leaves this memory as it finds it if the very first step is left out.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def learning_rate(
    done: float, total: float, *, peak: float, rise: float, schedule: str, milestones: Sequence[float]
) -> float:
    """The learning rate of a step.

    Args:
        done: what is done of the run before the step, in steps or in seconds.
        total: what there is to do, in the same unit.
        peak: the highest rate.
        rise: part of the peak that is reached in the warm-up, in [0, 1].
        schedule: "cosine", down to 0, or "multistep", down to a tenth at each milestone.
        milestones: parts of the whole run, in (0, 1).
    """
    rate = peak * rise
    if schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * min(done, total) / total))
    return float(rate * 0.1 ** sum(done >= milestone * total for milestone in milestones))


def freeze(model: SSD, stages: int) -> None:
    """Keep the first stages of the trunk as they are: no gradients, and BatchNorm in eval mode.

    To be called after each ``model.train()``.
    """
    trunk = model.feature_extractor.feature_extractor
    for module in trunk[: (0, 4, 5, 6, 7)[stages]]:
        module.eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move averaged weights and statistics towards the model's, faster in the first steps."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    old, new = list(average.state_dict().values()), list(model.state_dict().values())
    floats = [i for i, value in enumerate(old) if value.is_floating_point()]
    torch._foreach_lerp_([old[i] for i in floats], [new[i] for i in floats], weight)
