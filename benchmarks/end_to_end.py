"""JPEG files to detections: against the published steps one by one, and torchvision's SSD300 on a folder.

python benchmarks/end_to_end.py [--rounds 15] [--folder-rounds 5]

All networks have random weights (ours ResNet-50 with 81 classes, torchvision's VGG-16 with 91), whose
background bias is set so that each finds about 20 objects in an image: NMS has equal work. Scores above
0.05, IoU 0.5, 200 candidates a class, 200 detections. "published" is the hub page's protocol: its input by
scikit-image, the plain module in fp32, decoding with a loop over classes and boxes, pick_best.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from inference import NAMES, random_model
from PIL import Image
from postprocess import published as published_decode
from preprocess import hub
from timing import heading, medians, show
from torch import Tensor, nn
from torchvision.transforms import functional

from ssd import checkpoint
from ssd.benchmark import draw_images, run_benchmark
from ssd.boxes import PUBLISHED_LAYOUT
from ssd.detector import Detector
from ssd.export import export
from ssd.images import load_image
from ssd.model import SSD
from ssd.transforms import evaluation_transform

OBJECTS = 20
WANTED = {"score_threshold": 0.05, "iou_threshold": 0.5, "max_detections": 200}


def spread(
    heads: list[nn.Conv2d], classes: int, logits: Callable[[], Tensor], count: Callable[[], float]
) -> None:
    """Give logits a deviation of 2, and the background the bias at which `count` is about `OBJECTS`."""
    factor = 2 / float(logits().std())
    for head in heads:
        head.weight.data.mul_(factor)
    low, high = -10.0, 60.0
    for _ in range(12):
        middle = (low + high) / 2
        for head in heads:
            background(head, classes).fill_(middle)
        low, high = (low, middle) if count() < OBJECTS else (middle, high)


def background(head: nn.Conv2d, classes: int) -> Tensor:
    """The bias of class 0. torchvision orders channels by shape, then class; the published heads do not."""
    if classes == 91:
        return head.bias.data.view(-1, classes)[:, 0]
    return head.bias.data.view(classes, -1)[0]


def our_model(files: list[str]) -> SSD:
    model = random_model()

    def count() -> float:
        return float(np.mean([len(each) for each in Detector(model, NAMES)(files[:4], **WANTED)]))

    pixels = torch.stack([evaluation_transform(load_image(file), model.layout.size) for file in files[:2]])
    spread(list(model.conf), 81, lambda: model(pixels)[1], count)
    print(f"ssd: {count():.0f} objects an image")
    return model


def their_model(files: list[str]) -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None).eval()
    model.score_thresh, model.nms_thresh = WANTED["score_threshold"], WANTED["iou_threshold"]
    model.topk_candidates = model.detections_per_img = WANTED["max_detections"]

    def count() -> float:
        return float(np.mean([len(each["scores"]) for each in theirs(model, files[:4])]))

    def logits() -> Tensor:
        images, _ = model.transform([functional.to_tensor(Image.open(file)) for file in files[:2]])
        return model.head(list(model.backbone(images.tensors).values()))["cls_logits"]

    spread(list(model.head.classification_head.module_list), 91, logits, count)
    print(f"torchvision: {count():.0f} objects an image")
    return model


def theirs(model: nn.Module, files: list[str], batch: int = 8) -> list[dict[str, Tensor]]:
    found = []
    for start in range(0, len(files), batch):
        images = [Image.open(file).convert("RGB") for file in files[start : start + batch]]
        found += model([functional.to_tensor(image) for image in images])
    return found


def published(model: SSD, file: str, defaults: Tensor) -> list[np.ndarray]:
    pixels = torch.from_numpy(hub(Path(file)).astype(np.float32)).permute(2, 0, 1)[None].contiguous()
    loc, conf = model(pixels)
    boxes, labels, scores = published_decode(loc, conf, defaults)[0]
    best = np.argwhere(scores.numpy() > WANTED["score_threshold"]).squeeze(1)
    return [boxes.numpy()[best], labels.numpy()[best], scores.numpy()[best]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder-rounds", type=int, default=5)
    options = parser.parse_args()
    print(heading())
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        photos = folder / "photos"
        photos.mkdir()
        files = draw_images(photos, 64)
        model, vision = our_model(files), their_model(files)
        weights = folder / "model.safetensors"
        checkpoint.save(weights, model.state_dict(), NAMES)
        detectors = {f"ssd, {p}": Detector.load(weights, "cpu", p) for p in ("fp32", "bf16")}
        ir = export(weights, folder / "ir", "openvino")
        detectors["OpenVINO, bf16"] = Detector.load(ir, "cpu", "bf16")
        defaults = PUBLISHED_LAYOUT.default_boxes()

        one = {"published": lambda: published(model, files[0], defaults)}
        one |= {each: (lambda d=d: d(files[0], **WANTED)) for each, d in detectors.items()}
        times = medians(one, options.rounds)
        show("one JPEG file to detections; how many times the time of ssd, bf16", times, "ssd, bf16")

        many = {"torchvision ssd300_vgg16": lambda: theirs(vision, files)}
        many |= {each: (lambda d=d: list(d.stream(photos, **WANTED))) for each, d in detectors.items()}
        times = medians(many, options.folder_rounds)
        show("a folder of 64 JPEG files, ms an image", times, "ssd, bf16", per=64)

        detector = detectors["ssd, bf16"]
        around(detector, files[:8])


def around(detector: Detector, files: list[str]) -> None:
    """What reading, the transform and the postprocess are of all the time of a batch."""
    report = run_benchmark(detector, files, batch_size=8, rounds=15)
    print(report)
    print(
        "that peak memory is of this process, in which all of the above ran: our networks, torchvision's, an "
        "export, OpenVINO; benchmarks/memory.py measures each by itself"
    )
    rest = 1 - report.stages["forward"] / sum(report.stages.values())
    print(f"all but the network: {100 * rest:.1f} %")


if __name__ == "__main__":
    main()
