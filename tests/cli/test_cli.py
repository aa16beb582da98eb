import subprocess
import sys

import pytest

from ssd import __version__
from ssd.cli import VERBS, Verb


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["detect"], "Missing argument"),
        (["detect", "*.nothing"], "no images in"),
        (["detect", "."], "subfolders are not searched"),
        (["detect", "gone.jpg", "nor/this.jpg"], "no such file: gone.jpg"),
        (["detect", "here.jpg", "--classes", "persom"], "did you mean person"),
        (["detect", "here.jpg", "--score-threshold", "2"], "score-threshold"),
        (["detect", "here.jpg", "--precision", "fp8"], "fp8"),
        (["detect", "here.jpg", "--format", "xml"], "xml"),
        (["detect", "here.jpg", "--batch-size", "0"], "batch-size"),
        (["detect", "here.jpg", "--no-such"], "no-such"),
        (["detect", "here.jpg", "--device", "banana"], "banana"),
        (["download", "local.pt"], "neither a URL"),
        (["detct"], "Did you mean 'detect'?"),
    ],
)
def test_usage_errors_exit_with_2(run, arguments, message, tmp_path, photos):
    if "here.jpg" in arguments:
        (tmp_path / "here.jpg").write_bytes((photos / "coffee.jpg").read_bytes())
    status, out, err = run(*arguments)
    assert status == 2
    assert message in err
    assert out == ""
    assert not (tmp_path / "runs").exists()


def test_version_and_help(run):
    assert run("--version")[1] == f"ssd300 {__version__}\n"
    status, out, _ = run("--help")
    assert status == 0
    assert all(verb in out for verb in ("detect", "export", "benchmark", "download", "info"))


def test_python_m_ssd_is_the_same():
    result = subprocess.run(
        [sys.executable, "-m", "ssd", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"ssd300 {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_that_begins_as_the_list_says(run, verb):
    status, out, err = run(verb, "--help", weights=False)
    assert (status, err) == (0, "")
    shown = " ".join(out.replace("│", " ").split())
    assert VERBS[verb].help in shown
    status, out, _ = run("--help")
    assert VERBS[verb].help[:40] in " ".join(out.replace("│", " ").split())


TOY_VERB = '''
from typing import Annotated

import typer


def greet(name: str, loud: Annotated[bool, typer.Option("--loud", help="With an exclamation mark.")] = False):
    """It is polite."""
    typer.echo(f"hello {name}{'!' if loud else ''}")
'''


def test_a_toy_verb_by_one_file_and_one_row(run, tmp_path, monkeypatch):
    (tmp_path / "toy_verb.py").write_text(TOY_VERB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(VERBS, "greet", Verb("toy_verb:greet", "Say hello."))
    assert run("greet", "world", "--loud") == (0, "hello world!\n", "")
    assert "Say hello." in run("--help")[1]
    shown = run("greet", "--help")[1]
    assert "It is polite." in shown
    assert "With an exclamation mark." in shown
    assert run("greet")[0] == 2


def test_the_list_of_verbs_imports_none_of_them():
    code = (
        "import sys\n"
        "from ssd.cli import main\n"
        "sys.argv = ['ssd', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'PIL', 'tqdm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
