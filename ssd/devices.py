"""Devices that can be used here, and the precisions that they compute in."""

import os

import torch

from ssd.choices import PRECISIONS, Precision

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def usable_device(device: torch.device | str | None = None) -> torch.device:
    """A device that works here: by default CUDA where there is one (under torchrun, one for each process).

    Raises:
        ValueError: there is no such device; the message says what to choose.
    """
    name = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        there = torch.empty(1, device=torch.device(name))
        there.cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {name!r} cannot be used here; choose 'cpu' or, where there is a GPU, 'cuda'"
        ) from error
    return there.device  # with an index, which torch.cuda.set_device asks for


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


def choose_precision(wanted: str, device: torch.device) -> Precision:
    """The precision that "auto" stands for on a device: bf16 where it computes that natively, else fp32.

    Raises:
        ValueError: unknown precision.
    """
    if wanted == "auto":
        return "bf16" if "bf16" in native_precisions(device) else "fp32"
    if wanted not in PRECISIONS:
        raise ValueError(f"precision {wanted!r} is none of auto, {', '.join(PRECISIONS)}")
    return wanted


def is_emulated(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device is a CPU without instructions for a precision."""
    if device.type != "cpu" or dtype not in DTYPES.values():
        return False
    return dtype not in [DTYPES[each] for each in native_precisions(device)]
