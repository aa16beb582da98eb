"""Checkpoints to ONNX, OpenVINO, torch.export and TorchScript, each compared with torch before it is kept."""

import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ssd.backends import BACKENDS
from ssd.backends.base import (
    MAX_BATCH,
    NMS,
    Metadata,
    kind_of,
    most_detections,
    needing_extra,
)
from ssd.card import accuracy_of
from ssd.errors import ExportError
from ssd.files import gone_if_unused, mode_of, replace_together, sync_file, temporary_folder, writing
from ssd.images import ImageSource, load_image
from ssd.model import load_model
from ssd.proof import TOLERANCES, Difference, proof_of, prove, verify
from ssd.sources import find_images
from ssd.transforms import resize
from ssd.triton import write_triton

__all__ = [
    "TOLERANCES",
    "Difference",
    "ExportError",
    "calibration_images",
    "export",
    "prove",
    "verify",
    "write_triton",
]

MAX_CALIBRATION = 300


def export(
    weights: str | os.PathLike[str],
    path: str | os.PathLike[str],
    format: str = "onnx",
    *,
    nms: bool = False,
    uint8: bool = False,
    batch: int | None = None,
    precision: str = "fp32",
    calibrate: str | os.PathLike[str] | None = None,
) -> Path:
    """Export a checkpoint, and prove that the result computes the same.

    It is run in its runtime on scenes, noise and an empty image, one, two and five at a time, and compared
    with torch in fp32. It carries the proof, and what `ssd.proof.verify` repeats it by elsewhere.

    Args:
        weights: as for `ssd.load_model`.
        path: the file to write; for OpenVINO a folder. What is there is replaced once the new one is proved.
        format: onnx, openvino, pt2 (torch.export) or torchscript: a name in `ssd.backends.BACKENDS`.
        nms: end with NMS (score 0.05, IoU 0.5, at most 200 of an image, as published for validation), with
            the padded outputs boxes ``[N, 200, 4]``, scores, class_ids and counts (see
            `ssd.postprocess.PaddedDetections`); else with loc ``[N, 4, B]`` and conf ``[N, C, B]`` of the B
            default boxes, 8732 in the published layout.
        uint8: take uint8 ``[N, size, size, 3]`` RGB and normalise inside; else normalised float32
            ``[N, 3, size, size]``; the published size is 300.
        batch: the only batch size; None for any.
        precision: one that `BACKENDS` has for the format. Inputs and outputs are float32 whatever it is.
        calibrate: for int8, a folder of images like those that will be detected on; 300 are enough.

    Returns:
        `path`.

    Raises:
        ExportError: the result differs from torch; both numbers are in the message.
        MissingExtra: a package is missing; the message has the command that installs it.
        ValueError: choices that do not go together.
        CheckpointError, DownloadError, FileNotFoundError: see `ssd.load_model`.
    """
    _require_sense(format, precision, batch, calibrate)
    path = Path(path)
    if kind_of(weights):
        raise ValueError(f"{weights} is exported already; export the checkpoint that it was made of")
    _require_free(path, format)
    model, found = load_model(weights)
    model.eval().requires_grad_(False)
    # A tiny layout has fewer default boxes than that.
    most = min(NMS.max_detections, most_detections(model.layout, model.num_classes))
    metadata = Metadata(
        class_names=found.class_names,
        category_ids=found.category_ids,
        backbone=model.backbone,
        precision=precision,
        uint8=uint8,
        batch=batch,
        nms=NMS(max_detections=most) if nms else None,
        layout=model.layout,
        score_thresholds=found.score_thresholds,
        calibration=found.calibration,
    )
    pictures = calibration_images(calibrate, model.layout.size) if calibrate is not None else None
    with gone_if_unused(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(path) as folder, writing(path):
            # Detections show few of the default boxes, so that a file with NMS is proved without it first.
            for content in [replace(metadata, nms=None), metadata] if nms else [metadata]:
                made = folder / ("with NMS" if content.nms else "raw") / (path.name or "export")
                made.parent.mkdir()
                with needing_extra(format):
                    save = import_module(BACKENDS[format].module).write(model, made, content, pictures)
                worst = prove(model, made, content, pictures)
            content = replace(content, proof=proof_of(model, made, content, worst, accuracy_of(weights)))
            save(content)
            if not verify(made).is_proved:
                raise ExportError(
                    f"{path.name}: does not give the same when it is loaded anew. It was removed"
                )
            names = BACKENDS[format].folder
            for file in [made / name for name in names] or [made]:
                sync_file(file)
            if names:
                replace_together(made, path, names)
            else:
                mode_of(path)  # nothing but a file is replaced
                os.replace(made, path)
    return path


def _require_sense(
    format: str, precision: str, batch: int | None, calibrate: str | os.PathLike[str] | None
) -> None:
    if format not in BACKENDS:
        raise ValueError(f"format {format!r} is none of {', '.join(BACKENDS)}")
    known = BACKENDS[format].precisions
    if precision not in known:
        homes = [name for name, kind in BACKENDS.items() if precision in kind.precisions]
        hint = f"; {precision} goes with {' and '.join(homes)}" if homes else ""
        raise ValueError(f"{format} holds {', '.join(known)}, not {precision}{hint}")
    if precision == "int8" and calibrate is None:
        raise ValueError("int8 needs calibrate: a folder of images like those that will be detected on")
    if precision != "int8" and calibrate is not None:
        raise ValueError(f"calibrate is for int8, not for {precision}")
    if batch is not None and not (type(batch) is int and 1 <= batch <= MAX_BATCH):
        raise ValueError(f"batch must be a whole number, at least 1 and at most {MAX_BATCH}; got {batch!r}")


def _require_free(path: Path, format: str) -> None:
    kind = BACKENDS[format]
    if not kind.folder:
        if path.suffix.lower() != kind.ending:
            raise ValueError(f"{path}: the name has to end in {kind.ending}, by which Detector.load knows it")
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
    elif path.is_file() or (path.is_dir() and {file.name for file in path.iterdir()} - set(kind.folder)):
        raise FileExistsError(f"{path} is no folder of an earlier export; choose another path")


def calibration_images(folder: str | os.PathLike[str], size: int) -> Tensor:
    """At most 300 images of a folder, evenly over it, resized: uint8 ``[K, size, size, 3]``.

    Raises:
        ValueError: there are none.
        ImageError: one cannot be read.
    """
    found = list(find_images(folder))
    if not found:
        raise ValueError(f"no images to calibrate with in {folder}")
    picked = found[:: max(1, -(-len(found) // MAX_CALIBRATION))]
    return torch.stack(
        [resize(load_image(cast(ImageSource, image), name=name), size) for name, image in picked]
    )
