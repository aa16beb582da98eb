"""SSD: a ResNet trunk, additional blocks, and a pair of heads for each feature map."""

import copy
import os
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ssd import checkpoint, pretrained
from ssd.boxes import PUBLISHED_LAYOUT, Layout
from ssd.choices import BACKBONES, PRECISIONS, Backbone, Precision
from ssd.devices import DTYPES
from ssd.resnet import Trunk

# Of each feature map; a layout with fewer maps has the first of these, one with more repeats the last.
_OUT_CHANNELS: dict[Backbone, tuple[int, ...]] = {
    "resnet18": (256, 512, 512, 256, 256, 128),
    "resnet34": (256, 512, 512, 256, 256, 256),
    "resnet50": (1024, 512, 512, 256, 256, 256),
    "resnet101": (1024, 512, 512, 256, 256, 256),
    "resnet152": (1024, 512, 512, 256, 256, 256),
}
_MIDDLE_CHANNELS = (256, 256, 128, 128, 128)


class SSD(nn.Module):
    """SSD300 v1.1 as published by NVIDIA, of any layout, with BatchNorm after each head convolution.

    A state dict of the published model, whose heads have no BatchNorm, loads with ``strict=True``: the norms
    become identities, and outputs in eval mode are the published ones. To train on from the published
    function, or to save what NVIDIA's code loads, use ``head_norm=False``.

    Args:
        num_classes: with the background, which is class 0; at least 2.
        backbone: resnet18, resnet34, resnet50, resnet101 or resnet152.
        head_norm: BatchNorm after each head convolution.
        backbone_weights: what the trunk starts from: None for random values, "imagenet" for torchvision's
            best weights, the name of other torchvision weights ("IMAGENET1K_V1"), or a file with the state
            dict of a torchvision ResNet.
        layout: size of the input, feature maps and default boxes; by default the published ones.

    Raises:
        ValueError: unknown backbone or weights, or fewer than two classes.
        CheckpointError, DownloadError: the backbone's weights cannot be had.

    >>> loc, conf = SSD(num_classes=3, backbone="resnet18").eval()(torch.zeros(1, 3, 300, 300))
    >>> loc.shape, conf.shape
    (torch.Size([1, 4, 8732]), torch.Size([1, 3, 8732]))
    """

    def __init__(
        self,
        num_classes: int = 81,
        backbone: Backbone = "resnet50",
        head_norm: bool = True,
        backbone_weights: str | os.PathLike[str] | None = None,
        layout: Layout = PUBLISHED_LAYOUT,
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone {backbone!r} is none of {', '.join(BACKBONES)}")
        if num_classes < 2:
            raise ValueError(f"num_classes counts the background, so it is at least 2; got {num_classes}")
        self.num_classes = num_classes
        self.backbone = backbone
        self.head_norm = head_norm
        self.layout = layout

        count = len(layout.maps)
        channels = _repeated(_OUT_CHANNELS[backbone], count)
        self.feature_extractor = Trunk(backbone)
        self.additional_blocks = nn.ModuleList(
            _additional_block(c_in, c_mid, c_out, stride)
            for (c_in, c_out), c_mid, stride in zip(
                pairwise(channels), _repeated(_MIDDLE_CHANNELS, count - 1), layout.strides, strict=True
            )
        )
        shapes = layout.boxes_per_cell
        self.loc = nn.ModuleList(
            nn.Conv2d(c, n * 4, 3, padding=1) for c, n in zip(channels, shapes, strict=True)
        )
        self.conf = nn.ModuleList(
            nn.Conv2d(c, n * num_classes, 3, padding=1) for c, n in zip(channels, shapes, strict=True)
        )
        # Beside the convolutions and not inside them, so that `loc.0.weight` stays the published name.
        self.loc_norm = nn.ModuleList(nn.BatchNorm2d(n * 4) if head_norm else nn.Identity() for n in shapes)
        self.conf_norm = nn.ModuleList(
            nn.BatchNorm2d(n * num_classes) if head_norm else nn.Identity() for n in shapes
        )
        for module in (self.additional_blocks, self.loc, self.conf):
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        self.register_load_state_dict_pre_hook(_fill_missing_head_norms)  # type: ignore[no-untyped-call]

        if backbone_weights is not None:
            _load_backbone(self.feature_extractor.feature_extractor, backbone, backbone_weights)

    def at_half_size(self) -> "SSD":
        """The same network for images of half the size: without its last maps, and with the same tensors.

        Raises:
            ValueError: the layout has no half; see `ssd.boxes.Layout.halved`.
        """
        layout = self.layout.halved()
        if layout is None:
            raise ValueError(f"a layout of {self.layout.size} with maps {self.layout.maps} has no half")
        part = copy.copy(self)
        part.layout, part._modules = layout, dict(self._modules)
        count = len(layout.maps)
        part.additional_blocks = self.additional_blocks[: count - 1]
        part.loc, part.loc_norm = self.loc[:count], self.loc_norm[:count]
        part.conf, part.conf_norm = self.conf[:count], self.conf_norm[:count]
        return part

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Raw outputs of a batch.

        Args:
            images: ``[N, 3, size, size]`` of the layout, normalised, in the dtype of the convolutions.

        Returns:
            loc, the offsets ``[N, 4, B]`` of the B default boxes, and conf, the logits
            ``[N, num_classes, B]``, background first, both in the order of `Layout.default_boxes`.
            `ssd.postprocess` makes boxes of them.
        """
        features = self.feature_extractor(images)
        maps = [features]
        for block in self.additional_blocks:
            features = block(features)
            maps.append(features)
        loc: list[Tensor] = []
        conf: list[Tensor] = []
        for i, (loc_head, loc_norm, conf_head, conf_norm) in enumerate(
            zip(self.loc, self.loc_norm, self.conf, self.conf_norm)  # noqa: B905 (TorchScript has no strict=)
        ):
            # Made contiguous before the norm and not by flatten after it: the gradient comes back contiguous,
            # and a norm whose input is channels-last would take three times as long on a CPU.
            loc.append(loc_norm(loc_head(maps[i]).contiguous()).unflatten(1, (4, -1)).flatten(2))
            conf.append(
                conf_norm(conf_head(maps[i]).contiguous()).unflatten(1, (self.num_classes, -1)).flatten(2)
            )
        return torch.cat(loc, 2), torch.cat(conf, 2)


SSD300 = SSD
"""The published name."""


def _repeated(values: tuple[int, ...], count: int) -> tuple[int, ...]:
    return (values + values[-1:] * count)[:count]


def _additional_block(c_in: int, c_mid: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_mid, 1, bias=False),
        nn.BatchNorm2d(c_mid),
        nn.ReLU(inplace=True),
        nn.Conv2d(c_mid, c_out, 3, stride=stride, padding=stride - 1, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(inplace=True),
    )


def _fill_missing_head_norms(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Add identity norms to a state dict that has none (torch hands hooks a copy, never the caller's)."""
    norms = {
        f"{prefix}{kind}_norm.{i}": norm
        for kind in ("loc", "conf")
        for i, norm in enumerate(getattr(model, f"{kind}_norm"))
        if isinstance(norm, nn.BatchNorm2d) and f"{prefix}{kind}.{i}.weight" in state_dict
    }
    if any(f"{name}.weight" in state_dict for name in norms):
        return
    for name, norm in norms.items():
        ones = torch.ones(norm.num_features)
        state_dict[f"{name}.weight"] = ones
        state_dict[f"{name}.bias"] = torch.zeros_like(ones)
        state_dict[f"{name}.running_mean"] = torch.zeros_like(ones)
        # The norm divides by sqrt(running_var + eps), which has to be 1 exactly.
        state_dict[f"{name}.running_var"] = ones - norm.eps
        state_dict[f"{name}.num_batches_tracked"] = torch.tensor(0)


def set_precision(model: nn.Module, precision: Precision) -> None:
    """Convert a model in place: convolutions to `precision`, BatchNorm to fp32, as published.

    The input has to have the convolutions' dtype.

    Raises:
        ValueError: unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
    model.to(DTYPES[precision])
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # also SyncBatchNorm
            module.float()


def build(found: checkpoint.Checkpoint) -> SSD:
    """The network that a checkpoint describes, with random weights."""
    return SSD(found.num_classes, found.backbone, found.head_norm, layout=found.layout)


def load_model(
    weights: str | os.PathLike[str],
    *,
    precision: Precision = "fp32",
    sha256: str | None = None,
    force: bool = False,
    progress: bool = True,
) -> tuple[SSD, checkpoint.Checkpoint]:
    """The network that a checkpoint is for, with its weights, on the CPU.

    Backbone, number of classes and whether the heads have BatchNorm are read off the checkpoint. All of it
    is checked before a network is made.

    Args:
        weights: a path, an http(s) URL, ``hf://owner/repo``, or the name of published weights ("coco").
        precision: fp32, fp16 or bf16; see `set_precision`.
        sha256: the digest that the file must have, or the beginning of it.
        force: download anew.
        progress: show a progress bar for a download.

    Returns:
        The model, in training mode as any new module, and what the checkpoint says (it shares the tensors).

    Raises:
        DownloadError, CheckpointError, FileNotFoundError: see `ssd.checkpoint`.
    """
    path = pretrained.fetch(weights, sha256=sha256, force=force, progress=progress)
    with pretrained.loading(path, weights):
        found = checkpoint.read(path)
        with torch.device("meta"):  # no time or memory for random values that are replaced at once
            model = build(found)
        checkpoint.require_fit(path, found.state_dict, model.state_dict())
    # In memory as usual, whatever order (channels_last) they were saved in.
    model.load_state_dict({key: value.contiguous() for key, value in found.state_dict.items()}, assign=True)
    set_precision(model, precision)
    return model, found


def transfer(
    weights: str | os.PathLike[str],
    class_names: Sequence[str],
    *,
    backbone: Backbone | None = None,
    layout: Layout | None = None,
) -> tuple[SSD, str]:
    """A network that starts from a checkpoint, which may be of other classes and of another layout.

    The trunk, each additional block and each head are the checkpoint's where their tensors have the same
    names and shapes, class heads only where the classes are the same, too; the rest is new. A head is a start
    for default boxes of other scales and ratios as well, since what it gives is relative to them. The heads
    have BatchNorm if the checkpoint's have.

    Args:
        weights: a path, an http(s) URL, ``hf://owner/repo``, or the name of published weights ("coco").
        class_names: the network's classes, without the background.
        backbone: that of the checkpoint, or None.
        layout: the network's; None for that of the checkpoint.

    Returns:
        The model in fp32 on the CPU, and a line that says which parts were loaded and which are new.

    Raises:
        ValueError: the checkpoint has another backbone.
        DownloadError, CheckpointError, FileNotFoundError: see `ssd.checkpoint`.
    """
    source, found = load_model(weights)
    if backbone not in (None, source.backbone):
        raise ValueError(f"{weights} has the backbone {source.backbone}, not {backbone}")
    model = SSD(len(class_names) + 1, source.backbone, source.head_norm, layout=layout or source.layout)
    same_classes = found.class_names == tuple(class_names)
    theirs, parts = source.state_dict(), _parts(model)
    loaded = {
        (kind, number): tensors
        for (kind, number), tensors in parts.items()
        if (same_classes or kind != "conf")
        and all(key in theirs and theirs[key].shape == value.shape for key, value in tensors.items())
    }
    kept = {key: theirs[key] for tensors in loaded.values() for key in tensors}
    model.load_state_dict(kept, strict=False)

    line = f"SSD{model.layout.size} {model.backbone} from {weights}"
    if model.layout.size != source.layout.size:
        line += f" (SSD{source.layout.size})"
    elif model.layout != source.layout:
        line += " (another layout)"
    new = _listed([part for part in parts if part not in loaded], parts) or "nothing"
    if not same_classes:  # the list then ends with the class heads
        new += f" (other classes than its {len(found.class_names)})"
    return model, f"{line}: loaded {len(kept)} tensors ({_listed(loaded, parts)}); new: {new}"


_Part = tuple[str, str]
"""What a part of a network is, and its number; a head is a part with its norm."""


def _parts(model: SSD) -> dict[_Part, dict[str, Tensor]]:
    """The tensors of each part."""
    parts: dict[_Part, dict[str, Tensor]] = {}
    for key, value in model.state_dict().items():
        module, number, _ = key.split(".", 2)
        part = "trunk" if module == "feature_extractor" else module.removesuffix("_norm").replace("_", " ")
        parts.setdefault((part, "" if part == "trunk" else number), {})[key] = value
    return parts


def _listed(some: Collection[_Part], parts: Collection[_Part]) -> str:
    """Some of all parts, in words; numbers only where not all of a kind are meant.

    >>> _listed([("loc", "0"), ("conf", "1")], [("loc", "0"), ("conf", "0"), ("conf", "1")])
    'loc; conf 1'
    """
    texts = []
    for kind in dict.fromkeys(kind for kind, _ in some):
        numbers = [number for each, number in some if each == kind]
        whole = len(numbers) == sum(each == kind for each, _ in parts)
        texts.append(kind if whole else f"{kind} {', '.join(numbers)}")
    return "; ".join(texts)


def _load_backbone(trunk: nn.Sequential, backbone: Backbone, weights: str | os.PathLike[str]) -> None:
    path = pretrained.fetch_backbone(backbone, weights)
    stages = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6"}
    tensors = {}
    with pretrained.loading(path, weights):
        for key, value in checkpoint.read_trunk(path).items():
            module, rest = key.split(".", 1) if "." in key else (key, "")
            if module in stages:
                tensors[f"{stages[module]}.{rest}"] = value
        checkpoint.require_fit(path, tensors, trunk.state_dict())
    trunk.load_state_dict(tensors)
