"""Detection in networks of every layout, from files to detections, in one run.

python benchmarks/layouts.py [--backbones resnet18 resnet50] [--precision auto] [--rounds 20] [--batch 1]

Random weights, 81 classes; JPEG files of 640x480; the detector's default options.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from inference import NAMES, random_model
from timing import heading, medians, show

from ssd import backends
from ssd.benchmark import draw_images, flops
from ssd.boxes import LAYOUTS
from ssd.detector import Detector


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    print(heading())
    with tempfile.TemporaryDirectory() as folder:
        files = draw_images(Path(folder), options.batch)
        for backbone in options.backbones:
            detectors = {
                name: Detector(backends.of_model(random_model(backbone, layout), options.precision), NAMES)
                for name, layout in LAYOUTS.items()
            }
            runs = {
                name: partial(detector, files, batch_size=options.batch)
                for name, detector in detectors.items()
            }
            precision = detectors["300"].precision
            work = ", ".join(
                f"{name} {flops(81, backbone, layout) / 1e9:.1f}" for name, layout in LAYOUTS.items()
            )
            title = f"{backbone}, {precision}, batch {options.batch}, ms an image (GFLOP: {work})"
            show(title, medians(runs, options.rounds), "300", options.batch)


if __name__ == "__main__":
    main()
