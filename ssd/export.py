"""Checkpoints to ONNX, OpenVINO, torch.export and TorchScript, each compared with torch before it is kept."""

import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssd.backends import BACKENDS
from ssd.backends.base import (
    MAX_BATCH,
    NMS,
    Backend,
    Metadata,
    Options,
    kind_of,
    load,
    most_detections,
    needing_extra,
)
from ssd.boxes import decode
from ssd.errors import ExportError
from ssd.files import gone_if_unused, mode_of, replace_together, sync_file, temporary_folder, writing
from ssd.images import ImageSource, load_image
from ssd.model import SSD, load_model
from ssd.shapes import draw_scene
from ssd.sources import find_images
from ssd.transforms import normalize, resize
from ssd.triton import write_triton

__all__ = ["Difference", "ExportError", "calibration_images", "export", "prove", "write_triton"]

TOLERANCES: dict[str, float] = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.08, "int8": 0.35}
"""Largest difference of any probability of any default box from torch in fp32. A box of an object's border
swings most; what counts is AP, which docs/performance.md gives."""

MAX_CALIBRATION = 300
_BATCHES = [1, 2, 5]  # that an export is tried on


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
    with torch in fp32.

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
                    import_module(BACKENDS[format].module).write(model, made, content, pictures)
                prove(model, made, content, pictures)
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


# --- Proof ------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """How far an exported file is from torch in fp32."""

    score: float
    """Largest difference of a probability; for files with NMS, of a detection found by both."""
    box: float
    """Mean difference of a corner within the image, normalised, over all default boxes; for files with NMS,
    the largest of a detection found by both."""
    lost: float
    """For files with NMS: part of the detections that only one of both found, in [0, 1]."""


def prove(model: SSD, path: Path, metadata: Metadata, pictures: Tensor | None = None) -> Difference:
    """Run an exported file in its runtime and compare it with the model.

    Raises:
        ExportError: they differ by more than the precision explains.
    """
    # OpenVINO would choose bf16 by itself.
    exact = metadata.precision == "fp32"
    wanted = "fp32" if exact else "auto"
    backend, read = load(path, torch.device("cpu"), wanted)
    if read != metadata:
        raise ExportError(f"{path.name}: does not say the same of itself: {read}, not {metadata}")
    limit = TOLERANCES[metadata.precision]
    allowed = Difference(limit, limit if metadata.nms else limit / 10, 0.005 if exact else 0.25)
    compare = _compare_outputs if metadata.nms is None else _compare_detections
    scenes = _images_to_try(model.layout.size, pictures).split(_BATCHES)
    with torch.inference_mode():
        found = [compare(model, backend, images, limit) for images in scenes]
    worst = Difference(*np.max(found, axis=0).tolist())  # NaN if any of them is
    if not all(number <= most for number, most in zip(worst, allowed, strict=True)):
        numbers = ", ".join(
            f"{name} {number:.2g} (allowed {most:.2g})"
            for name, number, most in zip(worst._fields, worst, allowed, strict=True)
        )
        raise ExportError(
            f"{path.name}: {backend.name} in {metadata.precision} does not compute what torch does in fp32; "
            f"largest differences: {numbers}. It was removed"
        )
    return worst


def _images_to_try(size: int, pictures: Tensor | None = None) -> Tensor:
    """Eight images to compare on: an empty one first, then scenes, noise, and some of `pictures`."""
    rng = np.random.default_rng(8732)
    # Not quite flat: default boxes side by side would have equal scores, and any order of them be right.
    empty = torch.from_numpy(rng.integers(120, 136, (size, size, 3), np.uint8))
    noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))
    shown = [resize(image, size) for image in (*(draw_scene(rng)[0] for _ in range(6)), noise)]
    images = torch.stack([empty, *shown])
    if pictures is not None:
        images[1:6] = pictures[torch.linspace(0, len(pictures) - 1, 5).long()]
    return images


def _compare_outputs(model: SSD, backend: Backend, images: Tensor, limit: float) -> Difference:
    outputs = [model(normalize(images)), backend.forward(images)]
    scores = [conf.softmax(1) for _, conf in outputs]
    default_boxes = model.layout.default_boxes()
    boxes = [decode(loc.transpose(1, 2), default_boxes).clamp(0, 1) for loc, _ in outputs]
    score, box = ((ours - theirs).abs() for theirs, ours in (scores, boxes))
    return Difference(float(score.max()), float(box.mean()), 0.0)


def _compare_detections(model: SSD, backend: Backend, images: Tensor, limit: float) -> Difference:
    nms = backend.nms or NMS()
    options = Options(nms.score_threshold, nms.iou_threshold, nms.max_detections)
    loc, conf = model(normalize(images))
    raw = replace(backend, default_boxes=model.layout.default_boxes(), nms=None)
    expected = raw.finish((loc, conf), options)
    found = backend.finish(backend.forward(images), options)
    lost = total = 0
    worst = 0.0
    for ours, theirs in zip(found.per_image(), expected.per_image(), strict=True):
        for (boxes, scores, class_ids), others in ((ours, theirs), (theirs, ours)):
            sure = scores > nms.score_threshold + 2 * limit  # the others may have fallen below
            if len(others[1]) == nms.max_detections:
                sure &= scores > others[1][-1] + 2 * limit
            # Of each pair ``[K, L]`` the larger of the differences of box and score.
            apart = (boxes[sure].clamp(0, 1)[:, None] - others[0].clamp(0, 1)).abs().amax(2)
            apart = apart.maximum((scores[sure][:, None] - others[1]).abs())
            apart = apart.where(class_ids[sure][:, None] == others[2], torch.inf)
            nearest = apart.amin(1) if len(others[1]) else scores[sure] + torch.inf
            total += len(nearest)
            lost += int((nearest > limit).sum())
            worst = max(worst, *nearest[nearest <= limit].tolist(), 0.0)
    return Difference(worst, worst, lost / max(total, 1))
