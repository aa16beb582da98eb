"""Large images in tiles: our detector against supervision's InferenceSlicer around the same one.

python benchmarks/tiles.py [DATASET --weights FILE] [--side 320] [--images 50] [--timed 12] [--rounds 3]

By default on walls of nine drawn scenes each, 1440x1440 pixels, with the shapes weights. The same weights,
images, side of a tile and least overlap; scores above 0.05, IoU 0.5. Every function reads its images from
their files and gives boxes in their pixels. The slicer is called in three ways: a tile at a time, as in its
guide; a tile in each of `--threads` threads; and with all tiles of an image in one batch. Its overlap
filters, which take as long, are compared by their AP.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import supervision
import torch
from PIL import Image
from timing import heading

from ssd.data import Annotations, load
from ssd.detections import Detections
from ssd.detector import Detector
from ssd.distributed import alone
from ssd.evaluate import detect_all, measure
from ssd.images import load_image
from ssd.shapes import CLASSES, draw_scene
from ssd.tiles import OVERLAP, cut

CELL = 480  # the largest side of a scene
WANTED = {"score_threshold": 0.05, "iou_threshold": 0.5, "max_detections": 200}
FILTERS = {
    "NMS by IoU": {"overlap_filter": "non_max_suppression"},
    "NMS by IoS": {"overlap_filter": "non_max_suppression", "overlap_metric": "IOS"},
    "merging by IoU": {"overlap_filter": "non_max_merge"},
    "merging by IoS": {"overlap_filter": "non_max_merge", "overlap_metric": "IOS"},
}


def draw_walls(folder: Path, images: int) -> None:
    """A COCO dataset, of which each image is a wall of 3 x 3 drawn scenes."""
    (folder / "val").mkdir()
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    content: dict[str, list] = {"images": [], "annotations": [], "categories": categories}
    for i in range(images):
        wall = Image.new("RGB", (3 * CELL, 3 * CELL), "gray")
        for k in range(9):
            left, top = k % 3 * CELL, k // 3 * CELL
            scene, boxes, labels = draw_scene(np.random.default_rng((i, k)))
            wall.paste(scene, (left, top))
            for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
                box = {"bbox": [left + x1, top + y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                entry = {"id": len(content["annotations"]) + 1, "image_id": i, "category_id": label}
                content["annotations"].append(entry | box | {"iscrowd": 0})
        wall.save(folder / "val" / f"{i}.jpg", quality=90)
        content["images"].append(
            {"id": i, "file_name": f"{i}.jpg", "width": wall.width, "height": wall.height}
        )
    (folder / "val.json").write_text(json.dumps(content))


def slicer(detector: Detector, side: int, **options: object) -> supervision.InferenceSlicer:
    def one(tile: np.ndarray) -> supervision.Detections:
        return detector(tile, **WANTED).to_supervision()

    def many(tiles: list[np.ndarray]) -> list[supervision.Detections]:
        return [each.to_supervision() for each in detector(tiles, batch_size=len(tiles), **WANTED)]

    return supervision.InferenceSlicer(
        one if options.get("batch_size", 1) == 1 else many,
        slice_wh=side,
        overlap_wh=round(side * OVERLAP),
        iou_threshold=WANTED["iou_threshold"],
        **options,
    )


def sliced(of: supervision.InferenceSlicer, data: Annotations) -> list[supervision.Detections]:
    return [of(np.asarray(load_image(data.path(i)))) for i in range(len(data))]


def as_ours(found: supervision.Detections, detector: Detector, size: tuple[int, int]) -> Detections:
    best = np.argsort(-found.confidence, kind="stable")[: WANTED["max_detections"]] if len(found) else []
    return Detections(
        boxes=found.xyxy[best].astype(np.float32),
        scores=found.confidence[best] if len(found) else np.zeros(0, np.float32),
        class_ids=found.class_id[best] if len(found) else np.zeros(0, np.int64),
        class_names=detector.class_names,
        image_size=size[::-1],
    )


def row(name: str, found: dict[int, Detections], data: Annotations) -> None:
    metrics = measure(data, found).metrics
    values = "  ".join(f"{key} {metrics[key]:.3f}" for key in ("AP", "AP50", "APs", "APm", "APl"))
    print(f"  {name:44} {values}", flush=True)


def interleaved(functions: dict[str, Callable[[], object]], rounds: int) -> tuple[dict[str, float], ...]:
    """Median seconds of each function, by the clock and of processor time, which other work slows less."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            wall, processor = time.perf_counter(), time.process_time()
            function()
            if number:
                times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    columns = (
        {name: statistics.median(each[k] for each in values) for name, values in times.items()}
        for k in (0, 1)
    )
    return tuple(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", nargs="?", help="a folder of any format that ssd evaluate takes")
    parser.add_argument("--weights", default="shapes")
    parser.add_argument("--split", default="val")
    parser.add_argument("--side", type=int, default=320, help="of a tile, in pixels")
    parser.add_argument("--images", type=int, default=50, help="to measure AP on")
    parser.add_argument("--timed", type=int, default=12, help="of these, to measure the time on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            draw_walls(Path(folder), options.images)
        compare(options, options.data or folder)


def compare(options: argparse.Namespace, folder: str) -> None:
    detector = Detector.load(options.weights)
    data = load(folder, options.split, class_names=detector.class_names)
    data = data.select(range(min(options.images, len(data))))
    side, timed = options.side, data.select(range(min(options.timed, len(data))))
    sizes = [load_image(data.path(i)).size for i in range(len(data))]
    theirs = {
        "InferenceSlicer, a tile at a time": slicer(detector, side),
        f"InferenceSlicer, thread_workers={options.threads}": slicer(
            detector, side, thread_workers=max(options.threads, 1)
        ),
        "InferenceSlicer, all tiles in one batch": slicer(detector, side, batch_size=1000),
    }
    views = np.mean([len(cut(*size, side)) for size in sizes])
    slices = np.mean(
        [
            len(slicer(detector, side)._generate_offset(size, (side, side), (round(side * OVERLAP),) * 2))
            for size in sizes
        ]
    )
    print(f"{heading()}, supervision {supervision.__version__}\n{detector!r}")
    print(
        f"{len(data)} images; views of an image: ours {views:.1f} with the whole image, theirs {slices:.1f}"
    )

    print(f"\nAccuracy, tiles of {side}")
    for name, tiles in (("ours, without tiles", None), ("ours", side)):
        row(name, detect_all(detector, data, alone(detector.device), tiles=tiles)[1], data)
    for name, chosen in FILTERS.items():
        found = sliced(slicer(detector, side, batch_size=1000, **chosen), data)
        ours = [as_ours(each, detector, size) for each, size in zip(found, sizes, strict=True)]
        row(f"InferenceSlicer, {name}", dict(enumerate(ours)), data)

    files = [timed.path(i) for i in range(len(timed))]
    functions: dict[str, Callable[[], object]] = {
        "ours": lambda: list(detector.stream(files, tiles=side, **WANTED)),
        "ours, an image at a time": lambda: [detector(file, tiles=side, **WANTED) for file in files],
        **{name: lambda of=of: sliced(of, timed) for name, of in theirs.items()},
    }
    wall, processor = interleaved(functions, options.rounds)
    print(f"\nTime, {len(files)} images, medians of {options.rounds} rounds of all functions in turn")
    for name in functions:
        print(
            f"  {name:44} {len(files) / wall[name]:7.2f} images/s ({wall['ours'] / wall[name]:.2f} of ours), "
            f"{1e3 * processor[name] / len(files):6.0f} ms of processor time an image "
            f"({processor[name] / processor['ours']:.2f} times ours)"
        )


if __name__ == "__main__":
    main()
