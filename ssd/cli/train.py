"""``ssd train``."""

import json
import os
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from ssd.boxes import FITTED, LAYOUTS
from ssd.check import load_beside
from ssd.cli import INTERRUPTED
from ssd.cli.common import (
    DATA_HELP,
    Device,
    Follow,
    Images,
    as_argument,
    chosen_device,
    results_folder,
    usage_errors,
)
from ssd.cli.options import FieldsOf, OneOf
from ssd.data import (
    Annotations,
    DetectionDataset,
    find_split,
    load,
    usable_for_evaluation,
)
from ssd.data.holdout import HELD_OUT, hold_out, part_by_names, read_held_out
from ssd.distributed import World, join
from ssd.errors import UserError, shown
from ssd.files import atomic_file
from ssd.loss import LOSSES
from ssd.train import PRESETS, Result, TrainConfig, fit, keep_memory
from ssd.train.setup import plan, require_free


def train(
    data: Annotated[
        Path | None,
        typer.Argument(help=DATA_HELP, show_default=False),
    ] = None,
    images: Images = None,
    follow: Follow = False,
    val: Annotated[Path | None, typer.Option(help="To evaluate on; by default DATA's val split.")] = None,
    val_images: Annotated[Path | None, typer.Option(help="Folder of its images.")] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(
            help="Part of the images to hold out and evaluate on, such as 0.2, where there is no val split."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder; by default runs/train-N.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to go on with; needs nothing else.")] = None,
    preset: Annotated[
        str | None,
        OneOf(PRESETS),
        typer.Option(help="What the options below start from.", show_default="default"),
    ] = None,
    device: Device = None,
    lenient: Annotated[bool, typer.Option("--lenient", help="Leave out annotations that are bad.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write for TensorBoard.")] = False,
    **choices: Annotated[Any, FieldsOf(TrainConfig, {"layout": (*LAYOUTS, *FITTED), "loss": LOSSES})],
) -> None:
    """Several processes: torchrun --nproc-per-node N -m ssd train ..."""
    given = {name: value for name, value in choices.items() if value is not None}
    _require_sense(data, val, resume, val_fraction, starts=bool(output or preset))
    if resume is not None and resume.is_file():
        resume = resume.parent  # a file of the run, such as last.safetensors
    paths = {"data": data, "images": images, "val": val, "val_images": val_images}
    # Resuming may start in another folder.
    source: dict[str, Any] = {key: str(path.absolute()) for key, path in paths.items() if path is not None}
    source |= {"lenient": True} if lenient else {}
    source |= {"follow": True} if follow else {}
    source |= {"val_fraction": val_fraction} if val_fraction is not None else {}
    if os.path.isfile(given.get("weights", "")):
        given["weights"] = os.path.abspath(given["weights"])
    keep_memory()
    config, source = _settle(preset or "default", resume, given, source)
    with (
        join(chosen_device(device)) as world,
        results_folder(output, "train", world) if resume is None else nullcontext(resume) as folder,
    ):
        result = _run(source, config, folder, world, resume=resume is not None, tensorboard=tensorboard)
    if not result.finished:
        raise typer.Exit(INTERRUPTED)
    if world.is_main:
        if result.evaluation:
            typer.echo(f"\n{result.evaluation}")
        best = next(file for name in ("best", "last") if (file := folder / f"{name}.safetensors").exists())
        tiles = f" --tiles {config.tiles}" if config.tiles else ""
        typer.echo(f"\nDetect with it: ssd detect PHOTO --weights {as_argument(best)}{tiles}")


def _run(
    source: dict[str, Any],
    config: TrainConfig,
    folder: Path,
    world: World,
    *,
    resume: bool,
    tensorboard: bool,
) -> Result:
    """Train in a run folder; what was noted there of images to hold out goes if the run does not begin."""
    if not resume:
        require_free(folder / "state.pt")
    own_list = not (folder / HELD_OUT).exists()
    try:
        train_set, val_set = _datasets(source, crowd=config.crowd)
        if "val_fraction" in source:
            if not resume and val_set is not None:
                raise typer.BadParameter(
                    "there is a val split, which is what is evaluated on; leave out --val-fraction"
                )
            train_set, val_set = _held_out(
                train_set, source["val_fraction"], config, folder, world, resume=resume
            )
        return fit(
            train_set,
            val_set,
            config,
            folder,
            category_ids=train_set.annotations.category_ids,
            world=world,
            resume=resume,
            say=typer.echo,
            source=source,
            tensorboard=tensorboard,
        )
    except BaseException as error:
        if own_list and not (folder / "config.json").exists():  # the run has not begun
            (folder / HELD_OUT).unlink(missing_ok=True)
        if isinstance(error, ValueError) and not isinstance(error, UserError):
            raise typer.BadParameter(str(error)) from error
        raise


def _require_sense(
    data: Path | None, val: Path | None, resume: Path | None, val_fraction: float | None, *, starts: bool
) -> None:
    """Refuse arguments that contradict each other; `starts`: some are only for a run that starts."""
    if data is None and resume is None:
        raise typer.BadParameter("give a dataset, or --resume RUN")
    if resume is not None and starts:
        raise typer.BadParameter(
            "a run that goes on keeps its folder and preset; leave out --output, --preset"
        )
    if val_fraction is None:
        return
    if resume is not None:
        raise typer.BadParameter("a run that goes on keeps what it held out; leave out --val-fraction")
    if val is not None:
        raise typer.BadParameter("--val is what is evaluated on; leave it out, or --val-fraction")
    if not 0 < val_fraction < 1:
        raise typer.BadParameter(f"--val-fraction is above 0 and below 1, such as 0.2; got {val_fraction:g}")


def _settle(
    preset: str, resume: Path | None, choices: dict[str, Any], source: dict[str, Any]
) -> tuple[TrainConfig, dict[str, Any]]:
    """The config, and where the data is: what is given, over what the run or the preset says."""
    if resume is not None:
        saved = _read_run(resume)
        source, config = saved["data"] | source, saved["config"] | choices
        if "loss" not in saved["config"] and choices.get("loss", "multibox") != "multibox":
            raise typer.BadParameter(f"{resume} was begun without a choice of --loss, and keeps multibox")
        if "data" not in source:
            raise typer.BadParameter(f"{resume} was not started by this command; give its dataset too")
        if {"val", "val_fraction"} <= set(source):
            raise typer.BadParameter(f"{resume} evaluates on the images that it held out; leave out --val")
    else:
        config = asdict(PRESETS[preset]) | choices
    try:
        with usage_errors():
            return TrainConfig(**config), source
    except TypeError as error:
        where = f"{resume / 'config.json'}: " if resume else ""
        raise typer.BadParameter(f"{where}{error}") from error


def _read_run(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        saved = json.loads(file.read_bytes())
        data, config = saved["data"] or {}, saved["config"]
        if not isinstance(data, dict) or not isinstance(config, dict):
            raise TypeError("its data and config are not named values")
        for name in ("data", "val", "images", "val_images"):
            if not isinstance(data.get(name, ""), str):
                raise TypeError(f"its {name} is no path, but {shown(data[name])}")
        return {"data": data, "config": config}
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.json") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise typer.BadParameter(f"{file} is not what ssd train wrote ({error})") from error


def _datasets(source: dict[str, Any], *, crowd: bool) -> tuple[DetectionDataset, Annotations | None]:
    """The dataset to train on, and the annotations to evaluate with, if there are any."""
    lenient, follow = source.get("lenient", False), source.get("follow", False)
    annotations = load(source["data"], "train", images=source.get("images"), follow=follow)
    train_set = DetectionDataset(annotations, lenient=lenient, crowd=crowd)
    path, names = source.get("val", source["data"]), annotations.class_names
    if "val" not in source and not find_split(path, "val"):
        return train_set, None
    if {"val", "val_images"} & set(source):
        val_set = load(path, "val", images=source.get("val_images"), class_names=names, follow=follow)
    else:
        val_set = load_beside(path, "val", source.get("images"), names, follow=follow)
    return train_set, usable_for_evaluation(val_set, lenient=lenient)


def _held_out(
    whole: DetectionDataset,
    fraction: float,
    config: TrainConfig,
    folder: Path,
    world: World,
    *,
    resume: bool,
) -> tuple[DetectionDataset, Annotations]:
    """The images to train on, and those that are held out: as the run folder says, or chosen and noted."""
    file = folder / HELD_OUT
    annotations = whole.annotations
    if resume:
        train, val = part_by_names(annotations, read_held_out(file))
    else:
        hidden = True if not world.is_main else None
        with tqdm(
            total=len(annotations), desc="looking for copies", unit="image", disable=hidden, leave=False
        ) as bar:
            train, val = hold_out(annotations, fraction, config.seed, crowd=whole.crowd, on_done=bar.update)
        try:
            plan(len(train), config, world)
        except ValueError as error:
            held = f"--val-fraction {fraction:g} holds out {len(val)} of {len(annotations)} images"
            raise ValueError(f"{error}; {held}") from error
        if world.is_main:
            with atomic_file(file) as new:
                new.write("".join(f"{name}\n" for name in val.file_names).encode("utf-8", "surrogateescape"))
    if world.is_main:
        held = f"{len(val)} of {len(annotations)} images are held out to evaluate on"
        typer.echo(f"{held}, nearly equal ones together; {file} lists them")
    # What was left out is told of the images to train on.
    return DetectionDataset(train, crowd=whole.crowd), replace(val, left_out={})
