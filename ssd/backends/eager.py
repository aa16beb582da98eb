"""torch itself: a model in the same process, fused, and compiled if wanted."""

import copy
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssd.backends.base import Backend
from ssd.choices import Backbone, Precision
from ssd.devices import DTYPES, choose_precision, usable_device
from ssd.fused import FusedSSD, fuse, pack_weights
from ssd.model import SSD
from ssd.transforms import normalize


def of_model(model: SSD, precision: str | None = None, *, compile: bool = False) -> Backend:
    """A copy of a model, prepared for inference on its device; see `ssd.fused`.

    Args:
        model: in any precision and mode.
        precision: fp32, fp16 or bf16; by default that of the model's convolutions.
        compile: by torch.compile at the first images; takes about a minute and needs a C++ compiler.

    Raises:
        ValueError: the model has no weights, the precision is unknown, or there is no compiler.
    """
    first = next(model.parameters())
    if first.device.type == "meta":
        raise ValueError("this model has no weights: it is on the meta device")
    own = next((name for name, dtype in DTYPES.items() if dtype == first.dtype), "fp32")
    chosen = choose_precision(precision or own, first.device)
    if compile:
        _require_compiler(first.device)
    fast = fuse(model, DTYPES[chosen], pack=not compile)
    return _of_fused(fast, model.backbone, chosen, first.device, compile)


def _of_fused(
    fast: FusedSSD, backbone: Backbone, precision: Precision, device: torch.device, compile: bool
) -> Backend:
    dtype = DTYPES[precision]
    run: Callable[[Tensor], tuple[Tensor, ...]] = fast
    if compile:
        # No CUDA graphs: the next call, of whatever thread, would overwrite what this one gave.
        run = torch.compile(fast) if device.type == "cuda" else _compile_frozen(fast)
    return Backend(
        name="torch, compiled" if compile else "torch",
        precision=precision,
        device=device,
        forward=lambda pixels: run(normalize(pixels, dtype)),
        backbone=backbone,
        num_classes=fast.num_classes,
        layout=fast.layout,
        default_boxes=fast.default_boxes,
        # Weights travel as plain tensors on the CPU; a copy of a packed network is not packed.
        rebuild=lambda: (_rebuilt, (copy.deepcopy(fast).cpu(), backbone, precision, device, compile)),
    )


def _rebuilt(
    fast: FusedSSD, backbone: Backbone, precision: Precision, device: torch.device, compile: bool
) -> Backend:
    """A backend that was pickled, prepared for the processor or GPU here."""
    device = usable_device(device)
    fast = fast.to(device)
    if compile:
        _require_compiler(device)
    else:
        pack_weights(fast, DTYPES[precision])
    return _of_fused(fast, backbone, precision, device, compile)


def _require_compiler(device: torch.device) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # noqa: PLC0415
    from torch._inductor.exc import InvalidCxxCompiler  # noqa: PLC0415

    if device.type != "cpu":
        return
    try:
        found = shutil.which(get_cpp_compiler())
    except (InvalidCxxCompiler, OSError):  # torch tries to start what it is told to use
        found = None
    if not found:
        raise ValueError("compile needs a C++ compiler, such as g++; or leave compile out")


def _compile_frozen(network: nn.Module) -> Callable[[Tensor], tuple[Tensor, ...]]:
    # Freezing lets inductor lay out the weights; it works under no_grad, and not under inference_mode.
    compiled = torch.compile(network, options={"freezing": True})

    def run(images: Tensor) -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.no_grad():
            outputs: tuple[Tensor, ...] = compiled(images.clone())
        return outputs

    return run
