"""``ssd evaluate``."""

import json
import os
import re
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ssd.cli.common import (
    AUTO,
    BatchSize,
    Data,
    Device,
    Flips,
    Follow,
    Images,
    Json,
    Precision,
    Tiles,
    Voting,
    Weights,
    chosen_device,
    load_detector,
    load_to_measure,
    results_folder,
    usage_errors,
)
from ssd.cli.options import OneOf
from ssd.data import SPLITS, usable_for_evaluation
from ssd.data.judge import notes_of
from ssd.distributed import join
from ssd.evaluate import coco_results, detect_all, measure
from ssd.files import clear_leftovers, write_new
from ssd.plots import draw_plots, require_matplotlib

_WRITTEN = ("metrics.json", "detections.json", "precision_recall.png", "confusion.png", "worst")
"""Into the folder; what it holds of these is never overwritten. Pictures are only written with --plots."""


def evaluate(
    data: Data,
    weights: Weights = "coco",
    split: Annotated[str, OneOf(SPLITS), typer.Option(help="Which part of the dataset.")] = "val",
    images: Images = None,
    follow: Follow = False,
    device: Device = None,
    precision: Precision = AUTO,
    batch_size: BatchSize = 8,
    tiles: Tiles = None,
    voting: Voting = False,
    flips: Flips = False,
    output: Annotated[
        Path | None, typer.Option(help="Where to write; by default a new folder runs/evaluate-N.")
    ] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Curves, confusion matrix, worst images.")] = False,
    lenient: Annotated[bool, typer.Option("--lenient", help="Leave out what cannot be used.")] = False,
    as_json: Json = False,
) -> None:
    """Several processes: torchrun --nproc-per-node N -m ssd evaluate ..."""
    if output is not None:
        for name in _WRITTEN:
            if os.path.lexists(output / name) and (plots or name.endswith(".json")):
                what = "an evaluation" if name == "metrics.json" else name
                raise typer.BadParameter(f"{output} holds {what} already", param_hint="--output")
    if plots:
        require_matplotlib()  # before all the work, not after it
    with join(chosen_device(device)) as world, results_folder(output, "evaluate", world) as folder:
        detector = load_detector(weights, world, device, precision)
        names = detector.class_names

        def say(line: str) -> None:
            if world.is_main:
                typer.echo(line, err=as_json)

        annotations = load_to_measure(data, split, weights, images, names, follow=follow, say=say)
        annotations = usable_for_evaluation(annotations, lenient=lenient)
        for line in notes_of(annotations, "evaluation"):
            say(f"{split}: {line}")
        share = len(world.share(len(annotations), batch_size))
        hidden = True if not world.is_main or as_json else None
        with usage_errors(), tqdm(total=share, unit="image", disable=hidden) as bar:
            truth, found = detect_all(
                detector,
                annotations,
                world,
                batch_size=batch_size,
                tiles=tiles,
                voting=voting,
                flips=flips,
                on_done=bar.update,
            )
        if not world.is_main:
            return
        result = measure(truth, found)
        facts = result.to_dict() | {"data": str(data), "split": split, "weights": weights}
        facts |= {"precision": detector.precision}
        options = {"tiles": tiles, "voting": voting, "flips": flips}
        facts |= {name: value for name, value in options.items() if value}  # as in earlier versions
        typer.echo(json.dumps(facts, indent=2) if as_json else result)  # whatever becomes of the files
        contents: dict[str, bytes | memoryview] = {
            **(draw_plots(truth, found) if plots else {}),
            "detections.json": json.dumps(coco_results(truth, found)).encode(),
            "metrics.json": json.dumps(facts).encode(),
        }
        clear_leftovers(folder, "|".join(map(re.escape, _WRITTEN)))
        clear_leftovers(folder / "worst")
        write_new({folder / name: content for name, content in contents.items()})
    typer.echo(f"\nmetrics.json and detections.json in {folder}", err=as_json)
