"""``ssd export``."""

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from ssd.backends import BACKENDS
from ssd.browser import write_page
from ssd.cli.common import as_argument, usage_errors
from ssd.cli.options import OneOf
from ssd.export import export, write_triton
from ssd.files import gone_if_unused, make_folder
from ssd.standalone import write_standalone

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
    standalone: Annotated[
        Path | None,
        typer.Option(help="Instead, a folder that detects with numpy, Pillow and onnxruntime alone."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Instead, a page that detects in any browser, without a network.")
    ] = None,
    onnxruntime_web: Annotated[
        Path | None,
        typer.Option(help="For --html: the npm package of this name, unpacked; by default it is fetched."),
    ] = None,
) -> None:
    """The result is run and compared with torch before it is kept. `ssd detect --weights` takes it too."""
    if batch != "dynamic" and not batch.isdecimal():
        raise typer.BadParameter(f'{batch!r} is neither "dynamic" nor a number', param_hint="--batch")
    if triton is not None and format != "onnx":
        raise typer.BadParameter("a Triton repository holds ONNX: leave out --format", param_hint="--triton")
    if triton is not None and (triton / "ssd300").exists():
        raise typer.BadParameter(f"{triton} has a model ssd300 already", param_hint="--triton")
    if onnxruntime_web is not None and html is None:
        raise typer.BadParameter("is for --html", param_hint="--onnxruntime-web")
    if (place := standalone or html) is not None:
        others = {
            "--html": standalone and html,
            "--format": format != "onnx",
            "--output": output,
            "--batch": batch != "dynamic",
            "--triton": triton,
            "--calibrate": calibrate,
        }
        if given := [name for name, value in others.items() if value]:
            raise typer.BadParameter(
                f"goes with no other kind of result: leave out {', '.join(given)}",
                param_hint="--standalone" if standalone else "--html",
            )
        with usage_errors(), gone_if_unused(place.parent):
            make_folder(place.parent)
            _write_ready(weights, standalone, html, precision, onnxruntime_web)
        return
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
    typer.echo(f"Detect with it: ssd detect PHOTO --weights {as_argument(made)}")


def _write_ready(
    weights: str, standalone: Path | None, html: Path | None, precision: str, runtime: Path | None
) -> None:
    """What detects by itself: a folder or a page."""
    if standalone is not None:
        made = write_standalone(weights, standalone, precision)
        typer.echo(f"{made}: detects with numpy, Pillow and onnxruntime; see its README.md")
        typer.echo(
            f"Prove it, there or on another machine: python {as_argument(made / 'detect.py')} --verify"
        )
    elif html is not None:
        page = write_page(weights, html, precision, runtime)
        typer.echo(f"{page} ({page.stat().st_size / 1e6:.1f} MB): open it in a browser, on any device")
