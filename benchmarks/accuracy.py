"""Accuracy after training from scratch: our presets, and ultralytics' models in the same processor time.

python benchmarks/accuracy.py DATASET --preset default --seeds 3 [--epochs 60 | --minutes 20] \\
    [--layout 512] [--set lr=0.04 loss=multibox] [--runs accuracy-runs]
python benchmarks/accuracy.py DATASET --preset yolov8n --seeds 3 --minutes 20 [--size 320]
python benchmarks/accuracy.py --table

DATASET is a folder that `ssd train` takes, with splits train and val. Ours is a ResNet-18 (--backbone) at
batch 8, evaluated once, after the last epoch. The published preset runs with its rate, 2.6e-3, for 8 images
instead of 32: scaled down to 6.5e-4, as published, it is cut while the loss still falls.

ultralytics (the extra `peers`) trains on the same files, with its own choices but the size of the image, and
in fp32, since it computes bf16 on CUDA only; its images are read in the same process, for the clock of the
processors to be seen whole. Its detections (score above 0.001) are measured by the code that measures ours.

Each run adds a line to docs/accuracy/NAME.csv, and --table makes the tables of docs/accuracy.md from these. A
run that is in the file is not made again (take the line out); one that was cut off goes on. --minutes are
processor minutes: a few images are trained on first, to know for how many epochs they are enough.
"""

import argparse
import contextlib
import csv
import datetime
import json
import os
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from timing import heading

from ssd.data import Annotations, DetectionDataset, load
from ssd.detections import Detections
from ssd.evaluate import measure
from ssd.train import PRESETS, TrainConfig, fit

DOCS = Path(__file__).parents[1] / "docs"
COLUMNS = (
    *("dataset", "what", "seed", "minutes_asked", "epochs", "images", "AP", "AP50"),
    *("processor_minutes", "machine", "date", "commit"),
)
PEERS = ("yolov8n", "yolo11n")
EVERY_IMAGE = 192  # most images of the training that tells how long one takes
START, END = "<!-- tables: made by benchmarks/accuracy.py --table -->\n", "<!-- end of tables -->"

Row = dict[str, str]


@dataclass(frozen=True)
class Data:
    """A dataset in memory, without its images."""

    name: str
    train: Annotations
    val: Annotations

    @classmethod
    def load(cls, path: Path) -> "Data":
        train = load(path, "train")
        return cls(path.resolve().name, train, load(path, "val", class_names=train.class_names))

    def few(self, images: int) -> "Data":
        """So many images for training, and one of val."""
        return replace(self, train=self.train.select(range(images)), val=self.val.select([0]))


Train = Callable[[Data, int, int, Path], dict[str, float]]
"""AP and AP50 after a seed's training of some epochs in a folder, where one that was cut off goes on."""


def ours(config: TrainConfig, data: Data, seed: int, epochs: int, folder: Path) -> dict[str, float]:
    config = replace(config, seed=seed, epochs=epochs, evaluate_every=min(config.evaluate_every, epochs))
    train = DetectionDataset(data.train, lenient=True, crowd=config.crowd)
    result = fit(train, data.val, config, folder, resume=(folder / "state.pt").exists())
    if not result.finished:
        raise SystemExit("cut off; the same command goes on with it")
    with (folder / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    return {key: float(last[key]) for key in ("AP", "AP50")}


def write_yolo(data: Annotations, split: str, root: Path) -> None:
    """Links to the images, and for each a text file with a line for each box."""
    for kind in ("images", "labels"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    for i in range(len(data)):
        path, of = data.path(i).resolve(), data.of_image(i)
        link = root / "images" / split / f"{i}{path.suffix}"
        link.unlink(missing_ok=True)
        link.symlink_to(path)
        sides = np.tile(data.sizes[i], 2)
        used = data.usable[of] & ~data.crowd[of]
        low, high = data.boxes[of][used, :2], data.boxes[of][used, 2:]
        values = np.concatenate([(low + high) / 2, high - low], 1) / sides
        lines = [
            f"{label - 1} {' '.join(f'{value:.6f}' for value in box)}\n"
            for label, box in zip(data.labels[of][used], values, strict=True)
        ]
        (root / "labels" / split / f"{i}.txt").write_text("".join(lines))


def peer(name: str, size: int, data: Data, seed: int, epochs: int, folder: Path) -> dict[str, float]:
    folder = folder.resolve()
    # Before ultralytics is imported: it asks for nothing in the network then, and keeps its settings here.
    os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_CONFIG_DIR": str(folder)}
    from ultralytics import YOLO, settings  # noqa: PLC0415 (an extra)
    from ultralytics.data import utils  # noqa: PLC0415

    settings.update({"sync": False})
    utils.check_font = lambda font: None  # would be downloaded, and nothing is drawn
    root, last, done = folder / "data", folder / "train" / "weights" / "last.pt", folder / "trained"
    if not done.exists():
        write_yolo(data.train, "train", root)
        write_yolo(data.val, "val", root)
        names = dict(enumerate(data.train.class_names))
        choices = {"path": str(root), "train": "images/train", "val": "images/val", "names": names}
        (root / "data.yaml").write_text(json.dumps(choices))  # which YAML is, too
        resume = last.exists()
        YOLO(last if resume else f"{name}.yaml").train(
            resume=resume,
            data=str(root / "data.yaml"),
            epochs=epochs,
            imgsz=size,
            seed=seed,
            pretrained=False,
            amp=False,
            device="cpu",
            workers=0,
            val=False,
            plots=False,
            # One epoch says how long the others take, most of which have mosaics.
            **({"close_mosaic": 0} if epochs == 1 else {}),
            project=str(folder),
            name="train",
            exist_ok=True,
        )
        done.touch()
    model, found = YOLO(last), {}
    for i in range(len(data.val)):
        image = data.val.path(i)
        (result,) = model.predict(
            str(image), imgsz=size, conf=0.001, iou=0.7, max_det=300, device="cpu", verbose=False
        )
        order = result.boxes.conf.argsort(descending=True)
        found[i] = Detections(
            boxes=result.boxes.xyxy[order].numpy(),
            scores=result.boxes.conf[order].numpy(),
            class_ids=result.boxes.cls[order].long().numpy(),
            class_names=data.val.class_names,
            image_size=result.orig_shape,
        )
    return measure(data.val, found).metrics


def processor_seconds() -> float:
    """Of this process and of those that it waited for; a shared machine's clock says less."""
    return sum(os.times()[:4])


@contextlib.contextmanager
def counted(file: Path) -> Iterator[None]:
    """Add the processor seconds of the block to those in a file, also when the block is cut off."""
    start = processor_seconds()
    try:
        yield
    finally:
        before = float(file.read_text()) if file.exists() else 0.0
        file.write_text(str(before + processor_seconds() - start))


def epochs_in(minutes: float, train: Train, data: Data) -> int:
    """How many epochs there are in so many processor minutes."""
    most = min(EVERY_IMAGE, len(data.train))
    counts, seconds = (most // 3, most // 3, most), []
    for count in counts:  # of the first, nothing is known but what it alone takes
        with tempfile.TemporaryDirectory() as folder:
            start = processor_seconds()
            train(data.few(count), 0, 1, Path(folder))
            seconds.append(processor_seconds() - start)
    an_image = (seconds[2] - seconds[1]) / (counts[2] - counts[1])
    if an_image <= 0:
        raise SystemExit("too few images to know how long one takes; give --epochs")
    once = max(0.0, seconds[2] - counts[2] * an_image)
    print(f"{1e3 * an_image:.0f} ms of processor time an image, {once:.0f} s once", flush=True)
    return max(1, round((60 * minutes - once) / (an_image * len(data.train))))


def commit() -> str:
    """Of the working tree; with a plus if that has changes of its own."""
    git = ["git", "-C", str(DOCS.parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "ssd"], check=False).returncode
    return head.stdout.strip() + ("+" if dirty else "")


def read_rows(file: Path) -> list[Row]:
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def add_row(file: Path, row: Row) -> None:
    new = not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def spread(values: list[float], digits: int = 3) -> str:
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(rows: list[Row]) -> list[str]:
    """A line for each thing that was trained, with the mean of its seeds, the least and the most."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["what"], row["epochs"], row["images"], row["machine"]), []).append(row)
    lines = [
        "| what | seeds | epochs | images seen | AP | AP50 | processor minutes | processor | date, commit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (what, epochs, images, machine), each in groups.items():
        numbers = {key: [float(row[key]) for row in each] for key in ("AP", "AP50", "processor_minutes")}
        last = max(each, key=lambda row: row["date"])
        lines.append(
            f"| {what} | {len(each)} | {epochs} | {int(images):,} | {spread(numbers['AP'])} | "
            f"{spread(numbers['AP50'])} | {spread(numbers['processor_minutes'], 1)} | "
            f"{machine.partition(',')[0]} | {last['date']}, {last['commit']} |"
        )
    return lines


def tables() -> str:
    """All that was measured, a table for each dataset."""
    parts = []
    for file in sorted((DOCS / "accuracy").glob("*.csv")):
        parts += [f"### {file.stem}", "", *table(read_rows(file)), ""]
    return "\n".join(parts)


def write_tables() -> None:
    file = DOCS / "accuracy.md"
    before, _, rest = file.read_text().partition(START)
    _, _, after = rest.partition(END)
    file.write_text(f"{before}{START}\n{tables()}\n{END}{after}")


def assignment(text: str) -> tuple[str, object]:
    """A field of `TrainConfig` and its value: JSON, or else the text itself."""
    name, _, value = text.partition("=")
    if name not in TrainConfig.__dataclass_fields__:
        raise argparse.ArgumentTypeError(f"TrainConfig has no {name!r}")
    with contextlib.suppress(ValueError):
        return name, json.loads(value)
    return name, value


def chosen(options: argparse.Namespace) -> tuple[str, Train]:
    """What is trained, in words, and by what."""
    if options.preset in PEERS:
        return f"{options.preset}, {options.size} pixels", partial(peer, options.preset, options.size)
    changes = dict(options.set)
    if options.layout:
        changes["layout"] = options.layout
    what = ", ".join([options.preset, *(f"{name} {value}" for name, value in changes.items())])
    if options.backbone != "resnet18":
        what += f", {options.backbone}"
    preset = PRESETS[options.preset]
    rate = 1.04e-2 if options.preset == "published" else preset.lr  # for 32 images
    # By itself, the evaluation of the last epoch is the only one.
    config = replace(preset, backbone=options.backbone, lr=rate, batch_size=8, evaluate_every=10**6)
    return what, partial(ours, replace(config, **changes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--preset", choices=[*PRESETS, *PEERS], default="default")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, default=60)
    length.add_argument("--minutes", type=float, help="of processor time, instead of epochs")
    parser.add_argument("--layout")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--set", type=assignment, nargs="*", default=[], help="fields of TrainConfig")
    parser.add_argument("--size", type=int, default=320, help="of ultralytics' images")
    parser.add_argument("--runs", type=Path, default=Path("accuracy-runs"))
    parser.add_argument("--table", action="store_true", help="make the tables anew from what is there")
    options = parser.parse_args()
    if options.table:
        write_tables()
        return
    if options.data is None:
        parser.error("DATASET or --table")

    print(heading(), flush=True)
    data = Data.load(options.data)
    file = DOCS / "accuracy" / f"{data.name}.csv"
    what, train = chosen(options)
    asked = f"{options.minutes:g}" if options.minutes else ""

    def measured() -> list[Row]:
        rows = [row for row in read_rows(file) if (row["what"], row["minutes_asked"]) == (what, asked)]
        return [row for row in rows if asked or row["epochs"] == str(options.epochs)]

    folder = options.runs / "-".join([data.name, re.sub(r"[^\w.]+", "-", what), asked or str(options.epochs)])
    folder.mkdir(parents=True, exist_ok=True)
    epochs = int(measured()[0]["epochs"]) if measured() else options.epochs
    if asked and not measured():
        known = folder / "epochs"
        if not known.exists():
            known.write_text(str(epochs_in(options.minutes, train, data)))
        epochs = int(known.read_text())
    for seed in range(options.seeds):
        if str(seed) in {row["seed"] for row in measured()}:
            continue
        print(f"\n{data.name}, {what}, seed {seed}, {epochs} epochs", flush=True)
        clock = folder / f"{seed}.seconds"
        with counted(clock):
            metrics = train(data, seed, epochs, folder / str(seed))
        values = (
            *(data.name, what, seed, asked, epochs, epochs * len(data.train)),
            *(f"{metrics['AP']:.4f}", f"{metrics['AP50']:.4f}", f"{float(clock.read_text()) / 60:.1f}"),
            # Without the threads, which change processor minutes little, and the date.
            *(re.sub(r", \d+ threads|, [^,]+$", "", heading()), datetime.date.today().isoformat(), commit()),
        )
        add_row(file, dict(zip(COLUMNS, map(str, values), strict=True)))
    write_tables()
    print("\n".join(table(measured())))


if __name__ == "__main__":
    main()
