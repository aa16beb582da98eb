"""examples/ray_batch.py on a local Ray: the results of one process, whatever dies."""

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_LAYOUT
from PIL import Image

from ssd import checkpoint
from ssd.detector import Detector

pytest.importorskip("pyarrow", reason="the example writes Parquet by pyarrow")
EXAMPLE = Path(__file__).parents[1] / "examples" / "ray_batch.py"

# A worker dies at its second batch, once; the file is there before anything of the batch.
DYING = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import ray, ray_batch
class Dying(ray_batch.Detect):
    def __call__(self, row):
        mark = {mark!r}
        if os.path.exists(mark + "-one") and not os.path.exists(mark + "-dead"):
            open(mark + "-dead", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        open(mark + "-one", "w").close()
        return super().__call__(row)
ray_batch.Detect = Dying
try:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
except Exception as error:  # its processes have 30 seconds to come up
    sys.exit("no local Ray: " + str(error))
images = sys.argv[3:]
print(ray_batch.detect(images, ray_batch.Path(sys.argv[1]), weights=sys.argv[2], threshold=0.3, batch_size=2))
"""


@pytest.fixture
def collection(tmp_path, tiny_model):
    """Seven images, of which the fourth cannot be read, and weights."""
    rng = np.random.default_rng(0)
    images = [str(tmp_path / f"{i}.png") for i in range(7)]
    for i, path in enumerate(images):
        Image.fromarray(rng.integers(0, 256, (60 + i, 80, 3), np.uint8)).save(path)
    Path(images[3]).write_bytes(b"\x89PNG\r\n\x1a\n")
    weights = tmp_path / "tiny.safetensors"
    checkpoint.save(weights, tiny_model.state_dict(), ("cat", "cup", "person"), layout=SMALL_LAYOUT)
    return images, weights


def require_results(folder, images, weights):
    """Require in the Parquet files what one process finds."""
    import pyarrow.parquet as pq

    assert not list(folder.glob(".*"))
    rows = [row for file in folder.glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    rows = {row["source"]: row for row in rows}
    assert set(rows) == set(images)
    assert "3.png" in rows[images[3]]["error"]
    good = [name for name in images if name != images[3]]
    for found in Detector.load(weights, "cpu")(good, batch_size=2, score_threshold=0.3):
        row = rows[found.source]
        assert row["error"] is None
        assert (row["height"], row["width"]) == found.image_size
        assert row["names"] == found.names.tolist()
        np.testing.assert_allclose(row["scores"], found.scores, rtol=1e-5)
        np.testing.assert_allclose(np.reshape(row["boxes"], (-1, 4)), found.boxes, rtol=1e-4, atol=1e-3)


class FakeData:
    """As much of Ray Data as the example uses, in this process."""

    def from_items(self, items, override_num_blocks):
        assert 1 <= override_num_blocks <= len(items)
        self.items = items
        return self

    def map(self, function, fn_constructor_args, **resources):
        self.actor = function(*fn_constructor_args)
        return self

    def iter_rows(self):
        return map(self.actor, self.items)


def test_what_is_written_is_not_done_again(collection, tmp_path, monkeypatch):
    images, weights = collection
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(data=FakeData()))
    spec = importlib.util.spec_from_file_location("ray_batch", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    def run(names):
        out = tmp_path / "out"
        return example.detect(names, out, weights=str(weights), threshold=0.3, batch_size=2)["images"]

    assert run(images[:2]) == 2
    assert run(images) == 5
    require_results(tmp_path / "out", images, weights)
    assert run(images) == 2  # those of the batch with an image that cannot be read


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("ray"),
    reason="ray is not installed, which not every platform and Python has",
)
def test_on_a_local_ray_a_worker_that_dies_loses_nothing(collection, tmp_path):
    images, weights = collection
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(folder=str(EXAMPLE.parent), mark=str(tmp_path / "mark")))

    def run(*names):
        done = subprocess.run(
            [sys.executable, script, tmp_path / "out", weights, *names],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
            env=os.environ
            | {
                "OMP_NUM_THREADS": "1",
                "RAY_AUTH_MODE": "disabled",
                "PYTHONPATH": os.pathsep.join([str(EXAMPLE.parent), str(EXAMPLE.parents[1])]),
            },
        )
        if "no local Ray: " in done.stderr:
            pytest.skip("a local Ray does not start on this machine, or not in its time")
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()[-1]

    assert "'images': 4, " in run(*images[:4])
    assert (tmp_path / "mark-dead").exists()
    # What is there is not done again, but a batch with an image that could not be read is.
    assert "'images': 5, " in run(*images)
    require_results(tmp_path / "out", images, weights)
