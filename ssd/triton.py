"""A model repository for NVIDIA's Triton Inference Server."""

import os
import re
import shutil
from pathlib import Path

import torch

from ssd.backends.base import Metadata, kind_of, load
from ssd.errors import CheckpointError
from ssd.files import gone_if_unused, sync_file, take_new, temporary_folder, writing


def write_triton(onnx: str | os.PathLike[str], folder: str | os.PathLike[str], name: str = "ssd300") -> Path:
    """A Triton model repository with an exported ONNX file; returns the model's folder in it.

    Raises:
        FileExistsError: the repository has a model of this name.
        CheckpointError: not an ONNX file of `ssd.export.export`.
        ValueError: a name that Triton would not take.
    """
    if not re.fullmatch(r"\w[\w-]*", name):
        raise ValueError(f"{name!r}: a model's name is letters, digits, - and _")
    if kind_of(onnx) != "onnx":
        raise CheckpointError(f"{onnx}: Triton is to run an .onnx file")
    _, metadata = load(onnx, torch.device("cpu"))
    home = Path(folder) / name
    if home.exists():
        raise FileExistsError(f"{folder} has a model {name} already; remove it, or choose another folder")
    labels = "".join(f"{' '.join(label.split())}\n" for label in metadata.class_names)
    with gone_if_unused(home.parent):
        home.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(home) as made, writing(home):
            new = made / name
            (new / "1").mkdir(parents=True)
            shutil.copyfile(onnx, new / "1" / "model.onnx")
            (new / "labels.txt").write_text(labels)
            (new / "config.pbtxt").write_text(_config(name, metadata))
            for file in ("1/model.onnx", "labels.txt", "config.pbtxt"):
                sync_file(new / file)
            take_new([(new, home)])
    return home


def _config(name: str, metadata: Metadata) -> str:
    size, boxes = metadata.layout.size, metadata.layout.num_default_boxes
    image = ("TYPE_UINT8", [size, size, 3]) if metadata.uint8 else ("TYPE_FP32", [3, size, size])
    outputs: list[tuple[str, str, list[int]]]
    if metadata.nms:
        most = metadata.nms.max_detections
        outputs = [
            ("boxes", "TYPE_FP32", [most, 4]),
            ("scores", "TYPE_FP32", [most]),
            ("class_ids", "TYPE_INT64", [most]),
            ("counts", "TYPE_INT64", []),
        ]
    else:
        num_classes = len(metadata.class_names) + 1
        outputs = [("loc", "TYPE_FP32", [4, boxes]), ("conf", "TYPE_FP32", [num_classes, boxes])]

    def entry(name: str, kind: str, shape: list[int]) -> str:
        dims = shape if metadata.batch is None else [metadata.batch, *shape]
        # Triton has no empty shape: a number for each image is a dimension of 1 that is reshaped away.
        reshape = "" if dims else ", reshape: { shape: [] }"
        return f'  {{ name: "{name}", data_type: {kind}, dims: {dims or [1]}{reshape} }}'

    lines = [f'name: "{name}"', 'backend: "onnxruntime"']
    # 0: the batch is part of the shapes, as the file has only one size.
    lines += ["max_batch_size: 0"] if metadata.batch else ["max_batch_size: 64", "dynamic_batching { }"]
    lines += ["input [", entry("images", *image), "]"]
    lines += ["output [", ",\n".join(entry(*output) for output in outputs), "]"]
    return "\n".join(lines) + "\n"
