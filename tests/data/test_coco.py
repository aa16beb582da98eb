import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from made_data import annotation, as_roboflow, coco, picture, plain

from ssd.data import AnnotationError, find_split, load


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
    "name", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg", "C:\\x.jpg", "..\\x.jpg", "a\0.jpg", ""]
)
def test_file_names_cannot_leave_the_folder(tmp_path, name):
    picture(tmp_path / "x.jpg")
    (tmp_path / "data").mkdir()
    plain(tmp_path / "data", coco([{"id": 1, "file_name": name}]), names=())
    with pytest.raises(AnnotationError, match="leads out of"):
        load(tmp_path / "data")


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
