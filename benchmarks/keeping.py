"""What it is worth that the commands that detect keep what memory batches free: `ssd.memory.keep_memory`.

python benchmarks/keeping.py [--weights shapes] [--images 160] [--size 640x480] [--rounds 5]

Made-up scenes as JPEG files go through `Detector.stream`, in new processes that keep memory or leave it to
the C library, in turn. Faults are pages of 4 KB that the system had to clear. Not for Windows.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from timing import heading

from ssd.shapes import draw_scene

STREAM = """
import json, resource, sys, time
from ssd.cli.common import BATCH_MEMORY
from ssd.detector import Detector
from ssd.memory import keep_memory
weights, folder, keeps = sys.argv[1:]
if int(keeps):
    assert keep_memory(BATCH_MEMORY)
detector = Detector.load(weights)
def used():
    own = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), own.ru_utime + own.ru_stime, own.ru_minflt, own.ru_maxrss
count = sum(1 for _ in detector.stream(folder))
before = used()
for _ in range(2):
    for _ in detector.stream(folder):
        pass
after = used()
clock, processor, faults = ((b - a) / (2 * count) for a, b in zip(before[:3], after[:3]))
peak = after[3] * (1 if sys.platform == "darwin" else 1024) / 1e9
print(json.dumps([1 / clock, 1e3 * processor, faults, peak]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--weights", default="shapes")
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--size", default="640x480")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(heading())
    rows: dict[str, list[list[float]]] = {"0": [], "1": []}
    with tempfile.TemporaryDirectory() as folder:
        size = tuple(map(int, options.size.split("x")))
        for number in range(options.images):
            scene = draw_scene(np.random.default_rng(number % 32))[0]
            scene.resize(size).save(Path(folder) / f"{number:04}.jpg", quality=90)
        for _ in range(options.rounds):
            for keeps, found in rows.items():
                command = [sys.executable, "-c", STREAM, options.weights, folder, keeps]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found.append(json.loads(done.stdout))
    medians = {
        keeps: [statistics.median(values) for values in zip(*found, strict=True)]
        for keeps, found in rows.items()
    }
    print(f"Detector.stream, {options.weights}, {options.images} images of {options.size}, batches of 8")
    for keeps, title in (("0", "as the C library does it"), ("1", "memory kept")):
        rate, processor, faults, peak = medians[keeps]
        times = f"{rate:6.1f} images/s  {processor:6.1f} ms of the processor"
        print(f"  {title:26} {times}  {faults:6.0f} faults an image  {peak:5.2f} GB at most")
    ratios = [kept[0] / usual[0] for usual, kept in zip(rows["0"], rows["1"], strict=True)]
    print(
        f"  kept / usual, images a second: {statistics.median(ratios):.2f} ({sorted(ratios)[0]:.2f} to "
        f"{sorted(ratios)[-1]:.2f})"
    )


if __name__ == "__main__":
    main()
