import warnings

import numpy as np
import pytest
import skimage.data
import torch
from pictures import encoded, loaded
from PIL import Image, ImageOps

from ssd import rgb
from ssd.errors import ImageError
from ssd.images import load_image


def test_half_precision_tensors(pixels):
    source = (torch.from_numpy(pixels).permute(2, 0, 1) / 255).half()
    np.testing.assert_allclose(loaded(source).astype(int), pixels, atol=1)


def test_grey_is_three_equal_channels_in_the_right_orientation(pixels):
    grey = pixels[:, :, 0]
    expected = np.stack([grey] * 3, axis=-1)
    for source in (
        grey,
        grey[..., None],
        Image.fromarray(grey),
        encoded(Image.fromarray(grey)),
        torch.from_numpy(grey),
        torch.from_numpy(grey)[None],
    ):
        np.testing.assert_array_equal(loaded(source), expected)


def test_sixteen_bits_are_scaled_and_not_clipped():
    wide = np.array([[0, 257, 32768, 65535]], np.uint16)
    expected = [0, 1, 128, 255]
    png = encoded(Image.fromarray(wide))
    big_endian = Image.frombytes("I;16B", (4, 1), wide.astype(">u2").tobytes())
    for source in (wide, png, Image.fromarray(wide), Image.fromarray(wide.astype(np.int32)), big_endian):
        assert loaded(source)[0, :, 0].tolist() == expected
        assert loaded(source).shape == (1, 4, 3)


def test_transparency_is_laid_over_white():
    rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], np.uint8)
    expected = [[200, 100, 0], [255, 255, 255], [244, 224, 204]]
    for source in (rgba, encoded(Image.fromarray(rgba)), torch.from_numpy(rgba).permute(2, 0, 1), rgba / 255):
        np.testing.assert_allclose(loaded(source)[0], expected, atol=1)
    la = Image.fromarray(np.array([[[100, 255], [100, 0]]], np.uint8))
    assert la.mode == "LA"
    for source in (la, encoded(la)):
        assert loaded(source)[0].tolist() == [[100] * 3, [255] * 3]


def test_palettes():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putpixel((1, 0), 1)
    assert loaded(encoded(image))[0].tolist() == [[10, 20, 30], [200, 100, 0]]
    assert loaded(encoded(image, transparency=1))[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_transparent_colour_of_an_rgb_png():
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert loaded(encoded(image, transparency=(4, 5, 6)))[0].tolist() == [[1, 2, 3], [255, 255, 255]]


def test_cmyk_and_one_bit():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(loaded(encoded(red, "JPEG"))[4, 4].astype(int) - [255, 0, 0]).max() < 8
    assert loaded(encoded(Image.new("1", (2, 2), 1))).min() == 255


def test_one_pixel_is_an_image():
    assert loaded(np.zeros((1, 1, 3), np.uint8)).shape == (1, 1, 3)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 3, 4, 3), np.uint8), "one image at a time"),
        (np.zeros((4, 4, 2), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.full((2, 2, 3), 255.0), r"\[0, 1\]"),
        (np.full((2, 2, 3), np.nan), r"\[0, 1\]"),
        (np.full((2, 2, 3), -0.1), r"\[0, 1\]"),
        (np.full((2, 2, 3), -1), "int64 lie in 0 to 255; these reach from -1 to -1"),
        (np.full((2, 2, 3), 256), "uint16"),
        (np.full((2, 2, 3), 1 << 40), "scale them"),
        (np.zeros((2, 2, 3), complex), "complex"),
        (torch.zeros(2, 2, 3), r"\[C, H, W\]"),
        (torch.zeros(1, 3, 2, 2), "one image at a time"),
        (torch.zeros(3, 2, 2, device="meta"), "uint8 or floats"),
        (torch.zeros(3, 2, 2).to_sparse(), "uint8 or floats"),
        (np.zeros((2, 2, 3), object), "object"),
    ],
)
def test_refused_arrays(array, reason):
    with pytest.raises(ImageError, match=reason):
        load_image(array)


BLACK_TO_WHITE = np.linspace(0, 1, 48, dtype=np.float32).reshape(4, 4, 3)


@pytest.mark.parametrize(
    ("array", "advice"),
    [
        (BLACK_TO_WHITE * 255, "divide by 255"),
        (BLACK_TO_WHITE * 270 - 8, "divide by 255"),  # resampled
        (BLACK_TO_WHITE * 65535, "65535 of 16 bits"),
        (BLACK_TO_WHITE * 4095, "4095 of 12"),
        (BLACK_TO_WHITE * 2 - 1, r"\(x \+ 1\) / 2"),
        ((BLACK_TO_WHITE - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225], r"x \* std \+ mean"),
        (BLACK_TO_WHITE * 255 - [104, 117, 123], "a mean was subtracted"),
        (BLACK_TO_WHITE * 3, "0 is black and 1 is white"),
        (BLACK_TO_WHITE - 1e6, "then scale them, so that 0 is black and 1 is white"),
        (np.where(BLACK_TO_WHITE > 0.9, np.inf, 0), "NaN or infinity"),
        (BLACK_TO_WHITE.astype(float) * 1e300, "NaN or infinity"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_floats_of_another_range_get_advice_that_fits(array, advice):
    with pytest.raises(ImageError, match=advice):
        load_image(array)


@pytest.mark.parametrize(
    ("advice", "mended"),
    [
        ("(x + 1) / 2", lambda x: (x * 2 - 1 + 1) / 2),
        ("divide by 255", lambda x: x * 255 / 255),
    ],
)
def test_the_advice_works(advice, mended):
    np.testing.assert_array_equal(loaded(mended(BLACK_TO_WHITE)), loaded(BLACK_TO_WHITE))


def test_floats_that_overshoot_a_little_are_clipped(pixels):
    floats = pixels / 255
    rounding = floats + np.where(floats > 0.5, 1e-6, -1e-6)
    np.testing.assert_array_equal(loaded(rounding), pixels)
    scene = torch.from_numpy(skimage.data.coffee()).permute(2, 0, 1)[None] / 255
    small = torch.nn.functional.interpolate(scene, (300, 300), mode="bicubic", antialias=True)[0]
    assert small.min() < 0
    expected = (small.clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(loaded(small), expected)
    floats[0, 0, 0] = 1.3  # far too much, if only once
    with pytest.raises(ImageError, match=r"to 1\.3"):
        load_image(floats)


@pytest.mark.parametrize(
    ("source", "advice"),
    [
        (np.zeros((3, 8, 9), np.uint8), r"array\.transpose\(1, 2, 0\)"),
        (np.zeros((1, 8, 9), np.uint8), r"array\.transpose\(1, 2, 0\)"),
        (np.zeros((1, 8, 9, 3), np.uint8), r"array\[0\]"),
        (np.zeros((2, 8, 9, 3), np.uint8), r"list\(array\)"),
        (torch.zeros(8, 9, 3), r"tensor\.permute\(2, 0, 1\)"),
        (torch.zeros(1, 3, 8, 9), r"array\[0\]"),
        (np.array([[[1, 2, 3]]], object), "numpy.uint8"),
        (np.array([["a"]]), "got <U1"),
    ],
)
def test_arrays_of_another_layout_get_advice(source, advice):
    with pytest.raises(ImageError, match=advice):
        load_image(source)


def test_transparent_everywhere_is_told(tmp_path):
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    image.save(tmp_path / "layer.png")
    with pytest.warns(UserWarning, match=r"layer\.png: is transparent everywhere"):
        assert loaded(tmp_path / "layer.png").min() == 255
    with pytest.warns(UserWarning, match="ndarray: is transparent everywhere"):
        load_image(np.zeros((2, 2, 4), np.uint8))
    image.putpixel((1, 1), (10, 20, 30, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(image)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I", "F", "L with a clear grey"]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_converted_band_by_band_as_it_is_at_once(pixels, monkeypatch, mode, orientation):
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray(
            (pixels[..., 0].astype(float) * (1 / 255 if mode == "F" else 257)).astype(kind)
        )
        plain = Image.fromarray(pixels[..., 0]).convert("RGB")
    else:
        image = Image.fromarray(np.dstack([pixels, pixels[..., 0]]))
        image = image.convert("RGB").quantize(9) if mode == "P" else image.convert(mode.split()[0])
        if " " in mode:
            image.info["transparency"] = int(np.asarray(image)[2, 3])
        plain = Image.new("RGBA", image.size, "white")
        plain = Image.alpha_composite(plain, image.convert("RGBA")).convert("RGB")
    image.getexif()[0x0112] = plain.getexif()[0x0112] = orientation
    monkeypatch.setattr(rgb, "_BAND", 20)  # of 9 x 6
    np.testing.assert_allclose(loaded(image).astype(int), np.asarray(ImageOps.exif_transpose(plain)), atol=1)


def test_arrays_are_judged_as_a_whole_and_converted_in_bands(pixels, monkeypatch):
    monkeypatch.setattr(rgb, "_BAND", 20)
    for source in (pixels, pixels / 255, pixels.astype(np.uint16) * 257, pixels.astype(np.int64)):
        np.testing.assert_array_equal(loaded(source), pixels)
    floats = pixels / 255
    floats[-1, -1, -1] = 7
    with pytest.raises(ImageError, match=r"reach from .* to 7;"):
        load_image(floats)
    alpha = np.zeros((6, 9, 4), np.uint8)
    with pytest.warns(UserWarning, match="transparent everywhere"):
        load_image(alpha)
    alpha[-1, -1] = 255
    assert loaded(alpha)[0, 0].tolist() == [255] * 3


def test_a_name_in_a_warning_is_one_line():
    with pytest.warns(UserWarning, match=r"^a\\nb\\x1b\[2J: is transparent"):
        load_image(np.zeros((2, 2, 4), np.uint8), name="a\nb\x1b[2J")


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (np.full((4, 4, 3), 200, np.uint16), "reach only to 200, .* if 255 is white"),
        (np.full((4, 4), 4000, np.uint16), "reach only to 4000, .* if 4095 is white"),
        (np.eye(4, dtype=np.uint8), "reach only to 1, .* array.astype"),
    ],
)
def test_values_that_would_be_seen_as_black_are_told(values, what):
    with pytest.warns(UserWarning, match=what):
        load_image(values)
