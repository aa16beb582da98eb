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
    _other = sys.modules.get("ssd")
    # A folder without __init__.py is a package, too, and has no file.
    _folders = list(getattr(_other, "__path__", []))
    _found = getattr(_other, "__file__", None) or (_folders[0] if _folders else None)
    if _other is None or os.path.realpath(f"{_HERE}/ssd") in map(os.path.realpath, _folders):
        raise
    raise ImportError(
        f"another ssd is in the way: {_found or 'a module that was made without a file'}; load this one in a "
        "process that does not import that one, or rename it"
    ) from error
