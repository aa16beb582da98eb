"""SSD300 in TensorRT without leaving Python: pip install torch-tensorrt, and a CUDA device.

python examples/tensorrt_detector.py photo.jpg --weights coco
"""

import argparse
from dataclasses import replace

import torch
import torch_tensorrt

from ssd import Detector, load_model
from ssd.backends import of_model
from ssd.fused import fuse
from ssd.transforms import normalize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("photo")
    parser.add_argument("--weights", default="coco")
    options = parser.parse_args()

    model, checkpoint = load_model(options.weights)
    model = model.eval().cuda()
    fast = fuse(model, torch.float16)
    size = model.layout.size
    example = torch.zeros(8, 3, size, size, dtype=torch.float16, device="cuda")
    program = torch.export.export(fast, (example,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    images = torch_tensorrt.Input(
        min_shape=(1, 3, size, size),
        opt_shape=(8, 3, size, size),
        max_shape=(64, 3, size, size),
        dtype=torch.half,
    )
    # The types of the graph are kept: convolutions in fp16, as they were prepared.
    engine = torch_tensorrt.dynamo.compile(program, inputs=[images], use_explicit_typing=True)

    def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(engine(normalize(pixels, torch.float16).contiguous()))

    # An engine does not travel to other processes, so there is nothing to rebuild the backend from.
    backend = replace(of_model(model, "fp16"), name="Torch-TensorRT", forward=forward, rebuild=None)
    print(Detector(backend, checkpoint.class_names, checkpoint.category_ids)(options.photo))


if __name__ == "__main__":
    main()
