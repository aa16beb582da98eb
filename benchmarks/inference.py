"""The network alone, in every backend, against the published module run eagerly, in one run.

python benchmarks/inference.py [--batch 1 8] [--rounds 15] [--only fp32 bf16 int8] [--compile]

ResNet-50, 81 classes, random weights; from uint8 pixels to raw outputs. "published" is the module as it is:
float32, NCHW, BatchNorm and heads apart. Needs the extra `openvino`. int8 is calibrated on made-up scenes.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from timing import heading, medians
from torch import Tensor, nn

from ssd import backends, checkpoint
from ssd.benchmark import draw_images, peak_flops
from ssd.boxes import PUBLISHED_LAYOUT, Layout
from ssd.devices import DTYPES
from ssd.export import calibration_images, export
from ssd.model import SSD
from ssd.transforms import normalize

SIZE = PUBLISHED_LAYOUT.size
NAMES = tuple(f"class {number}" for number in range(80))


def random_model(backbone: str = "resnet50", layout: Layout = PUBLISHED_LAYOUT) -> SSD:
    torch.manual_seed(0)
    model = SSD(81, backbone, head_norm=False, layout=layout).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    with torch.inference_mode():  # outputs as small as a trained network's, or int8 would only be noise
        outputs = model(torch.randn(1, 3, layout.size, layout.size))
    for heads, values in zip((model.loc, model.conf), outputs, strict=True):
        for head in heads:
            head.weight.div_(values.std())
    return model


def forwards(model: SSD, folder: Path, kinds: list[str], *, compile: bool) -> dict[str, Callable]:
    """Functions of uint8 pixels, by the name of the backend; the published one first."""
    weights = folder / "model.safetensors"
    checkpoint.save(weights, model.state_dict(), NAMES)
    cpu = torch.device("cpu")
    wanted = [precision for precision in ("fp32", "bf16") if precision in kinds]
    found: dict[str, Callable] = {
        "published, fp32": lambda pixels: model(normalize(pixels).contiguous()),
    }
    for precision in wanted:
        found[f"ssd, {precision}"] = backends.of_model(model, precision).forward
        if compile:
            found[f"ssd compiled, {precision}"] = backends.of_model(model, precision, compile=True).forward
    if "fp32" in kinds:
        onnx = export(weights, folder / "model.onnx")
        found["ONNX Runtime, fp32"] = backends.load(onnx, cpu)[0].forward
    if wanted:
        ir = export(weights, folder / "ir", "openvino")
        for precision in wanted:
            found[f"OpenVINO, {precision}"] = backends.load(ir, cpu, precision)[0].forward
    if "int8" in kinds:
        scenes = folder / "scenes"
        scenes.mkdir()
        draw_images(scenes, 32)
        ir = export(weights, folder / "int8", "openvino", precision="int8", calibrate=scenes)
        found["OpenVINO, int8"] = backends.load(ir, cpu)[0].forward
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", default=["fp32", "bf16", "int8"])
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    print(heading())
    for name in ("fp32", "bf16"):
        rate = peak_flops(torch.device("cpu"), DTYPES[name]) / 1e9
        print(f"the machine reaches {rate:.0f} GFLOP/s in {name}")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model = random_model()
        functions = forwards(model, Path(folder), options.only, compile=options.compile)
        examples = calibration_images(Path(folder) / "scenes", SIZE) if "int8" in options.only else None
        for batch in options.batch:
            pixels = _pixels(batch, examples)
            times = medians({name: partial(run, pixels) for name, run in functions.items()}, options.rounds)
            first = next(iter(times.values()))
            print(f"batch {batch}, ms an image, and how many times as fast as published")
            for name, seconds in times.items():
                print(f"  {name:24} {1e3 * seconds / batch:8.2f} ms  {first / seconds:6.2f}x")


def _pixels(batch: int, examples: Tensor | None) -> Tensor:
    if examples is not None:
        return examples[:batch].clone()
    return torch.randint(0, 256, (batch, SIZE, SIZE, 3), dtype=torch.uint8)


if __name__ == "__main__":
    main()
