"""Checkpoints: safe reading, what network they are for, checks, atomic saving.

Nothing is ever unpickled beyond tensors and plain containers (``weights_only=True``).
"""

import io
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat

import safetensors.torch
import torch
from torch import Tensor

from ssd import containers, networks
from ssd.boxes import PUBLISHED_LAYOUT, Layout, to_corners
from ssd.calibration import Calibration
from ssd.choices import Backbone
from ssd.errors import CheckpointError, DownloadError, as_line, shown  # noqa: F401 (caught by this name)
from ssd.files import atomic_file
from ssd.labels import is_background, may_hold_names, read_class_names
from ssd.pretrained import PUBLISHED, weights_in
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
    score_thresholds: tuple[float, ...] = ()
    """Of each class but the background, where the file has them; see `ssd.evaluate.best_thresholds`."""
    calibration: Calibration | None = None
    """What scores and boxes are worth, where ``ssd calibrate`` measured it."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it with the function `save`."""
        save(
            path,
            self.state_dict,
            self.class_names,
            category_ids=self.category_ids,
            config=self.config,
            layout=self.layout,
            score_thresholds=self.score_thresholds,
            calibration=self.calibration,
        )


# --- Reading ----------------------------------------------------------------------------------------------


_NOTES = ("category_ids", "config", "layout", "score_thresholds", "calibration")
_KEPT = tuple(each for each in _NOTES if each != "config")
_NAMES = (
    *("label_map", "class_names", "classes", "CLASSES", "names", "categories"),
    *("class_to_idx", "idx_to_class", "id2label", "label2id", "labels", "label_names"),
)
_OF_MANY_THINGS = ("labels", "label_names")  # classes where they are lists
_INNER = ("data", "meta", "dataset_meta", "hyper_parameters", "hparams", "args", "config", "cfg")


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint of an SSD, and find out what network it is for.

    Formats, told apart by content: torch's (zip or legacy) and safetensors. The state dict may be in dicts of
    any names, as in NVIDIA's and Lightning's checkpoints and a run's ``state.pt``, and its keys may have the
    names of wrappers in front ("module.", "_orig_mod.", "model."). Of a model and its average (EMA), the
    average is read. Class names are those of "label_map", "class_names" and the like, if they fit.

    The tensors still have to be checked against the network: see `require_fit`.

    Args:
        path: a file, the index of a file in parts, or a folder; see `ssd.pretrained.weights_in`.

    Raises:
        CheckpointError: damaged, of another format, holds objects that are not plain data, no SSD or several,
            or class names of which it is open which is whose.
        FileNotFoundError: there is no such file.
    """
    path = weights_in(Path(path)) if os.path.isdir(path) else Path(path)
    content, metadata = containers.read(path)
    network = networks.find_network(path, content)
    notes = _metadata_notes(path, metadata) if metadata else _notes(network.around)
    found = describe(path, _with_counters(network.tensors), notes)
    _require_harmless(path, network.beside, found.layout)
    return found


def read_trunk(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a ResNet with torchvision's keys, as safely as `read`, and from the same containers.

    Raises:
        CheckpointError, FileNotFoundError: as `read`.
    """
    content, _ = containers.read(Path(path))
    return _with_counters(networks.find_network(Path(path), content, networks.RESNET).tensors)


def _notes(around: Sequence[Mapping[Any, Any]]) -> dict[str, Any]:
    """What the dicts around a network say of it, the outermost first."""
    notes: dict[str, Any] = {}
    for holder in reversed(around):
        inner = [holder[key] for key in _INNER if isinstance(holder.get(key), dict)]
        given = [(holder, key) for key in (*_NOTES, *_NAMES)] + [
            (each, key) for each in inner for key in _NAMES
        ]
        for each, key in given:
            if key in _OF_MANY_THINGS and not isinstance(each.get(key), list | tuple):
                continue
            if key in each and not isinstance(each[key], Tensor):
                notes.setdefault(key, each[key])
    return notes


def _metadata_notes(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The same, of a safetensors file, whose notes are text, most of it JSON."""
    notes: dict[str, Any] = {}
    for key in (*_NOTES, *_NAMES):
        if key not in metadata:
            continue
        try:
            notes[key] = json.loads(metadata[key])
        except (ValueError, RecursionError) as error:
            if key == "layout":
                problem = as_line(str(error), 200)
                raise CheckpointError(
                    f"{path}: its layout, a note beside the weights, cannot be read ({problem})"
                ) from None
            notes[key] = metadata[key]
    return _notes([notes]) | {"is_ours": isinstance(notes.get("class_names"), list)}


def _with_counters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With counters of BatchNorm as integers: old files have none, and converted ones have them as floats."""
    counted: dict[str, Tensor] = {}
    for key, value in tensors.items():
        counts = key.endswith(".num_batches_tracked") and value.numel() == 1
        counted[key] = value.reshape(()).long() if counts and not _tensor_problem(value, value) else value
        counter = key.removesuffix("running_var") + "num_batches_tracked"
        if key.endswith(".running_var") and counter not in tensors:
            counted[counter] = torch.tensor(0)
    return counted


_BOXES = re.compile(r"(d(efault_?)?box(es)?|priors?|anchors?)(_\w+)?$")
_HELPERS = re.compile(r"(^|[._])(criterion|loss(es)?|metrics?)([._]|$)")


def _require_harmless(path: Path, beside: Mapping[str, Tensor], layout: Layout) -> None:
    """Require of tensors beside a network that its detections do not depend on them."""
    several = {key: value for key, value in beside.items() if value.numel() > 1}  # the rest are counters
    for key in filter(_BOXES.search, several):
        if not _are_default_boxes(several[key], layout):
            raise CheckpointError(
                f"{path}: its default boxes ({as_line(key, 60)}) are not those of a layout of {layout.size} "
                "pixels, as which it is read; its detections would be wrong"
            )
    strange = [key for key in several if not _BOXES.search(key) and not _HELPERS.search(key)]
    if strange:
        few = networks.first_names(strange) + ", ..." * (len(strange) > 3)
        raise CheckpointError(
            f"{path} does not fit the network: beside its tensors there are others, on which detections may "
            f"depend ({few}). If they do not, save the network's alone, `model` being the SSD: "
            f"torch.save(model.state_dict(), {containers.new_name(path)!r})"
        )


def _are_default_boxes(value: Tensor, layout: Layout) -> bool:
    """Whether the values are a layout's default boxes, as cxcywh or xyxy, in shares or in pixels."""
    if _tensor_problem(value, value):
        return False
    theirs = value.float().squeeze()
    theirs = theirs.T if theirs.ndim == 2 and len(theirs) == 4 else theirs
    cxcywh = layout.default_boxes()
    return any(
        theirs.shape == form.shape and torch.allclose(theirs, form * scale, atol=2e-3 * scale)
        for form in (cxcywh, to_corners(cxcywh))
        for scale in (1, layout.size)
    )


def require_fit(name: object, state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Require the keys, shapes and kinds of a network's tensors, and finite values.

    Raises:
        CheckpointError: with the first keys that are missing, unexpected, or not what they should be.
    """
    problems = [f"missing {key}" for key in expected if key not in state_dict]
    problems += [f"unexpected {as_line(key, 60)}" for key in state_dict if key not in expected]
    problems += [
        f"{key} {problem}"
        for key, value in state_dict.items()
        if key in expected and (problem := _tensor_problem(value, expected[key]))
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{name} does not fit the network: {'; '.join(problems[:5])}{more}")
    for key, value in state_dict.items():
        if not value.to(expected[key].dtype).isfinite().all():  # float64 holds more
            raise CheckpointError(f"{name}: {key} holds NaN or infinity")


def _tensor_problem(value: Tensor, expected: Tensor) -> str:
    """What is wrong with a tensor, before any of its values is looked at."""
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_nested:
        return "is no plain tensor"
    if value.shape != expected.shape:
        return f"is {shown(list(value.shape))}, not {list(expected.shape)}"
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if value.dtype not in (floats if expected.is_floating_point() else (torch.int64, torch.int32)):
        return f"is {value.dtype}"
    # A few bytes can stand for any number of values (`expand`), and fill the memory when they are used.
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return "is not stored whole"
    return ""


def describe(path: Path, state_dict: dict[str, Tensor], notes: Mapping[str, Any] | None = None) -> Checkpoint:
    """What network a state dict is for; `path` is what messages call it.

    Raises:
        CheckpointError: it is no SSD's, or its class names do not fit.
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
    # Of values that are there: what a shape alone says may be any number of classes.
    usable = head is not None and not _tensor_problem(head, head) and head.ndim == 4 and head.numel() > 0
    if backbone is None or head is None or not usable or len(head) % shapes or len(head) < 2 * shapes:
        raise CheckpointError(
            f"{path}: not an SSD300 with a ResNet trunk; it begins with {networks.first_names(state_dict)}"
        )
    num_classes = len(head) // shapes
    return Checkpoint(
        state_dict=state_dict,
        backbone=backbone,
        num_classes=num_classes,
        head_norm="loc_norm.0.weight" in state_dict,
        class_names=_class_names(path, notes, num_classes),
        category_ids=_category_ids(notes.get("category_ids"), num_classes),
        config=notes["config"] if isinstance(notes.get("config"), dict) else {},
        layout=layout,
        score_thresholds=_score_thresholds(path, notes.get("score_thresholds"), num_classes),
        calibration=_calibration(path, notes.get("calibration")),
    )


def _layout(path: Path, noted: object) -> Layout:
    if noted is None:
        return PUBLISHED_LAYOUT
    try:
        return Layout.from_dict(noted)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: its layout is none of a network's ({as_line(str(error), 300)})"
        ) from error


def _class_names(path: Path, notes: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    """Names of classes 1 to num_classes - 1, which files give in many forms."""
    found: dict[str, tuple[str, ...]] = {}
    for key in _NAMES:
        try:
            names = _read_names(key, notes, num_classes - 1)
        except ValueError as error:
            if found:
                continue
            raise CheckpointError(
                f'{path}: its "{key}" gives {error}. Save it with the right names, in the order of training: '
                f"{_with_names(path)}"
            ) from None
        if names:
            found[key] = names
    if len(set(found.values())) > 1:
        (first, ours), *rest = found.items()
        second, theirs = next((key, names) for key, names in rest if names != ours)
        i = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        raise CheckpointError(
            f'{path}: its "{first}" and "{second}" give different class names, as {shown(ours[i])} and '
            f"{shown(theirs[i])}. Save it with the right names, in the order of training: {_with_names(path)}"
        )
    if found:
        return next(iter(found.values()))
    unread = next((key for key in _NAMES if may_hold_names(notes.get(key))), None)
    coco = PUBLISHED["coco"].class_names
    if unread:
        warnings.warn(
            f"{path}: its class names ({unread}) cannot be read; classes are called class 0 and on",
            stacklevel=2,
        )
    elif num_classes == len(coco) + 1:
        return coco
    return tuple(f"class {i}" for i in range(num_classes - 1))


def _read_names(key: str, notes: Mapping[str, Any], count: int) -> tuple[str, ...] | None:
    given = notes.get(key)
    is_ours = key == "class_names" and notes.get("is_ours") and len(given or ()) == count
    if is_ours and all(isinstance(name, str) for name in given or ()):
        return tuple(given or ())  # a class may be called as the background is: labelme has one so
    return read_class_names(given, count)


def _with_names(path: Path) -> str:
    """Code that gives a file other class names."""
    new, names = str(path.with_name(f"named-{path.name}")), "'the first class', 'the second'"
    read = f"c, notes = containers.read({str(path)!r})"
    if path.suffix == ".safetensors":
        kept = f"{{k: notes[k] for k in {_NOTES} if k in notes}}"
        return (
            f"import json, safetensors.torch; from ssd import containers; {read}; "
            f"safetensors.torch.save_file(c, {new!r}, {kept} | {{'class_names': json.dumps([{names}])}})"
        )
    kept = f"{{k: a[k] for a in n.around for k in {_KEPT} if k in a}}"
    return (
        f"import torch; from ssd import containers, networks; {read}; "
        f"n = networks.find_network({str(path)!r}, c); torch.save({kept} | {{'model': n.tensors | n.beside, "
        f"'label_map': dict(enumerate(['background', {names}]))}}, {new!r})"
    )


def _score_thresholds(path: Path, noted: object, num_classes: int) -> tuple[float, ...]:
    if noted is None:
        return ()
    try:
        return as_thresholds(noted if isinstance(noted, list | tuple) else [None], num_classes - 1)
    except ValueError:
        raise CheckpointError(
            f'{path}: its "score_thresholds" give {shown(noted)}, not a number from 0 to 1 for each of '
            f"{num_classes - 1} classes. Save it without them, or with the right ones"
        ) from None


def _calibration(path: Path, noted: object) -> Calibration | None:
    try:
        return None if noted is None else Calibration.from_dict(noted)
    except ValueError as error:
        problem = as_line(str(error), 300)
        raise CheckpointError(
            f"{path}: its calibration cannot be used: {problem}. Calibrate the weights that it was made of "
            "again"
        ) from None


def as_thresholds(values: Sequence[Any], classes: int) -> tuple[float, ...]:
    """Score thresholds: one in [0, 1] for each class but the background, or none.

    Raises:
        ValueError: they are something else.
    """
    fine = all(
        isinstance(each, SupportsFloat) and not isinstance(each, bool) and 0 <= float(each) <= 1
        for each in values
    )
    if not fine or len(values) not in (0, classes):
        raise ValueError(
            f"score_thresholds are a number from 0 to 1 for each of {classes} classes, or none; "
            f"got {shown(list(values))}"
        )
    return tuple(float(each) for each in values)


def _category_ids(ids: object, num_classes: int) -> tuple[int, ...]:
    if isinstance(ids, list) and len(ids) == num_classes - 1 and all(type(each) is int for each in ids):
        return tuple(ids) if all(-(2**63) <= each < 2**63 for each in ids) else ()
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
    score_thresholds: Sequence[float] = (),
    calibration: Calibration | None = None,
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
        score_thresholds: one for each class but the background, in [0, 1], for ``"calibrated"`` detection.
        calibration: what scores and boxes are worth; earlier versions leave it aside.

    Raises:
        ValueError: the state dict, or the thresholds, are of another number of classes.
    """
    path = Path(path)
    classes = len(state_dict["conf.0.weight"]) // layout.boxes_per_cell[0] - 1
    if classes != len(class_names):
        drop = "; leave the background out" if any(map(is_background, class_names)) else ""
        raise ValueError(
            f"the network has {classes} classes and the background; got {len(class_names)} names{drop}"
        )
    score_thresholds = as_thresholds(score_thresholds, classes)
    tensors = {key: value.detach().cpu().contiguous() for key, value in state_dict.items()}
    notes: dict[str, Any] = {"category_ids": list(category_ids)} if category_ids else {}
    notes |= {"config": dict(config)} if config else {}
    notes |= {"layout": layout.to_dict()}
    notes |= {"score_thresholds": list(score_thresholds)} if score_thresholds else {}
    notes |= {"calibration": calibration.to_dict()} if calibration else {}
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
