import json

import numpy as np
import pytest
import torch

from ssd import pretrained
from ssd.data import load
from ssd.detector import Detector
from ssd.distributed import World
from ssd.evaluate import evaluate_detector
from ssd.shapes import CLASSES, draw_scene, write_dataset


def test_the_same_seed_draws_the_same_scenes(tmp_path):
    for name in ("a", "b"):
        write_dataset(tmp_path / name, 3, 2, seed=4)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 7
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    write_dataset(tmp_path / "c", 3, 2, seed=5)
    assert (tmp_path / "c" / "train.json").read_bytes() != (tmp_path / "a" / "train.json").read_bytes()


def test_nothing_is_replaced(tmp_path):
    (tmp_path / "train.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"train\.json exists already"):
        write_dataset(tmp_path, 2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]


def test_two_at_once_do_not_mix(tmp_path):
    """Another command has written the same folder when this one has drawn its scenes."""
    with pytest.raises(FileExistsError, match="exists already; nothing was overwritten"):
        write_dataset(tmp_path, 2, 0, on_done=lambda: (tmp_path / "train.json").write_text("theirs"))
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]
    assert (tmp_path / "train.json").read_text() == "theirs"


def test_splits_differ_and_one_may_be_left_out(tmp_path):
    write_dataset(tmp_path, 0, 2)
    assert not (tmp_path / "train.json").exists()
    write_dataset(tmp_path / "both", 1, 1)
    assert (tmp_path / "both/train/000000.jpg").read_bytes() != (
        tmp_path / "both/val/000000.jpg"
    ).read_bytes()


@pytest.mark.parametrize("seed", range(20))
def test_boxes_lie_in_the_image_and_vary(seed):
    image, boxes, labels = draw_scene(np.random.default_rng(seed))
    assert image.mode == "RGB"
    assert len(boxes) == len(labels)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= image.size).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 5).all()
    assert set(labels.tolist()) <= set(range(1, len(CLASSES) + 1))


def test_what_varies(tmp_path):
    write_dataset(tmp_path, 60, 0, seed=1)
    content = json.loads((tmp_path / "train.json").read_text())
    counts = np.bincount([each["image_id"] for each in content["annotations"]], minlength=61)[1:]
    assert (counts == 0).any()  # background-only images
    assert counts.max() >= 5
    assert {each["category_id"] for each in content["annotations"]} == set(range(1, len(CLASSES) + 1))
    sides = [max(each["bbox"][2:]) for each in content["annotations"]]
    assert max(sides) > 4 * min(sides)
    assert len({(each["width"], each["height"]) for each in content["images"]}) > 30


def test_the_weights_that_come_with_the_package_detect_new_scenes(tmp_path):
    """Of `docs/shapes_weights.py`, which measures them on 500 scenes; here 24 others, without a network."""
    write_dataset(tmp_path, 0, 24, seed=2026)
    detector = Detector.load("shapes")
    assert detector.class_names == CLASSES
    result = evaluate_detector(detector, load(tmp_path, "val"), World(0, 1, torch.device("cpu")))
    assert result.metrics["AP"] > 0.6
    assert result.metrics["AP50"] > 0.85
    assert pretrained.cached_path("shapes").stat().st_size <= 16e6
