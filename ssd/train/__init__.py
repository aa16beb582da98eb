"""Training: one config, one loop, a run folder from which everything can be continued."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssd.memory import keep_memory
    from ssd.train.config import PRESETS, TrainConfig
    from ssd.train.loop import Result, fit

__all__ = ["PRESETS", "Result", "TrainConfig", "fit", "keep_memory"]

_HOMES = {
    "PRESETS": "ssd.train.config",
    "Result": "ssd.train.loop",
    "TrainConfig": "ssd.train.config",
    "fit": "ssd.train.loop",
    "keep_memory": "ssd.memory",
}


# Names are imported when first used (PEP 562): the config, of which the command makes its options, needs no
# torch.
def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ssd.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
