"""What scenes without objects teach: false detections on such scenes, with each loss, with and without them.

python benchmarks/backgrounds.py FOLDER

Draws scenes of shapes, and scenes that hold only distractors (shapes of no class, without labels), some of
both held out. ResNet-18 is trained from scratch on the first alone and on both, with the losses "batch" (the
default) and "multibox" (as published). For each run: AP on the held-out scenes of shapes, and how many
objects are found, falsely, in a held-out scene of distractors at the default threshold of scores.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from timing import heading

from ssd import Detector
from ssd.data import DetectionDataset, load
from ssd.shapes import CLASSES, DISTRACTORS, draw_scene
from ssd.train import PRESETS, fit

SCENES = {"train": 2000, "val": 500}
DISTRACTING = {"train": 500, "val": 500}


def draw(folder: Path, seed: int, kinds: tuple[str, ...], i: int) -> tuple[str, int, int, list, list]:
    image, boxes, labels = draw_scene(np.random.default_rng((seed, i)), kinds)
    name = f"{seed}-{i:05}.jpg"
    image.save(folder / name, quality=90)
    return name, image.width, image.height, boxes.tolist(), labels.tolist()


def write(file: Path, scenes: list, empty: list) -> None:
    """A COCO file of scenes with labels, and of others without."""
    images = [
        {"id": i, "file_name": name, "width": width, "height": height}
        for i, (name, width, height, _, _) in enumerate((*scenes, *empty))
    ]
    boxes = [
        {"image_id": i, "category_id": label, "bbox": [x, y, right - x, bottom - y], "iscrowd": 0}
        for i, (_, _, _, boxes, labels) in enumerate(scenes)
        for (x, y, right, bottom), label in zip(boxes, labels, strict=True)
    ]
    annotations = [{"id": i, "area": box["bbox"][2] * box["bbox"][3]} | box for i, box in enumerate(boxes, 1)]
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def draw_all(folder: Path) -> None:
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        for seed, split in enumerate(SCENES):
            make = partial(draw, images, seed, CLASSES)
            scenes = list(pool.map(make, range(SCENES[split]), chunksize=20))
            make = partial(draw, images, 10 + seed, DISTRACTORS)
            empty = list(pool.map(make, range(DISTRACTING[split]), chunksize=20))
            write(folder / f"{split}.json", scenes, [])
            write(folder / f"{split}-both.json", scenes, empty)
            write(folder / f"{split}-distractors.json", [], empty)


def measure(folder: Path, loss: str, data: str, options: argparse.Namespace) -> tuple[float, float]:
    """AP on scenes of shapes, and false detections in a scene of distractors."""
    run = folder / f"{loss}-{data}-{options.seed}"
    images = folder / "images"
    name = {"shapes": "train.json", "both": "train-both.json"}[data]
    train = DetectionDataset(load(folder / name, images=images))
    val = load(folder / "val.json", images=images, class_names=train.class_names)
    config = replace(
        PRESETS["default"],
        backbone="resnet18",
        epochs=options.epochs,
        batch_size=options.batch_size,
        seed=options.seed,
        evaluate_every=options.epochs,
        loss=loss,
    )
    result = fit(train, val, config, run, resume=(run / "state.pt").exists(), say=lambda text: None)
    distractors = load(folder / "val-distractors.json", images=images, class_names=train.class_names)
    detector = Detector.load(run / "last.safetensors", precision="fp32")
    sources = [distractors.path(i) for i in range(len(distractors))]
    false = sum(len(found) for found in detector.stream(sources))
    return result.evaluation.metrics["AP"], false / len(sources)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loss", nargs="*", default=["batch", "multibox"])
    parser.add_argument("--data", nargs="*", default=["shapes", "both"])
    options = parser.parse_args()
    if not (options.folder / "val-distractors.json").exists():
        draw_all(options.folder)
    print(heading(), flush=True)
    print(f"{'loss':10} {'trained on':12} {'AP':>6} {'false detections a scene':>26}", flush=True)
    for loss in options.loss:
        for data in options.data:
            ap, false = measure(options.folder, loss, data, options)
            print(f"{loss:10} {data:12} {ap:6.3f} {false:26.2f}", flush=True)


if __name__ == "__main__":
    main()
