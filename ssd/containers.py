"""Files of weights as others save them, read without running anything.

Nothing is ever unpickled beyond tensors and plain containers: torch reads
with ``weights_only=True``, and the few other kinds of plain data that training scripts note beside the
tensors, as numpy's numbers, come in as stand-ins of this module.
"""

import errno
import io
import json
import os
import re
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from ssd.errors import CheckpointError, as_line, shown
from ssd.pickles import OtherKind, TooMuch, weigh
from ssd.signatures import HEAD, identify

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl")
"""Of files of weights, as people name them."""


class NotDamaged(CheckpointError):
    """A file cannot be used as it is, though nothing says that another copy would be better."""


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
        TooMuch: it would take far more memory or time than its size lets expect.
    """
    most = os.fstat(file.fileno()).st_size
    if file.read(4) == b"PK\x03\x04":
        with zipfile.ZipFile(file) as archive:
            unfolded = sum(entry.file_size for entry in archive.infolist())
        if unfolded > max(_UNFOLDED * most, 1 << 26):
            raise TooMuch(f"{unfolded:,} bytes in memory")
        most = unfolded
        file.seek(0)
        reader: Any = torch._C.PyTorchFileReader(file)  # as torch.load will read it
        weigh(io.BytesIO(reader.get_record("data.pkl")) if reader.has_record("data.pkl") else file)
    else:
        file.seek(0)
        for _ in range(5):  # magic number, version, system, content, keys
            weigh(file)
    return most


def _loaded(file: IO[bytes], most: int) -> object:
    """What a file of torch holds, of plain containers and tensors alone, in no more than so many bytes."""
    left = most

    def place(storage: torch.UntypedStorage, _: str) -> torch.UntypedStorage:
        nonlocal left
        left -= storage.nbytes()
        if left < 0:
            raise TooMuch("tensors that are larger than the file")
        return storage

    file.seek(0)
    held: dict[int, int] = {}
    plain = _plain(torch.load(file, map_location=place, weights_only=True), {}, held)  # type: ignore[arg-type]
    if sum(held.values()) > most:  # some are of the pickle's own making
        raise TooMuch("tensors that are larger than the file")
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
    if isinstance(error, TooMuch):
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
    if isinstance(error, OtherKind):
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


class Left:
    """In place of an object that is not needed: made of anything, and of nothing in it."""

    def __new__(cls, *_: object) -> "Left":
        """Take what its class would."""
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return OrderedDict, ()  # which torch reads, where it is saved again


class _Dtype(Left):
    """In place of numpy's dtype, whose own code would take any state."""

    def __init__(self, code: object, *_: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


def _scalar(dtype: object, content: object = b"") -> object:
    """In place of numpy's scalar: a number or text of Python."""
    known = isinstance(dtype, _Dtype) and re.fullmatch(r"[iu][1248]|f[248]|b1|U\d{1,4}", str(dtype.code))
    if not known or not isinstance(content, bytes):
        return Left()
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
    **dict.fromkeys(_UNNEEDED, Left),
}
"""What is made in place of plain data of other kinds, by the name in the file. None of it is imported."""
