"""What computes the network behind a `Detector`: torch, or an exported file in its own runtime."""

import io
import json
import os
import shutil
import threading
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ssd.boxes import INPUT_SIZE, default_boxes
from ssd.checkpoint import PUBLISHED, TRANSFORM, CheckpointError
from ssd.distributed import usable_device
from ssd.inference import prepare
from ssd.model import DTYPES, SSD300, Backbone, Precision, native_precisions
from ssd.postprocess import NonFiniteError, PaddedDetections, postprocess
from ssd.transforms import normalize

SUFFIXES = {".onnx": "onnx", ".xml": "openvino", ".pt2": "pt2", ".torchscript": "torchscript"}
"""What `load` reads, by suffix; a folder with a model.xml is OpenVINO's too."""

MAX_BATCH = 1024
"""Largest batch size that a file may be fixed to."""

METADATA = "ssd300"
"""Name of the entry in an exported file that holds its `Metadata`."""


@dataclass(frozen=True)
class Options:
    """What a caller wants of the detections; see `Detector`."""

    score_threshold: float
    iou_threshold: float
    max_detections: int
    classes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class NMS:
    """What an exported file that ends with NMS does in it."""

    score_threshold: float = 0.05
    iou_threshold: float = 0.5
    max_detections: int = 200


@dataclass(frozen=True)
class Metadata:
    """What an exported file says of itself."""

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    backbone: Backbone
    precision: str
    """fp32, fp16, bf16 or int8."""
    uint8: bool
    """Whether images go in as uint8 ``[N, 300, 300, 3]``, or as normalised float32 ``[N, 3, 300, 300]``."""
    batch: int | None
    """The only batch size, or None for any."""
    nms: NMS | None
    """None: the outputs are loc and conf."""
    transform: str = TRANSFORM

    def to_json(self) -> str:
        """As the file holds it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Metadata":
        """What `to_json` wrote.

        Raises:
            ValueError, TypeError, KeyError: it is something else.
        """
        values = json.loads(text)
        values["nms"] = NMS(**values["nms"]) if values["nms"] else None
        for name in ("class_names", "category_ids"):
            if not isinstance(values[name], list):
                raise TypeError(f"{name} is no list")
            values[name] = tuple(values[name])
        metadata = cls(**values)
        metadata._check()
        return metadata

    def _check(self) -> None:
        """Refuse what `to_json` never writes: a file may come from anywhere."""
        numbers = () if self.nms is None else (self.nms.score_threshold, self.nms.iou_threshold)
        most = 1 if self.nms is None else self.nms.max_detections
        fine = (
            bool(self.class_names),
            all(isinstance(name, str) for name in self.class_names),
            len(self.category_ids) in (0, len(self.class_names)),
            all(type(each) is int for each in self.category_ids),
            self.backbone in get_args(Backbone),
            self.precision in (*DTYPES, "int8"),
            type(self.uint8) is bool,
            self.batch is None or (type(self.batch) is int and 1 <= self.batch <= MAX_BATCH),
            all(isinstance(each, int | float) and 0 <= each <= 1 for each in numbers),
            type(most) is int and 1 <= most <= 8732,
            self.transform == TRANSFORM,
        )
        if not all(fine):
            raise ValueError(f"entry {fine.index(False) + 1} of what it says of itself is impossible")


@dataclass(frozen=True)
class Backend:
    """A network ready to run."""

    name: str
    """As people call the runtime."""
    precision: str
    device: torch.device
    """Where images go in and outputs come out."""
    forward: Callable[[Tensor], tuple[Tensor, ...]]
    """From uint8 ``[N, 300, 300, 3]`` to loc and conf (see `SSD300`), or to `PaddedDetections`."""
    backbone: Backbone
    num_classes: int
    """With the background."""
    default_boxes: Tensor
    """In the order of loc and conf."""
    nms: NMS | None = None

    def check(self, options: Options) -> None:
        """Require options that the network can serve.

        Raises:
            ValueError: NMS is part of the network, and was exported with other options.
        """
        if self.nms is None:
            return
        problem = None
        if options.classes is not None:
            problem = "classes compete for its places before one can choose; filter what it finds"
        elif options.iou_threshold != self.nms.iou_threshold:
            problem = f"iou_threshold is {self.nms.iou_threshold}, not {options.iou_threshold}"
        elif options.score_threshold < self.nms.score_threshold:
            problem = f"score_threshold is at least {self.nms.score_threshold}; got {options.score_threshold}"
        elif options.max_detections > self.nms.max_detections:
            problem = f"max_detections is at most {self.nms.max_detections}; got {options.max_detections}"
        if problem:
            raise ValueError(
                f"NMS is inside this exported file, and there {problem}; or export it without NMS"
            )

    def finish(self, outputs: tuple[Tensor, ...], options: Options) -> PaddedDetections:
        """Detections from what `forward` gave.

        Raises:
            NonFiniteError: the network gave NaN or infinity.
        """
        if self.nms is not None:
            return _select(PaddedDetections(*outputs), options)
        loc, conf = outputs
        return postprocess(
            loc,
            conf,
            self.default_boxes,
            score_threshold=options.score_threshold,
            iou_threshold=options.iou_threshold,
            max_detections=options.max_detections,
            classes=options.classes,
        )


def _select(found: PaddedDetections, options: Options) -> PaddedDetections:
    """Those of more detections that the options ask for."""
    bad = found.scores.isnan().any(1).nonzero().flatten().tolist()  # so exported files mark it
    if bad:
        raise NonFiniteError(f"the network's outputs hold NaN or infinity for image {bad} of the batch", bad)
    places = torch.arange(found.scores.shape[1], device=found.scores.device)
    keep = (places < found.counts[:, None]) & (found.scores > options.score_threshold)
    order = (~keep).int().argsort(dim=1, stable=True)[:, : options.max_detections]
    keep = keep.gather(1, order)
    return PaddedDetections(
        found.boxes.gather(1, order[..., None].expand(-1, -1, 4)) * keep[..., None],
        found.scores.gather(1, order) * keep,
        found.class_ids.gather(1, order) * keep,
        keep.sum(1),
    )


def choose_precision(wanted: str, device: torch.device) -> Precision:
    """The precision that "auto" stands for on a device: bf16 where it computes that natively, else fp32.

    Raises:
        ValueError: unknown precision.
    """
    if wanted not in ("auto", *DTYPES):
        raise ValueError(f"precision {wanted!r} is none of auto, {', '.join(DTYPES)}")
    if wanted != "auto":
        return cast(Precision, wanted)
    return "bf16" if "bf16" in native_precisions(device) else "fp32"


def of_model(model: SSD300, precision: str | None = None, *, compile: bool = False) -> Backend:
    """A copy of a model, prepared for inference on its device; see `ssd.inference`.

    Args:
        model: in any precision and mode.
        precision: fp32, fp16 or bf16; by default that of the model's convolutions.
        compile: by torch.compile at the first images; takes about a minute and needs a C++ compiler.
    """
    first = next(model.parameters())
    device = first.device
    if device.type == "meta":
        raise ValueError("this model has no weights: it is on the meta device")
    if compile and device.type == "cpu":
        _require_compiler()
    own = first.dtype if first.dtype in DTYPES.values() else torch.float32
    dtype = DTYPES[precision] if precision else own
    fast = prepare(model, dtype, pack=not compile)
    run: Callable[[Tensor], tuple[Tensor, ...]] = fast
    if compile:
        # No CUDA graphs: the next call, of whatever thread, would overwrite what this one gave.
        run = torch.compile(fast) if device.type == "cuda" else _compile_frozen(fast)
    return Backend(
        name="torch, compiled" if compile else "torch",
        precision=next(name for name, each in DTYPES.items() if each == dtype),
        device=device,
        forward=lambda pixels: run(normalize(pixels, dtype)),
        backbone=model.backbone,
        num_classes=model.num_classes,
        default_boxes=fast.default_boxes,
    )


def _require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # noqa: PLC0415
    from torch._inductor.exc import InvalidCxxCompiler  # noqa: PLC0415

    try:
        found = shutil.which(get_cpp_compiler())
    except InvalidCxxCompiler:
        found = None
    if not found:
        raise ValueError("compile needs a C++ compiler, such as g++; or leave compile out")


def _compile_frozen(network: torch.nn.Module) -> Callable[[Tensor], tuple[Tensor, ...]]:
    # Freezing lets inductor lay out the weights; it works under no_grad, and not under inference_mode.
    compiled = torch.compile(network, options={"freezing": True})

    def run(images: Tensor) -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.no_grad():
            outputs: tuple[Tensor, ...] = compiled(images.clone())
        return outputs

    return run


# --- Exported files ---------------------------------------------------------------------------------------


def format_of(path: str | os.PathLike[str]) -> str | None:
    """The format of an exported file, by its name; None for what is a checkpoint, or nothing."""
    if not os.fspath(path) or path in PUBLISHED:
        return None
    if os.path.isfile(os.path.join(path, "model.xml")):
        return "openvino"
    return SUFFIXES.get(os.path.splitext(os.fspath(path))[1].lower()) if os.path.isfile(path) else None


def load(
    path: str | os.PathLike[str], device: torch.device | None = None, precision: str = "auto"
) -> tuple[Backend, Metadata]:
    """An exported file in its runtime.

    Args:
        path: what ``ssd export`` wrote: ``.onnx``, ``.pt2``, ``.torchscript``, or OpenVINO's folder.
        device: None for the CPU, or CUDA where the runtime has it.
        precision: of what OpenVINO computes; the others compute as they were exported.

    Raises:
        CheckpointError: damaged, or not written by ``ssd export``.
        ImportError: the runtime is not installed; the message names the command.
        ValueError: the runtime has no such device or precision.
    """
    path = Path(path)
    kind = format_of(path)
    if kind is None:
        raise FileNotFoundError(f"no exported file at {path}")
    if precision != "auto":
        choose_precision(precision, torch.device("cpu"))
    try:
        backend, metadata = _OPENERS[kind](path, device, precision)
    except (ImportError, CheckpointError, ValueError):
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read as {kind}, damaged? ({_reason(error)})") from error
    _try(path, backend)
    return backend, metadata


def _reason(error: Exception) -> str:
    # OpenVINO's begin with where in its source they come from.
    lines = [
        line for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")
    ]
    return lines[0].strip()[:200] if lines else type(error).__name__


def _try(path: Path, backend: Backend) -> None:
    """Require that what comes out is what the file says of itself; this also warms the runtime up."""
    pixels = torch.zeros(1, INPUT_SIZE, INPUT_SIZE, 3, dtype=torch.uint8, device=backend.device)
    places = len(backend.default_boxes)
    expected: list[tuple[int, ...]] = [(1, 4, places), (1, backend.num_classes, places)]
    if backend.nms is not None:
        most = backend.nms.max_detections
        expected = [(1, most, 4), (1, most), (1, most), (1,)]
    try:
        with torch.inference_mode():
            found = [tuple(each.shape) for each in backend.forward(pixels)]
    except Exception as error:
        raise CheckpointError(f"{path}: does not take what it says of itself ({_reason(error)})") from error
    if found != expected:
        raise CheckpointError(f"{path}: gives {found}, not {expected}, as it says of itself")


def _metadata(path: Path, text: str | None) -> Metadata:
    try:
        return Metadata.from_json(text or "")
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: was not written by `ssd export`: it does not say which classes it knows"
        ) from error


def _backend(
    name: str,
    metadata: Metadata,
    device: torch.device,
    run: Callable[[Tensor], Sequence[Tensor]],
    precision: str | None = None,
) -> Backend:
    """`run` takes what the file takes: `metadata` says what that is."""

    def forward(pixels: Tensor) -> tuple[Tensor, ...]:
        images = pixels if metadata.uint8 else normalize(pixels).contiguous()
        if metadata.batch is None or metadata.batch == len(images):
            return tuple(run(images))
        parts = []
        for part in images.split(metadata.batch):
            missing = (0, 0) * (images.ndim - 1) + (0, metadata.batch - len(part))
            parts.append(run(functional.pad(part, missing)))
        return tuple(torch.cat(outputs)[: len(images)] for outputs in zip(*parts, strict=True))

    return Backend(
        name=name,
        precision=precision or metadata.precision,
        device=device,
        forward=forward,
        backbone=metadata.backbone,
        num_classes=len(metadata.class_names) + 1,
        default_boxes=default_boxes().to(device),
        nms=metadata.nms,
    )


def _own_precision(path: Path, metadata: Metadata, wanted: str) -> None:
    if wanted not in ("auto", metadata.precision):
        raise ValueError(
            f"{path} computes in {metadata.precision}, as it was exported, not in {wanted}; "
            "leave the precision out, or export it again"
        )


def _open_onnx(path: Path, device: torch.device | None, precision: str) -> tuple[Backend, Metadata]:
    try:
        import onnxruntime  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("ONNX Runtime is an extra: pip install 'ssd300[onnx]'") from error
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
    metadata = _metadata(path, session.get_modelmeta().custom_metadata_map.get(METADATA))
    _own_precision(path, metadata, precision)

    def run(images: Tensor) -> list[Tensor]:
        # ONNX Runtime brings arrays to its device by itself.
        return [torch.from_numpy(each) for each in session.run(None, {"images": images.numpy()})]

    name = "ONNX Runtime" if device.type == "cpu" else f"ONNX Runtime on {device}"
    return _backend(name, metadata, torch.device("cpu"), run), metadata


def _open_openvino(path: Path, device: torch.device | None, precision: str) -> tuple[Backend, Metadata]:
    try:
        import openvino  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("OpenVINO is an extra: pip install 'ssd300[openvino]'") from error
    if device is not None and device.type != "cpu":
        raise ValueError(f"{path}: OpenVINO runs on the CPU here, not on {device}")
    file = path / "model.xml" if path.is_dir() else path
    core = openvino.Core()
    model = core.read_model(file)
    text = model.get_rt_info([METADATA]).astype(str) if model.has_rt_info([METADATA]) else None
    metadata = _metadata(path, text)
    if metadata.precision == "int8":
        _own_precision(path, metadata, precision)
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
    return _backend("OpenVINO", metadata, torch.device("cpu"), run, shown), metadata


def _open_pt2(path: Path, device: torch.device | None, precision: str) -> tuple[Backend, Metadata]:
    _refuse_pickles(path)
    notes = {METADATA: ""}
    program = torch.export.load(path, extra_files=notes)
    metadata = _metadata(path, notes[METADATA])
    _own_precision(path, metadata, precision)
    device = device or usable_device(None)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass  # noqa: PLC0415

        program = move_to_device_pass(program, device)
    return _backend("torch.export", metadata, device, program.module()), metadata


def _refuse_pickles(path: Path) -> None:
    """Require that a .pt2 holds nothing but tensors and JSON: torch unpickles whatever it is told to.

    Raises:
        CheckpointError: it holds more, or is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            entries = [
                entry
                for name in names
                if name.endswith("_config.json")
                for entry in json.loads(archive.read(name))["config"].values()
            ]
            for name in names:
                if name.endswith(".pt"):  # an example of the inputs
                    torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)
            plain = all(
                entry["use_pickle"] is False and entry["path_name"].startswith(("weight_", "tensor_"))
                for entry in entries
            )
    except Exception as error:
        raise CheckpointError(f"{path}: not a whole .pt2 file of tensors ({_reason(error)})") from None
    if not plain or not any(name.endswith("/archive_format") for name in names):
        raise CheckpointError(f"{path}: holds more than tensors, and is not loaded for safety")


def _open_torchscript(path: Path, device: torch.device | None, precision: str) -> tuple[Backend, Metadata]:
    device = device or usable_device(None)
    notes = {METADATA: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated is known to who asks for it
        program = torch.jit.load(path, map_location=device, _extra_files=notes)
    metadata = _metadata(path, notes[METADATA])
    _own_precision(path, metadata, precision)
    return _backend("TorchScript", metadata, device, program), metadata


_OPENERS = {
    "onnx": _open_onnx,
    "openvino": _open_openvino,
    "pt2": _open_pt2,
    "torchscript": _open_torchscript,
}
