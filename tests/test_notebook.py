import json
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "detect.ipynb"
COLAB = NOTEBOOK.with_name("colab.ipynb")


def test_the_notebook_runs_and_shows_pictures(photos, weights_file, tmp_path, monkeypatch):
    """With small local weights and photographs in place of the published ones, in an empty folder."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    paths = [str(path) for path in sorted(photos.glob("*.jpg"))]
    parameters.source = f"weights = {str(weights_file)!r}\nphotos = {json.dumps(paths)}"
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert kinds.count("text/html") == 1  # the detections
    assert kinds.count("image/png") == 1 + len(paths)
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".png"] == ["detections.png"]


@pytest.mark.slow
def test_the_notebook_for_colab_runs(photos, weights_file, tmp_path, monkeypatch):
    """Without its first cell, which installs this package, and with less of training."""
    notebook = nbformat.read(COLAB, as_version=4)
    (install,) = (cell for cell in notebook.cells if "install" in cell.metadata.get("tags", []))
    assert install.source.endswith("%pip install --quiet {package}")
    install.source = ""
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    paths = [str(path) for path in sorted(photos.glob("*.jpg"))]
    parameters.source = f"weights, minutes = {str(weights_file)!r}, 0.1\nphotos = {json.dumps(paths)}"
    (training,) = (cell for cell in notebook.cells if "200, 20" in cell.source)
    training.source = training.source.replace("200, 20", "16, 4").replace("time=", "workers=0, time=")
    monkeypatch.setenv("PYTHONPATH", str(COLAB.parents[1]))
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert (tmp_path / "my-run" / "last.safetensors").exists()


@pytest.mark.parametrize("path", [NOTEBOOK, COLAB])
def test_notebooks_are_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
