import json

import pytest
import torch
from conftest import SMALL_LAYOUT, made_model

from ssd.benchmark import STAGES, draw_images, flops, peak_flops, run_benchmark
from ssd.boxes import LAYOUTS
from ssd.detector import Detector


def test_report(detector, tmp_path):
    files = draw_images(tmp_path, 3)
    report = run_benchmark(detector, files, batch_size=2, rounds=4)
    assert tuple(report.stages) == STAGES
    assert all(value > 0 for value in report.stages.values())
    assert report.latency["p50"] <= report.latency["p90"] <= report.latency["p99"]
    assert report.latency["p50"] >= max(report.stages.values())  # medians of sums and of their parts
    assert report.gflops == pytest.approx(2 * flops(4, "resnet18") / report.stages["forward"] / 1e6)
    assert report.peak_gflops > 0
    assert report.peak_memory > 100
    assert json.loads(json.dumps(report.to_dict()))["batch_size"] == 2
    text = str(report)
    for word in (
        "Detector(3 classes",
        ", 300x300, batches of 2",
        "images/s",
        "p99",
        "postprocess",
        "MB",
        "GFLOP/s",
    ):
        assert word in text
    with pytest.raises(ValueError, match="at least one source"):
        run_benchmark(detector, [])


def test_flops_are_those_of_the_layers():
    """The published network is counted at 40.3 GFLOP an image in docs/performance.md; here, by hand."""
    assert flops(81, "resnet50") == pytest.approx(40.3e9, rel=0.01)
    classes = flops(5, "resnet18") - flops(4, "resnet18")
    cells, channels = (38, 19, 10, 5, 3, 1), (256, 512, 512, 256, 256, 128)
    shapes = (4, 6, 6, 6, 4, 4)
    expected = sum(2 * 9 * c * s * n * n for n, c, s in zip(cells, channels, shapes, strict=True))
    assert classes == pytest.approx(expected)


@pytest.mark.parametrize("layout", [SMALL_LAYOUT, LAYOUTS["512"]], ids=["small", "512"])
def test_another_layout(layout, tmp_path):
    detector = Detector(made_model(layout=layout), ("cat", "cup", "person"))
    report = run_benchmark(detector, draw_images(tmp_path, 1), rounds=2)
    assert report.size == layout.size
    operations = flops(4, "resnet18", layout)
    assert operations / flops(4, "resnet18") == pytest.approx((layout.size / 300) ** 2, rel=0.2)
    assert report.gflops == pytest.approx(operations / report.stages["forward"] / 1e6)


def test_peak_is_a_rate():
    assert 1e9 < peak_flops(torch.device("cpu"), torch.float32) < 1e14
