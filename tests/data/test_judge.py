import json
import os
from dataclasses import replace

import numpy as np
import pytest
from made_data import BOX, annotation, as_voc, as_yolo, coco, picture, plain
from PIL import Image

from ssd.check import check_dataset
from ssd.data import AnnotationError, DetectionDataset, load, require_boxes, usable_for_evaluation
from ssd.data.judge import judge_areas, judge_split, notes_of

NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"bbox": [10, 20, 0, 40]}, "zero area"),
        ({"bbox": [10, 20, 30, 0]}, "zero area"),
        ({"bbox": [10, 20, -5, 40]}, "inverted box"),
        ({"bbox": [100, 20, 30, 40]}, "box outside"),
        ({"bbox": [10, -60, 30, 40]}, "box outside"),
        ({"bbox": [NAN, 20, 30, 40]}, "not a box"),
        ({"bbox": [10, 20, float("inf"), 40]}, "not a box"),
        ({"bbox": [10, 20, 30]}, "not a box"),
        ({"bbox": None}, "not a box"),
        ({"bbox": [10, 20, 10**400, 40]}, "not a box"),
        ({"bbox": [10, 20, 1e-7, 40]}, "zero area"),
        ({"bbox": "10 20 thirty 40"}, "not a box"),
        ({"category_id": 99}, "unknown category id"),
        ({"category_id": None}, "unknown category id"),
        ({"image_id": 12345}, "unknown image id"),
    ],
)
def test_bad_annotations_are_refused_or_left_out(tmp_path, changes, kind):
    plain(tmp_path, coco(annotations=[annotation(id=7), annotation(id=8, **changes)]))
    found = load(tmp_path)
    (problem,) = found.problems
    assert (problem.kind, problem.annotation, problem.fatal) == (kind, "8", True)
    with pytest.raises(AnnotationError, match=rf"{kind}: 1.*--lenient(.|\n)*annotation 8"):
        DetectionDataset(found)
    dataset = DetectionDataset(found, lenient=True)
    assert dataset.annotations.left_out == {kind: 1}
    np.testing.assert_allclose(dataset[0][1]["boxes"], [BOX])


def test_notes_do_not_stop_training(tmp_path):
    boxes = [annotation(id=1), annotation(id=1), annotation(id=3, bbox=[90, 60, 40, 40])]
    found = load(plain(tmp_path, coco(annotations=boxes)))
    assert {problem.kind for problem in found.problems} == {
        "duplicate box",
        "duplicate annotation id",
        "box reaches outside",
    }
    assert not any(problem.fatal for problem in found.problems)
    _, target = DetectionDataset(found)[0]
    np.testing.assert_allclose(target["boxes"], [BOX, BOX, [90, 60, 100, 80]])  # clipped


def test_missing_images_and_doubled_ids(tmp_path):
    images = [
        {"id": 1, "file_name": "a.jpg"},
        {"id": 2, "file_name": "gone.jpg"},
        {"id": 1, "file_name": "b.jpg"},
        {"id": 3, "file_name": "c.jpg"},
    ]
    boxes = [annotation(id=i, image_id=i) for i in (1, 2, 3)]
    plain(tmp_path, coco(images, boxes), ("a.jpg", "b.jpg", "c.jpg"))
    found = load(tmp_path)
    assert {("missing image", "gone.jpg"), ("duplicate image id", "b.jpg")} <= {
        (problem.kind, problem.file) for problem in found.problems
    }
    with pytest.raises(AnnotationError, match=r"gone\.jpg"):
        DetectionDataset(found)
    dataset = DetectionDataset(found, lenient=True)
    assert len(dataset) == 1
    assert len(usable_for_evaluation(found, lenient=True)) == 1


def listed_twice(*boxes):
    """Two entries of a.jpg, with one of the boxes each (none for None), and a second image."""
    images = [{"id": i, "file_name": "a.jpg", "width": 100, "height": 80} for i in (1, 2)]
    images.append({"id": 3, "file_name": "b.jpg", "width": 100, "height": 80})
    entries = [annotation(id=i, image_id=i, bbox=box) for i, box in enumerate(boxes, start=1) if box]
    return coco(images, [*entries, annotation(id=9, image_id=3)])


def test_an_image_that_is_listed_twice_alike_is_told(tmp_path):
    found = load(plain(tmp_path, listed_twice([1, 2, 30, 40], [1, 2, 30, 40]), ("a.jpg", "b.jpg")))
    assert [(each.kind, each.file, each.fatal) for each in found.problems] == [
        ("image listed twice", "a.jpg", False)
    ]
    assert len(DetectionDataset(found)) == 3


@pytest.mark.parametrize("other", [[5, 5, 9, 9], None])
def test_one_entrys_boxes_are_not_background_to_another(tmp_path, other):
    found = load(plain(tmp_path, listed_twice([1, 2, 30, 40], other), ("a.jpg", "b.jpg")))
    for refuse in (DetectionDataset, usable_for_evaluation):
        with pytest.raises(AnnotationError, match=r"a\.jpg: is listed 2 times, with different boxes"):
            refuse(found)
    dataset = DetectionDataset(found, lenient=True)
    assert dataset.annotations.file_names.tolist() == ["b.jpg"]
    assert dataset.annotations.left_out == {"image labelled twice": 1}


def test_images_that_are_none_or_of_another_size_are_left_out_where_that_is_allowed(tmp_path):
    names = [f"{letter}.jpg" for letter in "abcd"]
    images = [{"id": i, "file_name": name, "width": 100, "height": 80} for i, name in enumerate(names)]
    boxes = [annotation(id=i, image_id=i, bbox=[i, 20, 30, 40]) for i in range(4)]
    plain(tmp_path, coco(images, boxes), names[:3])
    (tmp_path / "train" / "b.jpg").write_bytes(b"no image")
    picture(tmp_path / "train" / "c.jpg", (80, 100))
    found = load(tmp_path)
    expected = {"missing image": 1, "unreadable image": 1, "wrong size": 1}
    dataset = DetectionDataset(found, lenient=True)
    assert dataset.annotations.left_out == expected
    assert dataset.annotations.file_names.tolist() == ["a.jpg"]
    np.testing.assert_allclose(dataset[0][1]["boxes"], [[0, 20, 30, 60]])
    usable = usable_for_evaluation(found, lenient=True)
    assert (usable.left_out, usable.file_names.tolist()) == (expected, ["a.jpg"])
    assert usable_for_evaluation(usable).left_out == expected  # what was judged is not refused later
    assert DetectionDataset(usable).annotations.left_out == expected


def test_without_any_image(tmp_path):
    plain(tmp_path, coco(), names=())
    (tmp_path / "train").mkdir()
    with pytest.raises(AnnotationError, match="no images that can be read"):
        DetectionDataset(load(tmp_path), lenient=True)


def test_a_training_set_without_any_box_is_refused(tmp_path):
    as_yolo(tmp_path)
    (tmp_path / "labels/train/a.txt").unlink()
    with pytest.raises(AnnotationError, match=r"no boxes to train on in 1 images; .*labels/train/a\.txt"):
        require_boxes(load(tmp_path))


def judged(annotations, purpose="training"):
    return {(each.kind, each.fatal) for each in judge_split(annotations, purpose)}


def test_crowd_or_difficult_boxes_alone_are_no_training_set_without_the_option(tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2)]
    boxes = [annotation(id=i, image_id=i, iscrowd=1) for i in (1, 2)]
    found = load(plain(tmp_path, coco(images, boxes), ("1.jpg", "2.jpg")))
    with pytest.raises(
        AnnotationError, match=r"train\.json: no boxes .* all 2 are crowd .*--crowd trains on"
    ):
        require_boxes(found)
    require_boxes(found, crowd=True)
    assert judged(found) == {("no boxes to train on", True)}
    assert judged(found, "evaluation") == set()
    assert "no box to find" in notes_of(found, "evaluation")[0]


def test_images_that_become_background_are_counted(tmp_path):
    names = [f"{i}.jpg" for i in range(4)]
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    boxes = [annotation(id=1, image_id=0), annotation(id=2, image_id=1, iscrowd=1)]
    found = load(plain(tmp_path, coco(images, boxes), names))
    found = replace(found, notes=("what the reader saw",))
    first, background, crowd = notes_of(found, "training")
    assert first == "what the reader saw"
    assert background == "3 of 4 images have no boxes to train on and are background"
    assert crowd.startswith("1 of those hold crowd or difficult boxes, which --crowd trains on")
    assert notes_of(found, "training", crowd=True) == [first, background.replace("3", "2")]
    assert notes_of(found, "evaluation") == [first]


def test_a_single_image_and_none_are_no_training_set(tmp_path):
    found = load(plain(tmp_path))
    assert judged(found) == {("too few images", True)}
    assert judged(found, "evaluation") == set()
    assert judged(found.select([])) == judged(found.select([]), "evaluation") == {("no images", True)}


def test_an_area_is_possible_where_an_object_of_it_fits_the_box():
    """Each of a kind on its own, beside many that are half of their boxes."""
    box, half = [0, 0, 20, 50], [[0, 0, 10 * k, 40] for k in range(1, 9)]
    for area, possible in ((1000, True), (1090, True), (60, True), (1200, False), (0, False), (-5, False)):
        boxes = np.array([box, *half], np.float64)
        given = np.array([area, *(200 * k for k in range(1, 9))], np.float64)
        mask, line = judge_areas(given, boxes, np.ones(9, np.bool_))
        assert mask.tolist() == [possible, *[True] * 8], area
        assert bool(line) is not possible
        assert possible or line.startswith(f"1 of 9 areas cannot be right, as {area} in a box of 1000;")


@pytest.mark.parametrize(
    "areas", [[1, 1, 1], [0.02, 0.05, 0.08], [900, 900, 900]], ids=["one", "relative", "the same"]
)
def test_areas_that_a_converter_made_up_are_not_taken(areas):
    boxes = np.array([[0, 0, 40, 40], [10, 0, 90, 60], [0, 0, 100, 100]], np.float64)
    mask, line = judge_areas(np.array(areas, np.float64), boxes, np.ones(3, np.bool_))
    assert not mask.any()
    assert line.startswith("3 of 3 areas cannot be right")


def test_areas_of_thin_masks_and_those_not_given():
    """A diagonal line of a pixel's width has as many pixels as its box is long; NaN is no area."""
    boxes = np.array([[0, 0, 300, 200], [0, 0, 50, 90], [0, 0, 8, 8], [0, 0, 0, 0]], np.float64)
    mask, line = judge_areas(np.array([320, 95, np.nan, 7]), boxes, np.array([True, True, True, False]))
    assert mask.tolist() == [True, True, False, True]
    assert line == ""
    mask, line = judge_areas(np.zeros(0), np.zeros((0, 4)), np.zeros(0, np.bool_))
    assert (mask.tolist(), line) == ([], "")


def test_areas_of_a_file_that_cannot_be_are_noted_and_the_boxes_taken(tmp_path):
    boxes = [annotation(id=i, bbox=[1, 1, 10 * i, 20], area=1.0) for i in (1, 2, 3)]
    found = load(plain(tmp_path, coco(annotations=boxes)))
    assert found.areas.tolist() == [200, 400, 600]
    assert not found.areas_given.any()
    (problem,) = (each for each in found.problems if each.kind == "impossible area")
    assert (problem.fatal, "3 of 3 areas" in problem.message) == (False, True)
    del boxes[0]["area"]
    found = load(
        plain(tmp_path, coco(annotations=[boxes[0], annotation(id=2, bbox=[1, 1, 20, 20], area=300)]))
    )
    assert (found.areas.tolist(), found.areas_given.tolist()) == ([200, 300], [False, True])


def test_evaluation_keeps_boxes_without_area(tmp_path):
    found = load(plain(tmp_path, coco(annotations=[annotation(), annotation(id=2, bbox=[1, 2, 0, 0])])))
    assert len(usable_for_evaluation(found).boxes) == 2
    bad = load(plain(tmp_path, coco(annotations=[annotation(category_id=99)])))
    with pytest.raises(AnnotationError, match="unknown category id"):
        usable_for_evaluation(bad)


@pytest.mark.parametrize("write", [plain, as_yolo, as_voc])
def test_links_in_the_users_own_folder_are_followed(tmp_path, write):
    """Of one image, and of the whole folder, to a store elsewhere."""
    write(tmp_path / "data")
    (path,) = (tmp_path / "data").rglob("a.jpg")
    path.rename(tmp_path / "elsewhere.jpg")
    os.symlink(tmp_path / "elsewhere.jpg", path)
    found = load(tmp_path / "data")
    assert not found.problems
    assert DetectionDataset(found)[0][0].size == (100, 80)
    (tmp_path / "store").mkdir()
    path.unlink()
    (tmp_path / "elsewhere.jpg").rename(tmp_path / "store" / "a.jpg")
    path.parent.rmdir()
    os.symlink(tmp_path / "store", path.parent)
    assert DetectionDataset(load(tmp_path / "data"))[0][0].size == (100, 80)


@pytest.mark.parametrize("write", [plain, as_yolo, as_voc])
def test_a_link_whose_target_is_gone_is_a_missing_image(tmp_path, write):
    write(tmp_path)
    (path,) = tmp_path.rglob("a.jpg")
    path.unlink()
    os.symlink(tmp_path / "gone.jpg", path)
    found = load(tmp_path)
    (problem,) = found.problems
    assert (problem.kind, problem.file, problem.fatal) == ("missing image", "a.jpg", True)
    assert f"is a link to {tmp_path / 'gone.jpg'}, where nothing is found" in problem.message
    assert check_dataset({"train": found}).fatal == 1
    with pytest.raises(AnnotationError, match=r"a\.jpg: is a link to .*gone\.jpg"):
        DetectionDataset(found)
    with pytest.raises(AnnotationError, match=r"a\.jpg: is a link to .*gone\.jpg"):
        usable_for_evaluation(found)


def test_a_folder_that_is_a_link_to_nowhere_is_told(tmp_path):
    plain(tmp_path, coco([{"id": 1, "file_name": "sub/a.jpg"}]), names=())
    (tmp_path / "train").mkdir()
    os.symlink(tmp_path / "gone", tmp_path / "train" / "sub")
    (problem,) = load(tmp_path).problems
    assert problem.kind == "missing image"
    assert f"sub is a link to {tmp_path / 'gone'}, where nothing is found" in problem.message


def test_one_lost_image_is_left_out_where_that_is_allowed_and_the_others_stay(tmp_path):
    """A labelled YOLO image whose link is broken does not become background."""
    as_yolo(tmp_path)
    picture(tmp_path / "images/train/b.jpg")
    (tmp_path / "images/train/a.jpg").unlink()
    os.symlink(tmp_path / "gone.jpg", tmp_path / "images/train/a.jpg")
    dataset = DetectionDataset(load(tmp_path), lenient=True)
    assert dataset.annotations.file_names.tolist() == ["b.jpg"]
    assert dataset.annotations.left_out == {"missing image": 1}


def test_a_split_that_lists_no_image_is_told(tmp_path):
    content = coco() | {"images": [], "annotations": []}
    (tmp_path / "x.json").write_text(json.dumps(content))
    for refuse in (DetectionDataset, usable_for_evaluation):
        with pytest.raises(AnnotationError, match=r"x\.json: lists no images$"):
            refuse(load(tmp_path / "x.json"))


def test_the_folder_itself_may_be_a_link_and_names_may_be_odd(tmp_path):
    names = ["sub/ä ö.jpg", "%41.jpg"]
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    plain(tmp_path / "real", coco(images, []), names)
    os.symlink(tmp_path / "real", tmp_path / "link")
    dataset = DetectionDataset(load(tmp_path / "link"))
    assert dataset[0][0].size == dataset[1][0].size == (100, 80)


@pytest.mark.parametrize(
    ("orientation", "told"),
    [
        (6, "(the annotations seem to ignore its EXIF orientation)"),
        (3, "(width and height are exchanged)"),
        (None, "(width and height are exchanged)"),
    ],
)
def test_exif_is_named_only_where_the_image_has_it(tmp_path, orientation, told):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    upright = (100, 80)
    picture(tmp_path / "train" / "a.jpg", upright[::-1] if orientation == 6 else upright, exif=exif)
    content = coco([{"id": 1, "file_name": "a.jpg", "width": 80, "height": 100}])
    (tmp_path / "train.json").write_text(json.dumps(content))
    found = load(tmp_path)
    why = f"is 100x80, but {tmp_path}/train.json says 80x100 {told}; correct the annotations"
    (problem,) = [each for each in check_dataset({"train": found}).splits[0].problems if each.fatal]
    assert str(problem) == f"a.jpg: {why}"
    with pytest.raises(AnnotationError) as error:
        DetectionDataset(found)[0]
    assert str(error.value) == f"{tmp_path}/train/a.jpg: {why}"


def test_a_missing_image_is_told_with_what_is_called_like_it(tmp_path, monkeypatch):
    monkeypatch.setattr("ssd.images._reads_heif", lambda: False)
    names = ["f0.jpg", "f1.jpg", "f2.jpg", "f3.jpg"]
    plain(tmp_path, coco([{"id": i, "file_name": name} for i, name in enumerate(names)]), ["else.jpg"])
    (tmp_path / "train" / "f0.heic").touch()
    picture(tmp_path / "train" / "f1.png")
    (tmp_path / "train" / "f2.txt").touch()
    folder = tmp_path / "train"
    assert [each.message for each in load(tmp_path).problems if each.kind == "missing image"] == [
        f"there is no such file in {folder}{told}"
        for told in (
            "; f0.heic is there, which needs pillow-heif (pip install pillow-heif)",
            "; f1.png is there",
            "",
            "",
        )
    ]
