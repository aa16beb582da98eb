"""Finds objects in photos with the model.onnx beside this file; needs numpy, Pillow and onnxruntime alone."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import PIL
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "AVIF",
)  # those of Pillow that start no programs
MOST = 100  # objects of an image
MAX_ASPECT = 100  # most times that one side may be longer than the other
BAND = 1_000_000  # pixels that are resized at a time
# What makes an image of an EXIF orientation upright (EXIF 2.3, tag 0x0112), by Pillow's numbers.
ORIENTATION = 0x0112
UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}


class Unreadable(ValueError):
    """A photo that cannot be used, and why."""


class Model:
    """The network, and what its file says of it.

    Args:
        path: of an .onnx file with NMS that takes uint8, as `ssd export --nms --uint8` writes it.
    """

    def __init__(self, path: str | Path = HERE / "model.onnx") -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.about = json.loads(self.session.get_modelmeta().custom_metadata_map["ssd300"])
        self.names: list[str] = self.about["class_names"]
        self.least = float(self.about["nms"]["score_threshold"])

    def detect(
        self, image: Image.Image, thresholds: float | list[float] = 0.4, most: int = MOST
    ) -> list[Any]:
        """Objects of an upright RGB image, best first: name, class_id, score, and box.

        A box is left, top, right, bottom in pixels of the image. `thresholds` is one for all classes, or one
        for each.
        """
        pixels = resize(image, self.about["size"])[None]
        boxes, scores, class_ids, counts = (each[0] for each in self.session.run(None, {"images": pixels}))
        if np.isnan(scores).any():
            raise Unreadable("the network gave no finite numbers")
        limits = np.broadcast_to(np.asarray(thresholds, np.float32), (len(self.names),))
        kept = np.flatnonzero((np.arange(len(scores)) < counts) & (scores > limits[class_ids]))[:most]
        sides = np.asarray([image.width, image.height] * 2, np.float32)
        found = []
        for box, score, number in zip(boxes[kept] * sides, scores[kept], class_ids[kept]):  # noqa: B905
            left, top, right, bottom = np.clip(box, 0, sides).tolist()
            if left < right and top < bottom:
                found.append(
                    {
                        "name": self.names[number],
                        "class_id": int(number),
                        "score": float(score),
                        "box": [left, top, right, bottom],
                    }
                )
        return found


# --- From a file to what the network sees -----------------------------------------------------------------


def read(path: str | Path) -> Image.Image:
    """The upright RGB image of a file; transparency is laid over white, 16 bits are scaled to 8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of small damage
        with Image.open(path, formats=FORMATS) as file:
            if max(file.size) > MAX_ASPECT * min(file.size):
                raise Unreadable(f"{file.width}x{file.height} is too thin to be seen in a square")
            file.load()
            try:
                orientation = file.getexif().get(ORIENTATION, 1)
            except Exception:  # a block that cannot be read says nothing about orientation
                orientation = 1
            image = rgb(file)
    return image.transpose(Image.Transpose(UPRIGHT[orientation])) if orientation in UPRIGHT else image


def rgb(image: Image.Image) -> Image.Image:
    """An image of any of Pillow's modes as RGB."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise Unreadable("its values are of more than 16 bits; save it with 8 or 16")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise Unreadable("its values are floats; save it with 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(layer, mask=layer)
        return white
    return image.convert("RGB")


def resize(image: Image.Image, size: int) -> np.ndarray:
    """The whole image squashed to uint8 ``[size, size, 3]``, bilinear and antialiased.

    To the bit as torch's `interpolate` does it on a CPU, which the network was proved with; Pillow's own
    differs by 1 in some values.
    """
    rows = max(1, BAND // image.width)
    bands = (
        image.crop((0, top, image.width, min(top + rows, image.height)))
        for top in range(0, image.height, rows)
    )
    narrow = np.concatenate([squash(np.asarray(band), size) for band in bands])
    return np.ascontiguousarray(squash(narrow.transpose(1, 0, 2), size).transpose(1, 0, 2))


def squash(pixels: np.ndarray, size: int) -> np.ndarray:
    """Uint8 ``[H, W, 3]`` made ``[H, size, 3]``: a triangle filter, of weights in as many bits as 16 hold."""
    width = pixels.shape[1]
    scale = width / size
    reach = max(scale, 1.0)
    filters = []
    for number in range(size):
        middle = scale * (number + 0.5)
        first, last = max(int(middle - reach + 0.5), 0), min(int(middle + reach + 0.5), width)
        weights = np.maximum(1 - np.abs((np.arange(first, last) - middle + 0.5) / reach), 0)
        filters.append((first, last, weights / weights.sum()))
    most = max(weights.max() for _, _, weights in filters)
    bits = 0
    while bits < 22 and int(0.5 + most * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    made = np.empty((len(pixels), size, 3), np.uint8)
    for number, (first, last, weights) in enumerate(filters):
        whole = (0.5 + weights * (1 << bits)).astype(np.int32)
        sums = np.einsum("hwc,w->hc", pixels[:, first:last].astype(np.int32), whole)
        made[:, number] = ((sums + (1 << bits >> 1)) >> bits).clip(0, 255)
    return made


# --- Pictures, proof, command -----------------------------------------------------------------------------


def draw(image: Image.Image, found: list[Any]) -> Image.Image:
    """A picture with boxes and labels."""
    picture = image.copy()
    pencil = ImageDraw.Draw(picture)
    size = max(14.0, 0.028 * (image.width * image.height) ** 0.5)
    font = ImageFont.load_default(size)
    for each in reversed(found):  # the best on top
        color = f"hsl({each['class_id'] * 137 % 360},75%,40%)"
        left, top, right, bottom = each["box"]
        pencil.rectangle((left, top, right, bottom), outline=color, width=max(2, round(size / 7)))
        label = f" {each['name']} {each['score']:.2f} "
        # Pillow's own font has Latin letters alone.
        label = "".join(letter if ord(letter) < 0x250 else "?" for letter in label)
        at = (left, max(top - size * 1.3, 0))
        pencil.rectangle(pencil.textbbox(at, label, font), fill=color)
        pencil.text(at, label, "white", font)
    return picture


def verify() -> int:
    """Compare what is found in the check picture with what has to be; 0 where it is proved."""
    check = json.loads((HERE / "check.json").read_text(encoding="utf-8"))
    if hashlib.sha256((HERE / "model.onnx").read_bytes()).hexdigest() != check["model_sha256"]:
        print("NOT PROVED: model.onnx is another file than the one that was exported here")
        return 1
    model = Model()
    image = read(HERE / "check.png")
    found = model.detect(image, model.least, len(check["detections"]) + 1000)
    score_limit, sides = check["tolerance"], [image.width, image.height] * 2
    wrong, worst = 0, 0.0
    pairs = [(each, found, "not found") for each in check["detections"]]
    pairs += [(each, check["detections"], "not expected") for each in found]
    for each, others, problem in pairs:
        apart = [
            max(abs(each["score"] - other["score"]), *map(_share, each["box"], other["box"], sides))
            for other in others
            if other["class_id"] == each["class_id"]
        ]
        nearest = min(apart, default=1.0)
        # One at the threshold may have fallen below it.
        if nearest > score_limit and each["score"] > model.least + 2 * score_limit:
            wrong += 1
            box = ", ".join(f"{side:.1f}" for side in each["box"])
            print(f"{problem}: {each['name']} {each['score']:.4f} at {box}")
        elif nearest <= score_limit:
            worst = max(worst, nearest)
    count = len(check["detections"])
    print(f"{count} expected, {len(found)} found; largest difference {worst:.2g} (allowed {score_limit:g})")
    print(f"onnxruntime {onnxruntime.__version__}, numpy {np.__version__}, Pillow {PIL.__version__}")
    proved = wrong <= check["unlike"]
    print("proved: this machine finds what the exported model found" if proved else "NOT PROVED")
    return 0 if proved else 1


def _share(a: float, b: float, side: int) -> float:
    return abs(a - b) / side


def score(text: str) -> float | str:
    """What --score-threshold takes; errors call it by this function's name."""
    return text if text == "calibrated" else float(text)


def probability(score: float, temperature: float, bias: float) -> float:
    """That a detection of a score finds an object, as the model was calibrated."""
    score = min(max(score, 1e-6), 1 - 1e-6)
    return 1 / (1 + math.exp(-(math.log(score / (1 - score)) / temperature + bias)))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", nargs="*", type=Path)
    threshold_help = 'least score of an object, or "calibrated": that of its class'
    parser.add_argument("--score-threshold", type=score, default=0.4, help=threshold_help)
    parser.add_argument("--json", action="store_true", help="a line of JSON for each photo")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="write pictures with boxes there")
    parser.add_argument("--verify", action="store_true", help="prove that all works on this machine")
    wanted = parser.parse_args()
    if wanted.verify:
        return verify()
    if not wanted.photos:
        parser.error("name photos, or --verify")
    model = Model()
    worth: dict[str, float] = {}
    thresholds = wanted.score_threshold
    if thresholds == "calibrated":
        thresholds, worth = model.about.get("score_thresholds"), model.about.get("calibration") or {}
        if not thresholds:
            parser.error("this model has no calibrated thresholds; give a number")
    elif not model.least <= thresholds <= 1:
        parser.error(f"--score-threshold is from {model.least:g} to 1")
    failed = 0
    for path in wanted.photos:
        try:
            image = read(path)
            found = model.detect(image, thresholds)
            for each in found if worth else ():
                each["score"] = probability(each["score"], worth["temperature"], worth["bias"])
            if wanted.draw:
                wanted.draw.mkdir(parents=True, exist_ok=True)
                with _free(wanted.draw, path.stem) as file:
                    draw(image, found).save(file, "JPEG", quality=92)
        except Exception as error:  # decoders raise anything
            print(f"{path}: {error}", file=sys.stderr)
            failed += 1
            continue
        if wanted.json:
            sizes = {"width": image.width, "height": image.height}
            print(json.dumps({"source": str(path), **sizes, "detections": found}, ensure_ascii=False))
        else:
            print(f"{path}: {len(found)} object{'' if len(found) == 1 else 's'}")
            for each in found:
                print(
                    f"  {each['name']} {each['score']:.2f} at {', '.join(f'{at:.0f}' for at in each['box'])}"
                )
    return 1 if failed else 0


def _free(folder: Path, stem: str) -> Any:
    """A new file for a picture; what exists is never replaced."""
    for number in range(1, 10**6):
        try:
            return (folder / f"{stem}{f'-{number}' if number > 1 else ''}.jpg").open("xb")
        except FileExistsError:
            pass
    raise FileExistsError(folder)


if __name__ == "__main__":
    sys.exit(main())
