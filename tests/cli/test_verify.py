import json

import pytest

onnx = pytest.importorskip("onnx")


def test_verify(run, tiny_exported, tmp_path):
    status, out, err = run("verify", tiny_exported["onnx"])
    assert (status, err) == (0, "")
    head, *rows, end = out.splitlines()
    assert head.split() == ["exported", "here", "allowed"]
    assert [row.split()[0] for row in rows[:3]] == ["ssd300", "torch", "numpy"]
    assert rows[-3].split()[:2] == ["largest", "score"]
    assert end.startswith("proved: ONNX Runtime computes here what torch did")

    model = onnx.load(tiny_exported["onnx"])
    weights = max(model.graph.initializer, key=lambda each: len(each.raw_data))
    weights.raw_data = bytes(len(weights.raw_data))
    onnx.save(model, tmp_path / "altered.onnx")
    status, out, _ = run("verify", "altered.onnx")
    assert status == 1
    assert out.splitlines()[-1].startswith("NOT PROVED: altered.onnx does not compute here")

    [entry] = model.metadata_props
    values = json.loads(entry.value)
    del values["proof"]  # as earlier versions
    entry.value = json.dumps(values)
    onnx.save(model, tmp_path / "earlier.onnx")
    status, out, err = run("verify", "earlier.onnx")
    assert (status, out) == (1, "")
    assert err.startswith("ssd: earlier.onnx: carries no proof, as files that earlier versions exported")


def test_what_is_no_export(run, weights_file):
    for path, message in (("missing.onnx", "no exported file at"), (weights_file, "no exported file at")):
        status, _, err = run("verify", path)
        assert (status, message in err) == (1, True), err
