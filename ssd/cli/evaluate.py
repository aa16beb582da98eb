"""``ssd evaluate``."""

import json
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ssd.cli.common import (
    AUTO,
    BatchSize,
    Data,
    Device,
    Images,
    Json,
    Precision,
    Weights,
    chosen_device,
    load_detector,
    results_folder,
)
from ssd.cli.options import OneOf
from ssd.data import SPLITS, load, usable_for_evaluation
from ssd.data.judge import notes_of
from ssd.distributed import join
from ssd.evaluate import coco_results, detect_all, measure
from ssd.files import atomic_file


def evaluate(
    data: Data,
    weights: Weights = "coco",
    split: Annotated[str, OneOf(SPLITS), typer.Option(help="Which part of the dataset.")] = "val",
    images: Images = None,
    device: Device = None,
    precision: Precision = AUTO,
    batch_size: BatchSize = 8,
    output: Annotated[
        Path | None, typer.Option(help="Where to write; by default a new folder runs/evaluate-N.")
    ] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Curves, confusion matrix, worst images.")] = False,
    lenient: Annotated[bool, typer.Option("--lenient", help="Leave out what cannot be used.")] = False,
    as_json: Json = False,
) -> None:
    """Several processes: torchrun --nproc-per-node N -m ssd evaluate ..."""
    if output is not None and (output / "metrics.json").exists():
        raise typer.BadParameter(f"{output} holds an evaluation already", param_hint="--output")
    if plots:
        from ssd.plots import draw_plots, require_matplotlib  # noqa: PLC0415 (imports pycocotools)

        require_matplotlib()  # before all the work, not after it
    with join(chosen_device(device)) as world, results_folder(output, "evaluate", world) as folder:
        detector = load_detector(weights, world, device, precision)
        annotations = load(data, split, images=images, class_names=detector.class_names)
        annotations = usable_for_evaluation(annotations, lenient=lenient)
        if world.is_main:
            for line in notes_of(annotations, "evaluation"):
                typer.echo(f"{split}: {line}", err=as_json)
        share = len(world.share(len(annotations), batch_size))
        hidden = True if not world.is_main or as_json else None
        with tqdm(total=share, unit="image", disable=hidden) as bar:
            truth, found = detect_all(detector, annotations, world, batch_size=batch_size, on_done=bar.update)
        if not world.is_main:
            return
        result = measure(truth, found)
        facts = result.to_dict() | {"data": str(data), "split": split, "weights": weights}
        facts |= {"precision": detector.precision}
        typer.echo(json.dumps(facts, indent=2) if as_json else result)  # whatever becomes of the files
        for name, content in (("metrics", facts), ("detections", coco_results(truth, found))):
            with atomic_file(folder / f"{name}.json") as file:
                file.write(json.dumps(content).encode())
        if plots:
            draw_plots(truth, found, folder)
    typer.echo(f"\nmetrics.json and detections.json in {folder}", err=as_json)
