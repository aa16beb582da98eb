"""The network in what a file of weights holds.

A checkpoint may wrap its tensors in dicts of any names (``{"state_dict": ...}``), and their names in those of
wrappers (``module._orig_mod.``).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssd.containers import Left, NotDamaged, new_name
from ssd.errors import CheckpointError, as_line, shown


class Network(NamedTuple):
    """The tensors of one network, and what stood around them."""

    tensors: dict[str, Tensor]
    """By the network's own names."""
    beside: dict[str, Tensor]
    """What lies in the same dict and is no network's, by its full name."""
    around: tuple[Mapping[Any, Any], ...]
    """The dicts that hold it, innermost first."""


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
_MOST_NETWORKS = 20  # that are told apart
_AVERAGE = re.compile(r"(?<![a-z])ema(?![a-z])|modelema|emamodel|averag|(?<![a-z])swa(?![a-z])|shadow|polyak")
_AS_TRAINED = "current_model_state"  # beside it, Lightning's "state_dict" is the average


class _Candidate(NamedTuple):
    place: tuple[Any, ...]
    prefix: str
    tensors: dict[str, Tensor]
    around: tuple[Mapping[Any, Any], ...]

    def is_average(self) -> bool:
        names = [each for each in (*self.place, self.prefix) if isinstance(each, str)]
        return bool(_AVERAGE.search(".".join(names).lower()))

    def name(self) -> str:
        place = "".join(f"[{shown(each)}]" for each in self.place)
        return f"{place} {as_line(self.prefix, 60)}*".strip() if self.prefix or not place else place

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
    found = list(islice(_candidates(content, sought.marks), _MOST_NETWORKS))
    unlike = _unlike(found)
    chosen = [each for each in unlike if each.is_average()] or unlike
    chosen = [each for each in chosen if _AS_TRAINED not in each.place] or chosen
    if not chosen:
        raise CheckpointError(f"{path}: {_why_none(content, sought)}")
    if len(chosen) > 1:
        raise NotDamaged(f"{path}: {_why_not_one(path, chosen)}")  # whose advice needs it
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
    count = f"{'at least ' * (len(chosen) == _MOST_NETWORKS)}{len(chosen)}"
    told = f"holds {count} networks: {names}. Save the one that you mean alone"
    if len(wanted) > 200:
        return told
    return (
        f"{told}, as by: import torch; from ssd import containers; "
        f"c, _ = containers.read({str(path)!r}); torch.save({wanted}, {new_name(path)!r})"
    )


def _why_none(content: object, sought: Sought) -> str:
    state_dict = max((_named_tensors(each) for _, each, _ in _holders(content)), key=len, default={})
    if state_dict:
        theirs = next((name for name, marks in _OTHERS if all(each in state_dict for each in marks)), "")
        looks = f"its tensors are named as those of {theirs}; " if theirs else ""
        return f"not {sought.name}; {looks}it begins with {first_names(state_dict)}. {sought.advice}"
    is_wrapped = isinstance(content, dict) and isinstance(content.get("model"), dict)
    inner = content["model"] if is_wrapped else content  # type: ignore[index]
    if not isinstance(inner, dict) or not inner:
        return f"holds a {type(inner).__name__}, not a dict of tensors"
    key, value = next(iter(inner.items()))
    kind = "an array or other object" if isinstance(value, Left) else f"a {type(value).__name__}"
    return (
        f"{shown(key)} is {kind}, not a tensor with a name; expected a state dict, or a dict "
        'that has one, as under "model"'
    )


def first_names(state_dict: Iterable[str]) -> str:
    """What a state dict begins with, for messages."""
    return ", ".join(as_line(key, 100) for key in islice(state_dict, 3))


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
