"""The model card: front matter that the Hub takes, and only what is known."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import SMALL_LAYOUT

from ssd import checkpoint, pretrained
from ssd.card import Measured, accuracy_of, data_of_run, measured_in, measured_in_run, model_card
from ssd.errors import CheckpointError
from ssd.evaluate import METRICS

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def found(tiny_model, tmp_path):
    path = tmp_path / "w.safetensors"
    config = {"epochs": 20, "weights": "/home/me/secret/start.pt", "lr": 0.1}
    checkpoint.save(
        path, tiny_model.state_dict(), ("cat", "cup", "person"), layout=SMALL_LAYOUT, config=config
    )
    return checkpoint.read(path)


def front(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_everything_known(found):
    metrics = {"AP": 0.512345, "AP50": 0.8, "APs": -1.0}
    measured = Measured(metrics, "my photos", "val", "by hand", {"cat": {"AP": 0.5}, "cup": {"AP": -1.0}})
    card = model_card(found, "me/my-cats", data="my photos", measured=measured, license="apache-2.0")
    data = front(card)
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == (
        "apache-2.0",
        "ssd300",
        "object-detection",
    )
    # As the Hub's own reader understands it.
    read = huggingface_hub.ModelCard(card).data
    results = {each.metric_type: each for each in read.eval_results}
    assert read.model_name == "my-cats"
    assert {name: each.metric_value for name, each in results.items()} == {"ap": 0.5123, "ap50": 0.8}
    assert {(each.task_type, each.dataset_name, each.dataset_split) for each in read.eval_results} == {
        ("object-detection", "my photos", "val")
    }
    for text in (
        "hf://me/my-cats",
        "cat, cup, person",
        "| AP | 0.512 |",
        "| cup | - |",
        "resnet18",
        "| epochs | 20 |",
    ):
        assert text in card
    assert "start.pt" in card
    assert "/home/me" not in card


def test_nothing_known(found):
    card = model_card(replace(found, config={}), "me/cats", data="", measured=None, license=None)
    assert "license" not in front(card)
    assert "model-index" not in front(card)
    assert card.count("Not recorded in these weights.") == 2
    assert "None were given." in card
    assert "Not given: ask the owner" in card


def test_names_are_text(found):
    evil = replace(found, class_names=("<script>", "a|b", "[x](http://y)\n# big"))
    card = model_card(evil, "me/cats", data="--- #", measured=None, license=None)
    assert r"\<script\>, a\|b, \[x\](http://y)\\n\# big" in card
    assert front(card)["library_name"] == "ssd300"


def test_metrics_of_an_evaluation(found, tmp_path):
    file = tmp_path / "metrics.json"
    names = found.class_names
    facts = {"metrics": dict.fromkeys(METRICS, 0.25), "per_class": {name: {"AP": 0.5} for name in names}}
    file.write_text(json.dumps(facts | {"data": "/home/me/photos", "split": "val", "images": 7}))
    measured = measured_in(file, names)
    assert (measured.data, measured.split, measured.metrics["AR10"]) == ("photos", "val", 0.25)
    assert measured.how == "`ssd evaluate`, 7 images"
    with pytest.raises(CheckpointError, match="other classes than those of the weights"):
        measured_in(file, ("cat",))
    for content in ("{", "[]", "{}", '{"metrics": {"AP": "x"}}'):
        file.write_text(content)
        with pytest.raises(CheckpointError, match=r"is no metrics\.json that ssd evaluate wrote"):
            measured_in(file, names)


def test_what_a_run_folder_says(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,loss,AP,AP50\n1,2.0,,\n2,1.5,0.3,0.6\n3,1.2,0.5,0.7\n4,1.1,0.4,0.8\n"
    )
    (tmp_path / "config.json").write_text(json.dumps({"data": {"data": "/home/me/cells"}}))
    assert data_of_run(tmp_path / "best.safetensors") == "cells"
    for name, expected in (("best", {"AP": 0.5, "AP50": 0.7}), ("last", {"AP": 0.4, "AP50": 0.8})):
        assert measured_in_run(tmp_path / f"{name}.safetensors", "cells").metrics == expected
    assert measured_in_run(tmp_path / "other.safetensors", "cells") is None
    assert measured_in_run(tmp_path / "none" / "best.safetensors", "") is None
    assert data_of_run(tmp_path / "none" / "best.safetensors") == ""
    (tmp_path / "best.safetensors").touch()
    said = "0.500 AP, 0.700 AP50 on the val split of cells, during training, by the epoch's evaluation"
    assert accuracy_of(tmp_path) == accuracy_of(str(tmp_path / "best.safetensors")) == said
    assert accuracy_of(tmp_path / "other.safetensors") == accuracy_of("https://a/best.safetensors") == ""


def test_the_accuracy_of_the_shipped_weights_is_what_their_page_says():
    page = (Path(pretrained.__file__).parent / "weights" / "README.md").read_text()
    number = re.search(r"500 held-out scenes of val, official COCO numbers: AP (0\.\d+)", page)[1]
    assert accuracy_of("shapes").startswith(f"{number} AP on 500 made-up scenes")
