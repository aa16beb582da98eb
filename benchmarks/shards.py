"""What it costs to keep the results of ``ssd detect`` under torchrun as they come, and to merge them.

python benchmarks/shards.py --images 100000
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from ssd.cli.shards import Shards
from ssd.detections import Detections

OBJECTS = 5  # of an image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=100_000)
    count = parser.parse_args().images
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((OBJECTS, 2, 2)).astype(np.float32) * 400, axis=1).reshape(-1, 4)
    names = tuple(f"class {i}" for i in range(80))
    found = [
        Detections(corners, rng.random(OBJECTS), rng.integers(0, 80, OBJECTS), names, (480, 640))
        for i in range(1000)
    ]
    listed = [f"/data/{i:09}.jpg" for i in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        shards = Shards(Path(folder))
        shards.begin({}, {})
        start = time.perf_counter()
        for i, name in enumerate(listed):
            each = found[i % len(found)]
            object.__setattr__(each, "source", name)
            shards.add(each)
        written = time.perf_counter()
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.jsonl"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        merged = sum(len(each) for each in shards.merge(listed, names, ()))
        end = time.perf_counter()
        assert merged == OBJECTS * count
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{count:,} images of {OBJECTS} objects: {size / count:.0f} bytes an image")
    each = [f"{seconds / count * 1e6:.0f} us" for seconds in (written - start, end - written)]
    print(f"an image takes {each[0]} to write and {each[1]} to merge")
    print(f"merging takes {grown * 1024 / count:.0f} bytes of memory an image")


if __name__ == "__main__":
    main()
