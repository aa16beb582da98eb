"""From a trained network to a fast one: the same function with fewer and better-shaped operations."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssd.boxes import Layout
from ssd.devices import is_emulated
from ssd.model import SSD


class Conv(nn.Module):
    """A convolution with what follows it: BatchNorm folded in, a residual added, ReLU.

    Args:
        conv: in any precision.
        norm: that follows it, in eval mode; or nn.Identity.
        relu: at the end.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, *, relu: bool) -> None:
        super().__init__()
        self.stride, self.padding, self.relu = conv.stride, conv.padding, relu
        # In float64, so that folding itself loses nothing.
        weight = conv.weight.double()
        bias = conv.bias.double() if conv.bias is not None else weight.new_zeros(len(weight))
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            weight = weight * scale[:, None, None, None]
            bias = (bias - norm.running_mean.double()) * scale + norm.bias.double()
        self.weight = nn.Parameter(weight.detach().float(), requires_grad=False)
        self.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
        self._packed: Tensor | None = None

    def pack(self, shape: tuple[int, ...]) -> None:
        """Bring the weight into the layout that oneDNN wants for inputs of a shape; on a CPU only.

        Channels of zeros fill the output up to a multiple of 16, a whole vector, which saves a fifth of the
        time of the largest head.
        """
        missing = -len(self.weight) % 16
        self.bias = nn.Parameter(functional.pad(self.bias, (0, missing)), requires_grad=False)
        weight = functional.pad(self.weight, (0, 0) * 3 + (0, missing)).to_mkldnn()
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        self._packed = reorder(weight, self.padding, self.stride, (1, 1), 1, shape)
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)  # not twice in memory

    def widen(self) -> None:
        """Convolve in float32 what is rounded to fp16 or bf16 before and after.

        That is what processors with instructions for those do. On others torch falls back to loops that take
        forty times as long as this.
        """
        self.weight = nn.Parameter(self.weight.float(), requires_grad=False)
        self.bias = nn.Parameter(self.bias.float(), requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Of ``[N, C, H, W]``; a packed one writes into `residual`."""
        if self._packed is not None:
            shape = self.padding, self.stride, (1, 1), 1
            if residual is None:
                return torch.ops.mkldnn._convolution_pointwise(  # type: ignore[no-any-return]
                    x, self._packed, self.bias, *shape, "relu" if self.relu else "none", [], ""
                )
            return torch.ops.mkldnn._convolution_pointwise_.binary(  # type: ignore[no-any-return]
                residual,
                x,
                self._packed,
                self.bias,
                *shape,
                "add",
                1.0,
                "relu" if self.relu else None,
                [],
                "",
            )
        wide = x.to(self.weight.dtype)
        x = functional.conv2d(wide, self.weight, self.bias, self.stride, self.padding).to(x.dtype)
        if residual is not None:
            x = x + residual
        return x.relu() if self.relu else x


class Block(nn.Module):
    """A residual block of ResNet, basic or bottleneck."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        pairs = [
            (getattr(block, f"conv{i}"), getattr(block, f"bn{i}"))
            for i in (1, 2, 3)
            if hasattr(block, f"conv{i}")
        ]
        self.convs = nn.ModuleList(Conv(conv, norm, relu=True) for conv, norm in pairs)
        self.downsample = (
            Conv(*block.downsample, relu=False) if isinstance(block.downsample, nn.Sequential) else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Of ``[N, C, H, W]``, which may be overwritten."""
        residual = x if self.downsample is None else self.downsample(x)
        for conv in self.convs[:-1]:
            x = conv(x)
        last: Tensor = self.convs[-1](x, residual)
        return last


class FusedSSD(nn.Module):
    """What an SSD computes in eval mode, prepared for inference; made by `fuse`.

    BatchNorm is folded into the convolutions, and the two heads of a level are one convolution, whose output
    channels are ordered so that a channels-last result needs no transposition: boxes come by place, then by
    shape, and `default_boxes` are in the same order. There is no way back to a checkpoint.
    """

    default_boxes: Tensor

    def __init__(self, model: SSD) -> None:
        super().__init__()
        self.num_classes = model.num_classes
        trunk: Any = model.feature_extractor.feature_extractor
        blocks: Any = model.additional_blocks
        self.stem = Conv(trunk[0], trunk[1], relu=True)
        self.pool = trunk[3]
        self.trunk = nn.Sequential(*(Block(block) for stage in trunk[4:] for block in stage))
        self.additional_blocks = nn.ModuleList(
            nn.Sequential(Conv(block[0], block[1], relu=True), Conv(block[3], block[4], relu=True))
            for block in blocks
        )
        self.layout = layout = model.layout
        heads: Any = (model.loc, model.loc_norm, model.conf, model.conf_norm)
        self.heads = nn.ModuleList(
            _merged(Conv(loc, loc_norm, relu=False), Conv(conf, conf_norm, relu=False), shapes)
            for loc, loc_norm, conf, conf_norm, shapes in zip(*heads, layout.boxes_per_cell, strict=True)
        )
        self.register_buffer("default_boxes", _by_place(layout), persistent=False)

    def levels(self, images: Tensor) -> list[Tensor]:
        """What the heads give, ``[N, S * (4 + C), H, W]`` of each level: loc and conf of each of S shapes."""
        x = self.trunk(self.pool(self.stem(images)))
        outputs = [self.heads[0](x)]
        for block, head in zip(self.additional_blocks, self.heads[1:], strict=True):
            x = block(x)
            outputs.append(head(x))
        return outputs

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Raw outputs of a batch.

        Args:
            images: ``[N, 3, size, size]`` of the layout, normalised, in the dtype of the convolutions; channels-last is fast.

        Returns:
            loc ``[N, 4, B]`` and conf ``[N, num_classes, B]``, in the order of the `default_boxes` of
            this module; views of memory where each box has its numbers side by side.
        """
        levels = self.levels(images)
        numbers = 4 + self.num_classes
        merged = levels[0].new_empty(images.shape[0], len(self.default_boxes), numbers)
        start = 0
        for level, shapes in zip(levels, self.layout.boxes_per_cell, strict=True):
            places = level[:, : shapes * numbers].permute(0, 2, 3, 1)  # [N, H, W, S * (4 + C)]
            end = start + places.shape[1] * places.shape[2] * shapes
            merged[:, start:end].view(places.shape).copy_(places)
            start = end
        merged = merged.transpose(1, 2)
        return merged[:, :4], merged[:, 4:]


def _by_place(layout: Layout) -> Tensor:
    """Default boxes in the order in which channels-last maps hold them: by map, then place, then shape."""
    levels = layout.default_boxes().split(layout.boxes_per_map)
    return torch.cat(
        [
            level.unflatten(0, (shapes, -1)).transpose(0, 1).flatten(0, 1)
            for level, shapes in zip(levels, layout.boxes_per_cell, strict=True)
        ]
    )


def _merged(loc: Conv, conf: Conv, shapes: int) -> Conv:
    """Both heads of a level as one; of each shape, loc's channels and then conf's."""

    def by_shape(values: str) -> nn.Parameter:
        parts = [getattr(head, values).unflatten(0, (-1, shapes)) for head in (loc, conf)]
        return nn.Parameter(torch.cat(parts).transpose(0, 1).flatten(0, 1).contiguous(), requires_grad=False)

    loc.weight, loc.bias = by_shape("weight"), by_shape("bias")
    return loc


def fuse(model: SSD, dtype: torch.dtype | None = None, *, pack: bool = True) -> FusedSSD:
    """A fast copy of a trained model, on its device.

    In float32 its outputs agree with those of ``model.eval()`` to 1e-4 (on CUDA, where torch by default lets
    convolutions round to TF32, less closely).

    Args:
        model: in any precision and mode; not changed.
        dtype: of the fast one; by default that of the model's convolutions.
        pack: bring weights into oneDNN's layout, on CPUs where it can be used, or into float32 on those that
            cannot compute in `dtype`. What is packed can neither be copied to another device, nor compiled or
            exported.

    >>> model = SSD(num_classes=3, backbone="resnet18").eval()
    >>> with torch.inference_mode():
    ...     loc, conf = fuse(model)(torch.zeros(1, 3, 300, 300))
    >>> loc.shape, conf.shape
    (torch.Size([1, 4, 8732]), torch.Size([1, 3, 8732]))
    """
    weight = next(model.parameters())
    dtype = dtype or weight.dtype
    # Folded on the CPU where the device has no float64; and default boxes go where the weights are.
    source = copy.deepcopy(model).cpu() if weight.device.type == "mps" else model
    fast = FusedSSD(source).to(weight.device).eval()
    for module in fast.modules():
        if isinstance(module, Conv):
            module.to(dtype=dtype).to(memory_format=torch.channels_last)
    if pack and can_pack(weight.device, dtype):
        for conv, shape in _input_shapes(fast).items():
            conv.pack(shape)
    elif pack and is_emulated(weight.device, dtype):
        for module in fast.modules():
            if isinstance(module, Conv):
                module.widen()
    return fast


def _input_shapes(fast: FusedSSD) -> dict[Conv, tuple[int, ...]]:
    """What each convolution takes for one image; the layout that is best for one serves more as well."""
    shapes: dict[Conv, tuple[int, ...]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, Conv):
            shapes[module] = tuple(inputs[0].shape)

    weights = {name: value.to("meta") for name, value in fast.named_parameters()}  # nothing is computed
    images = torch.empty(
        1, 3, fast.layout.size, fast.layout.size, dtype=fast.stem.weight.dtype, device="meta"
    )
    hooks = [module.register_forward_pre_hook(note) for module in fast.modules()]
    try:
        torch.func.functional_call(fast, weights, (images,))
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has what packed convolutions need."""
    # These operations are what inductor compiles convolutions to on CPUs; torch documents neither them nor
    # any other way to have oneDNN add residuals and apply ReLU while it computes a convolution.
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise_"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
