"""README.md stays true: its snippets and commands run, its table of files is complete."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import made_model

from ssd import checkpoint, cli
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
    path = checkpoint.cached_path("coco")
    path.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "my-model.pt", path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("snippet", blocks("python"))
def test_python_snippets_run(folder, snippet):
    exec(compile(snippet.replace('"."', repr(str(ROOT))), "README.md", "exec"), {})


def commands():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line[line.index("ssd ") :] for line in lines if re.search(r"(^|&& )ssd ", line)]


@pytest.mark.parametrize("command", commands())
def test_commands_run(folder, server, photos, command, monkeypatch):
    url = server.serve("/000000397133.jpg", (photos / "coffee.jpg").read_bytes(), kind="image/jpeg")
    command = re.sub(r"http://\S+", url, command)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert not exit.value.code


def test_the_list_of_files_is_complete():
    listed = set(re.findall(r"^(\S+\.py) {2,}\S", README, re.MULTILINE))
    modules = {f"ssd/{path.name}" for path in (ROOT / "ssd").glob("[!_]*.py")}
    assert listed == modules | {"hubconf.py"}


def test_links_to_files_of_the_project():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
