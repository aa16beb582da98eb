from pathlib import Path

import pytest
from made_data import annotation, coco, picture, plain
from PIL import Image

from ssd.data import AnnotationError, DetectionDataset, load, usable_for_evaluation
from ssd.data.builder import Builder, decode, read_text


def test_a_models_classes_decide_the_labels(tmp_path):
    plain(tmp_path)
    found = load(tmp_path, class_names=("bird", "cat", "cow", "dog"))
    assert found.labels.tolist() == [2]
    assert found.category_ids[1] == 5
    assert found.category_ids[3] == 2
    assert len(set(found.category_ids)) == 4


def made(folder, names=("cat", "dog"), ids=(5, 2), wanted=None):
    """A builder of one image, and the labels of its categories."""
    picture(folder / "a.jpg")
    builder = Builder(Path("x.json"), folder)
    labels = builder.set_classes(list(names), ids, wanted)
    assert builder.add_image("a.jpg", 1, 100, 80) == 0
    return builder, labels


def test_a_category_that_is_none_of_the_classes_is_a_problem_of_its_boxes(tmp_path):
    builder, labels = made(tmp_path, ("dog", "cat"), wanted=("cat", "bird"))
    assert labels == [None, 1]
    builder.add_box(0, "7", (1, 2, 3, 4), labels[0], category="dog")
    builder.add_box(0, "8", (1, 2, 3, 4), labels[1], category="cat")
    found = builder.build()
    assert [str(each) for each in found.problems] == [
        "a.jpg, annotation 7: its category 'dog' is none of the classes cat, bird"
    ]
    assert found.problems[0].kind == "unknown category id"
    assert found.labels.tolist() == [1]
    assert found.class_names == ("cat", "bird")


def test_a_category_that_nothing_uses_stops_nothing(tmp_path):
    builder, labels = made(tmp_path, ("_background_", "cat"), wanted=("cat",))
    builder.add_box(0, "8", (1, 2, 3, 4), labels[1])
    assert builder.build().problems == ()


def test_without_categories_nothing_can_be_learned(tmp_path):
    with pytest.raises(AnnotationError, match=r"x\.json: there are no categories"):
        made(tmp_path, ())


@pytest.mark.parametrize("encoding", ["gbk", "latin-1"])
def test_class_names_that_are_not_utf_8_are_refused_before_they_become_one(tmp_path, encoding):
    names = ["\u6c7d\u8f66", "\u884c\u4eba"] if encoding == "gbk" else ["\xe9", "\xe8"]
    decoded = [decode(name.encode(encoding)) for name in names]
    assert decoded[0] == decoded[1]
    with pytest.raises(
        AnnotationError, match=r"x\.json: the class name '\ufffd+' was not saved as UTF-8; save"
    ):
        made(tmp_path, decoded)


def test_categories_of_one_name_are_one_class_and_a_problem_where_several_have_boxes(tmp_path):
    names, ids = ("cat", "dog", "cat", "cat"), (1, 2, 3, 4)
    builder, labels = made(tmp_path, names, ids)
    builder.add_box(0, "1", (1, 2, 3, 4), labels[2])
    builder.add_box(0, "2", (2, 2, 3, 4), labels[1])
    found = builder.build()
    assert (found.class_names, found.category_ids) == (("cat", "dog"), (1, 2))
    assert found.labels.tolist() == [1, 2]
    assert found.problems == ()
    for other in (0, 3):
        builder, labels = made(tmp_path, names, ids)
        builder.add_box(0, "1", (1, 2, 3, 4), labels[2])
        builder.add_box(0, "2", (2, 2, 3, 4), labels[other])
        found = builder.build()
        assert found.labels.tolist() == [1, 1]
        (problem,) = found.problems
        assert (problem.kind, problem.fatal) == ("duplicate category", True)
        assert "2 categories with boxes are called 'cat'" in problem.message


def test_a_name_that_leads_out_is_a_problem_of_its_image(tmp_path):
    picture(tmp_path / "secret.jpg")
    builder, labels = made(tmp_path / "images")
    for written in ("../secret.jpg", str(tmp_path / "secret.jpg")):
        index = builder.add_image(written, written, 100, 80)
        builder.add_box(index, "1", (1, 2, 3, 4), labels[0])
    found = builder.build()
    assert [each.kind for each in found.problems] == ["missing image"] * 2
    assert "names a file elsewhere" in found.problems[0].message
    for i in (1, 2):
        with pytest.raises(AnnotationError, match="leads out"):
            found.path(i)
    assert usable_for_evaluation(found, lenient=True).file_names.tolist() == ["a.jpg"]


def test_images_that_are_called_otherwise_are_told_once(tmp_path):
    builder, _ = made(tmp_path)
    picture(tmp_path / "b.jpg")
    builder.add_image("D:\\x\\B.JPG", 2, 100, 80)
    found = builder.build()
    assert found.file_names.tolist() == ["a.jpg", "b.jpg"]
    (note,) = found.notes
    assert note.startswith("1 of 2 images were found by the last parts of their names")
    assert note.endswith("such as b.jpg for D:\\x\\B.JPG")


def test_of_two_names_for_one_file_the_exact_one_has_it(tmp_path):
    builder, _ = made(tmp_path)
    builder.add_image("/elsewhere/a.jpg", 2, 100, 80)
    found = builder.build()
    (problem,) = found.problems
    assert (problem.kind, problem.file) == ("missing image", "/elsewhere/a.jpg")
    assert "may be that of 'a.jpg'" in problem.message
    assert found.notes == ()
    picture(tmp_path / "sub" / "b.jpg")
    builder, _ = made(tmp_path)
    for written in ("x/b.jpg", "y/b.jpg"):
        builder.add_image(written, written, 100, 80)
    assert [each.file for each in builder.build().problems] == ["x/b.jpg", "y/b.jpg"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_text_with_any_byte_order_mark(tmp_path, encoding):
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    (tmp_path / "x").write_bytes(mark + "Tür\r\nKatze\rx\n".encode(encoding))
    assert read_text(tmp_path / "x") == "Tür\nKatze\nx\n"


def test_bytes_that_are_no_text_become_question_marks():
    assert decode(b"a\xff b") == "a\N{REPLACEMENT CHARACTER} b"
    assert decode(b"") == ""


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
