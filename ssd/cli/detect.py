"""``ssd detect``."""

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from ssd.backends import Options
from ssd.cli import FAILED, INTERRUPTED
from ssd.cli.coco_ids import CocoIds, ids_by_name, ids_of_file
from ssd.cli.common import (
    AUTO,
    BatchSize,
    Device,
    Flips,
    Precision,
    Tiles,
    Voting,
    Weights,
    chosen_device,
    load_detector,
    results_folder,
    usage_errors,
)
from ssd.cli.options import OneOf
from ssd.cli.results import RESULT_FORMATS, FreeNames, Results
from ssd.cli.shards import Shards, rest
from ssd.detections import Detections, LineCount, ZoneCount
from ssd.detector import ScoreThreshold
from ssd.distributed import World, join
from ssd.drawing import missing_letters, tell_missing
from ssd.errors import as_line
from ssd.files import write_free
from ssd.frames import has_frames
from ssd.images import MAX_PIXELS, shortened
from ssd.sources import Named, find_all, left_out_line, source_of
from ssd.web import is_web_url

if TYPE_CHECKING:
    from ssd.cli.window import Window


def _score_threshold(text: str) -> ScoreThreshold:
    if text == "calibrated":
        return "calibrated"
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise typer.BadParameter(f'{text!r} is neither a number from 0 to 1 nor "calibrated"')
    return number


def detect(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Images and films: files, folders (without subfolders), globs ('photos/**'), http(s) URLs; "
            "cameras (0, /dev/video0), RTSP addresses.",
            show_default=False,
        ),
    ],
    weights: Weights = "coco",
    device: Device = None,
    precision: Precision = AUTO,
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile; for many images.")] = False,
    score_threshold: Annotated[
        Any,
        typer.Option(
            parser=_score_threshold,
            metavar="NUMBER|calibrated",
            help="Least score of a detection, or for each class that of the weights' best F1 in training; "
            "ssd evaluate takes 0.05.",
        ),
    ] = Options.score_threshold,
    iou_threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Overlap at which the lower score goes.")
    ] = Options.iou_threshold,
    max_detections: Annotated[
        int, typer.Option(min=1, help="Most objects of an image; ssd evaluate takes 200.")
    ] = Options.max_detections,
    classes: Annotated[str | None, typer.Option(help="Only these, as in person,dog.")] = None,
    batch_size: BatchSize = 8,
    tiles: Tiles = None,
    voting: Voting = False,
    flips: Flips = False,
    output: Annotated[
        Path | None,
        typer.Option(help="Where to write; by default a new folder runs/detect-N.", file_okay=False),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a run of several processes that was cut short; with the same options.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    format: Annotated[str, OneOf(RESULT_FORMATS), typer.Option(help="Of the results.")] = "json",
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="With --format coco: a dataset's COCO file, for its ids of images and classes.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    images: Annotated[
        bool, typer.Option("--images/--no-images", help="Write pictures with boxes; of films, films.")
    ] = True,
    every: Annotated[int, typer.Option(min=1, help="Of films, take one of so many frames.")] = 1,
    max_fps: Annotated[
        float | None, typer.Option(help="Of films, take at most so many frames a second.")
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="Times that a lost camera or RTSP stream is opened again.")
    ] = 5,
    all_frames: Annotated[
        bool, typer.Option("--all-frames", help="Take all frames of animated GIF, WebP, PNG and AVIF files.")
    ] = False,
    track: Annotated[
        bool, typer.Option("--track", help="Of films: give each object a number that it keeps.")
    ] = False,
    line: Annotated[
        list[str] | None,
        typer.Option(
            help="Count the tracked objects that cross it, x1,y1,x2,y2 in pixels of a film: in is to the "
            "left of it as one looks from x1,y1 to x2,y2 (upwards, for one to the right). May be repeated.",
            metavar="POINTS",
        ),
    ] = None,
    zone: Annotated[
        list[str] | None,
        typer.Option(
            help="Count the tracked objects whose lower side's middle is in it: x1,y1,x2,y2,x3,y3,... May be "
            "repeated.",
            metavar="POINTS",
        ),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Show each result in a window, one at a time; q or Esc ends it.")
    ] = False,
    font: Annotated[
        Path | None,
        typer.Option(
            help="Font file for the labels; else fonts of the system are used.", exists=True, dir_okay=False
        ),
    ] = None,
    scaled_decoding: Annotated[
        bool, typer.Option("--scaled-decoding", help="Read large JPEG files small; with --no-images.")
    ] = False,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Most pixels of an image; larger ones are left out.")
    ] = MAX_PIXELS,
) -> None:
    """An image that cannot be read is named and left out; the exit status is then 1."""
    if scaled_decoding:
        _require_no_whole_images({"pictures": images, "tiles": tiles is not None, "a window": show})
    _require_sense(output, resume, annotations, format)
    wanted = _wanted(classes)
    found_images, total = _find(sources)
    # Where images are not known beforehand, films may be among them.
    has_films = total is None or any(has_frames(each, all_frames=all_frames) for each in found_images)
    if resume is not None and has_films:
        text = "takes images that are known beforehand: files, folders, globs; begin films anew, without it"
        raise typer.BadParameter(text, param_hint="--resume")
    lines, zones = _points(line, "--line"), _points(zone, "--zone")
    track = track or bool(lines or zones)
    _require_films(found_images if track and total is not None else (), all_frames=all_frames)
    failures = _Failures()
    with (
        join(chosen_device(device)) as world,
        _window(font) if show else nullcontext() as window,
        results_folder(resume or output, "detect", world) as folder,
    ):
        shards = Shards(folder) if world.size > 1 or resume is not None else None
        detector = load_detector(weights, world, device, precision, compile=compile)
        listed = [] if total is None else [each.name for each in found_images]
        options: dict[str, Any] = {
            **{"score_threshold": score_threshold, "iou_threshold": iou_threshold},
            **{"max_detections": max_detections, "classes": wanted},
            **{"tiles": tiles, "voting": voting, "flips": flips, "scaled_decoding": scaled_decoding},
        }
        settings = options | {  # which a run that goes on has to have again
            **{"weights": weights, "precision": detector.precision, "class_names": detector.class_names},
            **{"batch_size": batch_size, "format": format, "images": images},
        }
        given = shards.resume(settings) if shards and resume is not None else None
        done = frozenset(shards.done) if shards else None
        with usage_errors():
            find = partial(detector.track, lines=lines, zones=zones) if track else detector.stream
            results = find(
                _share(found_images, None if has_films else total, world, batch_size, done),
                batch_size=1 if show else batch_size,  # so that pictures come as evenly as frames do
                on_error=failures.add,
                every=every,
                max_fps=max_fps,
                retries=retries,
                all_frames=all_frames,
                max_pixels=max_pixels,
                **options,
            )
        coco_ids = _coco_ids(annotations, listed, detector.class_names)
        out = Results(
            folder,
            format,
            _names(folder, format, listed, world, given, pictures=images),
            detector.class_names,
            coco_ids,
            pictures=images,
            font=font,
            frames=has_films,
            tracks=track,
            on_film_error=failures.add_film,
        )
        if shards:
            _keep_results(results, out, shards, world, failures.add, settings if given is None else None)
            failures.names[:] = [name for names in world.gather(failures.names) for name in names]
            if not world.is_main:
                return
            results = shards.merge(listed, detector.class_names, detector.category_ids)
        missing = missing_letters(detector.class_names, font) if images else []
        for note in [*coco_ids.notes, *([tell_missing(missing)] if missing else [])]:
            typer.echo(f"ssd: {note}", err=True)
        counts = _Counts(None if has_films else total, failures.names)
        try:
            stopped = _write(results, out, out.enter if shards else out.add, counts, failures.add, window)
        except OSError as error:  # the results file itself cannot be written
            if counts.done and not isinstance(error, BrokenPipeError):
                typer.echo(f"{counts}; the results are not written")
            raise
        counted = _write_places(counts.places, folder, failures.add)
        if isinstance(stopped, Exception) and not isinstance(stopped, BrokenPipeError):
            raise stopped
        if shards and not stopped:
            shards.finish()
        written = f"; results in {out.path}" + (f" ({coco_ids.rule})" if format == "coco" else "")
        has_pictures = out.has_pictures or (images and shards is not None)
        typer.echo(f"{counts}{written}" + (f", pictures in {folder}" if has_pictures else "") + counted)
    raise typer.Exit(INTERRUPTED if stopped else FAILED if failures.names or failures.films else 0)


class _Failures:
    """What is left out, each told at once."""

    def __init__(self) -> None:
        self.names: list[str] = []
        """Of images, and of films that broke off."""
        self.films: list[str] = []
        """Those whose film with boxes is not whole."""

    def add(self, name: str, error: Exception) -> None:
        reason = (
            "no such file" if isinstance(error, FileNotFoundError) else str(error).removeprefix(f"{name}: ")
        )
        self.names.append(name)
        what = "the rest of " if getattr(error, "frames", 0) else ""
        tqdm.write(as_line(f"ssd: left out {what}{name}: {reason}"), file=sys.stderr)

    def add_film(self, name: str, error: Exception) -> None:
        self.films.append(name)
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number else str(error)
        tqdm.write(as_line(f"ssd: the film with boxes of {name} ends early: {reason}"), file=sys.stderr)


def _wanted(classes: str | None) -> list[str] | None:
    """The names of ``--classes``; None for all."""
    wanted = None if classes is None else list(filter(None, map(str.strip, classes.split(","))))
    if wanted == []:
        raise typer.BadParameter("names no class", param_hint="--classes")
    return wanted


def _require_sense(output: Path | None, resume: Path | None, annotations: Path | None, format: str) -> None:
    """Refuse options that contradict each other."""
    if output is not None and resume is not None:
        raise typer.BadParameter("a run that goes on keeps its folder; leave out --output")
    if annotations is not None and format != "coco":
        raise typer.BadParameter("goes with --format coco", param_hint="--annotations")


@dataclass
class _Counts:
    """Of images, for the last line."""

    total: int | None
    failures: list[str]
    done: int = 0
    objects: int = 0
    frames: bool = False
    """Whether frames of films are among them."""
    tracks: set[int] | None = None
    """The ids of all objects, where these are tracked."""
    places: dict[str, tuple[LineCount | ZoneCount, ...]] = field(default_factory=dict)
    """Of each film, the last counts of lines and zones."""

    def add(self, found: Detections) -> None:
        """Count a result."""
        self.done, self.objects = self.done + 1, self.objects + len(found)
        self.frames = self.frames or found.frame is not None
        if found.track_ids is not None:
            self.tracks = (self.tracks or set()) | (set(found.track_ids.tolist()) - {-1})
        if found.counts:
            self.places[found.source] = found.counts

    def __str__(self) -> str:
        done, objects, failed = self.done, self.objects, len(self.failures)
        what = "image or frame" if self.frames else "image"
        what = ("images and frames" if self.frames else "images") if done != 1 else what
        text = f"{done} {what}, {objects} object{'s'[: objects != 1]}"
        if self.tracks is not None:
            text = f"{done} {what}, {objects} detections, {len(self.tracks)} tracked objects"
        text += f", {failed} left out" if failed else ""
        missing = 0 if self.total is None else self.total - done - failed
        return text + (f", {missing} not reached" if missing > 0 else "")


def _write(
    results: Iterable[Detections],
    out: Results,
    add: Callable[[Detections], None],
    counts: _Counts,
    report: Callable[[str, Exception], None],
    window: "Window | None" = None,
) -> BaseException | None:
    """Write and show results as they come; gives what stopped that, after which what is done is kept."""
    alone = counts.total == 1
    with out, tqdm(total=counts.total, unit="image", disable=True if alone else None) as bar:
        try:
            for found in results:
                at = "" if found.frame is None else f" frame {found.frame} ({found.time:.3f} s)"
                try:
                    add(found)
                    counts.add(found)
                except (OSError, ValueError) as error:  # a name, a size or a disk that cannot be written
                    report(f"{found.source}{at}", error)
                tqdm.write(as_line(f"{found.source}{at}: {found.summary()}"), file=sys.stdout)
                if alone:
                    typer.echo(str(found))
                bar.update(counts.done + len(counts.failures) - bar.n)
                if window and not window.show(found):
                    break
        except (KeyboardInterrupt, Exception) as error:
            return error
    return None


def _write_places(
    places: Mapping[str, Sequence[LineCount | ZoneCount]],
    folder: Path,
    report: Callable[[str, Exception], None],
) -> str:
    """Write the counts of lines and zones, beside results of any format; gives what is told of them."""
    if not places:
        return ""
    entries = [
        {"source": source, "counts": [each.to_dict() for each in counts]} for source, counts in places.items()
    ]
    path, where = folder / "counts.json", ""
    try:
        content = json.dumps(entries, indent=1, ensure_ascii=False).encode(errors="backslashreplace")
        where = f", counts in {write_free({path: content})[0]}"
    except OSError as error:
        report(str(path), error)
    lines = [f"{source}: {each.name}: {each}" for source, counts in places.items() for each in counts]
    return "\n".join([where, *map(as_line, lines)])


def _require_no_whole_images(wanted: dict[str, bool]) -> None:
    for what, is_wanted in wanted.items():
        if is_wanted:
            hint = ": add --no-images" if what == "pictures" else ""
            text = f"{what} need{'s'[: what == 'a window']} the whole image{hint}"
            raise typer.BadParameter(text, param_hint="--scaled-decoding")


def _points(texts: list[str] | None, option: str) -> list[tuple[float, ...]]:
    """The lines or zones of an option."""
    if not texts:
        return []
    from ssd.tracking import checked_points  # noqa: PLC0415 (an extra)

    with usage_errors(option):
        return [
            checked_points([float(each) for each in text.split(",")], closed=option == "--zone")
            for text in texts
        ]


def _require_films(images: Iterable[Named], *, all_frames: bool) -> None:
    for each in images:
        if not has_frames(each, all_frames=all_frames):
            hint = "; with --all-frames, animations are films" if not all_frames else ""
            raise typer.BadParameter(
                f"follows objects over the frames of films, and {each.name} is an image{hint}",
                param_hint="--track",
            )


@contextmanager
def _window(font: Path | None) -> "Iterator[Window]":
    from ssd.cli.window import NoWindow, Window  # noqa: PLC0415 (it takes time, and what not all have)

    try:
        window = Window(font)
    except NoWindow as error:
        raise typer.BadParameter(str(error), param_hint="--show") from error
    try:
        yield window
    finally:
        window.close()


def _coco_ids(annotations: Path | None, listed: list[str], class_names: Sequence[str]) -> CocoIds:
    if annotations is None:
        return ids_by_name(listed)
    if not listed:
        raise typer.BadParameter(
            "ids of a dataset go by the names of files, folders or globs", param_hint="--annotations"
        )
    return ids_of_file(annotations, listed, class_names)


def _find(sources: list[str]) -> tuple[Iterable[Named], int | None]:
    """The images of all sources, each once, and how many there are, if that is known."""

    def tell(counts: Counter[str]) -> None:
        where = sources[0] if len(sources) == 1 else "the sources"
        tqdm.write(f"ssd: {left_out_line(where, counts)}", file=sys.stderr)

    every = _each_once(find_all(sources, tell))
    if not all(source_of(text).is_listed for text in sources):
        return every, None
    images = list(every)
    if not images:
        hint = "; subfolders are not searched, but 'FOLDER/**' is" if any(map(os.path.isdir, sources)) else ""
        raise typer.BadParameter(f"no images in {', '.join(sources)}{hint}", param_hint="SOURCES")
    paths = [each.name for each in images if isinstance(each.image, str) and each.image == each.name]
    if len(paths) == len(images) and not any(is_web_url(path) or os.path.exists(path) for path in paths):
        raise typer.BadParameter(f"no such file: {', '.join(map(shortened, paths))}", param_hint="SOURCES")
    return images, len(images)


def _each_once(images: Iterable[Named]) -> Iterator[Named]:
    seen: set[str] = set()
    for image in images:
        if image.name not in seen:
            seen.add(image.name)
            yield image


def _share(
    images: Iterable[Named], total: int | None, world: World, batch_size: int, done: Collection[str] | None
) -> Iterable[Named]:
    """This process's images, if several share them: every so many-th batch of which not all is done."""
    if done is None:
        return images
    if total is None:
        what = "images that are known beforehand: files, folders, globs; pass films to one"
        raise typer.BadParameter(f"several processes share {what}")
    every = list(images)
    mine = rest([each.name for each in every], done, batch_size)[world.rank :: world.size]
    return [each for i in mine for each in every[i * batch_size : (i + 1) * batch_size]]


def _names(
    folder: Path,
    format: str,
    listed: list[str],
    world: World,
    given: dict[str, str] | None = None,
    *,
    pictures: bool,
) -> FreeNames:
    """What pictures and labels are called; several processes take the names that the main one gives.

    A run that goes on has those that it was `given` before.
    """
    labels = folder / RESULT_FORMATS[format] if format == "yolo" else None
    names = FreeNames(folder, pictures=pictures, labels=labels)
    if given is not None:
        names.take_over(given)
        names.is_resumed = True
    elif world.size > 1:
        names.take_over(world.gather({name: names(name) for name in listed} if world.is_main else {})[0])
    return names


def _keep_results(
    results: Iterable[Detections],
    out: Results,
    shards: Shards,
    world: World,
    report: Callable[[str, Exception], None],
    settings: Mapping[str, Any] | None,
) -> None:
    """Write this process's own pictures and labels, and its results, which the main one merges later.

    The settings are those of a run that begins.
    """
    if world.is_main and settings is not None:
        shards.begin(settings, out.names.given)
        goes_on = f"--resume {out.path.parent} with the same sources and options goes on"
        typer.echo(f"ssd: results are kept as they come; after an interruption, {goes_on}", err=True)
    world.gather(None)  # from here on the folder is there for all
    for found in results:
        if found.source in shards.done:
            continue
        try:
            out.write_own(found)
        except (OSError, ValueError) as error:
            report(found.source, error)
        else:
            shards.add(found)
