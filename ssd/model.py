"""SSD300: a ResNet trunk, five additional blocks, six pairs of heads."""

import os
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torchvision.models
from torch import Tensor, nn

from ssd import checkpoint as checkpoints
from ssd.boxes import BOXES_PER_CELL

Backbone = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
Precision = Literal["fp32", "fp16", "bf16"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_OUT_CHANNELS = {
    "resnet18": (256, 512, 512, 256, 256, 128),
    "resnet34": (256, 512, 512, 256, 256, 256),
    "resnet50": (1024, 512, 512, 256, 256, 256),
    "resnet101": (1024, 512, 512, 256, 256, 256),
    "resnet152": (1024, 512, 512, 256, 256, 256),
}
_MIDDLE_CHANNELS = (256, 256, 128, 128, 128)


class Trunk(nn.Module):
    """A torchvision ResNet up to conv4_x, whose strides are 1: ``[N, 3, 300, 300]`` -> ``[N, C, 38, 38]``."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        resnet = torchvision.models.get_model(backbone, weights=None)
        first = resnet.layer3[0]
        for conv in (first.conv1, first.conv2, first.downsample[0]):
            conv.stride = (1, 1)
        # One flat Sequential under this name: the keys of published checkpoints depend on it.
        self.feature_extractor = nn.Sequential(*list(resnet.children())[:7])

    def forward(self, images: Tensor) -> Tensor:
        """Features of conv4_x."""
        features: Tensor = self.feature_extractor(images)
        return features


class SSD300(nn.Module):
    """SSD300 v1.1 as published by NVIDIA, with BatchNorm after each head convolution.

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

    Raises:
        ValueError: unknown backbone or weights, or fewer than two classes.
        CheckpointError, DownloadError: the backbone's weights cannot be had.

    >>> loc, conf = SSD300(num_classes=3, backbone="resnet18").eval()(torch.zeros(1, 3, 300, 300))
    >>> loc.shape, conf.shape
    (torch.Size([1, 4, 8732]), torch.Size([1, 3, 8732]))
    """

    def __init__(
        self,
        num_classes: int = 81,
        backbone: Backbone = "resnet50",
        head_norm: bool = True,
        backbone_weights: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if backbone not in _OUT_CHANNELS:
            raise ValueError(f"backbone {backbone!r} is none of {', '.join(_OUT_CHANNELS)}")
        if num_classes < 2:
            raise ValueError(f"num_classes counts the background, so it is at least 2; got {num_classes}")
        self.num_classes = num_classes
        self.backbone = backbone
        self.head_norm = head_norm

        channels = _OUT_CHANNELS[backbone]
        self.feature_extractor = Trunk(backbone)
        self.additional_blocks = nn.ModuleList(
            _additional_block(c_in, c_mid, c_out, downsample=i < 3)
            for i, (c_in, c_mid, c_out) in enumerate(
                zip(channels[:-1], _MIDDLE_CHANNELS, channels[1:], strict=True)
            )
        )
        self.loc = nn.ModuleList(
            nn.Conv2d(c, n * 4, 3, padding=1) for c, n in zip(channels, BOXES_PER_CELL, strict=True)
        )
        self.conf = nn.ModuleList(
            nn.Conv2d(c, n * num_classes, 3, padding=1) for c, n in zip(channels, BOXES_PER_CELL, strict=True)
        )
        # Beside the convolutions and not inside them, so that `loc.0.weight` stays the published name.
        self.loc_norm = nn.ModuleList(
            nn.BatchNorm2d(n * 4) if head_norm else nn.Identity() for n in BOXES_PER_CELL
        )
        self.conf_norm = nn.ModuleList(
            nn.BatchNorm2d(n * num_classes) if head_norm else nn.Identity() for n in BOXES_PER_CELL
        )
        for module in (self.additional_blocks, self.loc, self.conf):
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        self.register_load_state_dict_pre_hook(_fill_missing_head_norms)  # type: ignore[no-untyped-call]

        if backbone_weights is not None:
            _load_backbone(self.feature_extractor.feature_extractor, backbone, backbone_weights)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Raw outputs of a batch.

        Args:
            images: ``[N, 3, 300, 300]``, normalised, in the dtype of the convolutions.

        Returns:
            loc, the offsets ``[N, 4, 8732]``, and conf, the logits ``[N, num_classes, 8732]``, background
            first, both in the order of `ssd.boxes.default_boxes`. `ssd.postprocess` makes boxes of them.
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


def _additional_block(c_in: int, c_mid: int, c_out: int, *, downsample: bool) -> nn.Sequential:
    stride, padding = (2, 1) if downsample else (1, 0)
    return nn.Sequential(
        nn.Conv2d(c_in, c_mid, 1, bias=False),
        nn.BatchNorm2d(c_mid),
        nn.ReLU(inplace=True),
        nn.Conv2d(c_mid, c_out, 3, stride=stride, padding=padding, bias=False),
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
    if precision not in DTYPES:
        raise ValueError(f"precision {precision!r} is none of {', '.join(DTYPES)}")
    model.to(DTYPES[precision])
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # also SyncBatchNorm
            module.float()


def native_precisions(device: torch.device) -> tuple[Precision, ...]:
    """The precisions that a device computes in hardware; the others work too, but slowly."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("fp32", "fp16", "bf16") if bf16 else ("fp32", "fp16")
    if device.type == "cpu":
        found: tuple[Precision, ...] = ("fp32",)
        if torch.cpu._is_amx_fp16_supported():
            found += ("fp16",)
        if torch.cpu._is_avx512_bf16_supported():
            found += ("bf16",)
        return found
    return ("fp32",)


def load_model(
    weights: str | os.PathLike[str],
    *,
    precision: Precision = "fp32",
    sha256: str | None = None,
    force: bool = False,
    progress: bool = True,
) -> tuple[SSD300, checkpoints.Checkpoint]:
    """The network that a checkpoint is for, with its weights, on the CPU.

    Backbone, number of classes and whether the heads have BatchNorm are read off the checkpoint. All of it
    is checked before a network is made.

    Args:
        weights: a path, an http(s) URL, or the name of published weights ("coco").
        precision: fp32, fp16 or bf16; see `set_precision`.
        sha256: the digest that the file must have, or the beginning of it.
        force: download anew.
        progress: show a progress bar for a download.

    Returns:
        The model, in training mode as any new module, and what the checkpoint says (it shares the tensors).

    Raises:
        DownloadError, CheckpointError, FileNotFoundError: see `ssd.checkpoint`.
    """
    path = checkpoints.fetch(weights, sha256=sha256, force=force, progress=progress)
    found = checkpoints.read(path)
    with torch.device("meta"):  # no time or memory for random values that are replaced at once
        model = SSD300(found.num_classes, cast(Backbone, found.backbone), found.head_norm)
    checkpoints.check(path, found.state_dict, model.state_dict())
    checkpoints.trust(path)
    model.load_state_dict(found.state_dict, assign=True)
    set_precision(model, precision)
    return model, found


def transfer(
    weights: str | os.PathLike[str], class_names: Sequence[str], *, backbone: Backbone | None = None
) -> tuple[SSD300, str]:
    """A network for new classes that starts from a checkpoint.

    Trunk, additional blocks and the box heads are the checkpoint's; so are the class heads if the classes
    are, and they are new otherwise. The heads have BatchNorm if the checkpoint's have.

    Args:
        weights: a path, an http(s) URL, or the name of published weights ("coco").
        class_names: the new classes, without the background.
        backbone: that of the checkpoint, or None.

    Returns:
        The model in fp32 on the CPU, and a line that says what was loaded, what is new, and what was skipped.

    Raises:
        ValueError: the checkpoint has another backbone.
        DownloadError, CheckpointError, FileNotFoundError: see `ssd.checkpoint`.
    """
    source, found = load_model(weights)
    if backbone not in (None, source.backbone):
        raise ValueError(f"{weights} has the backbone {source.backbone}, not {backbone}")
    if found.class_names == tuple(class_names):
        return source, f"SSD300 {source.backbone} from {weights}: everything loaded, the classes are the same"
    model = SSD300(len(class_names) + 1, source.backbone, source.head_norm)
    kept = {key: value for key, value in source.state_dict().items() if not key.startswith("conf")}
    new = [key for key in model.state_dict() if key not in kept]
    model.load_state_dict(kept, strict=False)
    return model, (
        f"SSD300 {source.backbone} from {weights}: loaded {len(kept)} tensors (trunk, additional blocks, "
        f"loc); skipped the class heads of its {len(found.class_names)} classes; {len(new)} tensors for "
        f"{len(class_names)} classes are new ({new[0]} to {new[-1]})"
    )


def _load_backbone(trunk: nn.Sequential, backbone: Backbone, weights: str | os.PathLike[str]) -> None:
    known = torchvision.models.get_model_weights(backbone)
    name = "DEFAULT" if weights == "imagenet" else os.fspath(weights)
    if name in known.__members__:
        url = known[name].url
        # torchvision's file names end in the beginning of their SHA-256.
        path = checkpoints.fetch(url, sha256=url.rsplit("-", 1)[-1].split(".")[0])
    elif os.path.isfile(name):
        path = checkpoints.fetch(name)
    else:
        raise ValueError(
            f"no backbone weights {name!r}: pass a file, 'imagenet', or one of {', '.join(known.__members__)}"
        )
    places = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6"}
    tensors = {}
    for key, value in checkpoints.read_tensors(path).items():
        module, rest = key.split(".", 1) if "." in key else (key, "")
        if module in places:
            tensors[f"{places[module]}.{rest}"] = value
    checkpoints.check(path, tensors, trunk.state_dict())
    checkpoints.trust(path)
    trunk.load_state_dict(tensors)
