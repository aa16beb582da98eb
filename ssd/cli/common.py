"""What verbs share: options, usage errors, the detector and the folder of all processes."""

import os
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, TypeAlias

import torch
import typer

from ssd.backends import kind_of
from ssd.choices import LEAST_TILE, PRECISIONS
from ssd.cli.options import OneOf
from ssd.data import FORMATS, AnnotationError, Annotations, find_split, load
from ssd.data.holdout import HELD_OUT, part_by_names, read_held_out
from ssd.detector import Detector
from ssd.devices import usable_device
from ssd.distributed import World
from ssd.errors import UserError
from ssd.files import make_folder, run_folder
from ssd.memory import keep_memory
from ssd.pretrained import PUBLISHED

AUTO = "auto"
BATCH_MEMORY = 256 << 20
"""Bytes of memory that a process keeps for its next batch; of eight images it takes blocks of up to 46 MB."""
Precision: TypeAlias = Annotated[
    str,
    OneOf((AUTO, *PRECISIONS)),
    typer.Option(help="Of the network; auto is bf16 where it is native, else fp32."),
]
Weights: TypeAlias = Annotated[
    str, typer.Option(help='"coco", "shapes", a checkpoint or exported file, a URL, hf://owner/repo.')
]
Device: TypeAlias = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 ...; by default CUDA if there is one.")
]
BatchSize: TypeAlias = Annotated[int, typer.Option(min=1, help="Images in the network at a time.")]
Tiles: TypeAlias = Annotated[
    int | None,
    typer.Option(min=LEAST_TILE, help="For small objects: look at tiles of so many pixels a side, too."),
]
Voting: TypeAlias = Annotated[
    bool, typer.Option("--voting", help="Place each box at the mean of the candidates around it.")
]
Flips: TypeAlias = Annotated[
    bool, typer.Option("--flips", help="Look at the mirror image, too; takes twice the time.")
]
DATA_HELP = f"A dataset: {', '.join(title for each in FORMATS.values() for title in each.titles)}."
Data: TypeAlias = Annotated[Path, typer.Argument(help=DATA_HELP)]
Images: TypeAlias = Annotated[Path | None, typer.Option(help="Folder of the images, if not found by itself.")]
Follow: TypeAlias = Annotated[
    bool, typer.Option("--follow", help="Trust the dataset to name images outside of its folders.")
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="For programs.")]


def as_argument(path: str | Path) -> str:
    """A path as a line that people paste into their shell names it."""
    text = str(path)
    return subprocess.list2cmdline([text]) if os.name == "nt" else shlex.quote(text)


@contextmanager
def usage_errors(option: str | None = None) -> Iterator[None]:
    """Within the block, a ValueError is about the command's arguments, unless it is an error of ours."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def chosen_device(name: str | None) -> torch.device:
    """The device of ``--device``."""
    with usage_errors("--device"):
        return usable_device(name)


def load_to_measure(
    data: Path,
    split: str,
    weights: str,
    images: Path | None,
    class_names: Sequence[str],
    *,
    follow: bool,
    say: Callable[[str], object],
) -> Annotations:
    """A split of a dataset; without a val split, the images that the run of the weights held out, if it did.

    Args:
        data, split, images, class_names, follow: see `ssd.data.load`.
        weights: in their run folder, which lists those images, or that folder.
        say: is told where they are taken.
    """
    try:
        return load(data, split, images=images, class_names=class_names, follow=follow)
    except AnnotationError:
        path = Path(weights)
        file = (path if path.is_dir() else path.parent) / HELD_OUT
        wanted = split == "val" and os.path.exists(path) and weights not in PUBLISHED
        if not wanted or not file.is_file() or find_split(data, "val"):
            raise
    whole = load(data, "train", images=images, class_names=class_names, follow=follow)
    held = part_by_names(whole, read_held_out(file))[1]
    say(f"{data} has no val split: these are the images that {file} lists, which training held out")
    return held


def load_detector(
    weights: str, world: World, device: str | None, precision: str, *, compile: bool = False
) -> Detector:
    """The detector of this process; an exported file chooses its device where none was asked for.

    The process then keeps what memory each batch frees.
    """
    keep_memory(BATCH_MEMORY)
    target = None if device is None and kind_of(weights) else world.device
    with usage_errors():
        return Detector.load(weights, target, precision, compile=compile)  # type: ignore[arg-type]


@contextmanager
def results_folder(output: Path | None, verb: str, world: World) -> Iterator[Path]:
    """The folder that all processes write to, asked for or new; if the block fails, an empty one goes."""
    with run_folder(output, verb) if world.is_main else nullcontext(Path()) as own:
        yield make_folder(world.gather(own)[0])
