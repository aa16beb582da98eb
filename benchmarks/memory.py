"""How much memory each step takes: each figure is the largest resident size of a process of its own.

python benchmarks/memory.py [--photos 12] [--weights shapes]

Made-up photos of 50 and of 12 megapixels, upright and lying on their side as phones write them. Each row is a
new process that does only what the row says; its figure counts all that it needs: Python, torch, the network,
the pictures. GB are 10^9 bytes. Reads the kernel's count of its children, so not for Windows.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from timing import heading

from ssd.shapes import draw_scene

IMPORTS = "import ssd.cli.detect"
NETWORK = """
from ssd import SSD, Detector
import numpy as np
detector = Detector(SSD(backbone={backbone!r}).to(dtype=getattr(__import__("torch"), {dtype!r})), ["x"] * 80)
for _ in range(3):
    detector([np.zeros((300, 300, 3), np.uint8)] * 8)
"""
LIST = """
from ssd import Detector
from pathlib import Path
found = Detector.load({weights!r})(sorted(Path({folder!r}).iterdir()))
"""
STREAM = """
from ssd import Detector
print(sum(len(found) for found in Detector.load({weights!r}).stream({folder!r})))
"""


def make_photos(folder: Path, size: tuple[int, int], count: int, orientation: int = 1) -> str:
    """A folder with links to one JPEG file."""
    folder.mkdir()
    exif = Image.Exif()
    exif[274] = orientation
    first = folder / "000.jpg"
    draw_scene(np.random.default_rng(45))[0].resize(size).save(first, quality=60, exif=exif)
    for number in range(1, count):
        os.link(first, folder / f"{number:03}.jpg")
    return str(folder)


def peak(*arguments: str) -> float:
    """Gigabytes of a process at its largest; Python with these arguments."""
    measured = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    run = subprocess.run(
        [sys.executable, "-c", measured, *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    return int(run.stdout) * (1 if sys.platform == "darwin" else 1024) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--photos", type=int, default=12)
    parser.add_argument("--weights", default="shapes")
    options = parser.parse_args()
    print(heading())
    print(f"weights {options.weights}, batches of 8; the largest resident size of a process that does this:")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        upright = make_photos(folder / "upright", (8160, 6120), options.photos)
        lying = make_photos(folder / "lying", (8160, 6120), options.photos, orientation=6)
        some = make_photos(folder / "some", (4000, 3000), 8)
        many = make_photos(folder / "many", (4000, 3000), 48)

        def show(title: str, *arguments: str) -> None:
            print(f"  {title:64} {peak(*arguments):5.2f} GB", flush=True)

        show("imports of ssd detect", "-c", IMPORTS)
        for backbone in ("resnet18", "resnet50"):
            for dtype in ("float32", "bfloat16"):
                title = f"imports and a {backbone} of 81 classes, {dtype}, 3 batches of 8"
                show(title, "-c", NETWORK.format(backbone=backbone, dtype=dtype))
        for title, photos in (("8", some), ("48", many)):
            code = LIST.format(weights=options.weights, folder=photos)
            show(f"detector([{title} photos of 12 megapixels])", "-c", code)
        code = STREAM.format(weights=options.weights, folder=upright)
        show(f"detector.stream({options.photos} photos of 50 megapixels)", "-c", code)
        for title, photos in (("", upright), (", lying", lying)):
            for extra in ((), ("--no-images",)):
                detect = ("-m", "ssd", "detect", photos, "--weights", options.weights)
                output = ("--output", str(folder / f"out {len(title)} {len(extra)}"))
                show(
                    f"ssd detect, photos of 50 megapixels{title} {' '.join(extra)}", *detect, *output, *extra
                )


if __name__ == "__main__":
    main()
