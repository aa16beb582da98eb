import pytest
from made_data import annotation, coco, picture, plain
from PIL import Image

from ssd.data import AnnotationError, DetectionDataset, load


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


def test_boxes_outside_are_found_where_the_file_gives_no_sizes(tmp_path):
    boxes = [annotation(), annotation(id=2, bbox=[500, 5, 10, 10])]
    found = load(plain(tmp_path, coco([{"id": 1, "file_name": "a.jpg"}], boxes)))
    assert found.sizes.tolist() == [[100, 80]]
    assert [each.kind for each in found.problems] == ["box outside"]


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_headers_tell_the_size_of_the_upright_image(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "train" / f"a.{suffix}", (80, 100), exif=exif)
    content = coco([{"id": 1, "file_name": f"a.{suffix}"}])
    found = load(plain(tmp_path, content, names=()))
    assert found.sizes.tolist() == [[100, 80]]
    assert DetectionDataset(found)[0][0].size == (100, 80)
