import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL_LAYOUT, made_model
from PIL import Image
from torch.utils.data import ConcatDataset, Subset
from training import ALONE, CPU, QUICK, SMALL, Background, Interrupting, assert_equal, rows, weights

from ssd import checkpoint, shapes
from ssd.boxes import FITTED, LAYOUTS
from ssd.data import AnnotationError, DetectionDataset, load
from ssd.detector import Detector
from ssd.evaluate import evaluate_detector
from ssd.loss import LOSSES, Losses, MultiBoxLoss
from ssd.tiles import in_tiles
from ssd.train import PRESETS, TrainConfig, fit
from ssd.train.setup import (
    balanced_weights,
    boxes_of_classes,
    classes_of,
    half_size_of,
    layout_of,
    rate_of,
    set_up,
    settle,
    usable_val,
)


def test_the_published_schedule_by_hand():
    """65 epochs of 100 steps, batch 32: a rise over 300 steps, a tenth from epoch 43 and from epoch 54 on."""
    rate = rate_of(PRESETS["published"], 6500, 32)
    assert rate(0) == pytest.approx(2.6e-3 / 300)
    assert rate(149) == pytest.approx(2.6e-3 / 2)
    assert rate(299) == rate(4299) == pytest.approx(2.6e-3)
    assert rate(4300) == rate(5399) == pytest.approx(2.6e-4)
    assert rate(5400) == rate(6499) == pytest.approx(2.6e-5)
    eight = rate_of(PRESETS["published"], 6500, 8)
    assert eight(1000) == pytest.approx(2.6e-3 / 4)


def test_the_default_schedule_by_hand():
    rate = rate_of(replace(QUICK, lr=0.08), 1000, 32)
    assert rate(0) == pytest.approx(0.08 / 100, rel=1e-3)  # warm-up is at most a tenth of the run
    assert rate(500) == pytest.approx(0.04)
    assert 0 < rate(999) < 1e-6


def test_a_schedule_by_time_by_hand():
    """Of two minutes; the rise takes 300 steps, or the first twelve seconds if those end before."""
    rate = rate_of(replace(QUICK, lr=0.08, time=2.0, epochs=1), 1000, 32)
    assert rate(29, 0.0) == pytest.approx(0.08 * 30 / 300)
    assert rate(29, 6.0) == pytest.approx(0.08 * 0.5 * (1 + math.cos(math.pi / 20)) / 2)
    assert rate(29, 60.0) == rate(5000, 60.0) == pytest.approx(0.04)
    assert rate(5000, 120.0) == rate(5000, 125.0) == pytest.approx(0)
    steps = rate_of(replace(QUICK, lr=0.08, time=2.0, schedule="multistep", milestones=(0.5,)), 1000, 32)
    assert [steps(5000, seconds) for seconds in (59, 61)] == pytest.approx([0.08, 0.008])


def test_boxes_are_counted_as_they_are_trained_on(images):
    annotations = images.annotations
    crowd = np.arange(len(annotations.labels)) % 3 == 0
    whole = DetectionDataset(replace(annotations, crowd=crowd))
    of_images = [whole[i][1]["labels"].tolist() for i in range(len(whole))]

    def by_hand(numbers):
        return [sum(labels.count(k) for labels in map(of_images.__getitem__, numbers)) for k in range(1, 7)]

    assert boxes_of_classes(whole, 6, crowd=False).tolist() == by_hand(range(6))
    joined = ConcatDataset([whole, Subset(whole, [2, 3])])
    assert boxes_of_classes(joined, 6, crowd=False).tolist() == by_hand([*range(6), 2, 3])
    assert boxes_of_classes(whole, 6, crowd=True).sum() == len(crowd)
    with pytest.raises(
        ValueError, match=r"class_weights balanced counts the boxes .* leave class_weights out"
    ):
        boxes_of_classes(Background(), 2, crowd=False)


def test_balanced_weights_leave_the_mean_box_at_1():
    boxes = np.array([900, 100, 0, 25])
    weights = balanced_weights(boxes).double().numpy()
    assert (weights[0], weights[3]) == (1, 1)
    np.testing.assert_allclose(weights[[2, 4]] / weights[1], [3, 6], rtol=1e-6)
    np.testing.assert_allclose((weights[1:] * boxes).sum() / boxes.sum(), 1, rtol=1e-6)
    assert balanced_weights(np.zeros(2, np.int64)).tolist() == [1, 1, 1]
    assert balanced_weights(np.array([1_000_000, 1])).tolist() == [1, pytest.approx(0.999, abs=1e-4), 10]


def test_class_weights_reach_the_loss(images, tmp_path, monkeypatch):
    made = []

    def noted(default_boxes, **given):
        made.append(given)
        return MultiBoxLoss(default_boxes, **given)

    monkeypatch.setitem(LOSSES, "noted", noted)
    for choice in ("none", "balanced"):
        ready = set_up(
            images,
            None,
            replace(SMALL, loss="noted", class_weights=choice),
            tmp_path / "state.pt",
            ALONE,
            class_names=None,
            category_ids=None,
            resume=False,
        )
        loss = ready.stage(False).loss
    counts = boxes_of_classes(images, 6, crowd=False)
    assert [list(each) for each in made] == [[], ["class_weights"]]
    assert torch.equal(made[1]["class_weights"], balanced_weights(counts))
    assert torch.equal(loss.class_weights, balanced_weights(counts))


def test_too_few_images(images, tmp_path):
    with pytest.raises(ValueError, match="6 images are too few for a step of batch_size 4 x accumulate 2"):
        fit(images, None, replace(SMALL, batch_size=4, accumulate=2), tmp_path, say=None)
    assert not (tmp_path / "config.json").exists()


def test_images_that_sit_out_are_told(images, tmp_path):
    lines = []
    fit(images, None, replace(SMALL, epochs=1, batch_size=4), tmp_path, say=lines.append)
    assert "6 images, 1 step an epoch, 1 x cpu; 2 images sit out each epoch" in "\n".join(lines)


def test_sync_batchnorm_needs_cuda(images, tmp_path):
    with pytest.raises(ValueError, match="sync_batchnorm works on CUDA only"):
        fit(images, None, replace(QUICK, sync_batchnorm=True), tmp_path, say=None)


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
    assert len(usable_val(val, val.class_names)) == 3
    detector = Detector(made_model(num_classes=7), val.class_names)
    with pytest.raises(AnnotationError, match=f"{path.name}: is 31x17"):
        evaluate_detector(detector, usable_val(val, val.class_names))
    lenient = DetectionDataset(load(tmp_path / "data", "val"), lenient=True)
    assert len(usable_val(lenient, val.class_names)) == 2


def test_crowd_boxes_are_in_the_dataset_as_the_config_says(images, tmp_path):
    crowd = np.arange(len(images.annotations.labels)) % 2 == 0
    part = Subset(DetectionDataset(replace(images.annotations, crowd=crowd)), range(4))
    with pytest.raises(ValueError, match=r"config says crowd=True.*made with crowd=False"):
        fit(part, None, replace(QUICK, crowd=True), tmp_path, say=None)


def test_crowd_boxes_alone_are_no_training_set_unless_they_are_trained_on(images, tmp_path):
    crowd = replace(images.annotations, crowd=np.ones_like(images.annotations.crowd))
    with pytest.raises(
        AnnotationError, match=r"all \d+ are crowd \(iscrowd\) or difficult; --crowd trains on them"
    ):
        fit(DetectionDataset(crowd), None, SMALL, tmp_path, say=None)
    config = replace(SMALL, epochs=1, crowd=True)
    assert fit(DetectionDataset(crowd, crowd=True), None, config, tmp_path, say=None).finished


def introduction(images, val, tmp_path):
    lines = []
    fit(images, val, replace(SMALL, epochs=1), tmp_path, say=lines.append)
    return "\n".join(lines[:2])


def test_what_is_known_of_the_data_is_told_at_the_start(scenes, images, tmp_path):
    annotations = replace(images.annotations, notes=("2 images have no label file",))
    empty = replace(annotations.select([0]), boxes=np.zeros((0, 4)), starts=np.zeros(2, np.int64))
    empty = replace(
        empty, **{name: getattr(empty, name)[:0] for name in ("labels", "crowd", "areas", "usable")}
    )
    val = replace(empty, notes=("read from elsewhere",))
    told = introduction(DetectionDataset(annotations), val, tmp_path)
    assert "\ntrain: 2 images have no label file\n" in told
    assert "\nval: read from elsewhere\nval: there is no box to find, so all numbers will be -1\n" in told
    assert "no val split" not in told


def test_without_a_val_split_the_start_says_what_that_means(images, tmp_path):
    told = introduction(images, None, tmp_path)
    assert "there is no val split: nothing will be evaluated, and there will be no best weights" in told
    assert "--val-fraction 0.2" in told
    assert not (tmp_path / "best.safetensors").exists()


def test_under_torchrun_the_world_has_to_be_passed(images, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="pass world=world"):
        fit(images, None, QUICK, tmp_path, say=None)


def test_a_part_of_a_dataset_keeps_names_and_ids(images):
    part = torch.utils.data.random_split(images, [4, 2], torch.Generator().manual_seed(0))[1]
    names, ids = classes_of(part, None, None)
    assert (names, tuple(ids)) == (shapes.CLASSES, images.annotations.category_ids)


def test_labels_of_other_classes_are_refused(scenes, images, tmp_path):
    names = images.class_names
    for others in (names[::-1], names[:-1], (*names, "heart")):
        with pytest.raises(ValueError, match=r"train\.json: its classes are .*, but those of training are"):
            fit(images, None, QUICK, tmp_path, class_names=others, say=None)
    other = DetectionDataset(load(scenes, "train", class_names=names[::-1]))
    with pytest.raises(ValueError, match=f"its classes are {', '.join(names[::-1])}, but"):
        fit(ConcatDataset([images, other]), None, QUICK, tmp_path, class_names=names, say=None)
    with pytest.raises(AnnotationError, match="its classes are not those of training"):
        fit(images, ConcatDataset([images, other]), QUICK, tmp_path, say=None)
    both = ConcatDataset([images, Subset(images, [0])])
    assert classes_of(both, names, None) == (names, [])
    assert usable_val(both, names) is both


def test_images_that_are_trained_on_and_evaluated_on_are_told(scenes, images, tmp_path):
    (tmp_path / "link").symlink_to(scenes)
    train = load(tmp_path / "link", "train")
    told = introduction(images, train.select([0, 2, 3]), tmp_path / "a")
    assert "val: 3 of its 3 images are trained on, too; its numbers say little" in told
    told = introduction(Subset(images, [0, 1, 4]), train.select([0, 2, 3]), tmp_path / "b")
    assert "val: 1 of its 3 images are trained on, too" in told
    assert "trained on, too" not in introduction(images, load(scenes, "val"), tmp_path / "c")


def test_a_dataset_without_names_is_told(images, tmp_path):
    with pytest.raises(ValueError, match="pass class_names="):
        fit([images[0], images[1]], None, QUICK, tmp_path, say=None)


def test_category_ids_come_from_the_dataset(images, tmp_path):
    result = fit(images, None, replace(SMALL, epochs=1), tmp_path, say=None)
    assert result.detector.category_ids == images.annotations.category_ids
    assert checkpoint.read(tmp_path / "last.safetensors").category_ids == images.annotations.category_ids


def test_fine_tuning(images, weights_file, tmp_path):
    lines = []
    config = replace(QUICK, epochs=1, weights=str(weights_file), backbone=None, lr=None)
    fit(images, None, config, tmp_path, say=lines.append)
    assert "new: conf (other classes than its 3)" in lines[0]
    found = checkpoint.read(tmp_path / "last.safetensors")
    assert (found.num_classes, found.head_norm) == (7, False)
    assert found.config["lr"] == 0.008


def test_going_on_needs_no_starting_weights(images, tmp_path):
    start = tmp_path / "start.safetensors"
    model = made_model(layout=SMALL_LAYOUT)
    checkpoint.save(start, model.state_dict(), ("cat", "cup", "person"), layout=SMALL_LAYOUT)
    config = replace(SMALL, weights=str(start), backbone=None)
    fit(Interrupting(images, 3), None, config, tmp_path / "run", say=None)
    start.unlink()
    assert fit(images, None, config, tmp_path / "run", resume=True, say=None).finished


def test_what_may_not_change_when_a_run_goes_on(images, toy_layout, tmp_path):
    stopped = replace(SMALL, epochs=2)
    fit(Interrupting(images, 3), None, stopped, tmp_path, say=None)
    for change, message in (
        ({"batch_size": 3}, r"middle of an epoch.*batch_size 2 \(now 3\)"),
        ({"ema": 0.0}, "ema cannot be switched"),
        ({"freeze": 2}, "of a run with freeze 0, and goes on with it, not 2"),
        ({"backbone": "resnet34"}, "of a run with backbone resnet18, and goes on with it, not resnet34"),
        ({"weights": "shapes", "lr": 0.02}, "of a run with weights None"),
        ({"head_norm": False}, "of a run with head_norm True"),
        ({"layout": "toy"}, "of a run with layout small, and goes on with it, not toy"),
    ):
        with pytest.raises(checkpoint.CheckpointError, match=message):
            fit(images, None, replace(stopped, **change), tmp_path, resume=True, say=None)
    with pytest.raises(checkpoint.CheckpointError, match=r"is of other classes: circle, square"):
        fit(
            Interrupting(images, 99),
            None,
            stopped,
            tmp_path,
            class_names=list("abcdef"),
            resume=True,
            say=None,
        )
    assert fit(images, None, replace(stopped, channels_last=False), tmp_path, resume=True, say=None).finished


# --- Empty datasets ---------------------------------------------------------------------------------------


class Empty(Background):
    def __len__(self):
        return 0


def test_an_empty_dataset_is_told(images, tmp_path):
    with pytest.raises(AnnotationError, match="there are no images to train on"):
        fit(Empty(), None, SMALL, tmp_path, say=None)
    with pytest.raises(AnnotationError, match="there are no images to train on"):
        fit(Subset(images, []), None, SMALL, tmp_path, say=None)
    for val in (Empty(), []):
        with pytest.raises(AnnotationError, match="there are no images to evaluate on"):
            fit(Background(), val, SMALL, tmp_path, say=None)
    with pytest.raises(AnnotationError, match="there are no images to evaluate on"):
        fit(images, Subset(images, []), SMALL, tmp_path, say=None)
    assert not (tmp_path / "config.json").exists()


# --- Layouts and losses -----------------------------------------------------------------------------------


@pytest.fixture
def toy_layout(monkeypatch):
    """Another input size, by one row."""
    layout = replace(SMALL_LAYOUT, scales=(12, 28, 52, 76, 100), aspect_ratios=((2,), (2, 3), (3,), (2,)))
    monkeypatch.setitem(LAYOUTS, "toy", layout)
    return layout


@pytest.mark.parametrize("choice", ["layout", "loss"])
def test_unknown_names_are_told_with_the_known_ones(images, tmp_path, choice):
    with pytest.raises(ValueError, match=f"{choice} 'mine' is none of (300|batch), "):
        fit(images, None, replace(QUICK, **{choice: "mine"}), tmp_path, say=None)
    assert not (tmp_path / "config.json").exists()


def test_a_network_of_another_layout_trains_resumes_and_detects(scenes, images, toy_layout, tmp_path):
    """With one row in a table, and no change in the package."""
    val, config = load(scenes, "val"), replace(QUICK, layout="toy", evaluate_every=2)
    lines = []
    fit(images, val, config, tmp_path / "whole", say=None)
    assert not fit(Interrupting(images, 3), val, config, tmp_path / "run", say=lines.append).finished
    assert lines[0].startswith("SSD96 resnet18, 6 classes")
    result = fit(images, val, config, tmp_path / "run", resume=True, say=None)
    assert result.finished
    assert result.detector.layout == toy_layout
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))

    found = checkpoint.read(tmp_path / "run" / "last.safetensors")
    assert found.layout == toy_layout
    assert found.config["layout"] == "toy"
    detector = Detector.load(tmp_path / "run" / "last.safetensors", precision="fp32")
    assert detector.layout == toy_layout
    detected = detector(val.path(0), score_threshold=0.01)
    assert len(detected)
    expected = result.detector(val.path(0), score_threshold=0.01)
    np.testing.assert_array_equal(detected.boxes, expected.boxes)

    with pytest.raises(checkpoint.CheckpointError, match="with layout toy, and goes on with it, not 300"):
        fit(images, val, replace(config, layout="300"), tmp_path / "run", resume=True, say=None)


def test_weights_of_another_layout_are_a_start(images, weights_file, toy_layout, tmp_path):
    lines = []
    config = replace(QUICK, epochs=1, weights=str(weights_file), layout="toy")
    result = fit(images, None, config, tmp_path, say=lines.append)
    assert result.detector.layout == checkpoint.read(tmp_path / "last.safetensors").layout == toy_layout
    assert lines[0].startswith(f"SSD96 resnet18 from {weights_file} (SSD300): loaded ")


def test_without_a_layout_the_weights_decide(images, tmp_path):
    """Also when the run goes on, for which it need not be said."""
    file = tmp_path / "start.safetensors"
    model = made_model(num_classes=7, layout=SMALL_LAYOUT)
    checkpoint.save(file, model.state_dict(), images.class_names, layout=SMALL_LAYOUT)
    config = replace(QUICK, weights=str(file))
    assert layout_of(config.layout, images) is None
    assert not fit(Interrupting(images, 3), None, config, tmp_path / "run", say=None).finished
    result = fit(images, None, config, tmp_path / "run", resume=True, say=None)
    assert result.finished
    assert result.detector.layout == SMALL_LAYOUT


def test_without_weights_the_published_layout_is_what_is_noted():
    assert settle(QUICK, CPU).layout == "300"
    assert settle(replace(QUICK, weights="coco"), CPU).layout is None
    assert settle(SMALL, CPU).layout == "small"


def test_another_loss_is_a_function_and_a_row(images, monkeypatch, tmp_path):
    seen = []

    def squares(default_boxes):
        """The loc outputs squared, and nothing of the classes."""

        def loss(loc, conf, boxes, labels):
            seen.append((default_boxes.shape, loc.shape, conf.shape, boxes.shape, labels.shape))
            return Losses(loc.float().square().mean((1, 2)), conf.new_full((len(conf),), 7).float())

        return loss

    monkeypatch.setitem(LOSSES, "squares", squares)
    fit(Subset(images, range(2)), None, replace(QUICK, epochs=1, loss="squares"), tmp_path, say=None)
    (row,) = rows(tmp_path)
    assert (float(row["conf_loss"]), float(row["loc_loss"]) > 0) == (7, True)
    assert seen == [((8732, 4), (2, 4, 8732), (2, 7, 8732), (2, 8732, 4), (2, 8732))]
    assert checkpoint.read(tmp_path / "last.safetensors").config["loss"] == "squares"


@pytest.mark.parametrize("parts", ["whole", "subset", "concatenated"])
def test_a_fitted_layout_is_that_of_the_boxes_to_train_on(images, parts):
    """Of a subset, of these images alone."""
    annotations, train = images.annotations, images
    if parts == "subset":
        train, annotations = Subset(images, [1, 2]), annotations.select([1, 2])
    if parts == "concatenated":
        train = ConcatDataset([images, Subset(images, [0])])
        annotations = annotations.select([*range(len(images)), 0])
    pixels = np.repeat(annotations.sizes, np.diff(annotations.starts), axis=0)
    boxes = torch.from_numpy((annotations.boxes / np.tile(pixels, 2)).clip(0, 1).astype(np.float32))
    for name, origin in FITTED.items():
        assert layout_of(name, train) == LAYOUTS[origin].fitted(boxes)
    side = 160  # where tiles are what the network sees, an object is larger to it
    assert annotations.sizes.min() > side
    tiled = layout_of("fitted", train, tiles=side)
    assert tiled != layout_of("fitted", train)
    assert tiled == LAYOUTS["300"].fitted(in_tiles(boxes, torch.from_numpy(pixels), side))


def test_a_network_of_a_fitted_layout_is_trained_saved_and_gone_on_with(images, tmp_path, monkeypatch):
    monkeypatch.setitem(LAYOUTS, "small", SMALL_LAYOUT)
    monkeypatch.setitem(FITTED, "fitted-small", "small")
    config = replace(QUICK, layout="fitted-small")
    layout = layout_of("fitted-small", images)
    assert layout != SMALL_LAYOUT
    fit(images, None, replace(config, epochs=1), tmp_path, say=None)
    result = fit(Interrupting(images, 99), None, config, tmp_path, resume=True, say=None)  # boxes unknown
    assert result.finished
    assert result.detector.layout == layout == checkpoint.read(tmp_path / "last.safetensors").layout


def test_a_layout_cannot_be_fitted_to_boxes_that_are_not_known():
    with pytest.raises(ValueError, match=r"known, with the sizes of their images.*choose layout 512"):
        layout_of("fitted-512", Background())


def test_training_and_evaluation_see_tiles(images, tmp_path):
    """As of the saved weights, evaluated in tiles by themselves."""
    config = replace(SMALL, tiles=160, evaluate_every=1, epochs=1)
    assert min(images.annotations.sizes.min(0)) > 160
    result = fit(images, images, config, tmp_path, say=None)
    best = Detector.load(tmp_path / "last.safetensors", precision="fp32")
    alone = evaluate_detector(best, images.annotations, batch_size=2, tiles=160)
    assert result.evaluation.metrics == pytest.approx(alone.metrics)
    assert checkpoint.read(tmp_path / "last.safetensors").config["tiles"] == 160
    whole = fit(images, None, replace(config, tiles=None), tmp_path / "whole", say=None)
    assert whole.folder != result.folder
    assert rows(tmp_path)[0]["loss"] != rows(tmp_path / "whole")[0]["loss"]


def test_from_values_by_chance_half_of_a_run_is_at_half_the_size():
    layout = LAYOUTS["300"]
    assert (
        half_size_of(TrainConfig(), layout) == half_size_of(TrainConfig(layout="512"), LAYOUTS["512"]) == 0.5
    )
    assert half_size_of(TrainConfig(weights="coco"), layout) == 0
    assert half_size_of(TrainConfig(weights="coco", half_size=0.3), layout) == 0.3
    assert half_size_of(PRESETS["published"], layout) == 0
    odd = replace(layout, size=257, maps=(33, 17, 9, 5, 3, 1))
    assert half_size_of(TrainConfig(), odd) == half_size_of(TrainConfig(half_size=0), odd) == 0
    with pytest.raises(ValueError, match="half_size 0.5: a network of 257 pixels and 6 maps has no half"):
        half_size_of(TrainConfig(half_size=0.5), odd)
