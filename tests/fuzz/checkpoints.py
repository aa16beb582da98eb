"""Checkpoints in torch's two containers and in safetensors, whole or in parts: their bytes and content."""

import io
import json
import pickletools
import random
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fuzz.engine import OUTSIDE, PAYLOAD, Case, some_bytes
from ssd import checkpoint
from ssd.boxes import PUBLISHED_LAYOUT
from ssd.errors import CheckpointError
from ssd.model import build

_TRUNK = "feature_extractor.feature_extractor"
_TORCH, _PARTS = "weights.pt", "model.safetensors.index.json"


def _tensors() -> dict[str, Any]:
    """What tells that a network is an SSD with a ResNet-18, and how many classes it has."""
    blocks = [f"{_TRUNK}.{stage}.{block}.bn1.running_var" for stage in (4, 5, 6) for block in (0, 1)]
    return {
        f"{_TRUNK}.0.weight": torch.ones(2, 3),
        **{name: torch.ones(2) for name in blocks},
        "conf.0.weight": torch.ones(12, 1, 1, 1),
    }


def _content() -> dict[str, Any]:
    layout = PUBLISHED_LAYOUT.to_dict()
    names = {0: "background", 1: "cat", 2: "cup"}
    return {
        "model": _tensors(),
        "label_map": names,
        "layout": layout,
        "category_ids": [3, 7],
        "config": {"a": 1},
    }


def saved(content: object, *, zipped: bool = True) -> bytes:
    """What torch writes; its legacy files sort storages by their place in memory, here by a count."""
    buffer = io.BytesIO()
    with mock.patch.object(torch.serialization, "sorted", list, create=True):
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    if zipped:
        return buffer.getvalue()
    names: dict[bytes, bytes] = {}
    return re.sub(
        rb"(?<=X\x0e\0\0\0)\d{14}(?=q|r)",
        lambda found: names.setdefault(found[0], b"%014d" % len(names)),
        buffer.getvalue(),
    )


def _safetensors(tensors: dict[str, Tensor], notes: dict[str, str] | None = None) -> bytes:
    """As safetensors writes them, whose own order of notes is by chance."""
    header: dict[str, Any] = {"__metadata__": notes} if notes else {}
    data = b""
    for key, value in tensors.items():
        new = value.numpy().tobytes()
        header[key] = {
            "dtype": "F32",
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(new)],
        }
        data += new
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _notes() -> dict[str, str]:
    notes = {"class_names": ["cat", "cup"], "layout": PUBLISHED_LAYOUT.to_dict(), "category_ids": [3, 7]}
    return {key: json.dumps(value) for key, value in notes.items()}


@cache
def _seeds() -> list[Case]:
    tensors = _tensors()
    first = {key: tensors.pop(key) for key in list(tensors)[:4]}
    places = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(tensors, "b.safetensors")
    parts = {
        "a.safetensors": _safetensors(first),
        "b.safetensors": _safetensors(tensors),
        _PARTS: json.dumps({"metadata": {}, "weight_map": places}).encode(),
    }
    whole = _safetensors(_tensors(), _notes())
    return [*({_TORCH: saved(_content(), zipped=zipped)} for zipped in (True, False)), {_TORCH: whole}, parts]


def seeds() -> list[Case]:
    """One for each container, and one in parts."""
    return [dict(case) for case in _seeds()]


def mutate(rng: random.Random, case: Case) -> Case:
    """Other bytes, other instructions of the pickle, or another content."""
    if _PARTS in case:
        name = rng.choice(sorted(case))
        return case | {
            name: _other_index(rng) if name == _PARTS and rng.random() < 0.6 else some_bytes(rng, case[name])
        }
    data = case[_TORCH]
    way = rng.randrange(4)
    if way == 0:
        return {_TORCH: some_bytes(rng, data)}
    if data[8:9] == b"{":
        return {_TORCH: _other_safetensors(rng)}
    if way == 1:
        return {_TORCH: _with_pickle(data, lambda pickled: _other_instructions(rng, pickled))}
    if way == 2:
        return {_TORCH: _with_pickle(data, lambda _: _program(rng), rng.random() < 0.3)}
    return {_TORCH: saved(_other_content(rng), zipped=rng.random() < 0.6)}


def promise(case: Case, folder: Path) -> str:
    """A checkpoint is read, or refused in one line that names it; nothing in it is run, whatever it says."""
    path = folder / (_PARTS if _PARTS in case else _TORCH)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = checkpoint.read(path)
        with torch.device("meta"):
            expected = build(found).state_dict()
        checkpoint.require_fit(path, found.state_dict, expected)
    except CheckpointError as error:
        told = str(error)
        assert str(folder) in told, told
        assert told.isprintable(), told
        assert len(told) < 1000, told
        return "refused" if "does not fit the network" not in told else "read"
    raise AssertionError("its tensors are too small to be taken")


# --- Content ----------------------------------------------------------------------------------------------

_NAMES = (
    "",
    "a" * 100_000,
    "\x1b[31mred\n\r\x07",
    "\ud800",
    "module." * 50,
    "model.conf.0.weight",
    "a\0b",
    "ä" * 999,
)
_NUMBERS = (0, -1, 1, 2, 6, 12, 2**31, 2**62, 10**600, 0.5, float("nan"), float("inf"), True, None)


def _value(rng: random.Random) -> Any:
    ways: tuple[Callable[[], Any], ...] = (
        lambda: rng.choice(_NAMES),
        lambda: rng.choice(_NUMBERS),
        lambda: [rng.choice(_NAMES) for _ in range(rng.choice((0, 2, 1000)))],
        lambda: {rng.choice(_NUMBERS): rng.choice(_NAMES) for _ in range(3)},
        lambda: _twice(rng.choice((list, tuple)), rng.choice((5, 26, 60))),
        lambda: _deep(rng.choice((list, tuple)), rng.choice((50, 300))),
        lambda: _tensor(rng),
        lambda: {rng.choice(_NAMES): _tensors()},
    )
    return rng.choice(ways)()


def _twice(kind: Callable[[Any], Any], times: int) -> Any:
    value = kind([])
    for _ in range(times):
        value = kind([value, value])
    return value


def _deep(kind: Callable[[Any], Any], times: int) -> Any:
    value = kind([])
    for _ in range(times):
        value = kind([value])
    return value


def _tensor(rng: random.Random) -> Tensor:
    ways: tuple[Callable[[], Tensor], ...] = (
        lambda: torch.zeros(rng.choice(([4 * 10**10, 0, 1, 1], [0, 512, 3, 3], [12, 0, 3, 3], [0], []))),
        lambda: torch.zeros(1).expand(rng.choice(([10**12, 1, 1, 1], [12, 512, 3, 3], [10**9]))),
        lambda: torch.arange(40.0).as_strided((12, 2, 3, 3), (1, 1, 1, 1)),
        lambda: torch.ones(
            12, 1, 1, 1, dtype=rng.choice((torch.complex64, torch.bool, torch.int8, torch.float64))
        ),
        lambda: torch.ones(rng.choice((6, 7, 18, 6000)), 1, 1, 1),
        lambda: torch.ones([1] * rng.choice((5, 70))),
        lambda: torch.full((12, 1, 1, 1), rng.choice((float("nan"), 1e300)), dtype=torch.float64),
        lambda: torch.empty(rng.choice((12, 10**13)), 1, 1, 1, device="meta"),
        lambda: torch.eye(12).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.ones(12, 1, 1, 1), 0.1, 0, torch.qint8),
        lambda: torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.nn.Parameter(torch.ones(12, 1, 1, 1)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rng.choice(ways)()


def _other_content(rng: random.Random) -> Any:
    content = _content()
    model = content["model"]
    places = (content, model, content["layout"], content["label_map"])
    for _ in range(rng.choice((1, 1, 2, 4))):
        where = rng.choice(places)
        key: Any = rng.choice((*where, *_NAMES, *_NUMBERS[:4], *checkpoint._NAMES))
        if rng.random() < 0.15:
            key = _twice(tuple, 3)
        elif rng.random() < 0.3:
            where.pop(key, None)
            continue
        if where is content and key in ("model", "layout", "label_map"):
            continue
        where[key] = _value(rng)
    if rng.random() < 0.1:
        model |= {f"{n}.{key}": value for n in range(150) for key, value in model.items()}
    return content if rng.random() < 0.8 else [content, _value(rng)]


def _other_safetensors(rng: random.Random) -> bytes:
    data = _safetensors(_tensors(), _notes())
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(rng.choice((1, 2, 4))):
        name = rng.choice(sorted(header))
        entry = header[name]
        if name == "__metadata__":
            text = json.dumps(
                rng.choice(("x", 10**600, [[1]], {"a": [0]}, ["\x1b[0m", "b"], _deep(list, 500)))
            )
            entry[rng.choice((*entry, *checkpoint._NAMES))] = rng.choice(
                (text, text[:-1], "[" * 10**5, "1" * 5000)
            )
        elif rng.random() < 0.2:
            header[rng.choice(_NAMES).encode("utf-8", "replace").decode()] = header.pop(name)
        elif rng.random() < 0.5:
            entry["shape"] = rng.choice(([0], [4 * 10**10, 0, 1, 1], [12, 1], [2**63], [1] * 70, [-1], "x"))
            if isinstance(entry["shape"], list) and 0 in entry["shape"]:
                entry["data_offsets"] = [entry["data_offsets"][0]] * 2
        else:
            key = rng.choice(("dtype", "data_offsets"))
            entry[key] = rng.choice(
                ("F64", "BF16", "F8_E5M2", "F4", "C64", "U64", [0, 2**62], [8, 4], [0, 0])
            )
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def _other_index(rng: random.Random) -> bytes:
    names = (
        "a.safetensors",
        "b.safetensors",
        "./a.safetensors",
        "../outside/marker.json",
        "",
        ".",
        "..",
        _PARTS,
    )
    odd = (OUTSIDE.decode() + "/marker.json", "a" * 5000, "a\0b", "\ud800", "\x1b[2J\n", 5, None, ["a"], {})
    places = {key: rng.choice((*names, *odd)) for key in rng.sample(sorted(_tensors()), rng.randrange(1, 8))}
    index = rng.choice(({"weight_map": places},) * 5 + ({}, [], {"weight_map": []}, _deep(list, 5000 // 8)))
    return json.dumps(index).encode()


# --- Pickles ----------------------------------------------------------------------------------------------


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _global(name: str) -> bytes:
    module, _, last = name.rpartition(".")
    return f"c{module}\n{last}\n".encode()


_CALLED = [
    *(f"torch._utils.{name}" for name in sorted(vars(torch._utils)) if name.startswith("_rebuild")),
    *("torch.FloatTensor", "torch.Tensor", "torch.Size", "torch.nn.parameter.Parameter", "torch.device"),
    *(
        "collections.OrderedDict",
        "collections.Counter",
        "builtins.set",
        "builtins.bytearray",
        "_codecs.encode",
    ),
    *(
        "numpy.dtype",
        "numpy.core.multiarray.scalar",
        "collections.deque",
        "builtins.int",
        "torch.FloatStorage",
    ),
    *("os.system", "builtins.eval", "builtins.open", "subprocess.Popen", "torch.load", "torch.hub.load"),
]
_INSTRUCTIONS = (
    *(
        b"(",
        b"]",
        b"}",
        b")",
        b"N",
        b"\x88",
        b"\x89",
        b"\x8f",
        b"R",
        b"b",
        b"a",
        b"e",
        b"s",
        b"u",
        b"t",
        b"Q",
        b"\x81",
    ),
    *(
        b"\x85",
        b"\x86",
        b"\x87",
        b"q\0",
        b"q\1",
        b"h\0",
        b"h\1",
        b"h\2",
        b"K\6",
        b"J\xff\xff\xff\x7f",
        b"0",
        b"2",
        b".",
    ),
    *(
        b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
        b"\x8a\xff" + b"\x01" * 255,
        b"G" + b"\x7f\xf0" + b"\0" * 6,
        b"\x80\4",
    ),
    *(
        b"X\xff\xff\xff\xff",
        b"\x8d" + b"\xff" * 8,
        b"r\xff\xff\xff\x7f",
        _text("storage"),
        _text("cpu"),
        _text("items"),
    ),
)


def _instruction(rng: random.Random) -> bytes:
    return _global(rng.choice(_CALLED)) if rng.random() < 0.3 else rng.choice(_INSTRUCTIONS)


def _other_instructions(rng: random.Random, pickled: bytes) -> bytes:
    places = [place for _, _, place in pickletools.genops(pickled) if place is not None]
    new = bytearray(pickled)
    for place in sorted(rng.sample(places, min(len(places), rng.choice((1, 2, 5)))), reverse=True):
        end = next((each for each in places if each > place), len(pickled))
        if rng.random() < 0.5:
            del new[place:end]
        if rng.random() < 0.7:
            new[place:place] = _instruction(rng) * rng.choice((1, 1, 3, 2000))
    return bytes(new)


def _program(rng: random.Random) -> bytes:
    """A short pickle that calls, nests or repeats something, in a dict with a name of an SSD's tensor."""
    open_marker = _text(f"open({PAYLOAD!r}, 'w').close()") + b"\x85R"
    numbers = b"".join(
        rng.choice((b"K\0", b"K\2", b"J\xff\xff\xff\x7f", b"]", b")", b"N", _text("F"))) for _ in range(3)
    )
    value = rng.choice(
        (
            _global(rng.choice(_CALLED)) + b"(" + numbers + b"tR",
            _global(rng.choice(_CALLED)) + open_marker,
            b")" + b"\x85" * rng.choice((50, 200_000)),
            b")" + b"q\5h\5\x86" * rng.choice((20, 26, 60)),
            b"]" + b"".join(b"q%c](h%ch%ce" % (n, n, n) for n in range(6, 66)),
            _global("collections.OrderedDict") + b")R}" + _text("items") + b"K\5sb",
            b"(" + b"".join(_instruction(rng) for _ in range(rng.randrange(1, 12))) + b"t",
        )
    )
    key = rng.choice((_text("conf.0.weight"), _text(rng.choice(_NAMES)), value))
    return b"\x80\2}(" + key + value + _text("a") + value + b"u."


def _with_pickle(data: bytes, change: Callable[[bytes], bytes], compressed: bool = False) -> bytes:
    """A file of torch with another pickle in it; one that is no zip archive has the content as its fourth."""
    if data[:2] == b"PK":
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                files = {name: archive.read(name) for name in archive.namelist()}
        except Exception:  # damaged already
            return data
        new = io.BytesIO()
        with zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
            for name, content in files.items():
                changed = change(content) if name.endswith("data.pkl") else content
                padding = b"\0" * 10**7 if compressed and "/data/" in name else b""
                archive.writestr(zipfile.ZipInfo(name), changed + padding, archive.compression)
        return new.getvalue()
    file = io.BytesIO(data)
    try:
        places = [file.tell() for _ in range(4) if list(pickletools.genops(file)) or True]
        end = file.tell()
        return data[: places[3]] + change(data[places[3] : end]) + data[end:]
    except ValueError:
        return data
