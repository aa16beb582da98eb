"""Time and memory of ``ssd check`` on a large dataset of tiny images, which is made up.

python benchmarks/check.py --images 100000 --format coco
python benchmarks/check.py --images 100000 --format yolo --package /tmp/other-checkout
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
SIDE = 64
BOXES = 5  # of an image
CLASSES = ("cat", "dog", "bird")


def picture() -> bytes:
    """A JPEG file; what follows its end is read over, so that each copy can be another file."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def write_pictures(folder: Path, count: int) -> Iterator[int]:
    """Write the images, of which none equals another; give their numbers."""
    content = picture()
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:07}.jpg").write_bytes(content + number.to_bytes(4, "big"))
        yield number


def boxes(number: int) -> Iterator[tuple[int, int, int, int, int]]:
    """The boxes of an image: class, left, top, width, height."""
    for k in range(BOXES):
        left, top = (7 * number + 11 * k) % 40, (5 * number + 13 * k) % 40
        yield (number + k) % len(CLASSES), left, top, 10 + k, 12 + number % 8


def write_coco(folder: Path, count: int) -> None:
    """``train.json`` and ``train/``."""
    images = [
        {"id": number, "file_name": f"{number:07}.jpg", "width": SIDE, "height": SIDE}
        for number in write_pictures(folder / "train", count)
    ]
    annotations = [
        {
            "id": number * BOXES + k,
            "image_id": number,
            "category_id": label + 1,
            "bbox": [left, top, width, height],
            "area": width * height,
            "iscrowd": 0,
        }
        for number in range(count)
        for k, (label, left, top, width, height) in enumerate(boxes(number))
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "train.json").write_text(json.dumps(content))


def write_yolo(folder: Path, count: int) -> None:
    """``data.yaml``, ``images/train/`` and ``labels/train/``."""
    labels = folder / "labels" / "train"
    labels.mkdir(parents=True)
    for number in write_pictures(folder / "images" / "train", count):
        lines = [
            f"{label} {(left + width / 2) / SIDE:.6f} {(top + height / 2) / SIDE:.6f} "
            f"{width / SIDE:.6f} {height / SIDE:.6f}\n"
            for label, left, top, width, height in boxes(number)
        ]
        (labels / f"{number:07}.txt").write_text("".join(lines))
    (folder / "data.yaml").write_text(f"train: images/train\nnames: [{', '.join(CLASSES)}]\n")


FORMATS: dict[str, Callable[[Path, int], None]] = {"coco": write_coco, "yolo": write_yolo}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--format", choices=FORMATS, default="coco")
    parser.add_argument("--package", type=Path, default=ROOT, help="the folder that holds the package")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        FORMATS[arguments.format](data, arguments.images)
        command = [sys.executable, "-c", "from ssd.cli import main; main()", "check", str(data)]
        start = time.perf_counter()
        result = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(arguments.package.resolve())},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # KiB on Linux
    print(result.stdout.splitlines()[-1] if result.stdout else "", f"[exit {result.returncode}]")
    print(
        f"ssd check of {arguments.images:,} images in {arguments.format} format, {BOXES} boxes each: "
        f"{seconds:.0f} s, at most {peak:.2f} GiB in that process"
    )


if __name__ == "__main__":
    main()
