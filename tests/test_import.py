import re
import subprocess
import sys
from pathlib import Path

import pytest

import ssd

ROOT = Path(__file__).parents[1]


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


def test_import_builds_nothing_opens_no_socket_and_needs_no_heavy_package():
    """All public names are resolved, for `import ssd` alone does next to nothing."""
    result = run(
        "import socket, sys\n"
        "def forbidden(*a, **k): raise AssertionError('socket')\n"
        "socket.socket.connect = socket.getaddrinfo = forbidden\n"
        "import torch\n"
        "torch.nn.Module.__init__ = forbidden\n"
        "import ssd, ssd.hub, ssd.cli, hubconf\n"
        "for name in ssd.__all__: getattr(ssd, name)\n"
        "heavy = {'skimage', 'pycocotools', 'matplotlib', 'supervision', 'scipy', 'onnx', 'onnxruntime',"
        " 'onnxscript', 'openvino', 'nncf'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    assert result.returncode == 0, result.stderr


def test_import_alone_does_not_wait_for_torch():
    result = run("import sys, ssd, ssd.cli; assert 'torch' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_public_names():
    assert set(ssd.__all__) <= set(dir(ssd))
    for name in (*ssd.__all__, *ssd.__all__):  # twice, for importing a module binds its name
        assert callable(getattr(ssd, name))
    result = run("import ssd; ssd.checkpoint.save, ssd.boxes.match")
    assert result.returncode == 0, result.stderr
    with pytest.raises(AttributeError, match="no attribute 'Detecter'"):
        _ = ssd.Detecter


def test_imports_go_one_way():
    """The layers of docs/design.md: a module imports only from those before it."""
    order = ["labels", "boxes", "web", "distributed", "images", "checkpoint", "loss", "transforms", "model"]
    order += [
        "postprocess",
        "inference",
        "backends",
        "detections",
        "detector",
        "hub",
        "data",
        "shapes",
        "check",
        "evaluate",
        "plots",
    ]
    order += ["train", "export", "benchmark", "cli"]
    assert set(order) == {path.stem for path in (ROOT / "ssd").glob("[!_]*.py")}
    for place, name in enumerate(order):
        source = (ROOT / "ssd" / f"{name}.py").read_text()
        for later in order[place:]:
            assert f"from ssd.{later} import" not in source, (name, later)
            assert not re.search(rf"from ssd import .*\b{later}\b", source), (name, later)
