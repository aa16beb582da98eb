"""What the library does on a CUDA device: its tests, its figures, and how fast it is.

python benchmarks/gpu.py [--only SECTION ...] [--json FILE] [--dry-run]

Sections, in this order:
  tests        the tests that need a GPU; test files whose imports are not installed are named and left out
  parity       outputs against the reference figures, which a CPU computed in fp32
  forward      the network: as published, ours, through torch.compile, and as a CUDA graph
  postprocess  decoding and NMS
  train        steps of the default preset
  stream       JPEG files to detections, beside reading and resizing alone

A section that fails is reported, and the others still run; the exit status is then 1. Times are medians, by
CUDA events, of calls that follow each other without a pause. "peak" is the rate of a product of two square
matrices of 8192 rows in the same precision; for fp32 it is that of TF32, in which torch lets convolutions
compute unless told otherwise. The last line is all of it as JSON. --dry-run does everything on the CPU with
tiny sizes, to see that it runs. benchmarks/gpu.sh brings wheels for a machine without a network.
"""

import argparse
import ast
import contextlib
import copy
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import heading
from torch import Tensor, nn

from ssd import Detections, Detector, backends, load_image
from ssd.benchmark import draw_images, flops
from ssd.boxes import PUBLISHED_LAYOUT, match
from ssd.devices import DTYPES, native_precisions
from ssd.fused import fuse
from ssd.loss import MultiBoxLoss
from ssd.model import SSD, set_precision
from ssd.postprocess import postprocess
from ssd.train import PRESETS
from ssd.train.optim import make_optimizer, update_average
from ssd.transforms import normalize, resize

ROOT = Path(__file__).parents[1]
NUM_CLASSES = 81
NAMES = tuple(f"class {number}" for number in range(NUM_CLASSES - 1))
REGIMES = {"sparse": (9, 2), "typical": (6, 1), "dense": (4, 2)}
"""Background and deviation of logits, as in the reference figures."""

READERS = 8
"""Threads that read, as in `Detector.stream`."""

TITLES = {
    "tests": "pytest -m cuda",
    "parity": "{backbone}: differences from the figures of the CPU, in units of their mean absolute value",
    "forward": "{backbone}, 81 classes: from uint8 pixels to raw outputs",
    "postprocess": "decoding and NMS: 81 classes, IoU 0.45, 200 detections",
    "train": "{backbone}, 81 classes: training step, and ms of each stage",
    "stream": "{files} JPEG files of 640x480",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    backbone: str = "resnet50"
    batches: tuple[int, ...] = (1, 8, 64, 128)
    train_batches: tuple[int, ...] = (32, 128)
    stream_batches: tuple[int, ...] = (8, 64)
    rounds: int = 15
    warm_ups: int = 3
    least_seconds: float = 0.01
    """Of calls between two looks at the clock."""
    matrix: int = 8192
    scenes: int = 64
    files: int = 2000
    test_seconds: int = 240


TINY = Sizes(
    "resnet18", (1, 2), (2,), (1, 2), rounds=1, warm_ups=1, least_seconds=0, matrix=256, scenes=4, files=8
)


@dataclass(frozen=True)
class Place:
    """What is measured on."""

    device: torch.device
    sizes: Sizes
    peaks: dict[str, float]
    """Operations a second of the matrix product, by precision."""
    flops: float
    """Operations of the network for an image."""

    @property
    def precisions(self) -> tuple[str, ...]:
        return native_precisions(self.device)

    def rates(self, seconds: float, images: int, precision: str, passes: int = 1) -> Row:
        """What a time for a batch means; a training step counts as three passes."""
        rate = passes * images * self.flops / seconds
        return {
            "ms": 1e3 * seconds,
            "images/s": images / seconds,
            "TFLOP/s": rate / 1e12,
            "% of peak": 100 * rate / self.peaks["tf32" if precision == "fp32" else precision],
        }


# --- Measuring --------------------------------------------------------------------------------------------


def medians(place: Place, functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of a call of each function; the functions take turns."""
    calls = {}
    for name, function in functions.items():
        # The first calls compile, take memory and choose algorithms.
        seconds = min(elapsed(place.device, function) for _ in range(place.sizes.warm_ups))
        calls[name] = max(1, math.ceil(place.sizes.least_seconds / seconds))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(place.sizes.rounds):
        for name, function in functions.items():
            times[name].append(elapsed(place.device, function, calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def elapsed(device: torch.device, function: Callable[[], object], calls: int = 1) -> float:
    """Seconds of a call, of several one after the other."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let matrix products and convolutions of float32 round to TF32, or not."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def measure_peaks(device: torch.device, sizes: Sizes) -> dict[str, float]:
    """Operations a second of a product of random square matrices, by precision, and for TF32."""
    found = {}
    for name in ("fp32", "tf32", "fp16", "bf16"):
        a, b = torch.randn(2, sizes.matrix, sizes.matrix, device=device).to(DTYPES.get(name, torch.float32))
        with tf32(name == "tf32"):
            times = [elapsed(device, partial(torch.mm, a, b)) for _ in range(10)]
        found[name] = 2 * sizes.matrix**3 / statistics.median(times[3:])
    return found


def show(title: str, rows: list[Row]) -> None:
    """A table of rows with the same columns."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for line in cells:
        print("  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


# --- Tests and figures ------------------------------------------------------------------------------------


def run_tests(place: Place, rows: list[Row]) -> None:
    """The tests marked cuda; on a CPU they are collected, and skipped."""
    missing = {path: names for path in sorted((ROOT / "tests").rglob("*.py")) if (names := absent(path))}
    for path, names in missing.items():
        print(f"left out {path.relative_to(ROOT)}: there is no {', '.join(names)} here")
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", *(f"--ignore={path}" for path in missing), "tests"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=place.sizes.test_seconds
    )
    print(result.stdout[-6000:], result.stderr[-2000:], sep="\n")
    summary = (result.stdout.splitlines() or [""])[-1]
    found = re.findall(r"(\d+) (passed|failed|skipped|errors?)", summary)
    counts = {name: int(number) for number, name in found}
    rows.append({"exit status": result.returncode, "left out": len(missing)} | counts)
    if result.returncode:
        raise RuntimeError(f"pytest ended with exit status {result.returncode}")
    if place.device.type == "cuda" and not counts.get("passed"):
        raise RuntimeError("no test has run")


def absent(path: Path) -> list[str]:
    """Packages that a file imports as it is read, and that are not installed."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {each.name.split(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    own = {each.stem for each in (ROOT / "tests").rglob("*")}
    return sorted(name for name in names - own if find_spec(name) is None)


@torch.inference_mode()
def parity(place: Place, rows: list[Row]) -> None:
    """Differences from the figures, in units of the mean absolute value of what is compared."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import made_weights  # noqa: PLC0415 (of the tests)

    with np.load(ROOT / "tests" / "data" / "figures.npz") as file:
        figures = dict(file)
    images = np.random.RandomState(1).uniform(-1, 1, (2, 3, 300, 300)).astype(np.float32)
    there = torch.from_numpy(images).to(place.device)
    backbone = place.sizes.backbone
    model = SSD(backbone=backbone, head_norm=False).eval()
    model.load_state_dict(made_weights({key: tuple(each.shape) for key, each in model.state_dict().items()}))
    pick = torch.from_numpy(figures[f"{backbone}/pick"])
    for precision in place.precisions:
        ours = fuse(copy.deepcopy(model).to(place.device), DTYPES[precision])
        # Ours gives the boxes in another order.
        order = {tuple(box): number for number, box in enumerate(ours.default_boxes.tolist())}
        places = torch.tensor([order[tuple(box)] for box in PUBLISHED_LAYOUT.default_boxes()[pick].tolist()])
        published = copy.deepcopy(model).to(place.device)
        set_precision(published, precision)
        for allowed in (True, False):
            for name, network, picked in (("as published", published, pick), ("ours", ours, places)):
                with tf32(allowed):
                    loc, conf = (
                        each.float().cpu()[:, :, picked] for each in network(there.to(DTYPES[precision]))
                    )
                row: Row = {"precision": precision, "TF32": "allowed" if allowed else "off", "network": name}
                for kind, values in (("loc", loc), ("conf", conf)):
                    expected = figures[f"{backbone}/{kind}"]
                    apart = np.abs(values.numpy() - expected) / np.abs(expected).mean()
                    row |= {f"{kind}, largest": float(apart.max()), f"{kind}, mean": float(apart.mean())}
                rows.append(row)
    if not all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float)):
        raise RuntimeError("some outputs are not finite")


# --- Inference --------------------------------------------------------------------------------------------


def random_model(backbone: str) -> SSD:
    torch.manual_seed(0)
    model = SSD(NUM_CLASSES, backbone, head_norm=False).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    with torch.inference_mode():  # outputs as small as a trained network's
        outputs = model(torch.randn(1, 3, 300, 300))
    for heads, values in zip((model.loc, model.conf), outputs, strict=True):
        for head in heads:
            head.weight.div_(values.std())
    return model


def forward(place: Place, rows: list[Row], *, compiled: tuple[str, ...]) -> None:
    """From uint8 pixels on the device to raw outputs."""
    networks = make_networks(place, compiled)
    broken = []
    with torch.inference_mode():
        for batch in place.sizes.batches:
            pixels = random_pixels(batch, place.device)
            torch._dynamo.reset()  # so that each batch size is compiled for itself
            functions = {}
            for name, prepare_for in networks.items():
                try:
                    function = prepare_for(pixels)
                    function()
                    functions[name] = function
                except Exception:
                    traceback.print_exc()
                    broken.append(f"{name}, batch {batch}")
            times = medians(place, functions)
            first = times[f"as published, {place.precisions[0]}"]
            for name, seconds in times.items():
                rates = place.rates(seconds, batch, name.split(", ")[-1])
                rows.append(
                    {"batch": batch, "network": name} | rates | {"against published": first / seconds}
                )
    if broken:
        raise RuntimeError(f"did not run: {'; '.join(broken)}")


def make_networks(
    place: Place, compiled: tuple[str, ...]
) -> dict[str, Callable[[Tensor], Callable[[], object]]]:
    """By a name that ends in the precision, what makes a function of pixels one without arguments."""
    model = random_model(place.sizes.backbone).to(place.device)
    found: dict[str, Callable[[Tensor], Callable[[], object]]] = {}
    for precision in place.precisions:
        published = copy.deepcopy(model)
        set_precision(published, precision)
        found[f"as published, {precision}"] = partial(partial, run_published, published, precision)
        ours = backends.of_model(model, precision).forward
        found[f"ours, {precision}"] = partial(partial, ours)
        if place.device.type == "cuda":
            found[f"ours as a CUDA graph, {precision}"] = partial(as_graph, ours)
    for precision in compiled:
        found[f"ours, compiled, {precision}"] = partial(
            partial, backends.of_model(model, precision, compile=True).forward
        )
    return found


def run_published(model: SSD, precision: str, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Eagerly and contiguous, as the published code runs it."""
    outputs: tuple[Tensor, Tensor] = model(normalize(pixels, DTYPES[precision]).contiguous())
    return outputs


def random_pixels(batch: int, device: torch.device) -> Tensor:
    return torch.randint(0, 256, (batch, 300, 300, 3), dtype=torch.uint8, device=device)


def as_graph(run: Callable[[Tensor], tuple[Tensor, ...]], pixels: Tensor) -> Callable[[], object]:
    """The same, recorded once and replayed, with the copy of new pixels into its input."""
    kept = pixels.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = run(kept)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(kept)

    def replay() -> tuple[Tensor, ...]:
        kept.copy_(pixels)
        graph.replay()
        return outputs

    for ours, theirs in zip(replay(), expected, strict=True):
        if not (ours - theirs).abs().mean() < 0.05:
            raise RuntimeError("the CUDA graph computes something else")
    return replay


@torch.inference_mode()
def decode_and_suppress(place: Place, rows: list[Row]) -> None:
    """On outputs like those of the figures, laid out as our network gives them."""
    boxes = PUBLISHED_LAYOUT.default_boxes().to(place.device)
    torch.manual_seed(3001)
    for batch in place.sizes.batches:
        functions = {}
        for regime, (background, scale) in REGIMES.items():
            values = torch.randn(batch, len(boxes), 4 + NUM_CLASSES, device=place.device)
            values[..., :4] *= 0.5
            values[..., 4:] *= scale
            values[..., 4] += background
            for precision in ("fp32", "bf16"):
                merged = values.to(DTYPES[precision]).transpose(1, 2)
                functions[f"{regime}, {precision}"] = partial(
                    postprocess, merged[:, :4], merged[:, 4:], boxes, iou_threshold=0.45
                )
        times = medians(place, functions)
        rows += [
            {"batch": batch, "outputs": name, "ms": 1e3 * seconds, "images/s": batch / seconds}
            for name, seconds in times.items()
        ]


# --- Training ---------------------------------------------------------------------------------------------


class Step:
    """As in `ssd.train`, with the default preset, on a batch that is on the device already."""

    def __init__(self, place: Place, batch: int, precision: str) -> None:
        config, device = PRESETS["default"], place.device
        torch.manual_seed(0)
        model = SSD(NUM_CLASSES, place.sizes.backbone, config.head_norm).train()
        self._model = model.to(device, memory_format=torch.channels_last)
        self._average = copy.deepcopy(self._model).requires_grad_(False).eval()
        self._optimizer = make_optimizer(
            self._model,
            device,
            lr=config.peak_lr(),
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        for group in self._optimizer.param_groups:
            group["lr"] = 1e-6  # random images teach nothing
        self._fp16 = precision == "fp16"
        self._scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if self._fp16 else 1.0)
        self._defaults = PUBLISHED_LAYOUT.default_boxes().to(device)
        self._loss = MultiBoxLoss(self._defaults)
        self._autocast = partial(torch.autocast, device.type, DTYPES[precision], enabled=precision != "fp32")
        low = torch.rand(batch, 10, 2, device=device) * 0.7
        self._boxes = torch.cat([low, low + 0.05 + 0.25 * torch.rand(batch, 10, 2, device=device)], 2)
        self._labels = torch.randint(1, NUM_CLASSES, (batch, 10), device=device)
        self._pixels = random_pixels(batch, device)
        self._ema = config.ema

    def __call__(self, mark: Callable[[str], object] = lambda stage: None) -> None:
        """A step; `mark` is called after each stage with its name."""
        matched, classes = match(self._boxes, self._labels, self._defaults)
        mark("match")
        with self._autocast():
            loc, conf = self._model(normalize(self._pixels))
        mark("forward")
        losses = self._loss(loc, conf, matched, classes)
        loss = (losses.loc + losses.conf).mean()
        mark("loss")
        self._scaler.scale(loss).backward()
        mark("backward")
        self._scaler.unscale_(self._optimizer)
        nn.utils.get_total_norm([each.grad for each in self._model.parameters()])
        self._scaler.step(self._optimizer)
        self._scaler.update(None if self._fp16 else 1.0)
        self._optimizer.zero_grad()
        mark("optimiser")
        update_average(self._average, self._model, self._ema, 10_000)
        mark("average")


def train(place: Place, rows: list[Row]) -> None:
    precisions = [each for each in ("bf16", "fp16") if each in place.precisions] or ["fp32"]
    for batch in place.sizes.train_batches:
        for precision in precisions:
            rows.append(step_row(place, batch, precision))


def step_row(place: Place, batch: int, precision: str) -> Row:
    on_gpu = place.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place.device)
    step = Step(place, batch, precision)
    (seconds,) = medians(place, {"step": step}).values()
    row: Row = {"batch": batch, "precision": precision} | place.rates(seconds, batch, precision, passes=3)
    if on_gpu:
        row["GB"] = torch.cuda.max_memory_allocated(place.device) / 1e9
    return row | stages(place, step)


def stages(place: Place, step: Step) -> dict[str, float]:
    """Median milliseconds of each stage of a step."""
    times: dict[str, list[float]] = {}
    for _ in range(place.sizes.rounds):
        marks = [("start", now(place.device))]
        step(lambda stage, marks=marks: marks.append((stage, now(place.device))))
        if place.device.type == "cuda":
            torch.cuda.synchronize(place.device)
        for (_, before), (stage, after) in pairwise(marks):
            times.setdefault(stage, []).append(milliseconds(before, after))
    return {stage: statistics.median(values) for stage, values in times.items()}


def now(device: torch.device) -> Any:
    """A moment: of the device's work where it is a GPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(before: Any, after: Any) -> float:
    """Between two moments that have passed."""
    return before.elapsed_time(after) if isinstance(before, torch.cuda.Event) else 1e3 * (after - before)


# --- Files ------------------------------------------------------------------------------------------------


def stream(place: Place, rows: list[Row]) -> None:
    """JPEG files of 640x480 to detections; all the reading is of files that the system holds in memory."""
    with tempfile.TemporaryDirectory() as name:
        scenes = draw_images(Path(name), place.sizes.scenes)
        folder = Path(name) / "photos"
        folder.mkdir()
        files = [str(folder / f"{number:06}.jpg") for number in range(place.sizes.files)]
        for number, file in enumerate(files):
            shutil.copy(scenes[number % len(scenes)], file)

        def note(what: str, run: Callable[[], Iterable[object]]) -> None:
            start = time.perf_counter()
            objects = sum(len(each) if isinstance(each, Detections) else 0 for each in run())
            seconds = time.perf_counter() - start
            rows.append({"what": what, "images/s": len(files) / seconds, "s": seconds, "objects": objects})

        note("read and resize, one thread", lambda: map(read, files))
        with ThreadPoolExecutor(READERS) as pool:
            note(f"read and resize, {READERS} threads", lambda: pool.map(read, files))
        backbone, device = place.sizes.backbone, place.device
        random = backends.of_model(random_model(backbone).to(device), place.precisions[-1])
        detectors = {
            f"{backbone}, random": Detector(random, NAMES),
            "shapes": Detector.load("shapes", device),
        }
        for title, detector in detectors.items():
            for batch in place.sizes.stream_batches:
                list(detector.stream(files[: 4 * batch], batch_size=batch))
                what = f"Detector.stream, {title}, {detector.precision}, batch {batch}"
                note(what, partial(detector.stream, files, batch_size=batch))


def read(file: str) -> Tensor:
    return resize(load_image(file), PUBLISHED_LAYOUT.size)


# --- All of it --------------------------------------------------------------------------------------------


def describe(device: torch.device) -> Row:
    """What the numbers are of."""
    facts: Row = {"cpu": heading(), "torch": torch.__version__, "card": "none"}
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["card"] = torch.cuda.get_device_name(device)
        facts["memory, GB"] = torch.cuda.get_device_properties(device).total_memory / 1e9
        if shutil.which(query[0]):
            facts["driver"] = subprocess.run(
                query, capture_output=True, text=True, check=False
            ).stdout.strip()
        facts["cuda"], facts["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
        facts["cudnn.benchmark"] = torch.backends.cudnn.benchmark
        facts["TF32 in convolutions"] = torch.backends.cudnn.allow_tf32
        facts["TF32 in matrix products"] = torch.backends.cuda.matmul.allow_tf32
    return facts


def main() -> None:
    sections: dict[str, Callable[[Place, list[Row]], None]] = {
        "tests": run_tests,
        "parity": parity,
        "forward": forward,
        "postprocess": decode_and_suppress,
        "train": train,
        "stream": stream,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(sections), default=list(sections))
    parser.add_argument(
        "--compiled",
        nargs="*",
        choices=list(DTYPES),
        default=["bf16"],
        help="precisions that forward also compiles for; a minute each",
    )
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN try its algorithms")
    parser.add_argument("--json", type=Path, help="also write the last line here, after each section")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    if options.dry_run:
        torch._dynamo.config.disable = True  # compiling takes a minute
    elif not torch.cuda.is_available():
        sys.exit("there is no CUDA device; --dry-run runs on the CPU")
    device = torch.device("cpu" if options.dry_run else "cuda:0")
    sizes = TINY if options.dry_run else Sizes()
    header = describe(device)
    print(*(f"{name}: {value}" for name, value in header.items()), sep="\n", flush=True)
    place = Place(device, sizes, measure_peaks(device, sizes), flops(NUM_CLASSES, sizes.backbone))
    peaks = {name: rate / 1e12 for name, rate in place.peaks.items()}
    show(f"product of matrices of {sizes.matrix} rows, TFLOP/s", [peaks])

    report: Row = {"header": header, "peaks": peaks, "sections": {}, "failed": []}
    sections["forward"] = partial(forward, compiled=tuple(options.compiled))
    for name in options.only:
        start = time.perf_counter()
        rows = report["sections"][name] = []
        try:
            sections[name](place, rows)
        except Exception:
            traceback.print_exc()
            report["failed"].append(name)
        if rows:  # also of a section that failed: what it had done
            show(TITLES[name].format(**vars(sizes)), rows)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        if options.json:  # also what is done so far, in case that the time is up
            options.json.write_text(f"{json.dumps(report)}\n")
    if report["failed"]:
        print(f"failed: {', '.join(report['failed'])}")
    print(json.dumps(report))
    sys.exit(1 if report["failed"] else 0)


if __name__ == "__main__":
    main()
