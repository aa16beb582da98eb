"""2,000 images of mixed sizes through `Detector.stream`: memory, open files and threads must stay flat.

python benchmarks/soak.py [--images 2000] [--weights shapes] [--precision auto]

Reads /proc, so Linux only. Ends with an error if memory grows by more than 30 MB over the second half.
"""

import argparse
import os
import tempfile
import threading
from pathlib import Path

import numpy as np
from timing import heading

from ssd.detector import Detector
from ssd.shapes import draw_scene


def draw(folder: Path, count: int = 60) -> list[str]:
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        image = draw_scene(rng)[0].resize(tuple(rng.integers(100, 2000, 2).tolist()))
        path = folder / f"{number:02}.{('jpg', 'png', 'webp')[number % 3]}"
        image.convert("L" if number % 7 == 0 else "RGB").save(path)
        paths.append(str(path))
    return paths


def resident() -> float:
    """Megabytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--weights", default="shapes")
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    print(heading())
    detector = Detector.load(options.weights, precision=options.precision)
    print(detector)
    with tempfile.TemporaryDirectory() as folder:
        paths = draw(Path(folder))
        rows = []
        print("images  objects  memory, MB  files  threads")
        objects = 0
        sources = (paths[i % len(paths)] for i in range(options.images))
        for number, found in enumerate(detector.stream(sources), start=1):
            objects += len(found)
            if number % max(options.images // 10, 1) == 0:
                row = number, resident(), len(os.listdir("/proc/self/fd")), threading.active_count()
                rows.append(row)
                print(f"{number:6} {objects:8} {row[1]:11.0f} {row[2]:6} {row[3]:8}")
    half = np.array(rows[len(rows) // 2 :], float)
    slope = np.polyfit(half[:, 0], half[:, 1], 1)[0] * 1000
    print(f"memory in the second half: {slope:+.1f} MB for 1,000 images")
    assert slope * options.images / 2000 < 30, "memory grows"


if __name__ == "__main__":
    main()
