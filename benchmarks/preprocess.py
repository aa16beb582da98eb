"""File to network input against the hub's prepare_input and torchvision's transforms, in one run.

python benchmarks/preprocess.py [--rounds 40]

A 640x480 JPEG, made of a photograph that scikit-image ships. "hub" is a plain reimplementation of the
published steps: scikit-image reads, resizes in float64, crops and normalises. Then a 4032x3024 JPEG, as
telephones take them: read whole, by torchvision's decoder, and with scaled_decoding.
"""

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
import skimage.data
import skimage.io
import skimage.transform
import torch
from PIL import Image
from timing import heading, medians, show
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from ssd.boxes import PUBLISHED_LAYOUT
from ssd.hub import Processing
from ssd.images import load_image, load_scaled
from ssd.transforms import MEAN, STD, evaluation_transform, resize

SIZE = PUBLISHED_LAYOUT.size


def hub(path: Path) -> np.ndarray:
    image = skimage.io.imread(path) / 255.0
    height, width = image.shape[:2]
    image = skimage.transform.resize(image, (SIZE, int(SIZE * width / height)))
    left = image.shape[1] // 2 - SIZE // 2
    return (image[:, left : left + SIZE] * 256 - 128) / 128


TORCHVISION = v2.Compose(
    [
        v2.Resize((SIZE, SIZE)),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
)


def torchvisions(path: Path) -> Tensor:
    return TORCHVISION(Image.open(path).convert("RGB"))


def detectors(path: Path) -> Tensor:
    return evaluation_transform(load_image(path), SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    print(heading())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.jpg"
        Image.fromarray(skimage.data.coffee()).resize((640, 480)).save(path, quality=90)
        np.testing.assert_allclose(Processing.prepare_input(path), hub(path), atol=1e-6)
        worst = (detectors(path) - torchvisions(path)).abs().max()
        assert worst < 1.01 / 255 / min(STD), "more than one of 255 levels apart"
        functions = {
            "Detector: load_image, evaluation_transform": lambda: detectors(path),
            "torchvision: Resize, ToImage, Normalize": lambda: torchvisions(path),
            "ssd.hub prepare_input": lambda: Processing.prepare_input(path),
            "hub prepare_input, as published": lambda: hub(path),
        }
        times = medians(functions, options.rounds)
    show("640x480 JPEG file to input", times, next(iter(functions)))
    large(options.rounds)


def large(rounds: int) -> None:
    file = io.BytesIO()
    Image.fromarray(skimage.data.coffee()).resize((4032, 3024)).save(file, "JPEG", quality=90)
    content = file.getvalue()
    buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    vision = decode_jpeg(buffer, ImageReadMode.RGB).permute(1, 2, 0)
    np.testing.assert_array_equal(np.asarray(load_image(content)), vision.numpy())
    functions = {
        "load_image": lambda: load_image(content),
        "torchvision decode_jpeg, equal to the bit": lambda: decode_jpeg(buffer, ImageReadMode.RGB),
        "load_scaled": lambda: load_scaled(content, SIZE),
        "load_image, resize": lambda: resize(load_image(content), SIZE),
        "load_scaled, resize": lambda: resize(load_scaled(content, SIZE)[0], SIZE),
    }
    show("4032x3024 JPEG", medians(functions, rounds // 4), "load_image, resize")


if __name__ == "__main__":
    main()
