"""How fast a detector is here, stage by stage."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ssd.backends.base import Options
from ssd.boxes import PUBLISHED_LAYOUT, Layout
from ssd.choices import Backbone
from ssd.detector import Detector, Input
from ssd.devices import DTYPES, is_emulated
from ssd.drawing import encoded
from ssd.files import write_file
from ssd.fused import Conv, can_pack
from ssd.images import ImageSource, load_image, source_name
from ssd.model import SSD
from ssd.shapes import draw_scene
from ssd.tiles import cut
from ssd.transforms import resize

STAGES = ("read", "transform", "forward", "postprocess")


@dataclass(frozen=True)
class Report:
    """What `run_benchmark` measured; times in milliseconds."""

    detector: str
    size: int
    """Width and height of the network's input."""
    batch_size: int
    threads: int
    images_per_second: float
    """Of `Detector.stream`, which reads ahead in other threads."""
    latency: dict[str, float]
    """From files to detections of one batch, one after the other: p50, p90 and p99."""
    stages: dict[str, float]
    """Median of each of `STAGES`, of one batch: decode files; resize and stack; network; NMS and results."""
    peak_memory: float | None
    """Megabytes: of the process, or on CUDA of the device's tensors; None where the system does not tell."""
    gflops: float | None
    """Rate of the network, in GFLOP/s; None for int8, and where NMS is part of it."""
    peak_gflops: float | None
    """What the machine reaches in this precision: the faster of a matrix product and a convolution."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        total = sum(self.stages.values())
        size = f"{self.size}x{self.size}"
        lines = [f"{self.detector}, {size}, batches of {self.batch_size}, {self.threads} threads", ""]
        lines += [f"{'images/s':14}{self.images_per_second:9.1f}"]
        lines += [f"{'latency ' + name:14}{value:9.1f} ms" for name, value in self.latency.items()]
        lines += [
            f"  {name:12}{value:9.1f} ms {100 * value / total:5.1f} %" for name, value in self.stages.items()
        ]
        lines += [f"{'peak memory':14}{self.peak_memory:9.0f} MB"] if self.peak_memory else []
        if self.gflops and self.peak_gflops:
            share = 100 * self.gflops / self.peak_gflops
            lines += [
                f"{'network':14}{self.gflops:9.0f} GFLOP/s, {share:.0f} % of the {self.peak_gflops:.0f} "
                "that this machine reaches"
            ]
        return "\n".join(lines)


def run_benchmark(
    detector: Detector,
    sources: Sequence[ImageSource],
    *,
    batch_size: int = 1,
    rounds: int = 50,
) -> Report:
    """Measure a detector on image files.

    Args:
        detector: of any backend.
        sources: most often files; they are used in turn.
        batch_size: images in the network at a time.
        rounds: batches that are measured, after three that are not.

    Raises:
        ImageError, FileNotFoundError: a file cannot be read.
        ValueError: there are no sources, or less than one round.
    """
    if not sources or rounds < 1 or batch_size < 1:
        raise ValueError("benchmark needs at least one source, one round, and one image in a batch")
    if detector.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(detector.device)
    times: dict[str, list[float]] = {name: [] for name in STAGES}
    for number in range(-3, rounds):
        start = (number + 3) * batch_size
        batch = [sources[i % len(sources)] for i in range(start, start + batch_size)]
        for name, seconds in _one_batch(detector, batch).items():
            if number >= 0:
                times[name].append(1e3 * seconds)
    totals = [sum(batch_times) for batch_times in zip(*times.values(), strict=True)]
    stages = {name: statistics.median(values) for name, values in times.items()}

    many = [sources[i % len(sources)] for i in range(rounds * batch_size)]
    start_of_all = time.perf_counter()
    for _ in detector.stream(many, batch_size=batch_size):
        pass
    seconds = time.perf_counter() - start_of_all

    memory = _peak_memory(detector.device)  # before the machine's peak is measured, which takes some too
    rate = peak = None
    backend = detector.backend
    if backend.precision in DTYPES and backend.nms is None:
        operations = flops(backend.num_classes, backend.backbone, backend.layout) * batch_size
        rate = operations / stages["forward"] / 1e6
        peak = peak_flops(backend.device, DTYPES[backend.precision]) / 1e9
    return Report(
        detector=repr(detector),
        size=detector.layout.size,
        batch_size=batch_size,
        threads=torch.get_num_threads(),
        images_per_second=len(many) / seconds,
        latency={f"p{p}": float(np.percentile(totals, p)) for p in (50, 90, 99)},
        stages=stages,
        peak_memory=memory,
        gflops=rate,
        peak_gflops=peak,
    )


def _one_batch(detector: Detector, sources: Sequence[ImageSource]) -> dict[str, float]:
    """Seconds of each stage."""
    options = Options()
    marks = [time.perf_counter()]

    def mark() -> None:
        if detector.device.type == "cuda":
            torch.cuda.synchronize(detector.device)
        marks.append(time.perf_counter())

    images = [load_image(source) for source in sources]
    mark()
    with torch.inference_mode():
        batch = [
            _as_input(source, image, detector.layout.size)
            for source, image in zip(sources, images, strict=True)
        ]
        pixels = detector.pixels(batch)
        mark()
        outputs = detector.backend.forward(pixels)
        mark()
        detector.results(batch, detector.backend.finish(outputs, options).cpu().per_image(), options)
        mark()
    return dict(zip(STAGES, np.diff(marks).tolist(), strict=True))


def _as_input(source: ImageSource, image: Image.Image, size: int) -> Input:
    windows = tuple(cut(*image.size, None))
    return Input(source_name(source), image, image.size, resize(image, size)[None], windows)


def flops(num_classes: int, backbone: Backbone, layout: Layout = PUBLISHED_LAYOUT) -> float:
    """Floating-point operations of the network for one image; a multiplication and an addition are two."""
    with torch.device("meta"):
        model = SSD(num_classes, backbone, layout=layout).eval()
        images = torch.empty(1, 3, layout.size, layout.size)
    with FlopCounterMode(display=False) as counter:
        model(images)
    return float(counter.get_total_flops())


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """What a device reaches: the best of some matrix products, and of some convolutions as the trunk's."""
    if is_emulated(device, dtype):
        dtype = torch.float32  # what the network then computes in
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    best = 2 * size**3 / _fastest(lambda: a @ a, device)
    channels, cells, batch = 256, 38, 64 if device.type == "cuda" else 8
    conv = Conv(nn.Conv2d(channels, channels, 3, padding=1), nn.Identity(), relu=True).to(device, dtype)
    x = torch.randn(batch, channels, cells, cells, device=device).to(dtype)
    x = x.to(memory_format=torch.channels_last)
    if can_pack(device, dtype):
        conv.pack(tuple(x.shape))
    return max(best, 2 * 9 * channels**2 * cells**2 * batch / _fastest(lambda: conv(x), device))


def _fastest(run: Callable[[], Tensor], device: torch.device) -> float:
    seconds = []
    with torch.inference_mode():
        for _ in range(10):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return min(seconds)


def _peak_memory(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource  # noqa: PLC0415
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def draw_images(folder: Path, count: int = 16) -> list[str]:
    """Files to measure on where there are none: made-up scenes as JPEG, 640 x 480."""
    paths = []
    for number in range(count):
        image, _, _ = draw_scene(np.random.default_rng(number))
        path = folder / f"{number:03}.jpg"
        write_file(path, encoded(image.resize((640, 480))))
        paths.append(str(path))
    return paths
