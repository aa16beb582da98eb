"""The command ``ssd``: verbs to library functions. Heavy imports wait until a verb runs."""

import io
import json
import os
import platform
import re
import sys
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn
from urllib.parse import unquote, urlsplit

import typer

from ssd import __version__

if TYPE_CHECKING:
    import torch

    from ssd.detections import Detections

Format = Literal["json", "csv", "coco", "yolo"]

FAILED = 1
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

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
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
        list[str],
        typer.Argument(
            help="Files, folders (without subfolders), globs ('photos/**'), http(s) URLs.", show_default=False
        ),
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
    from ssd.web import is_web_url  # noqa: PLC0415

    names = [name for source in sources for name in find_images(source)]
    if not names:
        hint = "; subfolders are not searched, but 'FOLDER/**' is" if any(map(os.path.isdir, sources)) else ""
        raise typer.BadParameter(f"no images in {', '.join(sources)}{hint}", param_hint="SOURCES")
    if not any(is_web_url(name) or os.path.exists(name) for name in names):
        raise typer.BadParameter(f"no such file: {', '.join(names)}", param_hint="SOURCES")

    failures: list[str] = []

    def report(name: str, error: Exception) -> None:
        reason = (
            "no such file" if isinstance(error, FileNotFoundError) else str(error).removeprefix(f"{name}: ")
        )
        failures.append(name)
        tqdm.write(f"ssd: left out {name}: {reason}", file=sys.stderr)

    try:
        detector = Detector.load(weights, device, precision)
        results = detector.stream(
            names,
            batch_size=batch_size,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
            classes=None
            if classes is None
            else [name.strip() for name in classes.split(",") if name.strip()],
            on_error=report,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error

    folder = output or _new_folder("detect")
    folder.mkdir(parents=True, exist_ok=True)
    done = objects = 0
    stopped: BaseException | None = None
    with (
        _Results(folder, format, names, detector.class_names, pictures=images) as writer,
        tqdm(total=len(names), unit="image", disable=None if len(names) > 1 else True) as bar,
    ):
        try:
            for found in results:
                try:
                    writer.add(found)
                except (OSError, ValueError) as error:  # a name or size that cannot be written
                    report(found.source, error)
                else:
                    done, objects = done + 1, objects + len(found)
                    tqdm.write(f"{found.source}: {found.summary()}", file=sys.stdout)
                bar.update(done + len(failures) - bar.n)
        except (KeyboardInterrupt, Exception) as error:  # whatever happens, what is done is kept
            stopped = error
    if isinstance(stopped, Exception) and not isinstance(stopped, BrokenPipeError):
        raise stopped
    if len(names) == done == 1:
        typer.echo(str(found))
    _summarise(done, objects, len(failures), len(names), writer.path, folder if images and done else None)
    raise typer.Exit(INTERRUPTED if stopped else FAILED if failures else 0)


def _summarise(
    done: int, objects: int, failed: int, total: int, results: Path, pictures: Path | None
) -> None:
    text = f"{done} image{'s'[: done != 1]}, {objects} object{'s'[: objects != 1]}"
    text += f", {failed} left out" if failed else ""
    text += f", {total - done - failed} not reached" if total > done + failed else ""
    text += f"; results in {results}"
    typer.echo(text + (f", pictures in {pictures}" if pictures else ""))


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


class _Results:
    """Writes results and pictures as they come; nothing that exists is overwritten.

    A results file takes its name when the block ends, also if it ends early.
    """

    def __init__(
        self,
        folder: Path,
        format: Format,
        sources: list[str],
        class_names: tuple[str, ...],
        *,
        pictures: bool,
    ) -> None:
        self._folder, self._format, self._pictures = folder, format, pictures
        self._class_names = class_names
        self._taken: set[str] = set()
        self._stack = ExitStack()
        self._image_ids = _coco_image_ids(sources) if format == "coco" else {}
        self._first = True
        name = {"csv": "detections.csv", "yolo": "labels"}.get(format, "detections.json")
        self.path = folder / name if format == "yolo" else _free(folder / name)

    def __enter__(self) -> "_Results":
        from ssd.checkpoint import atomic_file  # noqa: PLC0415
        from ssd.detections import CSV_COLUMNS  # noqa: PLC0415

        if self._format == "yolo":
            self.path.mkdir(exist_ok=True)
            with atomic_file(_free(self._folder / "classes.txt")) as file:  # what the numbers stand for
                file.write("".join(f"{name}\n" for name in self._class_names).encode())
        else:
            self._file = self._stack.enter_context(atomic_file(self.path))
            self._write(",".join(CSV_COLUMNS) + "\n" if self._format == "csv" else "[")
        return self

    def __exit__(self, *_: object) -> None:
        if self._format in ("json", "coco"):
            self._write("]\n" if self._first else "\n]\n")
        self._stack.close()

    def add(self, found: "Detections") -> None:
        """Write one result, and its picture if wanted."""
        from ssd.checkpoint import atomic_file  # noqa: PLC0415

        name = self._name(found.source)
        if self._pictures:
            found.save(self._folder / name)
        if self._format == "yolo":
            with atomic_file(self.path / f"{os.path.splitext(name)[0]}.txt") as file:
                file.write(found.to_yolo().encode())
        elif self._format == "csv":
            self._write(found.to_csv(header=False))
        else:
            entries = [found.to_dict()]
            if self._format == "coco":
                image_id = self._image_ids[found.source]
                entries = [entry | {"file_name": found.source} for entry in found.to_coco(image_id)]
            for entry in entries:
                self._write(("\n" if self._first else ",\n") + json.dumps(entry, ensure_ascii=False))
                self._first = False

    def _write(self, text: str) -> None:
        # Names of files need not be Unicode; in JSON the replacement is the escape of the same code.
        self._file.write(text.encode(errors="backslashreplace"))

    def _name(self, source: str) -> str:
        """A name for the picture of a source, whose stem is also that of its labels."""
        last = unquote(urlsplit(source).path) if "://" in source else source
        stem, suffix = os.path.splitext(os.path.basename(last))
        stem = re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", stem)
        stem = os.fsdecode(os.fsencode(stem)[:200]) or "image"
        suffix = suffix if suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") else ".jpg"
        number = 1
        while True:
            numbered = stem if number == 1 else f"{stem}-{number}"
            exists = (self._pictures and (self._folder / f"{numbered}{suffix}").exists()) or (
                self._format == "yolo" and (self.path / f"{numbered}.txt").exists()
            )
            if numbered.casefold() not in self._taken and not exists:
                self._taken.add(numbered.casefold())
                return f"{numbered}{suffix}"
            number += 1


def _free(path: Path) -> Path:
    """The path, or if it exists the first of ``name-2.suffix`` and on that does not."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.stem}-{number}{path.suffix}"), number + 1
    return candidate


def _coco_image_ids(sources: list[str]) -> dict[str, int]:
    """COCO names files by image id (000000397133.jpg); where any name is not so, all are numbered."""
    stems = [os.path.splitext(os.path.basename(source))[0] for source in sources]
    if all(stem.isascii() and stem.isdigit() for stem in stems):
        ids = {source: int(stem) for source, stem in zip(sources, stems, strict=True)}
        if len(set(ids.values())) == len(ids):
            return ids
    return {source: number for number, source in enumerate(dict.fromkeys(sources), start=1)}


@app.command()
def download(
    weights: Annotated[str, typer.Argument(help='"coco", or the URL of a checkpoint.')] = "coco",
    force: Annotated[bool, typer.Option("--force", help="Download again what is there already.")] = False,
) -> None:
    """Fetch weights ahead of use, check them, and say where they are."""
    from ssd.checkpoint import PUBLISHED, cached_path  # noqa: PLC0415
    from ssd.model import load_model  # noqa: PLC0415
    from ssd.web import is_web_url  # noqa: PLC0415

    if weights not in PUBLISHED and not is_web_url(weights):
        raise typer.BadParameter(f"{weights} is neither a URL nor one of {', '.join(PUBLISHED)}")
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
        (
            "weights",
            f"{each['name']}: {each['accuracy']}; {each['path']} ({each['size'] or 'not downloaded'})",
        )
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
                "accuracy": record.accuracy,
                "path": str(cached_path(name)),
                "size": _megabytes(cached_path(name)) if cached_path(name).exists() else None,
            }
            for name, record in PUBLISHED.items()
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
