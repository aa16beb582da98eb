import re

from PIL import Image


def test_demo_shows_detections_without_a_network(run, tmp_path):
    status, out, _ = run("demo")
    assert status == 0
    with Image.open(tmp_path / "runs/demo-1/detections.jpg") as picture:
        assert min(picture.size) >= 320
    drawn, detected = map(int, re.search(r"(\d+) shapes drawn, (\d+) detected", out).groups())
    assert drawn > 3
    assert abs(drawn - detected) <= 1
