"""The files of TorchScript, for libtorch and older torch."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ssd.backends import graph
from ssd.backends.base import METADATA, Backend, Metadata, of_file, parse_metadata, require_own_precision
from ssd.devices import usable_device
from ssd.model import SSD


def load_file(path: Path, device: torch.device | None, precision: str) -> tuple[Backend, Metadata]:
    """See `ssd.backends`."""
    device = device or usable_device(None)
    notes = {METADATA: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated is known to who asks for it
        program = torch.jit.load(path, map_location=device, _extra_files=notes)
    metadata = parse_metadata(path, notes[METADATA])
    require_own_precision(path, metadata, precision)
    return of_file("TorchScript", metadata, device, program), metadata


def write(
    model: SSD, path: Path, metadata: Metadata, images: Tensor | None = None
) -> Callable[[Metadata], None]:
    """See `ssd.backends`."""
    network = graph.Graph(model, metadata, graph.greedy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated is known to who asks for it
        traced = torch.jit.trace(network, (graph.example_input(metadata),), check_trace=False)
        program = torch.jit.freeze(traced)

    def save(metadata: Metadata) -> None:
        content = io.BytesIO()  # torch.jit.save would end the process if the disk got full
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(program, content, _extra_files={METADATA: metadata.to_json()})
        path.write_bytes(content.getbuffer())

    save(metadata)
    return save
