import argparse
import datetime
import importlib
import json
import pathlib
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.swa_utils import AveragedModel

from ssd import containers, pretrained
from ssd.errors import CheckpointError

NAMES = (
    "feature_extractor.feature_extractor.0.weight",
    "feature_extractor.feature_extractor.1.running_mean",
    "additional_blocks.0.0.weight",
    "loc.0.weight",
    "conf.0.weight",
    "conf.0.bias",
)


def made(seed=0):
    """Tensors with the names of an SSD's, small."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(2, 3, generator=generator) for name in NAMES}


def with_prefix(prefix, tensors):
    return {prefix + key: value for key, value in tensors.items()}


def find(content):
    return containers.find_network(pathlib.Path("w.pt"), content)


def assert_is(network, expected):
    assert network.tensors.keys() == expected.keys()
    assert all(torch.equal(network.tensors[key], value) for key, value in expected.items())


def through_file(tmp_path, content, name="w.pt"):
    torch.save(content, tmp_path / name)
    return containers.read(tmp_path / name)[0]


# --- Finding ---

PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.",
    "net.",
    "ema_model.",
    "student.",
    "1.",
    "_forward_module.",
    "ssd.",
)
HOLDERS = (
    "state_dict",
    "model_state_dict",
    "net",
    "network",
    "model_ema",
    "ema_state_dict",
    "weights",
    "any",
)
COMPANY = {
    "epoch": 3,
    "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
    "pytorch-lightning_version": "2.5.0",
    "loss": [0.5, 0.25],
    "n": torch.tensor(4),
}


@given(
    prefixes=st.lists(st.sampled_from(PREFIXES), max_size=4),
    holders=st.lists(st.sampled_from(HOLDERS), max_size=4),
    counter=st.sampled_from([None, "n_averaged", "num_updates", "module.n_averaged", "initted"]),
    company=st.lists(st.sampled_from(sorted(COMPANY)), unique=True),
)
def test_any_nesting_of_wrappers_and_containers_is_read(prefixes, holders, counter, company):
    content = with_prefix("".join(prefixes), made())
    if counter:
        content[counter] = torch.tensor(7)
    for holder in holders:
        content = {key: COMPANY[key] for key in company} | {holder: content}
    assert_is(find(content), made())


def test_wrappers_within_a_name_are_left_out():
    inner = {key.replace("extractor.feature", "extractor._orig_mod.feature"): v for key, v in made().items()}
    assert any("_orig_mod" in key for key in inner)
    assert_is(find(inner), made())


def test_names_that_would_collide_stay_as_they_are():
    other = made(1)
    with pytest.raises(CheckpointError, match=r"holds 2 networks: \*, module\.\*"):
        find(made() | with_prefix("module.", other))
    network = find(with_prefix("module.", made()) | {"loc.0.weight": other["loc.0.weight"]})
    assert_is(network, made())
    assert list(network.beside) == ["loc.0.weight"]


@pytest.mark.parametrize(
    "content",
    [
        lambda model, average: {"model": model, "ema": average, "updates": 3},
        lambda model, average: {"epoch": 1, "arch": "ssd", "state_dict": model, "state_dict_ema": average},
        lambda model, average: {"ema": {"module": average}, "model": model},
        lambda model, average: {"model": model, "model_ema": average, "best": model},
        lambda model, average: {"model": model, "average": average},  # a run's state.pt
        lambda model, average: {"model": model, "average_model": with_prefix("module.", average)},
        lambda model, average: {
            "state_dict": with_prefix("model.", model) | with_prefix("ema.module.", average)
        },
        lambda model, average: with_prefix("online_model.", model) | with_prefix("ema_model.", average),
        lambda model, average: model | with_prefix("ema.", average),
        lambda model, average: {"weights": model, "swa_state_dict": average},
        lambda model, average: {"state_dict": average, "current_model_state": model, "averaging_state": {}},
    ],
)
def test_the_average_is_read_where_there_are_both(content):
    assert_is(find(content(made(), made(1))), made(1))


def test_an_average_of_parameters_alone_has_the_models_statistics():
    shadow = {key: value for key, value in made(1).items() if "running" not in key}
    network = find({"model": made(), "ema": {"decay": 0.99, "shadow": shadow}})
    assert_is(network, made() | shadow)


def test_a_name_that_merely_contains_the_letters_is_no_average():
    with pytest.raises(CheckpointError, match="2 networks"):
        find({"schema": made(), "semantic": made(1)})


def test_the_same_tensors_twice_are_one_network(tmp_path):
    model = made()
    content = through_file(tmp_path, {"state_dict": dict(model), "model": dict(model), "best": model})
    assert_is(find(content), model)


@pytest.mark.parametrize(
    "content",
    [
        {"best_state_dict": made(), "last_state_dict": made(1)},
        {"runs": {"a": {"model": made()}, "b": {"model": made(1)}}},
        with_prefix("student.", made()) | with_prefix("teacher.", made(1)),
        {"state_dict": with_prefix("module.student.", made()) | with_prefix("module.teacher.", made(1))},
        made() | with_prefix("other.", made(1)),
        [made(), made(1)],
    ],
)
def test_of_several_networks_the_advice_saves_one(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save([content, np.float64(1), np.arange(3)], "both.ckpt")
    with pytest.raises(CheckpointError, match="holds 2 networks") as caught:
        containers.find_network(pathlib.Path("both.ckpt"), containers.read(pathlib.Path("both.ckpt"))[0])
    exec(str(caught.value).split("as by: ")[1], {})
    found = find(containers.read(pathlib.Path("both-weights.pt"))[0])
    assert any(torch.equal(found.tensors["conf.0.weight"], made(seed)["conf.0.weight"]) for seed in (0, 1))


def test_containers_that_hold_themselves_or_are_very_many_end(tmp_path):
    loop = {"model": made()}
    loop["self"] = loop
    wide = [[[[[]] * 1000] * 1000] * 1000] * 1000
    assert_is(find({"wide": wide, "loop": loop}), made())


def torchvision_keys(name):
    import torchvision.models.detection as models

    with torch.device("meta"):
        return getattr(models, name)(weights=None, weights_backbone=None).state_dict()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ssd300_vgg16", "torchvision's ssd300_vgg16"),
        ("ssdlite320_mobilenet_v3_large", "torchvision's ssdlite320"),
        ("fasterrcnn_resnet50_fpn", "torchvision's Faster R-CNN"),
        ("retinanet_resnet50_fpn", "torchvision's RetinaNet"),
        ("fcos_resnet50_fpn", "torchvision's FCOS"),
    ],
)
def test_other_networks_are_told_by_name(name, told):
    with pytest.raises(CheckpointError, match=f"not an SSD300 with a ResNet trunk; .*those of {told};"):
        find({"model": torchvision_keys(name)})


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["vgg.0.weight", "L2Norm.weight", "extras.0.weight", "loc.0.weight", "conf.0.weight"], "amdegroot"),
        (["backbone.vgg.0.weight", "box_head.predictor.cls_headers.0.weight"], r"lufficc's SSD \(VGG16\)"),
        (["model.layer1.0.weight", "additional_blocks.0.0.weight", "conf.0.weight"], "MLPerf"),
        (
            ["conv1.weight", "layer1.0.conv1.weight", "layer3.0.conv1.weight", "fc.weight"],
            "--backbone-weights",
        ),
        (NAMES[:2], "trunk, without its heads"),
    ],
)
def test_other_networks_of_which_only_names_are_known(names, told):
    with pytest.raises(CheckpointError, match=f"named as those of .*{told}"):
        find(with_prefix("module.", {name: torch.zeros(2) for name in names}))


def test_a_network_that_nobody_knows_is_told_by_its_first_names():
    with pytest.raises(CheckpointError, match=r"trunk; it begins with a, b, c\. Pass weights of"):
        find({key: torch.zeros(1) for key in "abcd"})


# --- Reading ---


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".pkl", ".bin", ".pth.tar", ".safetensors", ""])
@pytest.mark.parametrize("zipped", [True, False])
def test_the_content_says_what_a_file_is(tmp_path, suffix, zipped):
    torch.save(made(), tmp_path / f"w{suffix}", _use_new_zipfile_serialization=zipped)
    assert_is(find(containers.read(tmp_path / f"w{suffix}")[0]), made())


def test_plain_data_of_other_kinds_is_no_obstacle(tmp_path):
    content = {
        "map": np.float64(0.25),
        "counts": {
            "a": np.int64(7),
            "big": np.array(5, ">i4")[()],
            "yes": np.bool_(True),
            "h": np.float16(0.5),
        },
        "text": np.str_("käse"),
        "curve": np.arange(6).reshape(2, 3),
        "random": np.random.get_state(),
        "args": argparse.Namespace(lr=0.1, path=pathlib.Path("data")),
        "where": [pathlib.Path("runs"), pathlib.PureWindowsPath("C:/runs")],
        "when": datetime.datetime(2024, 5, 1, tzinfo=datetime.timezone.utc),
        "seen": defaultdict(list, {"a": [1]}),
        "last": deque([0.5, 0.25], maxlen=2),
        "nothing": b"",
        "rest": (frozenset([1]), range(3), slice(2), np.dtype("f4"), OrderedDict(a=1)),
        "model": made(),
    }
    for zipped in (True, False):
        torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
        read, _ = containers.read(tmp_path / "w.pt")
        assert_is(find(read), made())
        assert (read["map"], read["text"], read["seen"]) == (0.25, "käse", {"a": [1]})
        assert read["counts"] == {"a": 7, "big": 5, "yes": True, "h": 0.5}
        assert {type(each) for each in read["counts"].values()} == {int, bool, float}


class Pretender:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE = [
    lambda marker: Pretender(pathlib.Path.touch, marker),
    lambda marker: {"map": np.float64(1), "more": Pretender(exec, f"open({str(marker)!r}, 'w')")},
    lambda marker: Pretender(eval, f"open({str(marker)!r}, 'w')"),
    lambda marker: [np.float64(1), Pretender(getattr, Pretender(pathlib.Path, str(marker)), "touch")],
    lambda marker: Pretender(np.save, str(marker), 1),
    lambda marker: Pretender(subprocess.call, ["touch", str(marker)]),
]


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_of_a_file_is_ever_run(tmp_path, hostile, zipped):
    marker = tmp_path / "ran.npy"
    content = {"model": made(), "args": argparse.Namespace(), "hooks": hostile(marker)}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="not loaded for safety") as caught:
        containers.read(tmp_path / "w.pt")
    assert not marker.exists()
    assert "weights_only" not in str(caught.value)


def test_what_is_allowed_for_a_load_is_not_after_it(tmp_path):
    torch.save({"model": made(), "map": np.float64(1)}, tmp_path / "w.pt")
    before = set(torch.serialization.get_safe_globals())
    containers.read(tmp_path / "w.pt")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError, match="scalar"):
        torch.load(tmp_path / "w.pt", weights_only=True)


class Number:
    """Pickles as numpy's numbers do, of any kind and content."""

    def __init__(self, code, content):
        self.code, self.content = code, content

    def __reduce__(self):
        return np.float64(1).__reduce__()[0], (np.dtype(self.code), self.content)


@pytest.mark.parametrize("content", [b"", b"123", b"1" * 9, "text", None, []])
@pytest.mark.parametrize("code", ["f8", "O", "V8", "M8[ns]", "U2", "S4", "i4,f8"])
def test_odd_numbers_are_errors_or_left_out(tmp_path, content, code):
    torch.save({"model": made(), "n": Number(code, content)}, tmp_path / "w.pt")
    try:
        assert_is(find(containers.read(tmp_path / "w.pt")[0]), made())
    except CheckpointError as error:
        assert "w.pt: damaged" in str(error)


PROGRAM = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conf = torch.nn.ModuleList([torch.nn.Conv2d(1, 1, 1)])
        self.feature_extractor = torch.nn.Module()
        self.feature_extractor.feature_extractor = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1))
"""


def test_what_is_not_loaded_for_safety_can_be_saved_anew_as_advised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    net = importlib.import_module("program").Net()
    torch.save(net, "whole.v1.pt")
    torch.save({"model": net, "map": np.float64(1)}, "dict.pth.tar")
    pathlib.Path("pickle.pkl").write_bytes(pickle.dumps(net))
    torch.save(net.state_dict(), "protocol.pt", pickle_protocol=4)
    loads = {
        "whole.v1.pt": "torch.load(name, weights_only=False)",
        "dict.pth.tar": "torch.load(name, weights_only=False)['model']",
        "pickle.pkl": "pickle.load(open(name, 'rb'))",
        "protocol.pt": "program.Net(); model.load_state_dict(torch.load(name, weights_only=False))",
    }
    code = ["import pickle, torch, program"]
    for name, load in loads.items():
        with pytest.raises(CheckpointError, match=r"save its model's tensors alone: ") as caught:
            containers.read(pathlib.Path(name))
        assert "weights_only" not in str(caught.value)
        advice = re.search(r"torch\.save\(model.*?'\)", str(caught.value))[0]
        code.append(f"name = {name!r}; model = {load}; {advice}")
    subprocess.run([sys.executable, "-W", "ignore", "-c", "\n".join(code)], check=True)
    for name in loads:
        anew = pathlib.Path(f"{name.split('.')[0]}-weights.pt")
        assert find(containers.read(anew)[0]).tensors.keys() == net.state_dict().keys()


def test_a_plain_pickle_is_told_and_its_arrays_can_be_saved_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    c = {key: value.numpy() for key, value in made().items()}
    for protocol in (2, 3, 4, 5):
        pathlib.Path("zoo.pkl").write_bytes(pickle.dumps(c, protocol=protocol))
        with pytest.raises(CheckpointError, match=r"zoo\.pkl: this is a pickle of Python, not a") as caught:
            containers.read(pathlib.Path("zoo.pkl"))
    exec(re.search(r"torch\.save\(\{.*?'\)", str(caught.value))[0], {"torch": torch, "c": c})
    assert_is(find(containers.read(pathlib.Path("zoo-weights.pt"))[0]), made())


@pytest.mark.parametrize("zipped", [True, False])
def test_kinds_of_checkpoints_are_told_from_programs(tmp_path, zipped):
    import safetensors.torch

    path = tmp_path / "w.onnx"
    for protocol in (2, 4):
        torch.save(made(), path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
        assert containers.checkpoint_kind(path) == "a checkpoint of torch"
    safetensors.torch.save_file(made(), path)
    assert containers.checkpoint_kind(path) == "a safetensors file"
    for content in (b"", b"hello", b"PK\3\4", b"\x08\x08\x12\x07pytorch"):
        path.write_bytes(content)
        assert containers.checkpoint_kind(path) == ""


def test_what_was_read_can_be_saved_and_is_plain_then(tmp_path):
    content = {"model": made(), "map": np.float64(1), "curve": np.arange(3), "kind": np.dtype("f4")}
    torch.save(through_file(tmp_path, content), tmp_path / "anew.pt")
    assert torch.load(tmp_path / "anew.pt", weights_only=True)["map"] == 1


def test_arrays_in_place_of_tensors_are_named(tmp_path):
    content = through_file(tmp_path, {key: value.numpy() for key, value in made().items()})
    with pytest.raises(CheckpointError, match=r"weight' is an array or other object, not a tensor"):
        find(content)


def test_files_that_stand_for_others_say_so(tmp_path):
    (tmp_path / "w.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(CheckpointError, match=r"w\.pt: this is a Git LFS pointer.*git lfs pull"):
        containers.read(tmp_path / "w.pt")


def test_archives_say_what_is_in_them(tmp_path):
    torch.save(made(), tmp_path / "best.pt")
    with zipfile.ZipFile(tmp_path / "run.zip", "w") as archive:
        archive.writestr("run/config.json", "{}")
        archive.write(tmp_path / "best.pt", "run/best.pt")
    with pytest.raises(CheckpointError, match=r"this is a zip archive.*; unpack it.*: run/best\.pt$"):
        containers.read(tmp_path / "run.zip")
    with tarfile.open(tmp_path / "run.pth.tar", "w") as archive:
        archive.add(tmp_path / "best.pt", "best.pt")
    with pytest.raises(CheckpointError, match="this is a tar archive.*; unpack it"):
        containers.read(tmp_path / "run.pth.tar")


# --- Files in parts ---


def sharded(folder, save, names):
    state, parts = made(), {}
    for i, key in enumerate(state):
        parts.setdefault(names[i % len(names)], {})[key] = state[key]
    for name, part in parts.items():
        save(part, folder / name)
    return {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_parts_are_read_by_their_index_or_folder(tmp_path, kind):
    import safetensors.torch

    save = safetensors.torch.save_file if kind == "safetensors" else torch.save
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = [f"{stem}-0000{i}-of-00002.{kind}" for i in (1, 2)]
    index = tmp_path / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps(sharded(tmp_path, save, names)))
    assert_is(find(containers.read(index)[0]), made())
    assert pretrained.weights_in(tmp_path) == index
    (tmp_path / names[1]).unlink()
    with pytest.raises(CheckpointError, match=f"names the file '{names[1]}'"):
        containers.read(index)


@pytest.mark.parametrize("name", ["../outside.pt", "/etc/passwd", "", "sub/w.pt", "w.pt.index.json", 3])
def test_an_index_reads_nothing_elsewhere(tmp_path, name):
    torch.save(made(), tmp_path / "outside.pt")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    torch.save(made(), folder / "sub" / "w.pt")
    (folder / "w.pt.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="which has to lie beside it"):
        containers.read(folder / "w.pt.index.json")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "[" * 100_000]
)
def test_a_damaged_index_is_an_error(tmp_path, text):
    (tmp_path / "w.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"w\.index\.json"):
        containers.read(tmp_path / "w.index.json")


def test_the_state_of_torchs_own_average_is_read():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conf = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
            self.feature_extractor = torch.nn.Module()
            self.feature_extractor.feature_extractor = torch.nn.Sequential(torch.nn.Linear(2, 2))

    net = Net()
    for content in (AveragedModel(net).state_dict(), {"module": AveragedModel(net).state_dict()}):
        assert_is(find(content), net.state_dict())
