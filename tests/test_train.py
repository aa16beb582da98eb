import contextlib
import csv
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import safetensors
import torch
from conftest import made_model, waiting_for_cuda_fails
from PIL import Image
from torch import nn

from ssd import checkpoint, shapes, train
from ssd.data import AnnotationError, DetectionDataset, load
from ssd.detector import Detector
from ssd.distributed import World
from ssd.evaluate import evaluate
from ssd.images import ImageError
from ssd.model import SSD300, load_model, native_precisions, transfer
from ssd.postprocess import NonFiniteError
from ssd.train import PRESETS, EpochBatches, Run, TrainConfig, fit, learning_rate, parameter_groups

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
QUICK = TrainConfig(
    epochs=2, batch_size=2, backbone="resnet18", precision="fp32", workers=0, evaluate_every=100, lr=0.02
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Six scenes to train on, some of which may be empty, and three to evaluate on."""
    folder = tmp_path_factory.mktemp("scenes")
    shapes.write(folder, 6, 3, seed=5)
    return folder


@pytest.fixture
def images(scenes):
    return DetectionDataset(load(scenes, "train"))


def weights(folder, name="last"):
    return checkpoint.read(folder / f"{name}.safetensors").state_dict


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


# --- Config, schedule, groups, batches --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 1),
        ("accumulate", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("ema", 1.0),
        ("momentum", 1.0),
        ("freeze", 5),
        ("workers", -1),
        ("augmentation", "strong"),
        ("schedule", "step"),
        ("precision", "fp8"),
        ("iou_threshold", 7.0),
        ("milestones", (0.5, 43.0)),
    ],
)
def test_choices_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        replace(QUICK, **{field: value})


def test_the_published_schedule_by_hand():
    """65 epochs of 100 steps, batch 32: a rise over 300 steps, a tenth from epoch 43 and from epoch 54 on."""
    rate = partial(learning_rate, PRESETS["published"], total=6500, images_per_step=32)
    assert rate(0) == pytest.approx(2.6e-3 / 300)
    assert rate(149) == pytest.approx(2.6e-3 / 2)
    assert rate(299) == rate(4299) == pytest.approx(2.6e-3)
    assert rate(4300) == rate(5399) == pytest.approx(2.6e-4)
    assert rate(5400) == rate(6499) == pytest.approx(2.6e-5)
    eight = learning_rate(PRESETS["published"], 1000, 6500, 8)
    assert eight == pytest.approx(2.6e-3 / 4)


def test_the_default_schedule_by_hand():
    rate = partial(learning_rate, replace(QUICK, lr=0.08), total=1000, images_per_step=32)
    assert rate(0) == pytest.approx(0.08 / 100, rel=1e-3)  # warm-up is at most a tenth of the run
    assert rate(500) == pytest.approx(0.04)
    assert 0 < rate(999) < 1e-6


def test_fine_tuning_starts_lower():
    assert TrainConfig(weights="coco").peak_lr() == TrainConfig().peak_lr() / 10
    assert TrainConfig(weights="coco", lr=0.5).peak_lr() == 0.5


@pytest.mark.parametrize("frozen", [0, 2])
def test_each_parameter_is_in_one_group_and_norms_and_biases_do_not_decay(frozen):
    model = SSD300(3, "resnet18")
    train.freeze(model, frozen)
    decayed, plain = parameter_groups(model, 5e-4)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (5e-4, 0)
    ids = [id(each) for group in (decayed, plain) for each in group["params"]]
    assert sorted(ids) == sorted(id(each) for each in model.parameters() if each.requires_grad)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert {id(module.weight), id(module.bias)}.isdisjoint(map(id, decayed["params"]))
        if isinstance(module, nn.Conv2d) and module.weight.requires_grad:
            assert id(module.weight) in map(id, decayed["params"])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_process_has_as_many_batches_and_no_image_comes_twice(size, accumulate):
    config = replace(QUICK, accumulate=accumulate)
    samplers = [EpochBatches(29, config, World(rank, size, CPU)) for rank in range(size)]
    for epoch in (0, 1):
        for each in samplers:
            each.epoch = epoch
        batches = [list(each) for each in samplers]
        assert (
            {len(each) for each in batches}
            == {len(samplers[0])}
            == {29 // (2 * size * accumulate) * accumulate}
        )
        seen = [index for each in batches for batch in each for _, index in batch]
        assert len(seen) == len(set(seen))
        assert all(key[0] == epoch for each in batches for batch in each for key in batch)
    assert batches[0] != [[(1, index) for _, index in batch] for batch in batches[0][::-1]]
    samplers[0].start = 1
    assert list(samplers[0]) == batches[0][1:]


def test_the_order_changes_with_epoch_and_seed():
    def order(epoch, seed):
        sampler = EpochBatches(50, replace(QUICK, seed=seed), ALONE)
        sampler.epoch = epoch
        return [index for batch in sampler for _, index in batch]

    assert order(0, 0) != order(1, 0) != order(0, 1)
    assert order(3, 4) == order(3, 4)


def test_the_average_by_hand():
    model, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0), average.weight.data.fill_(0.0)
    train.update_average(average, model, 0.9, step=0)
    assert average.weight.item() == pytest.approx(0.9)  # (1 + 0) / (10 + 0) of the old
    average.weight.data.fill_(0.0)
    train.update_average(average, model, 0.9, step=10_000)
    assert average.weight.item() == pytest.approx(0.1)


def test_apex_is_used_on_cuda_where_it_can_be_imported(monkeypatch):
    made = []
    apex = types.ModuleType("apex")
    apex.optimizers = types.ModuleType("apex.optimizers")
    apex.optimizers.FusedSGD = lambda groups, **options: made.append((groups, options)) or "fused"
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex.optimizers)
    model = SSD300(3, "resnet18")
    assert train.make_optimizer(model, QUICK, torch.device("cuda")) == "fused"
    ((groups, options),) = made
    assert options == {"lr": 0.02, "momentum": 0.9}
    assert [group["weight_decay"] for group in groups] == [5e-4, 0.0]
    assert isinstance(train.make_optimizer(model, QUICK, CPU), torch.optim.SGD)


# --- Training ---------------------------------------------------------------------------------------------


def test_a_run_and_its_folder(scenes, images, tmp_path, capsys):
    val = load(scenes, "val", class_names=images.class_names)
    config = replace(QUICK, epochs=3, evaluate_every=2)
    result = fit(images, val, config, tmp_path / "run", category_ids=range(11, 17))
    assert result.finished
    assert result.evaluation is not None
    folder = result.folder
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "config.json",
        "metrics.csv",
        "last.safetensors",
        "best.safetensors",
        "state.pt",
        "samples/epoch-002.jpg",
        "samples/epoch-003.jpg",
    }
    epochs = rows(folder)
    assert [row["epoch"] for row in epochs] == ["1", "2", "3"]
    assert [bool(row["AP"]) for row in epochs] == [False, True, True]
    terms = [float(epochs[2][name]) for name in ("loc_loss", "conf_loss")]
    assert float(epochs[2]["loss"]) == pytest.approx(sum(terms), rel=1e-4)

    found = checkpoint.read(folder / "last.safetensors")
    assert found.class_names == shapes.CLASSES
    assert found.category_ids == tuple(range(11, 17))
    assert found.config["batch_size"] == 2
    with safetensors.safe_open(folder / "last.safetensors", "pt") as file:
        assert "300x300" in file.metadata()["transform"]
    saved = json.loads((folder / "config.json").read_text())
    assert saved["config"]["lr"] == 0.02
    detector = Detector.load(folder / "best.safetensors")
    detected = detector(val.path(0), score_threshold=0.01)
    assert detected.category_ids == tuple(range(11, 17))
    assert result.detector(val.path(0)).class_names == shapes.CLASSES

    out = capsys.readouterr().out
    assert "all weights from random values" in out
    assert "6 images, 3 steps an epoch" in out
    assert "epoch 3/3  loss" in out
    assert "momentum=0.9" in out


def test_the_loss_falls(images, tmp_path):
    config = replace(QUICK, epochs=6, precision="auto", augmentation="none", ema=0.0, lr=0.05)
    fit(images, None, config, tmp_path, say=None)
    losses = [float(row["loss"]) for row in rows(tmp_path)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
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
        fit(images, None, replace(QUICK, epochs=1, workers=workers), tmp_path / str(workers), say=None)
    assert_equal(weights(tmp_path / "0"), weights(tmp_path / "2"))
    fit(images, None, replace(QUICK, epochs=1, seed=1), tmp_path / "other", say=None)
    key = "conf.0.weight"
    assert not torch.equal(weights(tmp_path / "other")[key], weights(tmp_path / "0")[key])


class Background(torch.utils.data.Dataset):
    """Four images without any box; any torch Dataset will do."""

    class_names = ("cat", "dog")

    def __len__(self):
        return 4

    def __getitem__(self, index):
        image = np.random.RandomState(index).randint(0, 256, (40, 60, 3), np.uint8)
        return image, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def test_background_alone_is_a_loss_of_zero(tmp_path):
    fit(Background(), Background(), replace(QUICK, epochs=1), tmp_path, say=None)
    (row,) = rows(tmp_path)
    assert float(row["loss"]) == 0
    assert float(row["AP"]) == -1
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


def test_frozen_stages_stay_as_they_are(images, tmp_path):
    torch.manual_seed(QUICK.seed)
    before = SSD300(7, "resnet18").state_dict()
    fit(images, None, replace(QUICK, epochs=1, freeze=2, ema=0.0), tmp_path, say=None)
    after = weights(tmp_path)
    for key, value in before.items():
        place = key.split(".")
        frozen = place[0] == "feature_extractor" and int(place[2]) <= 4  # conv1, bn1 and layer1
        assert not frozen or torch.equal(after[key], value), key
    changed = "feature_extractor.feature_extractor.5.0.conv1.weight"
    assert not torch.equal(after[changed], before[changed])


def test_compile_is_a_flag(images, tmp_path, monkeypatch):
    compiled = []
    real = torch.compile

    def with_eager(module):  # inductor needs a C++ compiler
        compiled.append(module)
        return real(module, backend="eager")

    monkeypatch.setattr(torch, "compile", with_eager)
    fit(images, None, replace(QUICK, epochs=1, compile=True), tmp_path / "a", say=None)
    fit(images, None, replace(QUICK, epochs=1), tmp_path / "b", say=None)
    assert len(compiled) == 1
    assert weights(tmp_path / "a").keys() == weights(tmp_path / "b").keys()


def test_the_memory_layout_is_that_of_the_images_too(images, tmp_path, monkeypatch):
    plain, real = [], SSD300.forward

    def forward(self, pixels):
        plain.append(pixels.is_contiguous())
        return real(self, pixels)

    monkeypatch.setattr(SSD300, "forward", forward)
    two = torch.utils.data.Subset(images, range(2))
    for channels_last in (True, False):
        config = replace(QUICK, epochs=1, channels_last=channels_last)
        fit(two, None, config, tmp_path / str(channels_last), say=None)
    assert plain == [False, True]


def test_tensorboard_is_an_extra(images, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is an extra")
    fit(images, None, replace(QUICK, epochs=1), tmp_path, say=None, tensorboard=True)
    assert list(tmp_path.glob("events.out.tfevents.*"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'ssd300\[tensorboard\]'"):
        fit(images, None, QUICK, tmp_path / "b", say=None, tensorboard=True)


# --- What is told at the start ----------------------------------------------------------------------------


def test_too_few_images(images, tmp_path):
    with pytest.raises(ValueError, match="6 images are too few for a step of batch_size 4 x accumulate 2"):
        fit(images, None, replace(QUICK, batch_size=4, accumulate=2), tmp_path, say=None)
    assert not (tmp_path / "config.json").exists()


def test_images_that_sit_out_are_told(images, tmp_path):
    lines = []
    fit(images, None, replace(QUICK, epochs=1, batch_size=4), tmp_path, say=lines.append)
    assert "2 images sit out each epoch" in "\n".join(lines)


def test_sync_batchnorm_needs_cuda(images, tmp_path):
    with pytest.raises(ValueError, match="sync_batchnorm works on CUDA only"):
        fit(images, None, replace(QUICK, sync_batchnorm=True), tmp_path, say=None)


class Broken(Background):
    def name(self, index):
        return f"photo-{index}.jpg"

    def __getitem__(self, index):
        return super().__getitem__(index)[0], {"boxes": [[5, 5, 5, 9]], "labels": [1]}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_target_is_named(tmp_path, workers):
    with pytest.raises(AnnotationError, match=r"^photo-\d\.jpg: the box \[5.*no area$"):
        fit(Broken(), None, replace(QUICK, workers=workers), tmp_path, say=None)


def test_workers_end_with_the_run_although_its_exception_is_kept(tmp_path):
    before = set(multiprocessing.active_children())
    with pytest.raises(AnnotationError) as kept:
        fit(Broken(), None, replace(QUICK, workers=1), tmp_path, say=None)
    assert kept.tb is not None
    assert set(multiprocessing.active_children()) == before


def test_a_label_beyond_the_classes_is_named(tmp_path):
    class Beyond(Broken):
        def __getitem__(self, index):
            return super().__getitem__(index)[0], {"boxes": [[5, 5, 9, 9]], "labels": [3]}

    with pytest.raises(AnnotationError, match=r"photo-\d\.jpg: label 3, but there are 2 classes"):
        fit(Beyond(), None, QUICK, tmp_path, say=None)


# --- Starting points --------------------------------------------------------------------------------------


def test_other_classes_keep_all_but_the_class_heads(weights_file, small_model):
    model, line = transfer(weights_file, ("a", "b"))
    old, new = small_model.state_dict(), model.state_dict()
    assert model.num_classes == 3
    assert not model.head_norm  # as the checkpoint's
    for key, value in old.items():
        assert key.startswith("conf") or torch.equal(new[key], value), key
    kept = sum(not key.startswith("conf") for key in old)
    assert f"loaded {kept} tensors" in line
    assert "skipped the class heads of its 3 classes" in line
    assert "12 tensors for 2 classes are new (conf.0.weight to conf.5.bias)" in line


def test_the_same_classes_keep_everything(weights_file, small_model):
    model, line = transfer(weights_file, ("cat", "cup", "person"))
    assert_equal(model.state_dict(), small_model.state_dict())
    assert "everything loaded" in line


def test_another_backbone_than_the_checkpoints(weights_file):
    with pytest.raises(ValueError, match="has the backbone resnet18, not resnet50"):
        transfer(weights_file, ("a",), backbone="resnet50")


def test_fine_tuning(images, weights_file, tmp_path):
    lines = []
    config = replace(QUICK, epochs=1, weights=str(weights_file), backbone=None, lr=None)
    fit(images, None, config, tmp_path, say=lines.append)
    assert "skipped the class heads" in lines[0]
    found = checkpoint.read(tmp_path / "last.safetensors")
    assert (found.num_classes, found.head_norm) == (7, False)
    assert found.config["lr"] == 0.008


# --- Interruptions ----------------------------------------------------------------------------------------


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


LONG = replace(QUICK, epochs=4, precision="auto")


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
    fit(images, None, replace(QUICK, epochs=1), tmp_path, say=None)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_interrupt_does_not_wait():
    stop = train.Stop()
    with stop.listening(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()


TRAIN = """
import sys
from dataclasses import replace
from ssd.data import DetectionDataset, load
from ssd.train import TrainConfig, fit
config = TrainConfig(**eval(sys.argv[3]))
fit(DetectionDataset(load(sys.argv[1], "train")), load(sys.argv[1], "val"), config, sys.argv[2],
    resume=len(sys.argv) > 4)
"""


def test_killed_at_random_moments_and_resumed_equals_an_unbroken_run(scenes, unbroken, tmp_path):
    config = {
        name: getattr(LONG, name)
        for name in ("epochs", "batch_size", "backbone", "precision", "workers", "lr")
    }
    config |= {"evaluate_every": 2}
    command = [sys.executable, "-c", TRAIN, str(scenes), str(tmp_path / "run"), repr(config)]
    moments = random.Random(0)
    epochs = kills = 0
    while epochs < LONG.epochs:
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
    assert_equal(weights(tmp_path / "run"), weights(unbroken))


def test_a_finished_run_says_so_and_can_be_made_longer(images, tmp_path):
    fit(images, None, replace(QUICK, epochs=1), tmp_path, say=None)
    before = weights(tmp_path)
    lines = []
    result = fit(images, None, replace(QUICK, epochs=1), tmp_path, resume=True, say=lines.append)
    assert result.finished
    assert "all 1 epochs are done already" in "\n".join(lines)
    assert_equal(weights(tmp_path), before)
    assert fit(images, None, QUICK, tmp_path, resume=True, say=None).finished
    assert len(rows(tmp_path)) == 2


def test_lines_of_progress_where_there_is_no_bar(images, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_LINE_SECONDS", 0)
    monkeypatch.setattr(train, "is_watched", lambda: False)
    lines = []
    fit(images, None, QUICK, tmp_path, say=lines.append)
    within = [line for line in lines if "batch" in line and "all done in" in line]
    assert len(within) == 4  # not after the last of three batches: the epoch's own line comes then
    assert re.fullmatch(r"epoch 1/2  batch 1/3  loss .* lr \S+  \d+\.\d images/s  all done in .*", within[0])


def test_classes_of_the_validation_data_are_checked_at_the_start(scenes, images, tmp_path):
    val = load(scenes, "val", class_names=(*images.class_names, "heart"))
    with pytest.raises(AnnotationError, match="its classes are not those of training"):
        fit(images, val, QUICK, tmp_path, say=None)
    assert not (tmp_path / "config.json").exists()


def test_a_strict_dataset_to_evaluate_on_loses_no_image(scenes, tmp_path):
    """An image of another size than annotated is for evaluation to refuse, as the dataset was to."""
    shutil.copytree(scenes, tmp_path / "data")
    path = sorted((tmp_path / "data" / "val").iterdir())[0]
    Image.new("RGB", (31, 17)).save(path)
    val = DetectionDataset(load(tmp_path / "data", "val"))
    assert len(train._checked(val, val.class_names)) == 3
    detector = Detector(made_model(num_classes=7), val.class_names)
    with pytest.raises(AnnotationError, match=f"{path.name}: is 31x17"):
        evaluate(detector, train._checked(val, val.class_names))
    lenient = DetectionDataset(load(tmp_path / "data", "val"), lenient=True)
    assert len(train._checked(lenient, val.class_names)) == 2


def test_resuming_needs_a_state(images, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing to resume: there is no .*state\.pt"):
        fit(images, None, QUICK, tmp_path, resume=True, say=None)
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(checkpoint.CheckpointError, match=r"state\.pt: not the state of a run, or damaged"):
        fit(images, None, QUICK, tmp_path, resume=True, say=None)
    torch.save({"model": {}}, tmp_path / "state.pt")
    with pytest.raises(
        checkpoint.CheckpointError, match=r"not the state of a run; it has no average, config, data"
    ):
        fit(images, None, QUICK, tmp_path, resume=True, say=None)


def test_a_run_is_not_overwritten(images, tmp_path):
    fit(images, None, replace(QUICK, epochs=1), tmp_path, say=None)
    with pytest.raises(FileExistsError, match="holds a run already"):
        fit(images, None, QUICK, tmp_path, say=None)


def test_what_may_not_change_when_a_run_goes_on(images, tmp_path):
    stopped = replace(QUICK, epochs=2)
    fit(Interrupting(images, 3), None, stopped, tmp_path, say=None)
    for change, message in (
        ({"batch_size": 3}, r"middle of an epoch.*batch_size 2 \(now 3\)"),
        ({"ema": 0.0}, "ema cannot be switched"),
        ({"freeze": 2}, "of a run with freeze 0, and goes on with it, not 2"),
        ({"backbone": "resnet34"}, "of a run with backbone resnet18, and goes on with it, not resnet34"),
        ({"weights": "shapes", "lr": 0.02}, "of a run with weights None"),
        ({"head_norm": False}, "of a run with head_norm True"),
    ):
        with pytest.raises(checkpoint.CheckpointError, match=message):
            fit(images, None, replace(stopped, **change), tmp_path, resume=True, say=None)
    with pytest.raises(checkpoint.CheckpointError, match=r"is of other classes: circle, square"):
        fit(images, None, stopped, tmp_path, class_names=list("abcdef"), resume=True, say=None)
    assert fit(images, None, replace(stopped, channels_last=False), tmp_path, resume=True, say=None).finished


def test_what_may_change_when_a_run_goes_on_holds_from_there_on(tmp_path):
    run = make_run()
    run.optimizer.param_groups[0]["lr"] = 0.123
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 4.0})
    train.save_state(tmp_path / "state.pt", run, QUICK)
    state = train.read_state(tmp_path / "state.pt")
    same, other = make_run(), make_run()
    train.restore(tmp_path / "state.pt", state, same, QUICK)
    assert same.scaler.get_scale() == 4
    changed = replace(QUICK, momentum=0.5, weight_decay=0.1, precision="fp16")
    other.optimizer = train.make_optimizer(other.model, changed, CPU)
    other.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    train.restore(tmp_path / "state.pt", state, other, changed)
    assert [group["momentum"] for group in other.optimizer.param_groups] == [0.5, 0.5]
    assert [group["weight_decay"] for group in other.optimizer.param_groups] == [0.1, 0.0]
    assert other.scaler.get_scale() == 2.0**16


@pytest.mark.parametrize(("accumulate", "stands"), [(1, (1, 1, 4)), (3, (1, 0, 1))])
def test_an_image_that_breaks_within_an_epoch_costs_no_step(images, tmp_path, accumulate, stands):
    """Mended, the run goes on where it was, and ends as if nothing had been wrong."""

    class Breaking(Interrupting):
        def __getitem__(self, index):
            self._left -= 1
            if self._left == 0:
                raise ImageError("photo.jpg: damaged")
            return self._dataset[index]

    config = replace(QUICK, epochs=2, accumulate=accumulate)
    fit(images, None, config, tmp_path / "whole", say=None)
    with pytest.raises(ImageError, match=r"photo\.jpg: damaged"):
        fit(Breaking(images, 10), None, config, tmp_path / "run", say=None)
    state = train.read_state(tmp_path / "run" / "state.pt")["progress"]
    assert (state["epoch"], state["batch"], state["step"]) == stands
    assert fit(images, None, config, tmp_path / "run", resume=True, say=None).finished
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_with_steps_of_another_size_the_rate_goes_on_where_the_epoch_is(images, tmp_path):
    few = replace(QUICK, epochs=2, batch_size=2)
    fit(images, None, few, tmp_path, say=None)
    many = replace(QUICK, epochs=4, batch_size=3)
    fit(images, None, many, tmp_path, resume=True, say=None)
    expected = [train.learning_rate(many, 2 * epoch - 1, 2 * 4, 3) for epoch in (3, 4)]
    assert [float(row["lr"]) for row in rows(tmp_path)][2:] == pytest.approx(expected, rel=1e-4)


def test_a_state_of_another_optimiser_is_gone_on_with(images, tmp_path):
    """That of apex has no fused, foreach and so on."""
    fit(images, None, replace(QUICK, epochs=1), tmp_path, say=None)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        for key in set(group) - {"params", "lr", "momentum", "dampening", "weight_decay", "nesterov"}:
            del group[key]
    torch.save(state, tmp_path / "state.pt")
    assert fit(images, None, QUICK, tmp_path, resume=True, say=None).finished


def test_crowd_boxes_are_in_the_dataset_as_the_config_says(images, tmp_path):
    crowd = np.arange(len(images.annotations.labels)) % 2 == 0
    part = torch.utils.data.Subset(DetectionDataset(replace(images.annotations, crowd=crowd)), range(4))
    with pytest.raises(ValueError, match=r"config says crowd=True.*made with crowd=False"):
        fit(part, None, replace(QUICK, crowd=True), tmp_path, say=None)


@pytest.mark.parametrize("orientation", [3, 6])
def test_boxes_of_turned_photos_stay_on_what_they_mark(tmp_path, orientation):
    """A red quarter, at the top left of the upright image, and the box on it."""
    upright = Image.new("RGB", (100, 80), "blue")
    upright.paste("red", (0, 0, 50, 40))
    stored = upright.transpose(Image.Transpose.ROTATE_180 if orientation == 3 else Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "train").mkdir()
    stored.save(tmp_path / "train" / "a.png", exif=exif)
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 80}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 40]}],
        "categories": [{"id": 1, "name": "red"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    examples = train.Examples(DetectionDataset(load(tmp_path)), 2, "none", 0)
    image, boxes, _, _ = examples[0, 0]
    torch.testing.assert_close(boxes, torch.tensor([[0, 0, 0.5, 0.5]]))
    assert (image[10:140, 10:140] == torch.tensor([255, 0, 0])).all()


def test_under_torchrun_the_world_has_to_be_passed(images, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="pass world=world"):
        fit(images, None, QUICK, tmp_path, say=None)


def test_a_part_of_a_dataset_keeps_names_ids_and_messages(images):
    part = torch.utils.data.random_split(images, [4, 2], torch.Generator().manual_seed(0))[1]
    names, ids = train._classes(part, None, None)
    assert (names, tuple(ids)) == (shapes.CLASSES, images.annotations.category_ids)
    assert train.item_name(part, 1) == images.name(part.indices[1])


def test_another_layout_keeps_the_momentum_of_each_weight(tmp_path):
    run = make_run()
    for parameter in run.model.parameters():
        run.optimizer.state[parameter]["momentum_buffer"].copy_(torch.randn_like(parameter))
    train.save_state(tmp_path / "state.pt", run, QUICK)
    other = make_run()
    other.model.to(memory_format=torch.channels_last)
    train.restore(tmp_path / "state.pt", train.read_state(tmp_path / "state.pt"), other, QUICK)
    for before, after in zip(run.model.parameters(), other.model.parameters(), strict=True):
        momentum = other.optimizer.state[after]["momentum_buffer"]
        assert torch.equal(momentum, run.optimizer.state[before]["momentum_buffer"])
        assert momentum.stride() == after.stride()


def test_going_on_needs_no_starting_weights(images, weights_file, tmp_path):
    weights_copy = tmp_path / "start.safetensors"
    weights_copy.write_bytes(weights_file.read_bytes())
    config = replace(QUICK, weights=str(weights_copy), backbone=None)
    fit(Interrupting(images, 3), None, config, tmp_path / "run", say=None)
    weights_copy.unlink()
    assert fit(images, None, config, tmp_path / "run", resume=True, say=None).finished


def test_accumulated_gradients_survive_an_interrupt(images, tmp_path):
    """A stop comes after a step, never between the batches of one."""
    config = replace(QUICK, batch_size=2, accumulate=3)
    fit(images, None, config, tmp_path / "whole", say=None)
    assert not fit(Interrupting(images, 8), None, config, tmp_path / "halves", say=None).finished
    fit(images, None, config, tmp_path / "halves", resume=True, say=None)
    assert_equal(weights(tmp_path / "halves"), weights(tmp_path / "whole"))


def test_a_left_out_first_step_leaves_no_trace(monkeypatch):
    """torch's fused SGD would start from whatever the memory held."""
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: torch.full_like(args[0], 1e20))
    model = nn.Linear(3, 3)
    optimizer = train.make_optimizer(model, QUICK, CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.zeros(()))  # a scaler begins with the first loss
    before = model.weight.detach().clone()
    for gradient in (torch.inf, 1.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update(1.0)
        if gradient == torch.inf:
            assert torch.equal(model.weight, before)
    torch.testing.assert_close(model.weight, before - 0.02 * (1 + 5e-4 * before))


@pytest.mark.parametrize("lr", [1e12, 1e25], ids=["loss", "weights and statistics"])
def test_a_loss_that_stays_nan_stops_and_names_images(images, tmp_path, lr):
    fit(images, None, QUICK, tmp_path, say=None)
    good = weights(tmp_path)
    config = replace(QUICK, epochs=30, lr=lr)
    with pytest.raises(NonFiniteError, match=r"in \d+ steps in a row, epoch \d+(.|\n)*train/\d+\.jpg"):
        fit(images, None, config, tmp_path, resume=True, say=None)
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
    assert weights(tmp_path).keys() == good.keys()
    assert len(rows(tmp_path)) < 30


def test_a_gradient_that_is_always_infinite_stops(images, tmp_path, monkeypatch):
    """Also with accumulation, where most batches make no step."""
    monkeypatch.setattr(nn.utils, "get_total_norm", lambda gradients: torch.tensor(torch.inf))
    monkeypatch.setattr(train, "MAX_SKIPPED", 3)
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        fit(images, None, replace(QUICK, epochs=20, accumulate=3), tmp_path, say=None)


def test_statistics_that_hold_nan_are_never_saved(images, tmp_path, monkeypatch):
    """One forward pass overflows; the steps after it are fine, but BatchNorm remembers."""
    real, calls = train.normalize, []

    def normalize(pixels, *args):
        calls.append(1)
        return real(pixels, *args) * (torch.inf if len(calls) == 1 else 1)

    fit(images, None, replace(QUICK, epochs=1), tmp_path, say=None)
    good = weights(tmp_path)
    monkeypatch.setattr(train, "normalize", normalize)
    with pytest.raises(NonFiniteError, match="What was saved before is as it was"):
        fit(images, None, QUICK, tmp_path, resume=True, say=None)
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
    assert good.keys() == weights(tmp_path).keys()


def test_a_single_bad_step_is_left_out(images, tmp_path, monkeypatch):
    """One NaN among the losses: weights stay finite, and training goes on."""
    real, calls = train.MultiBoxLoss.forward, []

    def forward(self, *args):
        losses = real(self, *args)
        calls.append(1)
        return losses._replace(loc=losses.loc * torch.nan) if len(calls) == 2 else losses

    monkeypatch.setattr(train.MultiBoxLoss, "forward", forward)
    result = fit(images, None, QUICK, tmp_path, say=None)
    assert result.finished
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


KEEPING = """
import resource, sys, torch
from ssd.train import keep_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        blocks = [torch.ones(8, 64, 150, 150) for _ in range(4)]  # 46 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
usual = faults()
assert keep_memory()
faults()
print(usual, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_memory_that_is_kept_is_not_cleared_again():
    command = [sys.executable, "-c", KEEPING]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    usual, kept = map(int, result.stdout.split())
    assert kept < usual / 10


# --- Files ------------------------------------------------------------------------------------------------


def make_run():
    model = SSD300(3, "resnet18")
    optimizer = train.make_optimizer(model, QUICK, CPU)
    data = {"class_names": ["a", "b"]}
    return Run(model, None, optimizer, torch.amp.GradScaler("cpu"), train.Progress(), data)


SAVING = """
import os, random, signal, sys, torch
from pathlib import Path
from ssd import train
from ssd.model import SSD300
torch.set_num_threads(1)  # what forks must have no other threads
config = train.TrainConfig(backbone="resnet18")
def make_run():
    model = SSD300(3, "resnet18")
    optimizer = train.make_optimizer(model, config, torch.device("cpu"))
    data = {"class_names": ["a", "b"]}
    return train.Run(model, None, optimizer, torch.amp.GradScaler("cpu"), train.Progress(), data)
def save_without_end(path, run, writer):
    for number in range(10**6):
        for parameter in run.model.parameters():
            parameter.data.fill_(number)
        run.progress.step = number
        train.save_state(path, run, config)
        os.write(writer, b".")
path, moments = Path(sys.argv[1]) / "state.pt", random.Random(1)
run, loaded = make_run(), make_run()
for _ in range(30):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_without_end(path, run, writer)
        finally:
            os._exit(1)
    os.close(writer)
    os.read(reader, 1)
    signal.sigtimedwait([], moments.uniform(0, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    train.restore(path, train.read_state(path), loaded, config)
    values = {v for each in loaded.model.parameters() for v in (each.min().item(), each.max().item())}
    assert values == {float(loaded.progress.step)}, values
    for leftover in path.parent.glob("state.pt.*"):
        leftover.unlink()
    print("whole")
"""


def test_killed_while_saving_the_earlier_state_still_loads(tmp_path):
    """Thirty processes save without end, each killed at a random moment after its first save."""
    result = subprocess.run(
        [sys.executable, "-c", SAVING, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("whole") == 30


FULL = """
import resource, sys, torch
from pathlib import Path
from ssd import checkpoint, train
from ssd.model import SSD300
model = SSD300(3, "resnet18")
config = train.TrainConfig(backbone="resnet18")
run = train.Run(model, None, train.make_optimizer(model, config, torch.device("cpu")),
                torch.amp.GradScaler("cpu"), train.Progress(), {})
folder = Path(sys.argv[1])
train.save_state(folder / "state.pt", run, config)
for suffix in ("safetensors", "pt"):
    checkpoint.save(folder / f"last.{suffix}", model.state_dict(), ("a", "b"))
before = {path.name: path.read_bytes() for path in folder.iterdir()}
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
for save in (
    lambda: train.save_state(folder / "state.pt", run, config),
    lambda: checkpoint.save(folder / "last.safetensors", model.state_dict(), ("a", "b")),
    lambda: checkpoint.save(folder / "last.pt", model.state_dict(), ("a", "b")),
):
    try:
        save()
    except OSError as error:
        print(error)
assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
"""


def test_a_full_disk_is_told_and_the_earlier_files_are_whole(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    for line, name in zip(lines, ("state.pt", "last.safetensors", "last.pt"), strict=True):
        assert f"No space left on the disk for {name}; the earlier one is whole" in line


# --- Devices ----------------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_a_step_does_not_wait_for_the_gpu(images, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_CHECK_EVERY", 1000)
    real = train._Watch.__iter__

    def checked(watch):
        with waiting_for_cuda_fails():  # until the last batch is done
            yield from real(watch)

    world = World(0, 1, torch.device("cuda", 0))
    fit(images, None, replace(QUICK, precision="fp16"), tmp_path / "warm", world=world, say=None)
    monkeypatch.setattr(train._Watch, "__iter__", checked)
    fit(images, None, replace(QUICK, precision="fp16"), tmp_path / "run", world=world, say=None)


def test_a_dataset_without_names_is_told(images, tmp_path):
    with pytest.raises(ValueError, match="pass class_names="):
        fit([images[0], images[1]], None, QUICK, tmp_path, say=None)


def test_category_ids_come_from_the_dataset(images, tmp_path):
    result = fit(images, None, replace(QUICK, epochs=1), tmp_path, say=None)
    assert result.detector.category_ids == images.annotations.category_ids
    assert checkpoint.read(tmp_path / "last.safetensors").category_ids == images.annotations.category_ids


def test_published_checkpoints_are_what_training_starts_from(tmp_path):
    """The published function: plain heads, and the same outputs in eval mode."""
    model = made_model(num_classes=5)
    checkpoint.save(tmp_path / "published.pt", model.state_dict(), ("a", "b", "c", "d"))
    started, _ = transfer(tmp_path / "published.pt", ("a", "b", "c", "d"))
    images = torch.rand(1, 3, 300, 300)
    with torch.no_grad():
        for ours, theirs in zip(started.eval()(images), model(images), strict=True):
            assert torch.equal(ours, theirs)
    assert load_model(tmp_path / "published.pt")[1].num_classes == 5
