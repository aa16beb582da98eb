"""Whether an exported file computes what torch does: proved when it is made, and again wherever it goes."""

import base64
import gzip
import math
import os
import platform
import re
import zlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssd import __version__
from ssd.backends.base import NMS, Backend, Metadata, Options, kind_of, load, reason
from ssd.boxes import Layout, decode
from ssd.errors import CheckpointError, ExportError, NonFiniteError
from ssd.model import SSD
from ssd.postprocess import postprocess
from ssd.shapes import draw_scene
from ssd.transforms import normalize, resize

TOLERANCES: dict[str, float] = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.08, "int8": 0.35}
"""Largest difference of any probability of any default box from torch in fp32. A box of an object's border
swings most; what counts is AP, which docs/performance.md gives."""

_BATCHES = [1, 2, 5]  # that an export is tried on

SEED = 8732
"""Of the images that files are proved on, here and elsewhere."""

_IMAGES = 4  # of them
_SHAPES = 6  # on each
_FROM_EACH_MAP = 12  # default boxes whose outputs travel
_MOST_TRAVELLING = 50  # detections of an image
_SLACK = 1.25  # by which int8 may differ more elsewhere than here

Found = tuple[Tensor, Tensor, Tensor]  # an image's boxes, scores and class ids, best first


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
    backend, read = _load(path)
    if read != metadata:
        raise ExportError(f"{path.name}: does not say the same of itself: {read}, not {metadata}")
    limit, allowed = TOLERANCES[metadata.precision], _allowed(metadata)
    compare = _compare_outputs if metadata.nms is None else _compare_detections
    scenes = _images_to_try(model.layout.size, pictures).split(_BATCHES)
    with torch.inference_mode():
        found = [compare(model, backend, images, limit) for images in scenes]
    worst = Difference(*np.max(found, axis=0).tolist())  # NaN if any of them is
    if not _within(worst, allowed):
        raise ExportError(
            f"{path.name}: {backend.name} in {metadata.precision} does not compute what torch does in fp32; "
            f"largest differences: {_told(worst, allowed)}. It was removed"
        )
    return worst


def _load(path: Path) -> tuple[Backend, Metadata]:
    """An exported file on the CPU, in its own precision: OpenVINO would choose bf16 by itself."""
    backend, metadata = load(path, torch.device("cpu"))
    if metadata.precision == "fp32" and backend.precision != "fp32":
        return load(path, torch.device("cpu"), "fp32")
    return backend, metadata


def _allowed(metadata: Metadata) -> Difference:
    limit = TOLERANCES[metadata.precision]
    lost = 0.005 if metadata.precision == "fp32" else 0.25
    return Difference(limit, limit if metadata.nms else limit / 10, lost)


def _within(found: Difference, allowed: Difference) -> bool:
    return all(number <= most for number, most in zip(found, allowed, strict=True))


def _told(found: Difference, allowed: Difference) -> str:
    return ", ".join(
        f"{name} {number:.2g} (allowed {most:.2g})"
        for name, number, most in zip(found._fields, found, allowed, strict=True)
    )


def _images_to_try(size: int, pictures: Tensor | None = None) -> Tensor:
    """Eight images to compare on: an empty one first, then scenes, noise, and some of `pictures`."""
    rng = np.random.default_rng(SEED)
    # Not quite flat: default boxes side by side would have equal scores, and any order of them be right.
    empty = torch.from_numpy(rng.integers(120, 136, (size, size, 3), np.uint8))
    noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))
    shown = [resize(image, size) for image in (*(draw_scene(rng)[0] for _ in range(6)), noise)]
    images = torch.stack([empty, *shown])
    if pictures is not None:
        images[1:6] = pictures[torch.linspace(0, len(pictures) - 1, 5).long()]
    return images


def _compare_outputs(model: SSD, backend: Backend, images: Tensor, limit: float) -> Difference:
    expected, found = (
        _probabilities_and_boxes(loc, conf, model.layout)
        for loc, conf in (model(normalize(images)), backend.forward(images))
    )
    score, box = ((ours - theirs).abs() for theirs, ours in zip(expected, found, strict=True))
    return Difference(float(score.max()), float(box.mean()), 0.0)


def _probabilities_and_boxes(loc: Tensor, conf: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Of all classes ``[N, C, B]``; within the image ``[N, B, 4]``."""
    return conf.softmax(1), decode(loc.transpose(1, 2), layout.default_boxes()).clamp(0, 1)


def _compare_detections(model: SSD, backend: Backend, images: Tensor, limit: float) -> Difference:
    nms = backend.nms or NMS()
    return _apart(_detections(backend, nms, images), _expected(model, nms, images), nms, limit)


def _detections(backend: Backend, nms: NMS, images: Tensor) -> list[Found]:
    options = Options(nms.score_threshold, nms.iou_threshold, nms.max_detections)
    return backend.finish(backend.forward(images), options).per_image()


def _expected(model: SSD, nms: NMS, images: Tensor) -> list[Found]:
    """What torch finds, by the options of a file with NMS."""
    loc, conf = model(normalize(images))
    found = postprocess(
        loc,
        conf,
        model.layout.default_boxes(),
        score_threshold=nms.score_threshold,
        iou_threshold=nms.iou_threshold,
        max_detections=nms.max_detections,
    )
    return found.per_image()


def _apart(found: Sequence[Found], expected: Sequence[Found], nms: NMS, limit: float) -> Difference:
    lost = total = 0
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        for (boxes, scores, class_ids), others in ((ours, theirs), (theirs, ours)):
            sure = scores > nms.score_threshold + 2 * limit  # the others may have fallen below
            if len(others[1]) in (nms.max_detections, _MOST_TRAVELLING):
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


# --- Proof that travels -----------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What came of proving a file again."""

    runtime: str
    found: Difference
    """Here, on the images of its proof."""
    allowed: Difference
    largest: Difference
    """Where it was exported, on the images that it was tried on there."""
    versions: dict[str, str]
    """Of what computed it here."""
    exported_by: dict[str, str]
    """Those of where it was exported."""
    accuracy: str
    """What the weights that it was made of reached; empty if that was not known."""

    @property
    def is_proved(self) -> bool:
        """Whether the file computes here what torch did where it was exported."""
        return _within(self.found, self.allowed)


def verify(path: str | os.PathLike[str]) -> Verdict:
    """Prove an exported file again, on this machine, in its runtime, by what it carries.

    Args:
        path: what ``ssd export`` wrote: a file, OpenVINO's folder, that of ``--standalone``, or a page.

    Raises:
        CheckpointError: it carries no proof, as those of earlier versions; or it cannot be read.
        FileNotFoundError: there is no such file.
        MissingExtra: its runtime is not installed.
    """
    place = Path(path)
    with TemporaryDirectory() as folder:
        if place.is_file() and place.suffix.lower() in (".html", ".htm"):
            model = Path(folder) / "model.onnx"
            model.write_bytes(_model_of_page(place))
        else:
            model = place / "model.onnx" if (place / "model.onnx").is_file() else place
        backend, metadata = _load(model)
        if metadata.proof is None:
            raise CheckpointError(
                f"{place}: carries no proof, as files that earlier versions exported; export it again"
            )
        try:
            allowed, largest = (
                Difference(*(float(metadata.proof[key][name]) for name in Difference._fields))
                for key in ("allowed", "largest")
            )
            then = {str(name): str(each) for name, each in metadata.proof["versions"].items()}
            found = _repeat(backend, metadata.proof["reference"])
        except NonFiniteError:
            found = Difference(math.nan, math.nan, math.nan)
        except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{place}: its proof cannot be used ({reason(error)})") from error
        accuracy = str(metadata.proof.get("accuracy", ""))
        return Verdict(backend.name, found, allowed, largest, versions(model), then, accuracy)


def _model_of_page(page: Path) -> bytes:
    found = re.search(rb'<script type="text/plain" id="model">([A-Za-z0-9+/=]+)</script>', page.read_bytes())
    try:
        if found is None:
            raise ValueError("there is no model in it")
        return gzip.decompress(base64.b64decode(found[1], validate=True))
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise CheckpointError(
            f"{page}: is no whole page of ssd export --html ({reason(error)}); export it again"
        ) from error


def proof_of(model: SSD, path: Path, metadata: Metadata, worst: Difference, accuracy: str) -> dict[str, Any]:
    """What a file is to carry: how it was proved, and what to compare it with where its model is not.

    Args:
        model: that it was made of, in eval mode.
        path: the file, which was proved.
        metadata: what it says of itself.
        worst: what `prove` gave.
        accuracy: what the weights reached, for people; empty if that is not known.

    Returns:
        For JSON: "versions"; "accuracy"; "seed" of the images; the "largest" differences, and the "allowed"
        ones; and a "reference": what torch gives for `seeded_images`.
    """
    images = seeded_images(model.layout.size)
    reference: Any
    with torch.inference_mode():
        if metadata.nms is None:
            loc, conf = model(normalize(images))
            sample = _sample(loc, conf, model.layout)
            reference = {name: [_rounded(each) for each in values] for name, values in sample.items()}
        else:
            reference = [
                [_rounded(each[:_MOST_TRAVELLING]) for each in found]
                for found in _expected(model, metadata.nms, images)
            ]
    allowed = _allowed(metadata)
    if metadata.precision == "int8":  # calibrated on other images, it may be further off on these
        here = _repeat(_load(path)[0], reference)
        allowed = Difference(*np.maximum(allowed, _SLACK * np.array(here)).tolist())
    return {
        "versions": versions(path),
        "accuracy": accuracy,
        "seed": SEED,
        "largest": worst._asdict(),
        "allowed": allowed._asdict(),
        "reference": reference,
    }


def versions(path: str | os.PathLike[str]) -> dict[str, str]:
    """Of what an exported file is computed by here."""
    runtime = {"onnx": ["onnxruntime"], "openvino": ["openvino"]}.get(kind_of(path) or "", [])
    return {
        "ssd300": __version__,
        **{name: version(name) for name in ("torch", "numpy", *runtime)},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def seeded_images(size: int) -> Tensor:
    """Images that are the same to the bit on every machine, so that a proof need not hold them.

    Of whole numbers alone, by numpy's RandomState, whose numbers never change: discs, squares and triangles
    over a gradient, and noise.

    Returns:
        uint8 ``[4, size, size, 3]``.
    """
    rng = np.random.RandomState(SEED)

    def numbers(low: int, high: int, shape: Any = 1) -> Any:
        return rng.randint(low, high, shape, np.int32).astype(np.int64)

    y, x = np.mgrid[:size, :size].astype(np.int64)
    images = []
    for _ in range(_IMAGES):
        start, end = numbers(0, 256, (2, 3))
        image = start + (end - start) * x[..., None] // size
        for _ in range(_SHAPES):
            (left, top), radius, kind = numbers(0, size, 2), numbers(size // 16, size // 4), numbers(0, 3)
            across, down = abs(x - left), y - top
            inside = (
                across**2 + down**2 <= radius**2,
                np.maximum(across, abs(down)) <= radius,
                (2 * across <= down + radius) & (abs(down) <= radius),
            )[kind.item()]
            image[inside] = numbers(0, 256, 3)
        image += numbers(-8, 9, image.shape)
        images.append(image.clip(0, 255).astype(np.uint8))
    return torch.from_numpy(np.stack(images))


def _repeat(backend: Backend, reference: Any) -> Difference:
    """How far a file is from the reference that it carries."""
    images = seeded_images(backend.layout.size)
    limit = TOLERANCES[backend.precision]
    with torch.inference_mode():
        parts = images.split([1, _IMAGES - 1])
        if backend.nms is not None:
            found = [each for part in parts for each in _detections(backend, backend.nms, part)]
            expected = [
                (
                    torch.tensor(boxes).reshape(-1, 4),
                    torch.tensor(scores),
                    torch.tensor(ids, dtype=torch.int64),
                )
                for boxes, scores, ids in reference
            ]
            most = [tuple(values[:_MOST_TRAVELLING] for values in each) for each in found]
            return _apart(most, expected, backend.nms, limit)  # type: ignore[arg-type]
        outputs = [backend.forward(part) for part in parts]
        samples = [_sample(loc, conf, backend.layout) for loc, conf in outputs]
    apart = {
        name: (torch.cat([sample[name] for sample in samples]).flatten(1) - torch.tensor(values)).abs()
        for name, values in reference.items()
    }
    worst = max(apart["highest"].max().item(), apart["scores"].max().item())
    return Difference(worst, apart["boxes"].mean().item(), 0.0)


def _sample(loc: Tensor, conf: Tensor, layout: Layout) -> dict[str, Tensor]:
    """What travels of raw outputs.

    Returns:
        The highest probability of each class, ``[N, C]``; of some default boxes of each map the best
        probability of an object, ``[N, P]``, and the corners within the image, ``[N, P, 4]``.
    """
    probabilities, boxes = _probabilities_and_boxes(loc, conf, layout)
    picked, start = [], 0
    for count in layout.boxes_per_map:
        picked += [start + each * count // _FROM_EACH_MAP for each in range(_FROM_EACH_MAP)]
        start += count
    return {
        "highest": probabilities.amax(2),
        "scores": probabilities[:, 1:].amax(1)[:, picked],
        "boxes": boxes[:, picked],
    }


def _rounded(values: Tensor) -> list[Any]:
    if not values.is_floating_point():
        return list(values.tolist())
    return [round(each, 5) for each in values.flatten().tolist()]
