import csv
import dataclasses
import inspect
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading

import pytest
from conftest import PHOTOS
from PIL import Image

from ssd import __version__, cli, shapes
from ssd.detector import Detector
from ssd.train import TrainConfig


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, weights_file):
    """Runs the command in an empty folder, and gives its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, weights=True):
        verb, *rest = map(str, arguments)
        if weights and verb == "detect":
            rest = ["--weights", str(weights_file), "--score-threshold", "0.35", *rest]
        monkeypatch.setattr(sys, "argv", ["ssd", verb, *rest])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        return exit.value.code or 0, out, err

    return run


def test_detect_a_folder(run, photos, tmp_path, weights_file):
    status, out, err = run("detect", photos)
    assert status == 0
    folder = tmp_path / "runs" / "detect-1"
    assert sorted(os.listdir(folder)) == [*(f"{name}.jpg" for name in sorted(PHOTOS)), "detections.json"]
    written = json.loads((folder / "detections.json").read_text())
    expected = [each.to_dict() for each in Detector.load(weights_file).stream(photos, score_threshold=0.35)]
    assert written == expected
    assert sum(len(each["detections"]) for each in written) > 0
    lines = out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(f"{photos / 'astronaut.jpg'}: ")
    assert lines[-1].startswith("3 images, ")
    assert lines[-1].endswith("; results in runs/detect-1/detections.json, pictures in runs/detect-1")
    assert "it/s" not in err
    with Image.open(folder / "coffee.jpg") as picture:
        assert picture.size == (600, 400)


def test_each_run_has_its_own_folder(run, photos, tmp_path):
    for _ in range(2):
        assert run("detect", photos / "coffee.jpg", "--no-images")[0] == 0
    assert sorted(os.listdir(tmp_path / "runs")) == ["detect-1", "detect-2"]
    assert os.listdir(tmp_path / "runs" / "detect-2") == ["detections.json"]


def test_one_image_is_shown_as_a_table(run, photos):
    _, out, _ = run("detect", photos / "coffee.jpg", "--max-detections", 2)
    assert len([line for line in out.splitlines() if "%" in line]) == 2


def test_one_bad_image_never_stops_the_rest(run, photos, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    status, out, err = run("detect", "bad.jpg", photos / "coffee.jpg", "gone.jpg", "--output", "out")
    assert status == 1
    assert "left out bad.jpg: not an image" in err
    assert "left out gone.jpg: no such file" in err
    assert "1 image, " in out
    assert "2 left out" in out
    assert sorted(os.listdir(tmp_path / "out")) == ["coffee.jpg", "detections.json"]


def test_only_bad_images(run, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"")
    status, out, _ = run("detect", "bad.jpg", "--output", "out")
    assert status == 1
    assert "0 images, 0 objects, 1 left out; results in out/detections.json" in out
    assert json.loads((tmp_path / "out" / "detections.json").read_text()) == []


def test_urls_and_globs(run, photos, server, tmp_path):
    url = server.serve("/some%20photo.jpg?x=1", (photos / "coffee.jpg").read_bytes(), kind="image/jpeg")
    status, _, _ = run("detect", url, f"{photos}/c*.jpg", "--output", "out")
    assert status == 0
    assert sorted(os.listdir(tmp_path / "out")) == [
        "chelsea.jpg",
        "coffee.jpg",
        "detections.json",
        "some photo.jpg",
    ]


def test_csv(run, photos, tmp_path):
    run("detect", photos, "--format", "csv", "--output", "out", "--no-images")
    with (tmp_path / "out" / "detections.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["source"] for row in rows} <= {str(photos / f"{name}.jpg") for name in PHOTOS}
    assert {row["name"] for row in rows} <= {"cat", "cup", "person"}


def test_yolo(run, photos, tmp_path):
    run("detect", photos, "--format", "yolo", "--output", "out", "--score-threshold", "0.9")
    assert sorted(os.listdir(tmp_path / "out" / "labels")) == [f"{name}.txt" for name in sorted(PHOTOS)]
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\ncup\nperson\n"


def test_yolo_labels_are_named_as_the_photos_beside_them(run, photos, tmp_path):
    (tmp_path / "coffee.jpg").write_bytes((photos / "coffee.jpg").read_bytes())
    run("detect", "coffee.jpg", "--format", "yolo", "--output", ".", "--no-images")
    assert os.listdir(tmp_path / "labels") == ["coffee.txt"]


def test_coco(run, photos, tmp_path):
    for name in ("000000397133", "000000000025"):
        (tmp_path / f"{name}.jpg").write_bytes((photos / "coffee.jpg").read_bytes())
    run("detect", "*.jpg", "--format", "coco", "--output", "out")
    entries = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {(each["image_id"], each["file_name"]) for each in entries} == {
        (397133, "000000397133.jpg"),
        (25, "000000000025.jpg"),
    }
    assert {each["category_id"] for each in entries} <= {1, 2, 3}


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["a/000025.jpg", "000397133.jpg"], [25, 397133]),
        (["7.jpg", "x.jpg"], [1, 2]),
        (["a/7.jpg", "b/7.jpg"], [1, 2]),
        (["a/7.jpg", "a/7.jpg"], [7, 7]),
        (["\u0667.jpg"], [1]),
    ],
)
def test_coco_image_ids(names, ids):
    found = cli._coco_image_ids(names)
    assert [found[name] for name in names] == ids


def test_sources_are_never_overwritten_and_equal_names_get_numbers(run, photos, tmp_path):
    for name in ("a/x.jpg", "b/x.jpg", "x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((photos / "coffee.jpg").read_bytes())
    before = (tmp_path / "a" / "x.jpg").read_bytes()
    status, _, _ = run("detect", "a/x.jpg", "b/x.jpg", "x.png", "--output", "a")
    assert status == 0
    assert (tmp_path / "a" / "x.jpg").read_bytes() == before
    assert sorted(os.listdir(tmp_path / "a")) == ["detections.json", "x-2.jpg", "x-3.jpg", "x.jpg", "x.png"]


def test_nothing_that_exists_is_overwritten(run, photos, tmp_path):
    keep = {"coffee.jpg": b"mine", "detections.json": b"mine", "labels/chelsea.txt": b"mine"}
    for name, content in keep.items():
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "out" / name).write_bytes(content)
    assert run("detect", photos, "--output", "out")[0] == 0
    assert run("detect", photos, "--output", "out", "--format", "yolo")[0] == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in keep} == keep
    assert {"coffee-2.jpg", "coffee-3.jpg", "detections-2.json", "chelsea.jpg", "chelsea-2.jpg"} <= set(
        os.listdir(tmp_path / "out")
    )
    assert sorted(os.listdir(tmp_path / "out" / "labels")) == [
        "astronaut-2.txt",
        "chelsea-2.txt",
        "chelsea.txt",
        "coffee-3.txt",
    ]


def test_names_that_are_long_or_not_unicode(run, photos, tmp_path):
    body = (photos / "coffee.jpg").read_bytes()
    names = [b"b\xff.jpg", b"l" * 250 + b".jpg", "图.jpg".encode()]
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(body)
    status, out, _ = run("detect", ".", "--output", "out", "--format", "json")
    assert status == 0, out
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert sorted(os.fsencode(os.path.basename(each["source"])) for each in written) == sorted(names)
    assert len(os.listdir(tmp_path / "out")) == 4


def test_a_picture_that_cannot_be_written_never_stops_the_rest(run, photos, tmp_path):
    Image.new("RGB", (9000, 100)).save(tmp_path / "wide.webp")  # enlarged, it is too wide for WebP
    status, out, err = run("detect", "wide.webp", photos / "coffee.jpg", "--output", "out")
    assert status == 1
    assert "left out wide.webp" in err
    assert "1 image, " in out
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())) == 1


def test_results_are_kept_when_something_unforeseen_happens(run, photos, tmp_path, monkeypatch):
    from ssd import detections

    def fail_on_chelsea(found):
        if "chelsea" in found.source:
            raise RuntimeError("unforeseen")
        return original(found)

    original = detections.Detections.draw
    monkeypatch.setattr(detections.Detections, "draw", fail_on_chelsea)
    with pytest.raises(RuntimeError, match="unforeseen"):
        run("detect", photos, "--output", "out")
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())) == 1


def test_classes_and_precision(run, photos, tmp_path):
    status, _, _ = run(
        "detect", photos, "--classes", "cat, person", "--precision", "bf16", "--output", "out", "--no-images"
    )
    assert status == 0
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {found["name"] for each in written for found in each["detections"]} <= {"cat", "person"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["detect"], "Missing argument"),
        (["detect", "*.nothing"], "no images in"),
        (["detect", "."], "subfolders are not searched"),
        (["detect", "gone.jpg", "nor/this.jpg"], "no such file: gone.jpg"),
        (["detect", "here.jpg", "--classes", "persom"], "did you mean person"),
        (["detect", "here.jpg", "--score-threshold", "2"], "score-threshold"),
        (["detect", "here.jpg", "--precision", "fp8"], "fp8"),
        (["detect", "here.jpg", "--format", "xml"], "xml"),
        (["detect", "here.jpg", "--batch-size", "0"], "batch-size"),
        (["detect", "here.jpg", "--no-such"], "no-such"),
        (["detect", "here.jpg", "--device", "banana"], "banana"),
        (["download", "local.pt"], "neither a URL"),
        (["detct"], "detct"),
    ],
)
def test_usage_errors_exit_with_2(run, arguments, message, tmp_path, photos):
    if "here.jpg" in arguments:
        (tmp_path / "here.jpg").write_bytes((photos / "coffee.jpg").read_bytes())
    status, out, err = run(*arguments)
    assert status == 2
    assert message in err
    assert out == ""
    assert not (tmp_path / "runs").exists()


def test_missing_weights_end_in_a_line(run, photos, tmp_path):
    status, _, err = run("detect", photos, weights=False)
    assert status == 1
    assert err.splitlines()[0].startswith("downloading https://api.ngc.nvidia.com/")
    assert err.splitlines()[1].startswith("ssd: could not download https://api.ngc.nvidia.com/")
    assert "--weights" in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()
    status, _, err = run("detect", photos, "--weights", "gone.pt", weights=False)
    assert status == 1
    assert err.startswith("ssd: no weights at gone.pt")


def test_damaged_weights_end_in_a_line(run, photos, tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"PK\x03\x04")
    status, _, err = run("detect", photos, "--weights", "bad.pt", weights=False)
    assert status == 1
    assert err.startswith("ssd: bad.pt: damaged")


def test_info(run):
    status, out, _ = run("info")
    assert status == 0
    for part in (__version__, "torch ", "cpu: ", "fp32", "so auto takes ", "coco: ", "not downloaded"):
        assert part in out
    facts = json.loads(run("info", "--json")[1])
    assert facts["versions"]["ssd300"] == __version__
    assert facts["devices"][0]["device"] == "cpu"
    assert facts["weights"][0]["name"] == "coco"
    assert facts["weights"][0]["size"] is None


def test_download(run, server, weights_file):
    url = server.serve("/small.safetensors", weights_file.read_bytes())
    status, out, _ = run("download", url)
    assert status == 0
    assert "resnet18, 3 classes" in out
    assert run("download", url)[0] == 0
    assert len(server.requests) == 1
    assert run("download", url, "--force")[0] == 0
    assert len(server.requests) == 2
    assert run("download", server.url("/gone"))[0] == 1


def test_version_and_help(run):
    assert run("--version")[1] == f"ssd300 {__version__}\n"
    status, out, _ = run("--help")
    assert status == 0
    assert all(verb in out for verb in ("detect", "export", "benchmark", "download", "info"))


# --- In a process of its own ---


def command(*arguments):
    return [sys.executable, "-W", "ignore", "-m", "ssd", *map(str, arguments)]


def test_python_m_ssd_is_the_same():
    result = subprocess.run(command("--version"), capture_output=True, text=True, check=True)
    assert result.stdout == f"ssd300 {__version__}\n"


def test_a_terminal_has_a_progress_bar(photos, tmp_path, weights_file):
    pty, fcntl, termios = (
        pytest.importorskip(name) for name in ("pty", "fcntl", "termios")
    )  # not on Windows
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        command("detect", photos, "--weights", weights_file),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=terminal,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(main, 4096):
            shown += chunk
    except OSError:  # the terminal is gone when its last user is
        pass
    os.close(main)
    assert process.wait(60) == 0
    assert b"3/3" in shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_keep_what_is_done(photos, tmp_path, server, weights_file, number):
    """The third image never comes; the first two are there when the command is interrupted."""
    asked = threading.Event()

    def stall(handler):
        asked.set()
        server.closing.wait(60)

    server.pages["/slow.jpg"] = stall
    process = subprocess.Popen(
        command(
            "detect",
            photos / "coffee.jpg",
            photos / "chelsea.jpg",
            server.url("/slow.jpg"),
            *("--weights", weights_file, "--output", "out", "--batch-size", 1, "--no-images"),
        ),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd(), "PYTHONUNBUFFERED": "1"},
    )
    assert asked.wait(60)
    lines = [process.stdout.readline() for _ in range(2)]
    process.send_signal(number)
    out = process.stdout.readline()
    server.closing.set()  # not earlier: the command would see what came first
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "coffee.jpg" in lines[0]
    assert "2 images" in out
    assert "1 not reached" in out
    assert rest == ""
    assert len(json.loads((tmp_path / "out" / "detections.json").read_text())) == 2


# --- Datasets, training, evaluation -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    shapes.write(folder, 6, 3, seed=1)
    return folder


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


def test_one_folder_of_images_serves_training_and_evaluation(scenes, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        shutil.copy(scenes / f"{split}.json", tmp_path / "annotations" / f"instances_{split}.json")
        for path in (scenes / split).iterdir():
            (tmp_path / "photos").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "photos")
    train, val = cli._datasets({"data": tmp_path, "images": tmp_path / "photos"}, crowd=False)
    assert {train.annotations.root, val.root} == {tmp_path / "photos"}


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


def test_every_choice_of_training_is_an_option():
    given = set(inspect.signature(cli.train).parameters)
    assert {field.name for field in dataclasses.fields(TrainConfig)} <= given


def test_shapes_and_check(run, tmp_path):
    status, out, _ = run("shapes", "s", "--images", "5", "--seed", "2")
    assert status == 0
    assert out.startswith("5 scenes to train on and 1 to evaluate on in s; circle, square")
    status, out, _ = run("check", "s")
    assert status == 0
    assert "train: nothing wrong" in out


def test_evaluation_with_plots(run, scenes, tmp_path):
    status, out, _ = run("evaluate", scenes, "--weights", "shapes", "--plots", "--output", "e")
    assert status == 0
    assert {"precision_recall.png", "confusion.png", "worst"} <= set(os.listdir(tmp_path / "e"))
    assert "IoU 0.50:0.95, all sizes" in out


def test_demo_shows_detections_without_a_network(run, tmp_path):
    status, out, _ = run("demo")
    assert status == 0
    with Image.open(tmp_path / "runs/demo-1/detections.jpg") as picture:
        assert min(picture.size) >= 320
    drawn, detected = map(int, re.search(r"(\d+) shapes drawn, (\d+) detected", out).groups())
    assert drawn > 3
    assert abs(drawn - detected) <= 1


# --- Export, benchmark ---


def test_export_and_detect_with_it(run, photos, tmp_path, weights_file):
    status, out, err = run("export", weights_file, "--nms", "--uint8", "--triton", tmp_path / "models")
    assert (status, err) == (0, "")
    assert re.fullmatch(r"small\.onnx \(\d+\.\d MB\): computes what torch does, .*", out.splitlines()[0])
    assert (tmp_path / "models" / "ssd300" / "config.pbtxt").exists()
    assert out.splitlines()[-1] == "Detect with it: ssd detect PHOTO --weights small.onnx"
    status, out, _ = run(
        "detect", photos, "--weights", "small.onnx", "--score-threshold", 0.35, weights=False
    )
    assert status == 0
    written = json.loads((tmp_path / "runs" / "detect-1" / "detections.json").read_text())
    expected = Detector.load(weights_file, "cpu", "fp32").stream(photos, score_threshold=0.35)
    for found, right in zip(written, expected, strict=True):
        assert [each["name"] for each in found["detections"]] == right.names.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "many"], "neither"),
        (["--format", "pt2", "--triton", "models"], "a Triton repository holds ONNX"),
        (["--precision", "int8"], "int8 goes with openvino"),
        (["--output", "model.bin"], "has to end in .onnx"),
    ],
)
def test_wrong_exports_are_usage_errors(run, weights_file, arguments, message):
    status, _, err = run("export", weights_file, *arguments)
    assert status == 2
    assert message in " ".join(err.replace("│", " ").split())


def test_benchmark(run, photos, weights_file):
    status, out, err = run("benchmark", photos, "--weights", weights_file, "--rounds", 3, "--batch-size", 2)
    assert (status, err) == (0, "")
    for word in ("images/s", "latency p99", "read", "transform", "forward", "postprocess", "peak memory"):
        assert word in out
    status, out, _ = run("benchmark", "--weights", weights_file, "--backend", "onnx", "--rounds", 2, "--json")
    assert status == 0
    facts = json.loads(out)
    assert "ONNX Runtime" in facts["detector"]
    assert set(facts["stages"]) == {"read", "transform", "forward", "postprocess"}


def test_a_benchmark_that_cannot_be(run, weights_file):
    status, _, err = run("benchmark", "--weights", weights_file, "--backend", "onnx", "--precision", "bf16")
    assert status == 2
    assert "onnx holds fp32, fp16, not bf16" in " ".join(err.replace("│", " ").split())


def test_benchmark_of_nothing(run, tmp_path, weights_file):
    (tmp_path / "empty").mkdir()
    status, _, err = run("benchmark", tmp_path / "empty", "--weights", weights_file)
    assert status == 2
    assert "no images in" in err
