"""Detection without torch or this package: a folder with a model, a script of its own, and what proves it."""

import hashlib
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

from ssd import __version__
from ssd.backends.base import NMS, load
from ssd.detector import Detector
from ssd.export import TOLERANCES, export
from ssd.files import gone_if_unused, sync_file, take_new, temporary_folder, writing
from ssd.shapes import draw_scene

TEMPLATES = Path(__file__).parent / "templates"
_SCENES = 20  # that are drawn, at most, until one has something on it that is found


def write_standalone(
    weights: str | os.PathLike[str], folder: str | os.PathLike[str], precision: str = "fp32"
) -> Path:
    """A folder that detects with numpy, Pillow and onnxruntime alone, on Python 3.9 and later.

    It holds ``model.onnx`` (of `ssd.export.export`, with NMS, taking uint8), ``detect.py``, a README, and
    ``check.png`` and ``check.json``: a picture with what has to be found in it, which ``python detect.py
    --verify`` compares.

    Args:
        weights: as for `ssd.load_model`.
        folder: to write; it must not be there yet, or be empty.
        precision: of the network: fp32 or fp16.

    Returns:
        `folder`.

    Raises:
        FileExistsError: there is something in the folder.
        ExportError, MissingExtra, ValueError, CheckpointError, DownloadError, FileNotFoundError: see
            `ssd.export.export`.
    """
    home = Path(folder)
    _require_new(home)
    with gone_if_unused(home.parent):
        home.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(home) as made, writing(home):
            new = made / "new"
            new.mkdir()
            model = export(weights, new / "model.onnx", nms=True, uint8=True, precision=precision)
            picture, check = check_of(weights, model)
            (new / "check.png").write_bytes(picture)
            (new / "check.json").write_text(json.dumps(check, indent=1) + "\n", encoding="utf-8")
            (new / "detect.py").write_bytes((TEMPLATES / "detect.py").read_bytes())
            (new / "README.md").write_text(_readme(check), encoding="utf-8")
            for file in new.iterdir():
                sync_file(file)
            take_new([(new, home)])
    return home


def _require_new(path: Path) -> None:
    """Refuse a folder in which there is something.

    Raises:
        FileExistsError: there is.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"{path} exists already; nothing was overwritten: choose another name")


def check_of(weights: str | os.PathLike[str], model: Path) -> tuple[bytes, dict[str, Any]]:
    """What proves an exported model elsewhere.

    Args:
        weights: that it was made of.
        model: an ONNX file with NMS that takes uint8.

    Returns:
        A PNG file, of which the EXIF block says how it is to be turned; and, for JSON, what the network finds
        in it in torch in fp32.
    """
    _, metadata = load(model, torch.device("cpu"))
    nms = metadata.nms or NMS()
    detector = Detector.load(weights, "cpu", "fp32")
    for seed in range(_SCENES):
        scene = draw_scene(np.random.default_rng(seed))[0]
        found = detector(
            scene,
            score_threshold=nms.score_threshold,
            iou_threshold=nms.iou_threshold,
            max_detections=nms.max_detections,
        )
        if len(found):
            break
    check = {
        "ssd300": __version__,
        "model_sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "class_names": metadata.class_names,
        "precision": metadata.precision,
        "tolerance": TOLERANCES[metadata.precision],
        # In half precision, of two boxes that overlap by just the limit of NMS either may stay.
        "unlike": 0 if metadata.precision == "fp32" else math.ceil(len(found) / 100),
        "detections": found.to_dict()["detections"],
    }
    return _turned_png(scene), check


def _turned_png(image: Image.Image) -> bytes:
    """A file of which the pixels lie on their side, as those of a phone do."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    image.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    return file.getvalue()


def _readme(check: Mapping[str, Any]) -> str:
    names = ", ".join(check["class_names"])
    return f"""# A detector in a folder

```sh
pip install numpy "pillow>=10.1" onnxruntime
python detect.py photo.jpg
```

Python 3.9 or later; neither torch nor ssd300 is needed. `python detect.py --verify` proves on this machine
that all works: what is found in `check.png` is compared with `check.json`, and the exit status is 1 where it
differs. `python detect.py --help` tells of `--score-threshold 0.5`, `--json` and `--draw FOLDER`. In Python:

```python
import detect

model = detect.Model()
print(model.detect(detect.read("photo.jpg")))
```

It finds: {names}. Made by ssd300 {check["ssd300"]} in {check["precision"]}.
"""
