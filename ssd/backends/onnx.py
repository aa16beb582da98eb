"""ONNX files in ONNX Runtime."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssd.backends import graph
from ssd.backends.base import (
    METADATA,
    Backend,
    Metadata,
    of_file,
    parse_metadata,
    quiet,
    require_own_precision,
)
from ssd.devices import usable_device
from ssd.model import SSD
from ssd.postprocess import MOST_PER_CLASS


def load_file(path: Path, device: torch.device | None, precision: str) -> tuple[Backend, Metadata]:
    """See `ssd.backends`."""
    import onnxruntime  # noqa: PLC0415

    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    asked = device is not None
    device = device or usable_device(None if has_cuda else "cpu")
    if device.type == "cuda" and not has_cuda:
        raise ValueError(f"{path}: this ONNX Runtime has no CUDA; install onnxruntime-gpu, or use the CPU")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=providers)
    if device.type == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        if asked:  # it only logs that it could not load its CUDA libraries, and goes on with the CPU
            raise ValueError(
                f"{path}: ONNX Runtime cannot use CUDA here; its own CUDA and cuDNN libraries do not load"
            )
        device = torch.device("cpu")
    metadata = parse_metadata(path, session.get_modelmeta().custom_metadata_map.get(METADATA))
    require_own_precision(path, metadata, precision)

    def run(images: Tensor) -> list[Tensor]:
        # ONNX Runtime brings arrays to its device by itself.
        return [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]

    name = "ONNX Runtime" if device.type == "cpu" else f"ONNX Runtime on {device}"
    return of_file(name, metadata, torch.device("cpu"), run), metadata


def write(
    model: SSD, path: Path, metadata: Metadata, images: Tensor | None = None
) -> Callable[[Metadata], None]:
    """See `ssd.backends`."""
    import onnxruntime  # noqa: F401, PLC0415 (the result will be tried in it)
    import onnxscript  # noqa: PLC0415

    with quiet():
        program = torch.onnx.export(
            graph.Graph(model, metadata, graph.suppress),
            (graph.example_input(metadata),),
            dynamo=True,
            opset_version=18,
            input_names=["images"],
            output_names=graph.output_names(metadata),
            dynamic_shapes=graph.dynamic_shapes(metadata),
            custom_translation_table={torch.ops.ssd.suppress.default: _onnx_suppress(onnxscript)},
            verbose=False,
        )
    assert program is not None  # it is None for the old exporter

    def save(metadata: Metadata) -> None:
        program.model.metadata_props[METADATA] = metadata.to_json()
        program.save(path, external_data=False)

    save(metadata)
    return save


def _onnx_suppress(onnxscript: Any) -> Callable[..., Any]:
    op = onnxscript.opset18

    def suppress(boxes: Any, scores: Any, iou_threshold: float) -> Any:
        limit = op.Constant(value_int=MOST_PER_CLASS)
        # Candidates are those above 0; what is selected is (group, 0, index in the group).
        selected = op.NonMaxSuppression(
            boxes,
            op.Unsqueeze(scores, op.Constant(value_ints=[1])),
            op.Reshape(limit, op.Constant(value_ints=[1])),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[0.0]),
        )
        indices = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
        none = op.Mul(scores, op.Constant(value_float=0.0))
        return op.ScatterND(none, indices, op.GatherND(scores, indices))

    return suppress
