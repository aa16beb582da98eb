"""README.md and the site's pages stay true: their snippets and commands run, the list of files is complete.

Blocks of ``python`` are executed, and the calls of ``ssd`` in those of ``sh``, each in a folder of its own
that has what it names. A block that cannot run has ``<!-- not run: why -->`` in the line before it.
"""

import re
import shlex
import shutil
import sys
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
import torchvision
import typer
from conftest import made_model

from ssd import checkpoint, cli, pretrained, shapes
from ssd.calibration import Calibration
from ssd.export import export
from ssd.labels import COCO_NAMES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = {"serve.md", "video.md"}
"""Pages whose Python has a test of its own: tests/serve/test_docs.py, tests/test_tracking.py."""


def blocks(language, *, not_run=False):
    """Each block of a language, with its page and line as a name."""
    pattern = rf"^(<!-- not run: .+ -->\n)?```{language}\n(.*?)^```"
    for page in PAGES:
        text = page.read_text("utf-8")
        for found in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
            if not_run or not found[1]:
                line = text.count("\n", 0, found.start(2))
                yield pytest.param(found[2], id=f"{page.relative_to(ROOT)}:{line}")


@pytest.fixture(scope="session")
def things(tmp_path_factory, photos):
    """What the snippets name; made weights stand in the cache for the published ones. Do not change it."""
    things = tmp_path_factory.mktemp("things")
    shutil.copytree(photos, things / "photos")
    shutil.copytree(photos, things / "more")
    shutil.copy(photos / "chelsea.jpg", things / "photo.jpg")
    checkpoint.save(things / "my-model.pt", made_model(num_classes=81).state_dict(), COCO_NAMES)
    shapes.write_dataset(things / "data", 4, 2)
    shutil.copy(things / "data" / "val" / "000000.jpg", things / "scene.jpg")
    torch.save(torchvision.models.resnet18().state_dict(), things / "resnet18.pth")
    return things


@pytest.fixture
def folder(things, tmp_path, monkeypatch):
    """A folder with `things`, to work in."""
    shutil.copytree(things, tmp_path, dirs_exist_ok=True)
    path = pretrained.cached_path("coco")
    path.parent.mkdir(parents=True)
    shutil.copy(things / "my-model.pt", path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SNIPPETS = [each for each in blocks("python") if not any(page in each.id for page in ELSEWHERE)]
EXPORTING = [each for each in SNIPPETS if ".onnx" in each.values[0]]


@pytest.mark.parametrize("snippet", [each for each in SNIPPETS if each not in EXPORTING])
def test_python_snippets_run(folder, snippet):
    run(snippet)


@pytest.mark.slow
@pytest.mark.parametrize("snippet", EXPORTING)
def test_python_snippets_with_exported_files_run(folder, snippet):
    run(snippet)


def make_named(block):
    """What a block takes up from another."""
    if "shapes.onnx" in block:
        export("shapes", "shapes.onnx", nms=True, uint8=True)
    if "best-calibrated" in block and "ssd calibrate" not in block:
        shapes_weights = checkpoint.read(pretrained.cached_path("shapes"))
        checkpoint.save(
            "best-calibrated.safetensors",
            shapes_weights.state_dict,
            shapes_weights.class_names,
            score_thresholds=[0.5] * len(shapes_weights.class_names),
            calibration=Calibration(margin=0.1, coverage=0.9, matched=50),
        )


def run(snippet):
    snippet = snippet.replace('"."', repr(str(ROOT)))
    if "my-model.onnx" in snippet:
        export("my-model.pt", "my-model.onnx")
    make_named(snippet)
    snippet = snippet.replace("epochs=20,", "epochs=1, batch_size=2, workers=0,")
    with mpl.rc_context({"backend": "agg"}):
        exec(compile(snippet, "a page", "exec"), {"__name__": "__main__"})


def commands_of(block):
    """The calls of ``ssd`` in a block, which may build on each other."""
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    return [
        shlex.split(line[re.search(r"(^|&& |-m )ssd ", line).end() - 4 :], comments=True)
        for line in lines
        if re.search(r"(^|&& |-m )ssd ", line)
    ]


def blocks_of_commands(**options):
    return [each for each in blocks("sh", **options) if commands_of(each.values[0])]


@pytest.mark.parametrize("block", blocks_of_commands(not_run=True))
def test_options_of_commands_are_known(block):
    """Also of those that are not run, or only by the slow test."""
    group = typer.main.get_command(cli.app)
    for words in commands_of(block):
        _, verb, rest = group.resolve_command(group.context_class(group), words[1:])
        verb.make_parser(verb.context_class(verb)).parse_args(rest)


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks_of_commands())
def test_commands_run(folder, block, monkeypatch):
    commands = commands_of(block)
    make_named(block)
    if "runs/train-1/best.safetensors" in block and ["ssd", "train"] not in [each[:2] for each in commands]:
        (folder / "runs" / "train-1").mkdir(parents=True)
        shutil.copy(pretrained.cached_path("shapes"), folder / "runs" / "train-1" / "best.safetensors")
    for words in commands:
        if words[1] == "shapes":
            shutil.rmtree(folder / "data")
            words[words.index("--images") + 1] = "4"
        if words[1] == "benchmark":
            words += ["--rounds", "2"]
        if words[1] == "train":
            if "--epochs" in words:
                words[words.index("--epochs") + 1] = "1"
            elif "--resume" not in words:
                words += ["--epochs", "1"]
            if "--backbone" not in words and "--weights" not in words and "--resume" not in words:
                words += ["--backbone", "resnet18"]
            if "--time" in words:  # minutes, in place of epochs
                words[words.index("--time") + 1] = "0.01"
            words += ["--workers", "0", "--batch-size", "2"]
            if "imagenet" in words:
                words[words.index("imagenet")] = str(folder / "resnet18.pth")
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert not exit.value.code, words


def test_the_list_of_files_is_complete():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    listed = set(re.findall(r"^(\S+(?:\.py|/)) {2,}\S", text, re.MULTILINE))
    modules = {f"ssd/{path.name}" for path in (ROOT / "ssd").glob("[!_]*.py")}
    folders = {f"ssd/{path.parent.name}/" for path in (ROOT / "ssd").glob("*/__init__.py")}
    others = {"hubconf.py", "ssd/weights/", "tests/", "benchmarks/", "examples/", "docs/"}
    assert listed == modules | folders | others
    assert all((ROOT / name).exists() for name in listed)


def test_links_to_files_of_the_project():
    for page in (*PAGES, ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"):
        for target in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), (page, target)


def test_the_table_of_verbs_is_the_commands():
    rows = re.findall(
        r"^\| `ssd (\w+)` \| (.*) \|$", (ROOT / "docs" / "command.md").read_text(), re.MULTILINE
    )
    assert rows == [(name, verb.help) for name, verb in cli.VERBS.items()]
