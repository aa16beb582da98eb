"""examples/ray_batch.py on a local Ray: the results of one process, whatever dies."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_LAYOUT
from PIL import Image

from ssd import checkpoint
from ssd.detector import Detector

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (importlib.util.find_spec("ray") and importlib.util.find_spec("pyarrow")),
        reason="ray[data] is not installed, which not every platform and Python has",
    ),
]
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
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
images = sys.argv[3:]
print(ray_batch.detect(images, ray_batch.Path(sys.argv[1]), weights=sys.argv[2], threshold=0.3, batch_size=2))
"""


def test_results_are_those_of_one_process_and_nothing_is_lost(tmp_path, tiny_model):
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    images = [str(tmp_path / f"{i}.png") for i in range(7)]
    for i, path in enumerate(images):
        Image.fromarray(rng.integers(0, 256, (60 + i, 80, 3), np.uint8)).save(path)
    Path(images[3]).write_bytes(b"\x89PNG\r\n\x1a\n")
    weights = tmp_path / "tiny.safetensors"
    checkpoint.save(weights, tiny_model.state_dict(), ("cat", "cup", "person"), layout=SMALL_LAYOUT)
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
            | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_raylet_start_wait_time_s": "150"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()[-1]

    assert "'images': 4, " in run(*images[:4])
    assert (tmp_path / "mark-dead").exists()
    # What is there is not done again, but a batch with an image that could not be read is.
    assert "'images': 5, " in run(*images)
    assert not list((tmp_path / "out").glob(".*"))

    rows = [row for file in (tmp_path / "out").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    rows = {row["source"]: row for row in rows}
    assert set(rows) == set(images)
    assert "3.png" in rows[images[3]]["error"]
    detector = Detector.load(weights, "cpu")
    good = [name for name in images if name != images[3]]
    for found in detector([str(name) for name in good], batch_size=2, score_threshold=0.3):
        row = rows[found.source]
        assert row["error"] is None
        assert (row["height"], row["width"]) == found.image_size
        assert row["names"] == found.names.tolist()
        np.testing.assert_allclose(row["scores"], found.scores, rtol=1e-5)
        np.testing.assert_allclose(np.reshape(row["boxes"], (-1, 4)), found.boxes, rtol=1e-4, atol=1e-3)
