import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from PIL import Image
from torch.utils.data import Subset

from ssd import shapes
from ssd.data import (
    AnnotationError,
    DetectionDataset,
    Problem,
    annotations_of,
    as_targets,
    find_split,
    load,
    require_boxes,
    usable_for_evaluation,
)


def coco(images=None, annotations=None, categories=None):
    return {
        "images": images or [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 80}],
        "annotations": annotations if annotations is not None else [annotation()],
        "categories": categories or [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def annotation(**changes):
    base = {"id": 1, "image_id": 1, "category_id": 5, "bbox": [10, 20, 30, 40], "area": 900, "iscrowd": 0}
    return base | changes


def picture(path, size=(100, 80), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 200, 30)).save(path, **options)


def plain(folder, content=None, names=("a.jpg",)):
    """train.json and train/ with images of 100x80."""
    for name in names:
        picture(folder / "train" / name)
    (folder / "train.json").write_text(json.dumps(content or coco()))
    return folder


# --- Layouts ----------------------------------------------------------------------------------------------

BOX = [10, 20, 40, 60]  # xyxy, class cat, in image a.jpg of 100x80


def as_plain(root):
    plain(root)
    return root


def as_official(root):
    picture(root / "train2017" / "a.jpg")
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(coco()))
    return root


def as_official_with_images_folder(root):
    picture(root / "images" / "train2017" / "a.jpg")
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(coco()))
    return root


def as_roboflow(root):
    picture(root / "train" / "a.jpg")
    (root / "train" / "_annotations.coco.json").write_text(json.dumps(coco()))
    return root


def as_one_file(root):
    return plain(root) / "train.json"


def as_yolo(root, layout="images/train"):
    picture(root / layout / "a.jpg")
    labels = root / layout.replace("images", "labels")
    labels.mkdir(parents=True, exist_ok=True)
    (labels / "a.txt").write_text("1 0.25 0.5 0.3 0.5\n")
    (root / "data.yaml").write_text(f"train: {layout}\nval: images/nowhere\nnames: [dog, cat]\n")
    return root


def as_yolo_of_roboflow(root):
    as_yolo(root, "train/images")
    (root / "data.yaml").write_text("train: ../train/images\nnc: 2\nnames:\n  0: dog\n  1: cat\n")
    return root / "data.yaml"


def as_yolo_list(root):
    as_yolo(root)
    (root / "train.txt").write_text("./images/train/a.jpg\n")
    (root / "data.yaml").write_text("path: .\ntrain: train.txt\nnames: [dog, cat]\n")
    return root


VOC_XML = """<annotation><filename>{name}</filename>
<size><width>100</width><height>80</height><depth>3</depth></size>
<object><name>cat</name><difficult>{difficult}</difficult>
<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>40</xmax><ymax>60</ymax></bndbox></object></annotation>"""


def as_voc(root, difficult=0):
    picture(root / "JPEGImages" / "a.jpg")
    (root / "Annotations").mkdir()
    (root / "Annotations" / "a.xml").write_text(VOC_XML.format(name="a.jpg", difficult=difficult))
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    return root


def as_voc_devkit(root):
    as_voc(root / "VOC2007")
    main = root / "VOC2007" / "ImageSets" / "Main"
    (main / "train.txt").rename(main / "trainval.txt")
    return root


def as_kaggles_voc(root):
    picture(root / "images" / "a.png")
    (root / "annotations").mkdir()
    (root / "annotations" / "a.xml").write_text(VOC_XML.format(name="a.jpg", difficult=0))
    return root


def as_flat_voc(root):
    picture(root / "a.jpg")
    (root / "a.xml").write_text(VOC_XML.format(name="a.jpg", difficult=0))
    return root


def as_cvat(root):
    picture(root / "images" / "a.jpg")
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_default.json").write_text(json.dumps(coco()))
    return root


def as_annotations_and_splits(root):
    picture(root / "train" / "a.jpg")
    (root / "annotations").mkdir()
    (root / "annotations" / "train.json").write_text(json.dumps(coco()))
    return root


def as_flat_images(root):
    picture(root / "images" / "a.jpg")
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train.json").write_text(json.dumps(coco()))
    return root


def as_two_years_of_which_one_has_images(root):
    as_official(root)
    (root / "annotations" / "instances_train2014.json").write_text("{}")
    return root


def as_yolo_with_labels_inside(root):
    """Below a folder that is itself called images."""
    root = root / "images"
    as_yolo(root, "train")
    (root / "train" / "a.txt").unlink()
    (root / "train" / "labels").mkdir()
    (root / "train" / "labels" / "a.txt").write_text("1 0.25 0.5 0.3 0.5\n")
    picture(root / "train" / "._a.jpg")
    return root


def as_yolo_by_a_way_around(root):
    return as_yolo_with_labels_inside(root) / "train" / ".."


def as_yolo_pose(root):
    as_yolo(root)
    (root / "labels/train/a.txt").write_text("1 0.25 0.5 0.3 0.5 0.9 0.9 0.1 0.1\n")
    with (root / "data.yaml").open("a") as file:
        file.write("kpt_shape: [2, 2]\n")
    return root


def as_names_with_the_folder(root):
    picture(root / "train" / "a.jpg")
    content = coco([{"id": 1, "file_name": "train/a.jpg", "width": 100, "height": 80}])
    (root / "train.json").write_text(json.dumps(content))
    return root


def as_label_studio(root):
    picture(root / "images" / "a.jpg")
    content = coco([{"id": 1, "file_name": "images/a.jpg", "width": 100, "height": 80}])
    (root / "result.json").write_text(json.dumps(content))
    return root / "result.json"


def as_coco_without_sizes(root):
    return plain(root, coco([{"id": 1, "file_name": "a.jpg"}]))


def as_voc_beside(root):
    picture(root / "train" / "a.jpg")
    (root / "train" / "a.xml").write_text(VOC_XML.format(name="a.jpg", difficult=0))
    return root


LAYOUTS = [
    value for name, value in list(globals().items()) if name.startswith("as_") and name != "as_targets"
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_recognised_and_give_the_same(tmp_path, layout):
    annotations = load(layout(tmp_path), "train")
    assert not annotations.problems
    dataset = DetectionDataset(annotations)
    image, target = dataset[0]
    assert image.size == (100, 80)
    np.testing.assert_allclose(target["boxes"], [BOX])
    assert target["boxes"].dtype == np.float32
    assert [dataset.class_names[label - 1] for label in target["labels"]] == ["cat"]
    assert find_split(layout(tmp_path / "again"), "train")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_that_are_not_there(tmp_path, layout):
    path = layout(tmp_path)
    if path.suffix != ".json" and layout not in (as_yolo,):
        assert not find_split(path, "test")
        with pytest.raises(AnnotationError, match="there is no test"):
            load(path, "test")


def test_roboflow_calls_val_valid(tmp_path):
    as_roboflow(tmp_path)
    (tmp_path / "train").rename(tmp_path / "valid")
    assert find_split(tmp_path, "val")
    assert len(load(tmp_path, "val")) == 1


def test_explicit_paths(tmp_path):
    picture(tmp_path / "photos" / "a.jpg")
    (tmp_path / "labels.json").write_text(json.dumps(coco()))
    assert len(DetectionDataset(load(tmp_path / "labels.json", images=tmp_path / "photos"))) == 1


def test_no_dataset(tmp_path):
    with pytest.raises(AnnotationError, match="no dataset of a known layout"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    (tmp_path / "x.json").write_text("[1")
    with pytest.raises(AnnotationError, match=r"x\.json: not a JSON file"):
        load(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(AnnotationError, match="a COCO file has the lists"):
        load(tmp_path / "x.json")
    (tmp_path / "data.yaml").write_text("a: [")
    with pytest.raises(AnnotationError, match="not a YAML file"):
        load(tmp_path)


# --- Classes and ids --------------------------------------------------------------------------------------


def test_category_ids_of_any_kind_become_contiguous(tmp_path):
    categories = [{"id": 90, "name": "z"}, {"id": 7, "name": "a"}, {"id": 0, "name": "m"}]
    annotations = [annotation(id=0, category_id=90), annotation(id="x", category_id=0)]
    found = load(plain(tmp_path, coco(annotations=annotations, categories=categories)))
    assert found.class_names == ("m", "a", "z")
    assert found.category_ids == (0, 7, 90)
    assert found.labels.tolist() == [3, 1]


def test_text_category_ids(tmp_path):
    categories = [{"id": "b", "name": "bee"}, {"id": "a", "name": "ant"}]
    found = load(plain(tmp_path, coco(annotations=[annotation(category_id="a")], categories=categories)))
    assert found.class_names == ("bee", "ant")
    assert found.category_ids == (1, 2)
    assert found.labels.tolist() == [2]


def test_ids_that_are_numbers_in_one_place_and_text_in_another(tmp_path):
    found = load(plain(tmp_path, coco(annotations=[annotation(category_id="5", image_id="1")])))
    assert not found.problems
    assert found.class_names[found.labels[0] - 1] == "cat"


def test_huge_image_ids_stay_apart(tmp_path):
    ids = [2**53 + 1, 2**53]
    images = [{"id": each, "file_name": f"{k}.jpg"} for k, each in enumerate(ids)]
    content = coco(images, [annotation(image_id=ids[1])])
    found = load(plain(tmp_path, content, ("0.jpg", "1.jpg")))
    assert np.diff(found.starts).tolist() == [0, 1]
    assert list(found.image_ids) == ids


def test_a_models_classes_decide_the_labels(tmp_path):
    plain(tmp_path)
    found = load(tmp_path, class_names=("bird", "cat", "cow", "dog"))
    assert found.labels.tolist() == [2]
    assert found.category_ids[1] == 5
    assert found.category_ids[3] == 2
    assert len(set(found.category_ids)) == 4
    with pytest.raises(AnnotationError, match="categories dog are none of the classes cat, bird"):
        load(tmp_path, class_names=("cat", "bird"))


def test_two_categories_of_one_name(tmp_path):
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]
    with pytest.raises(AnnotationError, match="two categories are called 'cat'"):
        load(plain(tmp_path, coco(annotations=[], categories=categories)))


def test_yolo_names_must_be_numbered(tmp_path):
    as_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: {1: dog, 2: cat}\n")
    with pytest.raises(AnnotationError, match="number the classes from 0"):
        load(tmp_path)


@pytest.mark.parametrize("group", ["animals", "cat"])
def test_roboflows_group_is_no_class(tmp_path, group):
    categories = [
        {"id": 0, "name": group, "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": group},
        {"id": 2, "name": "dog", "supercategory": group},
    ]
    found = load(plain(tmp_path, coco(annotations=[annotation(category_id=1)], categories=categories)))
    assert found.class_names == ("cat", "dog")
    assert found.category_ids == (1, 2)


def test_images_of_one_name_in_two_folders_have_two_ids(tmp_path):
    for folder in ("s1", "s2"):
        as_yolo(tmp_path, f"images/{folder}")
    (tmp_path / "data.yaml").write_text("train: [images/s1, images/s2]\nnames: [dog, cat]\n")
    assert load(tmp_path).image_ids == ("s1/a", "s2/a")


# --- What is wrong ----------------------------------------------------------------------------------------

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


def test_yolo_lines_that_are_wrong(tmp_path):
    as_yolo(tmp_path)
    lines = [
        "1 0.25 0.5 0.3 0.5",
        "",
        "1 0.25 0.5 0.3",
        "x 0.2 0.2 0.1 0.1",
        "9 0.2 0.2 0.1 0.1",
        "0 nan 0 1 1",
    ]
    lines += ["0 0.5 0.5 0 0.2", "0 0.1 0.1 0.5 0.1 0.5 0.6", "0.5 0.2 0.2 0.1 0.1"]
    (tmp_path / "labels/train/a.txt").write_text("\n".join(lines))
    found = load(tmp_path)
    kinds = [(problem.annotation, problem.kind) for problem in found.problems]
    assert kinds == [
        ("a.txt:3", "not a box"),
        ("a.txt:4", "unknown category id"),
        ("a.txt:5", "unknown category id"),
        ("a.txt:6", "not a box"),
        ("a.txt:9", "unknown category id"),
        ("a.txt:7", "zero area"),
    ]
    _, target = DetectionDataset(found, lenient=True)[0]
    np.testing.assert_allclose(target["boxes"], [BOX, [10, 8, 50, 48]])  # the second is a polygon's


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


def test_boxes_outside_are_found_where_the_file_gives_no_sizes(tmp_path):
    boxes = [annotation(), annotation(id=2, bbox=[500, 5, 10, 10])]
    found = load(plain(tmp_path, coco([{"id": 1, "file_name": "a.jpg"}], boxes)))
    assert found.sizes.tolist() == [[100, 80]]
    assert [each.kind for each in found.problems] == ["box outside"]


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


def test_a_subset_has_the_annotations_of_its_images(tmp_path):
    names = [f"{letter}.jpg" for letter in "abc"]
    images = [{"id": 10 + i, "file_name": name} for i, name in enumerate(names)]
    places = [0, 0, 2, 2, 2]
    boxes = [annotation(id=i, image_id=10 + place, bbox=[i, 0, 9, 9]) for i, place in enumerate(places)]
    boxes.append(annotation(id=9, image_id=11, bbox=[7, 7, 0, 0]))
    dataset = DetectionDataset(load(plain(tmp_path, coco(images, boxes), names)), lenient=True)
    part = annotations_of(Subset(Subset(dataset, [1, 2, 0]), [1, 0, 2]))  # images c, b, a
    assert part.file_names.tolist() == ["c.jpg", "b.jpg", "a.jpg"]
    assert part.image_ids == (12, 11, 10)
    assert part.starts.tolist() == [0, 3, 4, 6]
    assert part.boxes[:, 0].tolist() == [2, 3, 4, 7, 0, 1]
    assert part.left_out == {"zero area": 1}
    whole = dataset.annotations
    whole = replace(whole, problems=tuple(Problem("note", name, "", "", fatal=False) for name in names))
    assert [each.file for each in whole.select([2, 0]).problems] == ["a.jpg", "c.jpg"]
    assert annotations_of(Subset([1, 2], [0])) is None


def test_without_any_image(tmp_path):
    plain(tmp_path, coco(), names=())
    (tmp_path / "train").mkdir()
    with pytest.raises(AnnotationError, match="no images that can be read"):
        DetectionDataset(load(tmp_path), lenient=True)


@pytest.mark.parametrize(
    ("value", "crowd"), [(0, False), ("0", False), (None, False), (1, True), ("1", True)]
)
def test_crowd_flags_of_any_kind(tmp_path, value, crowd):
    assert load(plain(tmp_path, coco(annotations=[annotation(iscrowd=value)]))).crowd.tolist() == [crowd]


def test_yolo_images_whose_size_cannot_be_read_are_refused(tmp_path):
    as_yolo(tmp_path)
    (tmp_path / "images/train/b.jpg").write_bytes(b"no image")
    (tmp_path / "labels/train/b.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    found = load(tmp_path)
    assert [(each.kind, each.file) for each in found.problems] == [("unreadable image", "b.jpg")]
    with pytest.raises(AnnotationError, match=r"unreadable image: 1"):
        DetectionDataset(found)
    assert len(DetectionDataset(found, lenient=True)) == 1


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


def test_crowd_is_for_evaluation_only_unless_asked(tmp_path):
    plain(tmp_path, coco(annotations=[annotation(), annotation(id=2, iscrowd=1, bbox=[0, 0, 90, 70])]))
    found = load(tmp_path)
    assert found.crowd.tolist() == [False, True]
    assert len(DetectionDataset(found)[0][1]["boxes"]) == 1
    assert len(DetectionDataset(found, crowd=True)[0][1]["boxes"]) == 2
    assert load(as_voc(tmp_path / "voc", difficult=1)).crowd.tolist() == [True]


def test_background_images_stay(tmp_path):
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}]
    dataset = DetectionDataset(load(plain(tmp_path, coco(images), ("a.jpg", "b.jpg"))))
    assert len(dataset) == 2
    _, target = dataset[1]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)


def test_another_size_than_annotated(tmp_path):
    plain(tmp_path)
    picture(tmp_path / "train" / "a.jpg", (80, 100))
    with pytest.raises(AnnotationError, match=r"a\.jpg: is 80x100, but .*train\.json says 100x80 .*EXIF"):
        DetectionDataset(load(tmp_path))[0]


def test_exif_turned_images_have_upright_boxes(tmp_path):
    as_yolo(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "images/train/a.jpg", (80, 100), exif=exif)  # upright: 100x80
    image, target = DetectionDataset(load(tmp_path))[0]
    assert image.size == (100, 80)
    np.testing.assert_allclose(target["boxes"], [BOX])


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_headers_tell_the_size_of_the_upright_image(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "train" / f"a.{suffix}", (80, 100), exif=exif)
    content = coco([{"id": 1, "file_name": f"a.{suffix}"}])
    found = load(plain(tmp_path, content, names=()))
    assert found.sizes.tolist() == [[100, 80]]
    assert DetectionDataset(found)[0][0].size == (100, 80)


def test_places_count_from_the_end_where_they_are_negative(tmp_path):
    names = [f"{letter}.jpg" for letter in "ab"]
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    boxes = [annotation(id=i, image_id=i, bbox=[i, 0, 9, 9]) for i in range(2)]
    dataset = DetectionDataset(load(plain(tmp_path, coco(images, boxes), names)))
    np.testing.assert_allclose(dataset[-1][1]["boxes"], [[1, 0, 10, 9]])
    assert annotations_of(Subset(dataset, [-1])).boxes[:, 0].tolist() == [1]
    with pytest.raises(IndexError):
        dataset[2]
    assert len(list(dataset)) == 2


# --- Paths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg", "C:\\x.jpg", "..\\x.jpg", "a\0.jpg", ""]
)
def test_file_names_cannot_leave_the_folder(tmp_path, name):
    picture(tmp_path / "x.jpg")
    (tmp_path / "data").mkdir()
    plain(tmp_path / "data", coco([{"id": 1, "file_name": name}]), names=())
    with pytest.raises(AnnotationError, match="leads out of"):
        load(tmp_path / "data")


def test_links_cannot_lead_out_of_the_folder(tmp_path):
    picture(tmp_path / "secret.jpg")
    (tmp_path / "data" / "train").mkdir(parents=True)
    os.symlink(tmp_path / "secret.jpg", tmp_path / "data" / "train" / "a.jpg")
    (tmp_path / "data" / "train.json").write_text(json.dumps(coco()))
    dataset = DetectionDataset(load(tmp_path / "data"))
    with pytest.raises(AnnotationError, match="leads out of"):
        dataset[0]


def test_the_folder_itself_may_be_a_link_and_names_may_be_odd(tmp_path):
    names = ["sub/ä ö.jpg", "%41.jpg"]
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    plain(tmp_path / "real", coco(images, []), names)
    os.symlink(tmp_path / "real", tmp_path / "link")
    dataset = DetectionDataset(load(tmp_path / "link"))
    assert dataset[0][0].size == dataset[1][0].size == (100, 80)


@pytest.mark.parametrize("name", ["../../x.jpg", "C:\\\\photos\\\\a.jpg", "/home/me/a.jpg", "a", "", "a.png"])
def test_voc_names_count_by_their_last_part_or_by_the_annotation_files(tmp_path, name):
    as_voc(tmp_path / "voc")
    picture(tmp_path / "x.jpg")
    (tmp_path / "voc/Annotations/a.xml").write_text(VOC_XML.format(name=name, difficult=0))
    found = load(tmp_path / "voc")
    assert found.file_names.tolist() == ["a.jpg"]
    assert not found.problems


def test_a_copied_voc_file_that_names_the_first_image_is_of_its_own(tmp_path):
    as_flat_voc(tmp_path)
    picture(tmp_path / "a_flip.jpg")
    (tmp_path / "a_flip.xml").write_text(VOC_XML.format(name="a.jpg", difficult=0))
    assert load(tmp_path).file_names.tolist() == ["a.jpg", "a_flip.jpg"]


def test_yolos_folders_are_its_own(tmp_path):
    as_yolo(tmp_path)
    with pytest.raises(AnnotationError, match=r"data\.yaml: names the image folders itself"):
        load(tmp_path, images=tmp_path)


def test_xml_that_expands_without_end_is_refused(tmp_path):
    as_voc(tmp_path)
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12))
    bomb = f'<!DOCTYPE a [<!ENTITY e0 "lol">{entities}]><annotation><filename>&e11;</filename></annotation>'
    (tmp_path / "Annotations/a.xml").write_text(bomb)
    with pytest.raises(AnnotationError, match=r"a\.xml: not an XML file"):
        load(tmp_path)


def test_yaml_cannot_run_code(tmp_path):
    (tmp_path / "data.yaml").write_text("names: !!python/object/apply:os.mkdir [owned]\n")
    with pytest.raises(AnnotationError, match="not a YAML file"):
        load(tmp_path)
    assert not Path("owned").exists()


# --- Anything else ----------------------------------------------------------------------------------------

numbers = st.one_of(
    st.none(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=3), st.booleans()
)
entries = st.dictionaries(
    st.sampled_from(
        ["id", "image_id", "category_id", "bbox", "area", "iscrowd", "file_name", "width", "name"]
    ),
    st.one_of(numbers, st.lists(numbers, max_size=5)),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.one_of(entries, numbers), max_size=3),
    st.lists(st.one_of(entries, numbers), max_size=3),
    st.lists(st.one_of(entries, numbers), max_size=2),
)
def test_no_json_gives_anything_but_boxes_or_an_annotation_error(tmp_path, images, annotations, categories):
    (tmp_path / "x.json").write_text(
        json.dumps(
            {
                "images": [*images, {"id": 1, "file_name": "a.jpg", "width": 100, "height": 80}],
                "annotations": [*annotations, annotation()],
                "categories": [*categories, {"id": 5, "name": "the cat"}],
            }
        )
    )
    try:
        found = load(tmp_path / "x.json")
    except AnnotationError:
        return
    assert np.isfinite(found.boxes).all()
    assert np.isfinite(found.areas).all()
    assert len(found.boxes) == len(found.labels) == found.starts[-1]
    assert len(found.starts) == len(found) + 1
    usable = found.boxes[found.usable]
    assert (usable[:, 2:] > usable[:, :2]).all()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"boxes": [[0, 0, 5, 5]]}, '"boxes" and "labels"'),
        ({"boxes": [[0, 0, 5, 5]], "labels": []}, "1 boxes and 0 labels"),
        ({"boxes": [[0, 0, 0, 5]], "labels": [1]}, "no area"),
        ({"boxes": [[0, 0, NAN, 5]], "labels": [1]}, "not finite"),
        ({"boxes": [[0, 0, 5, 5]], "labels": [0]}, "count from 1"),
    ],
)
def test_targets_of_other_datasets_are_checked(target, message):
    with pytest.raises(AnnotationError, match=f"photo 3: .*{message}"):
        as_targets(target, "photo 3")


def test_targets_of_torchvisions_kind():
    boxes, labels = as_targets({"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}, "x")
    assert boxes.shape == (0, 4)
    assert labels.dtype == np.int64


def test_a_dataset_travels_to_a_worker(tmp_path):
    shapes.write(tmp_path, 2, 0)
    dataset = pickle.loads(pickle.dumps(DetectionDataset(load(tmp_path))))
    assert len(dataset[1][1]["boxes"]) == len(dataset[1][1]["labels"])
