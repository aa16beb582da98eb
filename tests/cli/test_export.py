import json
import re

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
