"""What the tests of training share: a quick config, small datasets, and looks into a run folder."""

import csv
import os
import signal
from dataclasses import asdict, replace

import numpy as np
import torch
from torch.utils.data import Subset

from ssd import checkpoint
from ssd.distributed import World
from ssd.evaluate import Evaluation
from ssd.model import SSD
from ssd.train import TrainConfig, fit
from ssd.train.optim import make_optimizer
from ssd.train.state import Progress, Run

SGD = {"lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4}


CPU = torch.device("cpu")


ALONE = World(0, 1, CPU)


QUICK = TrainConfig(
    epochs=2,
    batch_size=2,
    backbone="resnet18",
    precision="fp32",
    workers=0,
    evaluate_every=100,
    lr=0.02,
    half_size=0.0,
)
SMALL = replace(QUICK, layout="small")
"""The same with smaller images, for what does not depend on their size; see `tests/train/conftest.py`."""


def weights(folder, name="last"):
    return checkpoint.read(folder / f"{name}.safetensors").state_dict


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


class Background(torch.utils.data.Dataset):
    """Four images without any box; any torch Dataset will do."""

    class_names = ("cat", "dog")

    def __len__(self):
        return 4

    def __getitem__(self, index):
        image = np.random.RandomState(index).randint(0, 256, (40, 60, 3), np.uint8)
        return image, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


class Broken(Background):
    def name(self, index):
        return f"photo-{index}.jpg"

    def __getitem__(self, index):
        return super().__getitem__(index)[0], {"boxes": [[5, 5, 5, 9]], "labels": [1]}


class Interrupting(torch.utils.data.Dataset):
    """Sends this process a signal when a certain number of items has been read."""

    def __init__(self, dataset, after, number=signal.SIGTERM):
        self._dataset, self._left, self._number = dataset, after, number
        self.class_names = dataset.class_names

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, index):
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), self._number)
        return self._dataset[index]


def fit_cut_short(images, after, val, config, folder):
    """The run of a dataset's first two images that is asked to stop when `after` of them have been read."""
    two = Subset(Interrupting(images, after), [0, 1])
    return fit(two, val, config, folder, class_names=images.class_names, say=None)


def fake_evaluations(patch, aps):
    """Evaluations are not what is tried: each takes the next AP, of no detections, and draws nothing."""
    rest = iter(aps)

    def evaluate(*_):
        ap = next(rest)
        return Evaluation({"AP": ap, "AP50": ap}, {}, 1, 1, 1), (0.3,) * 6

    patch.setattr("ssd.train.loop._evaluate", evaluate)


def make_run(config=QUICK):
    model = SSD(3, "resnet18")
    optimizer = make_optimizer(model, CPU, **SGD)
    data = {"class_names": ["a", "b"]}
    return Run(model, None, optimizer, torch.amp.GradScaler("cpu"), Progress(), data, asdict(config))
