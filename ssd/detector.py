"""Detector: from images of any kind to `Detections`."""

import contextlib
import ctypes
import difflib
import math
import operator
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import IO, Any, Literal, NamedTuple, SupportsIndex, TypeAlias, TypeVar, overload

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ssd import backends
from ssd.backends import Backend, Options
from ssd.calibration import Calibration
from ssd.checkpoint import as_thresholds
from ssd.choices import LEAST_TILE, Precision
from ssd.detections import Detections
from ssd.devices import choose_precision, usable_device
from ssd.errors import ImageError, ImageMemoryError, NonFiniteError
from ssd.frames import Playback, checked, with_frames
from ssd.images import MAX_PIXELS, ImageSource, enough_memory, load_scaled, source_path
from ssd.model import SSD, load_model
from ssd.pixels import DECODED, Original, opened_path, origin
from ssd.sources import Film, Frame, Named, find_images
from ssd.threads import Outcome, Readers, require_process, submit
from ssd.tiles import Found, Window, cut, gather
from ssd.transforms import resize

OnError = Callable[[str, Exception], None]
ScoreThreshold: TypeAlias = float | Literal["calibrated"]
AnySource: TypeAlias = ImageSource | Named | Film
E = TypeVar("E", bound=BaseException)

_MAX_READERS = 8  # threads; with sixteen, fewer photos a second are read (docs/performance.md)
_MOST_VIEWS = 64  # images and tiles that go through the network together

_made: "weakref.WeakSet[Detector]" = weakref.WeakSet()


def _after_fork() -> None:
    """In a process that was forked after a detector was made: wait for no threads that were not forked."""
    for detector in _made:
        torch.set_num_threads(1)
        # Other runtimes end their threads when they are freed, and would wait for them: never free them here.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(detector.backend.forward))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class Input:
    """An image that was read, as the network is to see it."""

    name: str
    """What its result and its errors call it."""
    image: Image.Image | npt.NDArray[np.uint8] | Original | None
    """Upright, RGB, of a film its pixels; or where to read it again; None if not read at full size."""
    size: tuple[int, int]
    """Width and height, at full size."""
    views: Tensor
    """uint8 ``[V, S, S, 3]``, of the network's size S: the whole image first, then its tiles."""
    windows: tuple[Window, ...]
    """What of the image each view shows."""
    number: int | None = None
    """Among the images of its list or stream, counted from 0; None by itself."""
    frame: int | None = None
    """Of a film, its frame's number; see `ssd.sources.Named`."""
    time: float | None = None
    """Of a film's frame, its time; see there."""
    taken: float | None = None
    """Of a live source, when it came; see there."""


class Reading(NamedTuple):
    """How images are read."""

    max_pixels: int = MAX_PIXELS
    """See `ssd.load_image`."""
    least: int | None = None
    """See `ssd.images.load_scaled`."""
    tiles: int | None = None
    """See `ssd.tiles.cut`; None for no tiles."""
    playback: Playback = Playback()
    """Which frames of films and animations."""


class Detector:
    """Finds objects in images: reading, transform, network, NMS, boxes in the image's own pixels.

    It keeps a copy of the model, prepared for inference, never changes, and may be used from several threads
    at a time. Pickled, as for another process, its weights travel and are prepared anew there, for the same
    device; an exported file is opened again by its path. In a process that is forked after a detector was
    made, torch runs in one thread, since the others are not forked; on CUDA, each process makes its own. What
    it runs on is in `device`, `precision`, `layout` and `backend`.

    Args:
        model: on the device and in the precision that detection is to use; or a `ssd.backends.Backend`.
        class_names: one for each class but the background.
        category_ids: the id of each class in COCO files; see `Detections.category_ids`.
        score_thresholds: one for each class but the background, in [0, 1], as training finds them; or none.
        calibration: what makes probabilities of the scores of "calibrated" detection; or None.

    >>> detector = Detector(SSD(num_classes=3, backbone="resnet18"), ["cat", "dog"])
    >>> detector(Image.new("RGB", (640, 480)), score_threshold=1)
    Detections(no objects)
    """

    def __init__(
        self,
        model: SSD | Backend,
        class_names: Sequence[str],
        category_ids: Sequence[int] = (),
        score_thresholds: Sequence[float] = (),
        calibration: Calibration | None = None,
    ) -> None:
        if len(class_names) != model.num_classes - 1:
            raise ValueError(
                f"a model of {model.num_classes} classes, one of which is the background, needs "
                f"{model.num_classes - 1} names; got {len(class_names)}"
            )
        self.score_thresholds = as_thresholds(score_thresholds, len(class_names))
        self.calibration = calibration
        self.backend = model if isinstance(model, Backend) else backends.of_model(model)
        self.device, self.precision = self.backend.device, self.backend.precision
        self.layout = self.backend.layout
        self.class_names, self.category_ids = tuple(class_names), tuple(category_ids)
        _made.add(self)

    def __repr__(self) -> str:
        return (
            f"Detector({len(self.class_names)} classes, {self.precision}, {self.device}, {self.backend.name})"
        )

    @classmethod
    def load(
        cls,
        weights: str | os.PathLike[str] = "coco",
        device: torch.device | str | None = None,
        precision: Precision | Literal["auto"] = "auto",
        *,
        compile: bool = False,
        progress: bool = True,
    ) -> "Detector":
        """A detector with the weights of a checkpoint, or of what ``ssd export`` made of one.

        Args:
            weights: "coco" for NVIDIA's published weights, "shapes" for those that come with the package, a
                path, an http(s) URL, or ``hf://owner/repo[/file][@revision]`` for weights of the Hugging Face
                Hub (`ssd.pretrained.fetch`). An exported file runs in its runtime: ``.onnx``, ``.pt2``,
                ``.torchscript``, or OpenVINO's folder. Such a file is a program: load those of people you
                trust.
            device: by default CUDA where there is one, else the CPU.
            precision: fp32, fp16 or bf16; auto is bf16 where the device computes it natively, else fp32.
            compile: by torch.compile, at the first images; takes a minute, and a C++ compiler.
            progress: show a progress bar for a download.

        Raises:
            DownloadError, CheckpointError, FileNotFoundError: see `ssd.load_model`, `ssd.backends.load`.
            MissingExtra: the runtime of an exported file is not installed.
            ValueError: there is no such device here, or an exported file is of another precision.
        """
        if backends.kind_of(weights):
            if compile:
                raise ValueError(f"{weights} is compiled already, in a way; leave compile out")
            target = None if device is None else usable_device(device)
            backend, about = backends.load(weights, target, precision)
            return cls(
                backend, about.class_names, about.category_ids, about.score_thresholds, about.calibration
            )
        target = usable_device(device)
        precision = choose_precision(precision, target)
        model, found = load_model(weights, progress=progress)
        backend = backends.of_model(model.to(target), precision, compile=compile)
        return cls(backend, found.class_names, found.category_ids, found.score_thresholds, found.calibration)

    @overload
    def __call__(
        self,
        images: list[AnySource] | tuple[AnySource, ...],
        *,
        score_threshold: ScoreThreshold = ...,
        iou_threshold: float = ...,
        max_detections: int = ...,
        classes: Sequence[str | int] | None = ...,
        batch_size: int = ...,
        max_pixels: int = ...,
        tiles: int | None = ...,
        voting: bool = ...,
        flips: bool = ...,
    ) -> list[Detections]: ...
    @overload
    def __call__(
        self,
        images: ImageSource,
        *,
        score_threshold: ScoreThreshold = ...,
        iou_threshold: float = ...,
        max_detections: int = ...,
        classes: Sequence[str | int] | None = ...,
        batch_size: int = ...,
        max_pixels: int = ...,
        tiles: int | None = ...,
        voting: bool = ...,
        flips: bool = ...,
    ) -> Detections: ...
    def __call__(
        self,
        images: ImageSource | list[AnySource] | tuple[AnySource, ...],
        *,
        score_threshold: ScoreThreshold = Options.score_threshold,
        iou_threshold: float = Options.iou_threshold,
        max_detections: int = Options.max_detections,
        classes: Sequence[str | int] | None = None,
        batch_size: int = 8,
        max_pixels: int = MAX_PIXELS,
        tiles: int | None = None,
        voting: bool = False,
        flips: bool = False,
    ) -> Detections | list[Detections]:
        """Detect objects in one image, or in each of a list.

        Args:
            images: anything that `ssd.load_image` takes, or a list of such.
            score_threshold: least probability of a detection, in [0, 1]; 0.4 as on the hub page. Or
                "calibrated": that of its class among the detector's `score_thresholds`; scores are then
                probabilities where the detector has a `calibration`; else, as with a number, the network's.
            iou_threshold: of two overlapping boxes of a class, the lower score goes at this IoU.
            max_detections: most objects of an image.
            classes: names or 0-based ids to look for, or one name; None for all.
            batch_size: how many images of a list go through the network at a time.
            max_pixels: most pixels of an image that is to be decoded; see `ssd.load_image`.
            tiles: for objects that are small in large images: look at the whole image and at overlapping
                tiles of so many pixels a side; see `ssd.tiles`.
            voting: place each box at the mean of the candidates around it; see `ssd.postprocess.postprocess`.
            flips: look at the mirror image, too, and choose among the boxes of both; takes twice the time.

        Returns:
            `Detections` for one image, a list of them for a list.

        Raises:
            ImageError, FileNotFoundError: an image cannot be read; the message names it.
            ImageMemoryError: there is not enough memory for an image, also when it is read by itself.
            NonFiniteError: the network gave NaN or infinity.
            ValueError: an option is out of range or a class unknown.
        """
        options = self.options(score_threshold, iou_threshold, max_detections, classes, voting, flips)
        reading = Reading(max_pixels, tiles=_checked_side(tiles))
        if isinstance(images, list | tuple) and not isinstance(images, Named):
            return list(self._stream(images, _positive(batch_size), options, None, reading))
        return self.detect([self.read(images, how=reading)], options)[0]

    def stream(
        self,
        sources: str | os.PathLike[str] | Iterable[AnySource],
        *,
        batch_size: int = 8,
        score_threshold: ScoreThreshold = Options.score_threshold,
        iou_threshold: float = Options.iou_threshold,
        max_detections: int = Options.max_detections,
        classes: Sequence[str | int] | None = None,
        on_error: OnError | None = None,
        every: int = 1,
        max_fps: float | None = None,
        retries: int = 5,
        all_frames: bool = False,
        scaled_decoding: bool = False,
        max_pixels: int = MAX_PIXELS,
        tiles: int | None = None,
        voting: bool = False,
        flips: bool = False,
    ) -> Iterator[Detections]:
        """Detect objects in any number of images and films, one result at a time and in order.

        Other threads read images, some two batches ahead, and detect on the next batch while the results of
        the last one are used. Photos are at full size only until they are resized, a few at a time: see
        `ssd.pixels.DECODED`.

        Args:
            sources: a folder, a glob, a path or a URL; a camera ("0", "/dev/video0") or an RTSP address; or
                an iterable of what `ssd.load_image` takes, of `ssd.sources.Named`, which says what to call an
                image, or of `ssd.sources.Film`. A film has a result for each frame, all of one `source` and
                `number`, with their `frame` and `time`.
            batch_size: how many images go through the network at a time.
            score_threshold, iou_threshold, max_detections, classes: as for calling the detector.
            on_error: called with the name and the exception of an image that cannot be read, or for which
                the network gives NaN; it is then left out. Without it, the exception is raised. Both ways
                it has the `source` and the `number` that the result would have had. For a film that breaks
                off it comes after the frames before that.
            every: of a film, take one of so many frames.
            max_fps: of a film, take at most so many frames a second of its own time.
            retries: how often in a row a camera or RTSP stream that was lost is opened again.
            all_frames: of an animated GIF, WebP, PNG or AVIF file, take all frames, as of a film.
            scaled_decoding: read large JPEG files at a part of their size, which is several times as fast;
                their results have no image to draw on, and scores may differ a little.
            max_pixels: most pixels of an image that is to be decoded; see `ssd.load_image`.
            tiles: as for calling the detector; not with `scaled_decoding`.
            voting, flips: as for calling the detector.
        """
        options = self.options(score_threshold, iou_threshold, max_detections, classes, voting, flips)
        if isinstance(sources, str | os.PathLike):
            sources = find_images(sources, films=True)
        elif _is_one_image(sources):
            raise TypeError(
                "stream takes a folder, glob, path, URL or many images; for one, call the detector"
            )
        if scaled_decoding and tiles is not None:
            raise ValueError("tiles need the whole image; leave scaled_decoding out")
        least = self.layout.size if scaled_decoding else None
        reading = Reading(
            max_pixels, least, _checked_side(tiles), checked(Playback(every, max_fps, retries, all_frames))
        )
        return self._stream(sources, _positive(batch_size), options, on_error, reading)

    def track(
        self,
        sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str] | Named | Film],
        *,
        score_threshold: ScoreThreshold = Options.score_threshold,
        lines: Iterable[Sequence[Any]] = (),
        zones: Iterable[Sequence[Any]] = (),
        **options: Any,
    ) -> Iterator[Detections]:
        """Detect objects in films, and give each a number that it keeps over the frames: `track_ids`.

        By ByteTrack, which also takes detections from a score of 0.1 on where they go on with an object that
        it knows; these are among the results, too. An object has its id from the second frame on in which
        it is seen, and -1 before; it keeps it where it is hidden for up to two seconds. Ids count from 1 on,
        anew for each call; no two objects of a call have the same, also where it is given several films.

        >>> for found in detector.track("street.mp4", lines=[(0, 300, 640, 300)]):  # doctest: +SKIP
        ...     print(found.frame, found.track_ids, found.counts)

        Args:
            sources: a film, folder or glob of films, a camera or an RTSP address, or several of these.
            score_threshold: as for `stream`; what is seen below it begins no new object.
            lines: to count what crosses them: x and y of start and end of each, in pixels of the film. An
                object crosses when its whole box is on the other side, between the ends of the line; see
                `Detections.counts`, and for what is in and out, `ssd.detections.LineCount`.
            zones: to count what is in them: x and y of the corners of each. An object is where the middle of
                its box's lower side is.
            options: as for `stream`.

        Raises:
            ImageError: a source is an image; or a line or zone reaches outside of a film.
            ValueError: an option is out of range, or a line or zone is none.
            MissingExtra: the packages that track are not installed.
        """
        from ssd import tracking  # noqa: PLC0415 (an extra)

        at_lines = [tracking.checked_points(each, closed=False) for each in lines]
        at_zones = [tracking.checked_points(each, closed=True) for each in zones]
        asked = self.options(score_threshold, Options.iou_threshold, 1, None, False, False)
        least = np.array(asked.class_thresholds or [asked.score_threshold] * len(self.class_names))
        nms = self.backend.nms
        low = min(float(least.min()), max(tracking.LOW, nms.score_threshold if nms else 0))
        if not isinstance(sources, str | os.PathLike):
            sources = chain.from_iterable(
                find_images(each, films=True) if isinstance(each, str | os.PathLike) else [each]
                for each in sources
            )
        results = self.stream(sources, score_threshold=low, **options)
        found = tracking.tracked(results, least, at_lines, at_zones)
        return map(self._as_probabilities, found) if asked.class_thresholds and self.calibration else found

    def _as_probabilities(self, found: Detections) -> Detections:
        """The same with calibrated scores."""
        assert self.calibration is not None
        return found.changed(scores=self.calibration.probabilities(found.scores))

    def options(
        self,
        score_threshold: ScoreThreshold = Options.score_threshold,
        iou_threshold: float = Options.iou_threshold,
        max_detections: int = Options.max_detections,
        classes: Sequence[str | int] | None = None,
        voting: bool = False,
        flips: bool = False,
    ) -> Options:
        """What a caller wants, checked; the arguments are those of calling the detector.

        Raises:
            ValueError: one is out of range, or a class unknown.
        """
        of_classes = self._calibrated(score_threshold) if isinstance(score_threshold, str) else ()
        least = min(of_classes) if isinstance(score_threshold, str) else score_threshold
        for name, value in (("score_threshold", least), ("iou_threshold", iou_threshold)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1]; got {value}")
        if isinstance(classes, str):
            classes = [classes]
        wanted = None if classes is None else tuple(self._class_id(each) for each in classes)
        options = Options(least, iou_threshold, max_detections, wanted, of_classes, voting, flips)
        self.backend.require(options)
        return options

    def _calibrated(self, asked: str) -> tuple[float, ...]:
        """The threshold of each class."""
        if asked != "calibrated":
            raise ValueError(f'score_threshold is a number from 0 to 1, or "calibrated"; got {asked!r}')
        if not self.score_thresholds:
            raise ValueError(
                'score_threshold "calibrated" needs a threshold for each class, and these weights have none: '
                "ssd calibrate finds them on labelled images, and training saves them with weights that it "
                "evaluates; or give a number"
            )
        return self.score_thresholds

    def _class_id(self, wanted: str | int) -> int:
        if isinstance(wanted, str) and wanted in self.class_names:
            return self.class_names.index(wanted)
        if isinstance(wanted, SupportsIndex) and not isinstance(wanted, bool):
            class_id = operator.index(wanted)
            if 0 <= class_id < len(self.class_names):
                return class_id
        close = difflib.get_close_matches(str(wanted), self.class_names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"it knows {', '.join(self.class_names)}"
        raise ValueError(f"the model has no class {wanted!r}; {hint}")

    def _stream(
        self,
        sources: Iterable[AnySource],
        batch_size: int,
        options: Options,
        on_error: OnError | None,
        reading: Reading,
    ) -> Iterator[Detections]:
        pool, process = ThreadPoolExecutor(1, "ssd-detect"), os.getpid()
        batch: list[Input] = []
        under_way: deque[tuple[list[Input], Outcome[list[Detections]]]] = deque()

        def start() -> None:
            nonlocal batch
            if batch:
                under_way.append((batch, submit(pool, self.detect, batch, options)))
            batch = []

        def results(left: int = 0) -> Iterator[Detections]:
            require_process(process)
            while len(under_way) > left:
                yield from self._finite(*under_way.popleft(), options, on_error)

        finished = False
        try:
            ahead = 2 * batch_size if reading.tiles is None else 2  # tiles take up to twice their image
            for read in self._read_ahead(sources, ahead, reading):
                if read is None:  # nobody should wait for images who could have results
                    yield from results()
                    continue
                name, number, outcome = read
                if isinstance(outcome, Input):
                    batch.append(outcome)
                elif on_error is not None and isinstance(outcome, ImageError | OSError):
                    on_error(name, _marked(outcome, name, number))
                else:
                    start()
                    yield from results()
                    raise _marked(outcome, name, number)
                views = sum(len(each.views) for each in batch)
                if len(batch) == batch_size or views >= max(batch_size, _MOST_VIEWS):
                    start()
                    yield from results(left=1)
            start()
            yield from results()
            finished = True
        finally:
            pool.shutdown(wait=finished, cancel_futures=True)

    def _finite(
        self,
        batch: list[Input],
        outcome: "Outcome[list[Detections]]",
        options: Options,
        on_error: OnError | None,
    ) -> list[Detections]:
        """Detections of those images of a batch for which the network gives finite numbers."""
        found = outcome.get()
        if isinstance(found, NonFiniteError) and on_error is not None:
            for i in found.images:
                error = NonFiniteError(str(found), [i])
                on_error(batch[i].name, _marked(error, batch[i].name, batch[i].number))
            rest = [each for i, each in enumerate(batch) if i not in found.images]
            return self.detect(rest, options) if rest else []
        if isinstance(found, NonFiniteError) and found.images:
            first = batch[found.images[0]]
            raise _marked(found, first.name, first.number)
        if isinstance(found, BaseException):
            raise found
        return found

    def detect(self, batch: list[Input], options: Options) -> list[Detections]:
        """Detections of images that were read, which go through the network together.

        Raises:
            NonFiniteError: the network gave NaN or infinity for some.
        """
        image_of = [i for i, each in enumerate(batch) for _ in each.windows]
        found: list[Found] = []
        backend = self.backend.with_flips() if options.flips else self.backend
        with torch.inference_mode():
            for pixels in self.pixels(batch).split(max(_MOST_VIEWS, len(batch))):
                try:
                    some = backend.finish(backend.forward(pixels), options)
                except NonFiniteError as error:
                    images = sorted({image_of[len(found) + i] for i in error.images})
                    names = ", ".join(batch[i].name or "image" for i in images)
                    raise NonFiniteError(f"{names}: {error}", images) from error
                found += some.cpu().per_image()
        return self.results(batch, found, options)

    def read(self, source: AnySource, number: int | None = None, how: Reading | None = None) -> Input:
        """An image as the network is to see it, for `detect`.

        Raises:
            ImageError, FileNotFoundError: it cannot be read; the message names it.
        """
        name, image = _named(source, number)
        if isinstance(image, Exception):  # where a film breaks off
            raise image
        if isinstance(image, Film):
            raise TypeError(f"{name}: is a film, not an image; detector.stream(...) takes it")
        how = how or Reading()
        if isinstance(image, Frame):
            return self._read_frame(image, name, number, how)
        where: list[tuple[str | bytes, tuple[int, int] | None]] = []
        try:
            return self._read_once(image, name, number, how, where)
        except ImageMemoryError:
            if not where:
                raise
        # Those that were read at the same time may have left too little.
        return self._read_once(image, name, number, how, where, alone=True)

    def _read_frame(self, frame: Frame, name: str, number: int | None, how: Reading) -> Input:
        height, width = frame.pixels.shape[:2]
        with enough_memory(name, (width, height)):
            windows = cut(width, height, how.tiles)
            parts = (frame.pixels[top:bottom, left:right] for left, top, right, bottom in windows)
            views = torch.stack([resize(each, self.layout.size) for each in parts])
        of_film = (frame.number, frame.time, frame.taken)
        return Input(name, frame.pixels, (width, height), views, tuple(windows), number, *of_film)

    def _read_once(
        self,
        image: ImageSource,
        name: str,
        number: int | None,
        how: Reading,
        where: list[tuple[str | bytes, tuple[int, int] | None]],
        *,
        alone: bool = False,
    ) -> Input:
        """An image as the network is to see it.

        `where` is empty, and gets where it can be read again, or has that already.
        """
        called = name or "image"
        source = where[0][0] if where else image  # a stream is read but once
        with contextlib.ExitStack() as room:

            def on_open(file: IO[bytes], pixels: int) -> None:
                where[:] = where or [origin(image, file)]
                room.close()  # that of an attempt that failed
                room.enter_context(DECODED.taken(DECODED.pixels if alone else pixels))

            whole, size = load_scaled(
                source, how.least, name=called, max_pixels=how.max_pixels, on_open=on_open
            )
            with enough_memory(called, size):
                windows = cut(*size, how.tiles)
                seen = (whole, *map(whole.crop, windows[1:]))
                views = torch.stack([resize(each, self.layout.size) for each in seen])
            kept: Image.Image | Original | None = whole if whole.size == size else None
            if kept is not None and where:
                kept = Original(*where[0], called, size, how.max_pixels, opened_path(image))
            del whole  # before others get its room
        return Input(name, kept, size, views, tuple(windows), number)

    def _read_ahead(
        self, sources: Iterable[AnySource], ahead: int, reading: Reading
    ) -> Iterator[tuple[str, int, Input | BaseException] | None]:
        """Name and number of each source, in order, and what reading it gave.

        None comes before each that is not read yet. At most `ahead` are under way, or as many as there are
        threads; and of images in memory, which are kept, only so many pixels as `DECODED` has room for.
        """
        workers = min(_MAX_READERS, os.cpu_count() or 1)
        pool, process = Readers(workers), os.getpid()
        waiting: deque[tuple[Named, int, Outcome[Input]]] = deque()
        found = with_frames(sources, reading.playback, max_pixels=reading.max_pixels)

        def oldest() -> Iterator[tuple[str, int, Input | BaseException] | None]:
            require_process(process)
            (name, _), number, outcome = waiting.popleft()
            if outcome.empty():
                yield None
            yield name, number, outcome.get()

        def is_full() -> bool:
            kept = sum(_pixels_in_memory(named.image) for named, _, _ in waiting)
            return len(waiting) >= max(ahead, workers) or kept > DECODED.pixels

        finished = False
        try:
            for number, source in found:
                named = _named(source, number)
                outcome = submit(pool, self.read, named, number, reading)
                waiting.append((named, number, outcome))
                if is_full():
                    yield from oldest()
            while waiting:
                yield from oldest()
            finished = True
        finally:
            # Interrupted, one does not want to wait for a server that stalls.
            pool.shutdown(wait=finished)
            found.close()

    def pixels(self, batch: Sequence[Input]) -> Tensor:
        """What `Backend.forward` takes, of all views: uint8 ``[N, S, S, 3]`` on the detector's device."""
        pixels = torch.cat([each.views for each in batch])
        on_gpu = self.device.type == "cuda"
        return (pixels.pin_memory() if on_gpu else pixels).to(self.device, non_blocking=on_gpu)

    def results(self, batch: Sequence[Input], found: Sequence[Found], options: Options) -> list[Detections]:
        """Detections in the pixels of each image, from those of all views of the batch."""
        rest = iter(found)
        return [self._result(each, list(islice(rest, len(each.windows))), options) for each in batch]

    def _result(self, of: Input, found: list[Found], options: Options) -> Detections:
        boxes, scores, class_ids = gather(
            found,
            of.windows,
            of.size,
            iou_threshold=options.iou_threshold,
            max_detections=options.max_detections,
        )
        width, height = of.size
        values = scores.numpy()
        if options.class_thresholds and self.calibration:
            values = self.calibration.probabilities(values)
        return Detections(
            boxes=boxes.numpy(),
            scores=values,
            class_ids=class_ids.numpy(),
            class_names=self.class_names,
            image_size=(height, width),
            source=of.name,
            image=of.image,
            category_ids=self.category_ids,
            number=of.number,
            frame=of.frame,
            time=of.time,
            taken=of.taken,
        )


def _named(source: AnySource, number: int | None) -> Named:
    """A source with what to call it: its path or URL, else its number in a list; empty for one by itself."""
    if isinstance(source, Named):
        return source
    name = source_path(source) or ("" if number is None else f"image {number}")
    return Named(name, source)


def _is_one_image(source: object) -> bool:
    """Whether a source of a stream, which may be an array of paths, is an image itself."""
    if isinstance(source, Image.Image | bytes | bytearray | memoryview) or hasattr(source, "read"):
        return True
    kind = getattr(getattr(source, "dtype", None), "kind", "")
    return kind not in ("O", "U", "S") and getattr(source, "ndim", 4) < 4


def _pixels_in_memory(image: ImageSource | Film | Frame) -> int:
    """How many pixels the copy of an image has that its result keeps; none of a file's."""
    if isinstance(image, Image.Image):
        return image.width * image.height
    shape = getattr(image.pixels if isinstance(image, Frame) else image, "shape", ())
    return math.prod(shape) // 3 if shape else 0


def _marked(error: E, name: str, number: int | None) -> E:
    """The error with the `source` and the `number` that the result would have had."""
    vars(error).update(source=name, number=number)
    return error


def _checked_side(tiles: int | None) -> int | None:
    if tiles is not None and tiles < LEAST_TILE:
        raise ValueError(f"tiles are at least {LEAST_TILE} pixels wide; got {tiles}")
    return tiles


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    return batch_size
