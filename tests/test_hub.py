import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import OTHER_LAYOUTS, made_weights
from PIL import Image

from ssd import checkpoint
from ssd.errors import ImageError, NonFiniteError
from ssd.hub import Processing, nvidia_ssd, nvidia_ssd_processing_utils
from ssd.model import SSD

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def published_file(checkpoint_keys, tmp_path_factory):
    """A training checkpoint with the keys of the published one (ResNet-50, 81 classes) and made weights."""
    weights = made_weights({key: tuple(shape) for key, shape, _ in checkpoint_keys["resnet50"]})
    path = tmp_path_factory.mktemp("hub") / "nvidia_ssdpyt_amp_200703.pt"
    torch.save({"model": {f"module.{key}": value for key, value in weights.items()}}, path)
    return path


def figure_image(i, height, width):
    """The image that the figures of `prepare_input` were made from."""
    y, x = np.mgrid[:height, :width]
    channels = [127 + 120 * np.sin(x / (7 + i) + 1), 127 + 120 * np.cos(y / (11 + i)), (x + y + 13) % 256]
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


# --- Input ---


@pytest.mark.parametrize("i", range(6))
def test_prepare_input_equals_the_published_one(figures, tmp_path, i):
    path = tmp_path / "image.png"
    Image.fromarray(figure_image(i, *figures[f"prepare{i}/size"])).save(path)
    prepared = Processing.prepare_input(str(path))
    assert prepared.shape == (300, 300, 3)
    np.testing.assert_allclose(prepared[::7, ::7], figures[f"prepare{i}/out_every_7th"], atol=1e-6)


def test_grey_images_are_prepared_upright():
    grey = figure_image(0, 480, 640)[:, :, 0]
    as_rgb = np.stack([grey] * 3, axis=-1)
    np.testing.assert_array_equal(Processing.prepare_input(grey), Processing.prepare_input(as_rgb))


def test_steps_of_prepare_input():
    image = Processing.load_image(np.full((4, 6, 3), 51, np.uint8))
    assert image.shape == (4, 6, 3)
    np.testing.assert_allclose(image, 0.2)
    wide = Processing.rescale(figure_image(0, 100, 150) / 255, 300, 300)
    assert wide.shape == (300, 450, 3)
    assert Processing.rescale(np.zeros((150, 100, 3)), 300, 300).shape == (450, 300, 3)
    np.testing.assert_array_equal(Processing.crop_center(wide, 300, 300), wide[:, 75:375])
    np.testing.assert_allclose(Processing.normalize(np.array([0, 0.5, 1])), [-1, 0, 1])


def test_rescale_of_other_sizes_covers_them():
    assert Processing.rescale(np.zeros((100, 200, 3)), 50, 50).shape == (50, 100, 3)


def test_thin_images_are_refused_before_memory_is_asked_for():
    with pytest.raises(ImageError, match="65500x1 is too thin"):
        Processing.rescale(np.zeros((1, 65500, 3)), 300, 300)


@pytest.mark.parametrize(("fp16", "dtype"), [(False, torch.float32), (True, torch.float16)])
def test_prepare_tensor(fp16, dtype):
    inputs = [np.random.RandomState(i).uniform(-1, 1, (300, 300, 3)) for i in range(2)]
    tensor = Processing.prepare_tensor(inputs, fp16, device="cpu")
    assert tensor.shape == (2, 3, 300, 300)
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    np.testing.assert_allclose(tensor[1, 2, 7, 9], inputs[1][7, 9, 2], atol=1e-3)


def test_prepare_tensor_goes_to_cuda_only_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Processing.prepare_tensor([np.zeros((300, 300, 3))]).device.type == "cpu"


def test_prepare_tensor_on_cuda(fake_cuda):
    assert Processing.prepare_tensor([np.zeros((300, 300, 3))], True).device.type == "cuda"
    assert Processing.prepare_tensor([np.zeros((300, 300, 3))], device="cpu").device.type == "cpu"


def test_prepare_tensor_names_a_shape_that_is_no_batch():
    with pytest.raises(ValueError, match=r"\[300, 300, 3\]"):
        Processing.prepare_tensor(np.zeros((300, 300, 3)))


# --- Output ---


def raw_outputs(background=6, images=2):
    random = np.random.RandomState(3001)
    loc = (0.5 * random.standard_normal((images, 4, 8732))).astype(np.float32)
    conf = random.standard_normal((images, 81, 8732)).astype(np.float32)
    conf[:, 0] += background
    return torch.from_numpy(loc), torch.from_numpy(conf)


def test_decode_results_equals_the_published_one_best_first(figures):
    for image, (boxes, classes, scores) in enumerate(Processing.decode_results(raw_outputs())):
        name = f"decode/typical/0.5/20/{image}"
        np.testing.assert_allclose(scores, figures[f"{name}/scores"][::-1], atol=1e-5)
        np.testing.assert_array_equal(classes, figures[f"{name}/labels"][::-1])
        np.testing.assert_allclose(boxes, figures[f"{name}/boxes"][::-1], atol=1e-6)


def test_decode_results_can_be_repeated_and_takes_outputs_with_gradients():
    outputs = tuple(each.requires_grad_() for each in raw_outputs())
    first, second = (Processing.decode_results(outputs) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_decode_results_of_nothing():
    (boxes, classes, scores), _ = found = Processing.decode_results(raw_outputs(background=60))
    assert (boxes.shape, classes.shape, scores.shape) == ((0, 4), (0,), (0,))
    assert (boxes.dtype, classes.dtype, scores.dtype) == (np.float32, np.int64, np.float32)
    assert [each.shape for each in Processing.pick_best(found[0], 0.4)] == [(0, 4), (0,), (0,)]


def test_decode_results_of_nan_is_an_error():
    loc, conf = raw_outputs()
    with pytest.raises(NonFiniteError):
        Processing.decode_results((loc * float("nan"), conf))


def test_decode_results_on_cuda(fake_cuda):
    outputs = raw_outputs()
    expected = Processing.decode_results(outputs)
    found = Processing.decode_results(tuple(each.to("cuda") for each in outputs))
    for a, b in zip(found, expected, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_pick_best():
    detections = [np.arange(12.0).reshape(3, 4), np.array([7, 8, 9]), np.array([0.5, 0.3, 0.31])]
    boxes, classes, scores = Processing.pick_best(detections)
    assert classes.tolist() == [7, 9]
    assert boxes.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert scores.tolist() == [0.5, 0.31]
    assert Processing.pick_best(detections, 0.4)[1].tolist() == [7]


def test_labels():
    names = Processing.get_coco_object_dictionary()
    assert isinstance(names, list)
    assert (len(names), names[0], names[79]) == (80, "person", "toothbrush")


# --- Entry points ---


def test_nvidia_ssd_loads_a_published_checkpoint_with_plain_heads(published_file, figures):
    model = nvidia_ssd(weights=published_file)
    assert (model.backbone, model.num_classes, model.head_norm) == ("resnet50", 81, False)
    image = torch.from_numpy(np.random.RandomState(1).uniform(-1, 1, (2, 3, 300, 300)).astype(np.float32))
    with torch.no_grad():
        loc, _ = model.eval()(image)
    expected = figures["resnet50/loc"]
    scale = np.abs(expected).mean()
    np.testing.assert_allclose(loc[:, :, figures["resnet50/pick"]] / scale, expected / scale, atol=2e-5)


def test_nvidia_ssd_without_weights_has_head_norms_and_needs_no_network():
    model = nvidia_ssd(pretrained=False)
    assert isinstance(model, SSD)
    assert model.head_norm


@pytest.mark.parametrize("layout", OTHER_LAYOUTS.values(), ids=OTHER_LAYOUTS)
def test_weights_whose_boxes_the_functions_would_place_wrongly_are_refused(layout, tmp_path):
    path = tmp_path / "w.safetensors"
    checkpoint.save(path, SSD(3, "resnet18", layout=layout).state_dict(), ("a", "b"), layout=layout)
    with pytest.raises(checkpoint.CheckpointError, match=r"w\.safetensors is of another layout than the pub"):
        nvidia_ssd(weights=path)


@pytest.mark.parametrize(("math", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_model_math(published_file, math, dtype):
    model = nvidia_ssd(weights=published_file, model_math=math)
    assert model.conf[0].weight.dtype == dtype
    assert model.additional_blocks[0][1].weight.dtype == torch.float32


def test_utils_are_the_published_names():
    utils = nvidia_ssd_processing_utils()
    published = (
        "prepare_input prepare_tensor decode_results pick_best get_coco_object_dictionary "
        "load_image rescale crop_center normalize"
    )
    assert all(callable(getattr(utils, name)) for name in published.split())


HUB_PAGE = """
import torch
precision = '{precision}'
ssd_model = torch.hub.load({repo!r}, 'nvidia_ssd', source='local', model_math=precision{weights})
utils = torch.hub.load({repo!r}, 'nvidia_ssd_processing_utils', source='local')
ssd_model.to({device!r})
ssd_model.eval()
uris = {uris!r}
inputs = [utils.prepare_input(uri) for uri in uris]
tensor = utils.prepare_tensor(inputs, precision == 'fp16')
with torch.no_grad():
    detections_batch = ssd_model(tensor)
results_per_input = utils.decode_results(detections_batch)
best_results_per_input = [utils.pick_best(results, 0.40) for results in results_per_input]
classes_to_labels = utils.get_coco_object_dictionary()
import matplotlib
matplotlib.use('agg')
from matplotlib import pyplot as plt
import matplotlib.patches as patches
for image_idx in range(len(best_results_per_input)):
    fig, ax = plt.subplots(1)
    # Show original, denormalized image...
    image = inputs[image_idx] / 2 + 0.5
    ax.imshow(image)
    # ...with detections
    bboxes, classes, confidences = best_results_per_input[image_idx]
    for idx in range(len(bboxes)):
        left, bot, right, top = bboxes[idx]
        x, y, w, h = [val * 300 for val in [left, bot, right - left, top - bot]]
        rect = patches.Rectangle((x, y), w, h, linewidth=1, edgecolor='r', facecolor='none')
        ax.add_patch(rect)
        label = "{{}} {{:.0f}}%".format(classes_to_labels[classes[idx] - 1], confidences[idx]*100)
        ax.text(x, y, label, bbox=dict(facecolor='white', alpha=0.5))
    plt.show()
print('objects', sum(len(best[0]) for best in best_results_per_input))
"""


def run_in_empty_folder(code, folder, tmp_path):
    """Run code in a new process that knows neither this package's folder nor an installed copy of it."""
    blocker = tmp_path / "sitecustomize.py"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # An editable install is a finder or a path of the project's; the hub has to do without either.
    blocker.write_text(
        "import sys\n"
        f"sys.path[:] = [each for each in sys.path if each != {str(ROOT)!r}]\n"
        "sys.meta_path[:] = [each for each in sys.meta_path if 'editable' not in repr(each).lower()]\n"
    )
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"exec(open({str(blocker)!r}).read())\n{code}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("precision", "device"),
    [("fp32", "cpu"), ("fp16", "cpu"), pytest.param("fp16", "cuda", marks=pytest.mark.cuda)],
)
def test_the_hub_pages_own_code(published_file, photos, tmp_path, precision, device):
    """With local images, and another device, from a folder that stays empty."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    count = 3 if precision == "fp32" or device == "cuda" else 1  # fp16 convolutions are slow on CPUs
    code = HUB_PAGE.format(
        precision=precision,
        repo=str(ROOT),
        weights=f", weights={str(published_file)!r}",
        device=device,
        uris=[str(path) for path in sorted(photos.glob("*.jpg"))][:count],
    )
    result = run_in_empty_folder(code, folder, tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"objects [1-9]", result.stdout)
    assert list(folder.iterdir()) == []


def test_hub_help_lists_both_entrypoints(tmp_path):
    code = f"import torch; print(torch.hub.list({str(ROOT)!r}, source='local'))"
    if "source" not in torch.hub.list.__code__.co_varnames:
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); import hubconf\n"
            "print([name for name in dir(hubconf) if callable(getattr(hubconf, name))])"
        )
    result = run_in_empty_folder(code, tmp_path, tmp_path)
    assert "['nvidia_ssd', 'nvidia_ssd_processing_utils']" in result.stdout, result.stderr


SPAWN = """
import multiprocessing, torch

def count(model):
    return sum(p.numel() for p in model.parameters())

if __name__ == "__main__":
    model = torch.hub.load({repo!r}, "nvidia_ssd", source="local", weights={weights!r}, trust_repo=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(count, [model]) == count(model))
"""


def test_a_hub_model_can_be_handed_to_a_spawned_process(weights_file, tmp_path):
    (tmp_path / "spawn.py").write_text(SPAWN.format(repo=str(ROOT), weights=str(weights_file)))
    code = f"import runpy; runpy.run_path({str(tmp_path / 'spawn.py')!r}, run_name='__main__')"
    result = run_in_empty_folder(code, tmp_path, tmp_path)
    assert result.stdout == "True\n", result.stderr


def test_another_package_of_this_name_is_named(tmp_path):
    (tmp_path / "ssd").mkdir()
    (tmp_path / "ssd" / "__init__.py").write_text("")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import ssd, torch\n"
        f"torch.hub.load({str(ROOT)!r}, 'nvidia_ssd', source='local', pretrained=False)"
    )
    result = run_in_empty_folder(code, tmp_path, tmp_path)
    assert f"another ssd is in the way: {tmp_path}/ssd/__init__.py; load this one" in result.stderr


@pytest.mark.parametrize("way", ["file", "folder", "made"])
def test_anything_else_of_this_name_is_named(tmp_path, way):
    if way == "file":
        (tmp_path / "ssd.py").write_text("x = 1")
    elif way == "folder":  # without __init__.py
        (tmp_path / "ssd").mkdir()
    make = "types.ModuleType('ssd')" if way == "made" else "importlib.import_module('ssd')"
    code = (
        "import importlib, os, sys, types; path = sys.path[:]\n"
        f"sys.path[:] = [{str(tmp_path)!r}, *(each for each in path if not os.path.isdir(each + '/ssd'))]\n"
        "sys.meta_path[:] = [each for each in sys.meta_path if 'editable' not in repr(each)]\n"
        f"sys.modules['ssd'] = {make}\n"
        f"sys.path[:] = [{str(ROOT)!r}, *path]; import hubconf"
    )
    result = run_in_empty_folder(code, tmp_path, tmp_path)
    named = {"file": f"{tmp_path}/ssd.py", "folder": f"{tmp_path}/ssd", "made": "a module that was made"}
    assert f"another ssd is in the way: {named[way]}" in result.stderr
