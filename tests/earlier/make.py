"""Makes the files beside it with version 0.1.0, which the tests then read with the present one.

git worktree add ../earlier 7e58533
PYTHONPATH=../earlier python tests/earlier/make.py

What there is, README.md says. It takes about two minutes, and replaces the files that are there.
"""

import json
import lzma
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

# The earlier version is imported where it is used: pytest imports this file too, with the present one.

HERE = Path(__file__).parent
NAMES = ("cat", "dog")
CATEGORY_IDS = (7, 9)
CELLS = (4 * 38**2, 6 * 19**2, 6 * 10**2, 6 * 5**2, 4 * 3**2, 4)
"""Default boxes of each level."""
PATTERN = np.repeat([-2, -1, 0, 1, 2], [6, 14, 21, 14, 6])
"""Its length is a prime number, so that each of 61 rows of a convolution begins elsewhere in it."""
SCORE_THRESHOLD = 0.74
"""Of the detections in expected.json."""
SCENES = (2, 9)
"""Seeds of two scenes with detections that no rounding adds or takes away: see `require_clear`."""


def simple(key: str, shape: torch.Size, seed: int = 0) -> Tensor:
    """Small whole numbers that repeat, of mean 0; compressed they take a few bytes."""
    mixed = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32).permutation(PATTERN)
    return torch.from_numpy(np.resize(mixed, tuple(shape)).astype(np.float32))


def fill(value: Tensor, key: str, factor: float, seed: int = 0) -> None:
    """Set a tensor to simple values, which repeat as it lies in memory."""
    in_memory = value
    if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
        in_memory = value.permute(0, 2, 3, 1)
    in_memory.copy_(simple(key, in_memory.shape, seed) * factor)


def pixels() -> np.ndarray:
    """The input of expected.json, uint8 ``[300, 300, 3]``."""
    y, x, channel = np.mgrid[0:300, 0:300, 0:3]
    return ((x * (3 + channel) + y * (5 - channel) + x * y // 64 + 40 * channel) % 256).astype(np.uint8)


def places() -> list[int]:
    """Four default boxes of each level, evenly over it."""
    starts = np.cumsum((0, *CELLS))
    return [int(starts[level] + (count - 1) * k // 3) for level, count in enumerate(CELLS) for k in range(4)]


@torch.no_grad()
def network(
    *,
    head_norm: bool,
    background: float,
    seed: int = 0,
    layout: torch.memory_format = torch.contiguous_format,
) -> Any:
    """A ResNet-18 of simple weights whose outputs spread as those of a trained one."""
    from ssd.model import SSD300
    from ssd.transforms import normalize

    model = SSD300(len(NAMES) + 1, "resnet18", head_norm).eval().requires_grad_(False)
    model.to(memory_format=layout)
    for key, value in model.state_dict().items():
        if value.dim() == 4:
            fill(value, key, power_of_two(math.prod(value.shape[1:]) ** -0.5) / 2, seed)
        elif key.startswith(("loc.", "conf.")):
            fill(value, key, 1 / 8, seed)

    def settle(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        variance = power_of_two(float(inputs[0].var()))
        norm.running_var.fill_(variance)
        norm.running_mean.fill_(variance**0.5 / 4)
        norm.num_batches_tracked.fill_(100)
        norm.weight.fill_(1.25)
        norm.bias.fill_(0.125)

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(settle) for norm in norms]
    model(normalize(torch.from_numpy(pixels())[None]))
    for hook in hooks:
        hook.remove()
    for conv, norm in zip(model.conf, model.conf_norm, strict=True):
        bias = norm.bias if head_norm else conv.bias
        bias[: len(bias) // (len(NAMES) + 1)] += background
    return model


def power_of_two(value: float) -> float:
    return 2.0 ** round(math.log2(value))


def pack(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_name(f"{target.name}.xz").write_bytes(lzma.compress(file.read_bytes(), preset=9))


# --- Checkpoints and exported files -----------------------------------------------------------------------


def make_weights(work: Path) -> dict[str, Any]:
    """Both checkpoints and the exported files; returns what is expected of each."""
    from ssd import checkpoint
    from ssd.export import export

    normed, plain = work / "normed.safetensors", work / "plain.pt"
    notes = {"category_ids": CATEGORY_IDS, "config": {"epochs": 1}}
    checkpoint.save(normed, network(head_norm=True, background=5).state_dict(), NAMES, **notes)
    checkpoint.save(plain, network(head_norm=False, background=3).state_dict(), NAMES)
    export(normed, work / "raw.onnx")
    export(normed, work / "nms.onnx", nms=True, uint8=True)
    export(normed, work / "openvino", "openvino")
    export(normed, work / "raw.pt2", "pt2")
    export(normed, work / "raw.torchscript", "torchscript")
    for path in (normed, plain):
        pack(path, HERE / "checkpoints" / path.name)
    exported = ("raw.onnx", "nms.onnx", "openvino", "raw.pt2", "raw.torchscript")
    for name in (*exported[:2], "openvino/model.xml", "openvino/model.bin", *exported[3:]):
        pack(work / name, HERE / "exports" / name)
    expected = {f"checkpoints/{path.name}": expected_of(path) for path in (normed, plain)}
    return expected | {f"exports/{name}": expected_of(work / name) for name in exported}


def expected_of(path: Path) -> dict[str, Any]:
    from ssd import backends
    from ssd.detector import Detector
    from ssd.model import load_model
    from ssd.transforms import normalize

    image = torch.from_numpy(pixels())[None]
    detector = Detector.load(path, "cpu", "fp32")
    found = detector(pixels(), score_threshold=SCORE_THRESHOLD)
    require_clear(detector, pixels(), SCORE_THRESHOLD)
    facts: dict[str, Any] = {"detections": found.to_dict()["detections"]}
    if detector.backend.nms is not None:
        return facts
    with torch.inference_mode():
        if backends.format_of(path):
            loc, conf = detector.backend.forward(image)
        else:
            loc, conf = load_model(path)[0].eval()(normalize(image))
    return facts | raw(loc, conf)


def raw(loc: Tensor, conf: Tensor) -> dict[str, Any]:
    """The outputs at `places`."""
    values = {"loc": loc, "conf": conf}
    return {name: np.round(each[0, :, places()].tolist(), 6).tolist() for name, each in values.items()}


def require_clear(detector: Any, image: Any, score_threshold: float) -> None:
    """Require the same detections, in the same order, where scores and overlaps are a little different."""
    options = {"score_threshold": score_threshold, "iou_threshold": 0.5, "max_detections": 200}
    found = detector(image, **options)
    assert len(found) > 1
    assert np.diff(found.scores).max() < -2e-5, "two scores are nearly equal"
    if detector.backend.nms is None:
        lower, higher = score_threshold - 2e-4, score_threshold + 2e-4
        for changed in ({"score_threshold": lower}, {"score_threshold": higher}):
            assert len(detector(image, **options | changed)) == len(found), "a score is near the threshold"
        for changed in ({"iou_threshold": 0.4998}, {"iou_threshold": 0.5002}):
            again = detector(image, **options | changed)
            assert again.scores.tolist() == found.scores.tolist(), "an overlap is near the threshold"


# --- A run ------------------------------------------------------------------------------------------------


def make_run(work: Path) -> dict[str, Any]:
    """The folder of a run that was interrupted in its second epoch; returns how it goes on."""
    from ssd.data import DetectionDataset, load
    from ssd.train import TrainConfig, fit

    draw_pets(HERE / "pets")
    os.chdir(HERE)
    folder, between = work / "run", work / "between.pt"
    seen = iter(range(100))

    class Interrupted(DetectionDataset):
        def __getitem__(self, index: int) -> Any:
            if next(seen) == 4:  # the first image of the second epoch
                shutil.copy(folder / "state.pt", between)
                signal.raise_signal(signal.SIGINT)
            return super().__getitem__(index)

    config = TrainConfig(
        epochs=2,
        batch_size=2,
        backbone="resnet18",
        precision="fp32",
        workers=0,
        evaluate_every=1,
        augmentation="none",
        lr=0.008,
        seed=5,
    )
    source = {"data": "pets", "val": "pets/train.json"}
    result = fit(
        Interrupted(load("pets", "train")), load("pets", "train"), config, folder, source=source, say=None
    )
    assert not result.finished
    simplify(folder)
    (folder / "state.pt").rename(work / "middle.pt")
    simplify_state(work / "middle.pt")
    simplify_state(between)
    (HERE / "run").mkdir(exist_ok=True)
    for name in ("config.json", "metrics.csv"):
        shutil.copy(folder / name, HERE / "run" / name)
    for name in ("last.safetensors", "best.safetensors"):
        pack(folder / name, HERE / "run" / name)
    pack(work / "middle.pt", HERE / "run" / "state.pt")
    pack(between, HERE / "run-between-epochs" / "state.pt")
    states = {"run": work / "middle.pt", "run-between-epochs": between}
    return {name: gone_on(folder, state) for name, state in states.items()}


def draw_pets(folder: Path) -> None:
    """Four pictures whose shapes are said to be cats and dogs."""
    from ssd.shapes import draw_scene

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "train").mkdir(parents=True)
    content: dict[str, list[Any]] = {"images": [], "annotations": []}
    content["categories"] = [
        {"id": number, "name": name} for number, name in zip(CATEGORY_IDS, NAMES, strict=True)
    ]
    for number in range(1, 5):
        scene, boxes, labels = draw_scene(np.random.default_rng(number))
        image, boxes = shrink(scene, boxes, 96)
        name = f"{number}.png"
        image.save(folder / "train" / name)
        add(content, number, name, image, boxes, [CATEGORY_IDS[label % 2] for label in labels])
    (folder / "train.json").write_text(json.dumps(content))


def shrink(scene: Image.Image, boxes: np.ndarray, width: int) -> tuple[Image.Image, np.ndarray]:
    """A picture of a few kilobytes, and the boxes in it."""
    size = width, round(width * scene.height / scene.width)
    small = scene.resize(size, Image.Resampling.BOX).quantize(24, dither=Image.Dither.NONE)
    return small, boxes * np.tile(np.divide(size, scene.size), 2)


def add(
    content: dict[str, list[Any]],
    number: int,
    name: str,
    image: Image.Image,
    boxes: np.ndarray,
    category_ids: list[int],
) -> None:
    """Add an image to a COCO file."""
    content["images"].append({"id": number, "file_name": name, "width": image.width, "height": image.height})
    for (left, top, right, bottom), category_id in zip(boxes.round(1).tolist(), category_ids, strict=True):
        content["annotations"].append(
            {
                "id": len(content["annotations"]) + 1,
                "image_id": number,
                "category_id": category_id,
                "bbox": [left, top, round(right - left, 1), round(bottom - top, 1)],
                "area": round((right - left) * (bottom - top), 1),
                "iscrowd": 0,
            }
        )


def simplify(folder: Path) -> None:
    """Give the weights of a run simple values, and write them as the run did."""
    from ssd import checkpoint

    for name in ("last", "best"):
        found = checkpoint.read(folder / f"{name}.safetensors")
        weights = network(head_norm=True, background=5).state_dict()
        require_same_shapes(weights, found.state_dict)
        checkpoint.save(
            folder / f"{name}.safetensors",
            weights,
            found.class_names,
            category_ids=found.category_ids,
            config=found.config,
        )


def simplify_state(path: Path) -> None:
    """Give the tensors of a state simple values, and leave all else as it is."""
    state = torch.load(path, weights_only=True)
    for seed, name in enumerate(("average", "model"), start=1):
        values = network(head_norm=True, background=1, seed=seed, layout=torch.channels_last).state_dict()
        require_same_shapes(values, state[name])
        for key, value in state[name].items():
            value.copy_(values[key])
    for number, values in state["optimizer"]["state"].items():
        fill(values["momentum_buffer"], f"momentum {number}", 2**-2)
    torch.save(state, path)


def require_same_shapes(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    shapes = [{key: (value.shape, value.dtype) for key, value in each.items()} for each in (a, b)]
    assert shapes[0] == shapes[1]


def gone_on(folder: Path, state: Path) -> dict[str, Any]:
    """What the run becomes from a state on."""
    from ssd.data import DetectionDataset, load
    from ssd.model import load_model
    from ssd.train import TrainConfig, fit
    from ssd.transforms import normalize

    shutil.copy(state, folder / "state.pt")
    values = json.loads((folder / "config.json").read_text())["config"]
    config = TrainConfig(**values | {"milestones": tuple(values["milestones"])})
    result = fit(DetectionDataset(load("pets", "train")), None, config, folder, resume=True, say=None)
    assert result.finished
    with torch.inference_mode():
        outputs = load_model(folder / "last.safetensors")[0].eval()(
            normalize(torch.from_numpy(pixels())[None])
        )
    last = (folder / "metrics.csv").read_text().splitlines()[-1].split(",")
    return {"loss": float(last[2])} | raw(*outputs)


# --- Results ----------------------------------------------------------------------------------------------


def make_results() -> None:
    """What `ssd detect` and `ssd evaluate` write of two scenes."""
    from ssd.detector import Detector
    from ssd.shapes import CLASSES, draw_scene

    folder = HERE / "scenes"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "val").mkdir(parents=True)
    content: dict[str, list[Any]] = {"images": [], "annotations": []}
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    detector = Detector.load("shapes", "cpu", "fp32")
    for number, seed in zip((12, 345), SCENES, strict=True):
        scene, boxes, labels = draw_scene(np.random.default_rng(seed))
        image, boxes = shrink(scene, boxes, 160)
        name = f"{number:06}.png"
        image.save(folder / "val" / name)
        add(content, number, name, image, boxes, labels.tolist())
        require_clear(detector, folder / "val" / name, 0.4)
        require_clear(detector, folder / "val" / name, 0.05)
    (folder / "val.json").write_text(json.dumps(content))
    for name in ("results", "evaluation"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    common = ["--weights", "shapes", "--device", "cpu", "--precision", "fp32"]
    for form in ("json", "csv", "coco", "yolo"):
        ssd("detect", "scenes/val", *common, "--no-images", "--format", form, "--output", f"results/{form}")
    ssd("evaluate", "scenes", *common, "--output", "evaluation")


def ssd(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "ssd", *arguments], cwd=HERE, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    import ssd as package

    assert package.__version__ == "0.1.0", f"{package.__file__} is another version"
    make_results()
    with tempfile.TemporaryDirectory() as name:
        expected = {
            "torch": torch.__version__,
            "places": places(),
            "files": make_weights(Path(name)),
            "runs": make_run(Path(name)),
        }
    (HERE / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main()
