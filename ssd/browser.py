"""Detection in a browser: one page with the network, its runtime and all else in it."""

import base64
import gzip
import hashlib
import io
import json
import os
import re
import tarfile
from pathlib import Path

import torch

from ssd import web
from ssd.backends.base import load
from ssd.errors import DownloadError
from ssd.export import export
from ssd.files import gone_if_unused, temporary_folder, write_file
from ssd.pretrained import cache_dir
from ssd.standalone import TEMPLATES, check_of

RUNTIME_URL = "https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-1.30.0.tgz"
"""ONNX Runtime for browsers (MIT licence), as npm has it; another version takes other digests."""

_MOST_BYTES = 64 << 20
RUNTIME_SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
RUNTIME_FILES = {
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
"""Those of its dist/ that a page holds, and their SHA-256."""

# What makes the runtime a module. Pages from files can start no worker of one, so it becomes a script.
_EXPORTS = re.compile(r"export\{([^}]*)\};?")
_ADDRESS = "import.meta.url"


def write_page(
    weights: str | os.PathLike[str],
    file: str | os.PathLike[str],
    precision: str = "fp32",
    runtime: str | os.PathLike[str] | None = None,
) -> Path:
    """An HTML file that detects in photos and a camera's film in any browser, without a network.

    Args:
        weights: as for `ssd.load_model`.
        file: to write; what is there is replaced.
        precision: fp32, or fp16 for half of the size.
        runtime: a folder with `RUNTIME_FILES`, or of the npm package onnxruntime-web 1.30.0 that has them in
            its ``dist``; by default they are fetched from npm, once.

    Returns:
        `file`.

    Raises:
        FileNotFoundError: the folder has no such files.
        DownloadError: they cannot be fetched, or are others than those that are known.
        ExportError, MissingExtra, ValueError, CheckpointError: see `ssd.export.export`.
    """
    path = Path(file)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{path}: the name of a page has to end in .html")
    script, wasm = runtime_files(runtime)
    with gone_if_unused(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(path) as made:
            model = export(weights, made / "model.onnx", nms=True, uint8=True, precision=precision)
            picture, check = check_of(weights, model)
            _, metadata = load(model, torch.device("cpu"))
            about = {**json.loads(metadata.to_json()), "check": check}
            content = _page(about, picture, model.read_bytes(), script, wasm)
        write_file(path, content)
    return path


def runtime_files(folder: str | os.PathLike[str] | None = None) -> tuple[bytes, bytes]:
    """The script and the WebAssembly of ONNX Runtime, from a folder or from npm.

    Raises:
        FileNotFoundError, DownloadError: see `write_page`.
    """
    found = {}
    if folder is None:
        with tarfile.open(fileobj=io.BytesIO(_package())) as package:
            for name in RUNTIME_FILES:
                member = package.extractfile(f"package/dist/{name}")
                assert member is not None  # the archive has its digest
                found[name] = member.read()
    else:
        home = Path(folder)
        for name, sha256 in RUNTIME_FILES.items():
            places = [each / name for each in (home, home / "dist", home / "package" / "dist")]
            place = next((each for each in places if each.is_file()), None)
            if place is None:
                raise FileNotFoundError(
                    f"{home} has no {name}; unpack the npm package onnxruntime-web of version "
                    f"{_version()} there: npm pack onnxruntime-web@{_version()}"
                )
            found[name] = place.read_bytes()
            if hashlib.sha256(found[name]).hexdigest() != sha256:
                raise DownloadError(f"{place}: is not the file of onnxruntime-web {_version()}; get that")
    script, wasm = (found[name] for name in RUNTIME_FILES)
    return script, wasm


def _package() -> bytes:
    """The npm package, from the cache of weights or else from npm."""
    path = cache_dir() / RUNTIME_URL.rsplit("/", 1)[1]
    if path.is_file() and hashlib.sha256(content := path.read_bytes()).hexdigest() == RUNTIME_SHA256:
        return content
    body = bytearray()
    try:
        with web.open_url(RUNTIME_URL) as response:
            for chunk in web.chunks(response):
                body += chunk
                if len(body) > _MOST_BYTES:
                    break
        if hashlib.sha256(body).hexdigest() != RUNTIME_SHA256:
            raise ConnectionError("it is another file than the one that is known")
    except web.READ_ERRORS as error:
        raise DownloadError(
            f"could not download {RUNTIME_URL}: {web.reason(error)}. Try again; or get that file on another "
            f"machine, and put it at {path}, or unpack it, and give the folder: --onnxruntime-web FOLDER"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, body)
    return bytes(body)


def _version() -> str:
    return RUNTIME_URL.rsplit("-", 1)[1].removesuffix(".tgz")


def _page(about: object, picture: bytes, model: bytes, runtime: bytes, wasm: bytes) -> bytes:
    page, style, script, worker = (
        (TEMPLATES / name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "page.js", "worker.js")
    )

    def named(found: re.Match[str]) -> str:
        pairs = (each.split(" as ") for each in found[1].split(","))
        return f"const ort={{{','.join(f'{name}:{own}' for own, name in pairs)}}};"

    text, count = _EXPORTS.subn(named, runtime.decode())
    assert count == 1  # the file has its digest
    policy = (
        f"default-src 'none'; script-src {_hash(script)} 'wasm-unsafe-eval'; style-src {_hash(style)}; "
        "worker-src blob:; img-src data: blob:; media-src blob:; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "style": style,
        "about": json.dumps(about, ensure_ascii=True).replace("<", "\\u003c"),
        "picture": base64.b64encode(picture).decode(),
        "wasm": base64.b64encode(gzip.compress(wasm, 6, mtime=0)).decode(),
        "model": base64.b64encode(gzip.compress(model, 6, mtime=0)).decode(),
        "worker": f"{text.replace(_ADDRESS, 'self.location.href')}\n{worker}",
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page).encode()


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
