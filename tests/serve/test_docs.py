"""The examples of docs/serve.md run."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from serving import serving

from ssd.cli import serve
from ssd.cli.options import with_choices

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
COMMANDS = re.findall(r"^(?:curl .*|printf .*\n.*)", PAGE, re.MULTILINE)


@pytest.fixture
def address(detector, photos, tmp_path, monkeypatch):
    shutil.copy(photos / "coffee.jpg", tmp_path / "photo.jpg")
    shutil.copy(photos / "chelsea.jpg", tmp_path / "other.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(vars(detector), "class_names", ("person", "dog", "cat"))
    with serving(detector) as found:
        yield found


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("command", COMMANDS)
def test_commands(address, command, tmp_path):
    command = command.replace("http://127.0.0.1:8000", address)
    if "--json" in command:
        version = subprocess.run(["curl", "--version"], capture_output=True, text=True, check=True).stdout
        if tuple(map(int, re.search(r"curl (\d+)\.(\d+)", version).groups())) < (7, 82):
            pytest.skip("this curl has no --json")
    done = subprocess.run(["bash", "-c", f"{command} --silent"], capture_output=True, text=True, check=True)
    if "--output" in shlex.split(command):
        with Image.open(tmp_path / "boxes.jpg") as picture:
            assert picture.size == (600, 400)
    else:
        first = json.loads(done.stdout)["results"][0]
        assert (first["source"] in ("photo.jpg", "image 0"), first["width"]) == (True, 600)


def test_the_snippet(address, capsys):
    [snippet] = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(snippet.replace("http://127.0.0.1:8000", address), "docs/serve.md", "exec"), {})
    assert capsys.readouterr().err == ""


def test_options_and_their_defaults():
    parameters = with_choices(serve.serve).__signature__.parameters
    for name in set(re.findall(r"--([a-z]+(?:-[a-z]+)*)(?=[ `])", PAGE)) - {
        "form",
        "data-binary",
        "output",
        "json",
    }:
        assert name.replace("-", "_") in parameters, name
    for name, default in re.findall(r"^\| `--([\w-]+)` \| ([\d,]+) \|", PAGE, re.MULTILINE):
        assert parameters[name.replace("-", "_")].default == int(default.replace(",", ""))
