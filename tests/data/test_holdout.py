from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_data import annotation, coco, plain
from PIL import Image, ImageEnhance, ImageOps

from ssd.data import AnnotationError, DetectionDataset, load
from ssd.data.holdout import hold_out, part_by_names


def scene(seed, size=(160, 120)):
    """A picture of its own: coloured blocks, each of many pixels."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def dataset(folder, pictures, classes=None, background=()):
    """A COCO dataset of named pictures, each with one box but those of the background."""
    names = list(pictures)
    folder.mkdir(parents=True, exist_ok=True)
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    boxes = [
        annotation(id=i, image_id=i, category_id=(classes or {}).get(name, 5))
        for i, name in enumerate(names)
        if name not in background
    ]
    plain(folder, coco(images, boxes), ())
    for name, (image, options) in pictures.items():
        (folder / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / "train" / name, **options)
    return load(folder)


def plain_scenes(count):
    return {f"{i:02}.png": (scene(i), {}) for i in range(count)}


def names(annotations):
    return annotations.file_names.tolist()


def test_a_part_is_held_out_by_the_seed_alone(tmp_path):
    found = dataset(tmp_path, plain_scenes(20))
    train, val = hold_out(found, 0.2, 7)
    assert (len(train), len(val)) == (16, 4)
    assert sorted(names(train) + names(val)) == names(found)
    assert names(val) == sorted(names(val))
    assert names(hold_out(found, 0.2, 7)[1]) == names(val)
    assert {tuple(names(hold_out(found, 0.2, seed)[1])) for seed in range(4)} != {tuple(names(val))}
    assert len(DetectionDataset(train)) == 16
    assert [names(part) for part in part_by_names(found, names(val))] == [names(train), names(val)]


def test_copies_stay_together_whatever_was_done_to_them(tmp_path):
    """Of each of ten scenes: saved as JPEG twice, made smaller, and a little brighter."""
    pictures = {}
    for i in range(10):
        whole = scene(i)
        brighter = Image.fromarray(np.clip(np.asarray(whole).astype(int) + 8, 0, 255).astype(np.uint8))
        pictures |= {
            f"{i}-a.png": (whole, {}),
            f"{i}-b.jpg": (whole, {"quality": 60}),
            f"{i}-c.jpg": (whole.resize((80, 60), Image.Resampling.BOX), {"quality": 90}),
            f"{i}-d.png": (brighter, {}),
        }
    found = dataset(tmp_path, pictures)
    for seed in range(5):
        train, val = hold_out(found, 0.3, seed)
        assert len(val) == 12
        assert not {name[0] for name in names(train)} & {name[0] for name in names(val)}


def test_mirrored_copies_and_those_of_another_brightness_or_contrast_stay_together(tmp_path):
    pictures = {}
    for i in range(10):
        whole = Image.fromarray(np.asarray(scene(i)) // 2 + 40)  # room for more, and for less
        pictures |= {
            f"{i}-a.png": (whole, {}),
            f"{i}-b.jpg": (ImageOps.mirror(whole), {"quality": 80}),
            f"{i}-c.jpg": (ImageEnhance.Brightness(whole).enhance(1.35), {"quality": 80}),
            f"{i}-d.jpg": (ImageEnhance.Contrast(whole).enhance(0.6), {"quality": 80}),
            f"{i}-e.png": (ImageEnhance.Brightness(ImageOps.mirror(whole)).enhance(0.7), {}),
        }
    found = dataset(tmp_path, pictures)
    for seed in range(5):
        train, val = hold_out(found, 0.3, seed)
        assert len(val) == 15
        assert not {name[0] for name in names(train)} & {name[0] for name in names(val)}


def test_plain_pictures_of_another_brightness_are_no_copies(tmp_path):
    """There is nothing else that tells them apart."""
    grey = {f"{i}.png": (Image.new("RGB", (100, 80), (25 * i, 25 * i, 25 * i)), {}) for i in range(10)}
    assert len(hold_out(dataset(tmp_path, grey), 0.3, 0)[1]) == 3


def test_pictures_that_differ_in_colour_or_in_one_object_are_no_copies(tmp_path):
    """Flat ones all have the same hash."""
    flat = {f"{i}.png": (Image.new("RGB", (100, 80), (20 * i, 90, 200 - 20 * i)), {}) for i in range(10)}
    assert len(hold_out(dataset(tmp_path / "flat", flat), 0.3, 0)[1]) == 3
    moving = {}
    for i in range(10):
        image = Image.new("RGB", (160, 120), (120, 120, 120))
        image.paste((255, 255, 255), (15 * i, 30, 15 * i + 15, 60))
        moving[f"{i}.png"] = image, {}
    assert len(hold_out(dataset(tmp_path / "moving", moving), 0.3, 0)[1]) == 3


def test_variants_that_roboflow_made_of_one_image_stay_together(tmp_path):
    pictures = {
        f"{folder}/photo{i}_jpg.rf.{k:032x}.jpg": (scene(10 * i + k), {})
        for i in range(6)
        for k, folder in enumerate(("a", "b", "a"))
    }
    found = dataset(tmp_path, pictures)
    train, val = hold_out(found, 0.34, 1)
    assert (len(train), len(val)) == (12, 6)
    sources = [{name.split("/")[1].split(".rf.")[0] for name in names(part)} for part in (train, val)]
    assert not sources[0] & sources[1]


def test_every_class_keeps_boxes_and_background_is_parted_alike(tmp_path):
    pictures = plain_scenes(30)
    rare = "03.png"
    background = [name for name in pictures if int(name[:2]) >= 20]
    found = dataset(tmp_path, pictures, classes={rare: 2}, background=background)
    for seed in range(6):
        train, val = hold_out(found, 0.5, seed)
        assert rare in names(train)
        assert (len(val), len(set(names(val)) & set(background))) == (15, 5)


def test_some_of_few_images_are_held_out_too(tmp_path):
    found = dataset(tmp_path, plain_scenes(3), background=["02.png"])
    train, val = hold_out(found, 0.1, 0)
    assert (len(train), len(val), len(val.boxes)) == (2, 1, 1)


def test_what_cannot_be_parted_is_told(tmp_path):
    copies = {f"{i}.png": (scene(1), {}) for i in range(8)}
    with pytest.raises(
        AnnotationError, match="out of 8: they make 1 groups .* the largest of 8 images.*val split"
    ):
        hold_out(dataset(tmp_path / "a", copies), 0.2, 0)
    with pytest.raises(AnnotationError, match="out of 1: they make 1 groups"):
        hold_out(dataset(tmp_path / "b", plain_scenes(1)), 0.2, 0)


def test_one_labelled_group_among_others_is_told_as_such(tmp_path):
    found = dataset(tmp_path, plain_scenes(10), background=[f"{i:02}.png" for i in range(1, 10)])
    with pytest.raises(AnnotationError, match=r"10: they make 10 groups .*, 1 of them with boxes to measure"):
        hold_out(found, 0.2, 0)


def crowded(found, crowd):
    """The dataset, with the boxes of some images a crowd's."""
    return replace(found, crowd=np.array(crowd))


def test_what_evaluation_does_not_count_is_not_all_that_is_held_out(tmp_path):
    """Two images have a box that is no crowd's, of which one is left to train on unless crowds are, too."""
    found = crowded(dataset(tmp_path, plain_scenes(10)), [i not in (5, 6) for i in range(10)])
    for crowd in (False, True):
        for seed in range(6):
            train, val = hold_out(found, 0.2, seed, crowd=crowd)
            measured = {"05.png", "06.png"} & set(names(val))
            assert len(measured) in ((1, 2) if crowd else (1,))
            assert sorted(names(train) + names(val)) == names(found)


def test_crowds_alone_cannot_be_measured(tmp_path):
    found = crowded(dataset(tmp_path, plain_scenes(10)), [True] * 10)
    for crowd in (False, True):
        with pytest.raises(
            AnnotationError, match=r"train\.json: no images can be held out .* no box that counts"
        ):
            hold_out(found, 0.2, 0, crowd=crowd)


@pytest.mark.parametrize("fraction", [0, 1, -0.2, 1.5, 20, float("nan")])
def test_other_fractions_are_refused(tmp_path, fraction):
    with pytest.raises(ValueError, match=r"above 0 and below 1; got"):
        hold_out(dataset(tmp_path, plain_scenes(2)), fraction, 0)


def test_an_image_that_cannot_be_read_is_for_training_to_tell(tmp_path):
    found = dataset(tmp_path, plain_scenes(10))
    (tmp_path / "train" / "04.png").write_bytes(b"no image")
    (tmp_path / "train" / "05.png").unlink()
    train, val = hold_out(found, 0.2, 0)
    assert len(train) + len(val) == 10


def test_parts_by_names_that_do_not_fit_are_told(tmp_path):
    found = dataset(tmp_path, plain_scenes(3))
    with pytest.raises(AnnotationError, match=r"1 of \d+ held-out images are not among .* as gone\.png"):
        part_by_names(found, ["gone.png", "01.png"])
    for held in ([], names(found)):
        with pytest.raises(AnnotationError, match="of 3 images, which leaves none"):
            part_by_names(found, held)


@given(st.lists(st.integers(0, 5), min_size=4, max_size=24), st.floats(0.05, 0.9), st.integers(0, 99))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_group_is_ever_split(tmp_path_factory, groups, fraction, seed):
    """Of each group exact copies; nothing is lost, and nothing is in both parts."""
    folder = tmp_path_factory.mktemp("data")
    pictures = {f"{i}-{group}.png": (scene(group, (32, 24)), {}) for i, group in enumerate(groups)}
    found = dataset(folder, pictures)
    try:
        parts = hold_out(found, fraction, seed)
    except AnnotationError:
        sizes = [groups.count(group) for group in set(groups)]
        assert min(sizes) > len(groups) / 2 or len(sizes) == 1
        return
    of_group = [{name.split("-")[1] for name in names(part)} for part in parts]
    assert not of_group[0] & of_group[1]
    assert sorted(names(parts[0]) + names(parts[1])) == sorted(names(found))
    assert all(map(len, parts))


def test_a_class_keeps_boxes_where_crowd_boxes_are_trained_on_and_one_image_alone_is_measured(tmp_path):
    """The image that is measured is held out first, and others beside it."""
    found = dataset(tmp_path, plain_scenes(5))
    few = replace(found, class_names=("a", "b"), labels=np.array([1, 1, 2, 2, 2]), crowd=np.arange(5) != 1)
    for seed in range(10):
        train, val = hold_out(few, 0.4, seed, crowd=True)
        assert set(train.labels.tolist()) == {1, 2}
        assert len(val) == 2
        assert not val.crowd.all()
