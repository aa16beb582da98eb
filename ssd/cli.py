"""The command ``ssd``: verbs to library functions. Heavy imports wait until a verb runs."""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, NoReturn
from urllib.parse import unquote, urlsplit

import typer

from ssd import __version__

if TYPE_CHECKING:
    import torch

    from ssd.detections import Detections

Format = Literal["json", "csv", "coco", "yolo"]

FAILED = 1
USAGE = 2
INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="SSD300 object detection.",
)


def main() -> None:
    """Run the command; errors that are the user's to mend end in a line, not in a traceback."""
    from ssd.web import READ_ERRORS  # noqa: PLC0415

    try:
        app(prog_name="ssd")
    except READ_ERRORS as error:  # DownloadError and FileNotFoundError are OSErrors
        _fail(str(error))
    except RuntimeError as error:
        from ssd.checkpoint import CheckpointError  # noqa: PLC0415

        if not isinstance(error, CheckpointError):
            raise
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    typer.echo(f"ssd: {message}", err=True)
    sys.exit(FAILED)


@app.callback(invoke_without_command=True)
def _top(
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if show_version:
        typer.echo(f"ssd300 {__version__}")
        raise typer.Exit


@app.command()
def detect(
    sources: Annotated[
        list[str], typer.Argument(help="Files, folders, globs or http(s) URLs.", show_default=False)
    ],
    weights: Annotated[str, typer.Option(help='"coco", a checkpoint file, or its URL.')] = "coco",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ...; by default CUDA if there is one.")
    ] = None,
    precision: Annotated[Literal["fp32", "fp16", "bf16"], typer.Option(help="Of the network.")] = "fp32",
    score_threshold: Annotated[float, typer.Option(min=0, max=1, help="Least score of a detection.")] = 0.4,
    iou_threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Overlap at which the lower score goes.")
    ] = 0.5,
    max_detections: Annotated[int, typer.Option(min=1, help="Most objects of an image.")] = 100,
    classes: Annotated[str | None, typer.Option(help="Only these, as in person,dog.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in the network at a time.")] = 8,
    output: Annotated[
        Path | None,
        typer.Option(help="Where to write; by default a new folder runs/detect-N.", file_okay=False),
    ] = None,
    format: Annotated[Format, typer.Option(help="Of the results.")] = "json",
    images: Annotated[bool, typer.Option("--images/--no-images", help="Write pictures with boxes.")] = True,
) -> None:
    """Detect objects in images; write results, and pictures with boxes.

    An image that cannot be read is named and left out; the exit status is then 1.
    """
    from tqdm import tqdm  # noqa: PLC0415

    from ssd.detector import Detector  # noqa: PLC0415
    from ssd.images import find_images  # noqa: PLC0415
    from ssd.postprocess import NonFiniteError  # noqa: PLC0415

    names = [name for source in sources for name in find_images(source)]
    if not names:
        raise typer.BadParameter(f"no images in {', '.join(sources)}", param_hint="SOURCES")

    failures: list[str] = []

    def report(name: str, error: Exception) -> None:
        reason = (
            "no such file" if isinstance(error, FileNotFoundError) else str(error).removeprefix(f"{name}: ")
        )
        failures.append(name)
        tqdm.write(f"ssd: cannot read {name}: {reason}", file=sys.stderr)

    try:
        detector = Detector.load(weights, device, precision)
        results = detector.stream(
            names,
            batch_size=batch_size,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
            classes=None if classes is None else [name.strip() for name in classes.split(",")],
            on_error=report,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error

    folder = output or _new_folder("detect")
    folder.mkdir(parents=True, exist_ok=True)
    place = _places(folder, names)
    done = objects = status = 0
    with ExitStack() as stack:
        add = stack.enter_context(_results_file(folder, format))
        bar = stack.enter_context(
            tqdm(total=len(names), unit="image", disable=None if len(names) > 1 else True)
        )
        try:
            for found in results:
                stem = place(found.source)
                add(found, stem)
                if images:
                    found.save(folder / stem)
                done, objects = done + 1, objects + len(found)
                tqdm.write(f"{found.source}: {found.summary()}", file=sys.stdout)
                bar.update(done + len(failures) - bar.n)
        except KeyboardInterrupt:  # what is done is done, and kept
            status = INTERRUPTED
        except NonFiniteError as error:
            tqdm.write(f"ssd: {error}", file=sys.stderr)
            status = FAILED
    if len(names) == done == 1:
        typer.echo(str(found))
    _summarise(done, objects, len(failures), len(names), folder, images)
    raise typer.Exit(status or (FAILED if failures else 0))


def _summarise(done: int, objects: int, failed: int, total: int, folder: Path, images: bool) -> None:
    missing = f", {failed} could not be read" if failed else ""
    missing += f", {total - done - failed} left out" if total > done + failed else ""
    kinds = "results and pictures" if images and done else "results"
    typer.echo(
        f"{done} image{'s'[: done != 1]}, {objects} object{'s'[: objects != 1]}{missing}; {kinds} in {folder}"
    )


def _new_folder(verb: str) -> Path:
    """``runs/<verb>-N`` with the first N that is free."""
    number = 1
    while True:
        folder = Path("runs") / f"{verb}-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder


def _places(folder: Path, sources: list[str]) -> Callable[[str], str]:
    """A function that names the picture of a source: unlike all others, and never a source itself."""
    occupied = {os.path.realpath(source) for source in sources}

    def place(source: str) -> str:
        stem, suffix = os.path.splitext(
            os.path.basename(unquote(urlsplit(source).path) if "://" in source else source)
        )
        if suffix.lower() not in (".jpg", ".jpeg", ".png", ".webp"):
            suffix = ".jpg"
        number = 1
        while True:
            name = (stem or "image") + (f"-{number}" if number > 1 else "") + suffix
            # Results are named by the stem alone, so pictures must differ in that too.
            target = os.path.realpath(folder / os.path.splitext(name)[0])
            if target not in occupied and os.path.realpath(folder / name) not in occupied:
                occupied.add(target)
                return name
            number += 1

    return place


@contextmanager
def _results_file(folder: Path, format: Format) -> Iterator[Callable[["Detections", str], None]]:
    """A function that takes each result and the name of its picture; the file is there when all are in."""
    from ssd.checkpoint import atomic_file  # noqa: PLC0415

    if format == "yolo":
        labels = folder / "labels"
        labels.mkdir(exist_ok=True)

        def add_labels(found: "Detections", name: str) -> None:
            with atomic_file(labels / f"{os.path.splitext(name)[0]}.txt") as file:
                file.write(found.to_yolo().encode())

        yield add_labels
    elif format == "csv":
        with atomic_file(folder / "detections.csv") as file:
            first = True

            def add_rows(found: "Detections", _: str) -> None:
                nonlocal first
                file.write(found.to_csv(header=first).encode())
                first = False

            yield add_rows
    else:
        with atomic_file(folder / "detections.json") as file:
            yield from _json_array(file, format)


def _json_array(file: IO[bytes], format: Format) -> Iterator[Callable[["Detections", str], None]]:
    """Entries of a JSON array, a line each, as they come."""
    separator = "[\n"
    number = 0

    def add(found: "Detections", _: str) -> None:
        nonlocal separator, number
        number += 1
        entries = (
            found.to_coco(_coco_image_id(found.source, number)) if format == "coco" else [found.to_dict()]
        )
        for entry in entries:
            if format == "coco":
                entry["file_name"] = found.source
            file.write((separator + json.dumps(entry, ensure_ascii=False)).encode())
            separator = ",\n"

    yield add
    file.write(b"[]\n" if separator == "[\n" else b"\n]\n")


def _coco_image_id(source: str, number: int) -> int:
    """COCO names files by image id (000000397133.jpg); other images are numbered."""
    stem = os.path.splitext(os.path.basename(source))[0]
    return int(stem) if stem.isascii() and stem.isdigit() else number


@app.command()
def download(
    weights: Annotated[str, typer.Argument(help='"coco", or the URL of a checkpoint.')] = "coco",
    force: Annotated[bool, typer.Option("--force", help="Download again what is there already.")] = False,
) -> None:
    """Fetch weights ahead of use, check them, and say where they are."""
    from ssd.checkpoint import cached_path  # noqa: PLC0415
    from ssd.model import load_model  # noqa: PLC0415

    model, _ = load_model(weights, force=force)
    path = cached_path(weights)
    typer.echo(f"{path} ({_megabytes(path)}, {model.backbone}, {model.num_classes - 1} classes)")


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Show versions, devices, the precisions that run well on them, and cached weights."""
    facts = _facts()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    rows = [("versions", "  ".join(f"{name} {number}" for name, number in facts["versions"].items()))]
    rows += [
        (
            "device",
            f"{device['device']}: {device['name']}; computes {', '.join(device['precisions'])} natively",
        )
        for device in facts["devices"]
    ]
    rows += [
        ("weights", f"{each['name']}: {each['path']} ({each['size'] or 'not downloaded'})")
        for each in facts["weights"]
    ]
    for title, text in rows:
        typer.echo(f"{title:10}{text}")


def _facts() -> dict[str, Any]:
    import torch  # noqa: PLC0415

    from ssd.checkpoint import PUBLISHED, cached_path  # noqa: PLC0415
    from ssd.model import native_precisions  # noqa: PLC0415

    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    packages = ("torch", "torchvision", "numpy", "pillow", "scikit-image", "pycocotools", "safetensors")
    return {
        "versions": {"ssd300": __version__, "python": platform.python_version()}
        | {package: _version(package) for package in packages},
        "devices": [
            {"device": str(device), "name": _device_name(device), "precisions": native_precisions(device)}
            for device in devices
        ],
        "weights": [
            {
                "name": name,
                "path": str(cached_path(name)),
                "size": _megabytes(cached_path(name)) if cached_path(name).exists() else None,
            }
            for name in PUBLISHED
        ],
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device_name(device: "torch.device") -> str:
    import torch  # noqa: PLC0415

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = found[0].split(":", 1)[1].strip() if found else name
    return f"{name}, {torch.get_num_threads()} threads"


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.0f} MB"
