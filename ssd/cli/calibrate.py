"""``ssd calibrate``."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer
from tqdm import tqdm

from ssd.backends import kind_of, of_model
from ssd.calibration import least_matched
from ssd.cli.common import (
    AUTO,
    BATCH_MEMORY,
    BatchSize,
    Data,
    Device,
    Follow,
    Images,
    Json,
    Precision,
    Tiles,
    as_argument,
    chosen_device,
    load_to_measure,
    usage_errors,
)
from ssd.cli.options import OneOf
from ssd.data import SPLITS, usable_for_evaluation
from ssd.data.judge import notes_of
from ssd.detector import Detector
from ssd.devices import choose_precision
from ssd.distributed import alone
from ssd.errors import as_line
from ssd.evaluate import Calibrated, calibrated, detect_all
from ssd.files import gone_if_unused, make_folder, write_new
from ssd.memory import keep_memory
from ssd.model import load_model
from ssd.plots import draw_reliability, require_matplotlib


def calibrate(
    weights: Annotated[
        str,
        typer.Argument(help="A checkpoint file, a run folder, its URL, hf://owner/repo.", show_default=False),
    ],
    data: Data,
    split: Annotated[str, OneOf(SPLITS), typer.Option(help="Which part; not what was trained on.")] = "val",
    images: Images = None,
    follow: Follow = False,
    target_precision: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="That each class shall have; else its best F1 is taken."),
    ] = None,
    target_recall: Annotated[
        float | None, typer.Option(min=0, max=1, help="That each class shall have, instead.")
    ] = None,
    coverage: Annotated[
        float, typer.Option(help="The share of found objects that boxes with the margin are to hold.")
    ] = 0.9,
    device: Device = None,
    precision: Precision = AUTO,
    batch_size: BatchSize = 8,
    tiles: Tiles = None,
    output: Annotated[
        Path | None, typer.Option(help="Weights to write; by default WEIGHTS's name with -calibrated.")
    ] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Also a reliability diagram beside them.")] = False,
    lenient: Annotated[bool, typer.Option("--lenient", help="Leave out what cannot be used.")] = False,
    as_json: Json = False,
) -> None:
    """The numbers are kept in new weights, and used where detection asks for them.

    That is ssd detect --score-threshold calibrated.
    """
    if target_precision is not None and target_recall is not None:
        raise typer.BadParameter("give one of --target-precision and --target-recall")
    if not 0 < coverage < 1:
        raise typer.BadParameter(f"is above 0 and below 1; got {coverage:g}", param_hint="--coverage")
    if kind_of(weights):
        raise typer.BadParameter(f"{weights} is exported; calibrate the checkpoint that it was made of")
    path = output or Path(f"{Path(urlsplit(weights).path).stem or 'weights'}-calibrated.safetensors")
    picture = path.with_suffix(".png")
    if plots and picture == path:
        raise typer.BadParameter(f"{path} would be the diagram; call the weights otherwise")
    for file in (path, *([picture] if plots else [])):
        if os.path.lexists(file):
            raise typer.BadParameter(f"{file} is there already; --output FILE names another")
    if plots:
        require_matplotlib()
    with gone_if_unused(path.parent):
        make_folder(path.parent)  # before all the work, not after it
        target = chosen_device(device)
        keep_memory(BATCH_MEMORY)
        model, found = load_model(weights)
        with usage_errors():
            backend = of_model(model.to(target), choose_precision(precision, target))
        detector = Detector(backend, found.class_names, found.category_ids)
        say = partial(typer.echo, err=as_json)
        annotations = load_to_measure(data, split, weights, images, found.class_names, follow=follow, say=say)
        annotations = usable_for_evaluation(annotations, lenient=lenient)
        for line in notes_of(annotations, "evaluation"):
            say(f"{split}: {line}")
        hidden = True if as_json else None
        with usage_errors(), tqdm(total=len(annotations), unit="image", disable=hidden) as bar:
            truth, detections = detect_all(
                detector, annotations, alone(target), batch_size=batch_size, tiles=tiles, on_done=bar.update
            )
        result = calibrated(
            truth, detections, precision=target_precision, recall=target_recall, coverage=coverage
        )
        if as_json:
            facts = result.to_dict() | {"data": str(data), "split": split, "weights": weights}
            facts |= {"precision": detector.precision} | ({"tiles": tiles} if tiles else {})
            typer.echo(json.dumps(facts, indent=2))
        else:
            typer.echo(_table(result, coverage))
        thresholds = tuple(each.threshold for each in result.classes.values())
        replace(found, score_thresholds=thresholds, calibration=result.calibration).save(path)
        if plots:
            title = f"{as_line(str(weights), 60)} on {split} of {as_line(str(data), 40)}"
            write_new({picture: draw_reliability(result.before, result.after, title)})
    options = "--score-threshold calibrated" + (f" --tiles {tiles}" if tiles else "")
    typer.echo(f"\nDetect with it: ssd detect PHOTO --weights {as_argument(path)} {options}", err=as_json)


def _table(result: Calibrated, coverage: float) -> str:
    """What was found, for people."""
    wide = max(len("class"), *(len(as_line(name)) for name in result.classes))
    lines = [f"{'class':{wide}}  {'threshold':>9}  {'precision':>9}  {'recall':>6}  {'boxes':>6}"]
    lines += [
        f"{as_line(name):{wide}}  {row.threshold:9.3f}  {row.precision:9.3f}  {row.recall:6.3f}"
        f"  {row.boxes:6}" + ("" if row.reached else f"  {row.problem}")
        for name, row in result.classes.items()
    ]
    of, matched = result.calibration, result.calibration.matched
    lines += [
        "",
        f"scores: temperature {of.temperature:.3f}, bias {of.bias:+.3f}; expected calibration error "
        f"{result.before.error:.3f}, then {result.after.error:.3f} (each half of the images by a fit to the "
        "other)",
    ]
    if result.after.error > result.before.error:
        lines.append("That makes it worse: there are too few detections to learn from; take more images.")
    if of.margin is None:
        lines.append(
            f"boxes: no margin; for a coverage of {coverage:g} it takes {least_matched(coverage)} detections "
            f"that find an object, and there are {matched}"
        )
    else:
        lines.append(
            f"boxes: widened by {of.margin:.3f} of their width and height on each side, they hold the true "
            f"box of {coverage:.0%} of the objects that are found ({matched} were)"
        )
    return "\n".join(lines)
