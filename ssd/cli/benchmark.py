"""``ssd benchmark``."""

import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer

from ssd.backends import BACKENDS, kind_of
from ssd.benchmark import draw_images, run_benchmark
from ssd.cli.common import (
    AUTO,
    BatchSize,
    Device,
    Json,
    Precision,
    Weights,
    chosen_device,
    load_detector,
    usage_errors,
)
from ssd.cli.options import OneOf
from ssd.distributed import World
from ssd.export import export
from ssd.sources import find_images

_IN_TORCH = ("torch", "compile")


def benchmark(
    sources: Annotated[
        list[str] | None, typer.Argument(help="Images; by default made-up scenes.", show_default=False)
    ] = None,
    weights: Weights = "shapes",
    device: Device = None,
    precision: Precision = AUTO,
    batch_size: BatchSize = 1,
    backend: Annotated[
        str, OneOf((*_IN_TORCH, *BACKENDS)), typer.Option(help="What runs a checkpoint.")
    ] = "torch",
    rounds: Annotated[int, typer.Option(min=1, help="Batches to measure.")] = 50,
    as_json: Json = False,
) -> None:
    """Nothing is written."""
    images: list[Any] = [each.image for source in sources or () for each in find_images(source)]
    if sources and not images:
        raise typer.BadParameter(f"no images in {', '.join(sources)}", param_hint="SOURCES")
    if backend != "torch" and kind_of(weights):
        raise typer.BadParameter(f"{weights} is exported already", param_hint="--backend")
    with tempfile.TemporaryDirectory() as folder:
        used = weights
        if backend not in _IN_TORCH:
            path = Path(folder) / f"model{BACKENDS[backend].ending}"
            kept = "fp32" if BACKENDS[backend].chooses_precision or precision == AUTO else precision
            # In a process of its own, since it needs more memory than what is measured.
            with usage_errors(), ProcessPoolExecutor(1, get_context("spawn")) as pool:
                used = str(pool.submit(export, weights, path, backend, precision=kept).result())
        world = World(0, 1, chosen_device(device))
        detector = load_detector(used, world, device, precision, compile=backend == "compile")
        report = run_benchmark(
            detector, images or draw_images(Path(folder)), batch_size=batch_size, rounds=rounds
        )
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else report)
