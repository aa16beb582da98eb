"""Files of weights as others save them: read without running anything, and the network found in them.

A checkpoint may wrap its tensors in dicts of any names (``{"state_dict": ...}``), and their names in those of
wrappers (``module._orig_mod.``). Nothing is ever unpickled beyond tensors and plain containers: torch reads
with ``weights_only=True``, and the few other kinds of plain data that training scripts note beside the
tensors, as numpy's numbers, come in as stand-ins of this module.
"""

import _compat_pickle
import contextlib
import errno
import io
import json
import os
import pickletools
import re
import struct
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor

from ssd.errors import CheckpointError, as_line, shown
from ssd.signatures import HEAD, identify

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl")
"""Of files of weights, as people name them."""


class NotDamaged(CheckpointError):
    """A file cannot be used as it is, though nothing says that another copy would be better."""


class Network(NamedTuple):
    """The tensors of one network, and what stood around them."""

    tensors: dict[str, Tensor]
    """By the network's own names."""
    beside: dict[str, Tensor]
    """What lies in the same dict and is no network's, by its full name."""
    around: tuple[Mapping[Any, Any], ...]
    """The dicts that hold it, innermost first."""


# --- Reading ----------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> tuple[Any, dict[str, str]]:
    """What a file of torch or safetensors holds, told by its content, not its suffix.

    Args:
        path: a file, or the index of several (``model.safetensors.index.json``).

    Returns:
        Tensors on the CPU in plain containers of Python, and the text notes of safetensors.

    Raises:
        CheckpointError: damaged, of another format, or holds objects that are not plain data.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.name.endswith(".index.json"):
        return _read_shards(path), {}
    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    return _read_safetensors(path) if is_safetensors else (_read_torch(path), {})


def _read_shards(path: Path) -> dict[str, Any]:
    """The tensors of the files that an index names; they lie beside it."""
    try:
        names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: no index of weights ({shown(error)})") from None
    tensors: dict[str, Any] = {}
    for name in names:
        shard = path.parent / str(name)
        if shard.name != name or name.endswith(".index.json") or not _is_file(shard):
            raise CheckpointError(
                f"{path} names the file {shown(name)}, which has to lie beside it, and does not"
            )
        content, _ = read(shard)
        tensors |= content if isinstance(content, dict) else {}
    return tensors


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


_LONGEST_HEADER = 8 << 20


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with path.open("rb") as file:
        if int.from_bytes(file.read(8), "little") > _LONGEST_HEADER:
            raise CheckpointError(f"{path}: not a whole safetensors file, or of more tensors than an SSD has")
    try:
        with safetensors.safe_open(path, "pt") as file:
            # Copies: the file is only mapped, and may change or vanish while the network is in use.
            return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:
        _pass_on(path, error)
        if _is_short_of_memory(error):
            raise NotDamaged(f"{path}: {_TOO_LARGE}") from error
        raise CheckpointError(f"{path}: not a whole safetensors file ({as_line(str(error), 200)})") from error


def _pass_on(path: Path, error: Exception) -> None:
    """Raise an error of the disk as that of the file; EINVAL comes of offsets that a file holds."""
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise OSError(error.errno, error.strerror, str(path)) from error


_TOO_LARGE = "takes more memory than there is; free some, or get it again: one that is damaged can look so"


def _is_short_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


class _TooMuch(Exception):
    """A file says more than it can hold; the message is what of it."""


class _OtherKind(Exception):
    """It has tensors that are made without a check; the message is their kind."""


_lock = threading.Lock()


def _read_torch(path: Path) -> object:
    try:
        # Opened here, since torch goes by the suffix, too. What it allows, and warnings, are the process's.
        with path.open("rb") as file, _lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            most = _most_held(file)
            try:
                return _loaded(file, most)
            except Exception as error:
                if _refused(error) not in _STAND_INS:
                    raise
            with torch.serialization.safe_globals([(made, name) for name, made in _STAND_INS.items()]):
                return _loaded(file, most)
    except Exception as error:
        _pass_on(path, error)
        kind = NotDamaged if _is_short_of_memory(error) else CheckpointError
        # Not chained: torch's text advises to switch the safe unpickler off.
        raise kind(f"{path}: {_why_not_loaded(path, error)}") from None


_UNFOLDED = 20
"""Times its own size that a compressed file may be in memory; torch and most others write without."""


def _most_held(file: IO[bytes]) -> int:
    """Bytes of tensors that a file of torch can hold; and what it says is weighed before it is made.

    Raises:
        _TooMuch: it would take far more memory or time than its size lets expect.
    """
    most = os.fstat(file.fileno()).st_size
    if file.read(4) == b"PK\x03\x04":
        with zipfile.ZipFile(file) as archive:
            unfolded = sum(entry.file_size for entry in archive.infolist())
        if unfolded > max(_UNFOLDED * most, 1 << 26):
            raise _TooMuch(f"{unfolded:,} bytes in memory")
        most = unfolded
        file.seek(0)
        reader: Any = torch._C.PyTorchFileReader(file)  # as torch.load will read it
        _weigh(io.BytesIO(reader.get_record("data.pkl")) if reader.has_record("data.pkl") else file)
    else:
        file.seek(0)
        for _ in range(5):  # magic number, version, system, content, keys
            _weigh(file)
    return most


_MOST_NAMED = 10**8
_MOST_STEPS = 4 * 10**6
_MOST_LONG = 10**4  # numbers of more than 55 bits: as keys, thousands of them can share one hash
_DEEPEST = 100
_TO_MARK = -1
_TAKES = {
    **dict.fromkeys(("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINFLOAT"), 0),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINSTRING", "LONG1", "GLOBAL"), 0),
    **dict.fromkeys(("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"), 0),
    **{"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": _TO_MARK, "REDUCE": 2, "NEWOBJ": 2, "BINPERSID": 1},
    **{"APPEND": 1, "SETITEM": 2, "BUILD": 1, "APPENDS": _TO_MARK, "SETITEMS": _TO_MARK},
}
"""How many of the values before it each instruction takes, of those that torch reads."""
_INTO_LAST = {"APPEND", "SETITEM", "BUILD", "APPENDS", "SETITEMS"}  # the others make a value
_UNCHECKED = {
    f"torch._utils._rebuild_{kind}"
    for kind in (
        *("nested_tensor", "sparse_tensor", "wrapper_subclass"),
        *("device_tensor_from_numpy", "device_tensor_from_cpu_tensor"),
    )
}
"""Makers of tensors that torch allows, which may take any memory or time; no SSD's are of such kinds."""


def _weigh(file: IO[bytes]) -> None:
    """Pass over a pickle, and add up what it would be if nothing in it were used twice.

    A few bytes can say "a pair of that pair" fifty times; as the key of a dict it is walked through for ever,
    and one in which a million are nested ends the process. Nothing is made here of what the pickle says;
    where it cannot be followed, torch does not follow it, either.

    Raises:
        _TooMuch: it has more parts than a file can have.
        _OtherKind: it has tensors of kinds that torch makes without a check.
    """
    stack: list[_Part] = []
    below: list[list[_Part]] = []
    memo: dict[Any, _Part] = {}
    named = long = 0
    with contextlib.suppress(ValueError, LookupError, OverflowError, MemoryError, struct.error):
        for step, (code, value, _) in enumerate(pickletools.genops(file)):
            if step > _MOST_STEPS:
                raise _TooMuch("lists and dicts that are too many")
            if code.name == "MARK":
                below.append(stack)
                stack = []
            elif code.name.endswith("BINPUT"):
                memo[value] = stack[-1]
            elif code.name.endswith("BINGET"):
                stack.append(memo[value])
                named += memo[value].size
            elif code.name in _TAKES:
                long += isinstance(value, int) and value.bit_length() > 55
                stack = _taken(code.name, value, stack, below)
                if named > _MOST_NAMED or stack[-1].depth > _DEEPEST or long > _MOST_LONG:
                    raise _TooMuch("lists and dicts that are too many, or too deep in one another")
            elif code.name != "PROTO":
                return


@dataclass(slots=True)
class _Part:
    """A value of a pickle: what is known of it without making it."""

    kind: str
    """The instruction that made it."""
    value: Any = None
    """Of a text, or the name of what is to be called."""
    parts: Sequence["_Part"] = ()
    """Of a tuple."""
    size: int = 1
    depth: int = 0


_NUMBER = _Part("number")


def _taken(name: str, value: Any, stack: list[_Part], below: list[list[_Part]]) -> list[_Part]:
    """The stack after an instruction that makes one value of some."""
    parts: list[_Part] = []
    if _TAKES[name] == _TO_MARK:
        parts, stack = stack, below.pop()
    elif _TAKES[name]:
        if len(stack) < _TAKES[name]:
            raise LookupError
        parts = stack[-_TAKES[name] :]
        del stack[-_TAKES[name] :]
    if name in ("REDUCE", "NEWOBJ"):
        _require_small(*parts)
    if name == "BUILD" and parts[0].kind not in _PLAIN_KINDS:
        raise _OtherKind("object with a state of another kind")
    if name in _INTO_LAST:
        if stack[-1] is _NUMBER:
            raise LookupError
    elif name == "GLOBAL":
        stack.append(_Part(name, _path(value)))
        if stack[-1].value in _UNCHECKED:
            raise _OtherKind(stack[-1].value.partition("_rebuild_")[2].replace("_", " "))
    elif parts or name.startswith(("EMPTY", "TUPLE")):
        stack.append(_Part(name, None, parts if "TUPLE" in name else ()))
    else:
        stack.append(_Part(name, value) if isinstance(value, str) else _NUMBER)
    whole = stack[-1]
    for part in parts:
        whole.size += part.size
        whole.depth = max(whole.depth, part.depth + 1)
    return stack


def _path(pair: str) -> str:
    """The name that torch will look up for that of a pickle, which may be one of Python 2."""
    module, _, name = pair.partition(" ")
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"


_PLAIN_KINDS = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"}
_COLLECTIONS = {"builtins.set", "collections.Counter", "collections.OrderedDict", "torch.Size"}


def _require_small(function: _Part, arguments: _Part) -> None:
    """Require of a call that what it makes is no larger than what it is made of.

    Raises:
        _OtherKind: it is none that `torch.save` writes.
    """
    name, given = function.value, arguments.parts
    right = arguments.kind in _PLAIN_KINDS and "TUPLE" in arguments.kind
    if name == "torch._tensor._rebuild_from_type_v2":  # calls its first argument
        right &= bool(given) and str(given[0].value).startswith("torch._utils._rebuild_")
    elif name == "_codecs.encode" or (name == "builtins.bytearray" and len(given) > 1):
        right &= len(given) == 2 and given[1].value in ("latin1", "latin-1")  # as bytes are written
    elif name == "builtins.bytearray":
        right &= all(each.kind == "REDUCE" for each in given)  # bytes
    elif name in _COLLECTIONS:
        right &= all(each.kind in _PLAIN_KINDS for each in given)
    elif str(name).startswith("torch.") and str(name).endswith("Tensor"):
        right &= not given
    if not right:
        raise _OtherKind(f"call of {as_line(str(name), 60)} that torch.save does not write")


def _loaded(file: IO[bytes], most: int) -> object:
    """What a file of torch holds, of plain containers and tensors alone, in no more than so many bytes."""
    left = most

    def place(storage: torch.UntypedStorage, _: str) -> torch.UntypedStorage:
        nonlocal left
        left -= storage.nbytes()
        if left < 0:
            raise _TooMuch("tensors that are larger than the file")
        return storage

    file.seek(0)
    held: dict[int, int] = {}
    plain = _plain(torch.load(file, map_location=place, weights_only=True), {}, held)  # type: ignore[arg-type]
    if sum(held.values()) > most:  # some are of the pickle's own making
        raise _TooMuch("tensors that are larger than the file")
    return plain


def _plain(value: Any, made: dict[int, Any], held: dict[int, int]) -> Any:
    """The same in Python's own containers, which have no attributes that a file can set; no tensor has.

    Args:
        value: what torch made of a file.
        made: what was made already, by the id of what it was made of.
        held: takes note of the bytes of each storage, by its place in memory.
    """
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, Tensor):
        tensor = made[id(value)] = Tensor.detach(value)
        if tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        return tensor
    if isinstance(value, dict):
        into = made[id(value)] = {}
        into.update((key, _plain(each, made, held)) for key, each in dict.items(value))
        return into
    if isinstance(value, list):
        listed: list[Any] = []
        made[id(value)] = listed
        listed.extend(_plain(each, made, held) for each in list.__iter__(value))
        return listed
    if isinstance(value, tuple):
        return made.setdefault(id(value), tuple(_plain(each, made, held) for each in tuple.__iter__(value)))
    return value


def _refused(error: Exception) -> str:
    """The name that torch's safe unpickler refused to import."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    name = found[1] if found else ""
    return name if "." in name or not name else f"builtins.{name}"  # torch leaves that word out


def _why_not_loaded(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        return "the file is empty"
    if isinstance(error, _TooMuch):
        return (
            f"announces {error}, which {path.stat().st_size:,} bytes do not hold, and is not loaded for "
            "safety; get it again, or from whom you trust"
        )
    is_zip = head[:2] == b"PK"
    kind = identify(head) if not is_zip or _names_in_zip(path) else None  # cut off, else
    if kind and (kind.as_weights or not _looks_like_checkpoint(head)):
        advice = kind.as_weights or "name it .onnx"
        return f"this is {kind.name}, not a checkpoint; {(is_zip and _within(path)) or advice}"
    if not _looks_like_checkpoint(head):
        return "not a checkpoint of torch or safetensors, or damaged at its start"
    if "TorchScript" in str(error):
        return "a TorchScript program, not a checkpoint; where it was exported by ssd, name it .torchscript"
    anew = (
        "Where the program that made it runs, load it as that program does, and save its model's tensors "
        f"alone: torch.save(model.state_dict(), {new_name(path)!r})"
    )
    if isinstance(error, _OtherKind):
        return f"holds a {error}, a kind that is not to be loaded safely, and not an SSD's. {anew}"
    if kind and "pickle" in kind.name and _MAGIC not in head[:32]:
        return (
            f"this is {kind.name}, not a checkpoint of torch, and is not loaded for safety. {anew}; or, "
            f"where it holds arrays by name: torch.save({{k: torch.as_tensor(v) for k, v in c.items()}}, "
            f"{new_name(path)!r}), c being what it holds"
        )
    if found := _refused(error):
        name = found.removeprefix("builtins.")
        more = shown(name).strip("'")
        return f"holds more than tensors and plain containers ({more}), and is not loaded for safety. {anew}"
    if _is_short_of_memory(error):
        return _TOO_LARGE
    problem = f"damaged or cut off ({path.stat().st_size:,} bytes), or not to be loaded safely; get it again"
    return f"{problem}. {anew}" if "Weights only load failed" in str(error) else problem


def _looks_like_checkpoint(head: bytes) -> bool:
    """Whether a file that begins so may be a checkpoint of torch (zip or legacy) or of safetensors."""
    return head[:4] == b"PK\x03\x04" or head[:1] == b"\x80" or head[8:9] == b"{"


_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # the number that torch's legacy files begin with


def checkpoint_kind(path: Path) -> str:
    """What kind of checkpoint a file is, for messages; empty for an exported program and whatever else."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    kind = identify(head)
    if kind and kind.name == "a safetensors file":
        return kind.name
    if _MAGIC in head[:32]:
        return "a checkpoint of torch"
    inner = [name.partition("/")[2] for name in _names_in_zip(path)]  # below the archive's own name
    is_program = any(name == "constants.pkl" or name.startswith("code/") for name in inner)
    return "a checkpoint of torch" if "data.pkl" in inner and not is_program else ""


def _within(path: Path) -> str:
    """What to do with a zip archive, by what is in it."""
    names = _names_in_zip(path)
    if any(name.endswith("/data.pkl") for name in names):
        return "a checkpoint of torch was packed anew as this; pass the one that it was made of"
    weights = [name for name in names if name.endswith(SUFFIXES)]
    listed = ", ".join(map(as_line, weights[:3])) + (", ..." if len(weights) > 3 else "")
    return f"unpack it, and pass what is in it: {listed}" if weights else ""


def _names_in_zip(path: Path) -> list[str]:
    """What is in a zip archive; nothing where it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception:  # a damaged one gives errors of many kinds
        return []


def new_name(path: Path) -> str:
    """Where advice puts what is saved anew."""
    return str(path.with_name(path.name.split(".")[0] + "-weights.pt"))


# --- Stand-ins --------------------------------------------------------------------------------------------


class _Left:
    """In place of an object that is not needed: made of anything, and of nothing in it."""

    def __new__(cls, *_: object) -> "_Left":
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return OrderedDict, ()  # which torch reads, where it is saved again


class _Dtype(_Left):
    """In place of numpy's dtype, whose own code would take any state."""

    def __init__(self, code: object, *_: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


def _scalar(dtype: object, content: object = b"") -> object:
    """In place of numpy's scalar: a number or text of Python."""
    known = isinstance(dtype, _Dtype) and re.fullmatch(r"[iu][1248]|f[248]|b1|U\d{1,4}", str(dtype.code))
    if not known or not isinstance(content, bytes):
        return _Left()
    order = ">" if dtype.order == ">" else "<"  # type: ignore[attr-defined]
    return np.frombuffer(content, order + known[0])[0].item()


def _mapping(*_: object) -> dict[Any, Any]:
    return {}


def _sequence(*_: object) -> list[Any]:
    return []


_DICTS = (
    "addict.addict.Dict",
    "easydict.EasyDict",
    "fvcore.common.config.CfgNode",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "yacs.config.CfgNode",
)
_UNNEEDED = (
    *("argparse.Namespace", "types.SimpleNamespace", "typing.Any"),
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "frozenset", "int", "list", "range")),
    *("builtins.slice", "builtins.str", "builtins.tuple"),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *("numpy.ndarray", "numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct"),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Float", "Integer", "String")),
    *(
        f"pathlib{inner}.{kind}{system}Path"
        for inner in ("", "._local")
        for kind in ("", "Pure")
        for system in ("Posix", "Windows")
    ),
)
_STAND_INS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _Dtype,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.multiarray.scalar": _scalar,
    "collections.defaultdict": _mapping,
    "collections.deque": _sequence,
    **dict.fromkeys(_DICTS, OrderedDict),
    **dict.fromkeys(_UNNEEDED, _Left),
}
"""What is made in place of plain data of other kinds, by the name in the file. None of it is imported."""


# --- Finding the network ----------------------------------------------------------------------------------


class Sought(NamedTuple):
    """A kind of network to look for."""

    name: str
    marks: tuple[str, ...]
    """Names that its tensors have, and no other network's."""
    advice: str


SSD = Sought(
    "an SSD300 with a ResNet trunk",
    ("conf.0.weight", "feature_extractor.feature_extractor.0.weight"),
    'Pass weights of ssd train, of NVIDIA\'s SSD for PyTorch, or "coco"',
)
RESNET = Sought(
    "a ResNet with torchvision's names",
    ("conv1.weight", "layer1.0.conv1.weight", "layer3.0.conv1.weight"),
    'Pass weights of torchvision\'s, or "imagenet"',
)

_OWN = {
    *("feature_extractor", "additional_blocks", "loc", "conf", "loc_norm", "conf_norm"),
    *("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"),
}
_WRAPPERS = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_DEPTH = 6  # of containers in one another
_MOST_NETWORKS = 20  # that are told apart
_AVERAGE = re.compile(r"(?<![a-z])ema(?![a-z])|modelema|emamodel|averag|(?<![a-z])swa(?![a-z])|shadow|polyak")
_AS_TRAINED = "current_model_state"  # beside it, Lightning's "state_dict" is the average


class _Candidate(NamedTuple):
    place: tuple[Any, ...]
    prefix: str
    tensors: dict[str, Tensor]
    around: tuple[Mapping[Any, Any], ...]

    def is_average(self) -> bool:
        names = [each for each in (*self.place, self.prefix) if isinstance(each, str)]
        return bool(_AVERAGE.search(".".join(names).lower()))

    def name(self) -> str:
        place = "".join(f"[{shown(each)}]" for each in self.place)
        return f"{place} {as_line(self.prefix, 60)}*".strip() if self.prefix or not place else place

    def has(self, key: str) -> bool:
        return key.startswith(self.prefix) and key[len(self.prefix) :].partition(".")[0] in _OWN

    def own(self) -> dict[str, Tensor]:
        return {
            key[len(self.prefix) :]: value.detach() for key, value in self.tensors.items() if self.has(key)
        }


def find_network(path: Path, content: object, sought: Sought = SSD) -> Network:
    """The one network in what a file holds, without the names of its wrappers.

    Where the file holds it twice, as trained and as an average of it (EMA, SWA), the average is taken: it is
    what such training evaluates.

    Args:
        path: of the file, for messages.
        content: see `read`.
        sought: its kind.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    found = list(islice(_candidates(content, sought.marks), _MOST_NETWORKS))
    unlike = _unlike(found)
    chosen = [each for each in unlike if each.is_average()] or unlike
    chosen = [each for each in chosen if _AS_TRAINED not in each.place] or chosen
    if not chosen:
        raise CheckpointError(f"{path}: {_why_none(content, sought)}")
    if len(chosen) > 1:
        raise NotDamaged(f"{path}: {_why_not_one(path, chosen)}")  # whose advice needs it
    (network,) = chosen
    tensors = network.own()
    if len(unlike) == 2:  # some averages are of the parameters alone, and go with the model's statistics
        other = next(each for each in unlike if each is not network)
        tensors = {key: value for key, value in other.own().items() if "running_" in key} | tensors
    together = [each for each in found if each.tensors is network.tensors]
    beside = {
        key: value for key, value in network.tensors.items() if not any(each.has(key) for each in together)
    }
    return Network(tensors, beside, network.around)


def _why_not_one(path: Path, chosen: list[_Candidate]) -> str:
    example = max(chosen, key=lambda each: len(each.prefix))
    wanted = "c" + "".join(f"[{key!r}]" for key in example.place)
    if example.prefix:
        wanted = f"{{k: v for k, v in {wanted}.items() if {example.prefix!r} in k}}"
    names = ", ".join(each.name() for each in chosen[:4])
    count = f"{'at least ' * (len(chosen) == _MOST_NETWORKS)}{len(chosen)}"
    told = f"holds {count} networks: {names}. Save the one that you mean alone"
    if len(wanted) > 200:
        return told
    return (
        f"{told}, as by: import torch; from ssd import containers; "
        f"c, _ = containers.read({str(path)!r}); torch.save({wanted}, {new_name(path)!r})"
    )


def _why_none(content: object, sought: Sought) -> str:
    state_dict = max((_named_tensors(each) for _, each, _ in _holders(content)), key=len, default={})
    if state_dict:
        theirs = next((name for name, marks in _OTHERS if all(each in state_dict for each in marks)), "")
        looks = f"its tensors are named as those of {theirs}; " if theirs else ""
        return f"not {sought.name}; {looks}it begins with {first_names(state_dict)}. {sought.advice}"
    is_wrapped = isinstance(content, dict) and isinstance(content.get("model"), dict)
    inner = content["model"] if is_wrapped else content  # type: ignore[index]
    if not isinstance(inner, dict) or not inner:
        return f"holds a {type(inner).__name__}, not a dict of tensors"
    key, value = next(iter(inner.items()))
    kind = "an array or other object" if isinstance(value, _Left) else f"a {type(value).__name__}"
    return (
        f"{shown(key)} is {kind}, not a tensor with a name; expected a state dict, or a dict "
        'that has one, as under "model"'
    )


def first_names(state_dict: Iterable[str]) -> str:
    """What a state dict begins with, for messages."""
    return ", ".join(as_line(key, 100) for key in islice(state_dict, 3))


_OTHERS = (
    (
        "torchvision's ssdlite320",
        ("backbone.features.0.0.0.weight", "head.classification_head.module_list.0.1.weight"),
    ),
    (
        "torchvision's ssd300_vgg16",
        ("backbone.scale_weight", "head.classification_head.module_list.0.weight"),
    ),
    (
        "torchvision's RetinaNet",
        ("backbone.body.conv1.weight", "head.classification_head.conv.0.0.weight"),
    ),
    (
        "torchvision's FCOS",
        ("backbone.body.conv1.weight", "head.classification_head.conv.0.weight"),
    ),
    (
        "torchvision's Faster R-CNN",
        ("backbone.body.conv1.weight", "roi_heads.box_predictor.cls_score.weight"),
    ),
    ("amdegroot's ssd.pytorch (VGG16)", ("vgg.0.weight", "L2Norm.weight", "loc.0.weight")),
    ("lufficc's SSD (VGG16)", ("backbone.vgg.0.weight", "box_head.predictor.cls_headers.0.weight")),
    ("lufficc's SSD", ("box_head.predictor.cls_headers.0.weight",)),
    ("qfgaohao's pytorch-ssd", ("classification_headers.0.weight", "regression_headers.0.weight")),
    ("sgrvinod's SSD300 (VGG16)", ("rescale_factors", "base.conv1_1.weight")),
    ("MMDetection's SSD", ("bbox_head.cls_convs.0.0.weight", "bbox_head.reg_convs.0.0.weight")),
    ("MLPerf's SSD (ResNet-34)", ("model.layer1.0.weight", "additional_blocks.0.0.weight", "conf.0.weight")),
    ("YOLO by Ultralytics", ("model.0.conv.weight", "model.1.conv.weight")),
    ("DETR", ("class_embed.weight", "query_embed.weight")),
    (
        "a ResNet for classification, which is a start for training (--backbone-weights)",
        (*RESNET.marks, "fc.weight"),
    ),
    ("this SSD itself, from which training starts by --weights", SSD.marks),
    ("this SSD's trunk, without its heads", SSD.marks[1:]),
)
"""Other networks that people have, by names of tensors that only they have."""


def _candidates(content: object, marks: tuple[str, ...]) -> Iterator[_Candidate]:
    for place, holder, around in _holders(content):
        tensors = _named_tensors(holder)
        for key in tensors:
            prefix = key.removesuffix(marks[0])
            if (
                key.endswith(marks[0])
                and prefix[-1:] in ("", ".")
                and all(prefix + m in tensors for m in marks)
            ):
                yield _Candidate(place, prefix, tensors, (holder, *around))


def _holders(content: object) -> Iterator[tuple[tuple[Any, ...], Mapping[Any, Any], tuple[Any, ...]]]:
    """Each dict within, with the keys that lead to it and the dicts around it, innermost first."""
    seen: set[int] = set()
    waiting: list[tuple[tuple[Any, ...], Any, tuple[Any, ...]]] = [((), content, ())]
    for place, holder, around in waiting:  # which grows
        if id(holder) in seen or len(place) > _DEPTH:
            continue
        seen.add(id(holder))
        is_dict = isinstance(holder, dict)
        if is_dict:
            yield place, holder, around
        items = holder.items() if is_dict else enumerate(holder) if isinstance(holder, list | tuple) else ()
        inside = (holder, *around) if is_dict else around
        waiting += [
            ((*place, key), value, inside) for key, value in items if isinstance(value, dict | list | tuple)
        ]


def _named_tensors(holder: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a dict, without the names of wrappers within theirs, where that leaves each its own."""
    tensors = {
        key: value for key, value in holder.items() if isinstance(key, str) and isinstance(value, Tensor)
    }
    bare = {key: ".".join(part for part in key.split(".") if part not in _WRAPPERS) for key in tensors}
    if len(set(bare.values())) < len(bare):
        return tensors
    return {bare[key]: value for key, value in tensors.items()}


def _unlike(found: list[_Candidate]) -> list[_Candidate]:
    """Those whose tensors are not the very ones of another before it."""
    kept: dict[object, _Candidate] = {}
    for each in found:
        kept.setdefault(frozenset((key, _memory(value)) for key, value in each.own().items()), each)
    return list(kept.values())


def _memory(value: Tensor) -> tuple[object, ...]:
    """Where the values are, and which."""
    if value.layout != torch.strided or value.is_nested:
        return (id(value),)
    return (value.data_ptr(), value.shape, value.stride())
