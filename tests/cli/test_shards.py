"""Several processes that detect: what is written is kept, goes on, and is what one process gives."""

import json

import numpy as np
import pytest
from conftest import SMALL_LAYOUT
from PIL import Image
from test_distributed import run
from typer.testing import CliRunner

from ssd import checkpoint
from ssd.cli import app
from ssd.cli.shards import UNFINISHED, ResumeError, Shards, rest
from ssd.detections import Detections

NAMES = ("cat", "cup", "person")


def found_in(source, count=2):
    rng = np.random.default_rng(len(source))
    corners = np.sort(rng.random((count, 2, 2)).astype(np.float32) * 90, axis=1)
    return Detections(
        corners.reshape(count, 4), rng.random(count), rng.integers(0, 3, count), NAMES, (100, 200), source
    )


def equal(a, b):
    return all(
        np.array_equal(getattr(a, each), getattr(b, each)) for each in ("boxes", "scores", "class_ids")
    ) and (
        a.source,
        a.image_size,
        a.category_ids,
    ) == (b.source, b.image_size, b.category_ids)


def test_results_come_back_to_the_bit_and_in_order(tmp_path):
    shards, other = Shards(tmp_path), Shards(tmp_path)
    shards.begin({}, {})
    sources = ["a.jpg", "bb.jpg", "ccc\udcff.jpg", "dddd.jpg"]
    for writer, source in zip((shards, other, other, shards), reversed(sources), strict=True):
        writer.add(found_in(source, count=len(source) - 5))
    found = list(shards.merge(sources, NAMES, ()))
    assert [each.source for each in found] == sources
    assert all(equal(each, found_in(each.source, count=len(each.source) - 5)) for each in found)
    shards.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 5, -1])
def test_a_line_that_was_cut_does_not_count(tmp_path, cut):
    shards = Shards(tmp_path)
    shards.begin({"batch_size": 8}, {"a.jpg": "a.jpg"})
    for source in ("a.jpg", "b.jpg"):
        shards.add(found_in(source))
    (file,) = (tmp_path / UNFINISHED).glob("*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1][:cut])
    again = Shards(tmp_path)
    assert again.resume({"batch_size": 8}) == {"a.jpg": "a.jpg"}
    assert set(again.done) == {"a.jpg"}
    again.add(found_in("b.jpg"))
    assert [each.source for each in again.merge(["b.jpg", "a.jpg"], NAMES, ())] == ["b.jpg", "a.jpg"]


def test_what_cannot_go_on(tmp_path):
    with pytest.raises(ResumeError, match="holds no unfinished run; leave --resume out"):
        Shards(tmp_path).resume({})
    Shards(tmp_path).begin({"batch_size": 8, "classes": ("cat",)}, {})
    with pytest.raises(ResumeError, match=r"holds a run that is not finished; --resume .* goes on"):
        Shards(tmp_path).begin({}, {})
    with pytest.raises(ResumeError, match="begun with batch_size 8, not 4; to go on, give the same"):
        Shards(tmp_path).resume({"batch_size": 4, "classes": ("cat",)})
    Shards(tmp_path).resume({"batch_size": 8, "classes": ("cat",)})
    for content in (b"{", b"[]", b'{"settings": 1, "names": {}}'):
        (tmp_path / UNFINISHED / "run.json").write_bytes(content)
        with pytest.raises(ResumeError, match="is not what ssd detect wrote"):
            Shards(tmp_path).resume({})


def test_batches_stay_whole():
    listed = [f"{i}" for i in range(10)]
    assert rest(listed, (), 4) == [0, 1, 2]
    assert rest(listed, {"0", "1", "2", "3", "8"}, 4) == [1, 2]
    assert rest(listed, set(listed), 4) == []


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, tiny_model):
    """A folder with images and one that cannot be read, and weights."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(13):
        Image.fromarray(rng.integers(0, 256, (60 + i, 80, 3), np.uint8)).save(folder / f"{i:02}.png")
    (folder / "12.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    weights = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    checkpoint.save(weights, tiny_model.state_dict(), NAMES, layout=SMALL_LAYOUT)
    return folder, weights


def options(pictures, **named):
    folder, weights = pictures
    named = {
        "weights": weights,
        "score-threshold": 0.3,
        "precision": "fp32",
        "batch-size": 2,
        "device": "cpu",
        **named,
    }
    return [folder, *(text for key, value in named.items() for text in (f"--{key}", value))]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


KILLED = """
import os, signal, sys
from ssd.cli import main
from ssd.cli.results import Results
write, done = Results.write_own, []
def write_own(self, found):
    write(self, found)
    done.append(found)
    if os.environ["RANK"] == "1" and len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)  # the picture is there, and its result is not
Results.write_own = write_own
main()
"""


@pytest.mark.parametrize("format", ["json", pytest.param("yolo", marks=pytest.mark.slow)])
def test_a_killed_process_loses_nothing_that_was_written(pictures, tmp_path, format):
    """Killed between two writes of a batch; gone on with by another number of processes."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    code, _, err = run(2, script, "detect", *options(pictures, format=format), "--output", tmp_path / "cut")
    assert code != 0
    assert "--resume" in err
    unfinished = tmp_path / "cut" / UNFINISHED
    lines = [
        json.loads(line) for file in unfinished.glob("*.jsonl") for line in file.read_text().splitlines()
    ]
    assert 1 <= len(lines) < 12
    assert not (tmp_path / "cut" / "detections.json").exists()

    before = files(tmp_path / "cut")
    arguments = [str(each) for each in (*options(pictures, format=format), "--resume", tmp_path / "cut")]
    done = CliRunner().invoke(app, ["detect", *arguments])
    assert done.exit_code == 1, done.output  # an image cannot be read
    assert "12 images, " in done.output
    whole = CliRunner().invoke(
        app, ["detect", *map(str, options(pictures, format=format)), "--output", str(tmp_path / "one")]
    )
    assert whole.exit_code == 1, whole.output
    assert files(tmp_path / "cut") == files(tmp_path / "one")
    # But for the drafts of what was being written when the process was killed.
    kept = {
        name: content
        for name, content in before.items()
        if not name.startswith(UNFINISHED) and not name.endswith(".tmp")
    }
    assert kept.items() <= files(tmp_path / "one").items()


def test_other_options_do_not_go_on(pictures, tmp_path):
    shards = Shards(tmp_path)
    shards.begin({"batch_size": 4}, {})
    arguments = [str(each) for each in (*options(pictures), "--resume", tmp_path)]
    done = CliRunner().invoke(app, ["detect", *arguments])
    assert isinstance(done.exception, ResumeError)
    done = CliRunner().invoke(app, ["detect", *arguments, "--output", str(tmp_path)])
    assert done.exit_code == 2
    assert "leave out --output" in " ".join(done.output.split())
