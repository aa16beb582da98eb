import json
import os

import numpy as np
import pytest
from made_data import BOX, annotation, as_voc, as_yolo, coco, picture, plain

from ssd.check import check_dataset
from ssd.data import AnnotationError, DetectionDataset, load, require_boxes, usable_for_evaluation

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
        ({"bbox": "10 20 30 40"}, "not a box"),
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
    ]
    plain(tmp_path, coco(images, [annotation(), annotation(id=2, image_id=2)]), ("a.jpg", "b.jpg"))
    found = load(tmp_path)
    assert {(p.kind, p.file) for p in found.problems} == {
        ("missing image", "gone.jpg"),
        ("duplicate image id", "b.jpg"),
    }
    with pytest.raises(AnnotationError, match=r"gone\.jpg"):
        DetectionDataset(found)
    dataset = DetectionDataset(found, lenient=True)
    assert len(dataset) == 1
    assert len(usable_for_evaluation(found, lenient=True)) == 1


def test_an_image_that_is_listed_twice_is_told(tmp_path):
    images = [{"id": i, "file_name": "a.jpg", "width": 100, "height": 80} for i in (1, 2)]
    found = load(plain(tmp_path, coco(images, [annotation(), annotation(id=2, image_id=2)])))
    assert [(each.kind, each.file, each.fatal) for each in found.problems] == [
        ("image listed twice", "a.jpg", False)
    ]


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


def test_evaluation_keeps_boxes_without_area(tmp_path):
    found = load(plain(tmp_path, coco(annotations=[annotation(), annotation(id=2, bbox=[1, 2, 0, 0])])))
    assert len(usable_for_evaluation(found).boxes) == 2
    bad = load(plain(tmp_path, coco(annotations=[annotation(category_id=99)])))
    with pytest.raises(AnnotationError, match="unknown category id"):
        usable_for_evaluation(bad)


def test_links_cannot_lead_out_of_the_folder(tmp_path):
    picture(tmp_path / "secret.jpg")
    (tmp_path / "data" / "train").mkdir(parents=True)
    os.symlink(tmp_path / "secret.jpg", tmp_path / "data" / "train" / "a.jpg")
    (tmp_path / "data" / "train.json").write_text(json.dumps(coco()))
    found = load(tmp_path / "data")
    with pytest.raises(AnnotationError, match="leads out of"):
        DetectionDataset(found)
    with pytest.raises(AnnotationError, match="leads out of"):
        found.path(0)


def linked(folder, names=("a.jpg", "b.jpg")):
    """train.json and train/, whose first image is a link to a store beside the folder."""
    images = [{"id": i, "file_name": name, "width": 100, "height": 80} for i, name in enumerate(names)]
    boxes = [annotation(id=i, image_id=i) for i in range(len(names))]
    picture(folder / "store" / "a.jpg")
    (folder / "data" / "train").mkdir(parents=True)
    plain(folder / "data", coco(images, boxes), names[1:])
    os.symlink(folder / "store" / "a.jpg", folder / "data" / "train" / "a.jpg")
    return folder / "data"


def test_a_link_out_of_the_folder_is_a_problem_of_its_own_and_its_remedy_works(tmp_path):
    found = load(linked(tmp_path))
    (problem,) = found.problems
    assert (problem.kind, problem.file, problem.fatal) == ("link out of the folder", "a.jpg", True)
    assert "leads out of" in problem.message
    assert "--images" in problem.message
    (split,) = check_dataset({"train": found}).splits
    assert [each.kind for each in split.problems] == ["link out of the folder"]
    for usable in (
        DetectionDataset(found, lenient=True).annotations,
        usable_for_evaluation(found, lenient=True),
    ):
        assert usable.file_names.tolist() == ["b.jpg"]
        assert usable.left_out == {"link out of the folder": 1}
    picture(tmp_path / "store" / "b.jpg")
    assert len(DetectionDataset(load(tmp_path / "data", images=tmp_path / "store"))) == 2
    (tmp_path / "data" / "train" / "a.jpg").unlink()
    picture(tmp_path / "data" / "train" / "a.jpg")
    assert len(DetectionDataset(load(tmp_path / "data"))) == 2


def test_where_all_images_are_links_out_of_the_folder_that_is_told(tmp_path):
    found = load(linked(tmp_path, ("a.jpg",)))
    for lenient in (False, True):
        with pytest.raises(AnnotationError, match=r"no images that can be read(.|\n)*a\.jpg.*leads out of"):
            DetectionDataset(found, lenient=lenient)


def test_a_link_of_a_folder_above_the_image_counts_too_and_one_within_does_not(tmp_path):
    picture(tmp_path / "store" / "a.jpg")
    picture(tmp_path / "data" / "train" / "real" / "b.jpg")
    os.symlink(tmp_path / "store", tmp_path / "data" / "train" / "out")
    os.symlink(tmp_path / "data" / "train" / "real", tmp_path / "data" / "train" / "inside")
    os.symlink(tmp_path / "data" / "train" / "real" / "b.jpg", tmp_path / "data" / "train" / "c.jpg")
    names = ["out/a.jpg", "inside/b.jpg", "c.jpg"]
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    found = load(plain(tmp_path / "data", coco(images, []), names=()))
    assert [(each.kind, each.file) for each in found.problems] == [("link out of the folder", "out/a.jpg")]
    assert found.sizes.tolist() == [[0, 0], [100, 80], [100, 80]]  # what lies outside is not opened
    assert len(DetectionDataset(found, lenient=True)) == 2


@pytest.mark.parametrize("write", [as_yolo, as_voc])
def test_links_in_folders_that_were_listed_may_lead_out(tmp_path, write):
    write(tmp_path / "data")
    (path,) = (tmp_path / "data").rglob("a.jpg")
    path.rename(tmp_path / "elsewhere.jpg")
    os.symlink(tmp_path / "elsewhere.jpg", path)
    found = load(tmp_path / "data")
    assert not found.problems
    assert DetectionDataset(found)[0][0].size == (100, 80)
    assert not check_dataset({"train": found}).fatal


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
