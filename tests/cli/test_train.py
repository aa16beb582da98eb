import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL_LAYOUT
from made_data import as_yolo, picture

import ssd
from ssd import checkpoint, shapes
from ssd.boxes import LAYOUTS
from ssd.cli.train import _datasets
from ssd.loss import LOSSES, Losses, MultiBoxLoss
from ssd.train.config import TrainConfig, field_docs

TINY = ("--backbone", "resnet18", "--epochs", "1", "--batch-size", "2", "--workers", "0")


def test_train_then_detect_and_evaluate(run, scenes, tmp_path):
    status, out, _ = run("train", scenes, *TINY)
    assert status == 0
    assert "epoch 1/1  loss" in out
    assert "AP50" in out
    assert "runs/train-1/best.safetensors" in out.splitlines()[-1]
    weights = tmp_path / "runs/train-1/best.safetensors"
    status, out, _ = run("evaluate", scenes, "--weights", weights, "--json")
    assert status == 0
    facts = json.loads(out)
    assert facts["images"] == 3
    assert set(facts["per_class"]) == set(shapes.CLASSES)
    folder = tmp_path / "runs/evaluate-1"
    assert sorted(os.listdir(folder)) == ["detections.json", "metrics.json"]
    assert json.loads((folder / "metrics.json").read_text()) == facts
    status, out, _ = run("detect", scenes / "val", "--weights", weights, "--no-images", weights=False)
    assert status == 0


def test_train_goes_on_from_its_folder_alone(run, scenes, tmp_path, monkeypatch):
    run("train", scenes, *TINY, "--output", "mine")
    status, out, _ = run("train", "--resume", "mine/last.safetensors", "--epochs", "2")
    assert status == 0
    assert "going on at epoch 2" in out
    assert "epoch 2/2" in out
    saved = json.loads((tmp_path / "mine/config.json").read_text())
    assert saved["data"]["data"] == str(scenes)
    status, _, err = run("train", scenes, *TINY, "--output", "mine")
    assert status == 1
    assert "mine holds a run already" in err
    saved = json.loads((tmp_path / "mine/config.json").read_text())
    assert saved["config"]["epochs"] == 2


def test_a_run_that_python_started_needs_its_dataset_named(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"config": {"milestones": [0.5]}, "data": None}))
    status, _, err = run("train", "--resume", tmp_path)
    assert status == 2
    assert "give its dataset too" in " ".join(err.replace("│", " ").split())


def test_train_usage_errors(run, scenes, tmp_path):
    for arguments, message in (
        ((), "give a dataset, or --resume RUN"),
        (("--resume", scenes, "--preset", "published"), "leave out --output, --preset"),
        ((scenes, "--milestones", "a,b"), "give numbers"),
        ((scenes, "--device", "foo"), "device 'foo' cannot be used here"),
        ((scenes, "--iou-threshold", "7"), "iou_threshold must be in [0, 1]"),
        ((scenes, "--time", "0"), "time must be above 0 and at most 5,000,000 minutes; got 0.0"),
        ((scenes, "--patience", "-1"), "patience must be at least 0; got -1"),
        ((scenes, "--class-weights", "mine"), "class_weights 'mine' is none of none, balanced"),
        ((scenes, "--batch-size", "1"), "batch_size must be at least 2"),
        ((scenes, "--batch-size", "100"), "6 images are too few"),
        ((scenes, "--augmentation", "wild"), "augmentation 'wild' is none of"),
        ((scenes, "--backbone", "vgg16"), "backbone 'vgg16' is none of"),
    ):
        status, _, err = run("train", *arguments)
        assert status == 2, arguments
        assert message in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "runs").exists() or not os.listdir(tmp_path / "runs")
    status, _, err = run("train", tmp_path / "nowhere")
    assert status == 1
    assert "no dataset at" in err
    status, _, err = run("train", "--resume", tmp_path)
    assert status == 1
    assert "is no run folder" in err


def test_bad_annotations_stop_training_unless_lenient(run, scenes, tmp_path):
    content = json.loads((scenes / "train.json").read_text())
    content["annotations"][0]["bbox"][2] = 0
    (tmp_path / "bad.json").write_text(json.dumps(content))
    arguments = ("train", tmp_path / "bad.json", "--images", scenes / "train", *TINY)
    status, _, err = run(*arguments)
    assert status == 1
    assert "zero area: 1" in err
    assert "annotation 1: the box at" in err
    status, out, _ = run(*arguments, "--lenient")
    assert status == 0
    assert "left out of training (zero area: 1)" in out
    status, out, _ = run("check", tmp_path / "bad.json", "--images", scenes / "train")
    assert status == 1
    assert "zero area: 1" in out
    status, out, _ = run("check", tmp_path / "bad.json", "--images", scenes / "train", "--json")
    assert json.loads(out)["fatal"] == 1


@pytest.fixture
def without_val(scenes, tmp_path):
    """The scenes to train on alone."""
    shutil.copytree(scenes / "train", tmp_path / "data" / "train")
    shutil.copy(scenes / "train.json", tmp_path / "data")
    return tmp_path / "data"


def test_images_are_held_out_where_there_is_no_val_split(run, without_val, tmp_path):
    status, out, _ = run("train", without_val, *TINY, "--output", "a")
    assert status == 0
    assert "there is no val split: nothing will be evaluated" in out
    assert not (tmp_path / "a" / "best.safetensors").exists()
    status, out, _ = run("train", without_val, *TINY, "--val-fraction", "0.34", "--output", "r")
    assert status == 0
    assert "2 of 6 images are held out to evaluate on, nearly equal ones together; r/val_images.txt" in out
    assert "4 images, 2 steps an epoch" in out
    assert "AP50" in out
    assert (tmp_path / "r" / "best.safetensors").exists()
    held = (tmp_path / "r" / "val_images.txt").read_text().splitlines()
    assert len(held) == 2
    assert all((without_val / "train" / name).is_file() for name in held)
    # What the file says counts, whatever the images look like by now.
    others = [path.name for path in sorted((without_val / "train").iterdir()) if path.name not in held][:2]
    (tmp_path / "r" / "val_images.txt").write_text("\n".join(others))
    status, out, _ = run("train", "--resume", "r", "--epochs", "2")
    assert status == 0
    assert "2 of 6 images are held out" in out
    assert (tmp_path / "r" / "val_images.txt").read_text().splitlines() == others
    (tmp_path / "r" / "val_images.txt").unlink()
    status, _, err = run("train", "--resume", "r", "--epochs", "3")
    assert status == 1
    assert "val_images.txt is missing, which lists the images that the run held out" in err


def test_a_share_that_leaves_too_few_images_is_named(run, without_val, tmp_path):
    status, _, err = run("train", without_val, *TINY, "--batch-size", "5", "--val-fraction", "0.34")
    assert status == 2
    told = " ".join(err.replace("│", " ").split())
    assert "4 images are too few for a step of batch_size 5" in told
    assert "--val-fraction 0.34 holds out 2 of 6 images" in told
    assert not (tmp_path / "runs").exists()


def test_a_val_split_that_leads_nowhere_is_told_by_check_and_training(run, tmp_path):
    data = as_yolo(tmp_path / "data")
    picture(data / "images" / "train" / "b.jpg")
    (data / "labels" / "train" / "b.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    told = "data.yaml names images/nowhere as val, which is not there"
    assert told in run("check", data)[1]
    assert told in run("train", data, *TINY)[1]


def test_a_run_that_is_there_keeps_its_list(run, without_val, tmp_path):
    run("train", without_val, *TINY, "--val-fraction", "0.34", "--output", "r")
    held = (tmp_path / "r" / "val_images.txt").read_text()
    status, _, err = run("train", without_val, *TINY, "--val-fraction", "0.5", "--output", "r")
    assert status == 1
    assert "r holds a run already" in err
    assert (tmp_path / "r" / "val_images.txt").read_text() == held
    status, _, _ = run("train", without_val, *TINY, "--val-fraction", "0.34", "--batch-size", "50")
    assert status == 2
    assert not (tmp_path / "runs").exists()


def test_a_val_split_wins_over_holding_out(run, scenes, without_val):
    for arguments, message in (
        ((scenes, "--val-fraction", "0.2"), "there is a val split, which is what is evaluated on; leave out"),
        ((without_val, "--val", scenes, "--val-fraction", "0.2"), "--val is what is evaluated on"),
        ((without_val, "--val-fraction", "20"), "--val-fraction is above 0 and below 1, such as 0.2; got 20"),
        ((without_val, "--val-fraction", "0"), "above 0 and below 1"),
        (("--resume", "r", "--val-fraction", "0.2"), "keeps what it held out; leave out --val-fraction"),
    ):
        status, _, err = run("train", *arguments)
        assert status == 2, arguments
        assert message in " ".join(err.replace("│", " ").split())


def test_where_no_run_folder_can_be_made_is_told_before_the_data_is_read(run, tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "gone" / "deep")
    status, _, err = run("train", tmp_path / "nowhere", *TINY)
    assert status == 1
    assert "runs" in err
    assert "no dataset" not in err


def test_one_folder_of_images_serves_training_and_evaluation(scenes, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        shutil.copy(scenes / f"{split}.json", tmp_path / "annotations" / f"instances_{split}.json")
        for path in (scenes / split).iterdir():
            (tmp_path / "photos").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "photos")
    train, val = _datasets({"data": tmp_path, "images": tmp_path / "photos"}, crowd=False)
    assert {train.annotations.root, val.root} == {tmp_path / "photos"}


# --- Other kinds, each by one row or one field ---


def test_a_toy_layout_and_a_toy_loss_by_a_row(run, scenes, tmp_path, photos, monkeypatch):
    monkeypatch.setitem(LAYOUTS, "96", SMALL_LAYOUT)
    made = []

    class Halved(MultiBoxLoss):
        def forward(self, *arguments):
            made.append(self)
            return Losses(*(term / 2 for term in super().forward(*arguments)))

    monkeypatch.setitem(LOSSES, "halved", Halved)
    status, out, err = run("train", scenes, *TINY, "--layout", "96", "--loss", "halved", "--output", "r")
    assert status == 0, err
    assert out.startswith("SSD96 resnet18, 6 classes")
    assert len(made) == 3  # steps
    found = checkpoint.read(tmp_path / "r" / "last.safetensors")
    assert (found.layout, found.config["loss"]) == (SMALL_LAYOUT, "halved")
    status, out, err = run("train", "--resume", "r", "--epochs", "2")
    assert status == 0, err
    detect = ("detect", photos, "--weights", "r/last.safetensors", "--score-threshold", 0, "--no-images")
    status, out, err = run(*detect, weights=False)
    assert status == 0, err
    assert "3 images, 300 objects" in out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--layout", "7"), "layout '7' is none of 300"),
        (("--loss", "focal"), f"loss 'focal' is none of {', '.join(LOSSES)}"),
    ],
)
def test_what_is_no_row_is_told_with_those_that_are(run, scenes, option, message):
    status, _, err = run("train", scenes, *TINY, *option)
    assert status == 2
    assert message in " ".join(err.replace("│", " ").split())


def test_every_field_is_an_option_with_its_own_help(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = run("train", "--help")
    assert status == 0
    shown = " ".join(out.replace("│", " ").split())
    docs = field_docs(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in out, field.name
        assert all(word in shown for word in docs[field.name].replace("`", "").split()), field.name
    assert "[cosine|multistep]" in out
    assert "[default: (90)]" in shown


def test_a_toy_option_by_one_field(scenes, tmp_path):
    """In a copy of the package, whose config gets a field and nothing else."""
    shutil.copytree(
        Path(ssd.__file__).parent, tmp_path / "ssd", ignore=shutil.ignore_patterns("__pycache__", "weights")
    )
    config = tmp_path / "ssd" / "train" / "config.py"
    field = '    rounds: int | None = None\n    """Rounds that are counted, as a toy."""\n'
    text = config.read_text()
    config.write_text(text.replace("    seed: int = 0\n", f"{field}    seed: int = 0\n"))
    assert config.read_text() != text

    def there(*arguments):
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "ssd", *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "Rounds that are counted, as a toy." in " ".join(
        there("train", "--help").replace("│", " ").split()
    )
    there("train", scenes, *TINY, "--rounds", "3", "--output", "r")
    assert json.loads((tmp_path / "r" / "config.json").read_text())["config"]["rounds"] == 3
    there("train", "--resume", "r", "--epochs", "2")
    assert json.loads((tmp_path / "r" / "config.json").read_text())["config"]["rounds"] == 3


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "Expecting value"),
        ("[]", "list indices"),
        ('{"data": {}, "config": []}', "its data and config are not named values"),
        ('{"data": {"data": 3}, "config": {}}', "its data is no path, but 3"),
        ('{"data": {"data": "x"}, "config": {"epochs": "ten"}}', "config.json: "),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_run_whose_config_is_damaged_is_told(run, tmp_path, content, told):
    (tmp_path / "config.json").write_text(content)
    status, _, err = run("train", "--resume", tmp_path)
    message = "".join(err.replace("\u2502", "").split())  # wrapped anywhere
    assert status == 2
    assert told.replace(" ", "") in message
    assert "config.json" in message
    assert "Traceback" not in message


def test_a_run_from_before_there_were_losses_keeps_its_own(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"data": {"data": "data"}, "config": {}}))
    status, _, err = run("train", "--resume", tmp_path, "--loss", "batch", weights=False)
    assert status == 2
    assert "was begun without a choice of --loss" in " ".join(err.split()).replace("│ ", "")
