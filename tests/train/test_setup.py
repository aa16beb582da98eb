import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL_LAYOUT, made_model
from PIL import Image
from torch.utils.data import ConcatDataset, Subset
from training import QUICK, SMALL, Background, Interrupting, assert_equal, rows, weights

from ssd import checkpoint, shapes
from ssd.boxes import LAYOUTS
from ssd.data import AnnotationError, DetectionDataset, load
from ssd.detector import Detector
from ssd.evaluate import evaluate_detector
from ssd.loss import LOSSES, Losses
from ssd.model import load_model, transfer
from ssd.train import PRESETS, fit
from ssd.train.setup import classes_of, new_network, rate_of, usable_val


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


def test_too_few_images(images, tmp_path):
    with pytest.raises(ValueError, match="6 images are too few for a step of batch_size 4 x accumulate 2"):
        fit(images, None, replace(SMALL, batch_size=4, accumulate=2), tmp_path, say=None)
    assert not (tmp_path / "config.json").exists()


def test_images_that_sit_out_are_told(images, tmp_path):
    lines = []
    fit(images, None, replace(SMALL, epochs=1, batch_size=4), tmp_path, say=lines.append)
    assert "2 images sit out each epoch" in "\n".join(lines)


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


def test_fine_tuning(images, weights_file, tmp_path):
    lines = []
    config = replace(QUICK, epochs=1, weights=str(weights_file), backbone=None, lr=None)
    fit(images, None, config, tmp_path, say=lines.append)
    assert "skipped the class heads" in lines[0]
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
    with pytest.raises(ValueError, match=f"{choice} 'mine' is none of {getattr(QUICK, choice)}"):
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


def test_weights_of_another_layout_are_refused(weights_file, toy_layout, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="of a layout of 300 pixels, not of layout toy; choose layout 300"):
        new_network(replace(QUICK, weights=str(weights_file), layout="toy"), ("a", "b"))
    model = made_model(num_classes=3, layout=toy_layout)
    file = tmp_path / "toy.safetensors"
    checkpoint.save(file, model.state_dict(), ("a", "b"), layout=toy_layout)
    started, _ = new_network(replace(QUICK, weights=str(file), layout="toy"), ("c",))
    assert started.layout == toy_layout
    with pytest.raises(ValueError, match="of a layout of 96 pixels, not of layout 300; choose layout toy"):
        new_network(replace(QUICK, weights=str(file)), ("a", "b"))
    monkeypatch.delitem(LAYOUTS, "toy")
    with pytest.raises(ValueError, match="not of layout 300; train without weights"):
        new_network(replace(QUICK, weights=str(file)), ("a", "b"))


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
