import json


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
