import sys

import pytest

from ssd import cli, shapes


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, weights_file):
    """Runs the command in an empty folder, and gives its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, weights=True):
        verb, *rest = map(str, arguments)
        if weights and verb == "detect":
            rest = ["--weights", str(weights_file), "--score-threshold", "0.35", *rest]
        monkeypatch.setattr(sys, "argv", ["ssd", verb, *rest])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        return exit.value.code or 0, out, err

    return run


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    shapes.write_dataset(folder, 6, 3, seed=1)
    return folder
