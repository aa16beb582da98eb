"""``ssd check`` and ``ssd shapes``."""

import json
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ssd.boxes import LAYOUTS
from ssd.check import check_dataset, read_splits
from ssd.cli import FAILED
from ssd.cli.common import Data, Follow, Images
from ssd.cli.options import OneOf
from ssd.shapes import CLASSES, write_dataset


def check(
    data: Data,
    images: Images = None,
    follow: Follow = False,
    layout: Annotated[str, OneOf(LAYOUTS), typer.Option(help="Of the network to be trained.")] = "300",
    as_json: Annotated[bool, typer.Option("--json", help="For programs; lists every problem.")] = False,
) -> None:
    """The exit status is 1 if training, or evaluation on one of the splits, would refuse anything of it."""
    read, unread = read_splits(data, images, follow=follow)
    with tqdm(
        total=sum(map(len, read.values())), unit="image", disable=True if as_json else None, leave=False
    ) as bar:
        report = check_dataset(read, LAYOUTS[layout], on_done=bar.update, unread=unread)
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else report)
    raise typer.Exit(FAILED if report.fatal else 0)


def shapes(
    folder: Annotated[Path, typer.Argument(help="Where to write train.json, train/, val.json and val/.")],
    images: Annotated[int, typer.Option(min=1, help="Scenes to train on.")] = 200,
    val: Annotated[int | None, typer.Option(min=0, help="Scenes to evaluate on; by default a fifth.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same one gives the same scenes.")] = 0,
) -> None:
    """They are a COCO dataset: six kinds of shapes on cluttered backgrounds."""
    val = max(images // 5, 1) if val is None else val
    with tqdm(total=images + val, unit="image", disable=None, leave=False) as bar:
        write_dataset(folder, images, val, seed, on_done=bar.update)
    typer.echo(f"{images} scenes to train on and {val} to evaluate on in {folder}; {', '.join(CLASSES)}")
