import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from made_data import annotation, as_roboflow, coco, picture, plain

from ssd.data import AnnotationError, DetectionDataset, find_split, load


def test_roboflow_calls_val_valid(tmp_path):
    as_roboflow(tmp_path)
    (tmp_path / "train").rename(tmp_path / "valid")
    assert find_split(tmp_path, "val")
    assert len(load(tmp_path, "val")) == 1


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


@pytest.mark.parametrize(
    ("value", "crowd"), [(0, False), ("0", False), (None, False), (1, True), ("1", True)]
)
def test_crowd_flags_of_any_kind(tmp_path, value, crowd):
    assert load(plain(tmp_path, coco(annotations=[annotation(iscrowd=value)]))).crowd.tolist() == [crowd]


@pytest.mark.parametrize(
    "name", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg", "C:\\x.jpg", "..\\x.jpg", "a\0.jpg", "http://a/x.jpg"]
)
def test_file_names_cannot_leave_the_folder(tmp_path, name):
    picture(tmp_path / "x.jpg")
    (tmp_path / "data").mkdir()
    plain(tmp_path / "data", coco([{"id": 1, "file_name": name}]), names=())
    found = load(tmp_path / "data")
    assert [each.kind for each in found.problems] == ["missing image"]
    assert not found.notes
    with pytest.raises(AnnotationError, match="no images that can be read"):
        DetectionDataset(found, lenient=True)


# --- Values -----------------------------------------------------------------------------------------------

L_SHAPE = [[10, 20, 40, 20, 40, 60, 30, 60, 30, 30, 10, 30]]
MASK = {"size": [80, 100], "counts": [10 * 80 + 20, *[40, 40] * 29, 40, 60 * 80 + 20]}
"""The box 10, 20, 40, 60."""


def one(tmp_path, **changes):
    """The only annotation's box, or the message about it."""
    found = load(plain(tmp_path, coco(annotations=[annotation(**changes)])))
    return found.boxes[0].tolist() if len(found.boxes) else str(found.problems[0])


@pytest.mark.parametrize("bbox", [None, [], [0, 0, 0, 0], "", [10, 20, 0, 0]])
@pytest.mark.parametrize("segmentation", [L_SHAPE, L_SHAPE[0], MASK])
def test_what_has_no_box_has_that_of_its_segmentation(tmp_path, bbox, segmentation):
    assert one(tmp_path, bbox=bbox, segmentation=segmentation) == [10, 20, 40, 60]


def test_a_box_counts_before_the_segmentation(tmp_path):
    assert one(tmp_path, bbox=[1, 2, 3, 4], segmentation=L_SHAPE) == [1, 2, 4, 6]


@pytest.mark.parametrize(
    "segmentation", [[[10, 20, 40, 20]], [[1, 2, 3, 4, 5]], [["a"] * 6], {"counts": [1], "size": [80, 100]}]
)
def test_segmentations_without_a_box_are_told(tmp_path, segmentation):
    told = one(tmp_path, bbox=None, segmentation=segmentation)
    assert "annotation 1: its bbox None is not four finite numbers, and its segmentation is no mask" in told


@pytest.mark.parametrize("bbox", [["10", "20", "30", "40"], ["10.0", 20, " 30", 40], "[10, 20, 30, 40]"])
def test_boxes_written_as_text(tmp_path, bbox):
    assert one(tmp_path, bbox=bbox) == [10, 20, 40, 60]


@pytest.mark.parametrize("bbox", [["10", "20", "30", "wide"], "10 20 30", [10, 20, 30, None], {"x": 1}, 5])
def test_boxes_that_are_none(tmp_path, bbox):
    assert "is not four finite numbers" in one(tmp_path, bbox=bbox)


@pytest.mark.parametrize(
    ("rotation", "box"),
    [
        (90, [5, 25, 45, 55]),
        ("270.0", [5, 25, 45, 55]),
        (180, [10, 20, 40, 60]),
        (0.0, [10, 20, 40, 60]),
        *((each, [10, 20, 40, 60]) for each in (None, "left", float("nan"), [90], True)),
    ],
)
def test_cvats_turned_rectangles(tmp_path, rotation, box):
    found = one(tmp_path, attributes={"occluded": False, "rotation": rotation})
    np.testing.assert_allclose(found, box, atol=1e-9)


def test_boxes_in_parts_of_the_image_are_no_pixels(tmp_path):
    annotations = [
        annotation(bbox=[0.1, 0.25, 0.3, 0.5], area=None),
        annotation(id=2, bbox=[0.5, 0.5, 0.5, 0.5], area=None),
    ]
    found = load(plain(tmp_path, coco(annotations=annotations)))
    assert [each.kind for each in found.problems] == ["not a box"] * 2
    assert "its bbox [0.1, 0.25, 0.3, 0.5] seems to be in parts of the image" in str(found.problems[0])
    annotations[1]["bbox"] = [0, 0, 2, 2]
    assert not load(plain(tmp_path, coco(annotations=annotations))).problems
    assert not load(plain(tmp_path, coco(annotations=[annotation(bbox=[0, 0, 1, 1], area=1)]))).problems


def test_areas_that_are_no_numbers_count_as_not_given(tmp_path):
    annotations = [annotation(id=i, area=area) for i, area in enumerate((900, "900", None, float("nan")))]
    annotations.append({key: value for key, value in annotation(id=9).items() if key != "area"})
    found = load(plain(tmp_path, coco(annotations=annotations)))
    assert found.areas_given.tolist() == [True, False, False, False, False]
    assert found.areas.tolist() == [900, 1200, 1200, 1200, 1200]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_files_of_any_encoding_with_a_mark(tmp_path, encoding):
    text = json.dumps(coco(categories=[{"id": 5, "name": "\u732b"}]), ensure_ascii=False)
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    picture(tmp_path / "images" / "a.jpg")
    (tmp_path / "train.json").write_bytes((mark + text).encode(encoding))
    assert load(tmp_path).class_names == ("\u732b",)


def test_infinity_is_no_number(tmp_path):
    plain(tmp_path)
    text = (tmp_path / "train.json").read_text().replace("[10, 20, 30, 40]", "[10, -Infinity, NaN, 1e999]")
    (tmp_path / "train.json").write_text(text)
    assert [each.kind for each in load(tmp_path).problems] == ["not a box"]


# --- Categories and images --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["_background_", "Background", "__ignore__", None, ""])
def test_the_background_that_nothing_uses_is_no_class(tmp_path, name):
    categories = [{"id": 0, "name": name, "supercategory": None}, {"id": 5, "name": "cat"}]
    found = load(plain(tmp_path, coco(categories=categories)))
    assert (found.class_names, found.category_ids, found.labels.tolist()) == (("cat",), (5,), [1])
    assert not found.problems
    assert load(tmp_path, class_names=("dog", "cat")).labels.tolist() == [2]


def test_a_background_that_is_used_is_a_class_as_any_other(tmp_path):
    categories = [{"id": 0, "name": "Background"}, {"id": 5, "name": "cat"}]
    annotations = [annotation(), annotation(id=2, category_id=0)]
    found = load(plain(tmp_path, coco(annotations=annotations, categories=categories)))
    assert found.class_names == ("Background", "cat")


def test_a_category_without_name_is_called_by_its_id_where_it_is_used(tmp_path):
    found = load(plain(tmp_path, coco(categories=[{"id": 5, "name": None}, {"id": 6}])))
    assert found.class_names == ("5",)


def test_categories_that_nothing_uses_stop_nothing(tmp_path):
    odd = ["cat", {"name": "no id"}, {"id": None}, {"id": 9, "name": "x"}, {"id": 9, "name": "y"}]
    found = load(plain(tmp_path, coco(categories=[{"id": 5, "name": "cat"}, *odd])))
    assert [each.kind for each in found.problems] == ["bad category"] * 4
    assert len(DetectionDataset(found)) == 1


def test_an_id_of_two_categories_is_a_problem_of_what_uses_it(tmp_path):
    categories = [{"id": 5, "name": "cat"}, {"id": 5, "name": "dog"}, {"id": 6, "name": "cow"}]
    annotations = [annotation(), annotation(id=2, category_id=6)]
    found = load(plain(tmp_path, coco(annotations=annotations, categories=categories)))
    assert "the category id 5 is that of 'cat' and of 'dog'" in str(found.problems[0])
    assert {each.kind for each in found.problems} == {"bad category", "unknown category id"}
    assert [found.class_names[label - 1] for label in found.labels] == ["cow"]


def test_two_images_of_one_id_are_both_left_out(tmp_path):
    images = [{"id": k, "file_name": f"{name}.jpg"} for k, name in ((1, "a"), (1.0, "b"), ("2", "c"))]
    annotations = [annotation(id=k, image_id=k) for k in (1, 2)]
    plain(tmp_path, coco(images, annotations), ("a.jpg", "b.jpg", "c.jpg"))
    found = load(tmp_path)
    assert [(each.kind, each.file) for each in found.problems] == [
        ("duplicate image id", "a.jpg"),
        ("duplicate image id", "b.jpg"),
    ]
    assert "its id 1 is also that of b.jpg; to which of them its 1 annotations belong" in str(
        found.problems[0]
    )
    with pytest.raises(AnnotationError, match="duplicate image id: 2"):
        DetectionDataset(found)
    dataset = DetectionDataset(found, lenient=True)
    assert [dataset.name(i)[-5:] for i in range(len(dataset))] == ["c.jpg"]


def test_an_entry_that_is_there_twice_is_told(tmp_path):
    entry = {"id": 1, "file_name": "a.jpg", "width": 100, "height": 80}
    found = load(plain(tmp_path, coco([entry, entry])))
    assert [(each.kind, each.fatal) for each in found.problems] == [("duplicate image id", False)]
    assert (len(found), len(found.boxes)) == (1, 1)


@pytest.mark.parametrize("entry", [None, {"id": 1}, {"file_name": "a.jpg"}, {"id": None, "file_name": "a"}])
def test_entries_without_name_or_id_are_told(tmp_path, entry):
    found = load(plain(tmp_path, coco([{"id": 7, "file_name": "a.jpg"}, entry], [annotation(image_id=7)])))
    assert [each.kind for each in found.problems] == ["bad image entry"]
    assert "image entry 1 has no file_name or id" in str(found.problems[0])


def test_images_that_are_not_listed_are_counted(tmp_path):
    plain(tmp_path, names=("a.jpg", "b.jpg", "below/c.png"))
    (tmp_path / "train" / "notes.txt").touch()
    note = f"2 images in {tmp_path / 'train'} are not in train.json, such as b.jpg, and not used"
    assert load(tmp_path).notes == (note,)


def test_another_splits_images_are_not_counted(tmp_path):
    picture(tmp_path / "train" / "a.jpg")
    picture(tmp_path / "val" / "b.jpg")
    (tmp_path / "train.json").write_text(json.dumps(coco([{"id": 1, "file_name": "train/a.jpg"}])))
    found = load(tmp_path)
    assert found.path(0) == tmp_path / "train" / "a.jpg"
    assert not found.notes


def test_images_of_a_kind_that_is_not_read_are_told(tmp_path):
    plain(tmp_path, coco([{"id": 1, "file_name": "a.pdf", "width": 100, "height": 80}]), names=())
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.pdf").write_bytes(b"%PDF-1.7")
    (problem,) = load(tmp_path).problems
    assert (problem.kind, problem.file, problem.fatal) == ("unreadable image", "a.pdf", True)
    assert "PDF" in problem.message


def test_lvis_names_images_by_their_urls(tmp_path):
    picture(tmp_path / "train2017" / "1.jpg")
    content = coco([{"id": 1, "coco_url": "http://images.cocodataset.org/train2017/1.jpg"}])
    as_file(tmp_path / "lvis_v1_train.json", content)
    found = load(tmp_path)
    assert (found.path(0), len(found.problems)) == (tmp_path / "train2017" / "1.jpg", 0)


@pytest.mark.parametrize("change", [{"annotations": None}, {}])
def test_a_file_without_annotations_is_read_and_told(tmp_path, change):
    picture(tmp_path / "test2017" / "a.jpg")
    (tmp_path / "annotations").mkdir()
    content = {key: value for key, value in coco().items() if key != "annotations"} | change
    file = tmp_path / "annotations" / "image_info_test2017.json"
    file.write_text(json.dumps(content))
    found = load(tmp_path, "test")
    assert (len(found), len(found.boxes)) == (1, 0)
    assert found.notes == (f"{file} has no annotations: all its 1 images are unlabelled",)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "not a JSON file, but an empty one"),
        ("  \n", "not a JSON file, but an empty one"),
        ('{"images": [', "not a JSON file (Expecting value: line 1 column 13 (char 12))"),
        ("[]", '"categories"; this one is no object'),
        ("5", '"categories"; this one is no object'),
        ("{}", '"categories"; this one has no images'),
        ('{"images": []}', '"categories"; this one has no categories'),
        (
            '{"images": [], "annotations": {}, "categories": null}',
            "this one has no annotations and no categories",
        ),
        ('{"shapes": [], "imagePath": "a.jpg"}', "this one seems to be labelme's, of one image; convert"),
        ('[{"id": 1, "annotations": [], "data": {}}]', "this one seems to be Label Studio's own; export"),
        (
            '[{"image_id": 1, "category_id": 1, "bbox": [], "score": 1}]',
            "seems to be COCO's of detections, not of annotations",
        ),
        ('{"a.jpg1": {"filename": "a.jpg", "regions": []}}', "this one seems to be VIA's own; export"),
    ],
)
def test_files_that_are_no_coco(tmp_path, content, told):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(AnnotationError) as error:
        load(tmp_path / "x.json")
    assert told in str(error.value)


# --- Which file, which folder -----------------------------------------------------------------------------


def as_file(path, content=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content or coco()))
    return path


@pytest.mark.parametrize(
    "name",
    [
        *("Train.json", "train_annotations.json", "annotations/instances_Training.json", "train/any.json"),
        *("annotations/train/coco.json", "Annotations/coco_train.json", "instances_train2017.JSON"),
        *("export.json", "annotations/instances_default.json", "annotations.json", "TRAIN/labels.json"),
        *("ds0/annotations/instances.json", "annotations/person_keypoints_train2017.json"),
    ],
)
def test_files_of_many_names(tmp_path, name):
    as_file(tmp_path / name)
    picture(tmp_path / "images" / "a.jpg")
    picture(tmp_path / "ds0" / "images" / "a.jpg")
    (tmp_path / "notes.json").write_text('{"categories": [], "info": {}}')
    (tmp_path / "folder.json").mkdir()
    assert [split for split in ("train", "val", "test") if find_split(tmp_path, split)] == ["train"]
    assert load(tmp_path).source == tmp_path / name


def test_a_file_in_any_folder_with_its_images_in_any(tmp_path):
    file = as_file(tmp_path / "sub" / "my export.json", coco([{"id": 1, "file_name": "x/photos/a.jpg"}]))
    picture(tmp_path / "sub" / "pics" / "deep" / "a.jpg")
    assert load(tmp_path).path(0) == tmp_path / "sub" / "pics" / "deep" / "a.jpg"
    assert load(file).path(0) == load(tmp_path).path(0)
    picture(tmp_path / "elsewhere" / "a.jpg")
    assert load(tmp_path, images=tmp_path / "elsewhere").path(0) == tmp_path / "elsewhere" / "a.jpg"


def test_which_of_several_files_is_meant_is_asked(tmp_path):
    for name in ("ds0", "ds1"):
        as_file(tmp_path / name / "annotations" / "instances.json")
    with pytest.raises(AnnotationError) as error:
        load(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: any of several files may be the train split: ds0/annotations/instances.json, "
        'ds1/annotations/instances.json; give the path of one, or of its folder, or call it "train.json"'
    )


def test_which_of_several_folders_is_meant_is_asked_whatever_their_files_are_called(tmp_path):
    as_file(tmp_path / "ds0" / "annotations" / "instances.json")
    as_file(tmp_path / "annotations.json")
    with pytest.raises(
        AnnotationError, match="ds0/annotations/instances.json, annotations.json; give the path"
    ):
        load(tmp_path)


def test_key_points_beside_boxes_are_no_split(tmp_path):
    for split in ("train", "val"):
        as_file(tmp_path / "annotations" / f"person_keypoints_{split}2017.json")
        as_file(tmp_path / "annotations" / f"captions_{split}2017.json")
    as_file(tmp_path / "annotations" / "instances_val2017.json")
    assert [split for split in ("train", "val", "test") if find_split(tmp_path, split)] == ["val"]
    with pytest.raises(AnnotationError) as error:
        load(tmp_path, "test")
    assert (
        "there is no test split; it has val (annotations/instances_val2017.json); other JSON files: "
        "annotations/captions_train2017.json, " in str(error.value)
    )


def test_the_folder_that_has_the_images_counts_before_the_one_that_is_called_so(tmp_path):
    as_file(tmp_path / "annotations" / "instances_train.json")
    picture(tmp_path / "train" / "other.jpg")
    picture(tmp_path / "images" / "a.jpg")
    assert load(tmp_path).root == tmp_path / "images"


def corners(box):
    left, top, width, height = box
    return [left, top, left + width, top + height]


SPREAD = [[60, 10, 30, 20], [50, 45, 40, 30], [5, 5, 20, 20]]


def kinds(folder, boxes, areas=(None,) * 9, size=None, picture_size=(100, 80)):
    """The kinds of problems of these boxes in an image of 100 x 80."""
    entries = [
        annotation(id=i, bbox=box, **({} if area is None else {"area": area}))
        for i, (box, area) in enumerate(zip(boxes, areas, strict=False))
    ]
    content = coco(annotations=entries)
    for entry in entries:
        if areas[0] is None:
            entry.pop("area", None)
    content["images"][0] |= size or {"width": 100, "height": 80}
    picture(folder / "train" / "a.jpg", picture_size)
    (folder / "train.json").write_text(json.dumps(content))
    return load(folder)


@pytest.mark.parametrize("size", [None, {"width": None, "height": None}])
def test_boxes_that_are_corners_by_where_they_would_reach(tmp_path, size):
    found = kinds(tmp_path, list(map(corners, SPREAD)), size=size)
    assert [(each.kind, each.fatal) for each in found.problems] == [("not a box", True)] * 3
    assert found.problems[0].message == (
        "its bbox [60, 10, 90, 30] seems to be corners (xyxy), as all are; COCO has x, y, width, height "
        "in pixels"
    )


def test_no_sizes_are_read_of_images_elsewhere(tmp_path):
    picture(tmp_path / "elsewhere" / "b.jpg")
    images = [{"id": 1, "file_name": str(tmp_path / "elsewhere" / "b.jpg")}]
    boxes = [{"id": i, "image_id": 1, "category_id": 5, "bbox": corners(box)} for i, box in enumerate(SPREAD)]
    found = load(plain(tmp_path / "here", coco(images, boxes)))
    assert [each.kind for each in found.problems] == ["missing image"]


def test_boxes_that_are_corners_by_their_areas(tmp_path):
    assert len(kinds(tmp_path, [[5, 5, 20, 30]], [15 * 25]).problems) == 1
    found = kinds(tmp_path, [[0.5, 0, 20, 30], [5, 5, 20, 31], [5, 5, 9, 9]], [19.5 * 30, 15 * 26, 3])
    assert len(found.problems) == 3


@pytest.mark.parametrize(
    ("boxes", "areas"),
    [
        (SPREAD, (None,) * 3),
        ([[5, 5, 20, 30], [1, 2, 30, 40]], (600, 1200)),
        ([[5, 5, 20, 30], [1, 2, 30, 40]], (None,) * 2),
        ([[0, 0, 20, 30], [0, 0, 30, 40]], (600, 1200)),
        ([[10, 10, 98, 60], [5, 5, 20, 30], [5, 5, 20, 31]], (None,) * 3),
        ([[10, 10, 92, 75]], (None,)),
        ([[20, 10, 81, 71], [10, 20, 90, 61]], (None,) * 2),
        ([[60, 10, 90, 30], [50, 45, 90, 75], [5, 5, 4, 20]], (None,) * 3),
        ([[60, 10, 90, 30], [50, 45, 90, 75]], (2700, 6750)),
        ([[60, 10, 190, 30], [50, 45, 90, 75]], (None,) * 2),
    ],
)
def test_boxes_that_may_be_cocos_are_taken_for_them(tmp_path, boxes, areas):
    assert "not a box" not in {each.kind for each in kinds(tmp_path, boxes, areas).problems}


def test_corners_in_parts_of_the_image(tmp_path):
    found = kinds(tmp_path, [[0.6, 0.7, 0.9, 1.0], [0.5, 0.1, 0.7, 0.4]])
    assert [each.kind for each in found.problems] == ["not a box"] * 2


@pytest.mark.parametrize(
    ("categories", "told"),
    [
        (["cat", "dog"], 'its categories are no objects, but "cat"; COCO has {"id": 1, "name": "cat"}'),
        (
            [{"name": "cat"}],
            'its categories have no id, as {"name": "cat"}; COCO has {"id": 1, "name": "cat"}',
        ),
        (
            [{"id": 0, "name": "background"}],
            'nothing uses its categories, and none names a class, as {"id": 0',
        ),
        ([], "there are no categories"),
    ],
)
def test_why_there_are_no_classes(tmp_path, categories, told):
    with pytest.raises(AnnotationError) as error:
        load(plain(tmp_path, coco() | {"categories": categories}))
    assert told in str(error.value)


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
