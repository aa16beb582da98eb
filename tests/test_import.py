"""What imports what: one way, and nothing heavy before it is needed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ssd

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ssd"

# A module or folder imports only from those before it; so do the modules of a folder, whose kinds (in
# braces) do not import each other.
ORDER = [
    *("errors", "choices", "terminal", "memory", "threads", "files", "web", "labels", "signatures"),
    *("devices", "distributed", "boxes"),
    *("rgb", "images", "sources", "video", "frames", "pixels", "drawing", "detections"),
    *("tracking", "calibration"),
    *("transforms", "augment"),
    *("resnet", "pickles", "containers", "networks", "hf", "pretrained", "checkpoint", "model"),
    *("loss", "postprocess", "fused"),
    *("data", "backends", "tiles", "detector", "hub", "shapes", "check", "evaluate", "card", "plots"),
    *("benchmark", "triton", "proof", "export", "standalone", "browser", "train", "serve", "cli"),
]
FOLDERS = {
    "data": [
        *("names", "annotations", "judge", "builder", "folders", "outlines", "pairs", "yolo_settings"),
        {"coco", "yolo", "voc"},
        *("formats", "dataset", "holdout"),
    ],
    "backends": [
        "base",
        "graph",
        "eager",
        {"onnx", "pt2", "torchscript"},
        "openvino",
    ],  # which is made of ONNX
    "train": ["config", "examples", "optim", "state", "folder", "setup", "watch", "loop"],
    "serve": ["batches", "bodies", "app"],
    "cli": [
        "options",
        "common",
        "coco_ids",
        "results",
        "window",
        "shards",
        {
            *("detect", "train", "evaluate", "data", "demo", "export", "serve", "verify", "benchmark"),
            *("weights", "push", "calibrate"),
        },
    ],
}

ONLY = {
    "skimage": {"hub"},
    "matplotlib": {"plots"},
    "pycocotools": {"evaluate"},
    "faster_coco_eval": {"evaluate"},
    "torchvision": set(),
    "supervision": {"detections", "tracking"},
    "trackers": {"tracking"},
    "tkinter": {"cli.window"},
    "apex": {"train.optim"},
    "onnx": set(),
    "onnxscript": {"backends.onnx"},
    "onnxruntime": {"backends.onnx", "templates.detect"},
    "openvino": {"backends.openvino"},
    "nncf": {"backends.openvino"},
    "yaml": {"data.yolo_settings"},
    "av": {"video"},
    "huggingface_hub": {"card", "hf"},
    "fastapi": {"serve.app"},
    "starlette": {"serve.app"},
    "pydantic": {"serve.app"},
    "python_multipart": {"serve.bodies"},
    "uvicorn": {"cli.serve"},
}
"""Packages that only some modules import."""

WITHOUT_TORCH = [
    *("errors", "choices", "terminal", "memory", "threads", "files", "web", "labels", "signatures"),
    *("rgb", "images", "sources", "frames", "pixels", "drawing", "detections"),
    *("data", "data.formats", "backends", "train", "train.config", "cli", "cli.options"),
]


def modules():
    """Every module's name within the package, and its tree."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name not in ("", "__main__"):
            yield name, ast.parse(path.read_text())


def imported(tree):
    """The full names of what a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{each.name}" for each in node.names)


def imports_of_ours(tree):
    """The parts of the names below ``ssd``: of ``ssd.data.judge.listed``, ("data", "judge", "listed")."""
    for name in imported(tree):
        if name.startswith("ssd."):
            yield tuple(name.split(".")[1:])


def test_the_order_names_every_module():
    there = {name for name, _ in modules()}
    assert set(ORDER) == {name for name in there if "." not in name}
    for folder, names in FOLDERS.items():
        flat = {name for each in names for name in ([each] if isinstance(each, str) else each)}
        assert flat == {name.split(".")[1] for name in there if name.startswith(f"{folder}.")}


def test_imports_go_one_way():
    for name, tree in modules():
        top, *rest = name.split(".")
        for other, *inner in imports_of_ours(tree):
            if other.startswith("__"):  # ssd's own version
                continue
            assert ORDER.index(other) <= ORDER.index(top), (name, other)
            if other != top or top not in FOLDERS:
                assert other != top, name
                continue
            rank = {
                module: i
                for i, each in enumerate(FOLDERS[top])
                for module in ([each] if isinstance(each, str) else each)
            }
            if rest and inner and inner[0] in rank:
                assert rank[inner[0]] < rank[rest[0]], (name, inner)


def test_heavy_packages_are_imported_where_they_are_used_and_nowhere_else():
    found = {package: set() for package in ONLY}
    for name, tree in modules():
        for each in imported(tree):
            if (package := each.split(".")[0]) in found:
                found[package].add(name)
    assert found == ONLY


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
        " 'onnxscript', 'openvino', 'nncf', 'torchvision', 'av', 'trackers', 'tkinter', 'huggingface_hub'}"
        " & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["", *WITHOUT_TORCH])
def test_what_needs_no_torch_does_not_wait_for_it(name):
    module = f"ssd.{name}".rstrip(".")
    result = run(f"import sys, {module}; assert 'torch' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_a_first_picture_does_not_wait_for_what_compiles(tmp_path):
    """Of torchvision, or of torch's compiler, which much of torch imports, it would take twice as long."""
    result = run(
        "import sys, torch; before = set(sys.modules)\n"
        "import ssd.cli.detect, ssd.cli.demo\n"
        f"ssd.cli.demo.demo(output=ssd.cli.demo.Path({str(tmp_path)!r}))\n"
        "heavy = {'torchvision', 'torch._dynamo', 'torch._inductor', 'sympy', 'skimage', 'pycocotools'}\n"
        "assert not heavy & (set(sys.modules) - before), heavy & (set(sys.modules) - before)"
    )
    assert result.returncode == 0, result.stderr


def test_public_names():
    assert set(ssd.__all__) <= set(dir(ssd))
    for name in (*ssd.__all__, *ssd.__all__):  # twice, for importing a module binds its name
        assert callable(getattr(ssd, name))
    result = run("import ssd; ssd.checkpoint.save, ssd.boxes.match")
    assert result.returncode == 0, result.stderr
    with pytest.raises(AttributeError, match="no attribute 'Detecter'"):
        _ = ssd.Detecter


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("ssd.data", "load DetectionDataset AnnotationError find_split usable_for_evaluation"),
        ("ssd.train", "TrainConfig PRESETS fit Result"),
        ("ssd.backends", "load of_model Backend"),
        ("ssd.export", "export write_triton"),
        ("ssd.checkpoint", "save read CheckpointError DownloadError"),
        ("ssd.cli", "main"),
        ("ssd", "SSD300 Detector Detections load_image load_model"),
    ],
)
def test_promised_names_stay(module, names):
    result = run(f"from {module} import {', '.join(names.split())}")
    assert result.returncode == 0, result.stderr


def test_the_order_is_that_of_the_tree():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    listed = re.findall(r"^ssd/(\w+)(?:\.py|/) {2,}", text, re.MULTILINE)
    assert [name for name in listed if name != "weights"] == ORDER


@pytest.mark.parametrize("folder", ["benchmarks", "docs", "examples"])
def test_what_scripts_import_of_ours_is_there(folder):
    """Nobody runs most of them for months."""
    for path in (ROOT / folder).glob("*.py"):
        for name in imported(ast.parse(path.read_text())):
            if name.startswith("ssd."):
                *home, last = name.split(".")[1:]
                place = PACKAGE.joinpath(*home)
                file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
                assert last in bound(file) or (place / f"{last}.py").exists() or (place / last).is_dir(), path


def bound(file):
    """The names that a module's statements bind, also within its functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.ImportFrom):
            yield from (each.asname or each.name for each in node.names)
