"""Trains ResNet-18 from scratch on BCCD, 205 photographs of blood cells, and evaluates on its 87 others.

python benchmarks/bccd.py BCCD --preset default --seed 0 --output bccd-default-0

BCCD is a folder with train.json, train/, val.json and val/ (the data of
github.com/Shenggan/BCCD_Dataset in COCO format).
60 epochs at batch 8, in bf16 where the processor computes it. One box of each split has no area: it
cannot be trained on, and stays in the evaluation.

The published preset runs with its rate, 2.6e-3, for 8 images instead of 32 (--lr 1.04e-2): scaled down to
6.5e-4, as the published code does it, the rate is cut while the loss still falls (docs/training.md).
"""

import argparse
import os
import time
from dataclasses import replace

from timing import heading

from ssd.data import DetectionDataset, load
from ssd.train import PRESETS, fit

LR = {"default": None, "published": 1.04e-2}  # for 32 images; None is the preset's own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--preset", choices=list(PRESETS), default="default")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, help="for 32 images, as in TrainConfig")
    parser.add_argument("--output", required=True)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    print(heading(), flush=True)
    config = replace(
        PRESETS[options.preset],
        backbone="resnet18",
        epochs=options.epochs,
        seed=options.seed,
        lr=options.lr or LR[options.preset] or PRESETS[options.preset].lr,
        batch_size=8,
        evaluate_every=10,
    )
    train = DetectionDataset(load(options.data, "train"), lenient=True, crowd=config.crowd)
    val = load(options.data, "val", class_names=train.class_names)
    start, used = time.perf_counter(), os.times()
    result = fit(train, val, config, options.output, resume=options.resume)
    minutes = (time.perf_counter() - start) / 60
    now = os.times()
    cpu = sum(now[:4]) - sum(used[:4])  # a shared machine's clock says less than the time of its processors
    print(result.evaluation)
    print(f"\n{options.preset}, seed {options.seed}: {minutes:.1f} min, {cpu / 60:.1f} min of processor time")


if __name__ == "__main__":
    main()
