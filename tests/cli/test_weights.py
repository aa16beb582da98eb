import json

from ssd import __version__


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
