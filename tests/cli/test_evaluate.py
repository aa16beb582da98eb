import json
import os
import shutil

from ssd import pretrained, shapes
from ssd.data import load
from ssd.detector import Detector
from ssd.evaluate import evaluate_detector
from ssd.export import export


def test_evaluation_tells_what_it_left_out(run, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "data")
    gone = sorted((tmp_path / "data" / "val").iterdir())[0]
    gone.unlink()
    arguments = ("evaluate", "data", "--weights", "shapes", "--output", "e")
    status, _, err = run(*arguments)
    assert status == 1
    assert gone.name in err
    status, out, _ = run(*arguments, "--lenient")
    assert status == 0
    assert "left out of these numbers (missing image: 1)" in out
    facts = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert (facts["images"], facts["left_out"]) == (2, {"missing image": 1})
    status, _, err = run(*arguments)
    assert status == 2
    assert "e holds an evaluation already" in " ".join(err.replace("│", " ").split())


def test_without_a_val_split_those_that_training_held_out_are_measured(run, scenes, tmp_path):
    shutil.copytree(scenes / "train", tmp_path / "data" / "train")
    shutil.copy(scenes / "train.json", tmp_path / "data")
    arguments = ("evaluate", "data", "--weights", "r/best.safetensors")
    (tmp_path / "r").mkdir()
    shutil.copy(pretrained.fetch("shapes"), tmp_path / "r" / "best.safetensors")
    status, _, err = run(*arguments)
    assert (status, "there is no val split" in err) == (1, True)

    names = sorted(os.listdir(scenes / "train"))
    (tmp_path / "r" / "val_images.txt").write_text(f"{names[1]}\n{names[4]}\n")
    for weights in ("r/best.safetensors", "r"):
        status, out, _ = run(*arguments[:-1], weights, "--output", tmp_path / f"e{len(weights)}")
        assert status == 0
        told = "data has no val split: these are the images that r/val_images.txt lists"
        assert out.splitlines()[0].startswith(told.replace("/", os.sep))
        facts = json.loads((tmp_path / f"e{len(weights)}" / "metrics.json").read_text())
        assert facts["metrics"] == _of_two(scenes, [1, 4])
    status, out, _ = run("calibrate", "r", "data", "--output", "c.safetensors")
    assert (status, "val_images.txt" in out) == (0, True)
    # Of other weights, or where there is a val split, that list says nothing.
    assert "there is no val split" in run("evaluate", "data", "--weights", "shapes")[2]
    assert "there is no test split" in run(*arguments, "--split", "test")[2]
    status, out, _ = run("evaluate", scenes, "--weights", "r")
    assert (status, "val_images.txt" in out) == (0, False)
    (tmp_path / "r" / "val_images.txt").write_text("gone.jpg\n")
    assert "1 of 1 held-out images are not among its images" in run(*arguments)[2]


def _of_two(scenes, which):
    data = load(scenes, "train", class_names=shapes.CLASSES).select(which)
    return evaluate_detector(Detector.load("shapes"), data).metrics


def test_tiles_voting_and_flips_are_those_of_the_detector(run, scenes, tmp_path):
    detector, data, found = Detector.load("shapes"), load(scenes, "val"), []
    for options, wanted in (
        ((), {}),
        (("--voting",), {"voting": True}),
        (("--flips",), {"flips": True}),
        (("--tiles", 200), {"tiles": 200}),
    ):
        out = tmp_path / f"e{len(found)}"
        status, _, _ = run("evaluate", scenes, "--weights", "shapes", "--output", out, *options)
        assert status == 0
        facts = json.loads((out / "metrics.json").read_text())
        assert {name: facts[name] for name in ("tiles", "voting", "flips") if name in facts} == wanted
        assert facts["metrics"] == evaluate_detector(detector, data, **wanted).metrics
        found.append(facts["metrics"]["AP"])
    assert len(set(found)) == 4


def test_options_that_a_file_with_nms_cannot_serve_are_a_mistake(run, scenes, tmp_path):
    path = export("shapes", tmp_path / "nms.torchscript", "torchscript", nms=True)
    status, out, err = run("evaluate", scenes, "--weights", path, "--voting")
    assert (status, out) == (2, "")
    assert "NMS is inside this exported file" in err
    assert not (tmp_path / "runs").exists()


def test_evaluation_with_plots(run, scenes, tmp_path):
    """Of scenes with one object that the truth lacks."""
    data = shutil.copytree(scenes, tmp_path / "data")
    truth = json.loads((data / "val.json").read_text())
    truth["annotations"].pop()
    (data / "val.json").write_text(json.dumps(truth))
    status, out, _ = run("evaluate", data, "--weights", "shapes", "--plots", "--output", "e")
    assert status == 0
    assert {"precision_recall.png", "confusion.png", "worst"} <= set(os.listdir(tmp_path / "e"))
    assert "IoU 0.50:0.95, all sizes" in out


def test_where_nothing_can_be_written_is_told_before_the_work(run, scenes, tmp_path):
    (tmp_path / "runs").write_text("a file")
    status, out, err = run("evaluate", scenes, "--weights", "shapes")
    assert (status, out) == (1, "")
    assert "runs" in err
    (tmp_path / "runs").unlink()
    status, _, _ = run("evaluate", tmp_path / "nowhere", "--weights", "shapes")
    assert status == 1
    assert not (tmp_path / "runs").exists()


def test_numbers_are_printed_though_they_cannot_be_written(run, scenes, tmp_path, monkeypatch):
    def full(contents):
        raise OSError(28, "No space left on device", str(next(iter(contents))))

    monkeypatch.setattr("ssd.cli.evaluate.write_new", full)
    status, out, err = run("evaluate", scenes, "--weights", "shapes", "--output", "e")
    assert status == 1
    assert "IoU 0.50:0.95, all sizes" in out
    assert "No space left" in err


def test_detections_that_are_there_stay(run, scenes, tmp_path, monkeypatch):
    """Before the work; and where another command writes them meanwhile."""
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "detections.json").write_text("mine")
    arguments = ("evaluate", scenes, "--weights", "shapes", "--output", "e")
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert "e holds detections.json already" in " ".join(err.replace("│", " ").split())
    monkeypatch.setattr("ssd.cli.evaluate._WRITTEN", ())
    status, out, err = run(*arguments)
    assert status == 1
    assert "IoU 0.50:0.95, all sizes" in out
    assert err.splitlines()[-1] == "ssd: e/detections.json exists already; nothing was overwritten"
    assert os.listdir(tmp_path / "e") == ["detections.json"]
    assert (tmp_path / "e" / "detections.json").read_text() == "mine"


def test_what_is_known_of_the_data_is_told(run, scenes, tmp_path):
    """Of a split without boxes; as JSON, beside the numbers."""
    content = json.loads((scenes / "val.json").read_text()) | {"annotations": []}
    (tmp_path / "val.json").write_text(json.dumps(content))
    arguments = ("evaluate", "val.json", "--images", scenes / "val", "--weights", "shapes")
    note = "val: there is no box to find, so all numbers will be -1"
    status, out, _ = run(*arguments, "--output", "a")
    assert (status, note in out) == (0, True)
    status, out, err = run(*arguments, "--output", "b", "--json")
    assert json.loads(out)["boxes"] == 0
    assert note in err
