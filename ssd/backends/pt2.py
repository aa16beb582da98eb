"""The .pt2 files of torch.export."""

import io
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ssd.backends import graph
from ssd.backends.base import (
    METADATA,
    Backend,
    Metadata,
    of_file,
    parse_metadata,
    reason,
    require_own_precision,
)
from ssd.devices import usable_device
from ssd.errors import CheckpointError
from ssd.model import SSD


def load_file(path: Path, device: torch.device | None, precision: str) -> tuple[Backend, Metadata]:
    """See `ssd.backends`."""
    _refuse_pickles(path)
    notes = {METADATA: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.10's, of a buffer that it does not write to
        program = torch.export.load(path, extra_files=notes)
    metadata = parse_metadata(path, notes[METADATA])
    require_own_precision(path, metadata, precision)
    device = device or usable_device(None)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass  # noqa: PLC0415

        program = move_to_device_pass(program, device)
    return of_file("torch.export", metadata, device, program.module()), metadata


def _refuse_pickles(path: Path) -> None:
    """Require that a .pt2 holds nothing but tensors and JSON: torch unpickles whatever it is told to.

    Raises:
        CheckpointError: it holds more, or is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            entries = [
                entry
                for name in names
                if name.endswith("_config.json")
                for entry in json.loads(archive.read(name))["config"].values()
            ]
            for name in names:
                if name.endswith(".pt"):  # an example of the inputs
                    torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)
            plain = all(
                entry["use_pickle"] is False and entry["path_name"].startswith(("weight_", "tensor_"))
                for entry in entries
            )
    except Exception as error:
        raise CheckpointError(f"{path}: not a whole .pt2 file of tensors ({reason(error)})") from None
    if not plain or not any(name.endswith("/archive_format") for name in names):
        raise CheckpointError(f"{path}: holds more than tensors, and is not loaded for safety")


def write(
    model: SSD, path: Path, metadata: Metadata, images: Tensor | None = None
) -> Callable[[Metadata], None]:
    """See `ssd.backends`."""
    program = torch.export.export(
        graph.Graph(model, metadata, graph.greedy),
        (graph.example_input(metadata),),
        dynamic_shapes=graph.dynamic_shapes(metadata),
    )

    def save(metadata: Metadata) -> None:
        content = io.BytesIO()
        torch.export.save(program, content, extra_files={METADATA: metadata.to_json()})
        path.write_bytes(content.getbuffer())

    save(metadata)
    return save
