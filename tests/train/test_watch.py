import re
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from conftest import waiting_for_cuda_fails
from torch import nn
from training import QUICK, SMALL, rows, weights

from ssd.distributed import World
from ssd.errors import NonFiniteError
from ssd.loss import MultiBoxLoss
from ssd.train import fit, loop, watch


def test_lines_of_progress_where_there_is_no_bar(images, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "_LINE_SECONDS", 0)
    monkeypatch.setattr(watch, "is_watched", lambda: False)
    lines = []
    fit(images, None, SMALL, tmp_path, say=lines.append)
    within = [line for line in lines if "batch" in line and "all done in" in line]
    assert len(within) == 4  # not after the last of three batches: the epoch's own line comes then
    assert " to " not in "".join(within)
    assert re.fullmatch(r"epoch 1/2  batch 1/3  loss .* lr \S+  \d+\.\d images/s  all done in .*", within[0])


def test_what_whole_images_will_take_is_told_as_a_range(images, tmp_path, monkeypatch):
    """Until some have been seen; a whole epoch takes as long as one at half the size, or up to four times."""
    monkeypatch.setattr(watch, "_LINE_SECONDS", 0)
    monkeypatch.setattr(watch, "is_watched", lambda: False)
    moments = iter(range(0, 10**6, 100))
    monkeypatch.setattr(watch, "time", SimpleNamespace(perf_counter=lambda: next(moments)))
    lines = []
    fit(images, None, replace(SMALL, epochs=4, half_size=0.5), tmp_path, say=lines.append)
    times = [line.split("all done in ")[1] for line in lines if "all done in" in line]
    # At 100 seconds a batch, of 2 x 3 and 2 x 3; then 2 x 3, of which one and then two are done.
    assert times[0] == f"{timedelta(seconds=1100)} to {timedelta(seconds=2900)}"
    assert times[4] == str(timedelta(seconds=500))
    assert [" to " in each for each in times] == [True] * 4 + [False] * 4


@pytest.mark.parametrize("lr", [1e12, 1e25], ids=["loss", "weights and statistics"])
def test_a_loss_that_stays_nan_stops_and_names_images(images, tmp_path, lr):
    fit(images, None, SMALL, tmp_path, say=None)
    good = weights(tmp_path)
    config = replace(SMALL, epochs=30, lr=lr)
    with pytest.raises(NonFiniteError, match=r"in \d+ steps in a row, epoch \d+(.|\n)*train/\d+\.jpg"):
        fit(images, None, config, tmp_path, resume=True, say=None)
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
    assert weights(tmp_path).keys() == good.keys()
    assert len(rows(tmp_path)) < 30


def test_a_gradient_that_is_always_infinite_stops(images, tmp_path, monkeypatch):
    """Also with accumulation, where most batches make no step."""
    monkeypatch.setattr(nn.utils, "get_total_norm", lambda gradients: torch.tensor(torch.inf))
    monkeypatch.setattr(watch, "MAX_SKIPPED", 3)
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        fit(images, None, replace(SMALL, epochs=20, accumulate=3), tmp_path, say=None)


def test_statistics_that_hold_nan_are_never_saved(images, tmp_path, monkeypatch):
    """One forward pass overflows; the steps after it are fine, but BatchNorm remembers."""
    real, calls = loop.normalize, []

    def normalize(pixels, *args):
        calls.append(1)
        return real(pixels, *args) * (torch.inf if len(calls) == 1 else 1)

    fit(images, None, replace(SMALL, epochs=1), tmp_path, say=None)
    good = weights(tmp_path)
    monkeypatch.setattr(loop, "normalize", normalize)
    with pytest.raises(NonFiniteError, match="What was saved before is as it was"):
        fit(images, None, SMALL, tmp_path, resume=True, say=None)
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
    assert good.keys() == weights(tmp_path).keys()


def test_a_single_bad_step_is_left_out(images, tmp_path, monkeypatch):
    """One NaN among the losses: weights stay finite, and training goes on."""
    real, calls = MultiBoxLoss.forward, []

    def forward(self, *args):
        losses = real(self, *args)
        calls.append(1)
        return losses._replace(loc=losses.loc * torch.nan) if len(calls) == 2 else losses

    monkeypatch.setattr(MultiBoxLoss, "forward", forward)
    result = fit(images, None, SMALL, tmp_path, say=None)
    assert result.finished
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


@pytest.mark.cuda
def test_a_step_does_not_wait_for_the_gpu(images, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "_LOOK_EVERY", 1000)
    real = watch.Watch.batches

    def checked(self):
        with waiting_for_cuda_fails():  # until the last batch is done
            yield from real(self)

    world = World(0, 1, torch.device("cuda", 0))
    fit(images, None, replace(QUICK, precision="fp16"), tmp_path / "warm", world=world, say=None)
    monkeypatch.setattr(watch.Watch, "batches", checked)
    fit(images, None, replace(QUICK, precision="fp16"), tmp_path / "run", world=world, say=None)
