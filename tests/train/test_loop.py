import contextlib
import copy
import itertools
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import SMALL_LAYOUT
from torch.utils.data import Subset
from training import (
    ALONE,
    CPU,
    QUICK,
    SMALL,
    Background,
    Broken,
    Interrupting,
    assert_equal,
    fake_evaluations,
    fit_cut_short,
    rows,
    weights,
)

from ssd.data import AnnotationError, DetectionDataset, load
from ssd.devices import native_precisions
from ssd.distributed import World
from ssd.errors import ImageError, LostContactError
from ssd.model import SSD
from ssd.shapes import CLASSES
from ssd.train import TrainConfig, fit, loop, setup
from ssd.train.examples import EpochBatches
from ssd.train.loop import Stop
from ssd.train.setup import rate_of
from ssd.train.state import Progress, read_state


def test_the_loss_falls(images, tmp_path):
    config = replace(QUICK, epochs=6, precision="auto", augmentation="none", ema=0.0, lr=0.05)
    fit(images, None, config, tmp_path, say=None)
    losses = [float(row["loss"]) for row in rows(tmp_path)]
    assert losses[-1] < 0.7 * losses[0]


def test_ctrl_c_in_the_last_evaluation_stops_nothing(scenes, images, tmp_path, monkeypatch):
    fake_evaluations(monkeypatch, [0.1])
    measure, lines = loop._evaluate, []

    def evaluate(*arguments):
        signal.raise_signal(signal.SIGINT)
        return measure(*arguments)

    monkeypatch.setattr(loop, "_evaluate", evaluate)
    config = replace(SMALL, epochs=1)
    assert fit(images, load(scenes, "val"), config, tmp_path, say=lines.append).finished
    assert "epoch 1/1" in lines[-1]
    assert not any("stopped" in line for line in lines)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_mixed_precision(images, tmp_path, precision):
    few = torch.utils.data.Subset(images, range(2))  # minutes, where the processor has no such instructions
    config = replace(QUICK, epochs=1, precision=precision, clip=10.0, workers=1)
    lines = []
    result = fit(few, None, config, tmp_path, say=lines.append)
    told = f"cpu has no instructions for {precision}" in "\n".join(lines)
    assert told == (precision not in native_precisions(CPU))
    state = weights(tmp_path)
    assert all(value.dtype in (torch.float32, torch.int64) for value in state.values())
    assert all(value.isfinite().all() for value in state.values())
    assert result.finished


def test_the_same_seed_gives_the_same_weights_whatever_the_workers(images, tmp_path):
    for workers in (0, 2):
        fit(images, None, replace(SMALL, epochs=1, workers=workers), tmp_path / str(workers), say=None)
    assert_equal(weights(tmp_path / "0"), weights(tmp_path / "2"))
    fit(images, None, replace(SMALL, epochs=1, seed=1), tmp_path / "other", say=None)
    key = "conf.0.weight"
    assert not torch.equal(weights(tmp_path / "other")[key], weights(tmp_path / "0")[key])


@pytest.mark.parametrize("loss", ["batch", "multibox"])
def test_background_alone_teaches_with_the_loss_of_the_batch_only_and_is_told(tmp_path, loss):
    lines = []
    fit(Background(), Background(), replace(SMALL, epochs=1, loss=loss), tmp_path, say=lines.append)
    (row,) = rows(tmp_path)
    assert (float(row["loss"]) > 0) == (loss == "batch")
    assert float(row["loss"]) < float("inf")
    assert "\n".join(lines).count("no image of the first epoch had a box, so the network learns nothing") == 1
    assert float(row["AP"]) == -1
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


def test_frozen_stages_stay_as_they_are(images, tmp_path):
    torch.manual_seed(QUICK.seed)
    before = SSD(7, "resnet18").state_dict()
    fit(images, None, replace(QUICK, epochs=1, freeze=2, ema=0.0), tmp_path, say=None)
    after = weights(tmp_path)
    for key, value in before.items():
        parts = key.split(".")
        frozen = parts[0] == "feature_extractor" and int(parts[2]) <= 4  # conv1, bn1 and layer1
        assert not frozen or torch.equal(after[key], value), key
    changed = "feature_extractor.feature_extractor.5.0.conv1.weight"
    assert not torch.equal(after[changed], before[changed])


def test_compile_is_a_flag(images, tmp_path, monkeypatch):
    compiled = []
    real = torch.compile

    def with_eager(module, **options):  # inductor needs a C++ compiler
        compiled.append(module)
        return real(module, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", with_eager)
    fit(images, None, replace(SMALL, epochs=1, compile=True), tmp_path / "a", say=None)
    fit(images, None, replace(SMALL, epochs=1), tmp_path / "b", say=None)
    assert len(compiled) == 1
    assert weights(tmp_path / "a").keys() == weights(tmp_path / "b").keys()


def test_the_memory_layout_is_that_of_the_images_too(images, tmp_path, monkeypatch):
    plain, real = [], SSD.forward

    def forward(self, pixels):
        plain.append(pixels.is_contiguous())
        return real(self, pixels)

    monkeypatch.setattr(SSD, "forward", forward)
    two = torch.utils.data.Subset(images, range(2))
    for channels_last in (True, False):
        config = replace(QUICK, epochs=1, channels_last=channels_last)
        fit(two, None, config, tmp_path / str(channels_last), say=None)
    assert plain == [False, True]


class Deadly(torch.utils.data.Dataset):
    """Its reading process is killed when an item is read; in the first process it can be read."""

    def __init__(self, dataset, deadly, number=signal.SIGKILL):
        self._dataset, self._deadly, self._number = dataset, deadly, number
        self._parent, self.class_names = os.getpid(), dataset.class_names

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, index):
        if os.getpid() != self._parent and index == self._deadly:
            os.kill(os.getpid(), self._number)
        return self._dataset[index]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="processes are not killed so here")
def test_a_reading_process_that_is_killed_costs_no_step(images, tmp_path):
    """The run goes on where it was, without processes, and ends as if nothing had been wrong."""
    config = replace(SMALL, epochs=2, workers=2)
    fit(images, None, config, tmp_path / "whole", say=None)
    order = list(EpochBatches(6, batch_size=2, accumulate=1, seed=config.seed, world=ALONE))
    before = signal.getsignal(signal.SIGCHLD), set(multiprocessing.active_children())
    with pytest.raises(LostContactError) as told:
        fit(Deadly(images, order[-1][-1][1]), None, config, tmp_path / "run", say=None)
    message = str(told.value)
    assert message.startswith("a process that reads images has died (SIGKILL); ")
    assert "--workers 0" in message
    assert message.endswith(f"go on with: ssd train --resume {tmp_path / 'run'} --workers 0")
    assert "\n" not in message
    assert (signal.getsignal(signal.SIGCHLD), set(multiprocessing.active_children())) == before
    state = read_state(tmp_path / "run" / "state.pt")["progress"]
    assert state["epoch"] == 0
    assert state["batch"] == state["step"] <= 2
    config = replace(config, workers=0)
    assert fit(images, None, config, tmp_path / "run", resume=True, say=None).finished
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("workers", [0, 1])
def test_too_little_memory_for_an_image_names_it(images, tmp_path, workers):
    class Large(Background):
        def name(self, index):
            return "large.jpg"

        def __getitem__(self, index):
            raise MemoryError

    with pytest.raises(
        ImageError, match=r"^large\.jpg: there is not enough memory to read it; .*--workers 0"
    ):
        fit(Large(), None, replace(SMALL, workers=workers), tmp_path, say=None)
    assert (tmp_path / "state.pt").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_target_is_named(tmp_path, workers):
    with pytest.raises(AnnotationError, match=r"^photo-\d\.jpg: the box \[5.*no area$"):
        fit(Broken(), None, replace(SMALL, workers=workers), tmp_path, say=None)


def test_workers_end_with_the_run_although_its_exception_is_kept(tmp_path):
    before = set(multiprocessing.active_children())
    with pytest.raises(AnnotationError) as kept:
        fit(Broken(), None, replace(SMALL, workers=1), tmp_path, say=None)
    assert kept.tb is not None
    assert set(multiprocessing.active_children()) == before


def test_a_label_beyond_the_classes_is_named(tmp_path):
    class Beyond(Broken):
        def __getitem__(self, index):
            return super().__getitem__(index)[0], {"boxes": [[5, 5, 9, 9]], "labels": [3]}

    with pytest.raises(AnnotationError, match=r"photo-\d\.jpg: label 3, but there are 2 classes"):
        fit(Beyond(), None, SMALL, tmp_path, say=None)


LONG = replace(SMALL, epochs=4, precision="auto")


@pytest.fixture(scope="module")
def unbroken(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    dataset = DetectionDataset(load(scenes, "train"))
    fit(dataset, load(scenes, "val"), replace(LONG, evaluate_every=2), folder, say=None)
    return folder


@pytest.mark.parametrize(
    ("after", "number"),
    [(13, signal.SIGTERM), (15, signal.SIGINT)],
    ids=["first batch of an epoch, SIGTERM", "within an epoch, Ctrl-C"],
)
def test_halves_equal_the_whole_to_the_bit(scenes, images, unbroken, tmp_path, after, number):
    val, config = load(scenes, "val"), replace(LONG, evaluate_every=2)
    lines = []
    first = fit(Interrupting(images, after, number), val, config, tmp_path, say=lines.append)
    assert not first.finished
    assert f"ssd train --resume {tmp_path}" in lines[-1]
    torch.manual_seed(999)
    second = fit(images, val, config, tmp_path, resume=True, say=lines.append)
    assert second.finished
    assert any("going on at epoch 3, batch" in line for line in lines)
    assert_equal(weights(tmp_path), weights(unbroken))
    a = torch.load(tmp_path / "state.pt", weights_only=True)
    b = torch.load(unbroken / "state.pt", weights_only=True)
    assert_equal(a["model"], b["model"])
    for one, other in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])
    columns = ("epoch", "lr", "loss", "AP")
    resumed, whole = ([[row[c] for c in columns] for row in rows(folder)] for folder in (tmp_path, unbroken))
    assert resumed == whole


def test_signals_are_given_back(images, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    fit(images, None, replace(SMALL, epochs=1), tmp_path, say=None)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_interrupt_does_not_wait():
    stop = Stop()
    with stop.listening(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()


TRAIN = """
import sys
from dataclasses import replace
from ssd.data import DetectionDataset, load
from ssd.train import TrainConfig, fit, loop, setup
config = TrainConfig(**eval(sys.argv[3]))
fit(DetectionDataset(load(sys.argv[1], "train")), load(sys.argv[1], "val"), config, sys.argv[2],
    resume=len(sys.argv) > 4)
"""


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_equals_an_unbroken_run(scenes, images, tmp_path):
    # Of the published size, so that an epoch takes about as long as it is waited for a kill.
    long = replace(QUICK, epochs=4, precision="auto")
    config = {
        name: getattr(long, name)
        for name in ("epochs", "batch_size", "backbone", "precision", "workers", "lr", "half_size")
    }
    config |= {"evaluate_every": 2}
    fit(images, load(scenes, "val"), TrainConfig(**config), tmp_path / "unbroken", say=None)
    command = [sys.executable, "-c", TRAIN, str(scenes), str(tmp_path / "run"), repr(config)]
    moments = random.Random(0)
    epochs = kills = 0
    while epochs < long.epochs:
        resume = ["resume"] if (tmp_path / "run" / "state.pt").exists() else []
        with subprocess.Popen([*command, *resume], stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if done := re.match(r"epoch (\d+)/\d+  loss", line):
                    epochs = int(done[1])
                    if kills < 3:  # somewhere in the next epoch, or while this one's files are written
                        kills += 1
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            process.wait(moments.uniform(0, 0.8))
                        process.kill()
            assert process.wait() in (0, -signal.SIGKILL)
    assert kills == 3
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "unbroken"))


def test_a_finished_run_says_so_and_can_be_made_longer(images, tmp_path):
    fit(images, None, replace(SMALL, epochs=1), tmp_path, say=None)
    before = weights(tmp_path)
    lines = []
    result = fit(images, None, replace(SMALL, epochs=1), tmp_path, resume=True, say=lines.append)
    assert result.finished
    assert "all 1 epochs are done already" in "\n".join(lines)
    assert_equal(weights(tmp_path), before)
    assert fit(images, None, SMALL, tmp_path, resume=True, say=None).finished
    assert len(rows(tmp_path)) == 2


@pytest.mark.parametrize(("accumulate", "stands"), [(1, (1, 1, 4)), (3, (1, 0, 1))])
def test_an_image_that_breaks_within_an_epoch_costs_no_step(images, tmp_path, accumulate, stands):
    """Mended, the run goes on where it was, and ends as if nothing had been wrong."""

    class Breaking(Interrupting):
        def __getitem__(self, index):
            self._left -= 1
            if self._left == 0:
                raise ImageError("photo.jpg: damaged")
            return self._dataset[index]

    config = replace(SMALL, epochs=2, accumulate=accumulate)
    fit(images, None, config, tmp_path / "whole", say=None)
    with pytest.raises(ImageError, match=r"photo\.jpg: damaged"):
        fit(Breaking(images, 10), None, config, tmp_path / "run", say=None)
    state = read_state(tmp_path / "run" / "state.pt")["progress"]
    assert (state["epoch"], state["batch"], state["step"]) == stands
    assert fit(images, None, config, tmp_path / "run", resume=True, say=None).finished
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_with_steps_of_another_size_the_rate_goes_on_where_the_epoch_is(images, tmp_path):
    few = replace(SMALL, epochs=2, batch_size=2)
    fit(images, None, few, tmp_path, say=None)
    many = replace(SMALL, epochs=4, batch_size=3)
    fit(images, None, many, tmp_path, resume=True, say=None)
    expected = [rate_of(many, 2 * 4, 3)(2 * epoch - 1) for epoch in (3, 4)]
    assert [float(row["lr"]) for row in rows(tmp_path)][2:] == pytest.approx(expected, rel=1e-4)


def test_accumulated_gradients_survive_an_interrupt(images, tmp_path):
    """A stop comes after a step, never between the batches of one."""
    config = replace(SMALL, batch_size=2, accumulate=3)
    fit(images, None, config, tmp_path / "whole", say=None)
    assert not fit(Interrupting(images, 8), None, config, tmp_path / "halves", say=None).finished
    fit(images, None, config, tmp_path / "halves", resume=True, say=None)
    assert_equal(weights(tmp_path / "halves"), weights(tmp_path / "whole"))


class Copies:
    """One scene, again and again: all batches are the same."""

    class_names = CLASSES

    def __init__(self, images, count):
        self._item, self._count = images[0], count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        return self._item


def test_accumulated_batches_make_a_step_as_large_as_one(images, tmp_path):
    config = replace(SMALL, epochs=1, augmentation="none", ema=0.0, warmup=0)
    fit(Copies(images, 2), None, replace(config, lr=0.02), tmp_path / "one", say=None)
    # The rate is for 32 images, and this step has twice as many.
    fit(Copies(images, 4), None, replace(config, lr=0.01, accumulate=2), tmp_path / "two", say=None)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    torch.manual_seed(config.seed)
    before = SSD(7, "resnet18", layout=SMALL_LAYOUT).state_dict()
    learnt = [key for key, value in one.items() if value.is_floating_point() and "running" not in key]
    moved = [key for key in learnt if not torch.equal(one[key], before[key])]
    assert "conf.0.weight" in moved
    for key in moved:
        torch.testing.assert_close(one[key] - before[key], two[key] - before[key], atol=1e-6, rtol=0.02)


# --- Hooks for loggers ---


def test_each_row_is_handed_on_after_its_files_are_written(images, tmp_path):
    told = []

    def hook(row):
        told.append((dict(row), rows(tmp_path)[-1], read_state(tmp_path / "state.pt")["progress"]["epoch"]))
        row.clear()  # it is the hook's own

    fit(Subset(images, [0, 1]), None, SMALL, tmp_path, say=None, on_epoch=hook)
    assert [each[0]["epoch"] for each in told] == [each[2] for each in told] == [1, 2]
    for row, written, _ in told:
        assert {key: f"{value:.6g}" for key, value in row.items()} == written
    assert rows(tmp_path) == [each[1] for each in told]


def test_what_a_hook_raises_is_raised_as_it_is_and_the_epoch_is_saved(images, tmp_path):
    error, two = ZeroDivisionError("mine"), Subset(images, [0, 1])

    def hook(row):
        row.clear()
        raise error

    with pytest.raises(ZeroDivisionError) as told:
        fit(two, None, SMALL, tmp_path, say=None, on_epoch=hook)
    assert told.value is error
    assert fit(two, None, SMALL, tmp_path, say=None, resume=True).finished
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2"]


# --- Patience ---


def test_a_run_ends_where_its_ap_was_not_exceeded_and_says_what_goes_on(
    scenes, images, tmp_path, monkeypatch
):
    val, two, lines = load(scenes, "val"), Subset(images, [0, 1]), []
    patient = replace(SMALL, epochs=9, evaluate_every=1, patience=2)
    fake_evaluations(monkeypatch, [0.1, 0.3, 0.3, 0.2, 0.25])
    assert not fit_cut_short(images, 5, val, patient, tmp_path).finished  # in the third epoch
    result = fit(two, val, patient, tmp_path, resume=True, say=lines.append)
    assert (result.finished, result.best, len(rows(tmp_path))) == (True, 0.3, 4)
    told = (
        "ended: the AP of epoch 2, 0.300, was not exceeded in 2 epochs; a --patience above 2, or 0, goes on"
    )
    assert lines[-1] == told
    lines.clear()
    assert fit(two, val, patient, tmp_path, resume=True, say=lines.append).finished
    assert [line.splitlines()[-1] for line in lines[1:]] == [told]
    assert len(rows(tmp_path)) == 4
    result = fit(two, val, replace(patient, patience=3), tmp_path, resume=True, say=None)
    assert (result.finished, len(rows(tmp_path))) == (True, 5)


def test_patience_without_a_val_split_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match="patience 3 needs images to evaluate on"):
        fit(images, None, replace(SMALL, patience=3), tmp_path, say=None)


# --- A time to end by ---


@pytest.fixture
def clock(monkeypatch):
    """Each look at the clock is five seconds after the one before."""
    monkeypatch.setattr(loop, "monotonic", itertools.count(1000, 5).__next__)


@pytest.fixture
def done(monkeypatch):
    """What was done of a run before each step, and of how much, as its learning rate is told."""
    told, real = [], setup.learning_rate
    monkeypatch.setattr(
        setup, "learning_rate", lambda *given, **rest: told.append(given) or real(*given, **rest)
    )
    return told


def test_the_rate_falls_over_the_time_and_the_run_ends_within_an_epoch(
    scenes, images, tmp_path, monkeypatch, clock, done
):
    fake_evaluations(monkeypatch, [0.1, 0.2])
    val, lines, timed = load(scenes, "val"), [], replace(SMALL, epochs=1, time=50 / 60)
    result = fit(images, val, timed, tmp_path, say=lines.append)
    assert result.finished
    assert [row["AP"] for row in rows(tmp_path)] == ["", "", "0.1"]
    # Looks come after each of three steps and at the end of each epoch, for whose row a rate is asked.
    assert list(dict.fromkeys(done)) == [(seconds, 50) for seconds in (0, 5, 10, 20, 25, 30, 40, 45, 55)]
    assert lines[-1] == "ended: the 0.833333 minutes are used up; --resume with a longer --time goes on"
    state = read_state(tmp_path / "state.pt")["progress"]
    assert (state["epoch"], state["batch"], state["step"], state["seconds"]) == (3, 0, 8, 60)
    assert any(line.startswith("epoch 3  loss") for line in lines)

    lines.clear()
    assert fit(images, val, timed, tmp_path, resume=True, say=lines.append).finished
    assert [line.splitlines()[-1] for line in lines[1:]] == [
        "ended: the 0.833333 minutes are used up; --resume with a longer --time goes on"
    ]
    done.clear()
    longer = replace(timed, time=65 / 60)
    assert fit(Subset(images, [0, 1]), val, longer, tmp_path, resume=True, say=None).finished
    assert done[0] == pytest.approx((60, 65))
    assert len(rows(tmp_path)) == 4


def test_the_time_counts_over_interruptions_and_a_state_without_it_has_none(images, tmp_path, clock, done):
    timed, two = replace(SMALL, time=40 / 60), Subset(images, [0, 1])
    fit_cut_short(images, 5, None, timed, tmp_path)
    saved = read_state(tmp_path / "state.pt")["progress"]["seconds"]
    assert saved == 30  # two looks an epoch
    done.clear()
    fit(two, None, timed, tmp_path, resume=True, say=None)
    assert done[-1][0] >= 40
    assert all(seconds >= saved for seconds, _ in done)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["progress"]["seconds"]
    torch.save(state, tmp_path / "state.pt")
    done.clear()
    assert fit(two, None, timed, tmp_path, resume=True, say=None).finished
    assert done[0] == (0, 40)


def test_an_evaluation_may_use_up_the_time(scenes, images, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop, "monotonic", lambda: now[0])
    fake_evaluations(monkeypatch, [0.1])
    real = loop._evaluate

    def evaluate(*given):
        now[0] += 100
        return real(*given)

    monkeypatch.setattr(loop, "_evaluate", evaluate)
    timed = replace(SMALL, time=1.0, evaluate_every=2)
    result = fit(Subset(images, [0, 1]), load(scenes, "val"), timed, tmp_path, say=None)
    assert (result.finished, len(rows(tmp_path)), result.evaluation.metrics["AP"]) == (True, 2, 0.1)


def test_all_processes_take_the_time_of_the_first_and_stop_where_one_is_asked_to(clock):
    class Second(World):
        def gather(self, value):
            return [(100.0, True), value]

    progress = Progress(seconds=7.0)
    assert loop.Clock(progress, Second(1, 2, CPU)).look(asked=False)
    assert progress.seconds == 100.0
    alone = Progress(seconds=7.0)
    assert not loop.Clock(alone, ALONE).look(asked=False)
    assert alone.seconds == 12.0


# --- Half the size ---


def sizes_seen(monkeypatch):
    """The widths of all batches from here on, as they are trained on."""
    seen, real = [], SSD.forward

    def forward(self, pixels):
        if self.training:
            seen.append(pixels.shape[-1])
        return real(self, pixels)

    monkeypatch.setattr(SSD, "forward", forward)
    return seen


def test_the_first_part_of_a_run_sees_images_of_half_the_size(images, tmp_path, monkeypatch):
    seen, lines = sizes_seen(monkeypatch), []
    config = replace(SMALL, epochs=5, half_size=0.5)
    fit(images, None, config, tmp_path / "half", say=lines.append)
    assert seen == [48] * 6 + [96] * 9
    told = [line for line in lines if line.startswith("epoch")]
    assert [" at 48 pixels  loss" in line for line in told] == [True, True, False, False, False]
    state = read_state(tmp_path / "half" / "state.pt")
    assert (state["progress"]["half_epochs"], state["config"]["half_size"]) == (2, 0.5)


def test_the_last_maps_learn_from_whole_images_alone(images, tmp_path, monkeypatch):
    states, set_up, close_epoch = [], loop.set_up, loop.close_epoch

    def start(*arguments, **options):
        ready = set_up(*arguments, **options)
        states.append(copy.deepcopy(ready.run.model.state_dict()))
        return ready

    def close(run, *rest):
        states.append(copy.deepcopy(run.model.state_dict()))
        return close_epoch(run, *rest)

    monkeypatch.setattr(loop, "set_up", start)
    monkeypatch.setattr(loop, "close_epoch", close)
    fit(images, None, replace(SMALL, half_size=0.5), tmp_path, say=None)
    for key, changed in (
        ("loc.3.weight", False),
        ("additional_blocks.2.0.weight", False),
        ("loc.0.weight", True),
    ):
        first, half, whole = (state[key] for state in states)
        assert torch.equal(first, half) != changed
        assert not torch.equal(half, whole)


@pytest.mark.parametrize("after", [3, 7, 14])
def test_a_run_that_is_stopped_at_half_the_size_ends_as_one_that_was_not(images, tmp_path, after):
    config = replace(SMALL, epochs=4, half_size=0.6)
    fit(images, None, config, tmp_path / "whole", say=None)
    stopped = Interrupting(images, after)
    assert not fit(stopped, None, config, tmp_path / "run", say=None).finished
    assert fit(images, None, config, tmp_path / "run", resume=True, say=None).finished
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_patience_counts_from_the_first_whole_images(scenes, images, tmp_path, monkeypatch):
    val, two = load(scenes, "val"), torch.utils.data.Subset(images, [0, 1])
    config = replace(SMALL, epochs=12, evaluate_every=1, patience=2, half_size=0.5)
    fake_evaluations(monkeypatch, [0.5] + [0.2] * 11)
    result = fit(two, val, config, tmp_path, say=None)
    assert (result.finished, result.best, len(rows(tmp_path))) == (True, 0.5, 8)


def test_half_the_time_is_spent_at_half_the_size(images, tmp_path, monkeypatch, clock):
    seen = sizes_seen(monkeypatch)
    timed = replace(SMALL, time=100 / 60, half_size=0.5)
    fit(Subset(images, [0, 1]), None, timed, tmp_path, say=None)
    change = seen.index(96)
    assert seen == [48] * change + [96] * (len(seen) - change)
    assert 0.3 < change / len(seen) < 0.7


def test_an_epoch_longer_than_the_time_is_half_of_it_at_the_whole_size(images, tmp_path, monkeypatch, clock):
    seen = sizes_seen(monkeypatch)
    fit(images, None, replace(SMALL, time=20 / 60, half_size=0.5), tmp_path, say=None)
    assert set(seen) == {48, 96}
    assert len(rows(tmp_path)) == 2


def test_a_run_that_is_made_longer_does_not_go_back_to_half_the_size(images, tmp_path, monkeypatch):
    seen = sizes_seen(monkeypatch)
    config = replace(SMALL, epochs=2, half_size=0.5)
    fit(images, None, config, tmp_path, say=None)
    assert seen == [48] * 3 + [96] * 3
    seen.clear()
    fit(images, None, replace(config, epochs=6), tmp_path, say=None, resume=True)
    assert seen == [96] * 12


@pytest.mark.parametrize("before", [0.0, 0.4, None], ids=["none", "some", "begun before the choice"])
def test_a_run_that_sees_whole_images_refuses_more_of_half_the_size(images, tmp_path, before):
    config = replace(SMALL, epochs=5, half_size=before or 0.0)
    folder = tmp_path / "run"
    stopped = Interrupting(images, 20)
    assert not fit(stopped, None, config, folder, say=None).finished
    if before is None:
        state = torch.load(folder / "state.pt")
        del state["config"]["half_size"]
        torch.save(state, folder / "state.pt")
    kept = (folder / "state.pt").read_bytes()
    with pytest.raises(ValueError, match=r"half_size 0\.9: the run sees whole images already"):
        fit(images, None, replace(config, half_size=0.9), folder, say=None, resume=True)
    assert (folder / "state.pt").read_bytes() == kept
    unnamed = replace(config, half_size=None)
    assert fit(images, None, unnamed, folder, say=None, resume=True).finished


def test_memory_for_whole_images_is_tried_before_half_of_them(images, tmp_path, monkeypatch):
    """On CUDA; here the CPU counts as such, and a forward pass of whole images as too much for it."""
    real = SSD.forward

    def forward(self, pixels):
        if self.training and pixels.shape[-1] == 96:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return real(self, pixels)

    monkeypatch.setattr(SSD, "forward", forward)
    monkeypatch.setattr(setup, "_OWN_MEMORY", ("cpu",))
    config = replace(SMALL, epochs=4, half_size=0.5)
    with pytest.raises(
        ValueError, match=r"batch_size 2: cpu has too little memory .* images of 96 pixels, which"
    ):
        fit(images, None, config, tmp_path / "run", say=None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trying_the_memory_changes_nothing_of_a_run(images, tmp_path, monkeypatch, precision):
    few = Subset(images, [0, 1])
    config = replace(SMALL, half_size=0.5, precision=precision, freeze=2)
    fit(few, None, config, tmp_path / "as it is", say=None)
    monkeypatch.setattr(setup, "_OWN_MEMORY", ("cpu",))
    seen = sizes_seen(monkeypatch)
    fit(few, None, config, tmp_path / "tried", say=None)
    assert seen == [96, 48, 96]
    states = [read_state(tmp_path / name / "state.pt") for name in ("as it is", "tried")]
    for part in ("model", "average"):
        assert_equal(*(state[part] for state in states))
    assert torch.equal(*(state["random"] for state in states))
