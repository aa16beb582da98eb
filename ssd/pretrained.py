"""Published weights: where they are, their download, checked and atomic, and the cache that keeps them.

A file gets its name in the cache when it is known to be whole, and keeps the digest of its first good load.
"""

import contextlib
import errno
import hashlib
import os
import re
import shlex
import sys
import time
import urllib.error
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import IO, cast
from urllib.parse import unquote, urlsplit

import torch
from filelock import FileLock
from tqdm import tqdm

from ssd import hf, web
from ssd.choices import Backbone
from ssd.containers import SUFFIXES, NotDamaged, read
from ssd.errors import CheckpointError, DownloadError, as_line
from ssd.files import Draft, atomic_file
from ssd.labels import COCO_NAMES
from ssd.terminal import is_watched


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


PUBLISHED = {
    "coco": Weights(
        url="https://api.ngc.nvidia.com/v2/models/nvidia/ssd_pyt_ckpt_amp/versions/20.06.0/files/"
        "nvidia_ssdpyt_amp_200703.pt",
        file_name="nvidia_ssdpyt_amp_200703.pt",
        sha256=None,
        size=None,
        class_names=COCO_NAMES,
        accuracy="0.25 AP on COCO val2017, as published by NVIDIA",
    ),
    "shapes": Weights(
        url=None,
        file_name="shapes.safetensors",
        sha256=None,
        size=None,
        class_names=("circle", "square", "triangle", "star", "cross", "ring"),
        accuracy="0.835 AP on 500 made-up scenes of six shapes; see ssd/weights/README.md",
    ),
}
"""Weights by the name under which `fetch`, `Detector.load` and ``ssd detect --weights`` know them."""

_TORCHVISION = "https://download.pytorch.org/models/"
BACKBONE_WEIGHTS: dict[Backbone, dict[str, str]] = {
    "resnet18": {"IMAGENET1K_V1": f"{_TORCHVISION}resnet18-f37072fd.pth"},
    "resnet34": {"IMAGENET1K_V1": f"{_TORCHVISION}resnet34-b627a593.pth"},
    "resnet50": {
        "IMAGENET1K_V1": f"{_TORCHVISION}resnet50-0676ba61.pth",
        "IMAGENET1K_V2": f"{_TORCHVISION}resnet50-11ad3fa6.pth",
    },
    "resnet101": {
        "IMAGENET1K_V1": f"{_TORCHVISION}resnet101-63fe2227.pth",
        "IMAGENET1K_V2": f"{_TORCHVISION}resnet101-cd907fc2.pth",
    },
    "resnet152": {
        "IMAGENET1K_V1": f"{_TORCHVISION}resnet152-394f9c45.pth",
        "IMAGENET1K_V2": f"{_TORCHVISION}resnet152-f82ba261.pth",
    },
}
"""torchvision's weights of each backbone, best last; the names end in the beginning of their SHA-256."""

ATTEMPTS = 3
"""Of a download, each of which has the time that `ssd.web` gives."""

RETRY_DELAY = 1.0
MAX_BYTES = 4 << 30


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
    address = hashlib.sha256(weights.encode(errors="surrogatepass")).hexdigest()[:8]
    stem, suffix = os.path.splitext(re.sub(r"[^A-Za-z0-9._-]", "_", name)[-100:])
    return cache_dir() / f"{stem}-{address}{suffix}"


def fetch(
    weights: str | os.PathLike[str], *, sha256: str | None = None, force: bool = False, progress: bool = True
) -> Path:
    """The local file of some weights, downloaded where it is not in the cache yet.

    Args:
        weights: a path, an http(s) URL, a name in `PUBLISHED`, or ``hf://owner/repo[/file][@revision]`` of
            the Hugging Face Hub; of a folder, as a run's, see `weights_in`, and so of a repository.
        sha256: expected digest, or the beginning of it.
        force: download again even if the cache has the file.
        progress: show a progress bar.

    Raises:
        DownloadError: it could not be downloaded.
        CheckpointError: a file that needs no download does not have the digest.
        FileNotFoundError: there is no such local file.
    """
    text = os.fspath(weights)
    sha256 = sha256.lower() if sha256 else None
    if text.startswith(hf.SCHEME):
        return _with_digest(_from_hub(text, force=force, progress=progress), sha256)
    if text not in PUBLISHED and not web.is_url(text):
        path = Path(text)
        if path.is_dir():
            path = weights_in(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no weights at {text}; pass a file, an http(s) URL, hf://owner/repo of the Hugging Face "
                f"Hub, or one of: {', '.join(PUBLISHED)}"
            )
        return _with_digest(path, sha256)

    record = PUBLISHED.get(text)
    if record and record.url is None:
        return _with_digest(cached_path(text), sha256)
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


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder: a run's best, what Hugging Face's tools write, or the only one.

    Raises:
        CheckpointError: there is none, or it is open which is meant.
    """
    names = [path.name for path in folder.iterdir() if path.is_file()]
    there = _weights_among(names, _IN_FOLDERS)
    if len(there) == 1 and there[0] in _IN_FOLDERS:
        return folder / there[0]
    if "data.pkl" in names:
        raise CheckpointError(f"{folder}: a checkpoint of torch that was unpacked; pass the file that it was")
    if any(folder.glob("*.distcp")):
        raise CheckpointError(
            f"{folder}: the parts of a checkpoint of torch.distributed; make one file of them to pass, by: "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            f"{shlex.quote(str(folder))} weights.pt"
        )
    if len(there) == 1:
        return folder / there[0]
    if there:
        some = ", ".join(there[:5]) + (", ..." if len(there) > 5 else "")
        raise CheckpointError(f"{folder} is a folder with {len(there)} files of weights; pass one: {some}")
    raise CheckpointError(
        f"{folder} is a folder without weights ({', '.join((_IN_FOLDERS[0], *_SUFFIXES))}); pass a file"
    )


def _weights_among(names: Collection[str], preferred: Sequence[str]) -> list[str]:
    """The first of the preferred names that is there, else all files of weights."""
    return next(
        ([name] for name in preferred if name in names),
        sorted(name for name in names if name.endswith(_SUFFIXES)),
    )


def _from_hub(text: str, *, force: bool, progress: bool) -> Path:
    """The local file of weights of the Hugging Face Hub; see `ssd.hf.fetch`."""
    wanted = hf.parse(text)

    def choose(names: list[str]) -> str:
        there = _weights_among(names, (hf.WEIGHTS, *_IN_FOLDERS))
        if len(there) == 1 and there[0].endswith(_SUFFIXES):
            return there[0]
        if there and there[0].endswith(".json"):
            raise CheckpointError(
                f"{text}: its weights are in parts; get all of it, by hf download {wanted.repo} --local-dir "
                "FOLDER, and pass that folder"
            )
        if there:
            some = ", ".join(str(wanted._replace(file=name)) for name in there[:5])
            more = ", ..." if len(there) > 5 else ""
            raise CheckpointError(f"{text} has {len(there)} files of weights; name one: {some}{more}")
        raise CheckpointError(
            f"{text} has no file of weights ({', '.join(_SUFFIXES)}); look at what it is for"
        )

    if wanted.file and not wanted.file.endswith(_SUFFIXES):
        raise CheckpointError(
            f"{text} is no file of weights ({', '.join(_SUFFIXES)}); an exported file is a program for its "
            "runtime: if you trust who made it, download it, and pass its path"
        )
    return hf.fetch(text, choose, force=force, progress=progress)


_SUFFIXES = (*SUFFIXES, ".tar")
_IN_FOLDERS = (
    *("best.safetensors", "last.safetensors", "state.pt"),  # of a run
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def _with_digest(path: Path, sha256: str | None) -> Path:
    if sha256 and not (digest := _digest(path)).startswith(sha256):
        raise CheckpointError(f"{path}: its SHA-256 {digest} does not begin with {sha256}")
    return path


def fetch_backbone(backbone: Backbone, weights: str | os.PathLike[str]) -> Path:
    """The local file of a trunk's weights: "imagenet" for the best, a name of torchvision's, a file, ``hf://``.

    Raises:
        ValueError: neither of these.
        DownloadError, CheckpointError: see `fetch`.
    """
    known = BACKBONE_WEIGHTS[backbone]
    name = list(known)[-1] if weights in ("imagenet", "DEFAULT") else os.fspath(weights)
    if name in known:
        url = known[name]
        return fetch(url, sha256=url.rsplit("-", 1)[-1].split(".")[0])
    if os.path.isfile(name) or name.startswith(hf.SCHEME):
        return fetch(name)
    raise ValueError(
        f"no backbone weights {name!r}: pass a file, hf://owner/repo, 'imagenet', or one of "
        f"{', '.join((*known, 'DEFAULT'))}"
    )


@contextlib.contextmanager
def loading(path: Path, weights: str | os.PathLike[str]) -> Iterator[None]:
    """Load a file within the block; one in the cache then has to keep its digest, or is removed if it fails.

    Args:
        path: what `fetch` gave.
        weights: what `fetch` was given; a file that is named by its path stays, wherever it is.

    Raises:
        CheckpointError: as in the block, with what became of the file.
    """
    before = path.stat()
    try:
        yield
    except NotDamaged:
        raise
    except CheckpointError as error:
        if path.parent != cache_dir() or os.path.exists(weights) or _recorded_digest(path):
            raise
        raise CheckpointError(f"{error}. {_remove(path, before)}") from error
    if path.parent == cache_dir() and not _recorded_digest(path):
        line = f"{_digest(path)}  {path.name}\n"
        # A cache that is read-only serves all the same.
        with contextlib.suppress(OSError), atomic_file(_sidecar(path)) as file:
            file.write(line.encode())


def _remove(path: Path, seen: os.stat_result) -> str:
    """Remove a file from the cache, unless it is another by now; says what became of it."""
    try:
        with FileLock(f"{path}.lock"):
            now = path.stat()
            if (now.st_ino, now.st_mtime_ns, now.st_size) == (seen.st_ino, seen.st_mtime_ns, seen.st_size):
                path.unlink()
    except FileNotFoundError:  # another process was faster
        pass
    except OSError as error:
        why = error.strerror or error
        return f"It is in the cache and cannot be removed ({why}); remove it, to download it again"
    return "It was removed from the cache; the same call downloads it again"


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
        yield
    finally:
        lock.release()


def _download(url: str, path: Path, sha256: str | None, size: int | None, progress: bool) -> None:
    if progress and not is_watched():
        print(f"downloading {as_line(url)}", file=sys.stderr)
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(RETRY_DELAY * 2 ** (attempt - 1))
        try:
            with atomic_file(path) as file:
                _download_once(url, file, path.name, sha256, size, progress)
            with contextlib.suppress(OSError):  # then the digest tells at the first load
                _sidecar(path).unlink(missing_ok=True)
            return
        except web.READ_ERRORS as error:
            problem = error
            if not _may_pass(error):
                break
    damaged = ""
    if path.exists() and not _is_intact(path, sha256):
        damaged = f" (the file there does not have the SHA-256 {sha256 or _recorded_digest(path)})"
    raise DownloadError(
        f"could not download {url}: {web.reason(problem)}. The same call tries again; or get that file on a "
        f"machine that can, and put it, under this name, at {path}{damaged}, or pass its path instead "
        "(`weights=...` or `backbone_weights=...` in Python, `--weights ...` on the command line)"
    ) from problem


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
        if response.headers.get_content_type() == "text/html":
            raise DownloadError("the server sent a web page instead of the file")
        with tqdm(
            total=response.length,
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
    if size is not None and received != size:
        raise ConnectionError(f"got {received:,} of {size:,} bytes")
    if sha256 and not digest.hexdigest().startswith(sha256):
        raise DownloadError(f"the file's SHA-256 is {digest.hexdigest()}, expected {sha256}")
    file.flush()
    cast(Draft, cast(BufferedRandom, file).raw).unlock()  # the download has a lock of its own
    try:
        read(file.name)
    except CheckpointError as error:
        problem = str(error).removeprefix(f"{file.name}: ")
        raise DownloadError(f"what the server sent cannot be used: {problem}") from error
