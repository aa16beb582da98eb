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


def test_an_earlier_demo_stays(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scene.jpg").write_bytes(b"mine")
    status, out, _ = run("demo", "--output", "out")
    assert status == 0
    assert "picture in out/detections-2.jpg" in out
    assert (tmp_path / "out" / "scene.jpg").read_bytes() == b"mine"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "detections-2.jpg",
        "scene-2.jpg",
        "scene.jpg",
    ]
