"""``ssd detect``."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ssd.backends import Options
from ssd.cli import FAILED
from ssd.cli.common import (
    AUTO,
    INTERRUPTED,
    BatchSize,
    Device,
    Precision,
    Weights,
    chosen_device,
    folder_of_all,
    load_detector,
    usage_errors,
)
from ssd.cli.options import OneOf
from ssd.cli.results import RESULT_FORMATS, FreeNames, Results, coco_image_ids
from ssd.detections import Detections
from ssd.distributed import World, join
from ssd.sources import Named, find_images, source_of
from ssd.web import is_web_url


def detect(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders (without subfolders), globs ('photos/**'), http(s) URLs.", show_default=False
        ),
    ],
    weights: Weights = "coco",
    device: Device = None,
    precision: Precision = AUTO,
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile; for many images.")] = False,
    score_threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Least score of a detection.")
    ] = Options.score_threshold,
    iou_threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Overlap at which the lower score goes.")
    ] = Options.iou_threshold,
    max_detections: Annotated[
        int, typer.Option(min=1, help="Most objects of an image.")
    ] = Options.max_detections,
    classes: Annotated[str | None, typer.Option(help="Only these, as in person,dog.")] = None,
    batch_size: BatchSize = 8,
    output: Annotated[
        Path | None,
        typer.Option(help="Where to write; by default a new folder runs/detect-N.", file_okay=False),
    ] = None,
    format: Annotated[str, OneOf(RESULT_FORMATS), typer.Option(help="Of the results.")] = "json",
    images: Annotated[bool, typer.Option("--images/--no-images", help="Write pictures with boxes.")] = True,
    scaled_decoding: Annotated[
        bool, typer.Option("--scaled-decoding", help="Read large JPEG files small; with --no-images.")
    ] = False,
) -> None:
    """An image that cannot be read is named and left out; the exit status is then 1."""
    if scaled_decoding and images:
        raise typer.BadParameter(
            "pictures need the whole image: add --no-images", param_hint="--scaled-decoding"
        )
    found_images, total = _find(sources)
    failures: list[str] = []

    def report(name: str, error: Exception) -> None:
        reason = (
            "no such file" if isinstance(error, FileNotFoundError) else str(error).removeprefix(f"{name}: ")
        )
        failures.append(name)
        tqdm.write(f"ssd: left out {name}: {reason}", file=sys.stderr)

    wanted = None if classes is None else [name.strip() for name in classes.split(",") if name.strip()]
    with join(chosen_device(device)) as world:
        detector = load_detector(weights, world, device, precision, compile=compile)
        with usage_errors():
            results = detector.stream(
                _share(found_images, total, world, batch_size),
                batch_size=batch_size,
                score_threshold=score_threshold,
                iou_threshold=iou_threshold,
                max_detections=max_detections,
                classes=wanted,
                on_error=report,
                scaled_decoding=scaled_decoding,
            )
        folder = folder_of_all(output, "detect", world)
        listed = [] if total is None else [each.name for each in found_images]
        out = Results(
            folder,
            format,
            _names(folder, format, listed, world, pictures=images),
            detector.class_names,
            coco_image_ids(listed) if listed else {},
            pictures=images,
        )
        if world.size > 1:
            # Each process writes its pictures; the main one all results, in their order.
            results, failures[:] = _gather_results(results, listed, out, failures, world, report)
            if not world.is_main:
                return

        done = objects = 0
        stopped: BaseException | None = None
        with (
            out as writer,
            tqdm(total=total, unit="image", disable=True if total == 1 else None) as bar,
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
        if total == done == 1:
            typer.echo(str(found))
        _summarise(done, objects, len(failures), total, writer.path, folder if images and done else None)
    raise typer.Exit(INTERRUPTED if stopped else FAILED if failures else 0)


def _find(sources: list[str]) -> tuple[Iterable[Named], int | None]:
    """The images of all sources, each once, and how many there are, if that is known."""
    every = _each_once(chain.from_iterable(map(find_images, sources)))
    if not all(source_of(text).is_listed for text in sources):
        return every, None
    images = list(every)
    if not images:
        hint = "; subfolders are not searched, but 'FOLDER/**' is" if any(map(os.path.isdir, sources)) else ""
        raise typer.BadParameter(f"no images in {', '.join(sources)}{hint}", param_hint="SOURCES")
    paths = [each.name for each in images if isinstance(each.image, str) and each.image == each.name]
    if len(paths) == len(images) and not any(is_web_url(path) or os.path.exists(path) for path in paths):
        raise typer.BadParameter(f"no such file: {', '.join(paths)}", param_hint="SOURCES")
    return images, len(images)


def _each_once(images: Iterable[Named]) -> Iterator[Named]:
    seen: set[str] = set()
    for image in images:
        if image.name not in seen:
            seen.add(image.name)
            yield image


def _share(images: Iterable[Named], total: int | None, world: World, batch_size: int) -> Iterable[Named]:
    """This process's images: every so many-th batch."""
    if world.size == 1:
        return images
    if total is None:
        raise typer.BadParameter("several processes share what is known beforehand: files, folders, globs")
    every = list(images)
    return [every[i] for i in world.share(total, batch_size)]


def _names(
    folder: Path, format: str, listed: list[str], world: World, *, pictures: bool
) -> Callable[[str], str]:
    """What pictures and labels are called; several processes take the names that the main one gives."""
    labels = folder / RESULT_FORMATS[format] if format == "yolo" else None
    names = FreeNames(folder, pictures=pictures, labels=labels)
    if world.size == 1:
        return names
    return world.gather({name: names(name) for name in listed} if world.is_main else {})[0].__getitem__


def _gather_results(
    results: Iterable[Detections],
    listed: list[str],
    out: Results,
    failures: list[str],
    world: World,
    report: Callable[[str, Exception], None],
) -> tuple[Iterator[Detections], list[str]]:
    """The results of all processes in the order of `listed`, and all failures; pictures are written."""
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
    for share, lost in world.gather((mine, failures)):
        by_source |= {found.source: found for found in share}
        failed += lost
    return iter([by_source[name] for name in listed if name in by_source]), failed


def _summarise(
    done: int, objects: int, failed: int, total: int | None, results: Path, pictures: Path | None
) -> None:
    text = f"{done} image{'s'[: done != 1]}, {objects} object{'s'[: objects != 1]}"
    text += f", {failed} left out" if failed else ""
    text += f", {total - done - failed} not reached" if total is not None and total > done + failed else ""
    text += f"; results in {results}"
    typer.echo(text + (f", pictures in {pictures}" if pictures else ""))
