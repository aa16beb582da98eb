"""``ssd train``."""

import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ssd.boxes import LAYOUTS
from ssd.cli.common import (
    DATA_HELP,
    INTERRUPTED,
    Device,
    Images,
    chosen_device,
    folder_of_all,
    usage_errors,
)
from ssd.cli.options import FieldsOf, OneOf
from ssd.data import (
    Annotations,
    DetectionDataset,
    find_split,
    is_without_images,
    load,
    usable_for_evaluation,
)
from ssd.distributed import join
from ssd.errors import UserError
from ssd.loss import LOSSES
from ssd.train import PRESETS, TrainConfig, fit, keep_memory


def train(
    data: Annotated[
        Path | None,
        typer.Argument(help=DATA_HELP, show_default=False),
    ] = None,
    images: Images = None,
    val: Annotated[Path | None, typer.Option(help="To evaluate on; by default DATA's val split.")] = None,
    val_images: Annotated[Path | None, typer.Option(help="Folder of its images.")] = None,
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
    **choices: Annotated[Any, FieldsOf(TrainConfig, {"layout": LAYOUTS, "loss": LOSSES})],
) -> None:
    """Several processes: torchrun --nproc-per-node N -m ssd train ..."""
    given = {name: value for name, value in choices.items() if value is not None}
    if data is None and resume is None:
        raise typer.BadParameter("give a dataset, or --resume RUN")
    if resume is not None and resume.is_file():
        resume = resume.parent  # a file of the run, such as last.safetensors
    if resume is not None and (output or preset):
        raise typer.BadParameter(
            "a run that goes on keeps its folder and preset; leave out --output, --preset"
        )
    paths = {"data": data, "images": images, "val": val, "val_images": val_images}
    # Resuming may start in another folder.
    source: dict[str, Any] = {key: str(path.absolute()) for key, path in paths.items() if path is not None}
    source |= {"lenient": True} if lenient else {}
    if os.path.isfile(given.get("weights", "")):
        given["weights"] = os.path.abspath(given["weights"])
    keep_memory()
    config, source = _settle(preset or "default", resume, given, source)
    train_set, val_set = _datasets(source, crowd=config.crowd)
    with join(chosen_device(device)) as world:
        folder = resume or folder_of_all(output, "train", world)
        try:
            result = fit(
                train_set,
                val_set,
                config,
                folder,
                category_ids=train_set.annotations.category_ids,
                world=world,
                resume=resume is not None,
                say=typer.echo,
                source=source,
                tensorboard=tensorboard,
            )
        except Exception as error:
            with suppress(OSError):
                folder.rmdir()  # where nothing was written
            if isinstance(error, ValueError) and not isinstance(error, UserError):
                raise typer.BadParameter(str(error)) from error
            raise
    if not result.finished:
        raise typer.Exit(INTERRUPTED)
    if world.is_main:
        if result.evaluation:
            typer.echo(f"\n{result.evaluation}")
        best = next(name for name in ("best", "last") if (folder / f"{name}.safetensors").exists())
        typer.echo(f"\nDetect with it: ssd detect PHOTO --weights {folder / best}.safetensors")


def _settle(
    preset: str, resume: Path | None, choices: dict[str, Any], source: dict[str, Any]
) -> tuple[TrainConfig, dict[str, Any]]:
    """The config, and where the data is: what is given, over what the run or the preset says."""
    if resume is not None:
        saved = _read_run(resume)
        source, config = (saved["data"] or {}) | source, saved["config"] | choices
        if "data" not in source:
            raise typer.BadParameter(f"{resume} was not started by this command; give its dataset too")
    else:
        config = asdict(PRESETS[preset]) | choices
    try:
        with usage_errors():
            return TrainConfig(**config), source
    except TypeError as error:
        raise typer.BadParameter(str(error)) from error


def _read_run(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        saved = json.loads(file.read_bytes())
        return {"data": saved["data"], "config": saved["config"]}
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(f"{file} is not what ssd train wrote ({error})") from error


def _datasets(source: dict[str, Any], *, crowd: bool) -> tuple[DetectionDataset, Annotations | None]:
    """The dataset to train on, and the annotations to evaluate with, if there are any."""
    lenient = source.get("lenient", False)
    annotations = load(source["data"], "train", images=source.get("images"))
    train_set = DetectionDataset(annotations, lenient=lenient, crowd=crowd)
    path, names = source.get("val", source["data"]), annotations.class_names
    if "val" not in source and not find_split(path, "val"):
        return train_set, None
    val_set = load(path, "val", images=source.get("val_images"), class_names=names)
    if "images" in source and not {"val", "val_images"} & set(source) and is_without_images(val_set):
        val_set = load(path, "val", images=source["images"], class_names=names)
    return train_set, usable_for_evaluation(val_set, lenient=lenient)
