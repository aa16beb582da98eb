"""OpenVINO's folders of model.xml and model.bin."""

import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssd.backends import onnx
from ssd.backends.base import (
    METADATA,
    Backend,
    Metadata,
    network_input,
    of_file,
    parse_metadata,
    quiet,
    require_own_precision,
)
from ssd.devices import choose_precision
from ssd.model import SSD


@cache
def _core(runtime: Callable[[], Any]) -> Any:
    """OpenVINO's runtime: one in this process, which is kept.

    On processors with AMX, the first use of a runtime gives the thread another stack for signals, and its end
    puts back the one that was there before, even if that is gone with another runtime: the next signal with a
    handler, such as Ctrl-C, then kills the process (seen with OpenVINO 2026.4).
    """
    return runtime()


def load_file(path: Path, device: torch.device | None, precision: str) -> tuple[Backend, Metadata]:
    """See `ssd.backends`; the folder, or the model.xml in it."""
    import openvino  # noqa: PLC0415

    if device is not None and device.type != "cpu":
        raise ValueError(f"{path}: OpenVINO runs on the CPU here, not on {device}")
    file = path / "model.xml" if path.is_dir() else path
    core = _core(openvino.Core)
    model = core.read_model(file)
    text = model.get_rt_info([METADATA]).astype(str) if model.has_rt_info([METADATA]) else None
    metadata = parse_metadata(path, text)
    if metadata.precision == "int8":
        require_own_precision(path, metadata, precision)
        precision = "auto"  # of what is not quantised
    around = choose_precision(precision, torch.device("cpu"))
    if around == "fp16" and "FP16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ValueError(
            f"{path}: OpenVINO does not compute in fp16 on this processor; use auto, bf16 or fp32"
        )
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}[around],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request, lock = compiled.create_infer_request(), threading.Lock()

    def run(images: Tensor) -> list[Tensor]:
        with lock:  # a request serves one thread at a time
            results = request.infer([images.numpy()], share_inputs=True)
            return [torch.from_numpy(results[output].copy()) for output in compiled.outputs]

    shown = metadata.precision if metadata.precision == "int8" else around
    return of_file("OpenVINO", metadata, torch.device("cpu"), run, shown), metadata


def write(
    model: SSD, path: Path, metadata: Metadata, images: Tensor | None = None
) -> Callable[[Metadata], None]:
    """See `ssd.backends`; by way of an ONNX file."""
    import openvino  # noqa: PLC0415

    path.mkdir()
    file = path / "model.onnx"
    onnx.write(model, file, metadata)
    with quiet():  # OpenVINO 2025.0 asks torch.export first, which tells at length that it is none of its own
        converted = openvino.convert_model(file)
    if images is not None:
        _core(openvino.Core)  # before those that nncf makes and ends
        converted = _quantize(converted, metadata, images)

    def save(metadata: Metadata) -> None:
        converted.set_rt_info(metadata.to_json(), [METADATA])
        try:
            openvino.save_model(converted, path / "model.xml", compress_to_fp16=False)
        except RuntimeError as error:  # "iostream error" is all that it says of a full disk
            raise OSError(f"OpenVINO could not write {path} ({error}); is the disk full?") from error

    save(metadata)
    file.unlink()
    return save


def _quantize(model: Any, metadata: Metadata, images: Tensor) -> Any:
    import nncf  # noqa: PLC0415

    convolutions = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]
    inputs = [network_input(image[None], metadata).numpy() for image in images]
    with quiet():
        return nncf.quantize(
            model,
            nncf.Dataset(inputs),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(inputs),
            # The stem sees pixels, and there are few operations to save. The heads do a quarter of the work,
            # and in float they would save 0.0005 of AP (docs/performance.md).
            ignored_scope=nncf.IgnoredScope(names=[convolutions[0].get_friendly_name()]),
        )
