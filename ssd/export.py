"""Checkpoints to ONNX, OpenVINO, torch.export and TorchScript, each compared with torch before it is kept."""

import contextlib
import io
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ssd import backends
from ssd.backends import MAX_BATCH, METADATA, NMS, Backend, Metadata, Options
from ssd.boxes import BOXES_PER_CELL, INPUT_SIZE, decode, default_boxes
from ssd.checkpoint import CheckpointError, telling_of_full_disk
from ssd.images import find_images, load_image
from ssd.inference import prepare
from ssd.model import DTYPES, SSD300, load_model
from ssd.postprocess import overlap
from ssd.shapes import draw_scene
from ssd.transforms import MEAN, STD, normalize, resize

Format = Literal["onnx", "openvino", "pt2", "torchscript"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]

PRECISIONS: dict[Format, tuple[Precision, ...]] = {
    "onnx": ("fp32", "fp16"),
    "openvino": ("fp32", "int8"),
    "pt2": ("fp32", "fp16", "bf16"),
    "torchscript": ("fp32", "fp16", "bf16"),
}
"""What each format can hold. OpenVINO chooses between fp32 and bf16 when it loads a file."""

TOLERANCES: dict[str, float] = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.08, "int8": 0.35}
"""Largest difference of any probability of any default box from torch in fp32. A box of an object's border
swings most; what counts is AP, which docs/performance.md gives."""

MAX_CALIBRATION = 300
_IR_FILES = ("model.bin", "model.xml")
_BATCHES = [1, 2, 5]  # that an export is tried on
_PER_CLASS = 200  # candidates of a class that take part in NMS, as `ssd.postprocess`


class ExportError(RuntimeError):
    """An exported file does not compute what torch does; it was removed."""


def export(
    weights: str | os.PathLike[str],
    path: str | os.PathLike[str],
    format: Format = "onnx",
    *,
    nms: bool = False,
    uint8: bool = False,
    batch: int | None = None,
    precision: Precision = "fp32",
    calibrate: str | os.PathLike[str] | None = None,
) -> Path:
    """Export a checkpoint, and prove that the result computes the same.

    It is run in its runtime on scenes, noise and an empty image, one, two and five at a time, and compared
    with torch in fp32.

    Args:
        weights: as for `ssd.load_model`.
        path: the file to write; for OpenVINO a folder. What is there is replaced once the new one is proved.
        format: onnx, openvino, pt2 (torch.export) or torchscript.
        nms: end with NMS (score 0.05, IoU 0.5, at most 200 of an image, as published for validation), with
            the padded outputs boxes ``[N, 200, 4]``, scores, class_ids and counts (see
            `ssd.postprocess.PaddedDetections`); else with loc ``[N, 4, 8732]`` and conf ``[N, C, 8732]``.
        uint8: take uint8 ``[N, 300, 300, 3]`` RGB and normalise inside; else normalised float32
            ``[N, 3, 300, 300]``.
        batch: the only batch size; None for any.
        precision: see `PRECISIONS`. Inputs and outputs are float32 whatever it is.
        calibrate: for int8, a folder of images like those that will be detected on; 300 are enough.

    Returns:
        `path`.

    Raises:
        ExportError: the result differs from torch; both numbers are in the message.
        ImportError: a package is missing; the message names the command.
        ValueError: choices that do not go together.
        CheckpointError, DownloadError, FileNotFoundError: see `ssd.load_model`.
    """
    _require_sense(format, precision, batch, calibrate)
    path = Path(path)
    if backends.format_of(weights):
        raise ValueError(f"{weights} is exported already; export the checkpoint that it was made of")
    _require_place(path, format)
    model, found = load_model(weights)
    model.eval().requires_grad_(False)
    metadata = Metadata(
        class_names=found.class_names,
        category_ids=found.category_ids,
        backbone=model.backbone,
        precision=precision,
        uint8=uint8,
        batch=batch,
        nms=NMS() if nms else None,
    )
    pictures = calibration_images(calibrate) if calibrate is not None else None
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that moving it there is renaming.
    temporary = tempfile.TemporaryDirectory(prefix=f".{path.name or 'export'}-", dir=path.parent)
    with telling_of_full_disk(path), temporary as folder:
        # Detections show few of the default boxes, so that a file with NMS is proved without it first.
        for each in [replace(metadata, nms=None), metadata] if nms else [metadata]:
            made = Path(folder) / ("with NMS" if each.nms else "raw") / (path.name or "ir")
            made.parent.mkdir()
            _WRITERS[format](_network(model, each, format), made, each, pictures)
            prove(model, made, each, pictures)
        if format == "openvino":
            path.mkdir(exist_ok=True)
            for name in _IR_FILES:
                os.replace(made / name, path / name)
        else:
            os.replace(made, path)
    return path


def _require_sense(
    format: Format, precision: str, batch: int | None, calibrate: str | os.PathLike[str] | None
) -> None:
    if format not in PRECISIONS:
        raise ValueError(f"format {format!r} is none of {', '.join(PRECISIONS)}")
    if precision not in PRECISIONS[format]:
        homes = [name for name, known in PRECISIONS.items() if precision in known]
        hint = f"; {precision} goes with {' and '.join(homes)}" if homes else ""
        raise ValueError(f"{format} holds {', '.join(PRECISIONS[format])}, not {precision}{hint}")
    if precision == "int8" and calibrate is None:
        raise ValueError("int8 needs calibrate: a folder of images like those that will be detected on")
    if precision != "int8" and calibrate is not None:
        raise ValueError(f"calibrate is for int8, not for {precision}")
    if batch is not None and not (type(batch) is int and 1 <= batch <= MAX_BATCH):
        raise ValueError(f"batch must be a whole number, at least 1 and at most {MAX_BATCH}; got {batch!r}")


def _require_place(path: Path, format: Format) -> None:
    if format != "openvino":
        if path.suffix.lower() != f".{format}":
            raise ValueError(f"{path}: the name has to end in .{format}, by which Detector.load knows it")
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
    elif path.is_file() or (path.is_dir() and {each.name for each in path.iterdir()} - set(_IR_FILES)):
        raise FileExistsError(f"{path} is no folder of an earlier export; choose another place")


def calibration_images(folder: str | os.PathLike[str]) -> Tensor:
    """At most 300 images of a folder, evenly over it, uint8 ``[K, 300, 300, 3]``.

    Raises:
        ValueError: there are none.
        ImageError: one cannot be read.
    """
    names = list(find_images(folder))
    if not names:
        raise ValueError(f"no images to calibrate with in {folder}")
    picked = names[:: max(1, -(-len(names) // MAX_CALIBRATION))]
    return torch.stack([resize(load_image(name)) for name in picked])


# --- The graph --------------------------------------------------------------------------------------------


class Graph(nn.Module):
    """The network from its input to its outputs, in operations that every format knows.

    Args:
        model: to be exported.
        metadata: what goes in and comes out.
        suppress: what `greedy` computes.
    """

    mean: Tensor
    std: Tensor
    default_boxes: Tensor

    def __init__(
        self, model: SSD300, metadata: Metadata, suppress: Callable[[Tensor, Tensor, float], Tensor]
    ) -> None:
        super().__init__()
        self.dtype = DTYPES.get(metadata.precision, torch.float32)
        # torch.export does not keep channels-last weights as they are.
        self.network = prepare(model, self.dtype, pack=False).to(memory_format=torch.contiguous_format)
        self.uint8, self.nms, self.suppress = metadata.uint8, metadata.nms, suppress
        self.register_buffer("mean", torch.tensor(MEAN).mul(255))
        self.register_buffer("std", torch.tensor(STD).mul(255))
        self.register_buffer("default_boxes", default_boxes())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """See `export`."""
        if self.uint8:
            images = ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)
        levels = self.network.levels(images.to(self.dtype))
        # In the order of `default_boxes`, which is by shape, then by place; the levels are laid out so.
        merged = torch.cat(
            [
                level.unflatten(1, (shapes, -1)).transpose(1, 2).flatten(2)
                for level, shapes in zip(levels, BOXES_PER_CELL, strict=True)
            ],
            2,
        ).float()
        loc, conf = merged[:, :4], merged[:, 4:]
        return (loc, conf) if self.nms is None else self._detections(loc, conf, self.nms)

    def _detections(self, loc: Tensor, conf: Tensor, nms: NMS) -> tuple[Tensor, ...]:
        """What `ssd.postprocess` gives, in as many steps for any image; equal scores in any order."""
        scores = conf.softmax(1)[:, 1:]
        scores = torch.where(scores > nms.score_threshold, scores, 0.0)
        scores, box = scores.topk(_PER_CLASS, 2)  # [N, classes, candidates]
        boxes = decode(loc.transpose(1, 2), self.default_boxes)
        boxes = boxes.gather(1, box.flatten(1)[..., None].expand(-1, -1, 4))
        kept = self.suppress(
            boxes.unflatten(1, (-1, _PER_CLASS)).flatten(0, 1), scores.flatten(0, 1), nms.iou_threshold
        )
        classes = scores.shape[1]
        best, place = kept.unflatten(0, (-1, classes)).flatten(1).topk(nms.max_detections, 1)
        real = best > 0
        # NaN and infinity in the outputs must not read as "nothing there": they make the scores NaN.
        poison = (loc.sum((1, 2)) + conf.sum((1, 2)))[:, None] * 0.0
        return (
            boxes.gather(1, place[..., None].expand(-1, -1, 4)) * real[..., None],
            best + poison,
            torch.div(place, _PER_CLASS, rounding_mode="floor") * real,
            real.sum(1),
        )


def greedy(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Scores with 0 where greedy NMS drops the box.

    Args:
        boxes: xyxy ``[G, K, 4]``, in descending order of score in each of G groups.
        scores: ``[G, K]``; 0 marks what is no candidate.
        iou_threshold: in [0, 1].
    """
    keep = scores > 0
    worse = overlap(boxes, boxes, iou_threshold).triu(1)  # [G, i, j]: i may suppress j
    for i in range(scores.shape[1] - 1):
        keep = keep & ~(worse[:, i] & keep[:, i : i + 1])
    return torch.where(keep, scores, 0.0)


@torch.library.custom_op("ssd::suppress", mutates_args=())
def _suppress(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """`greedy` as one operation, which becomes ONNX's NonMaxSuppression."""
    return greedy(boxes, scores, iou_threshold)


@_suppress.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return torch.empty_like(scores)


def _network(model: SSD300, metadata: Metadata, format: Format) -> Graph:
    suppress = _suppress if format in ("onnx", "openvino") else greedy
    return Graph(model, metadata, suppress).eval()


def _example(metadata: Metadata) -> Tensor:
    count = metadata.batch or 2  # torch.export takes a size of 1 for a constant
    if metadata.uint8:
        return torch.zeros(count, INPUT_SIZE, INPUT_SIZE, 3, dtype=torch.uint8)
    return torch.zeros(count, 3, INPUT_SIZE, INPUT_SIZE)


def _outputs(metadata: Metadata) -> list[str]:
    return ["loc", "conf"] if metadata.nms is None else ["boxes", "scores", "class_ids", "counts"]


def _dynamic(metadata: Metadata) -> Any:
    return {"images": {0: torch.export.Dim("batch")}} if metadata.batch is None else None


# --- Formats ----------------------------------------------------------------------------------------------


def _write_onnx(network: Graph, path: Path, metadata: Metadata, _: Tensor | None) -> None:
    try:
        import onnxruntime  # noqa: F401, PLC0415
        import onnxscript  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("export to ONNX is an extra: pip install 'ssd300[onnx]'") from error
    with _quiet():
        program = torch.onnx.export(
            network,
            (_example(metadata),),
            dynamo=True,
            opset_version=18,
            input_names=["images"],
            output_names=_outputs(metadata),
            dynamic_shapes=_dynamic(metadata),
            custom_translation_table={torch.ops.ssd.suppress.default: _onnx_suppress(onnxscript)},
            verbose=False,
        )
    assert program is not None  # it is None for the old exporter
    program.model.metadata_props[METADATA] = metadata.to_json()
    program.save(path, external_data=False)


def _onnx_suppress(onnxscript: Any) -> Callable[..., Any]:
    op = onnxscript.opset18

    def suppress(boxes: Any, scores: Any, iou_threshold: float) -> Any:
        limit = op.Constant(value_int=_PER_CLASS)
        # Candidates are those above 0; a selected index is (group, 0, place).
        selected = op.NonMaxSuppression(
            boxes,
            op.Unsqueeze(scores, op.Constant(value_ints=[1])),
            op.Reshape(limit, op.Constant(value_ints=[1])),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[0.0]),
        )
        places = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
        none = op.Mul(scores, op.Constant(value_float=0.0))
        return op.ScatterND(none, places, op.GatherND(scores, places))

    return suppress


def _write_openvino(network: Graph, path: Path, metadata: Metadata, pictures: Tensor | None) -> None:
    try:
        import openvino  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("export to OpenVINO is an extra: pip install 'ssd300[openvino]'") from error
    path.mkdir()
    onnx = path / "model.onnx"
    _write_onnx(network, onnx, metadata, None)
    model = openvino.convert_model(onnx)
    if pictures is not None:
        model = _quantize(model, metadata, pictures)
    model.set_rt_info(metadata.to_json(), [METADATA])
    try:
        openvino.save_model(model, path / "model.xml", compress_to_fp16=False)
    except RuntimeError as error:  # "iostream error" is all that it says of a full disk
        raise OSError(f"OpenVINO could not write {path} ({error}); is the disk full?") from error
    onnx.unlink()


def _quantize(model: Any, metadata: Metadata, pictures: Tensor) -> Any:
    try:
        import nncf  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("int8 needs NNCF: pip install 'ssd300[openvino]'") from error
    convolutions = [each for each in model.get_ordered_ops() if each.get_type_name() == "Convolution"]
    inputs = [_fed(picture[None], metadata).numpy() for picture in pictures]
    with _quiet():
        return nncf.quantize(
            model,
            nncf.Dataset(inputs),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(inputs),
            # The stem sees pixels, and there are few operations to save. The heads do a quarter of the work,
            # and in float they would save 0.0005 of AP (docs/performance.md).
            ignored_scope=nncf.IgnoredScope(names=[convolutions[0].get_friendly_name()]),
        )


def _write_pt2(network: Graph, path: Path, metadata: Metadata, _: Tensor | None) -> None:
    program = torch.export.export(network, (_example(metadata),), dynamic_shapes=_dynamic(metadata))
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={METADATA: metadata.to_json()})
    path.write_bytes(content.getbuffer())


def _write_torchscript(network: Graph, path: Path, metadata: Metadata, _: Tensor | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated is known to who asks for it
        program = torch.jit.freeze(torch.jit.trace(network, (_example(metadata),), check_trace=False))
        content = io.BytesIO()  # torch.jit.save would end the process if the disk got full
        torch.jit.save(program, content, _extra_files={METADATA: metadata.to_json()})
        path.write_bytes(content.getbuffer())


_WRITERS = {
    "onnx": _write_onnx,
    "openvino": _write_openvino,
    "pt2": _write_pt2,
    "torchscript": _write_torchscript,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines of progress and advice that exporters print."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


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


def prove(model: SSD300, path: Path, metadata: Metadata, pictures: Tensor | None = None) -> Difference:
    """Run an exported file in its runtime and compare it with the model.

    Raises:
        ExportError: they differ by more than the precision explains.
    """
    # OpenVINO would choose bf16 by itself.
    exact = metadata.precision == "fp32"
    wanted = "fp32" if exact else "auto"
    backend, read = backends.load(path, torch.device("cpu"), wanted)
    if read != metadata:
        raise ExportError(f"{path.name}: does not say the same of itself: {read}, not {metadata}")
    limit = TOLERANCES[metadata.precision]
    allowed = Difference(limit, limit if metadata.nms else limit / 10, 0.005 if exact else 0.25)
    compare = _compare_outputs if metadata.nms is None else _compare_detections
    scenes = _images_to_try(pictures).split(_BATCHES)
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


def _images_to_try(pictures: Tensor | None = None) -> Tensor:
    """Eight images to compare on: an empty one first, then scenes, noise, and some of `pictures`."""
    rng = np.random.default_rng(8732)
    # Not quite flat: default boxes side by side would have equal scores, and any order of them be right.
    empty = torch.from_numpy(rng.integers(120, 136, (INPUT_SIZE, INPUT_SIZE, 3), np.uint8))
    noise = Image.fromarray(rng.integers(0, 256, (INPUT_SIZE, INPUT_SIZE, 3), np.uint8))
    shown = [resize(each) for each in (*(draw_scene(rng)[0] for _ in range(6)), noise)]
    images = torch.stack([empty, *shown])
    if pictures is not None:
        images[1:6] = pictures[torch.linspace(0, len(pictures) - 1, 5).long()]
    return images


def _fed(pixels: Tensor, metadata: Metadata) -> Tensor:
    return pixels if metadata.uint8 else normalize(pixels).contiguous()


def _compare_outputs(model: SSD300, backend: Backend, images: Tensor, _: float) -> Difference:
    outputs = [model(normalize(images)), backend.forward(images)]
    scores = [conf.softmax(1) for _, conf in outputs]
    boxes = [decode(loc.transpose(1, 2), default_boxes()).clamp(0, 1) for loc, _ in outputs]
    score, box = ((ours - theirs).abs() for theirs, ours in (scores, boxes))
    return Difference(float(score.max()), float(box.mean()), 0.0)


def _compare_detections(model: SSD300, backend: Backend, images: Tensor, limit: float) -> Difference:
    nms = backend.nms or NMS()
    options = Options(nms.score_threshold, nms.iou_threshold, nms.max_detections)
    loc, conf = model(normalize(images))
    expected = replace(backend, default_boxes=default_boxes(), nms=None).finish((loc, conf), options)
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


# --- Serving ----------------------------------------------------------------------------------------------


def write_triton(onnx: str | os.PathLike[str], folder: str | os.PathLike[str], name: str = "ssd300") -> Path:
    """A Triton model repository with an exported ONNX file; returns the model's folder in it.

    Raises:
        FileExistsError: the repository has a model of this name.
        CheckpointError: not an ONNX file of `export`.
        ValueError: a name that Triton would not take.
    """
    if not re.fullmatch(r"\w[\w-]*", name):
        raise ValueError(f"{name!r}: a model's name is letters, digits, - and _")
    if backends.format_of(onnx) != "onnx":
        raise CheckpointError(f"{onnx}: Triton is to run an .onnx file")
    _, metadata = backends.load(onnx, torch.device("cpu"))
    home = Path(folder) / name
    if home.exists():
        raise FileExistsError(f"{folder} has a model {name} already; remove it, or choose another folder")
    home.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.TemporaryDirectory(prefix=f".{name}-", dir=home.parent)
    with telling_of_full_disk(home), temporary as made:
        new = Path(made) / name
        (new / "1").mkdir(parents=True)
        shutil.copyfile(onnx, new / "1" / "model.onnx")
        labels = "".join(f"{' '.join(each.split())}\n" for each in metadata.class_names)
        (new / "labels.txt").write_text(labels)
        (new / "config.pbtxt").write_text(_triton_config(name, metadata))
        new.rename(home)
    return home


def _triton_config(name: str, metadata: Metadata) -> str:
    count = len(metadata.class_names) + 1
    if metadata.nms:
        most = metadata.nms.max_detections
        outputs: list[tuple[str, str, list[int]]] = [
            ("boxes", "TYPE_FP32", [most, 4]),
            ("scores", "TYPE_FP32", [most]),
            ("class_ids", "TYPE_INT64", [most]),
            ("counts", "TYPE_INT64", []),
        ]
    else:
        places = len(default_boxes())
        outputs = [("loc", "TYPE_FP32", [4, places]), ("conf", "TYPE_FP32", [count, places])]
    inputs = [
        ("images", "TYPE_UINT8", [INPUT_SIZE, INPUT_SIZE, 3])
        if metadata.uint8
        else ("images", "TYPE_FP32", [3, INPUT_SIZE, INPUT_SIZE])
    ]

    def entry(each: tuple[str, str, list[int]]) -> str:
        dims = each[2] if metadata.batch is None else [metadata.batch, *each[2]]
        # Triton has no empty shape: a number for each image is a dimension of 1 that is reshaped away.
        reshape = "" if dims else ", reshape: { shape: [] }"
        return f'  {{ name: "{each[0]}", data_type: {each[1]}, dims: {dims or [1]}{reshape} }}'

    lines = [f'name: "{name}"', 'backend: "onnxruntime"']
    # 0: the batch is part of the shapes, as the file has only one size.
    lines += ["max_batch_size: 0"] if metadata.batch else ["max_batch_size: 64", "dynamic_batching { }"]
    lines += ["input [", ",\n".join(map(entry, inputs)), "]"]
    lines += ["output [", ",\n".join(map(entry, outputs)), "]"]
    return "\n".join(lines) + "\n"
