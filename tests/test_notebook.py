import json
from pathlib import Path

import nbclient
import nbformat

NOTEBOOK = Path(__file__).parents[1] / "examples" / "detect.ipynb"


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


def test_the_notebook_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
