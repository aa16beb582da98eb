"""Makes the weights that come with the package, and measures them.

python docs/shapes_weights.py WORK_FOLDER

Draws the data, trains with the project's own command (about an hour on 2 cores; interrupt and start
again as you like), stores the best weights in half precision, and evaluates the stored file on the
held-out scenes.
"""

import subprocess
import sys
from pathlib import Path

from ssd import checkpoint

TARGET = Path(checkpoint.__file__).parent / "weights" / "shapes.safetensors"
DATA = ("--images", "4000", "--val", "500", "--seed", "1")
FIRST = ("--backbone", "resnet18", "--epochs", "16", "--evaluate-every", "4")
# Then without zoom-out, and with crops that are mostly the whole: scenes as they are.
SECOND = ("--augmentation", "published", "--lr", "0.02", "--epochs", "3", "--evaluate-every", "1")


def ssd(*arguments: object) -> None:
    command = [sys.executable, "-m", "ssd", *map(str, arguments)]
    print("$", *command[1:], flush=True)
    subprocess.run(command, check=True)


def train(run: Path, *arguments: object) -> None:
    if (run / "state.pt").exists():
        ssd("train", "--resume", run)
    else:
        ssd("train", *arguments, "--output", run)


def main() -> None:
    work = Path(sys.argv[1])
    if not (work / "data" / "val.json").exists():
        ssd("shapes", work / "data", *DATA)
    train(work / "first", work / "data", *FIRST)
    best = work / "first" / "best.safetensors"
    train(work / "second", work / "data", "--weights", best, *SECOND)
    found = checkpoint.read(work / "second" / "best.safetensors")
    halves = {
        key: value.half() if value.is_floating_point() else value for key, value in found.state_dict.items()
    }
    TARGET.parent.mkdir(exist_ok=True)
    checkpoint.save(
        TARGET,
        halves,
        found.class_names,
        category_ids=found.category_ids,
        config=found.config,
        layout=found.layout,
    )
    print(f"{TARGET}: {TARGET.stat().st_size / 1e6:.1f} MB")
    ssd("evaluate", work / "data", "--weights", TARGET, "--output", work / "evaluation")


if __name__ == "__main__":
    main()
