import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import SMALL_LAYOUT, made_model

from ssd import checkpoint
from ssd.boxes import PUBLISHED_LAYOUT
from ssd.errors import CheckpointError
from ssd.labels import COCO_NAMES
from ssd.model import load_model


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


@pytest.mark.parametrize("labels", [{"²": "a", "--1": "b", "9" * 5000: "c"}, [1], {1: 3}, None])
def test_odd_class_names_are_left_out(tmp_path, small_model, labels):
    torch.save({"model": small_model.state_dict(), "label_map": labels}, tmp_path / "odd.pt")
    assert checkpoint.read(tmp_path / "odd.pt").class_names == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize("names", ["5", "null", "[" * 100_000, "{"])
def test_odd_metadata_is_refused(tmp_path, small_model, names):
    import safetensors.torch

    state = {key: value.contiguous() for key, value in small_model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "odd.safetensors", {"class_names": names})
    with pytest.raises(CheckpointError, match="odd.safetensors"):
        load_model(tmp_path / "odd.safetensors")


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
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_all_that_is_saved_is_read(tmp_path, suffix):
    model = made_model(layout=SMALL_LAYOUT)
    path, config = tmp_path / f"w{suffix}", {"epochs": 3, "milestones": [0.5]}
    names = ("cat", "cup", "person")
    checkpoint.save(
        path, model.state_dict(), names, category_ids=[7, 9, 1], config=config, layout=SMALL_LAYOUT
    )
    found = checkpoint.read(path)
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
