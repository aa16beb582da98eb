import subprocess
import sys
from dataclasses import fields, replace

import pytest
from training import QUICK

from ssd.train.config import PRESETS, TrainConfig, field_choices, field_docs


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 1),
        ("accumulate", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("ema", 1.0),
        ("momentum", 1.0),
        ("freeze", 5),
        ("workers", -1),
        ("half_size", -0.1),
        ("half_size", 1.0),
        ("time", 0.0),
        ("time", float("inf")),
        ("patience", -1),
        ("class_weights", "rare"),
        ("augmentation", "strong"),
        ("schedule", "step"),
        ("precision", "fp8"),
        ("iou_threshold", 7.0),
        ("milestones", (0.5, 43.0)),
    ],
)
def test_choices_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        replace(QUICK, **{field: value})


def test_fine_tuning_starts_lower():
    assert TrainConfig(weights="coco").peak_lr() == TrainConfig().peak_lr() / 10
    assert TrainConfig(weights="coco", lr=0.5).peak_lr() == 0.5


def test_milestones_may_come_as_a_list():
    assert replace(QUICK, milestones=[0.25, 0.5]) == replace(QUICK, milestones=(0.25, 0.5))


@pytest.mark.parametrize(("field", "value"), [("schedule", None), ("precision", None), ("backbone", "vgg16")])
def test_none_is_a_choice_only_where_the_type_has_it(field, value):
    assert replace(QUICK, backbone=None).backbone is None
    with pytest.raises(ValueError, match=f"{field} {value!r} is none of"):
        replace(QUICK, **{field: value})


def test_every_field_says_what_it_is():
    docs = field_docs(TrainConfig)
    assert list(docs) == [each.name for each in fields(TrainConfig)]
    for name, text in docs.items():
        first, *rest = text.splitlines()
        assert first.endswith((".", ";")), name
        assert not rest or rest[0] == "", name
    assert docs["lr"].endswith("By default 0.08, and a tenth of that where `weights` are given.")


def test_the_names_that_a_type_allows():
    kinds = {each.name: each.type for each in fields(TrainConfig)}
    assert field_choices(kinds["precision"]) == ("auto", "fp32", "fp16", "bf16")
    assert field_choices(kinds["backbone"])[:2] == ("resnet18", "resnet34")
    assert field_choices(kinds["augmentation"]) == ("default", "published", "none")
    assert field_choices(kinds["weights"]) == field_choices(kinds["epochs"]) == ()


def test_a_config_from_before_layouts_and_losses_is_of_the_published_ones():
    saved = {each.name: getattr(QUICK, each.name) for each in fields(QUICK)}
    del saved["layout"], saved["loss"]
    assert TrainConfig(**saved) == QUICK
    assert (PRESETS["published"].layout, PRESETS["published"].loss) == (None, "multibox")


def test_the_config_needs_no_torch():
    code = (
        "import sys, ssd.train; ssd.train.TrainConfig(); ssd.train.PRESETS; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
