"""``ssd download`` and ``ssd info``."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ssd import __version__
from ssd.cli.common import AUTO, Json
from ssd.devices import choose_precision, native_precisions
from ssd.hf import SCHEME
from ssd.model import load_model
from ssd.pretrained import PUBLISHED, cached_path, fetch
from ssd.web import is_web_url

_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "scikit-image", "pycocotools", "safetensors")


def download(
    weights: Annotated[
        str, typer.Argument(help='"coco", the URL of a checkpoint, hf://owner/repo.')
    ] = "coco",
    force: Annotated[bool, typer.Option("--force", help="Download again what is there already.")] = False,
) -> None:
    """Without a network, the error says which file to get and where to put it."""
    if weights not in PUBLISHED and not is_web_url(weights) and not weights.startswith(SCHEME):
        raise typer.BadParameter(f"{weights} is neither a URL nor one of {', '.join(PUBLISHED)}")
    model, _ = load_model(weights, force=force)
    path = fetch(weights)
    typer.echo(f"{path} ({_megabytes(path)}, {model.backbone}, {model.num_classes - 1} classes)")


def info(as_json: Json = False) -> None:
    """For reports of what goes wrong, too."""
    facts = _facts()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    rows = [("versions", "  ".join(f"{name} {number}" for name, number in facts["versions"].items()))]
    rows += [
        (
            "device",
            f"{device['device']}: {device['name']}; computes {', '.join(device['precisions'])} natively, "
            f"so auto takes {device['auto']}",
        )
        for device in facts["devices"]
    ]
    rows += [
        (
            "weights",
            f"{each['name']}: {each['accuracy']}; {each['path']} ({each['size'] or 'not downloaded'})",
        )
        for each in facts["weights"]
    ]
    for title, text in rows:
        typer.echo(f"{title:10}{text}")


def _facts() -> dict[str, Any]:
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    has_gpu = _version("onnxruntime-gpu") != "not installed"
    packages = (*_PACKAGES, "onnxruntime-gpu" if has_gpu else "onnxruntime", "openvino")
    return {
        "versions": {"ssd300": __version__, "python": platform.python_version()}
        | {package: _version(package) for package in packages},
        "devices": [
            {
                "device": str(device),
                "name": _device_name(device),
                "precisions": native_precisions(device),
                "auto": choose_precision(AUTO, device),
            }
            for device in devices
        ],
        "weights": [
            {
                "name": name,
                "accuracy": record.accuracy,
                "path": str(cached_path(name)),
                "size": _megabytes(cached_path(name)) if cached_path(name).exists() else None,
            }
            for name, record in PUBLISHED.items()
        ],
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = found[0].split(":", 1)[1].strip() if found else name
    return f"{name}, {torch.get_num_threads()} threads"


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.0f} MB"
