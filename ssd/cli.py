"""The command ``ssd``: verbs to library functions. Heavy imports wait until a verb runs."""

import io
import json
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn
from urllib.parse import unquote, urlsplit

import typer

from ssd import __version__

if TYPE_CHECKING:
    import torch

    from ssd.data import Annotations, DetectionDataset
    from ssd.detections import Detections
    from ssd.detector import Detector
    from ssd.distributed import World
    from ssd.train import TrainConfig

Format = Literal["json", "csv", "coco", "yolo"]
AnyPrecision = Literal["auto", "fp32", "fp16", "bf16"]
ExportFormat = Literal["onnx", "openvino", "pt2", "torchscript"]

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
    if "WORLD_SIZE" not in os.environ:  # torchrun's may be waiting for each other, and then hear nothing
        # As Ctrl-C: results are kept, and what is half written goes.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app(prog_name="ssd")
    except READ_ERRORS as error:  # DownloadError and FileNotFoundError are OSErrors
        _fail(str(error))
    except (RuntimeError, ValueError, FloatingPointError, ImportError) as error:
        if not _is_users(error):
            raise
        _fail(str(error))


def _is_users(error: Exception) -> bool:
    """Whether an error is one that the user can mend, and whose message says all."""
    from ssd.checkpoint import CheckpointError  # noqa: PLC0415
    from ssd.data import AnnotationError  # noqa: PLC0415
    from ssd.distributed import LostContactError  # noqa: PLC0415
    from ssd.export import ExportError  # noqa: PLC0415
    from ssd.images import ImageError  # noqa: PLC0415
    from ssd.postprocess import NonFiniteError  # noqa: PLC0415

    if isinstance(error, ImportError):
        return str(error).endswith("]'")  # names the extra that is missing
    ours = (CheckpointError, AnnotationError, ImageError, NonFiniteError, LostContactError, ExportError)
    return isinstance(error, ours)


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
    weights: Annotated[
        str, typer.Option(help='"coco", "shapes", a checkpoint or exported file, a URL.')
    ] = "coco",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ...; by default CUDA if there is one.")
    ] = None,
    precision: Annotated[
        AnyPrecision, typer.Option(help="Of the network; auto is bf16 where it is native, else fp32.")
    ] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile; for many images.")] = False,
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
    scaled_decoding: Annotated[
        bool, typer.Option("--scaled-decoding", help="Read large JPEG files small; with --no-images.")
    ] = False,
) -> None:
    """Detect objects in images; write results, and pictures with boxes.

    An image that cannot be read is named and left out; the exit status is then 1.
    """
    from tqdm import tqdm  # noqa: PLC0415

    from ssd.distributed import world  # noqa: PLC0415
    from ssd.images import find_images  # noqa: PLC0415
    from ssd.web import is_web_url  # noqa: PLC0415

    names = list(dict.fromkeys(name for source in sources for name in find_images(source)))
    if not names:
        hint = "; subfolders are not searched, but 'FOLDER/**' is" if any(map(os.path.isdir, sources)) else ""
        raise typer.BadParameter(f"no images in {', '.join(sources)}{hint}", param_hint="SOURCES")
    if not any(is_web_url(name) or os.path.exists(name) for name in names):
        raise typer.BadParameter(f"no such file: {', '.join(names)}", param_hint="SOURCES")

    if scaled_decoding and images:
        raise typer.BadParameter(
            "pictures need the whole image: add --no-images", param_hint="--scaled-decoding"
        )

    failures: list[str] = []

    def report(name: str, error: Exception) -> None:
        reason = (
            "no such file" if isinstance(error, FileNotFoundError) else str(error).removeprefix(f"{name}: ")
        )
        failures.append(name)
        tqdm.write(f"ssd: left out {name}: {reason}", file=sys.stderr)

    wanted = None if classes is None else [name.strip() for name in classes.split(",") if name.strip()]
    with world(_device(device)) as place:
        try:
            detector = _load(weights, place, device, precision, compile=compile)
            results = detector.stream(
                [names[i] for i in place.share(len(names), batch_size)],
                batch_size=batch_size,
                score_threshold=score_threshold,
                iou_threshold=iou_threshold,
                max_detections=max_detections,
                classes=wanted,
                on_error=report,
                scaled_decoding=scaled_decoding,
            )
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        folder = _folder_of_all(output, "detect", place)
        out = _Results(folder, format, names, detector.class_names, pictures=images)
        if place.size > 1:
            # Each process writes its pictures; the main one all results, in their order.
            results, failures[:] = _gather_results(results, names, out, failures, place, report)
            if not place.is_main:
                return

        done = objects = 0
        stopped: BaseException | None = None
        with (
            out as writer,
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


def _folder_of_all(output: Path | None, verb: str, place: "World") -> Path:
    """The folder that all processes write to."""
    folder = place.gather(output or _new_folder(verb) if place.is_main else Path())[0]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _gather_results(
    results: "Iterable[Detections]",
    names: list[str],
    out: "_Results",
    failures: list[str],
    place: "World",
    report: "Callable[[str, Exception], None]",
) -> "tuple[Iterator[Detections], list[str]]":
    """The results of all processes in the order of `names`, and all failures; pictures are written."""
    mine = []
    for found in results:
        try:
            out.picture(found)
        except (OSError, ValueError) as error:
            report(found.source, error)
        else:
            mine.append(replace(found, image=None))
    by_source: dict[str, Detections] = {}
    failed: list[str] = []
    for share, lost in place.gather((mine, failures)):
        by_source |= {found.source: found for found in share}
        failed += lost
    return iter([by_source[name] for name in names if name in by_source]), failed


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
        self._stack = ExitStack()
        self._image_ids = _coco_image_ids(sources) if format == "coco" else {}
        self._first = True
        name = {"csv": "detections.csv", "yolo": "labels"}.get(format, "detections.json")
        self.path = folder / name if format == "yolo" else _free(folder / name)
        self._taken: set[str] = set()
        self._names = {source: self._name(source) for source in sources}

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
        """Write one result, and its picture if wanted and not written yet."""
        from ssd.checkpoint import atomic_file  # noqa: PLC0415

        self.picture(found)
        if self._format == "yolo":
            stem = os.path.splitext(self._names[found.source])[0]
            with atomic_file(self.path / f"{stem}.txt") as file:
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

    def picture(self, found: "Detections") -> None:
        """Write the picture of a result that has its image, if pictures are wanted."""
        if self._pictures and found.image is not None:
            found.save(self._folder / self._names[found.source])

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
def train(
    data: Annotated[
        Path | None,
        typer.Argument(
            help="Dataset: a COCO, YOLO or VOC folder, data.yaml or COCO .json.", show_default=False
        ),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images, if not found by itself.")] = None,
    val: Annotated[Path | None, typer.Option(help="To evaluate on; by default DATA's val split.")] = None,
    val_images: Annotated[Path | None, typer.Option(help="Folder of its images.")] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder; by default runs/train-N.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to go on with; needs nothing else.")] = None,
    preset: Annotated[
        Literal["default", "published"] | None,
        typer.Option(help="What the options below start from.", show_default="default"),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="To start from: coco, shapes, a file or a URL.")] = None,
    backbone: Annotated[str | None, typer.Option(help="resnet18, 34, 50 (default), 101 or 152.")] = None,
    backbone_weights: Annotated[
        str | None, typer.Option(help='Start the trunk from "imagenet", a torchvision name or a file.')
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Times that each image is seen.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images at a time, in each process.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches for a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate, for 32 images a step.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Of SGD.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Except on biases and norms.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps in which the rate rises.")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine or multistep.")] = None,
    milestones: Annotated[
        str | None, typer.Option(help="Parts of the run for multistep, as 0.66,0.83.")
    ] = None,
    augmentation: Annotated[str | None, typer.Option(help="default, published or none.")] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of averaged weights; 0 for none.")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest norm of gradients; 0 for no limit.")] = None,
    iou_threshold: Annotated[float | None, typer.Option(help="For matching.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, fp16 or bf16.")] = None,
    head_norm: Annotated[bool | None, typer.Option("--head-norm/--plain-heads", help="From scratch.")] = None,
    freeze: Annotated[int | None, typer.Option(help="Trunk stages to keep as they are, up to 4.")] = None,
    sync_batchnorm: Annotated[bool | None, typer.Option(help="Over all processes; CUDA.")] = None,
    channels_last: Annotated[bool | None, typer.Option(help="Memory layout.")] = None,
    compile: Annotated[bool | None, typer.Option(help="Use torch.compile.")] = None,
    crowd: Annotated[bool | None, typer.Option(help="Train on crowd boxes too.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that read images.")] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Epochs between evaluations.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and augmentation.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    lenient: Annotated[bool, typer.Option("--lenient", help="Leave out annotations that are bad.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write for TensorBoard.")] = False,
) -> None:
    """Train or fine-tune on labelled images; interrupt and resume as you like.

    Several processes: torchrun --nproc-per-node N -m ssd train ...
    """
    given = locals()
    choices = {key: given[key] for key in _config_fields() if given[key] is not None}
    if milestones is not None:
        try:
            choices["milestones"] = tuple(float(each) for each in milestones.split(","))
        except ValueError as error:
            raise typer.BadParameter(
                f"{error}; give numbers, as 0.66,0.83", param_hint="--milestones"
            ) from error
    if data is None and resume is None:
        raise typer.BadParameter("give a dataset, or --resume RUN")
    if resume is not None and resume.is_file():
        resume = resume.parent  # a file of the run, such as last.safetensors
    if resume is not None and (output or preset):
        raise typer.BadParameter(
            "a run that goes on keeps its folder and preset; leave out --output, --preset"
        )
    from ssd.distributed import world  # noqa: PLC0415
    from ssd.train import fit, keep_memory  # noqa: PLC0415

    source: dict[str, Any] = {"data": data, "images": images, "val": val, "val_images": val_images}
    # Resuming may start in another folder.
    source = {key: str(path.absolute()) for key, path in source.items() if path is not None}
    source |= {"lenient": True} if lenient else {}
    if weights and os.path.isfile(weights):
        choices["weights"] = os.path.abspath(weights)
    keep_memory()
    settled, source = _settle(preset or "default", resume, choices, source)
    train_set, val_set = _datasets(source, crowd=settled.crowd)
    with world(_device(device)) as place:
        folder = resume or _folder_of_all(output, "train", place)
        try:
            result = fit(
                train_set,
                val_set,
                settled,
                folder,
                category_ids=train_set.annotations.category_ids,
                world=place,
                resume=resume is not None,
                say=typer.echo,
                source=source,
                tensorboard=tensorboard,
            )
        except Exception as error:
            with suppress(OSError):
                folder.rmdir()  # where nothing was written
            if isinstance(error, ValueError) and not _is_users(error):
                raise typer.BadParameter(str(error)) from error
            raise
    if not result.finished:
        raise typer.Exit(INTERRUPTED)
    if place.is_main:
        if result.evaluation:
            typer.echo(f"\n{result.evaluation}")
        best = next(name for name in ("best", "last") if (folder / f"{name}.safetensors").exists())
        typer.echo(f"\nDetect with it: ssd detect PHOTO --weights {folder / best}.safetensors")


def _settle(
    preset: str, resume: Path | None, choices: dict[str, Any], source: dict[str, Any]
) -> "tuple[TrainConfig, dict[str, Any]]":
    """The config, and where the data is: what is given, over what the run or the preset says."""
    from ssd.train import PRESETS, TrainConfig  # noqa: PLC0415

    if resume is not None:
        saved = _read_run(resume)
        source, config = (saved["data"] or {}) | source, saved["config"] | choices
        if "data" not in source:
            raise typer.BadParameter(f"{resume} was not started by this command; give its dataset too")
        config["milestones"] = tuple(config["milestones"])
    else:
        config = asdict(PRESETS[preset]) | choices
    try:
        return TrainConfig(**config), source
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error


def _device(name: str | None) -> "torch.device":
    from ssd.distributed import usable_device  # noqa: PLC0415

    try:
        return usable_device(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error


def _load(
    weights: str, place: "World", device: str | None, precision: str, *, compile: bool = False
) -> "Detector":
    """The detector of this process; an exported file chooses its device where none was asked for."""
    from ssd.backends import format_of  # noqa: PLC0415
    from ssd.detector import Detector  # noqa: PLC0415

    target = None if device is None and format_of(weights) else place.device
    try:
        return Detector.load(weights, target, precision, compile=compile)  # type: ignore[arg-type]
    except ValueError as error:
        if _is_users(error):
            raise
        raise typer.BadParameter(str(error)) from error


def _config_fields() -> set[str]:
    from ssd.train import TrainConfig  # noqa: PLC0415

    return {field.name for field in fields(TrainConfig)}


def _read_run(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        saved = json.loads(file.read_bytes())
        return {"data": saved["data"], "config": saved["config"]}
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(f"{file} is not what ssd train wrote ({error})") from error


def _datasets(source: dict[str, Any], *, crowd: bool) -> "tuple[DetectionDataset, Annotations | None]":
    """The dataset to train on, and the annotations to evaluate with, if there are any."""
    from ssd.data import DetectionDataset, find_split, load, usable_for_evaluation  # noqa: PLC0415

    lenient = source.get("lenient", False)
    annotations = load(source["data"], "train", images=source.get("images"))
    train_set = DetectionDataset(annotations, lenient=lenient, crowd=crowd)
    path, names = source.get("val", source["data"]), annotations.class_names
    if "val" not in source and not find_split(path, "val"):
        return train_set, None
    val_set = load(path, "val", images=source.get("val_images"), class_names=names)
    if "images" in source and not {"val", "val_images"} & set(source) and val_set.is_without_images():
        val_set = load(path, "val", images=source["images"], class_names=names)
    return train_set, usable_for_evaluation(val_set, lenient=lenient)


@app.command()
def evaluate(
    data: Annotated[Path, typer.Argument(help="A COCO, YOLO or VOC folder, data.yaml, COCO .json.")],
    weights: Annotated[
        str, typer.Option(help='"coco", "shapes", a checkpoint or exported file, a URL.')
    ] = "coco",
    split: Annotated[
        Literal["train", "val", "test"], typer.Option(help="Which part of the dataset.")
    ] = "val",
    images: Annotated[Path | None, typer.Option(help="Folder of the images, if not found by itself.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    precision: Annotated[
        AnyPrecision, typer.Option(help="Of the network; auto is bf16 where it is native, else fp32.")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images in the network at a time.")] = 8,
    output: Annotated[
        Path | None, typer.Option(help="Where to write; by default a new folder runs/evaluate-N.")
    ] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Curves, confusion matrix, worst images.")] = False,
    lenient: Annotated[bool, typer.Option("--lenient", help="Leave out what cannot be used.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Measure detections with the official COCO numbers, and AP of each class.

    Several processes: torchrun --nproc-per-node N -m ssd evaluate ...
    """
    from tqdm import tqdm  # noqa: PLC0415

    from ssd.checkpoint import atomic_file  # noqa: PLC0415
    from ssd.data import load, usable_for_evaluation  # noqa: PLC0415
    from ssd.distributed import world  # noqa: PLC0415
    from ssd.evaluate import coco_results, detect_all, measure  # noqa: PLC0415

    if output is not None and (output / "metrics.json").exists():
        raise typer.BadParameter(f"{output} holds an evaluation already", param_hint="--output")
    if plots:
        from ssd.plots import draw_plots, require_matplotlib  # noqa: PLC0415

        require_matplotlib()  # before all the work, not after it
    with world(_device(device)) as place:
        detector = _load(weights, place, device, precision)
        annotations = load(data, split, images=images, class_names=detector.class_names)
        annotations = usable_for_evaluation(annotations, lenient=lenient)
        share = len(place.share(len(annotations), batch_size))
        hidden = True if not place.is_main or as_json else None
        with tqdm(total=share, unit="image", disable=hidden) as bar:
            truth, found = detect_all(detector, annotations, place, batch_size=batch_size, on_done=bar.update)
        if not place.is_main:
            return
        result = measure(truth, found)
        folder = output or _new_folder("evaluate")
        folder.mkdir(parents=True, exist_ok=True)
        facts = result.to_dict() | {"data": str(data), "split": split, "weights": weights}
        facts |= {"precision": detector.precision}
        for name, content in (("metrics", facts), ("detections", coco_results(truth, found))):
            with atomic_file(folder / f"{name}.json") as file:
                file.write(json.dumps(content).encode())
        if plots:
            draw_plots(truth, found, folder)
    typer.echo(json.dumps(facts, indent=2) if as_json else result)
    typer.echo(f"\nmetrics.json and detections.json in {folder}", err=as_json)


@app.command()
def check(
    data: Annotated[Path, typer.Argument(help="A COCO, YOLO or VOC folder, data.yaml, COCO .json.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the images, if not found by itself.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs; lists every problem.")] = False,
) -> None:
    """Read a whole dataset, and tell what is in it and what is wrong with it.

    The exit status is 1 if there is anything that training refuses.
    """
    from tqdm import tqdm  # noqa: PLC0415

    from ssd.check import check as check_all  # noqa: PLC0415
    from ssd.data import SPLITS, find_split, load  # noqa: PLC0415

    splits = [split for split in SPLITS if find_split(data, split)] or ["train"]
    read: dict[str, Annotations] = {}
    for split in splits:
        names = read[splits[0]].class_names if read else None
        read[split] = load(data, split, images=images, class_names=names)
    with tqdm(
        total=sum(map(len, read.values())), unit="image", disable=True if as_json else None, leave=False
    ) as bar:
        report = check_all(read, on_done=bar.update)
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else report)
    raise typer.Exit(FAILED if report.fatal else 0)


@app.command()
def shapes(
    folder: Annotated[Path, typer.Argument(help="Where to write train.json, train/, val.json and val/.")],
    images: Annotated[int, typer.Option(min=1, help="Scenes to train on.")] = 200,
    val: Annotated[int | None, typer.Option(min=0, help="Scenes to evaluate on; by default a fifth.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same one gives the same scenes.")] = 0,
) -> None:
    """Draw a dataset of made-up scenes, to try things on."""
    from tqdm import tqdm  # noqa: PLC0415

    from ssd.shapes import CLASSES, write  # noqa: PLC0415

    val = max(images // 5, 1) if val is None else val
    with tqdm(total=images + val, unit="image", disable=None, leave=False) as bar:
        write(folder, images, val, seed, on_done=bar.update)
    typer.echo(f"{images} scenes to train on and {val} to evaluate on in {folder}; {', '.join(CLASSES)}")


@app.command()
def demo(
    seed: Annotated[int, typer.Option(min=0, help="Another one, another scene.")] = 45,
    output: Annotated[Path | None, typer.Option(help="By default a new folder runs/demo-N.")] = None,
) -> None:
    """Draw a scene of shapes, and detect them with the weights that come with the package."""
    import numpy as np  # noqa: PLC0415

    from ssd.detector import Detector  # noqa: PLC0415
    from ssd.shapes import draw_scene  # noqa: PLC0415

    image, boxes, _ = draw_scene(np.random.default_rng(seed))
    found = Detector.load("shapes")(image)
    folder = output or _new_folder("demo")
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / "scene.jpg", quality=95)
    typer.echo(found)
    picture = folder / "detections.jpg"
    found.save(picture)
    typer.echo(f"\n{len(boxes)} shapes drawn, {len(found)} detected; picture in {picture}")


@app.command()
def export(
    weights: Annotated[str, typer.Argument(help='"coco", "shapes", a checkpoint file, or its URL.')],
    format: Annotated[ExportFormat, typer.Option(help="Where it is to run.")] = "onnx",
    output: Annotated[
        Path | None, typer.Option(help="File to write, or OpenVINO's folder; by default named as WEIGHTS.")
    ] = None,
    nms: Annotated[
        bool, typer.Option("--nms/--no-nms", help="Detections come out, or raw loc and conf.")
    ] = False,
    uint8: Annotated[bool, typer.Option("--uint8", help="Take uint8 images; normalise inside.")] = False,
    batch: Annotated[str, typer.Option(help='Images at a time: "dynamic", or a number.')] = "dynamic",
    precision: Annotated[
        Literal["fp32", "fp16", "bf16", "int8"],
        typer.Option(help="fp16: not openvino; bf16: pt2, torchscript; int8: openvino."),
    ] = "fp32",
    calibrate: Annotated[
        Path | None, typer.Option(help="For int8: a folder of images like those to detect on.")
    ] = None,
    triton: Annotated[Path | None, typer.Option(help="Also write a Triton model repository here.")] = None,
) -> None:
    """Export weights to ONNX, OpenVINO, torch.export or TorchScript.

    The result is run and compared with torch before it is kept. `ssd detect --weights` takes it too.
    """
    from ssd.export import export as export_to  # noqa: PLC0415
    from ssd.export import write_triton  # noqa: PLC0415

    if batch != "dynamic" and not batch.isdecimal():
        raise typer.BadParameter(f'{batch!r} is neither "dynamic" nor a number', param_hint="--batch")
    if triton is not None and format != "onnx":
        raise typer.BadParameter("a Triton repository holds ONNX: leave out --format", param_hint="--triton")
    if triton is not None and (triton / "ssd300").exists():
        raise typer.BadParameter(f"{triton} has a model ssd300 already", param_hint="--triton")
    name = Path(urlsplit(weights).path).stem
    path = output or Path(f"{name}_openvino" if format == "openvino" else f"{name}.{format}")
    try:
        size = None if batch == "dynamic" else int(batch)
        made = export_to(
            weights, path, format, nms=nms, uint8=uint8, batch=size, precision=precision, calibrate=calibrate
        )
    except ValueError as error:
        if _is_users(error):
            raise
        raise typer.BadParameter(str(error)) from error
    files = [made] if made.is_file() else list(made.iterdir())
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    tried = "in batches of 1, 2 and 5" if size is None else f"in batches of {size}"
    typer.echo(f"{made} ({megabytes:.1f} MB): computes what torch does, tried {tried}")
    if triton is not None:
        typer.echo(f"Triton model repository: {write_triton(made, triton)}")
    typer.echo(f"Detect with it: ssd detect PHOTO --weights {made}")


@app.command()
def benchmark(
    sources: Annotated[
        list[str] | None, typer.Argument(help="Images; by default made-up scenes.", show_default=False)
    ] = None,
    weights: Annotated[
        str, typer.Option(help='"coco", "shapes", a checkpoint or exported file, a URL.')
    ] = "shapes",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...")] = None,
    precision: Annotated[AnyPrecision, typer.Option(help="Of the network.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images in the network at a time.")] = 1,
    backend: Annotated[
        Literal["torch", "compile", "onnx", "openvino", "pt2"], typer.Option(help="What runs a checkpoint.")
    ] = "torch",
    rounds: Annotated[int, typer.Option(min=1, help="Batches to measure.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Measure images a second, latency, and the time and memory of each stage."""
    import tempfile  # noqa: PLC0415
    from concurrent.futures import ProcessPoolExecutor  # noqa: PLC0415
    from multiprocessing import get_context  # noqa: PLC0415

    from ssd import benchmark as measuring  # noqa: PLC0415
    from ssd.backends import format_of  # noqa: PLC0415
    from ssd.distributed import World  # noqa: PLC0415
    from ssd.export import export as export_to  # noqa: PLC0415
    from ssd.images import find_images  # noqa: PLC0415

    names = [name for source in sources or () for name in find_images(source)]
    if sources and not names:
        raise typer.BadParameter(f"no images in {', '.join(sources)}", param_hint="SOURCES")
    if backend != "torch" and format_of(weights):
        raise typer.BadParameter(f"{weights} is exported already", param_hint="--backend")
    with tempfile.TemporaryDirectory() as folder:
        used = weights
        if backend not in ("torch", "compile"):
            place = Path(folder) / ("model" if backend == "openvino" else f"model.{backend}")
            # OpenVINO chooses its precision as it loads.
            kept = "fp32" if backend == "openvino" or precision == "auto" else precision
            try:
                # In a process of its own, since it needs more memory than what is measured.
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    made = pool.submit(export_to, weights, place, backend, precision=kept)  # type: ignore[arg-type]
                    used = str(made.result())
            except ValueError as error:
                if _is_users(error):
                    raise
                raise typer.BadParameter(str(error)) from error
        detector = _load(used, World(0, 1, _device(device)), device, precision, compile=backend == "compile")
        names = names or measuring.draw_images(Path(folder))
        report = measuring.benchmark(detector, names, batch_size=batch_size, rounds=rounds)
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else report)


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
            f"{device['device']}: {device['name']}; computes {', '.join(device['precisions'])} natively, "
            f"so auto takes {device['auto']}",
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

    from ssd.backends import choose_precision  # noqa: PLC0415
    from ssd.checkpoint import PUBLISHED, cached_path  # noqa: PLC0415
    from ssd.model import native_precisions  # noqa: PLC0415

    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    packages = ["torch", "torchvision", "numpy", "pillow", "scikit-image", "pycocotools", "safetensors"]
    has_gpu = _version("onnxruntime-gpu") != "not installed"
    packages += ["onnxruntime-gpu" if has_gpu else "onnxruntime", "openvino"]
    return {
        "versions": {"ssd300": __version__, "python": platform.python_version()}
        | {package: _version(package) for package in packages},
        "devices": [
            {
                "device": str(device),
                "name": _device_name(device),
                "precisions": native_precisions(device),
                "auto": choose_precision("auto", device),
            }
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
