from dataclasses import fields, replace

import numpy as np
import pytest
from made_data import annotation, coco, plain

from ssd.data import AnnotationError, Problem, load


@pytest.fixture
def three(tmp_path):
    """Annotations of the images a, b and c, with two, none and one box."""
    names = ["a.jpg", "b.jpg", "c.jpg"]
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    boxes = [annotation(id=i, image_id=image, bbox=[i, 0, 9, 9]) for i, image in enumerate([0, 2, 0])]
    return load(plain(tmp_path, coco(images, boxes), names))


def test_the_boxes_of_an_image(three):
    assert three.starts.tolist() == [0, 2, 2, 3]
    assert [three.boxes[three.of_image(i)][:, 0].tolist() for i in (0, 1, 2, -1)] == [[0, 2], [], [1], [1]]
    with pytest.raises(IndexError):
        three.of_image(3)


@pytest.mark.parametrize("images", [[2, 0], [1], [], [0, 0, 2], [-1]])
def test_some_of_the_images(three, images):
    some = three.select(images)
    assert some.file_names.tolist() == [three.file_names[i] for i in images]
    assert some.image_ids == tuple(three.image_ids[i] for i in images)
    assert some.starts.dtype == three.starts.dtype
    for k, i in enumerate(images):
        np.testing.assert_array_equal(some.boxes[some.of_image(k)], three.boxes[three.of_image(i)])
    assert len(some.boxes) == len(some.labels) == len(some.crowd) == len(some.areas) == len(some.usable)
    assert len(some.areas_given) == len(some.boxes)
    assert some.root == three.root
    assert some.source == three.source


def test_without_some_images(three):
    assert three.without({"a.jpg", "nowhere.jpg"}).file_names.tolist() == ["b.jpg", "c.jpg"]


def test_paths_are_below_the_root(three):
    assert three.path(1) == three.root / "b.jpg"
    assert three.path(1).is_file()


@pytest.mark.parametrize("name", ["/etc/hostname", "../a.jpg", "sub/../../a.jpg"])
def test_no_path_leads_out_of_the_root(three, name):
    with pytest.raises(AnnotationError, match=r"leads out of .*train"):
        replace(three, file_names=np.array([name])).path(0)


def test_the_record_knows_no_format(three):
    """What a reader has to add to a message or a rule travels as data."""
    assert "format" not in {each.name for each in fields(three)}
    assert (three.notes, three.labels_hint) == ((), "")


def test_problems_as_text():
    assert str(Problem("zero area", "a.jpg", "7", "has no area")) == "a.jpg, annotation 7: has no area"
    assert str(Problem("missing image", "a.jpg", "", "is gone")) == "a.jpg: is gone"
    assert Problem("x", "y", "", "z").fatal


def test_an_annotation_error_is_caught_by_its_old_name(tmp_path):
    with pytest.raises(ValueError, match="no dataset of a known layout"):
        load(tmp_path)
    assert issubclass(AnnotationError, ValueError)
