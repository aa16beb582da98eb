import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from ssd import transforms
from ssd.transforms import describe_transform, evaluation_transform, normalize, resize


@pytest.mark.parametrize("size", [(640, 480), (300, 300), (120, 200), (1, 1), (37, 900), (1600, 1200)])
def test_equals_the_published_transform_up_to_a_rounding(size):
    """Published: torchvision's Resize on PIL images, ToTensor, Normalize."""
    random = np.random.RandomState(0)
    image = Image.fromarray(random.randint(0, 256, (size[1], size[0], 3), np.uint8))
    published = v2.Compose(
        [
            v2.Resize((300, 300)),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    levels = (evaluation_transform(image, 300) - published(image)) * 255 * std
    assert levels.abs().max() < 1.01
    # Noise that is hardly reduced gives the most roundings: a third; photographs give one in hundreds.
    assert (levels.abs() > 0.01).float().mean() < 0.35


def test_normalize_by_hand():
    pixels = torch.zeros(2, 300, 300, 3, dtype=torch.uint8)
    pixels[..., 0], pixels[..., 1] = 255, 51
    result = normalize(pixels)
    assert result.shape == (2, 3, 300, 300)
    expected = [(1 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, -0.406 / 0.225]
    np.testing.assert_allclose(result[1, :, 7, 9], expected, atol=1e-6)
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_normalize_rounds_only_the_result(dtype):
    pixels = resize(Image.effect_mandelbrot((300, 300), (-2, -1.5, 1, 1.5), 50).convert("RGB"), 300)
    assert torch.equal(normalize(pixels, dtype), normalize(pixels).to(dtype))


def test_on_cuda_without_mixing_devices(fake_cuda):
    pixels = torch.zeros(1, 300, 300, 3, dtype=torch.uint8).to("cuda")
    assert normalize(pixels, torch.float16).device.type == "cuda"


@pytest.mark.parametrize("size", [1, 96, 512])
def test_the_size_is_the_callers(size):
    image = Image.effect_mandelbrot((120, 90), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    assert resize(image, size).shape == (size, size, 3)
    assert evaluation_transform(image, size).shape == (3, size, size)
    assert f"resized to {size}x{size}" in describe_transform(size)


@pytest.mark.parametrize("size", [(300, 300), (1600, 90), (70, 2000), (1200, 900), (6000, 3)])
def test_large_images_are_resized_in_parts_with_the_same_result(size, monkeypatch):
    random = np.random.RandomState(0)
    image = Image.fromarray(random.randint(0, 256, (size[1], size[0], 3), np.uint8))
    results = []
    for band in (5_000, 10**9):
        monkeypatch.setattr(transforms, "_BAND", band)
        results.append(resize(image, 300).int())
    assert (results[0] - results[1]).abs().max() <= 1
    assert (results[0] != results[1]).float().mean() < 1e-3


@pytest.mark.parametrize("size", [(640, 360), (1920, 1080), (37, 900)])
def test_pixels_are_resized_to_the_same_values_as_their_image(size):
    """Also those of a tile, which are not together in memory; and of large images, which go in parts."""
    random = np.random.RandomState(0)
    pixels = random.randint(0, 256, (size[1], size[0], 3), np.uint8)
    whole, part = (0, 0, *size), (5, 7, 30, 300)
    for left, top, right, bottom in (whole, part):
        expected = resize(Image.fromarray(pixels).crop((left, top, right, bottom)), 300)
        assert torch.equal(resize(pixels[top:bottom, left:right], 300), expected)
