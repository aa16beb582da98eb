"""Shared fixtures: the reference figures, networks with made weights, a local web server, no network."""

import json
import os
import socket
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # before OpenMP counts the cores
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from PIL import Image

from ssd import checkpoint, pretrained
from ssd.backends.base import METADATA
from ssd.boxes import LAYOUTS, PUBLISHED_LAYOUT, Layout
from ssd.detector import Detector
from ssd.export import export
from ssd.model import SSD

HAS_GPU = torch.cuda.is_available()
DATA = Path(__file__).parent / "data"
PHOTOS = ("astronaut", "chelsea", "coffee")


def command(*arguments: object) -> list[str]:
    """What starts ``ssd`` in a process that Ctrl-C reaches, whatever this one was made to ignore (nohup)."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from ssd.cli import main; main()"
    )
    return [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]


@pytest.fixture(scope="session")
def figures() -> dict[str, np.ndarray]:
    """Outputs of the published model; tests/data/README.md says how they were made."""
    with np.load(DATA / "figures.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def checkpoint_keys() -> dict[str, list[tuple[str, list[int], str]]]:
    return json.loads((DATA / "checkpoint_keys.json").read_text())


def made_tensor(key: str, shape: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    """The value that the rule of the figures gives to a weight, from its name alone."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(1)
    z = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32).standard_normal(shape)
    z = z.astype(np.float32)
    if key.endswith("running_var"):
        z = np.exp(z / 10)
    elif key.endswith("running_mean"):
        z = z / 10
    elif len(shape) == 1:
        z = 1 + z / 10 if key.endswith("weight") else z / 10
    else:
        z = z * np.sqrt(2 / np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(z, np.float32))


def made_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {key: made_tensor(key, tuple(shape)) for key, shape in shapes.items()}


def made_model(num_classes: int = 4, head_norm: bool = False, layout: Layout = PUBLISHED_LAYOUT) -> SSD:
    """A small network with made weights, tamed so that its scores and boxes spread as a trained one's."""
    model = SSD(num_classes, "resnet18", head_norm, layout=layout)
    model.load_state_dict(made_weights({key: value.shape for key, value in model.state_dict().items()}))
    with torch.no_grad():
        for heads, factor in ((model.loc, 0.03), (model.conf, 0.03)):
            for head in heads:
                head.weight *= factor
        for head in model.conf:
            head.bias[: head.out_channels // num_classes] += 2.5  # the background
    return model.eval()


def require_trackers() -> None:
    """Skip the test, or module, where the packages that track are missing, or a library that they need."""
    try:
        import trackers  # noqa: F401
    except ImportError as error:
        pytest.skip(f"trackers cannot be imported: {error}", allow_module_level=True)


LEFT_OUT = object()


def with_metadata(source: Path, target: Path, changes: dict[str, object]) -> Path:
    """A copy of an ONNX file that says something else of itself, or nothing where that is `LEFT_OUT`."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(source)
    [entry] = [each for each in model.metadata_props if each.key == METADATA]
    values = json.loads(entry.value) | changes
    entry.value = json.dumps({key: value for key, value in values.items() if value is not LEFT_OUT})
    onnx.save(model, target)
    return target


SMALL_LAYOUT = Layout(
    size=96,
    maps=(12, 6, 3, 1),
    steps=(8, 16, 32, 96),
    scales=(14, 30, 55, 80, 96),
    aspect_ratios=((2,), (2, 3), (2,), ()),
)
"""Another layout than the published one: other maps, other numbers of shapes."""

OTHER_LAYOUTS = {
    "small": SMALL_LAYOUT,
    "512": LAYOUTS["512"],
    "300 with other boxes": replace(
        PUBLISHED_LAYOUT,
        scales=(15, 30, 70, 120, 180, 240, 300),
        aspect_ratios=((1.5,), (2, 4), (1.5, 3), (2.5, 3), (2.5,), (3,)),
    ),
}
"""Layouts that are not the published one; the last has tensors of the same shapes."""


@pytest.fixture(scope="session")
def small_model() -> SSD:
    """ResNet-18, three classes and the background, plain heads. Do not change it."""
    return made_model()


@pytest.fixture(scope="session")
def scene_model() -> SSD:
    """A small network for the classes of made-up scenes. Do not change it."""
    return made_model(num_classes=7)


@pytest.fixture(scope="session")
def detector(small_model: SSD) -> Detector:
    return Detector(small_model, ("cat", "cup", "person"))


@pytest.fixture(scope="session")
def weights_file(small_model: SSD, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_model` as a file."""
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    checkpoint.save(path, small_model.state_dict(), ("cat", "cup", "person"))
    return path


EXPORTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "onnx": ("raw.onnx", "onnx", {}),
    "onnx nms": ("nms.onnx", "onnx", {"nms": True, "uint8": True}),
    "onnx batch": ("batch.onnx", "onnx", {"batch": 2, "uint8": True}),
    "openvino": ("ir", "openvino", {}),
    "openvino nms": ("ir_nms", "openvino", {"nms": True}),
    "pt2": ("raw.pt2", "pt2", {}),
    "torchscript nms": ("nms.torchscript", "torchscript", {"nms": True, "uint8": True}),
}
"""Every kind of exported file; with NMS, fixed batch and uint8 spread over them."""


class Exported(dict[str, Path]):
    """A model as each of `EXPORTS`, which is made when a test first asks for it."""

    def __init__(self, weights: Path, folder: Path) -> None:
        super().__init__()
        self.weights, self.folder = weights, folder

    def __missing__(self, key: str) -> Path:
        name, kind, options = EXPORTS[key]
        self[key] = export(self.weights, self.folder / name, kind, **options)
        return self[key]


@pytest.fixture(scope="session")
def exported(weights_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The files of `EXPORTS` of `small_model`. They take a minute; most tests do with `tiny_exported`."""
    return Exported(weights_file, tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="session")
def tiny_model() -> SSD:
    """A network as `small_model`, of `SMALL_LAYOUT`. Do not change it."""
    return made_model(layout=SMALL_LAYOUT)


@pytest.fixture(scope="session")
def tiny_exported(tiny_model: SSD, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The files of `EXPORTS` of `tiny_model`."""
    folder = tmp_path_factory.mktemp("tiny_exported")
    weights = folder / "tiny.safetensors"
    checkpoint.save(weights, tiny_model.state_dict(), ("cat", "cup", "person"), layout=SMALL_LAYOUT)
    return Exported(weights, folder)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three photographs that scikit-image ships, as JPEG files."""
    import skimage.data

    folder = tmp_path_factory.mktemp("photos")
    for name in PHOTOS:
        Image.fromarray(getattr(skimage.data, name)()).save(folder / f"{name}.jpg", quality=95)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are cached in a new folder, and retries do not wait."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch-home"))
    monkeypatch.setattr(pretrained, "RETRY_DELAY", 0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this machine can be reached."""
    connect, resolve = socket.socket.connect, socket.getaddrinfo
    local = ("127.0.0.1", "localhost", "::1")

    def checked_connect(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in local:
            raise OSError(f"tests do not reach {address[0]}")
        connect(self, address)

    def checked_resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in local:
            raise socket.gaierror(f"tests do not look up {host}")
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", checked_connect)
    monkeypatch.setattr(socket, "getaddrinfo", checked_resolve)


class Server:
    """A local web server: `pages` maps a path to a function that answers; `requests` counts them."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.pages: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.requests: list[str] = []
        self.closing = threading.Event()

    def url(self, path: str) -> str:
        return f"{self.address}{path}"

    def serve(
        self,
        path: str,
        body: bytes,
        *,
        kind: str = "application/octet-stream",
        status: int = 200,
        length: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> str:
        """Answer a path with a body; `length` is what the header claims."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            handler.send_header("Content-Type", kind)
            handler.send_header("Content-Length", str(len(body) if length is None else length))
            for name, value in (headers or {}).items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(body)

        self.pages[path] = answer
        return self.url(path)


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.requests.append(self.path)
            try:
                if self.path in site.pages:
                    site.pages[self.path](self)
                else:
                    self.send_error(404)
            except (BrokenPipeError, ConnectionResetError):  # the client had enough
                pass

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        site = Server(f"http://127.0.0.1:{http.server_port}")
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield site
        site.closing.set()
        http.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _only_marked_tests_see_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the others check holds of the CPU, such as equality to the bit."""
    if not request.node.get_closest_marker("cuda"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the processes that a test starts


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A pretended CUDA device is there."""
    if not HAS_GPU:
        torch._C._ensureCUDADeviceGuardSet()  # as FakeTensorMode does: no driver is asked for the device
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda values: values)
    with FakeCuda():
        yield


@contextmanager
def waiting_for_cuda_fails() -> Iterator[None]:
    """Within the block, whatever makes the host wait for the GPU raises a RuntimeError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype and does not see everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


SLOW_TO_MAKE = {"exported", "tiny_exported", "unbroken"}
"""Fixtures whose tests run in one process, with --dist loadgroup."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name in SLOW_TO_MAKE.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(name))
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture
def pixels():
    """A picture that is not symmetric in any way: uint8 [6, 9, 3]."""
    return np.random.RandomState(0).randint(0, 256, (6, 9, 3), np.uint8)
