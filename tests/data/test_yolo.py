import os

import numpy as np
import pytest
from made_data import BOX, as_yolo, picture

from ssd.data import AnnotationError, DetectionDataset, find_split, load


def test_yolo_names_must_be_numbered(tmp_path):
    as_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: {1: dog, 2: cat}\n")
    with pytest.raises(AnnotationError, match="number the classes from 0"):
        load(tmp_path)


def test_images_of_one_name_in_two_folders_have_two_ids(tmp_path):
    for folder in ("s1", "s2"):
        as_yolo(tmp_path, f"images/{folder}")
    (tmp_path / "data.yaml").write_text("train: [images/s1, images/s2]\nnames: [dog, cat]\n")
    assert load(tmp_path).image_ids == ("s1/a", "s2/a")


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


def test_yolo_images_whose_size_cannot_be_read_are_refused(tmp_path):
    as_yolo(tmp_path)
    (tmp_path / "images/train/b.jpg").write_bytes(b"no image")
    (tmp_path / "labels/train/b.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    found = load(tmp_path)
    assert [(each.kind, each.file) for each in found.problems] == [("unreadable image", "b.jpg")]
    with pytest.raises(AnnotationError, match=r"unreadable image: 1"):
        DetectionDataset(found)
    assert len(DetectionDataset(found, lenient=True)) == 1


def labels(folder, *texts):
    """A dataset of one image for each label file: a.jpg, b.jpg, ... of 100x80."""
    for letter, text in zip("abcdef", texts, strict=False):
        picture(folder / "images" / f"{letter}.jpg")
        path = folder / "labels" / f"{letter}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / "data.yaml").write_text("train: images\nnames: [dog, cat, traffic light]\n")
    return folder


@pytest.mark.parametrize(
    "line",
    [
        "1 0.25 0.5 0.3 0.5",
        "1\t0.25\t0.5\t0.3\t0.5",
        "  1   0.25 0.5 0.3 0.5  ",
        "1,0.25,0.5,0.3,0.5",
        "1, 0.25, 0.5, 0.3, 0.5,",
        "1;0.25;0.5;0.3;0.5",
        "1 0,25 0,5 0,3 0,5",
        "1;0,25;0,5;0,3;0,5",
        "1.0 0.25 0.5 0.3 0.5",
        "cat 0.25 0.5 0.3 0.5",
        "\ufeff1 0.25 0.5 0.3 0.5\r\n",
        "1 2.5e-1 .5 3E-1 +0.5",
        "1 0.25 0.5 0.3 0.5 0.9",
        "1 0.1 0.25 0.4 0.25 0.4 0.75 0.1 0.75",
        "1 0.1 0.25 0.4 0.5 0.2 0.75",
    ],
)
def test_ways_to_write_a_box(tmp_path, line):
    found = load(labels(tmp_path, line))
    assert found.problems == ()
    np.testing.assert_allclose(found.boxes, [BOX])
    assert found.labels.tolist() == [2]


def test_class_names_in_place_of_numbers(tmp_path):
    found = load(labels(tmp_path, "traffic light 0.25 0.5 0.3 0.5\ntraffic light\t0.25\t0.5\t0.3\t0.4"))
    assert found.labels.tolist() == [3, 3]
    (tmp_path / "data.yaml").write_text("train: images\nnames: [02146, 1]\n")
    (tmp_path / "labels/a.txt").write_text("02146 0.25 0.5 0.3 0.5\n1 0.25 0.5 0.3 0.4\n0 0.25 0.5 0.3 0.3\n")
    assert load(tmp_path).labels.tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ("1 25 40 30 40", "not a box", "divide pixels by its size (100x80), per cent by 100: 1 25 40 30 40"),
        ("1 10 20 40 20 40 60 10 60", "not a box", "divide pixels by its size"),
        ("1 0.25 0.5 30 0.5", "not a box", "divide pixels"),
        (
            "7  0.25 0.5\t0.3 0.5",
            "unknown category id",
            "is none of 0 to 2, nor one of their names: 7  0.25 0.5\t0.3",
        ),
        ("-1 0.25 0.5 0.3 0.5", "unknown category id", "its class is none of 0 to 2"),
        ("bird 0.25 0.5 0.3 0.5", "unknown category id", ": bird 0.25"),
        ("1 0.25 0.5 0.3 0.5 45", "not a box", "is no confidence from 0 to 1; if it is an angle"),
        ("1 0.25 0.5 0.3", "not a box", "3 numbers behind the class are no box (4)"),
        ("1 0.2 0.2 0.4 nan 0.3 0.5", "not a box", "not a class and the numbers of a box: 1 0.2"),
        ("1 0.2 0.2 0.4 1_0", "not a box", "not a class and the numbers of a box"),
        ("a photo of a cat, " * 20, "not a box", "a photo of a cat"),
    ],
)
def test_a_line_that_is_wrong_is_told_as_it_stands(tmp_path, line, kind, message):
    found = load(labels(tmp_path, f"0 0.5 0.5 0.2 0.2\n{line}\n", "0 0.5 0.5 0.2 0.2"))
    (problem,) = found.problems
    assert (problem.kind, problem.file, problem.annotation, problem.fatal) == (kind, "a.jpg", "a.txt:2", True)
    assert message in problem.message
    assert len(problem.message) < 300
    assert len(DetectionDataset(found, lenient=True)) == 2


@pytest.mark.parametrize("junk", [b"\0\1\2\3" * 20, b"0 0.5 0.5 0.2 0.2\0\n"])
def test_a_label_file_that_is_no_text_leaves_its_image_out(tmp_path, junk):
    found = load(labels(tmp_path, junk, "0 0.5 0.5 0.2 0.2", ""))
    (problem,) = found.problems
    assert (problem.file, problem.fatal) == ("a.jpg", True)
    assert "its label file a.txt is no text" in problem.message
    kept = DetectionDataset(found, lenient=True).annotations
    assert kept.file_names.tolist() == ["b.jpg", "c.jpg"]


def test_a_label_file_that_cannot_be_read_leaves_its_image_out(tmp_path):
    labels(tmp_path, "", "0 0.5 0.5 0.2 0.2")
    (tmp_path / "labels/a.txt").unlink()
    (tmp_path / "labels/a.txt").mkdir()
    found = load(tmp_path)
    (problem,) = found.problems
    assert "its label file a.txt cannot be read (Is a directory)" in problem.message
    assert DetectionDataset(found, lenient=True).annotations.file_names.tolist() == ["b.jpg"]


def test_an_empty_label_file_is_a_background_image(tmp_path):
    found = load(labels(tmp_path, "", "\n \r\n", "0 0.5 0.5 0.2 0.2"))
    assert (found.problems, found.notes) == ((), ())
    assert np.diff(found.starts).tolist() == [0, 0, 1]


def test_images_without_a_label_file_are_background_and_told(tmp_path):
    labels(tmp_path, "0 0.5 0.5 0.2 0.2", "", "")
    (tmp_path / "labels/b.txt").unlink()
    found = load(tmp_path)
    assert found.problems == ()
    assert found.notes == ("1 of 3 images have no label file and count as background, such as b.jpg",)


def test_labels_that_fit_no_image_are_refused_where_images_have_none(tmp_path):
    labels(tmp_path, "0 0.5 0.5 0.2 0.2", "0 0.5 0.5 0.2 0.2\n1 0.5 0.5 0.2 0.2", "")
    (tmp_path / "labels/b.txt").rename(tmp_path / "labels/IMG_7.txt")
    found = load(tmp_path)
    first, second = found.problems
    assert first.message == (
        "1 label files with 2 objects are no image's, such as labels/IMG_7.txt, while 1 images have no label "
        "file, such as b.jpg; call each label file like its image, and remove those whose images are gone"
    )
    assert (first.kind, second.file) == ("label files without an image", "b.jpg")
    with pytest.raises(AnnotationError, match="label files without an image: 1"):
        DetectionDataset(found)
    assert DetectionDataset(found, lenient=True).annotations.file_names.tolist() == ["a.jpg", "c.jpg"]


def test_labels_of_images_that_are_gone_are_told_where_nothing_becomes_background(tmp_path):
    labels(tmp_path, "0 0.5 0.5 0.2 0.2", "0 0.5 0.5 0.2 0.2")
    (tmp_path / "images/b.jpg").unlink()
    found = load(tmp_path)
    assert found.problems == ()
    assert found.notes == (
        "1 label files with 1 objects are no image's, such as labels/b.txt; they are not used",
    )


def test_images_of_suffixes_that_are_not_read_are_told_where_they_have_labels(tmp_path):
    labels(tmp_path, "0 0.5 0.5 0.2 0.2", "0 0.5 0.5 0.2 0.2", "0 0.5 0.5 0.2 0.2")
    (tmp_path / "images/b.jpg").rename(tmp_path / "images/b.jpg_large")
    (tmp_path / "images/c.jpg").write_bytes(b"8BPS" + bytes(100))
    (tmp_path / "images/c.jpg").rename(tmp_path / "images/c.psd")
    (tmp_path / "images/notes.docx").write_bytes(b"PK")
    found = load(tmp_path)
    assert found.file_names.tolist() == ["a.jpg", "b.jpg_large", "c.psd"]
    (problem,) = found.problems
    assert (problem.kind, problem.file) == ("unreadable image", "c.psd")
    kept = DetectionDataset(found, lenient=True)
    assert [kept[i][1]["labels"].tolist() for i in range(2)] == [[1], [1]]


def test_linked_folders_are_read(tmp_path):
    labels(tmp_path / "store", "1 0.25 0.5 0.3 0.5")
    for kind in ("images", "labels"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        os.symlink(tmp_path / "store" / kind, tmp_path / "data" / kind / "more")
    (tmp_path / "data/data.yaml").write_text("train: images\nnames: [dog, cat]\n")
    found = load(tmp_path / "data")
    assert found.problems == ()
    np.testing.assert_allclose(found.boxes, [BOX])
    assert len(DetectionDataset(found)) == 1


def test_the_folder_of_the_images_can_be_given(tmp_path):
    labels(tmp_path / "data", "1 0.25 0.5 0.3 0.5")
    (tmp_path / "data" / "images").rename(tmp_path / "photos")
    with pytest.raises(AnnotationError, match=r"there is no folder images; .* holds labels/, data\.yaml"):
        load(tmp_path / "data")
    found = load(tmp_path / "data", images=tmp_path / "photos")
    assert found.problems == ()
    assert found.root == tmp_path / "photos"
    np.testing.assert_allclose(found.boxes, [BOX])


def test_the_folder_of_the_images_of_all_splits_can_be_given(tmp_path):
    for split, letter in (("train", "a"), ("val", "b")):
        picture(tmp_path / "photos" / f"{letter}.jpg")
        (tmp_path / "data/labels" / split).mkdir(parents=True)
        (tmp_path / "data/labels" / split / f"{letter}.txt").write_text("1 0.25 0.5 0.3 0.5\n")
    (tmp_path / "data/data.yaml").write_text("train: images/train\nval: images/val\nnames: [dog, cat]\n")
    for split, letter in (("train", "a"), ("val", "b")):
        assert find_split(tmp_path / "data", split)
        found = load(tmp_path / "data", split, images=tmp_path / "photos")
        assert (found.file_names.tolist(), found.problems) == ([f"{letter}.jpg"], ())
        np.testing.assert_allclose(found.boxes, [BOX])


def test_lists_name_images_of_other_machines(tmp_path):
    labels(tmp_path, "1 0.25 0.5 0.3 0.5", "1 0.25 0.5 0.3 0.5", "")
    lines = [
        "/content/x/images/a.jpg",
        "",
        "D:\\data\\b.JPG",
        "../../secret.jpg",
        "images/gone.jpg",
        "./images/c.jpg",
    ]
    (tmp_path / "train.txt").write_text("\r\n".join(lines))
    (tmp_path / "data.yaml").write_text("train: train.txt\nnames: [dog, cat]\n")
    picture(tmp_path.parent / "secret.jpg")
    found = load(tmp_path)
    assert found.file_names.tolist() == ["a.jpg", "b.jpg", "c.jpg"]
    assert np.diff(found.starts).tolist() == [1, 1, 0]
    assert [(each.kind, each.annotation) for each in found.problems] == [
        ("missing image", "line 4"),
        ("missing image", "line 5"),
    ]
    assert "../../secret.jpg: names a file elsewhere" in found.problems[0].message
    assert "images/gone.jpg: there is no such file in" in found.problems[1].message
    (note,) = found.notes
    assert "2 images are listed by paths that are not here" in note
    assert len(DetectionDataset(found, lenient=True)) == 3


def test_a_split_without_images_says_where_they_were_looked_for(tmp_path):
    labels(tmp_path, "1 0.25 0.5 0.3 0.5")
    (tmp_path / "images/a.jpg").unlink()
    with pytest.raises(
        AnnotationError, match=r"there are no images in .*images; if they are elsewhere.*--images"
    ):
        DetectionDataset(load(tmp_path))


def test_one_label_file_for_two_images_is_told(tmp_path):
    labels(tmp_path, "1 0.25 0.5 0.3 0.5")
    picture(tmp_path / "images/a.png")
    assert load(tmp_path).notes == (
        "1 label files are read for several images each, such as labels/a.txt for a.jpg and a.png",
    )


def test_a_models_classes_and_others(tmp_path):
    labels(tmp_path, "1 0.25 0.5 0.3 0.5\n0 0.5 0.5 0.2 0.2")
    found = load(tmp_path, class_names=("cat", "traffic light"))
    assert found.labels.tolist() == [1]
    (problem,) = found.problems
    assert problem.message == "its category 'dog' is none of the classes cat, traffic light"
