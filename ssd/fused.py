"""From a trained network to a fast one: the same function with fewer and better-shaped operations."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssd.boxes import Layout
from ssd.devices import is_emulated
from ssd.model import SSD


class Conv(nn.Module):
    """A convolution with what follows it: BatchNorm folded in, a residual added, ReLU.

    Copied or pickled while packed, it is not packed any more: only the processor that packed it knows how.

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
        """Bring the weight into the order that oneDNN wants for inputs of a shape; on a CPU only.

        Channels of zeros fill the output up to a multiple of 16, a whole vector, which saves a fifth of the
        time of the largest head.
        """
        self._channels = len(self.weight)
        missing = -self._channels % 16
        self.bias = nn.Parameter(functional.pad(self.bias, (0, missing)), requires_grad=False)
        weight = functional.pad(self.weight, (0, 0) * 3 + (0, missing)).to_mkldnn()
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        self._packed = reorder(weight, self.padding, self.stride, (1, 1), 1, shape)
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)  # not twice in memory

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self._packed is not None:
            whole = {"weight": self._packed.to_dense(), "bias": self.bias}
            parameters = {
                name: nn.Parameter(values[: self._channels].clone(), requires_grad=False)
                for name, values in whole.items()
            }
            state |= {"_parameters": parameters, "_packed": None}
        return state

    def widen(self) -> None:
        """Keep weights in float32, and convolve in it, for inputs and outputs in fp16 or bf16.

        Processors with instructions for these precisions compute the same: products and sums are float32
        there too. On others torch falls back to loops that take forty times as long as this.
        """
        self.weight = nn.Parameter(self.weight.float(), requires_grad=False)
        self.bias = nn.Parameter(self.bias.float(), requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Of ``[N, C, H, W]``; the result may be written into `residual`."""
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

    BatchNorm is folded into the convolutions, and the two heads of a feature map are one convolution, whose
    output channels are ordered so that a channels-last result needs no transposition. Boxes then come by map,
    by cell, and by their number in the cell, and `default_boxes` are in the same order. There is no way back
    to a checkpoint.
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
            _merged(Conv(loc, loc_norm, relu=False), Conv(conf, conf_norm, relu=False), boxes)
            for loc, loc_norm, conf, conf_norm, boxes in zip(*heads, layout.boxes_per_cell, strict=True)
        )
        self.register_buffer("default_boxes", _by_cell(layout), persistent=False)

    def levels(self, images: Tensor) -> list[Tensor]:
        """What the heads give for each feature map: ``[N, B * (4 + C), H, W]``.

        B is the number of default boxes of a cell; each has its 4 numbers of loc, then its C of conf.
        """
        x = self.trunk(self.pool(self.stem(images)))
        outputs = [self.heads[0](x)]
        for block, head in zip(self.additional_blocks, self.heads[1:], strict=True):
            x = block(x)
            outputs.append(head(x))
        return outputs

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Raw outputs of a batch.

        Args:
            images: ``[N, 3, size, size]`` of the layout, normalised, in the dtype of the convolutions;
                channels-last is fast.

        Returns:
            loc ``[N, 4, P]`` and conf ``[N, num_classes, P]`` of the P default boxes, in the order of the
            `default_boxes` of this module; views of memory where each box has its numbers side by side.
        """
        levels = self.levels(images)
        numbers = 4 + self.num_classes
        merged = levels[0].new_empty(images.shape[0], len(self.default_boxes), numbers)
        start = 0
        for level, boxes in zip(levels, self.layout.boxes_per_cell, strict=True):
            cells = level[:, : boxes * numbers].permute(0, 2, 3, 1)  # [N, H, W, B * (4 + C)]
            end = start + cells.shape[1] * cells.shape[2] * boxes
            merged[:, start:end].view(cells.shape).copy_(cells)
            start = end
        merged = merged.transpose(1, 2)
        return merged[:, :4], merged[:, 4:]


def _by_cell(layout: Layout) -> Tensor:
    """Default boxes in the order in which channels-last maps hold them: by map, by cell, then within it."""
    levels = layout.default_boxes().split(layout.boxes_per_map)
    return torch.cat(
        [
            level.unflatten(0, (boxes, -1)).transpose(0, 1).flatten(0, 1)
            for level, boxes in zip(levels, layout.boxes_per_cell, strict=True)
        ]
    )


def _merged(loc: Conv, conf: Conv, boxes: int) -> Conv:
    """Both heads of a feature map as one; for each box of a cell, loc's channels and then conf's."""

    def by_box(name: str) -> nn.Parameter:
        parts = [getattr(head, name).unflatten(0, (-1, boxes)) for head in (loc, conf)]
        return nn.Parameter(torch.cat(parts).transpose(0, 1).flatten(0, 1).contiguous(), requires_grad=False)

    loc.weight, loc.bias = by_box("weight"), by_box("bias")
    return loc


def fuse(model: SSD, dtype: torch.dtype | None = None, *, pack: bool = True) -> FusedSSD:
    """A fast copy of a trained model, on its device.

    In float32 its outputs agree with those of ``model.eval()`` to 1e-4 (on CUDA, where torch by default lets
    convolutions round to TF32, less closely).

    Args:
        model: in any precision and mode; not changed.
        dtype: of the fast one; by default that of the model's convolutions.
        pack: as `pack_weights` does. What is packed can neither be moved to another device, nor compiled or
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
    for conv in _convs(fast):
        conv.to(dtype=dtype).to(memory_format=torch.channels_last)
    if pack:
        pack_weights(fast, dtype)
    return fast


def pack_weights(fast: FusedSSD, dtype: torch.dtype) -> None:
    """Bring the weights into the form that is fastest where they are, in place.

    That is oneDNN's own on CPUs where it can be used; float32 on CPUs that cannot compute in `dtype`; on
    other devices, what they are.

    Args:
        fast: of `fuse` without packing, or a copy of a packed one.
        dtype: what the network takes and gives.
    """
    device = fast.default_boxes.device
    for conv in _convs(fast):
        conv.to(dtype=dtype).to(memory_format=torch.channels_last)
    if can_pack(device, dtype):
        for conv, shape in _input_shapes(fast).items():
            conv.pack(shape)
    elif is_emulated(device, dtype):
        for conv in _convs(fast):
            conv.widen()


def _convs(fast: FusedSSD) -> list[Conv]:
    return [module for module in fast.modules() if isinstance(module, Conv)]


def _input_shapes(fast: FusedSSD) -> dict[Conv, tuple[int, ...]]:
    """What each convolution takes for one image; the order that is best for one image serves more as well.

    By arithmetic: to try it on the meta device would import torch's compiler, which takes seconds.
    """
    shapes: dict[Conv, tuple[int, ...]] = {}

    def cells_after(conv: Any, cells: int) -> int:
        shapes[conv] = (1, conv.weight.shape[1], cells, cells)
        return int((cells + 2 * conv.padding[0] - conv.weight.shape[2]) // conv.stride[0] + 1)

    cells = math.ceil(cells_after(fast.stem, fast.layout.size) / 2)  # and the pool halves it
    trunk: Any = fast.trunk
    for block in trunk:
        if block.downsample is not None:
            cells_after(block.downsample, cells)
        for conv in block.convs:
            cells = cells_after(conv, cells)
    blocks: Any = [(), *fast.additional_blocks]
    for block, head in zip(blocks, fast.heads, strict=True):
        for conv in block:
            cells = cells_after(conv, cells)
        cells_after(head, cells)
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
