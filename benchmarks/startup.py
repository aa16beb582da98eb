"""The commands from their start to their end, each in a fresh process, against importing torch alone.

python benchmarks/startup.py [--rounds 7]

`ssd demo` draws a scene and detects on it; `ssd detect` reads a drawn JPEG file of 640x480. Both use the
weights that come with the package, and what torch takes to be imported is their floor. A first round brings
the files into the disk cache and does not count; in the others all commands run in turn.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from timing import heading, medians

from ssd.benchmark import draw_images

FLOOR = 'python -c "import torch"'


def commands(folder: Path) -> dict[str, Callable[[], object]]:
    """Functions that run a command to its end, by what one types."""
    (photo,) = draw_images(folder, 1)
    ssd = [sys.executable, "-m", "ssd"]
    arguments = {
        'python -c ""': [sys.executable, "-c", ""],
        FLOOR: [sys.executable, "-c", "import torch"],
        "ssd --help": [*ssd, "--help"],
        "ssd demo": [*ssd, "demo"],
        "ssd detect PHOTO --weights shapes": [*ssd, "detect", photo, "--weights", "shapes"],
    }
    run = partial(subprocess.run, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return {name: partial(run, each) for name, each in arguments.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(heading())
    with tempfile.TemporaryDirectory() as folder:
        times = medians(commands(Path(folder)), options.rounds)
    print(f"seconds, median of {options.rounds}, and how many times as long as importing torch")
    for name, seconds in times.items():
        print(f"  {name:36} {seconds:6.2f} s  {seconds / times[FLOOR]:5.2f}x")


if __name__ == "__main__":
    main()
