import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image, ImageFilter
from torchvision.ops import box_iou
from torchvision.transforms import v2

from ssd.augment import STEPS, Sample, augment, color_jitter, iou_crop, render, take_tile, zoom_out
from ssd.images import load_image
from ssd.transforms import MEAN, resize


def marked_sample(boxes, size=(640, 480)):
    """A black image whose boxes are filled with their own grey, so that pixels tell where a box went."""
    image = Image.new("RGB", size)
    for k, box in enumerate(boxes, start=1):
        image.paste((40 + 50 * k,) * 3, tuple(int(v) for v in box))
    return image, np.array(boxes, np.float32).reshape(-1, 4), np.arange(1, len(boxes) + 1)


DISJOINT = [(20, 30, 200, 220), (300, 40, 420, 200), (100, 260, 260, 460), (400, 280, 620, 470)]


@pytest.mark.parametrize("recipe", list(STEPS))
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 4))
def test_boxes_stay_in_range_and_labels_with_their_boxes(recipe, seed, count):
    image, boxes, labels = marked_sample(DISJOINT[:count])
    before = boxes.copy()
    pixels, found, kept = augment(image, boxes, labels, recipe, np.random.default_rng(seed), 300)
    assert pixels.shape == (300, 300, 3)
    assert pixels.dtype == torch.uint8
    assert found.dtype == np.float32
    assert len(found) == len(kept) <= count
    assert (found >= 0).all()
    assert (found <= 1).all()
    assert (found[:, 2:] > found[:, :2]).all()
    assert set(kept.tolist()) <= set(labels.tolist())
    np.testing.assert_array_equal(boxes, before)


GEOMETRY = {"published": 3, "default": 5}  # how many of a recipe's steps come before the colours


@pytest.mark.parametrize("recipe", list(GEOMETRY))
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_boxes_lie_where_their_pixels_went(recipe, seed):
    image, boxes, labels = marked_sample(DISJOINT)
    rng = np.random.default_rng(seed)
    sample = Sample(torch.from_numpy(np.array(image)), boxes, labels, 300, (0, 0, *image.size))
    for step in STEPS[recipe][: GEOMETRY[recipe]]:
        sample = step(sample, rng)
    seen = sample.image[..., 0].numpy().astype(int)
    for (left, top, right, bottom), label in zip(sample.boxes, sample.labels, strict=True):
        if right - left > 8 and bottom - top > 8:
            # Blurred edges pass through other boxes' greys, but in lines of one pixel.
            solid = Image.fromarray(np.abs(seen - (40 + 50 * label)) < 3).convert("L")
            ys, xs = np.asarray(solid.filter(ImageFilter.MinFilter(3))).nonzero()
            edges = np.array([xs.min() - 1, ys.min() - 1, xs.max() + 2, ys.max() + 2])
            np.testing.assert_allclose(edges, [left, top, right, bottom], atol=2.5)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), every=st.booleans())
def test_crops_keep_the_published_ranges(seed, every):
    image, boxes, labels = marked_sample(DISJOINT)
    before = Sample(torch.from_numpy(np.array(image)), boxes, labels, 300, (0, 0, *image.size))
    after = iou_crop(before, np.random.default_rng(seed), every_box=every)
    left, top, right, bottom = after.window
    assert left >= 0
    assert top >= 0
    assert right <= 640
    assert bottom <= 480
    width, height = (right - left) / 640, (bottom - top) / 480
    if after.window != before.window:
        assert 0.29 < width <= 1
        assert 0.29 < height <= 1
        assert 0.49 < width / height < 2.02
        assert len(after.boxes)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    inside = ((centers > (left, top)) & (centers < (right, bottom))).all(1)
    np.testing.assert_array_equal(after.labels, labels[inside] if after.window != before.window else labels)


def test_each_kind_of_crop_happens():
    """Of one large box, whose IoU with the crop shows which minimum was asked for."""
    image, boxes, labels = marked_sample([(60, 60, 580, 420)])
    whole = Sample(torch.from_numpy(np.array(image)), boxes, labels, 300, (0, 0, 640, 480))
    windows = [iou_crop(whole, np.random.default_rng(seed)).window for seed in range(2000)]
    overlaps = np.array([box_iou(torch.tensor([w]).float(), torch.from_numpy(boxes)).item() for w in windows])
    uncropped = np.mean([window == whole.window for window in windows])
    assert 0.1 < uncropped < 0.35  # one mode in seven, more often since strict modes fail and draw again
    assert (overlaps > 0.9).any()
    assert (overlaps < 0.25).any()


def test_zoom_out_only_makes_smaller_and_keeps_all():
    image, boxes, labels = marked_sample(DISJOINT)
    sample = Sample(torch.from_numpy(np.array(image)), boxes, labels, 300, (0, 0, *image.size))
    factors = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        left, top, right, bottom = (zoomed := zoom_out(sample, rng, probability=1.0, most=3.0)).window
        assert left <= 0
        assert top <= 0
        assert right >= 640
        assert bottom >= 480
        factors.append((right - left) / 640)
        assert len(render(zoomed, rng).boxes) == 4
    assert 1 <= min(factors) < 1.1
    assert 2.9 < max(factors) <= 3.01
    shown = render(zoomed, rng)
    border = torch.tensor([round(255 * value) for value in MEAN], dtype=torch.uint8)
    assert (shown.image == border).all(2).any()


@pytest.mark.parametrize(
    "window", [(700, 0, 900, 200), (-300, -300, 0, 0), (639, 479, 1000, 1000), (-400, 0, 1, 480)]
)
def test_a_window_that_shows_nothing_or_next_to_nothing(window):
    """Of an image without boxes any part may be taken, also one of the canvas around it."""
    sample = Sample(
        torch.zeros(480, 640, 3, dtype=torch.uint8),
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.int64),
        300,
        window,
    )
    shown = render(sample, None)
    assert shown.image.shape == (300, 300, 3)
    assert shown.boxes.shape == (0, 4)
    assert (shown.image == torch.tensor([124, 116, 104], dtype=torch.uint8)).float().mean() > 0.9


def test_render_of_the_whole_image_is_the_evaluation_transform(photos):
    image = load_image(photos / "coffee.jpg")
    pixels, _, _ = augment(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), "none", None, 300)
    assert torch.equal(pixels, resize(image, 300))


def test_color_jitter_against_torchvision(photos):
    """One change at a time: brightness, contrast and saturation are torchvision's; hue agrees roughly."""
    image = load_image(photos / "coffee.jpg").resize((300, 300))
    pixels = torch.from_numpy(np.array(image))
    planes = pixels.permute(2, 0, 1)
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)

    class Fixed:
        """Draws what it is told; changes come in the order brightness, contrast, saturation, hue."""

        def __init__(self, value):
            self.value = value

        def permutation(self, count):
            return np.arange(count)

        def uniform(self, low, high):
            return low + (high - low) * self.value

    for name, function in (
        ("brightness", v2.functional.adjust_brightness),
        ("contrast", v2.functional.adjust_contrast),
        ("saturation", v2.functional.adjust_saturation),
    ):
        for value, factor in ((0.0, 0.7), (1.0, 1.3)):
            reach = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0) | {name: 0.3}
            changed = color_jitter(
                Sample(pixels, *nothing, 300, (0, 0, 300, 300)), Fixed(value), **reach
            ).image
            expected = function(planes, factor).permute(1, 2, 0)
            assert (changed.int() - expected.int()).abs().max() <= 2, name
    reach = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.05}
    changed = color_jitter(Sample(pixels, *nothing, 300, (0, 0, 300, 300)), Fixed(1.0), **reach).image
    grey = torch.full((300, 300, 3), 90, dtype=torch.uint8)
    same = color_jitter(Sample(grey, *nothing, 300, (0, 0, 300, 300)), Fixed(1.0), **reach).image
    assert (same.int() - 90).abs().max() <= 1  # grey has no hue
    luma = torch.tensor([0.299, 0.587, 0.114])
    unclipped = ((changed > 0) & (changed < 255)).all(2)
    difference = (changed.float() @ luma - pixels.float() @ luma).abs()
    assert difference[unclipped].max() < 2  # turning keeps the brightness


def test_the_same_generator_gives_the_same_example(photos):
    image = load_image(photos / "chelsea.jpg")
    boxes, labels = np.array([[50, 60, 200, 220]], np.float32), np.array([1])
    for recipe in STEPS:
        first = augment(image, boxes, labels, recipe, np.random.default_rng(5), 300)
        again = augment(image, boxes, labels, recipe, np.random.default_rng(5), 300)
        assert torch.equal(first[0], again[0])
        np.testing.assert_array_equal(first[1], again[1])
    other = augment(image, boxes, labels, "default", np.random.default_rng(6), 300)
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("recipe", list(STEPS))
def test_the_size_is_the_callers(recipe):
    """Boxes are normalised by it, so that a box on the whole image stays one."""
    image, boxes, labels = marked_sample([(0, 0, 640, 480)])
    pixels, found, kept = augment(image, boxes, labels, recipe, np.random.default_rng(1), 96)
    assert pixels.shape == (96, 96, 3)
    assert len(found) == len(kept)
    assert (found <= 1).all()
    if recipe == "none":
        np.testing.assert_array_equal(found, [[0, 0, 1, 1]])


def tiles_of(boxes, size, side, count=300):
    image, boxes, labels = marked_sample(boxes, size)
    sample = Sample(torch.from_numpy(np.array(image)), boxes, labels, 300, (0, 0, *size))
    rng = np.random.default_rng(3)
    return [take_tile(sample, rng, side=side) for _ in range(count)]


def test_tiles_are_parts_of_the_image_and_hold_the_boxes_whose_centre_they_do():
    """Told by the pixels: the columns and rows of the image count up."""
    ramp = np.stack([*np.meshgrid(np.arange(640) // 4, np.arange(480) // 4), np.zeros((480, 640))], -1)
    labels = np.arange(1, 5)
    boxes = np.array(DISJOINT, np.float32)
    sample = Sample(torch.from_numpy(ramp.astype(np.uint8)), boxes, labels, 300, (0, 0, 640, 480))
    rng = np.random.default_rng(3)
    whole, seen = 0, set()
    for _ in range(300):
        tile = take_tile(sample, rng, side=320)
        assert tile.window == (0, 0, *tile.image.shape[1::-1])
        if tile.image.shape == (480, 640, 3):
            whole += 1
            continue
        assert tile.image.shape == (320, 320, 3)
        left, top = 4 * tile.image[0, 0, :2].numpy().astype(int)  # to within 4 pixels
        kept = tile.labels.tolist()
        offset = boxes[[label - 1 for label in kept]] - tile.boxes
        assert len(kept) > 0
        assert (offset == offset[0]).all()
        x, y = offset[0, :2].astype(int)
        assert 0 <= x - left < 4
        assert 0 <= y - top < 4
        assert kept == [
            k
            for k, (a, b, c, d) in enumerate(DISJOINT, start=1)
            if x < (a + c) / 2 < x + 320 and y < (b + d) / 2 < y + 320
        ]
        seen |= set(kept)
    assert whole == pytest.approx(300 / (1 + 2 * 2), abs=25)
    assert seen == {1, 2, 3, 4}


@pytest.mark.parametrize("size", [(900, 200), (200, 900)])
def test_tiles_of_long_images_are_as_low_as_these(size):
    box = (size[0] - 9, size[1] - 9, size[0], size[1])
    shapes = {sample.image.shape[1::-1] for sample in tiles_of([box], size, 300)}
    assert shapes == {size, (min(size[0], 300), min(size[1], 300))}


def test_tiles_of_images_without_boxes_are_anywhere():
    ramp = torch.arange(900).expand(300, 900)[..., None].repeat(1, 1, 3) // 4
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    sample = Sample(ramp.to(torch.uint8), *nothing, 300, (0, 0, 900, 300))
    rng = np.random.default_rng(0)
    starts = {int(take_tile(sample, rng, side=300).image[0, 0, 0]) for _ in range(300)}
    assert len(starts) > 100


def test_small_images_have_no_tiles():
    assert {sample.image.shape for sample in tiles_of(DISJOINT, (640, 480), 640, 20)} == {(480, 640, 3)}


def test_examples_of_tiles_show_small_objects_larger():
    image, boxes, labels = marked_sample([(500, 300, 520, 320)])
    rng = np.random.default_rng(0)
    widths = []
    for _ in range(40):
        pixels, found, _ = augment(image, boxes, labels, "none", rng, 300, 160)
        assert pixels.shape == (300, 300, 3)
        widths += (found[:, 2] - found[:, 0]).tolist()
    assert max(widths) == pytest.approx(20 / 160)
