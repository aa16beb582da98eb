"""Files of weights as others save them: read without running anything, and the network found in them.

A checkpoint may wrap its tensors in dicts of any names (``{"state_dict": ...}``), and their names in those of
wrappers (``module._orig_mod.``). Nothing is ever unpickled beyond tensors and plain containers: torch reads
with ``weights_only=True``, and the few other kinds of plain data that training scripts note beside the
tensors, as numpy's numbers, come in as stand-ins of this module.
"""

import json
import os
import re
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor

from ssd.errors import CheckpointError
from ssd.pretrained import SUFFIXES, looks_like_checkpoint
from ssd.signatures import HEAD, identify


class Network(NamedTuple):
    """The tensors of one network, and what stood around them."""

    tensors: dict[str, Tensor]
    """By the network's own names."""
    beside: dict[str, Tensor]
    """What lies in the same dict and is no network's, by its full name."""
    around: tuple[Mapping[Any, Any], ...]
    """The dicts that hold it, innermost first."""


# --- Reading ----------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> tuple[Any, dict[str, str]]:
    """What a file of torch or safetensors holds, told by its content, not its suffix.

    Args:
        path: a file, or the index of several (``model.safetensors.index.json``).

    Returns:
        Tensors on the CPU in plain containers of Python, and the text notes of safetensors.

    Raises:
        CheckpointError: damaged, of another format, or holds objects that are not plain data.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.name.endswith(".index.json"):
        return _read_shards(path), {}
    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    return _read_safetensors(path) if is_safetensors else (_read_torch(path), {})


def _read_shards(path: Path) -> dict[str, Any]:
    """The tensors of the files that an index names; they lie beside it."""
    try:
        names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: no index of weights ({error!r})") from None
    tensors: dict[str, Any] = {}
    for name in names:
        shard = path.parent / str(name)
        if shard.parent != path.parent or shard.name.endswith(".index.json") or not shard.is_file():
            raise CheckpointError(f"{path} names the file {name!r}, which has to lie beside it, and does not")
        content, _ = read(shard)
        tensors |= content if isinstance(content, dict) else {}
    return tensors


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            # Copies: the file is only mapped, and may change or vanish while the network is in use.
            return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error


_lock = threading.Lock()


def _read_torch(path: Path) -> object:
    try:
        # Opened here, since torch goes by the suffix, too. What it allows, and warnings, are the process's.
        with path.open("rb") as file, _lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:
                if _refused(error) not in _STAND_INS:
                    raise
            file.seek(0)
            with torch.serialization.safe_globals([(made, name) for name, made in _STAND_INS.items()]):
                return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # Not chained: torch's text advises to switch the safe unpickler off.
        raise CheckpointError(f"{path}: {_why_not_loaded(path, error)}") from None


def _refused(error: Exception) -> str:
    """The name that torch's safe unpickler refused to import."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    name = found[1] if found else ""
    return name if "." in name or not name else f"builtins.{name}"  # torch leaves that word out


def _why_not_loaded(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        return "the file is empty"
    is_zip = head[:2] == b"PK"
    kind = identify(head) if not is_zip or zipfile.is_zipfile(path) else None  # cut off, else
    if kind and (kind.as_weights or not looks_like_checkpoint(head)):
        advice = kind.as_weights or "name it .onnx"
        return f"this is {kind.name}, not a checkpoint; {(is_zip and _within(path)) or advice}"
    if not looks_like_checkpoint(head):
        return "not a checkpoint of torch or safetensors, or damaged at its start"
    if "TorchScript" in str(error):
        return "a TorchScript program, not a checkpoint; where it was exported by ssd, name it .torchscript"
    anew = (
        "Where the program that made it runs, load it as that program does, and save its model's tensors "
        f"alone: torch.save(model.state_dict(), {new_name(path)!r})"
    )
    if kind and "pickle" in kind.name and _MAGIC not in head[:32]:
        return (
            f"this is {kind.name}, not a checkpoint of torch, and is not loaded for safety. {anew}; or, "
            f"where it holds arrays by name: torch.save({{k: torch.as_tensor(v) for k, v in c.items()}}, "
            f"{new_name(path)!r}), c being what it holds"
        )
    if found := _refused(error):
        name = found.removeprefix("builtins.")
        return f"holds more than tensors and plain containers ({name}), and is not loaded for safety. {anew}"
    problem = f"damaged or cut off ({path.stat().st_size:,} bytes), or not to be loaded safely; get it again"
    return f"{problem}. {anew}" if "Weights only load failed" in str(error) else problem


_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # the number that torch's legacy files begin with


def checkpoint_kind(path: Path) -> str:
    """What kind of checkpoint a file is, for messages; empty for an exported program and whatever else."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    kind = identify(head)
    if kind and kind.name == "a safetensors file":
        return kind.name
    if _MAGIC in head[:32]:
        return "a checkpoint of torch"
    inner = [name.partition("/")[2] for name in _names_in_zip(path)]  # below the archive's own name
    is_program = any(name == "constants.pkl" or name.startswith("code/") for name in inner)
    return "a checkpoint of torch" if "data.pkl" in inner and not is_program else ""


def _within(path: Path) -> str:
    """What to do with a zip archive, by what is in it."""
    names = _names_in_zip(path)
    if any(name.endswith("/data.pkl") for name in names):
        return "a checkpoint of torch was packed anew as this; pass the one that it was made of"
    weights = [name for name in names if name.endswith(SUFFIXES)]
    listed = ", ".join(weights[:3]) + (", ..." if len(weights) > 3 else "")
    return f"unpack it, and pass what is in it: {listed}" if weights else ""


def _names_in_zip(path: Path) -> list[str]:
    """What is in a zip archive; nothing where it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return []


def new_name(path: Path) -> str:
    """Where advice puts what is saved anew."""
    return str(path.with_name(path.name.split(".")[0] + "-weights.pt"))


# --- Stand-ins --------------------------------------------------------------------------------------------


class _Left:
    """In place of an object that is not needed: made of anything, and of nothing in it."""

    def __new__(cls, *_: object) -> "_Left":
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return OrderedDict, ()  # which torch reads, where it is saved again


class _Dtype(_Left):
    """In place of numpy's dtype, whose own code would take any state."""

    def __init__(self, code: object, *_: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


def _scalar(dtype: object, content: object = b"") -> object:
    """In place of numpy's scalar: a number or text of Python."""
    known = isinstance(dtype, _Dtype) and re.fullmatch(r"[iu][1248]|f[248]|b1|U\d{1,4}", str(dtype.code))
    if not known or not isinstance(content, bytes):
        return _Left()
    order = ">" if dtype.order == ">" else "<"  # type: ignore[attr-defined]
    return np.frombuffer(content, order + known[0])[0].item()


def _mapping(*_: object) -> dict[Any, Any]:
    return {}


def _sequence(*_: object) -> list[Any]:
    return []


_DICTS = (
    "addict.addict.Dict",
    "easydict.EasyDict",
    "fvcore.common.config.CfgNode",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "yacs.config.CfgNode",
)
_UNNEEDED = (
    *("argparse.Namespace", "types.SimpleNamespace", "typing.Any"),
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "frozenset", "int", "list", "range")),
    *("builtins.slice", "builtins.str", "builtins.tuple"),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *("numpy.ndarray", "numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct"),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Float", "Integer", "String")),
    *(
        f"pathlib{inner}.{kind}{system}Path"
        for inner in ("", "._local")
        for kind in ("", "Pure")
        for system in ("Posix", "Windows")
    ),
)
_STAND_INS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _Dtype,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.multiarray.scalar": _scalar,
    "collections.defaultdict": _mapping,
    "collections.deque": _sequence,
    **dict.fromkeys(_DICTS, OrderedDict),
    **dict.fromkeys(_UNNEEDED, _Left),
}
"""What is made in place of plain data of other kinds, by the name in the file. None of it is imported."""


# --- Finding the network ----------------------------------------------------------------------------------


class Sought(NamedTuple):
    """A kind of network to look for."""

    name: str
    marks: tuple[str, ...]
    """Names that its tensors have, and no other network's."""
    advice: str


SSD = Sought(
    "an SSD300 with a ResNet trunk",
    ("conf.0.weight", "feature_extractor.feature_extractor.0.weight"),
    'Pass weights of ssd train, of NVIDIA\'s SSD for PyTorch, or "coco"',
)
RESNET = Sought(
    "a ResNet with torchvision's names",
    ("conv1.weight", "layer1.0.conv1.weight", "layer3.0.conv1.weight"),
    'Pass weights of torchvision\'s, or "imagenet"',
)

_OWN = {
    *("feature_extractor", "additional_blocks", "loc", "conf", "loc_norm", "conf_norm"),
    *("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"),
}
_WRAPPERS = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_DEPTH = 6  # of containers in one another
_AVERAGE = re.compile(r"(?<![a-z])ema(?![a-z])|modelema|emamodel|averag|(?<![a-z])swa(?![a-z])|shadow|polyak")
_AS_TRAINED = "current_model_state"  # beside it, Lightning's "state_dict" is the average


class _Candidate(NamedTuple):
    place: tuple[Any, ...]
    prefix: str
    tensors: dict[str, Tensor]
    around: tuple[Mapping[Any, Any], ...]

    def is_average(self) -> bool:
        return bool(_AVERAGE.search(".".join(map(str, (*self.place, self.prefix))).lower()))

    def name(self) -> str:
        place = "".join(f"[{each!r}]" for each in self.place)
        return f"{place} {self.prefix}*".strip() if self.prefix or not place else place

    def has(self, key: str) -> bool:
        return key.startswith(self.prefix) and key[len(self.prefix) :].partition(".")[0] in _OWN

    def own(self) -> dict[str, Tensor]:
        return {
            key[len(self.prefix) :]: value.detach() for key, value in self.tensors.items() if self.has(key)
        }


def find_network(path: Path, content: object, sought: Sought = SSD) -> Network:
    """The one network in what a file holds, without the names of its wrappers.

    Where the file holds it twice, as trained and as an average of it (EMA, SWA), the average is taken: it is
    what such training evaluates.

    Args:
        path: of the file, for messages.
        content: see `read`.
        sought: its kind.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    found = list(_candidates(content, sought.marks))
    unlike = _unlike(found)
    chosen = [each for each in unlike if each.is_average()] or unlike
    chosen = [each for each in chosen if _AS_TRAINED not in each.place] or chosen
    if not chosen:
        raise CheckpointError(f"{path}: {_why_none(content, sought)}")
    if len(chosen) > 1:
        raise CheckpointError(f"{path}: {_why_not_one(path, chosen)}")
    (network,) = chosen
    tensors = network.own()
    if len(unlike) == 2:  # some averages are of the parameters alone, and go with the model's statistics
        other = next(each for each in unlike if each is not network)
        tensors = {key: value for key, value in other.own().items() if "running_" in key} | tensors
    together = [each for each in found if each.tensors is network.tensors]
    beside = {
        key: value for key, value in network.tensors.items() if not any(each.has(key) for each in together)
    }
    return Network(tensors, beside, network.around)


def _why_not_one(path: Path, chosen: list[_Candidate]) -> str:
    example = max(chosen, key=lambda each: len(each.prefix))
    wanted = "c" + "".join(f"[{key!r}]" for key in example.place)
    if example.prefix:
        wanted = f"{{k: v for k, v in {wanted}.items() if {example.prefix!r} in k}}"
    names = ", ".join(each.name() for each in chosen[:4])
    return (
        f"holds {len(chosen)} networks: {names}. Save the one that you mean alone, as by: import torch; from "
        f"ssd import containers; c, _ = containers.read({str(path)!r}); "
        f"torch.save({wanted}, {new_name(path)!r})"
    )


def _why_none(content: object, sought: Sought) -> str:
    state_dict = max((_named_tensors(each) for _, each, _ in _holders(content)), key=len, default={})
    if state_dict:
        theirs = next((name for name, marks in _OTHERS if all(each in state_dict for each in marks)), "")
        looks = f"its tensors are named as those of {theirs}; " if theirs else ""
        return f"not {sought.name}; {looks}it begins with {', '.join(list(state_dict)[:3])}. {sought.advice}"
    is_wrapped = isinstance(content, dict) and isinstance(content.get("model"), dict)
    inner = content["model"] if is_wrapped else content  # type: ignore[index]
    if not isinstance(inner, dict) or not inner:
        return f"holds a {type(inner).__name__}, not a dict of tensors"
    key, value = next(iter(inner.items()))
    kind = "an array or other object" if isinstance(value, _Left) else f"a {type(value).__name__}"
    return (
        f"{key!r} is {kind}, not a tensor with a name; expected a state dict, or a dict "
        'that has one, as under "model"'
    )


_OTHERS = (
    (
        "torchvision's ssdlite320",
        ("backbone.features.0.0.0.weight", "head.classification_head.module_list.0.1.weight"),
    ),
    (
        "torchvision's ssd300_vgg16",
        ("backbone.scale_weight", "head.classification_head.module_list.0.weight"),
    ),
    (
        "torchvision's RetinaNet",
        ("backbone.body.conv1.weight", "head.classification_head.conv.0.0.weight"),
    ),
    (
        "torchvision's FCOS",
        ("backbone.body.conv1.weight", "head.classification_head.conv.0.weight"),
    ),
    (
        "torchvision's Faster R-CNN",
        ("backbone.body.conv1.weight", "roi_heads.box_predictor.cls_score.weight"),
    ),
    ("amdegroot's ssd.pytorch (VGG16)", ("vgg.0.weight", "L2Norm.weight", "loc.0.weight")),
    ("lufficc's SSD (VGG16)", ("backbone.vgg.0.weight", "box_head.predictor.cls_headers.0.weight")),
    ("lufficc's SSD", ("box_head.predictor.cls_headers.0.weight",)),
    ("qfgaohao's pytorch-ssd", ("classification_headers.0.weight", "regression_headers.0.weight")),
    ("sgrvinod's SSD300 (VGG16)", ("rescale_factors", "base.conv1_1.weight")),
    ("MMDetection's SSD", ("bbox_head.cls_convs.0.0.weight", "bbox_head.reg_convs.0.0.weight")),
    ("MLPerf's SSD (ResNet-34)", ("model.layer1.0.weight", "additional_blocks.0.0.weight", "conf.0.weight")),
    ("YOLO by Ultralytics", ("model.0.conv.weight", "model.1.conv.weight")),
    ("DETR", ("class_embed.weight", "query_embed.weight")),
    (
        "a ResNet for classification, which is a start for training (--backbone-weights)",
        (*RESNET.marks, "fc.weight"),
    ),
    ("this SSD itself, from which training starts by --weights", SSD.marks),
    ("this SSD's trunk, without its heads", SSD.marks[1:]),
)
"""Other networks that people have, by names of tensors that only they have."""


def _candidates(content: object, marks: tuple[str, ...]) -> Iterator[_Candidate]:
    for place, holder, around in _holders(content):
        tensors = _named_tensors(holder)
        for key in tensors:
            prefix = key.removesuffix(marks[0])
            if (
                key.endswith(marks[0])
                and prefix[-1:] in ("", ".")
                and all(prefix + m in tensors for m in marks)
            ):
                yield _Candidate(place, prefix, tensors, (holder, *around))


def _holders(content: object) -> Iterator[tuple[tuple[Any, ...], Mapping[Any, Any], tuple[Any, ...]]]:
    """Each dict within, with the keys that lead to it and the dicts around it, innermost first."""
    seen: set[int] = set()
    waiting: list[tuple[tuple[Any, ...], Any, tuple[Any, ...]]] = [((), content, ())]
    for place, holder, around in waiting:  # which grows
        if id(holder) in seen or len(place) > _DEPTH:
            continue
        seen.add(id(holder))
        is_dict = isinstance(holder, dict)
        if is_dict:
            yield place, holder, around
        items = holder.items() if is_dict else enumerate(holder) if isinstance(holder, list | tuple) else ()
        inside = (holder, *around) if is_dict else around
        waiting += [
            ((*place, key), value, inside) for key, value in items if isinstance(value, dict | list | tuple)
        ]


def _named_tensors(holder: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a dict, without the names of wrappers within theirs, where that leaves each its own."""
    tensors = {
        key: value for key, value in holder.items() if isinstance(key, str) and isinstance(value, Tensor)
    }
    bare = {key: ".".join(part for part in key.split(".") if part not in _WRAPPERS) for key in tensors}
    if len(set(bare.values())) < len(bare):
        return tensors
    return {bare[key]: value for key, value in tensors.items()}


def _unlike(found: list[_Candidate]) -> list[_Candidate]:
    """Those whose tensors are not the very ones of another before it."""
    kept: dict[object, _Candidate] = {}
    for each in found:
        kept.setdefault(frozenset((key, _memory(value)) for key, value in each.own().items()), each)
    return list(kept.values())


def _memory(value: Tensor) -> tuple[object, ...]:
    """Where the values are, and which."""
    if value.layout != torch.strided or value.is_nested:
        return (id(value),)
    return (value.data_ptr(), value.shape, value.stride())
