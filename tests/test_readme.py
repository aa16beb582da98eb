"""README.md stays true: its snippets and commands run, its table of files is complete."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import made_model

from ssd import checkpoint, cli, pretrained, shapes
from ssd.export import export
from ssd.labels import COCO_NAMES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, photos, monkeypatch):
    """A folder with what the snippets name; made weights stand in the cache for the published ones."""
    shutil.copytree(photos, tmp_path / "photos")
    shutil.copytree(photos, tmp_path / "more")
    shutil.copy(photos / "chelsea.jpg", tmp_path / "photo.jpg")
    state = made_model(num_classes=81).state_dict()
    checkpoint.save(tmp_path / "my-model.pt", state, COCO_NAMES)
    path = pretrained.cached_path("coco")
    path.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "my-model.pt", path)
    shapes.write_dataset(tmp_path / "data", 4, 2)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("snippet", blocks("python"))
def test_python_snippets_run(folder, snippet):
    snippet = snippet.replace('"."', repr(str(ROOT)))
    if "my-model.onnx" in snippet:
        export("my-model.pt", "my-model.onnx")
    snippet = snippet.replace("epochs=20,", "epochs=1, batch_size=2, workers=0,")
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})


def blocks_of_commands():
    """The commands of each block, which may build on each other."""
    found = []
    for block in blocks("sh"):
        lines = block.splitlines()
        commands = [
            line[re.search(r"(^|&& |-m )ssd ", line).end() - 4 :] for line in lines if " ssd " in f" {line}"
        ]
        found += [commands] if commands else []
    return found


@pytest.mark.slow
@pytest.mark.parametrize("commands", blocks_of_commands(), ids=lambda commands: commands[0])
def test_commands_run(folder, server, photos, commands, monkeypatch):
    url = server.serve("/000000397133.jpg", (photos / "coffee.jpg").read_bytes(), kind="image/jpeg")
    for command in commands:
        words = shlex.split(re.sub(r"http://\S+", url, command))
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
            words += ["--workers", "0", "--batch-size", "2"]
            if "imagenet" in words:
                words[words.index("imagenet")] = str(folder / "resnet18.pth")
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert not exit.value.code, command


def test_the_list_of_files_is_complete():
    listed = set(re.findall(r"^(\S+(?:\.py|/)) {2,}\S", README, re.MULTILINE))
    modules = {f"ssd/{path.name}" for path in (ROOT / "ssd").glob("[!_]*.py")}
    folders = {f"ssd/{path.parent.name}/" for path in (ROOT / "ssd").glob("*/__init__.py")}
    others = {"hubconf.py", "ssd/weights/", "tests/", "benchmarks/", "examples/"}
    assert listed == modules | folders | others
    assert all((ROOT / name).exists() for name in listed)


def test_links_to_files_of_the_project():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text()):
            assert (page.parent / target).exists(), (page, target)
