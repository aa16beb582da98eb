import argparse
import datetime
import errno
import importlib
import io
import itertools
import json
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict, defaultdict, deque

import numpy as np
import pytest
import safetensors.torch
import torch
from tensors import assert_is, find, made, through_file

from ssd import containers, pretrained
from ssd.errors import CheckpointError


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


# --- What is made to do harm ---


def bytes_of(kind, tensors):
    if kind == "safetensors":
        return safetensors.torch.save(tensors)
    buffer = io.BytesIO()
    torch.save(tensors, buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_that_was_cut_off_anywhere_is_told_by_its_name(tmp_path, kind):
    more = {"more": torch.zeros(2000)}  # torch looks for the end of a zip in blocks of 4,096 bytes
    whole, path = bytes_of(kind, made() | more), tmp_path / "weights.pt"
    for length in {*range(0, len(whole), 43), *range(len(whole) - 60, len(whole))}:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as caught:
            containers.read(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert str(caught.value).isprintable()
    path.write_bytes(whole)
    assert containers.read(path)[0].keys() == {*made(), "more"}


def test_an_error_of_the_disk_is_one_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "w.pt").write_bytes(bytes_of("legacy", made()))

    def load(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(OSError, match="Input/output") as caught:
        containers.read(tmp_path / "w.pt")
    assert not isinstance(caught.value, CheckpointError)
    assert caught.value.filename == str(tmp_path / "w.pt")


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def with_pickle(path, pickled, **options):
    """A zip of torch with a pickle of our own."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("w/data.pkl", pickled)
        archive.writestr("w/version", b"3\n")


PAIRS = b")" + b"q\x05h\x05\x86" * 60  # a pair of a pair of ...
NESTED = b")" + b"\x85" * 2_000_000
HEXED = b"c_codecs\nencode\n" * 30 + text("ab") + (text("hex") + b"\x86R") * 30  # each twice as long
TYPED = (
    b"ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nbytearray\nctorch\nTensor\nJ\xff\xff\xff\x7f\x85}tR"
)
CALLED = b"ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R"  # as many as that, of memory as it is found


@pytest.mark.parametrize(
    ("pickled", "told"),
    [
        (b"\x80\x02}" + PAIRS + b"K\x01s.", "announces lists and dicts that are too many"),
        (b"\x80\x02}" + NESTED + b"K\x01s.", "announces lists and dicts that are too many, or too deep"),
        (b"\x80\x02cbuiltins\nset\n](" + PAIRS + b"e\x85R.", "announces lists and dicts that are too many"),
        (b"\x80\x02}" + text("a") + CALLED + b"s.", "a call of torch.FloatTensor that torch.save does not"),
        (b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "a call of builtins.bytearray that"),
        (b"\x80\x02" + HEXED + b".", "a call of _codecs.encode that torch.save does not write"),
        (
            b"\x80\x02ccollections\nCounter\n" + TYPED + b"\x85R.",
            "a call of torch._tensor._rebuild_from_type_v2",
        ),
        (b"\x80\x02](" + b"N" * 4_100_000 + b"e.", "announces lists and dicts that are too many"),
        (
            b"\x80\x02}" + text("a") + b"ctorch\n_utils._rebuild_sparse_tensor\n)Rs.",
            "holds a sparse tensor, a kind",
        ),
        (
            b"\x80\x02}" + text("a") + b"ctorch._utils\n_rebuild_nested_tensor\n)Rs.",
            "holds a nested tensor, a kind",
        ),
    ],
    ids=[
        *("pairs as a key", "nested as a key", "pairs in a set", "made by the pickle", "bytearray", "hex"),
        *("bytearray by a detour", "very many values", "sparse by another spelling", "nested tensor"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_few_bytes_take_neither_time_nor_memory_nor_the_process(tmp_path, pickled, told, zipped):
    path = tmp_path / "w.pt"
    if zipped:
        with_pickle(path, pickled)
    else:
        begin = bytes_of("legacy", {})
        path.write_bytes(begin[: begin.rindex(b"\x80\x02}q\x00.")] + pickled + b"\x80\x02]q\x00.")
    with pytest.raises(CheckpointError, match=told):
        containers.read(path)


def test_what_is_used_twice_in_earnest_is_read(tmp_path):
    row = {"id": 1, "names": [f"class {i}" for i in range(80)]}
    content = through_file(tmp_path, {"model": made(), "rows": [row] * 10_000, ("a", ("b", 1)): 2})
    assert content["rows"][9_999] == row
    assert content["a", ("b", 1)] == 2
    assert_is(find(content), made())


def test_a_file_that_unfolds_to_far_more_than_its_size_is_refused(tmp_path):
    path = tmp_path / "w.pt"
    with_pickle(path, b"\x80\x02}." + b"\0" * 80_000_000, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(
        CheckpointError, match=r"announces 80,000,006 bytes in memory, which 7\d,\d\d\d bytes"
    ):
        containers.read(path)
    torch.save(made(), tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert_is(find(containers.read(path)[0]), made())


def test_one_record_is_not_read_under_many_names(tmp_path):
    """torch tells keys apart that its archive does not: "ab", "aB", "Ab" and "AB" are one record."""
    names = ["".join(pair) for pair in itertools.product(*zip("abcdefgh", "ABCDEFGH", strict=True))]
    tensors = b"".join(
        text(name)
        + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + text("storage") + b"ctorch\nFloatStorage\n" + text(name) + text("cpu") + b"J\0\0\4\0tQ"
        + b"K\0J\0\0\4\0\x85K\1\x85\x89ccollections\nOrderedDict\n)RtR"
        for name in names
    )  # fmt: skip
    with_pickle(tmp_path / "w.pt", b"\x80\x02}(" + tensors + b"u.")
    with zipfile.ZipFile(tmp_path / "w.pt", "a") as archive:
        archive.writestr("w/data/abcdefgh", bytes(4 << 18))
    with pytest.raises(CheckpointError, match="announces tensors that are larger than the file"):
        containers.read(tmp_path / "w.pt")


def test_what_a_legacy_file_announces_is_no_larger_than_it(tmp_path):
    whole = bytes_of("legacy", {"a": torch.zeros(300)})
    (tmp_path / "w.pt").write_bytes(whole.replace(struct.pack("<H", 300), b"\xff\xff"))
    with pytest.raises(CheckpointError, match="announces tensors that are larger than the file"):
        containers.read(tmp_path / "w.pt")


def test_attributes_that_a_file_sets_are_not_kept(tmp_path):
    ordered = b"ccollections\nOrderedDict\n)R"
    with_pickle(tmp_path / "w.pt", b"\x80\x02" + ordered + text("k") + b"K\1s}" + text("items") + b"K\5sb.")
    content, _ = containers.read(tmp_path / "w.pt")
    assert content == {"k": 1}
    assert type(content) is dict


@pytest.mark.parametrize(
    "name", ["../w.safetensors", "./w.safetensors", "a" * 5000, "a\0b", "\ud800", "\x1b[2J\n", 5]
)
def test_an_index_names_files_beside_it_alone(tmp_path, name):
    (tmp_path / "w.safetensors").write_bytes(bytes_of("safetensors", made()))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="has to lie beside it, and does not") as caught:
        containers.read(index)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
