"""What computes the network behind a `Detector`: torch, or an exported file in its own runtime.

Each kind of exported file has a row in `BACKENDS` and a module with two functions:

- ``load_file(path, device, precision) -> (Backend, Metadata)`` opens a file in its runtime. `device` is None
  where nobody asked for one; `precision` may be "auto".
- ``write(model, path, metadata, images) -> save`` writes the file (or folder) of a model in eval mode.
  `images`, uint8 ``[K, size, size, 3]``, are those to calibrate int8 on, or None. ``save(metadata)`` writes
  it again, as it is, with other metadata.

Both import the packages of an extra themselves; where one is missing, who called them names the extra.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssd.backends.base import NMS, Backend, Metadata, Options, kind_of, load
    from ssd.backends.eager import of_model

__all__ = ["BACKENDS", "NMS", "Backend", "Kind", "Metadata", "Options", "kind_of", "load", "of_model"]


@dataclass(frozen=True)
class Kind:
    """A kind of exported file."""

    ending: str
    """Of a file's name: the suffix by which it is known, in lower case. Of a folder's: only the default."""
    precisions: tuple[str, ...]
    """That such a file can hold."""
    module: str
    """With `load_file` and `write`; imported when used."""
    extra: str | None = None
    """Of pyproject.toml, where loading or writing needs packages that not everybody has."""
    chooses_precision: bool = False
    """Whether the runtime chooses between fp32 and bf16 when it loads a file."""
    folder: tuple[str, ...] = ()
    """Where `write` makes a folder: the names of its files. The first is the one that is loaded, by itself
    or by its folder's name."""


BACKENDS = {
    "onnx": Kind(".onnx", ("fp32", "fp16"), "ssd.backends.onnx", extra="onnx"),
    "openvino": Kind(
        "_openvino",
        ("fp32", "int8"),
        "ssd.backends.openvino",
        extra="openvino",
        chooses_precision=True,
        folder=("model.xml", "model.bin"),
    ),
    "pt2": Kind(".pt2", ("fp32", "fp16", "bf16"), "ssd.backends.pt2"),
    "torchscript": Kind(".torchscript", ("fp32", "fp16", "bf16"), "ssd.backends.torchscript"),
}
"""The kinds of exported files, by the names that ``ssd export --format`` and `ssd.export.export` take."""

_HOMES = {
    "NMS": "base",
    "Backend": "base",
    "Metadata": "base",
    "Options": "base",
    "kind_of": "base",
    "load": "base",
    "of_model": "eager",
}


# These need torch, which the table does not.
def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"ssd.backends.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'ssd.backends' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
