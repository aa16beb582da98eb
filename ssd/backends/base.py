"""What all backends share: what they are, what an exported file says of itself, and how one is loaded."""

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ssd import containers
from ssd.backends import BACKENDS
from ssd.boxes import PUBLISHED_LAYOUT, Layout
from ssd.calibration import Calibration
from ssd.choices import BACKBONES, PRECISIONS, Backbone
from ssd.devices import choose_precision, usable_device
from ssd.errors import CheckpointError, MissingExtra, NonFiniteError
from ssd.postprocess import IOU_THRESHOLD, MOST_KEPT, SCORE_THRESHOLD, PaddedDetections, postprocess
from ssd.pretrained import PUBLISHED
from ssd.signatures import HEAD, identify
from ssd.transforms import MEAN, STD, describe_transform, normalize

MAX_BATCH = 1024
"""Largest batch size that a file may be fixed to."""

METADATA = "ssd300"
"""Name of the entry in an exported file that holds its `Metadata`."""

VERSION = 3
"""Of `Metadata` as files hold it. The first, which had no number, had no layout either; the second
lacked "proof", and, where there were none, "calibration" and "score_thresholds"."""


@dataclass(frozen=True)
class Options:
    """What a caller wants of the detections; see `Detector`."""

    score_threshold: float = 0.4  # as on the hub page
    iou_threshold: float = IOU_THRESHOLD
    max_detections: int = 100
    classes: tuple[int, ...] | None = None
    class_thresholds: tuple[float, ...] = ()
    """In place of `score_threshold`, which is the lowest of them; none of them where it holds for all."""
    voting: bool = False
    flips: bool = False


@dataclass(frozen=True)
class NMS:
    """What an exported file that ends with NMS does in it."""

    score_threshold: float = SCORE_THRESHOLD
    iou_threshold: float = IOU_THRESHOLD
    max_detections: int = MOST_KEPT


# --- What a file says of itself ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Metadata:
    """What an exported file says of itself."""

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    backbone: Backbone
    precision: str
    """fp32, fp16, bf16 or int8."""
    uint8: bool
    """Whether images go in as uint8 ``[N, size, size, 3]``, or as normalised float32 ``[N, 3, size, size]``;
    the size is the layout's."""
    batch: int | None
    """The only batch size, or None for any."""
    nms: NMS | None
    """None: the outputs are loc and conf."""
    layout: Layout = PUBLISHED_LAYOUT
    score_thresholds: tuple[float, ...] = ()
    """Of each class, or none; see `ssd.evaluate.best_thresholds`."""
    calibration: Calibration | None = None
    """What scores and boxes are worth, where that was measured."""
    proof: dict[str, Any] | None = None
    """See `ssd.proof.proof_of`; None in files of earlier versions."""

    def to_json(self) -> str:
        """As the file holds it; beside the fields, how images are normalised."""
        preprocessing = {"size": self.layout.size, "mean": MEAN, "deviation": STD}
        return json.dumps({"version": VERSION, **asdict(self), **preprocessing})

    @classmethod
    def from_json(cls, text: str) -> "Metadata":
        """What `to_json` wrote, here or in an earlier version.

        Raises:
            ValueError: it is something else, or of a later version; the message says what.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
        version = values.pop("version", 1)
        if type(version) is not int or version < 1:
            raise ValueError("its version is impossible")
        if version > VERSION:
            raise ValueError(
                f"it is of version {version}, and this ssd300 knows up to {VERSION}; "
                "update it: pip install --upgrade ssd300"
            )
        values["layout"] = _first_layout(values) if version == 1 else _layout(values)
        if version < 3:
            values = {"score_thresholds": [], "calibration": None, "proof": None} | values
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            lacks, extra = (", ".join(sorted(names)) for names in (known - set(values), set(values) - known))
            raise ValueError(f"it lacks {lacks or 'nothing'}, and has {extra or 'nothing'} too much")
        for name in ("class_names", "category_ids", "score_thresholds"):
            if not isinstance(values[name], list):
                raise ValueError(f"its {name} is no list")
            values[name] = tuple(values[name])
        values["nms"] = None if values["nms"] is None else _nms(values["nms"])
        if values["calibration"] is not None:
            values["calibration"] = Calibration.from_dict(values["calibration"])
        metadata = cls(**values)
        metadata._require_possible()
        return metadata

    def _require_possible(self) -> None:
        """Refuse what `to_json` never writes: a file may come from anywhere."""
        nms = self.nms or NMS(max_detections=1)
        fine = {
            "class_names": bool(self.class_names) and all(isinstance(name, str) for name in self.class_names),
            "category_ids": len(self.category_ids) in (0, len(self.class_names))
            and all(type(number) is int for number in self.category_ids),
            "score_thresholds": len(self.score_thresholds) in (0, len(self.class_names))
            and all(type(each) in (int, float) and 0 <= each <= 1 for each in self.score_thresholds),
            "proof": self.proof is None or isinstance(self.proof, dict),
            "backbone": self.backbone in BACKBONES,
            "precision": self.precision in (*PRECISIONS, "int8"),
            "uint8": type(self.uint8) is bool,
            "batch": self.batch is None or (type(self.batch) is int and 1 <= self.batch <= MAX_BATCH),
            "nms": all(
                type(threshold) in (int, float) and 0 <= threshold <= 1
                for threshold in (nms.score_threshold, nms.iou_threshold)
            )
            and type(nms.max_detections) is int
            and 1 <= nms.max_detections <= most_detections(self.layout, len(self.class_names) + 1),
        }
        impossible = [name for name, possible in fine.items() if not possible]
        if impossible:
            raise ValueError(f"its {' and '.join(impossible)} is impossible")


def _nms(values: Any) -> NMS:
    if not isinstance(values, dict) or set(values) != {field.name for field in fields(NMS)}:
        raise ValueError("its nms is impossible")
    return NMS(**values)


def _first_layout(values: dict[str, Any]) -> Layout:
    """The layout of a file of version 1, which has a sentence about the images in its place."""
    sentence = describe_transform(PUBLISHED_LAYOUT.size)
    if values.pop("transform", sentence) != sentence:
        raise ValueError("its transform is impossible")
    if "layout" in values:
        raise ValueError("its layout goes with no version")
    return PUBLISHED_LAYOUT


def _layout(values: dict[str, Any]) -> Layout:
    try:
        layout = Layout.from_dict(values.get("layout", {}))
    except (ValueError, TypeError) as error:
        raise ValueError(f"its layout is impossible: {error}") from error
    expected = {"size": layout.size, "mean": list(MEAN), "deviation": list(STD)}
    for name, value in expected.items():
        found = values.pop(name, None)
        if found != value:
            raise ValueError(f"its {name} is {found!r:.100}; only {value!r} is supported")
    return layout


def most_detections(layout: Layout, num_classes: int) -> int:
    """How many detections an image can have: each default box in each class but the background."""
    return layout.num_default_boxes * (num_classes - 1)


def parse_metadata(path: Path, text: str | None) -> Metadata:
    """What a file says of itself, from the entry `METADATA`.

    Raises:
        CheckpointError: it has none, or an impossible one, or one of a later version.
    """
    if not text:
        raise CheckpointError(
            f"{path}: was not written by `ssd export`: it does not say which classes it knows"
        )
    try:
        return Metadata.from_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: what it says of itself cannot be used: {error}") from error


# --- Backends ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """A network ready to run.

    It never changes, so a copy shares all of it. A pickled one is made anew where it is unpickled.
    """

    name: str
    """As people call the runtime."""
    precision: str
    device: torch.device
    """Where images go in and outputs come out."""
    forward: Callable[[Tensor], tuple[Tensor, ...]]
    """From uint8 ``[N, size, size, 3]`` to loc and conf (see `ssd.model.SSD`), or to `PaddedDetections`."""
    backbone: Backbone
    num_classes: int
    """With the background."""
    layout: Layout
    default_boxes: Tensor
    """Those of the layout, float32 cxcywh ``[B, 4]`` on the device, in the order of loc and conf."""
    nms: NMS | None = None
    """What `forward` ends with, if it gives detections."""
    rebuild: Callable[[], tuple[Callable[..., "Backend"], tuple[Any, ...]]] | None = None
    """Called when it is pickled: gives a function of a module, and what can be pickled and makes the function
    return this backend. None: it cannot be pickled. Another `forward` needs another one, too."""

    def __reduce__(self) -> tuple[Callable[..., "Backend"], tuple[Any, ...]]:
        if self.rebuild is None:
            raise TypeError(
                f"the backend {self.name!r} cannot be pickled, as it does not say how to make it anew "
                "(`rebuild`); make it in each process"
            )
        return self.rebuild()

    def __copy__(self) -> "Backend":
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Backend":
        return replace(self)

    def require(self, options: Options) -> None:
        """Require options that the network can serve.

        Raises:
            ValueError: more detections than there can be; or NMS is part of the network, and was exported
                with other options.
        """
        most = most_detections(self.layout, self.num_classes)
        if not 1 <= options.max_detections <= most:
            raise ValueError(f"max_detections must be from 1 to {most:,}; got {options.max_detections:,}")
        if self.nms is None:
            return
        problem = None
        if options.classes is not None:
            problem = "classes compete for its places before one can choose; filter what it finds"
        elif options.voting or options.flips:
            problem = "voting and flips cannot reach the candidates; leave them out"
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
            score_threshold=options.class_thresholds or options.score_threshold,
            iou_threshold=options.iou_threshold,
            max_detections=options.max_detections,
            classes=options.classes,
            voting=options.voting,
        )

    def with_flips(self) -> "Backend":
        """A backend that looks at each image and its mirror image, one after the other.

        It gives loc and conf of twice as many default boxes: then come those of the mirror image, mirrored.
        Not for one that ends with NMS.
        """

        def forward(pixels: Tensor) -> tuple[Tensor, ...]:
            loc, conf = self.forward(pixels)
            mirrored, its_conf = self.forward(pixels.flip(2))
            mirrored = torch.cat([-mirrored[:, :1], mirrored[:, 1:]], 1)
            return torch.cat([loc, mirrored], 2), torch.cat([conf, its_conf], 2)

        boxes = self.default_boxes
        mirrored_boxes = torch.cat([1 - boxes[:, :1], boxes[:, 1:]], 1)
        return replace(self, forward=forward, default_boxes=torch.cat([boxes, mirrored_boxes]), rebuild=None)


def _select(found: PaddedDetections, options: Options) -> PaddedDetections:
    """Those of more detections that the options ask for."""
    # An exported file that ends with NMS marks an image so whose numbers were not finite.
    bad = found.scores.isnan().any(1).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteError(f"the network's outputs hold NaN or infinity for image {bad} of the batch", bad)
    index = torch.arange(found.scores.shape[1], device=found.scores.device)
    limits: float | Tensor = options.score_threshold
    if options.class_thresholds:
        limits = found.scores.new_tensor(options.class_thresholds)[found.class_ids]
    keep = (index < found.counts[:, None]) & (found.scores > limits)
    order = (~keep).int().argsort(dim=1, stable=True)[:, : options.max_detections]
    keep = keep.gather(1, order)
    return PaddedDetections(
        found.boxes.gather(1, order[..., None].expand(-1, -1, 4)) * keep[..., None],
        found.scores.gather(1, order) * keep,
        found.class_ids.gather(1, order) * keep,
        keep.sum(1),
    )


# --- Exported files ---------------------------------------------------------------------------------------


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """The kind of an exported file, a name in `BACKENDS`, by its name; None for a checkpoint, or nothing."""
    text = os.fspath(path)
    if not text or path in PUBLISHED:
        return None
    suffix = os.path.splitext(text)[1].lower()
    for name, kind in BACKENDS.items():
        if kind.folder and os.path.isfile(os.path.join(text, kind.folder[0])):
            return name
        own = os.path.splitext(kind.folder[0])[1] if kind.folder else kind.ending
        if suffix == own and os.path.isfile(text):
            return name
    return None


def _require_no_stand_in(path: Path) -> None:
    """Require of a file, or of those of a folder, not to be something else, such as a Git LFS pointer."""
    if path.is_file() and (found := containers.checkpoint_kind(path)):
        suffix = ".safetensors" if "safetensors" in found else ".pt"
        raise CheckpointError(f"{path}: this is {found}; name it {suffix}") from None
    for file in (path, *sorted(path.glob("model.*"))):
        if file.is_file():
            with file.open("rb") as stream:
                kind = identify(stream.read(HEAD))
            if kind and kind.as_weights and not any(own in kind.name for own in ("zip archive", "OpenVINO")):
                raise CheckpointError(f"{file}: this is {kind.name}; {kind.as_weights}") from None


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
        MissingExtra: the runtime is not installed; the message has the command.
        ValueError: the runtime has no such device or precision.
    """
    path = Path(path)
    name = kind_of(path)
    if name is None and os.path.lexists(path):
        raise CheckpointError(f"{path} is no exported file, by its name; ssd export makes one of weights")
    if name is None:
        raise FileNotFoundError(f"no exported file at {path}")
    if precision != "auto":
        choose_precision(precision, torch.device("cpu"))
    try:
        with needing_extra(name):
            backend, metadata = import_module(BACKENDS[name].module).load_file(path, device, precision)
    except (ImportError, ValueError):
        raise
    except Exception as error:
        _require_no_stand_in(path)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read as {name}, damaged? ({reason(error)})") from error
    _require_outputs(path, backend)
    asked = device if device is not None or backend.device.type == "cpu" else backend.device
    known = backend.precision if backend.precision in PRECISIONS else "auto"
    arguments = os.path.abspath(path), asked, known, metadata
    return replace(backend, rebuild=lambda: (_load_again, arguments)), metadata


def _load_again(path: str, device: torch.device | None, precision: str, expected: Metadata) -> Backend:
    backend, metadata = load(path, None if device is None else usable_device(device), precision)
    if metadata != expected:
        raise CheckpointError(f"{path}: is another file than when the detector was pickled; load it anew")
    return backend


@contextlib.contextmanager
def needing_extra(name: str) -> Iterator[None]:
    """Within the block, which uses a kind of `BACKENDS`, a package that is missing is the kind's extra.

    Raises:
        MissingExtra: with the command that installs it.
    """
    try:
        yield
    except ImportError as error:
        extra = BACKENDS[name].extra
        if extra is None or isinstance(error, MissingExtra):
            raise
        raise MissingExtra(extra) from error


def reason(error: Exception) -> str:
    """The first line of an error that says something, cut to 200 characters."""
    # OpenVINO's begin with where in its source they come from.
    lines = [
        line for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")
    ]
    return lines[0].strip()[:200] if lines else type(error).__name__


def _require_outputs(path: Path, backend: Backend) -> None:
    """Require that what comes out is what the file says of itself; this also warms the runtime up."""
    size, boxes = backend.layout.size, backend.layout.num_default_boxes
    pixels = torch.zeros(1, size, size, 3, dtype=torch.uint8, device=backend.device)
    expected: list[tuple[int, ...]] = [(1, 4, boxes), (1, backend.num_classes, boxes)]
    if backend.nms is not None:
        most = backend.nms.max_detections
        expected = [(1, most, 4), (1, most), (1, most), (1,)]
    try:
        with torch.inference_mode():
            found = [tuple(output.shape) for output in backend.forward(pixels)]
    except Exception as error:
        raise CheckpointError(f"{path}: does not take what it says of itself ({reason(error)})") from error
    if found != expected:
        raise CheckpointError(f"{path}: gives {found}, not {expected}, as it says of itself")


# --- For the modules of the kinds -------------------------------------------------------------------------


def of_file(
    name: str,
    metadata: Metadata,
    device: torch.device,
    run: Callable[[Tensor], Sequence[Tensor]],
    precision: str | None = None,
) -> Backend:
    """The backend of an exported file.

    Args:
        name: of the runtime.
        metadata: what the file says of itself.
        device: where images go in and outputs come out.
        run: from what the file takes to what it gives, for batches of the file's size.
        precision: what it computes in, where that is not the file's.
    """

    def forward(pixels: Tensor) -> tuple[Tensor, ...]:
        images = network_input(pixels, metadata)
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
        layout=metadata.layout,
        default_boxes=metadata.layout.default_boxes().to(device),
        nms=metadata.nms,
    )


def network_input(pixels: Tensor, metadata: Metadata) -> Tensor:
    """What a file takes, from uint8 ``[N, size, size, 3]``."""
    return pixels if metadata.uint8 else normalize(pixels).contiguous()


def require_own_precision(path: Path, metadata: Metadata, wanted: str) -> None:
    """Require the precision that a file was exported in.

    Raises:
        ValueError: another one is wanted.
    """
    if wanted not in ("auto", metadata.precision):
        raise ValueError(
            f"{path} computes in {metadata.precision}, as it was exported, not in {wanted}; "
            "leave the precision out, or export it again"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
