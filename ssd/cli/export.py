"""``ssd export``."""

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from ssd.backends import BACKENDS
from ssd.cli.common import usage_errors
from ssd.cli.options import OneOf
from ssd.export import export, write_triton
from ssd.files import gone_if_unused, make_folder

_HELD = "; ".join(f"{name}: {', '.join(kind.precisions)}" for name, kind in BACKENDS.items())
_PRECISIONS = tuple(dict.fromkeys(name for kind in BACKENDS.values() for name in kind.precisions))


def export_weights(
    weights: Annotated[
        str, typer.Argument(help='"coco", "shapes", a checkpoint file, its URL, hf://owner/repo.')
    ],
    format: Annotated[str, OneOf(BACKENDS), typer.Option(help="Where it is to run.")] = "onnx",
    output: Annotated[
        Path | None, typer.Option(help="File to write, or OpenVINO's folder; by default named as WEIGHTS.")
    ] = None,
    nms: Annotated[
        bool, typer.Option("--nms/--no-nms", help="Detections come out, or raw loc and conf.")
    ] = False,
    uint8: Annotated[bool, typer.Option("--uint8", help="Take uint8 images; normalise inside.")] = False,
    batch: Annotated[str, typer.Option(help='Images at a time: "dynamic", or a number.')] = "dynamic",
    precision: Annotated[
        str,
        OneOf(_PRECISIONS),
        typer.Option(help=f"{_HELD}."),
    ] = "fp32",
    calibrate: Annotated[
        Path | None, typer.Option(help="For int8: a folder of images like those to detect on.")
    ] = None,
    triton: Annotated[Path | None, typer.Option(help="Also write a Triton model repository here.")] = None,
) -> None:
    """The result is run and compared with torch before it is kept. `ssd detect --weights` takes it too."""
    if batch != "dynamic" and not batch.isdecimal():
        raise typer.BadParameter(f'{batch!r} is neither "dynamic" nor a number', param_hint="--batch")
    if triton is not None and format != "onnx":
        raise typer.BadParameter("a Triton repository holds ONNX: leave out --format", param_hint="--triton")
    if triton is not None and (triton / "ssd300").exists():
        raise typer.BadParameter(f"{triton} has a model ssd300 already", param_hint="--triton")
    name = Path(urlsplit(weights).path).stem
    path = output or Path(f"{name}{BACKENDS[format].ending}")
    size = None if batch == "dynamic" else int(batch)
    with usage_errors(), gone_if_unused(path.parent):
        make_folder(path.parent)
        made = export(
            weights, path, format, nms=nms, uint8=uint8, batch=size, precision=precision, calibrate=calibrate
        )
    files = [made] if made.is_file() else list(made.iterdir())
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    tried = "in batches of 1, 2 and 5" if size is None else f"in batches of {size}"
    typer.echo(f"{made} ({megabytes:.1f} MB): computes what torch does, tried {tried}")
    if triton is not None:
        typer.echo(f"Triton model repository: {write_triton(made, triton)}")
    typer.echo(f"Detect with it: ssd detect PHOTO --weights {made}")
