"""torch.hub entrypoints: ``torch.hub.load(<this repository>, "nvidia_ssd")``."""

import os
import sys

dependencies = ["torch", "torchvision", "numpy", "PIL", "skimage", "safetensors", "filelock", "tqdm"]

_HERE = os.path.dirname(os.path.abspath(__file__))
if _HERE not in sys.path[1:]:
    # torch.hub puts this folder first and takes it away again; a process that is started with "spawn", and is
    # handed a model, looks for `ssd` here.
    sys.path.append(_HERE)

try:
    from ssd.hub import nvidia_ssd, nvidia_ssd_processing_utils  # noqa: F401
except ImportError as error:
    _found = getattr(sys.modules.get("ssd"), "__file__", None)
    if _found is None or os.path.realpath(os.path.dirname(_found)) == os.path.realpath(f"{_HERE}/ssd"):
        raise
    raise ImportError(
        f"another package called ssd was imported before, from {_found}; load this one in a process that has "
        "not imported it"
    ) from error
