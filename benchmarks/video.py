"""A film to detections and a film with boxes: what overlaps, and beside ultralytics' `predict`.

python benchmarks/video.py [--rounds 5] [--frames 240] [--sizes 1280x720 640x360] [--precision auto]
    [--peer-python PYTHON] [--processor]

The film is a window that goes over drawn scenes, in H.264. "detection alone" has its frames in memory and
draws nothing; "decoding and encoding alone" writes each frame as it is read; "the whole" is what ssd detect
does: it decodes, detects, draws, encodes, and writes results. All are in one process, in turn. On a CPU all
of them want all cores; so each of the first two is also measured on half of them, which is what is left to
it while the other one runs: where the two overlap, the whole on all cores is as fast as the slower of them.
"""

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from timing import heading, medians, show

from ssd.cli.coco_ids import ids_by_name
from ssd.cli.results import FreeNames, Results
from ssd.detector import Detector
from ssd.frames import frames_of
from ssd.shapes import draw_scene
from ssd.sources import Film, Named
from ssd.video import FilmWriter


def scenes(size: tuple[int, int], count: int) -> Iterator[np.ndarray]:
    """A window of a size on a picture of several scenes, which it goes over in a wave."""
    width, height = size
    rng = np.random.default_rng(0)
    around = Image.new("RGB", (width * 5 // 4, height * 5 // 4))
    for i in range(6):
        tile = (around.width // 3 + 1, around.height // 2 + 1)
        around.paste(draw_scene(rng)[0].resize(tile), (i % 3 * tile[0], i // 3 * tile[1]))
    for number in range(count):
        turn = number / 240 * 2 * np.pi
        left, top = (
            int((1 + wave) * side / 8) for wave, side in zip((np.cos(turn), np.sin(turn)), size, strict=True)
        )
        yield np.asarray(around.crop((left, top, left + width, top + height)))


def write_film(path: Path, size: tuple[int, int], count: int) -> None:
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=Fraction(25))
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for pixels in scenes(size, count):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        film.mux(stream.encode(None))


def detect_alone(detector: Detector, frames: list[Named]) -> None:
    for _ in detector.stream(frames):
        pass


def code_alone(film: Path, folder: Path) -> None:
    with (folder / "copy.mp4").open("wb") as file:
        writer = None
        for frame in frames_of(Film(str(film))):
            picture = Image.fromarray(frame.pixels)
            writer = writer or FilmWriter(file, picture.size, str(film))
            writer.add(picture, frame.time)
        assert writer is not None
        writer.close()


def whole(detector: Detector, film: Path, *, pictures: bool = True) -> None:
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        names = FreeNames(folder, pictures=pictures, labels=None)
        ids = ids_by_name([str(film)])
        with Results(
            folder, "jsonl", names, detector.class_names, ids, pictures=pictures, frames=True
        ) as out:
            for found in detector.stream(film):
                out.add(found)
                print(found.summary())


def keep_to(cores: list[int]) -> None:
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(task), cores)


def on_half(function: Callable[[], object]) -> Callable[[], object]:
    """The same on half of the cores."""

    def call() -> object:
        every, threads = sorted(os.sched_getaffinity(0)), torch.get_num_threads()
        torch.set_num_threads(max(1, threads // 2))
        keep_to(every[: max(1, len(every) // 2)])
        try:
            return function()
        finally:
            torch.set_num_threads(threads)
            keep_to(every)

    return call


PEER = """
import sys, time
from ultralytics import YOLO
model = YOLO("yolov8n.yaml")
def run():
    for _ in model.predict(sys.argv[1], stream=True, save=True, project=sys.argv[2], verbose=False): pass
run()
start = time.perf_counter()
run()
print(time.perf_counter() - start)
"""
"""yolov8n with random weights; the first run warms it up."""


def times_of_peer(python: str, film: Path) -> float:
    code = [python, "-c", PEER, str(film), str(film.parent)]
    own = {**os.environ, "YOLO_CONFIG_DIR": str(film.parent), "YOLO_OFFLINE": "true"}  # no downloads of fonts
    result = subprocess.run(code, stdout=subprocess.PIPE, text=True, check=True, env=own)
    return float(result.stdout.split()[-1])


def once(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


ALONE = ("detection alone", "decoding and encoding alone")


def measure(detector: Detector, size: tuple[int, int], options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        film = Path(name) / "film.mp4"
        write_film(film, size, options.frames)
        frames = [Named(str(film), each) for each in frames_of(Film(str(film)))]
        functions: dict[str, Callable[[], object]] = {
            ALONE[0]: lambda: detect_alone(detector, frames),
            ALONE[1]: lambda: code_alone(film, Path(name)),
            "the whole": lambda: whole(detector, film),
            "the whole, --no-images": lambda: whole(detector, film, pictures=False),
        }
        clock = time.process_time if options.processor else time.perf_counter
        if hasattr(os, "sched_setaffinity") and not options.processor:
            functions |= {f"{each}, half of the cores": on_half(functions[each]) for each in ALONE}
        times = medians(functions, options.rounds, clock)
        if options.peer_python:  # in turn with ours, so that both meet the same machine
            peer = options.peer_python
            pairs = [(times_of_peer(peer, film), once(functions["the whole"])) for _ in range(options.rounds)]
            per = 1e3 / options.frames
            theirs, ours = (per * statistics.median(each) for each in zip(*pairs, strict=True))
            print(f"  ultralytics predict, yolov8n at 640: {theirs:.2f} ms a frame; ssd in turn: {ours:.2f}")
    kind = "processor ms" if options.processor else "ms"
    show(f"{size[0]}x{size[1]}, {options.frames} frames, {kind} a frame", times, "the whole", options.frames)
    if options.processor:
        return
    for which in ("", ", half of the cores"):
        slower = max(times.get(f"{each}{which}", 0) for each in ALONE)
        print(f"  slower alone{which} / the whole: {slower / times['the whole']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frames", type=int, default=240)
    parser.add_argument("--sizes", nargs="+", default=["1280x720", "640x360"])
    parser.add_argument("--weights", default="shapes")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--peer-python", help="of an environment with ultralytics")
    parser.add_argument("--processor", action="store_true", help="time of all cores, added up")
    options = parser.parse_args()
    print(heading())
    detector = Detector.load(options.weights, precision=options.precision)
    print(detector)
    for text in options.sizes:
        width, height = map(int, text.split("x"))
        measure(detector, (width, height), options)


if __name__ == "__main__":
    main()
