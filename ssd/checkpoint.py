"""Published weights, checked download, safe loading and atomic saving of checkpoints.

Nothing is ever unpickled beyond tensors and plain containers (``weights_only=True``), and a file in the
cache is hashed before it is parsed.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import secrets
import sys
import time
import urllib.error
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

import safetensors
import safetensors.torch
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from ssd import web
from ssd.labels import COCO_NAMES


class DownloadError(OSError):
    """A file could not be fetched; the message says from where, why, and what to do instead."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the file and says why."""


@dataclass(frozen=True)
class Weights:
    """A published checkpoint: where it is and what it holds."""

    url: str | None
    """None: it comes with the package."""
    file_name: str
    sha256: str | None
    """Digest, or the beginning of it; None where the publisher gives none."""
    size: int | None
    """Bytes, where known."""
    class_names: tuple[str, ...]
    accuracy: str
    transform: str


TRANSFORM = "the whole image resized to 300x300 (bilinear, antialiased), ImageNet mean and deviation"
"""What images a network is trained on, for people who read a checkpoint."""

PUBLISHED = {
    "coco": Weights(
        url="https://api.ngc.nvidia.com/v2/models/nvidia/ssd_pyt_ckpt_amp/versions/20.06.0/files/"
        "nvidia_ssdpyt_amp_200703.pt",
        file_name="nvidia_ssdpyt_amp_200703.pt",
        sha256=None,
        size=None,
        class_names=COCO_NAMES,
        accuracy="0.25 AP on COCO val2017, as published by NVIDIA",
        transform=TRANSFORM,
    ),
    "shapes": Weights(
        url=None,
        file_name="shapes.safetensors",
        sha256=None,
        size=None,
        class_names=("circle", "square", "triangle", "star", "cross", "ring"),
        accuracy="made-up scenes of six shapes; see ssd/weights/README.md",
        transform=TRANSFORM,
    ),
}
"""Weights by the name under which `fetch`, `Detector.load` and ``ssd detect --weights`` know them."""

ATTEMPTS = 3
RETRY_DELAY = 1.0
MAX_BYTES = 4 << 30


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's tensors, and what they say about the network."""

    state_dict: dict[str, Tensor]
    """Keys as in `SSD300`, on the CPU."""
    backbone: str
    num_classes: int
    """With the background."""
    head_norm: bool
    """Whether the heads have BatchNorm; published checkpoints have none."""
    class_names: tuple[str, ...]
    """One for each class but the background: the file's own; COCO's where it has none, for 81 classes; else
    "class 0" and on."""
    category_ids: tuple[int, ...] = ()
    """The id of each class in the COCO files that it was trained on, where the file says so."""
    config: dict[str, Any] = field(default_factory=dict)
    """How it was trained, where the file says so."""


# --- Fetching ---------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """The folder of downloaded weights: ``checkpoints`` in torch.hub's (``TORCH_HOME`` moves it)."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def cached_path(weights: str, sha256: str | None = None) -> Path:
    """Where the weights of a name or URL are, or will be: in the cache, or in the package."""
    if weights in PUBLISHED:
        record = PUBLISHED[weights]
        folder = cache_dir() if record.url else Path(__file__).parent / "weights"
        return folder / record.file_name
    name = os.path.basename(unquote(urlsplit(weights).path)) or "weights"
    if sha256 and f"-{sha256}." in name:  # torchvision's naming; its own downloads lie here too
        return cache_dir() / name
    # Different addresses often end in the same name ("model.pt"), so the name carries the address too.
    address = hashlib.sha256(weights.encode()).hexdigest()[:8]
    stem, suffix = os.path.splitext(re.sub(r"[^A-Za-z0-9._-]", "_", name)[-100:])
    return cache_dir() / f"{stem}-{address}{suffix}"


def fetch(
    weights: str | os.PathLike[str], *, sha256: str | None = None, force: bool = False, progress: bool = True
) -> Path:
    """The local file of some weights, downloaded where it is not in the cache yet.

    Args:
        weights: a path, an http(s) URL, or a name in `PUBLISHED`.
        sha256: expected digest, or the beginning of it.
        force: download again even if the cache has the file.
        progress: show a progress bar.

    Raises:
        DownloadError: it could not be downloaded.
        CheckpointError: a local file does not have the digest.
        FileNotFoundError: there is no such local file.
    """
    text = os.fspath(weights)
    sha256 = sha256.lower() if sha256 else None
    if text not in PUBLISHED and not web.is_url(text):
        path = Path(text)
        if not path.is_file():
            raise FileNotFoundError(
                f"no weights at {text}; pass a file, an http(s) URL or one of: {', '.join(PUBLISHED)}"
            )
        if sha256 and not _digest(path).startswith(sha256):
            raise CheckpointError(f"{path}: its SHA-256 {_digest(path)} does not begin with {sha256}")
        return path

    record = PUBLISHED.get(text)
    if record and record.url is None:
        return cached_path(text)
    url = (record.url if record else None) or text
    sha256 = sha256 or (record.sha256 if record else None)
    if not web.is_web_url(url):
        raise DownloadError(f"{url} is not an http or https URL; pass the path of a local file")
    path = cached_path(text, sha256)
    if not force and _is_intact(path, sha256):
        return path
    with _download_lock(path, url):
        if not force and _is_intact(path, sha256):  # another process was faster
            return path
        _download(url, path, sha256, record.size if record else None, progress)
    return path


def trust(path: Path) -> None:
    """Record the digest of a file in the cache that loaded well; from now on it must keep it."""
    if path.parent != cache_dir() or _recorded_digest(path):
        return
    line = f"{_digest(path)}  {path.name}\n"
    # A cache that is read-only serves all the same.
    with contextlib.suppress(OSError), atomic_file(_sidecar(path)) as file:
        file.write(line.encode())


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _is_intact(path: Path, sha256: str | None) -> bool:
    """Whether a file is in the cache with the digest that it should have, as far as one is known."""
    expected = sha256 or _recorded_digest(path)
    return path.is_file() and (not expected or _digest(path).startswith(expected))


def _recorded_digest(path: Path) -> str:
    """The digest of a file's first good load; empty if there is none that can be read."""
    try:
        found = re.match(r"[0-9a-f]{64}\b", _sidecar(path).read_text(errors="replace"))
    except OSError:
        return ""
    return found[0] if found else ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _download_lock(path: Path, url: str) -> Iterator[None]:
    """Make room for a download, held by one process at a time; the system frees it when the process dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        lock.acquire()
    except OSError as error:
        raise DownloadError(
            f"cannot write to {path.parent} ({error.strerror or error}); point TORCH_HOME at a folder that "
            f"can be written, or download {url} elsewhere and pass the file's path as weights"
        ) from error
    try:
        for leftover in path.parent.glob(f"{path.name}.*.part"):  # of a download that was killed
            leftover.unlink()
        yield
    finally:
        lock.release()


def _download(url: str, path: Path, sha256: str | None, size: int | None, progress: bool) -> None:
    if progress and not is_watched():
        print(f"downloading {url}", file=sys.stderr)
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(RETRY_DELAY * 2 ** (attempt - 1))
        try:
            with atomic_file(path, suffix=".part") as file:
                _download_once(url, file, path.name, sha256, size, progress)
            _sidecar(path).unlink(missing_ok=True)
            return
        except web.READ_ERRORS as error:
            problem = error
            if not _may_pass(error):
                break
    damaged = ""
    if path.exists() and not _is_intact(path, sha256):
        damaged = f" (the file there differs from the digest in {_sidecar(path).name})"
    raise DownloadError(
        f"could not download {url}: {web.reason(problem)}. Get that file on a machine that can; then put it, "
        f"under this name, at {path}{damaged}, or pass its path instead (`weights=...` or "
        "`backbone_weights=...` in Python, `--weights ...` on the command line)"
    ) from problem


def is_watched() -> bool:
    """Whether a person sees a progress bar: in a terminal or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 429)
    lasting = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT)
    return not isinstance(error, DownloadError) and getattr(error, "errno", None) not in lasting


def _download_once(
    url: str, file: IO[bytes], name: str, sha256: str | None, size: int | None, progress: bool
) -> None:
    digest = hashlib.sha256()
    received = 0
    with web.open_url(url) as response:
        announced = response.length
        if response.headers.get_content_type() == "text/html":
            raise DownloadError("the server sent a web page instead of the file")
        with tqdm(
            total=announced,
            desc=name,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=not (progress and is_watched()),
        ) as bar:
            for chunk in web.chunks(response):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
                if received > MAX_BYTES:
                    raise DownloadError(f"the server sent more than {MAX_BYTES >> 30} GiB")
    expected = size or announced
    if expected is not None and received != expected:
        raise ConnectionError(f"got {received:,} of {expected:,} bytes")
    if sha256 and not digest.hexdigest().startswith(sha256):
        raise DownloadError(f"the file's SHA-256 is {digest.hexdigest()}, expected {sha256}")
    file.flush()
    file.seek(0)
    if not _looks_like_checkpoint(file.read(16)):
        raise DownloadError(f"what the server sent ({received:,} bytes) is not a checkpoint")


# --- Reading ----------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint of SSD300, and find out what network it is for.

    Formats, told apart by content: NVIDIA's training checkpoint (a dict with "model" and "label_map"; legacy
    or zip), a bare state dict, safetensors. Prefixes of wrappers ("module.", "module.1.") are removed.

    The tensors still have to be checked against the network: see `check`.

    Raises:
        CheckpointError: damaged, of another format, holds objects that are not plain data, or no SSD300.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    tensors, notes = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    state_dict = {_without_wrapper(key): value for key, value in tensors.items()}
    return describe(path, state_dict, notes)


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict of any network (torch or safetensors), as safely as `read`.

    Raises:
        CheckpointError, FileNotFoundError: as `read`.
    """
    path = Path(path)
    return (_read_safetensors(path) if _is_safetensors(path) else _read_torch(path))[0]


def check(name: object, state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Require the keys, shapes and kinds of a network's tensors, and finite values.

    Raises:
        CheckpointError: with the first keys that are missing, unexpected, or not what they should be.
    """
    problems = [f"missing {key}" for key in expected if key not in state_dict]
    problems += [f"unexpected {key}" for key in state_dict if key not in expected]
    problems += [
        f"{key} {problem}"
        for key, value in state_dict.items()
        if key in expected and (problem := _tensor_problem(value, expected[key]))
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{name} does not fit the network: {'; '.join(problems[:5])}{more}")
    for key, value in state_dict.items():
        if not value.isfinite().all():
            raise CheckpointError(f"{name}: {key} holds NaN or infinity")


def _tensor_problem(value: Tensor, expected: Tensor) -> str:
    """What is wrong with a tensor, before any of its values is looked at."""
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_nested:
        return "is no plain tensor"
    if value.shape != expected.shape:
        return f"is {list(value.shape)}, not {list(expected.shape)}"
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if value.dtype not in (floats if expected.is_floating_point() else (torch.int64, torch.int32)):
        return f"is {value.dtype}"
    # A few bytes can stand for any number of values (`expand`), and fill the memory when they are used.
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return "is not stored whole"
    return ""


def _looks_like_checkpoint(head: bytes) -> bool:
    return head[:4] == b"PK\x03\x04" or head[:2] in (b"\x80\x02", b"\x80\x04") or head[8:9] == b"{"


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and what the file notes beside them: "label_map", "category_ids", "config"."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            # Copies: the file is only mapped, and may change or vanish while the network is in use.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        notes = {key: json.loads(metadata[key]) for key in ("category_ids", "config") if key in metadata}
        notes["label_map"] = dict(enumerate(json.loads(metadata.get("class_names", "[]")), start=1))
    except (safetensors.SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error
    return tensors, notes


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # Not chained: torch's text advises to switch the safe unpickler off.
        raise CheckpointError(f"{path}: {_why_not_loaded(path, error)}") from None
    notes: dict[str, Any] = {}
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        notes = {key: loaded[key] for key in ("label_map", "category_ids", "config") if key in loaded}
        loaded = loaded["model"]
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a dict of tensors")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: {key!r} is a {type(value).__name__}, not a tensor with a name; "
                'expected a state dict, or a dict with one under "model"'
            )
    return loaded, notes


def _why_not_loaded(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "the file is empty"
    if head.lstrip()[:1] == b"<":
        return "this is a web page, not a checkpoint"
    if not _looks_like_checkpoint(head):
        return "not a checkpoint of torch or safetensors, or damaged at its start"
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"holds more than tensors and plain containers ({found[1]}), and is not loaded for safety"
    if "TorchScript" in str(error):
        return "a TorchScript program, not a checkpoint"
    return f"damaged or cut off ({path.stat().st_size:,} bytes), or not to be loaded safely; get it again"


def _without_wrapper(key: str) -> str:
    # "module.1." is what the published fp16 wrapper and DistributedDataParallel leave together.
    return re.sub(r"^(module\.1\.|module\.)", "", key)


def describe(path: Path, state_dict: dict[str, Tensor], notes: Mapping[str, Any] | None = None) -> Checkpoint:
    """What network a state dict is for; `path` is what messages call it.

    Raises:
        CheckpointError: it is no SSD300's.
    """
    notes = notes or {}
    trunk = "feature_extractor.feature_extractor."
    blocks = "-".join(
        str(len({key.split(".")[3] for key in state_dict if key.startswith(f"{trunk}{stage}.")}))
        for stage in (4, 5, 6)
    )
    bottleneck = f"{trunk}4.0.conv3.weight" in state_dict
    backbone = {
        ("2-2-2", False): "resnet18",
        ("3-4-6", False): "resnet34",
        ("3-4-6", True): "resnet50",
        ("3-4-23", True): "resnet101",
        ("3-8-36", True): "resnet152",
    }.get((blocks, bottleneck))
    head = state_dict.get("conf.0.weight")
    usable = head is not None and not _tensor_problem(head, head) and head.ndim == 4
    if backbone is None or head is None or not usable or head.shape[0] % 4 or head.shape[0] < 8:
        raise CheckpointError(
            f"{path}: not an SSD300 with a ResNet trunk; it begins with {', '.join(list(state_dict)[:3])}"
        )
    num_classes = head.shape[0] // 4  # the first map has four default boxes a cell
    return Checkpoint(
        state_dict=state_dict,
        backbone=backbone,
        num_classes=num_classes,
        head_norm="loc_norm.0.weight" in state_dict,
        class_names=_class_names(notes.get("label_map"), num_classes),
        category_ids=_category_ids(notes.get("category_ids"), num_classes),
        config=notes["config"] if isinstance(notes.get("config"), dict) else {},
    )


def _class_names(names: object, num_classes: int) -> tuple[str, ...]:
    """Names of classes 1 to num_classes - 1, which the file gives by number (0 is the background)."""
    names = names if isinstance(names, dict) else {}
    given = {str(label): name for label, name in names.items() if isinstance(name, str)}
    coco = PUBLISHED["coco"].class_names
    if not given and num_classes == len(coco) + 1:
        return coco
    return tuple(given.get(str(label), f"class {label - 1}") for label in range(1, num_classes))


def _category_ids(ids: object, num_classes: int) -> tuple[int, ...]:
    if isinstance(ids, list) and len(ids) == num_classes - 1 and all(isinstance(each, int) for each in ids):
        return tuple(ids)
    return ()


# --- Writing ----------------------------------------------------------------------------------------------


def save(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    class_names: tuple[str, ...],
    *,
    category_ids: Sequence[int] | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Save weights and class names as safetensors, or, for another suffix, as NVIDIA's code loads them.

    The file appears whole or not at all; an earlier one of the same name stays until then.

    Args:
        path: ends in ``.safetensors``, or is written with `torch.save` as ``{"model", "label_map"}``.
        state_dict: of an `SSD300`.
        class_names: one for each class but the background.
        category_ids: the dataset's own id of each class, for COCO output.
        config: how the weights were trained, plain data.

    Raises:
        ValueError: the state dict is of another number of classes.
    """
    path = Path(path)
    classes = state_dict["conf.0.weight"].shape[0] // 4 - 1
    if classes != len(class_names):
        raise ValueError(
            f"the network has {classes} classes and the background; got {len(class_names)} names"
        )
    tensors = {key: value.detach().cpu().contiguous() for key, value in state_dict.items()}
    with atomic_file(path) as file:
        if path.suffix == ".safetensors":
            metadata = {"class_names": json.dumps(class_names), "transform": TRANSFORM}
            metadata |= {"category_ids": json.dumps(list(category_ids))} if category_ids else {}
            metadata |= {"config": json.dumps(config)} if config else {}
            file.write(safetensors.torch.save(tensors, metadata))
        else:
            labels = dict(enumerate(("background", *class_names)))
            ids = {"category_ids": list(category_ids)} if category_ids else {}
            file.write(torch_bytes({"model": tensors, "label_map": labels, **ids}))


def torch_bytes(content: object) -> memoryview:
    """What `torch.save` writes; straight into a file, it does not tell that the disk is full."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], suffix: str = ".tmp") -> Iterator[IO[bytes]]:
    """A file to write that takes its name when the block ends, durably, and vanishes if it fails.

    Raises:
        OSError: it cannot be written; where the disk is full, the message says so.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}")
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{suffix}")
    with telling_of_full_disk(path):
        try:
            with temporary.open("x+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    if sys.platform != "win32":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def telling_of_full_disk(path: Path) -> Iterator[None]:
    """Where the disk gets full within the block, which writes `path`, say so and what became of it.

    Raises:
        OSError: with that message.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        what = "the earlier one is whole" if path.exists() else "nothing is left of it"
        raise OSError(error.errno, f"No space left on the disk for {path.name}; {what}", str(path)) from error
