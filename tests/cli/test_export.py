import json
import os
import re
import shlex
from pathlib import Path

import pytest

from ssd.detector import Detector


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


@pytest.mark.skipif(os.name == "nt", reason="cmd.exe quotes otherwise")
def test_the_line_to_go_on_with_can_be_pasted(run, monkeypatch, weights_file, tmp_path):
    monkeypatch.setattr("ssd.cli.export.export", lambda *_, **__: made)
    made = tmp_path / "my models" / "it's one.onnx"
    made.parent.mkdir()
    made.touch()
    _, out, _ = run("export", weights_file, "--output", made)
    line = out.splitlines()[-1].removeprefix("Detect with it: ")
    assert shlex.split(line) == ["ssd", "detect", "PHOTO", "--weights", str(made)]


def test_folders_and_pages(run, monkeypatch, weights_file, tmp_path):
    """What writes them is tried in tests/test_standalone.py and tests/test_browser.py."""

    def write(*arguments):
        asked.append(arguments)
        Path(arguments[1]).touch()
        return Path(arguments[1])

    asked = []
    monkeypatch.setattr("ssd.cli.export.write_standalone", write)
    monkeypatch.setattr("ssd.cli.export.write_page", write)
    status, out, err = run("export", weights_file, "--standalone", "made/one")
    assert (status, err) == (0, "")
    assert out.splitlines()[1] == "Prove it, there or on another machine: python made/one/detect.py --verify"
    status, out, err = run("export", weights_file, "--html", "a.html", "--precision", "fp16")
    assert (status, err, out) == (0, "", "a.html (0.0 MB): open it in a browser, on any device\n")
    assert asked == [
        (str(weights_file), Path("made/one"), "fp32"),
        (str(weights_file), Path("a.html"), "fp16", None),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "many"], "neither"),
        (["--format", "pt2", "--triton", "models"], "a Triton repository holds ONNX"),
        (["--precision", "int8"], "int8 goes with openvino"),
        (["--output", "model.bin"], "has to end in .onnx"),
        (["--standalone", "a", "--html", "b.html"], "leave out --html"),
        (["--standalone", "a", "--format", "pt2", "--batch", "2"], "leave out --format, --batch"),
        (["--html", "a.html", "--output", "b.onnx"], "leave out --output"),
        (["--onnxruntime-web", "a"], "is for --html"),
        (["--html", "a.onnx"], "has to end in .html"),
        (["--standalone", "a", "--precision", "int8"], "int8 goes with openvino"),
    ],
)
def test_wrong_exports_are_usage_errors(run, weights_file, arguments, message):
    status, _, err = run("export", weights_file, *arguments)
    assert status == 2
    assert message in " ".join(err.replace("│", " ").split())
