import json

import pytest
from conftest import LEFT_OUT, with_metadata

onnx = pytest.importorskip("onnx")


def test_verify(run, tiny_exported, tmp_path):
    status, out, err = run("verify", tiny_exported["onnx"])
    assert (status, err) == (0, "")
    head, *rows, end = out.splitlines()
    assert head.split() == ["exported", "here", "allowed"]
    assert [row.split()[0] for row in rows[:3]] == ["ssd300", "torch", "numpy"]
    assert rows[-3].split()[:2] == ["largest", "score"]
    assert end.startswith("proved: ONNX Runtime computes here what torch did")

    values = json.loads(onnx.load(tiny_exported["onnx"]).metadata_props[0].value)
    carried = values["proof"] | {"accuracy": "0.500 AP on\nmy data"}
    with_metadata(tiny_exported["onnx"], tmp_path / "known.onnx", {"proof": carried})
    _, out, _ = run("verify", "known.onnx")
    assert out.splitlines()[-2] == r"the weights that it was made of: 0.500 AP on\nmy data"
    assert "the weights that" not in "".join(rows)

    model = onnx.load(tiny_exported["onnx"])
    weights = max(model.graph.initializer, key=lambda each: len(each.raw_data))
    weights.raw_data = bytes(len(weights.raw_data))
    onnx.save(model, tmp_path / "altered.onnx")
    status, out, _ = run("verify", "altered.onnx")
    assert status == 1
    assert out.splitlines()[-1].startswith("NOT PROVED: altered.onnx does not compute here")

    second = {"version": 2, "proof": LEFT_OUT}
    with_metadata(tiny_exported["onnx"], tmp_path / "earlier.onnx", second)
    status, out, err = run("verify", "earlier.onnx")
    assert (status, out) == (1, "")
    assert err.startswith("ssd: earlier.onnx: carries no proof, as files that earlier versions exported")


def test_what_is_no_export(run, weights_file):
    there = "is no exported file, by its name; ssd export makes one of weights"
    for path, message in (("missing.onnx", "no exported file at"), (weights_file, there)):
        status, _, err = run("verify", path)
        assert (status, message in err) == (1, True), err
