import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import SMALL_LAYOUT, made_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssd import checkpoint
from ssd.boxes import PUBLISHED_LAYOUT
from ssd.calibration import Calibration
from ssd.errors import CheckpointError
from ssd.labels import COCO_NAMES
from ssd.model import SSD, load_model


@pytest.fixture
def body(weights_file):
    return weights_file.read_bytes()


# --- Reading ---


def training_checkpoint(model, prefix=""):
    """What NVIDIA's training code saves."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [43, 54])
    return {
        "epoch": 64,
        "iteration": 240_000,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict() | {"milestones": Counter([43, 54])},
        "label_map": {0: "background", 1: "cat", 2: "cup", 3: "person"},
        "model": {prefix + key: value for key, value in model.state_dict().items()},
    }


@pytest.mark.parametrize("prefix", ["", "module.", "module.1."])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_training_checkpoints(tmp_path, small_model, prefix, zipped):
    path = tmp_path / "epoch_64.pt"
    torch.save(training_checkpoint(small_model, prefix), path, _use_new_zipfile_serialization=zipped)
    found = checkpoint.read(path)
    assert list(found.state_dict) == list(small_model.state_dict())
    assert (found.backbone, found.num_classes, found.head_norm) == ("resnet18", 4, False)
    assert found.class_names == ("cat", "cup", "person")


@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefixes=st.lists(st.sampled_from(["module.", "_orig_mod.", "model.", "net.", "student."]), max_size=3),
    holders=st.lists(st.sampled_from(["state_dict", "model_state_dict", "net", "ema", "module"]), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    counters=st.sampled_from(["as they are", "none", "int32", "float", "half", "one-dimensional"]),
    memory=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_any_wrapping_gives_equal_tensors(tmp_path, tiny_model, prefixes, holders, dtype, counters, memory):
    def converted(key, value):
        if not key.endswith("num_batches_tracked"):
            value = value.to(dtype)
            return value.to(memory_format=memory) if value.ndim == 4 else value
        kinds = {"int32": torch.int32, "float": torch.float32, "half": torch.float16}
        return value[None] if counters == "one-dimensional" else value.to(kinds.get(counters, torch.int64))

    expected = tiny_model.state_dict()
    content = {
        "".join(prefixes) + key: converted(key, value)
        for key, value in expected.items()
        if counters != "none" or not key.endswith("num_batches_tracked")
    }
    for holder in holders:
        content = {"epoch": 3, holder: content}
    torch.save({"layout": SMALL_LAYOUT.to_dict(), "inner": content}, tmp_path / "w.ckpt")
    model, _ = load_model(tmp_path / "w.ckpt")
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            assert value.dtype == torch.int64
            assert value == (0 if counters == "none" else expected[key])
        else:
            assert value.is_contiguous()
            assert torch.equal(value, expected[key].to(dtype).float())


def test_the_state_of_a_run_is_read_as_it_is_evaluated(tmp_path, small_model):
    average = made_model(layout=SMALL_LAYOUT)
    state = {
        "config": {"epochs": 3},
        "data": {"class_names": ["cat", "cup", "person"], "images": 7},
        "layout": SMALL_LAYOUT.to_dict(),
        "model": SSD(4, "resnet18", head_norm=False, layout=SMALL_LAYOUT).state_dict(),
        "average": average.state_dict(),
        "random": torch.get_rng_state(),
    }
    torch.save(state, tmp_path / "state.pt")
    for path in (tmp_path / "state.pt", tmp_path):
        model, found = load_model(path)
        assert torch.equal(model.conf[0].weight, average.conf[0].weight)
        assert (found.class_names, found.config) == (("cat", "cup", "person"), {"epochs": 3})
    torch.save(state | {"average": None}, tmp_path / "state.pt")
    assert torch.equal(load_model(tmp_path)[0].conf[0].weight, state["model"]["conf.0.weight"])


def test_a_run_folder_is_its_best_weights(tmp_path, small_model, body):
    (tmp_path / "best.safetensors").write_bytes(body)
    (tmp_path / "last.safetensors").write_bytes(b"not these")
    (tmp_path / "state.pt").write_bytes(b"nor these")
    model, found = load_model(tmp_path)
    assert torch.equal(model.conf[0].weight, small_model.conf[0].weight)
    assert found.class_names == ("cat", "cup", "person")


@pytest.mark.parametrize(
    ("key", "form"),
    [
        ("compute_loss.dboxes", lambda boxes: boxes.T[None]),
        ("postprocess.dboxes_xywh", lambda boxes: boxes[None]),
        ("default_boxes", lambda boxes: boxes.half()),
        ("model.priors", lambda boxes: boxes * 96),
        (
            "anchors",
            lambda boxes: torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1),
        ),
    ],
)
def test_default_boxes_in_a_file_have_to_be_the_networks(tmp_path, tiny_model, key, form):
    """As in forks of the published code, which keep them among the parameters."""
    boxes = SMALL_LAYOUT.default_boxes()
    content = {"layout": SMALL_LAYOUT.to_dict()} | tiny_model.state_dict()
    torch.save(content | {key: form(boxes)}, tmp_path / "w.pth")
    assert checkpoint.read(tmp_path / "w.pth").state_dict.keys() == tiny_model.state_dict().keys()
    for others in (boxes * torch.tensor([1, 1, 1.1, 1.1]), boxes.flip(0), boxes[1:]):
        torch.save(content | {key: form(others)}, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=rf"w\.pth: its default boxes \({key}\) are not those"):
            checkpoint.read(tmp_path / "w.pth")


def test_what_stands_beside_a_network_is_left_out_or_refused(tmp_path, small_model):
    wrapped = {f"model.{key}": value for key, value in small_model.state_dict().items()}
    harmless = {"criterion.weight": torch.ones(4), "val_metric.sums": torch.ones(9), "n": torch.tensor([3])}
    torch.save({"state_dict": wrapped | harmless}, tmp_path / "w.ckpt")
    assert torch.equal(load_model(tmp_path / "w.ckpt")[0].conf[0].weight, small_model.conf[0].weight)
    torch.save({"state_dict": wrapped | {"attention.weight": torch.ones(4)}}, tmp_path / "w.ckpt")
    with pytest.raises(
        CheckpointError, match=r"others, on which detections may depend \(attention\.weight\)"
    ):
        load_model(tmp_path / "w.ckpt")


def test_parameters_without_statistics_are_refused(tmp_path, small_model):
    torch.save(dict(small_model.named_parameters()), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="missing .*running_mean"):
        load_model(tmp_path / "w.pt")


def test_parameters_become_the_models_own_whatever_they_were(tmp_path, small_model):
    frozen = {
        key: torch.nn.Parameter(value.clone(), requires_grad=False) if value.is_floating_point() else value
        for key, value in small_model.state_dict().items()
    }
    torch.save(frozen, tmp_path / "w.pt")
    model, _ = load_model(tmp_path / "w.pt")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(buffer, torch.nn.Parameter) for buffer in model.buffers())


def test_a_bare_state_dict(tmp_path, small_model):
    torch.save(small_model.state_dict(), tmp_path / "bare.pth")
    found = checkpoint.read(tmp_path / "bare.pth")
    assert found.class_names == ("class 0", "class 1", "class 2")


def test_81_classes_without_names_are_cocos(tmp_path):
    torch.save(made_model(num_classes=81).state_dict(), tmp_path / "coco.pth")
    assert checkpoint.read(tmp_path / "coco.pth").class_names == COCO_NAMES


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_code_in_a_pickle_is_refused_and_never_runs(tmp_path, small_model, kind):
    marker, path = tmp_path / "ran", tmp_path / "hostile.pt"
    content = {"model": dict(small_model.state_dict()), "extra": Hostile(marker)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"hostile\.pt") as caught:
        load_model(path)
    assert not marker.exists()
    assert "weights_only" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_program_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "program.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        checkpoint.read(tmp_path / "program.pt")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"hello", "not a checkpoint"),
        (b"\x80\x02 nonsense", "cut off"),
        (b"\x10\0\0\0\0\0\0\0{}", "safetensors"),
    ],
)
def test_what_is_no_checkpoint_says_what_it_is(tmp_path, content, reason):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"w.pt: .*{reason}"):
        checkpoint.read(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".legacy"])
def test_a_file_cut_off_anywhere_is_an_error(tmp_path, small_model, weights_file, suffix):
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    if suffix == ".safetensors":
        whole = weights_file
    else:
        torch.save(small_model.state_dict(), whole, _use_new_zipfile_serialization=suffix == ".pt")
    body = whole.read_bytes()
    for share in (0.0001, 0.01, 0.3, 0.7, 0.99, 1 - 1 / len(body)):
        cut.write_bytes(body[: int(len(body) * share)])
        with pytest.raises(CheckpointError, match=r"cut\."):
            load_model(cut)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "a list"),
        ({}, "a dict"),
        ({"model": {"a": 3}}, "'a' is a int"),
        ({"fc.weight": torch.zeros(2)}, "not an SSD300"),
        ({3: torch.zeros(2)}, "3 is a Tensor"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, reason):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=reason):
        checkpoint.read(tmp_path / "other.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, small_model, value):
    state = {key: tensor.clone() for key, tensor in small_model.state_dict().items()}
    state["conf.5.bias"][-1] = value
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(CheckpointError, match=r"conf\.5\.bias holds NaN"):
        load_model(tmp_path / "nan.pt")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (torch.zeros(1).expand(24), "not stored whole"),
        (torch.zeros(24, dtype=torch.complex64), "complex64"),
        (torch.zeros(24, dtype=torch.int64), "int64"),
        (torch.zeros(24).to_sparse(), "no plain tensor|not to be loaded safely"),
        (torch.zeros(24, device="meta"), "no plain tensor"),
        (torch.zeros(24).to(torch.float8_e4m3fn), "float8"),
    ],
    ids=["expanded", "complex", "integer", "sparse", "meta", "float8"],
)
def test_odd_tensors_are_refused_before_they_are_used(tmp_path, small_model, value, problem):
    torch.save(dict(small_model.state_dict()) | {"loc.2.bias": value}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=problem):
        load_model(tmp_path / "odd.pt")


def test_a_few_bytes_that_stand_for_a_hundred_million_classes_are_refused(tmp_path, small_model):
    head = torch.zeros(1).expand(4 * 10**8, 256, 3, 3)
    torch.save(dict(small_model.state_dict()) | {"conf.0.weight": head}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError, match="not an SSD300"):
        load_model(tmp_path / "bomb.pt")


@pytest.mark.parametrize("labels", [[1], {1: 3}, None, "run 7"])
def test_what_is_no_class_names_is_left_out(tmp_path, small_model, labels):
    torch.save({"model": small_model.state_dict(), "label_map": labels}, tmp_path / "odd.pt")
    assert checkpoint.read(tmp_path / "odd.pt").class_names == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize(
    "labels",
    [{"²": "a", "--1": "b", "9" * 5000: "c"}, np.array(["a", "b", "c"]), {"a": [0]}, "a,,b", [["a"]]],
    ids=["numbers", "array", "lists", "text", "nested"],
)
def test_class_names_that_cannot_be_read_are_told(tmp_path, small_model, labels):
    torch.save({"model": small_model.state_dict(), "label_map": labels}, tmp_path / "odd.pt")
    with pytest.warns(
        UserWarning, match=r"odd\.pt: its class names \(label_map\) cannot be read; classes are"
    ):
        found = checkpoint.read(tmp_path / "odd.pt")
    assert found.class_names == ("class 0", "class 1", "class 2")


def saved(path, model, notes):
    """A safetensors file with the notes, as text."""
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(state, path, {"layout": json.dumps(SMALL_LAYOUT.to_dict())} | notes)
    return path


@pytest.mark.parametrize("names", ["[" * 100_000, "{", "cat,,cup", '[["cat"]]'])
def test_notes_of_safetensors_that_cannot_be_read_are_told(tmp_path, tiny_model, names):
    path = saved(tmp_path / "odd.safetensors", tiny_model, {"class_names": names})
    with pytest.warns(UserWarning, match=r"odd\.safetensors: its class names \(class_names\) cannot"):
        assert checkpoint.read(path).class_names == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize("layout", ["300", "[" * 100_000, "{", "none"])
def test_a_layout_that_cannot_be_read_is_refused(tmp_path, tiny_model, layout):
    path = saved(tmp_path / "odd.safetensors", tiny_model, {"layout": layout})
    with pytest.raises(CheckpointError, match=r"odd\.safetensors: its layout"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    "notes",
    [
        {"class_names": "cat,cup, person"},
        {"class_names": "cat,cup,person", "config": "lr 0.1, for 3 epochs"},
        {"class_names": '{"0": "background", "1": "cat", "2": "cup", "3": "person"}'},
        {"label_map": '{"1": "cat", "2": "cup", "3": "person"}', "class_names": "5"},
        {"names": '["cat", "cup", "person"]', "category_ids": "?"},
        {
            "id2label": '{"0": "cat", "1": "cup", "2": "person"}',
            "label2id": '{"cat": 0, "cup": 1, "person": 2}',
        },
    ],
)
def test_notes_of_safetensors_in_the_forms_of_others(tmp_path, tiny_model, notes):
    found = checkpoint.read(saved(tmp_path / "w.safetensors", tiny_model, notes))
    assert (found.class_names, found.config, found.category_ids) == (NAMES, {}, ())


# --- Class names ---

NAMES = ("cat", "cup", "person")


@pytest.mark.parametrize(
    "notes",
    [
        {"label_map": {0: "background", 1: "cat", 2: "cup", 3: "person"}},
        {"label_map": {"1": "cat", "2": "cup", "3": "person"}},
        {"label_map": {"__background__": 0, "cat": 1, "cup": 2, "person": 3}},
        {"class_to_idx": {"person": 2, "cat": 0, "cup": 1}},
        {"classes": ["_background_", *NAMES]},
        {"class_names": list(NAMES)},
        {"names": {0: "cat", 1: "cup", 2: "person"}},
        {"meta": {"CLASSES": NAMES}},
        {"hyper_parameters": {"lr": 0.1, "class_names": ["cat", "cup", "person"]}},
        {"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "cup"}, {"id": 3, "name": "person"}]},
        {"label_map": {1: 3, 2: 2}, "class_names": NAMES},
        {"names": "experiment 7", "classes": 3, "class_names": NAMES},
        {"label_map": {0.0: "cat", 1.0: "cup", 2.0: "person"}},
        {"categories": [{"name": "cat"}, {"name": "cup"}, {"name": "person"}]},
        {"classes": "cat, cup, person"},
        {"labels": list(NAMES)},
        {"label_names": ["background", *NAMES]},
        {"labels": np.zeros(3), "names": NAMES, "label_map": {1: "cat", 2: "cup", 3: "person"}},
        {"label_map": np.zeros(3), "names": NAMES},
    ],
)
def test_class_names_in_the_forms_of_others(tmp_path, tiny_model, notes):
    layout = {"layout": SMALL_LAYOUT.to_dict()}
    torch.save({"model": tiny_model.state_dict(), **layout, **notes}, tmp_path / "w.pt")
    assert checkpoint.read(tmp_path / "w.pt").class_names == NAMES


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "names",
    [["cat", "cup"], ["background", "cat"], ["cat", "cup", "person", "dog"], ["cat", None, "cup"]],
)
def test_class_names_that_do_not_fit_can_be_replaced_as_advised(
    tmp_path, monkeypatch, tiny_model, names, suffix
):
    monkeypatch.chdir(tmp_path)
    tensors = {key: value.contiguous() for key, value in tiny_model.state_dict().items()}
    if suffix == ".pt":
        content = {"model": tensors, "layout": SMALL_LAYOUT.to_dict(), "classes": names, "curve": np.ones(3)}
        torch.save(content, "w.pt")
    else:
        notes = {"class_names": json.dumps(names), "layout": json.dumps(SMALL_LAYOUT.to_dict())}
        safetensors.torch.save_file(tensors, "w.safetensors", notes)
    with pytest.raises(
        CheckpointError, match="for a network of 3 classes and the background|no text"
    ) as caught:
        load_model(f"w{suffix}")
    code = str(caught.value).split("in the order of training: ")[1]
    exec(code.replace("'the first class', 'the second'", "'cat', 'cup', 'person'"), {})
    assert load_model(f"named-w{suffix}")[1].class_names == NAMES


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_two_lists_of_class_names_that_differ_are_refused(tmp_path, monkeypatch, tiny_model, suffix):
    monkeypatch.chdir(tmp_path)
    others = {"class_names": list(NAMES), "names": ["cat", "person", "cup"]}
    if suffix == ".pt":
        content = {"layout": SMALL_LAYOUT.to_dict(), "data": {"names": others.pop("names")}} | others
        torch.save({"model": tiny_model.state_dict()} | content, "w.pt")
    else:
        saved("w.safetensors", tiny_model, {key: json.dumps(value) for key, value in others.items()})
    told = "its \"class_names\" and \"names\" give different class names, as 'cup' and 'person'"
    with pytest.raises(CheckpointError, match=told) as caught:
        load_model(f"w{suffix}")
    code = str(caught.value).split("in the order of training: ")[1]
    exec(code.replace("'the first class', 'the second'", "'cat', 'cup', 'person'"), {})
    assert load_model(f"named-w{suffix}")[1].class_names == NAMES


def test_a_background_too_many_in_safetensors_is_left_out(tmp_path, tiny_model):
    tensors = {key: value.contiguous() for key, value in tiny_model.state_dict().items()}
    notes = {"class_names": json.dumps(["background", *NAMES]), "layout": json.dumps(SMALL_LAYOUT.to_dict())}
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors", notes)
    assert checkpoint.read(tmp_path / "w.safetensors").class_names == NAMES


def test_a_class_that_is_called_background_stays_one(tmp_path, tiny_model):
    """As of data by labelme, whose first category is that."""
    names = ("_background_", "cat", "cup")
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"w{suffix}"
        checkpoint.save(path, tiny_model.state_dict(), names, layout=SMALL_LAYOUT)
        assert checkpoint.read(path).class_names == names


def test_a_loaded_network_does_not_depend_on_its_file(tmp_path, small_model, body):
    path = tmp_path / "w.safetensors"
    path.write_bytes(body)
    model, _ = load_model(path)
    with path.open("r+b") as file:
        file.write(bytes(len(body)))
    assert torch.equal(model.conf[0].weight, small_model.conf[0].weight)


# --- Writing ---


def test_names_must_fit_the_network(tmp_path, small_model):
    with pytest.raises(ValueError, match="3 classes and the background; got 2 names"):
        checkpoint.save(tmp_path / "w.pt", small_model.state_dict(), ("a", "b"))
    with pytest.raises(ValueError, match="got 4 names; leave the background out"):
        checkpoint.save(tmp_path / "w.pt", small_model.state_dict(), ("background", "a", "b", "c"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "noted", [[0.5, 0.5], [0.5, 0.5, 1.5], [0.5, 0.5, float("nan")], [0.5, True, 0], 0.5]
)
def test_thresholds_that_are_none_are_told(tmp_path, tiny_model, suffix, noted):
    path = tmp_path / f"w{suffix}"
    checkpoint.save(path, tiny_model.state_dict(), NAMES, layout=SMALL_LAYOUT)
    assert checkpoint.read(path).score_thresholds == ()
    tensors = {key: value.contiguous() for key, value in tiny_model.state_dict().items()}
    if suffix == ".pt":
        content = {"model": tensors, "score_thresholds": noted, "layout": SMALL_LAYOUT.to_dict()}
        torch.save(content, path)
    else:
        notes = {"score_thresholds": noted, "layout": SMALL_LAYOUT.to_dict()}
        safetensors.torch.save_file(tensors, path, {key: json.dumps(each) for key, each in notes.items()})
    with pytest.raises(checkpoint.CheckpointError, match=r'"score_thresholds" give .*for each of 3 classes'):
        checkpoint.read(path)


def test_thresholds_must_fit_the_classes(tmp_path, tiny_model):
    with pytest.raises(ValueError, match=r"from 0 to 1 for each of 3 classes, or none; got \[0.5, 0.5\]"):
        checkpoint.save(
            tmp_path / "w.pt",
            tiny_model.state_dict(),
            NAMES,
            layout=SMALL_LAYOUT,
            score_thresholds=(0.5, 0.5),
        )


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_all_that_is_saved_is_read(tmp_path, suffix):
    model = made_model(layout=SMALL_LAYOUT)
    path, config = tmp_path / f"w{suffix}", {"epochs": 3, "milestones": [0.5]}
    names = ("cat", "cup", "person")
    notes = {"category_ids": [7, 9, 1], "config": config, "score_thresholds": (0.25, 0.5, 1)}
    checkpoint.save(path, model.state_dict(), names, layout=SMALL_LAYOUT, **notes)
    found = checkpoint.read(path)
    assert found.score_thresholds == (0.25, 0.5, 1)
    assert (found.class_names, found.category_ids, found.config) == (names, (7, 9, 1), config)
    assert (found.num_classes, found.layout) == (4, SMALL_LAYOUT)
    loaded, _ = load_model(path)
    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        for ours, theirs in zip(loaded.eval()(images), model(images), strict=True):
            assert torch.equal(ours, theirs)


def test_what_says_nothing_of_its_layout_is_of_the_published_one(tmp_path, small_model):
    torch.save(small_model.state_dict(), tmp_path / "bare.pth")
    assert checkpoint.read(tmp_path / "bare.pth").layout == PUBLISHED_LAYOUT


@pytest.mark.parametrize("layout", ["300", {"size": 300}, SMALL_LAYOUT.to_dict() | {"size": 97}])
def test_an_impossible_layout_is_refused(tmp_path, small_model, layout):
    torch.save({"model": small_model.state_dict(), "layout": layout}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=r"odd\.pt: its layout is none of a network's"):
        checkpoint.read(tmp_path / "odd.pt")


def test_weights_of_another_layout_do_not_fit(tmp_path, small_model):
    content = {"model": small_model.state_dict(), "layout": SMALL_LAYOUT.to_dict()}
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"does not fit the network: unexpected"):
        load_model(tmp_path / "other.pt")


# --- What is made to do harm ---


def few_tensors(**others):
    """What tells that a network is an SSD with a ResNet-18."""
    trunk = "feature_extractor.feature_extractor"
    blocks = [f"{trunk}.{stage}.{block}.bn1.weight" for stage in (4, 5, 6) for block in (0, 1)]
    return {f"{trunk}.0.weight": torch.ones(2)} | dict.fromkeys(blocks, torch.ones(2)) | others


def conf(*shape):
    return few_tensors(**{"conf.0.weight": torch.zeros(*shape)})


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize(
    "shape", [(4 * 10**10, 0, 1, 1), (4 * 10**10, 1, 1, 0), (0, 512, 3, 3), (12, 0, 3, 3)]
)
def test_classes_are_no_more_than_there_are_weights_for(tmp_path, monkeypatch, kind, shape):
    monkeypatch.setattr(checkpoint, "_class_names", None)  # which makes as many names
    if kind == "safetensors":
        tensors = {key: value.clone() for key, value in conf(*shape).items()}
        (tmp_path / "w").write_bytes(safetensors.torch.save(tensors))
    else:
        torch.save(conf(*shape), tmp_path / "w", _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match="not an SSD300 with a ResNet trunk; it begins with"):
        checkpoint.read(tmp_path / "w")


def test_a_pickle_cannot_stand_for_weights_that_are_not_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_class_names", None)
    torch.save(few_tensors(**{"conf.0.weight": torch.zeros(1).expand(4 * 10**9, 1, 1, 1)}), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="not an SSD300 with a ResNet trunk"):
        checkpoint.read(tmp_path / "w.pt")


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": (10**400, 16, 32, 96)},
        {"size": 10**600},
        {"maps": (12,) * 10**5},
        {"scales": "1" * 10**6},
        {
            **{"size": 4096, "maps": tuple(range(512, 480, -2)), "steps": (8,) * 16, "scales": (9,) * 17},
            "aspect_ratios": ((2,) * 16,) * 16,
        },
    ],
)
def test_layouts_of_absurd_sizes_are_refused(changes):
    with pytest.raises(CheckpointError, match="its layout is none of a network's") as caught:
        checkpoint.describe(Path("w"), conf(12, 1, 1, 1), {"layout": SMALL_LAYOUT.to_dict() | changes})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "notes",
    [
        {"label_map": {1: "a" * 10**6, 7: "b\x1b[31m\n"}},
        {"class_names": ["\ud800" * 10**5] * 3},
        {"label_map": {10**600: "a", 1: "b"}},
        {"class_names": ["a\r", "b"], "names": ["\x07" * 999, "c"]},
    ],
)
def test_names_of_classes_are_told_in_a_line_that_a_terminal_can_show(notes):
    with pytest.raises(CheckpointError, match="class names?") as caught:
        checkpoint.describe(Path("w"), conf(12, 1, 1, 1), notes)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2000


def test_category_ids_that_no_file_can_have_are_none():
    described = checkpoint.describe(Path("w"), conf(12, 1, 1, 1), {"category_ids": [1, 2**63]})
    assert described.category_ids == ()


def test_values_that_are_finite_only_as_they_were_saved(small_model):
    state_dict = small_model.state_dict()
    huge = state_dict["loc.2.bias"].double() + 1e300
    with pytest.raises(CheckpointError, match=r"loc\.2\.bias holds NaN or infinity"):
        checkpoint.require_fit("w", state_dict | {"loc.2.bias": huge}, state_dict)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_calibration_is_kept_and_an_impossible_one_refused(suffix, tiny_model, tmp_path):
    path, names = tmp_path / f"calibrated{suffix}", ("a", "b", "c")
    made = Calibration(0.5, -1.0, 0.1, 0.9, 50)
    checkpoint.save(path, tiny_model.state_dict(), names, layout=SMALL_LAYOUT, calibration=made)
    assert checkpoint.read(path).calibration == made
    vars(made)["temperature"] = -1.0
    checkpoint.save(path, tiny_model.state_dict(), names, layout=SMALL_LAYOUT, calibration=made)
    with pytest.raises(checkpoint.CheckpointError, match="its calibration cannot be used: a calibration has"):
        checkpoint.read(path)
