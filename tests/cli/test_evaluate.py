import json
import os
import shutil


def test_evaluation_tells_what_it_left_out(run, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "data")
    gone = sorted((tmp_path / "data" / "val").iterdir())[0]
    gone.unlink()
    arguments = ("evaluate", "data", "--weights", "shapes", "--output", "e")
    status, _, err = run(*arguments)
    assert status == 1
    assert gone.name in err
    status, out, _ = run(*arguments, "--lenient")
    assert status == 0
    assert "left out of these numbers (missing image: 1)" in out
    facts = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert (facts["images"], facts["left_out"]) == (2, {"missing image": 1})
    status, _, err = run(*arguments)
    assert status == 2
    assert "e holds an evaluation already" in " ".join(err.replace("│", " ").split())


def test_evaluation_with_plots(run, scenes, tmp_path):
    status, out, _ = run("evaluate", scenes, "--weights", "shapes", "--plots", "--output", "e")
    assert status == 0
    assert {"precision_recall.png", "confusion.png", "worst"} <= set(os.listdir(tmp_path / "e"))
    assert "IoU 0.50:0.95, all sizes" in out
