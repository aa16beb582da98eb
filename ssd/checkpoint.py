"""Checkpoints: safe reading, what network they are for, checks, atomic saving.

Nothing is ever unpickled beyond tensors and plain containers (``weights_only=True``).
"""

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ssd.boxes import PUBLISHED_LAYOUT, Layout
from ssd.choices import Backbone
from ssd.errors import CheckpointError, DownloadError  # noqa: F401 (caught by this name, too)
from ssd.files import atomic_file
from ssd.pretrained import PUBLISHED, looks_like_checkpoint
from ssd.resnet import DEPTHS
from ssd.transforms import describe_transform


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's tensors, and what they say about the network."""

    state_dict: dict[str, Tensor]
    """Keys as in `SSD`, on the CPU."""
    backbone: Backbone
    num_classes: int
    """With the background."""
    head_norm: bool
    """Whether the heads have BatchNorm; published checkpoints have none."""
    class_names: tuple[str, ...]
    """One for each class but the background: the file's own; COCO's where it has none, for 81 classes; else
    "class 0" and on."""
    category_ids: tuple[int, ...] = ()
    """The id of each class in the COCO files that it was trained on, where the file says so."""
    config: dict[str, Any] = field(default_factory=dict)
    """How it was trained, where the file says so."""
    layout: Layout = PUBLISHED_LAYOUT
    """The published one, where the file does not say."""


# --- Reading ----------------------------------------------------------------------------------------------


_NOTES = ("category_ids", "config", "layout")


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint of an SSD, and find out what network it is for.

    Formats, told apart by content: NVIDIA's training checkpoint (a dict with "model" and "label_map"; legacy
    or zip), a bare state dict, safetensors. Prefixes of wrappers ("module.", "module.1.") are removed.

    The tensors still have to be checked against the network: see `require_fit`.

    Raises:
        CheckpointError: damaged, of another format, holds objects that are not plain data, or no SSD.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    tensors, notes = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    state_dict = {_without_wrapper(key): value for key, value in tensors.items()}
    return describe(path, state_dict, notes)


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict of any network (torch or safetensors), as safely as `read`.

    Raises:
        CheckpointError, FileNotFoundError: as `read`.
    """
    path = Path(path)
    return (_read_safetensors(path) if _is_safetensors(path) else _read_torch(path))[0]


def require_fit(name: object, state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Require the keys, shapes and kinds of a network's tensors, and finite values.

    Raises:
        CheckpointError: with the first keys that are missing, unexpected, or not what they should be.
    """
    problems = [f"missing {key}" for key in expected if key not in state_dict]
    problems += [f"unexpected {key}" for key in state_dict if key not in expected]
    problems += [
        f"{key} {problem}"
        for key, value in state_dict.items()
        if key in expected and (problem := _tensor_problem(value, expected[key]))
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{name} does not fit the network: {'; '.join(problems[:5])}{more}")
    for key, value in state_dict.items():
        if not value.isfinite().all():
            raise CheckpointError(f"{name}: {key} holds NaN or infinity")


def _tensor_problem(value: Tensor, expected: Tensor) -> str:
    """What is wrong with a tensor, before any of its values is looked at."""
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_nested:
        return "is no plain tensor"
    if value.shape != expected.shape:
        return f"is {list(value.shape)}, not {list(expected.shape)}"
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if value.dtype not in (floats if expected.is_floating_point() else (torch.int64, torch.int32)):
        return f"is {value.dtype}"
    # A few bytes can stand for any number of values (`expand`), and fill the memory when they are used.
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return "is not stored whole"
    return ""


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and what the file notes beside them: "label_map" and `_NOTES`."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            # Copies: the file is only mapped, and may change or vanish while the network is in use.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        notes = {key: json.loads(metadata[key]) for key in _NOTES if key in metadata}
        notes["label_map"] = dict(enumerate(json.loads(metadata.get("class_names", "[]")), start=1))
    except (safetensors.SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
    return tensors, notes


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # Not chained: torch's text advises to switch the safe unpickler off.
        raise CheckpointError(f"{path}: {_why_not_loaded(path, error)}") from None
    notes: dict[str, Any] = {}
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        notes = {key: loaded[key] for key in ("label_map", *_NOTES) if key in loaded}
        loaded = loaded["model"]
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a dict of tensors")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: {key!r} is a {type(value).__name__}, not a tensor with a name; "
                'expected a state dict, or a dict with one under "model"'
            )
    return loaded, notes


def _why_not_loaded(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "the file is empty"
    if head.lstrip()[:1] == b"<":
        return "this is a web page, not a checkpoint"
    if not looks_like_checkpoint(head):
        return "not a checkpoint of torch or safetensors, or damaged at its start"
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"holds more than tensors and plain containers ({found[1]}), and is not loaded for safety"
    if "TorchScript" in str(error):
        return "a TorchScript program, not a checkpoint"
    return f"damaged or cut off ({path.stat().st_size:,} bytes), or not to be loaded safely; get it again"


def _without_wrapper(key: str) -> str:
    # "module.1." is what the published fp16 wrapper and DistributedDataParallel leave together.
    return re.sub(r"^(module\.1\.|module\.)", "", key)


def describe(path: Path, state_dict: dict[str, Tensor], notes: Mapping[str, Any] | None = None) -> Checkpoint:
    """What network a state dict is for; `path` is what messages call it.

    Raises:
        CheckpointError: it is no SSD's.
    """
    notes = notes or {}
    layout = _layout(path, notes.get("layout"))
    trunk = "feature_extractor.feature_extractor."
    depths = tuple(
        len({key.split(".")[3] for key in state_dict if key.startswith(f"{trunk}{stage}.")})
        for stage in (4, 5, 6)
    )
    bottleneck = f"{trunk}4.0.conv3.weight" in state_dict
    backbone = next((name for name, known in DEPTHS.items() if known == (depths, bottleneck)), None)
    head = state_dict.get("conf.0.weight")
    shapes = layout.boxes_per_cell[0]
    usable = head is not None and not _tensor_problem(head, head) and head.ndim == 4
    if backbone is None or head is None or not usable or len(head) % shapes or len(head) < 2 * shapes:
        raise CheckpointError(
            f"{path}: not an SSD300 with a ResNet trunk; it begins with {', '.join(list(state_dict)[:3])}"
        )
    num_classes = len(head) // shapes
    return Checkpoint(
        state_dict=state_dict,
        backbone=backbone,
        num_classes=num_classes,
        head_norm="loc_norm.0.weight" in state_dict,
        class_names=_class_names(notes.get("label_map"), num_classes),
        category_ids=_category_ids(notes.get("category_ids"), num_classes),
        config=notes["config"] if isinstance(notes.get("config"), dict) else {},
        layout=layout,
    )


def _layout(path: Path, noted: object) -> Layout:
    if noted is None:
        return PUBLISHED_LAYOUT
    try:
        return Layout.from_dict(noted)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: its layout is none of a network's ({error})") from error


def _class_names(names: object, num_classes: int) -> tuple[str, ...]:
    """Names of classes 1 to num_classes - 1, which the file gives by number (0 is the background)."""
    names = names if isinstance(names, dict) else {}
    given = {str(label): name for label, name in names.items() if isinstance(name, str)}
    coco = PUBLISHED["coco"].class_names
    if not given and num_classes == len(coco) + 1:
        return coco
    return tuple(given.get(str(label), f"class {label - 1}") for label in range(1, num_classes))


def _category_ids(ids: object, num_classes: int) -> tuple[int, ...]:
    if isinstance(ids, list) and len(ids) == num_classes - 1 and all(isinstance(each, int) for each in ids):
        return tuple(ids)
    return ()


# --- Writing ----------------------------------------------------------------------------------------------


def save(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    class_names: Sequence[str],
    *,
    category_ids: Sequence[int] | None = None,
    config: Mapping[str, Any] | None = None,
    layout: Layout = PUBLISHED_LAYOUT,
) -> None:
    """Save weights and class names as safetensors, or, for another suffix, as NVIDIA's code loads them.

    The file appears whole or not at all; an earlier one of the same name stays until then.

    Args:
        path: ends in ``.safetensors``, or is written with `torch.save` as ``{"model", "label_map"}``.
        state_dict: of an `SSD`.
        class_names: one for each class but the background.
        category_ids: the dataset's own id of each class, for COCO output.
        config: how the weights were trained, plain data.
        layout: of the network.

    Raises:
        ValueError: the state dict is of another number of classes.
    """
    path = Path(path)
    classes = len(state_dict["conf.0.weight"]) // layout.boxes_per_cell[0] - 1
    if classes != len(class_names):
        raise ValueError(
            f"the network has {classes} classes and the background; got {len(class_names)} names"
        )
    tensors = {key: value.detach().cpu().contiguous() for key, value in state_dict.items()}
    notes: dict[str, Any] = {"category_ids": list(category_ids)} if category_ids else {}
    notes |= {"config": dict(config)} if config else {}
    notes |= {"layout": layout.to_dict()}
    with atomic_file(path) as file:
        if path.suffix == ".safetensors":
            metadata = {key: json.dumps(value) for key, value in notes.items()}
            metadata |= {"class_names": json.dumps(class_names)}
            metadata |= {"transform": describe_transform(layout.size)}
            file.write(safetensors.torch.save(tensors, metadata))
        else:
            labels = dict(enumerate(("background", *class_names)))
            file.write(torch_bytes({"model": tensors, "label_map": labels, **notes}))


def torch_bytes(content: object) -> memoryview:
    """What `torch.save` writes; straight into a file, it does not tell that the disk is full."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()
