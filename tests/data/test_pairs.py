import os
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ssd.data.pairs import count_objects, in_any_case, label_folders, pair

LINE = "0 0.5 0.5 0.2 0.2\n"


def tree(root, *names):
    """Files: of a label file, one object."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(LINE if name.lower().endswith(".txt") else "")
    return root


def paired(root, listing, split="train"):
    """The label file of each image below a folder, with what is in doubt and what is nobody's."""
    images = sorted(
        str(path) for path in (root / listing).rglob("*") if path.suffix.lower() in (".jpg", ".png")
    )
    found = pair(images, [str(root / listing)], str(root), split)
    short = lambda path: path and os.path.relpath(path, root)  # noqa: E731
    labels = dict(zip(map(short, found.images), map(short, found.labels), strict=True))
    doubtful = {short(found.images[i]): list(map(short, some)) for i, some in found.doubtful.items()}
    return labels, doubtful, {short(label): count for label, count in found.strays.items()}


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/train/a.jpg", "labels/train/a.txt"),
        ("images/train/s/a.jpg", "labels/train/s/a.txt"),
        ("train/images/a.jpg", "train/labels/a.txt"),
        ("train/a.jpg", "train/labels/a.txt"),
        ("train/a.jpg", "labels/train/a.txt"),
        ("train/a.jpg", "train/a.txt"),
        ("frames/a.jpg", "labels/a.txt"),
        ("Images/a.jpg", "Labels/a.txt"),
        ("IMAGES/train/a.jpg", "LABELS/Train/a.txt"),
        ("JPEGImages/a.jpg", "labels/a.txt"),
        ("some/images/a.jpg", "some/images/a.txt"),
        ("images/train/a.jpg", "labels/train/a.jpg.txt"),
        ("images/a.JPG", "labels/a.TXT"),
        ("images/IMG_1.JPG", "labels/img_1.txt"),
        ("images/a b.jpg", "labels/a%20b.txt"),
        ("images/a%20b.jpg", "labels/a b.txt"),
        ("images/é.jpg", "labels/e\u0301.txt"),
        ("images/a.b.c.jpg", "labels/a.b.c.txt"),
        ("images/train/cam1/a.jpg", "labels/train/a.txt"),
        ("images/train/a.jpg", "labels/a.txt"),
        ("train/images/a.jpg", "labels/train/a.txt"),
        ("photos/x/a.jpg", "yolo/a.txt"),
        ("images/photo 1.jpg", "labels/0a1b2c3d-photo 1.txt"),  # of Label Studio, beside one's own photos
    ],
)
def test_where_the_label_file_of_an_image_may_be(tmp_path, image, label):
    tree(tmp_path, image, label)
    assert paired(tmp_path, ".") == ({image: label}, {}, {})


def test_the_nearest_place_and_spelling_come_first(tmp_path):
    tree(tmp_path, "images/a.jpg", "labels/a.txt", "images/a.txt", "labels/a.jpg.txt")
    labels, doubtful, strays = paired(tmp_path, "images")
    assert (labels, doubtful) == ({"images/a.jpg": "labels/a.txt"}, {})
    assert set(strays) == {"images/a.txt", "labels/a.jpg.txt"}
    tree(tmp_path / "x", "images/A.jpg", "images/a.jpg", "labels/a.txt", "labels/A.txt")
    assert paired(tmp_path / "x", "images")[0] == {
        "images/A.jpg": "labels/A.txt",
        "images/a.jpg": "labels/a.txt",
    }


def test_whole_names_with_the_suffix_are_told_apart_by_letter_case(tmp_path):
    tree(tmp_path, "images/A.jpg", "images/a.jpg", "labels/A.jpg.txt", "labels/a.jpg.txt")
    labels, _, strays = paired(tmp_path, "images")
    assert labels == {"images/A.jpg": "labels/A.jpg.txt", "images/a.jpg": "labels/a.jpg.txt"}
    assert strays == {}


def test_a_spelling_that_two_images_have_is_nobodys(tmp_path):
    tree(tmp_path, "images/A.jpg", "images/a.jpg", "labels/%41.txt")
    labels, doubtful, _ = paired(tmp_path, "images")
    assert set(labels.values()) == {None}
    assert doubtful == {name: ["labels/%41.txt"] for name in labels}


def test_a_label_file_elsewhere_is_taken_only_if_it_can_be_no_others(tmp_path):
    tree(tmp_path, "images/train/s1/a.jpg", "images/train/s2/a.jpg", "labels/train/a.txt")
    labels, doubtful, strays = paired(tmp_path, "images/train")
    assert set(labels.values()) == {None}
    assert doubtful == {name: ["labels/train/a.txt"] for name in labels}
    assert strays == {}
    tree(tmp_path, "labels/train/s1/a.txt", "labels/train/s2/a.txt")
    labels, doubtful, strays = paired(tmp_path, "images/train")
    assert labels == {f"images/train/s{i}/a.jpg": f"labels/train/s{i}/a.txt" for i in (1, 2)}
    assert (doubtful, strays) == ({}, {"labels/train/a.txt": 1})


@pytest.mark.parametrize(
    ("label", "line"),
    [("runs/detect/predict/labels/5.txt", LINE), ("odd/5.txt", "0 0.5 0.5 0.2 0.2 0.91\n")],
)
def test_what_a_network_found_is_not_taken_for_labels(tmp_path, label, line):
    tree(tmp_path, "images/train/5.jpg", "images/train/6.jpg", "labels/train/6.txt", label)
    (tmp_path / label).write_text(line)
    labels, doubtful, _ = paired(tmp_path, "images/train")
    assert labels["images/train/5.jpg"] is None
    assert doubtful == {"images/train/5.jpg": [label]}


def test_label_files_in_another_place_are_told(tmp_path):
    tree(tmp_path, "images/train/5.jpg", "images/train/6.jpg", "labels/train/6.txt", "odd/5.txt")
    images = [str(tmp_path / f"images/train/{number}.jpg") for number in (5, 6)]
    found = pair(images, [str(tmp_path / "images/train")], str(tmp_path), "train")
    assert found.labels[0] == str(tmp_path / "odd/5.txt")
    assert found.elsewhere == [0]


def test_labels_of_another_split_are_in_doubt_and_never_taken(tmp_path):
    tree(tmp_path, "images/val/a.jpg", "labels/train/a.txt", "images/train/b.jpg", "labels/train/b.txt")
    labels, doubtful, _ = paired(tmp_path, "images/val", "val")
    assert labels == {"images/val/a.jpg": None}
    assert doubtful == {"images/val/a.jpg": ["labels/train/a.txt"]}
    assert paired(tmp_path, "images/train")[2] == {"labels/train/a.txt": 1}


def test_labels_in_a_folder_of_any_name_are_told_apart_by_their_split(tmp_path):
    for split in ("train", "val"):
        tree(tmp_path, f"{split}/a.jpg", f"yolo/{split}_txt/a.txt")
    for split in ("train", "val"):
        assert paired(tmp_path, split, split) == ({f"{split}/a.jpg": f"yolo/{split}_txt/a.txt"}, {}, {})


def test_two_uploads_of_one_name_are_in_doubt(tmp_path):
    tree(tmp_path, "images/a.jpg", "labels/0a1b2c3d-a.txt", "labels/ffffffff-a.txt")
    labels, doubtful, _ = paired(tmp_path, "images")
    assert labels == {"images/a.jpg": None}
    assert doubtful == {"images/a.jpg": ["labels/0a1b2c3d-a.txt", "labels/ffffffff-a.txt"]}


def test_background_images_of_names_that_other_splits_have_stay_background(tmp_path):
    tree(tmp_path, "images/val/a.jpg", "images/train/a.jpg", "labels/train/a.txt", "labels/val/x.json")
    assert paired(tmp_path, "images/val", "val") == ({"images/val/a.jpg": None}, {}, {})


def test_one_folder_of_labels_for_all_splits(tmp_path):
    tree(
        tmp_path,
        "images/train/a.jpg",
        "images/val/b.jpg",
        "labels/a.txt",
        "labels/b.txt",
        "images/train/c.jpg",
    )
    assert paired(tmp_path, "images/train") == (
        {"images/train/a.jpg": "labels/a.txt", "images/train/c.jpg": None},
        {},
        {},
    )


def test_text_files_that_hold_no_labels_are_no_strays(tmp_path):
    tree(tmp_path, "a.jpg", "a.txt", "b.jpg")
    for name in ("classes.txt", "train.txt", "README.txt", "notes.txt"):
        (tmp_path / name).write_text("dog\n./images/a.jpg\nThis is a data set of 4 dogs and 5 cats\n")
    assert paired(tmp_path, ".") == ({"a.jpg": "a.txt", "b.jpg": None}, {}, {})


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("0 0.5 0.5 0.2 0.2", 1),
        ("0 0.5 0.5 0.2 0.2\r\n\r\ncat 0.1 0.1 0.2 0.2 0.3 0.1\n", 2),
        ("0,0.5,0.5,0.2,0.2\n", 1),
        ("dog\ncat\n", 0),
        ("images/a.jpg 1 2 3 4\n", 1),
        ("\0\1\2", 0),
    ],
)
def test_counting_objects(tmp_path, text, count):
    (tmp_path / "x.txt").write_bytes(text.encode())
    assert count_objects(str(tmp_path / "x.txt")) == count
    assert count_objects(str(tmp_path)) == 0


def test_nothing_is_looked_for_above_the_dataset(tmp_path):
    """Below a folder that is itself called images, and beside one that is called labels."""
    tree(tmp_path, "labels/data/a.txt", "images/data/a.jpg")
    root = str(tmp_path / "images" / "data")
    assert label_folders(root, root) == [root]
    assert pair([f"{root}/a.jpg"], [root], root, "train").labels == [None]


def test_paths_in_any_case(tmp_path):
    tree(tmp_path, "Images/Train/a.jpg", "two/x/a", "TWO/x/a")
    assert in_any_case(tmp_path, ["images", "train"]) == tmp_path / "Images" / "Train"
    assert in_any_case(tmp_path, ["two", "x"]) == tmp_path / "two" / "x"
    assert in_any_case(tmp_path, ["Two", "x"]) is None
    assert in_any_case(tmp_path, ["gone"]) is None
    assert in_any_case(tmp_path, []) == tmp_path


STEMS = st.sampled_from(["a", "b", "B", "c", "c d", "c%20d", "é", "e\u0301", "a.jpg"])
FOLDERS = st.sampled_from(["", "s/", "t/", "s/u/"])


@settings(max_examples=150, deadline=None)
@given(
    images=st.sets(st.tuples(FOLDERS, STEMS), min_size=1, max_size=7),
    labels=st.sets(st.tuples(FOLDERS, STEMS), max_size=7),
)
def test_no_label_file_is_lost_and_none_is_taken_twice(tmp_path_factory, images, labels):
    root = tree(
        tmp_path_factory.mktemp("pairs"),
        *(f"images/{folder}{stem}.jpg" for folder, stem in images),
        *(f"labels/{folder}{stem}.txt" for folder, stem in labels),
    )
    found, doubtful, strays = paired(root, "images")
    assert set(found) == {f"images/{folder}{stem}.jpg" for folder, stem in images}
    taken = [label for label in found.values() if label]
    assert len(taken) == len(set(taken)) or {"a", "a.jpg"} & {stem for _, stem in images}
    # Each label file is an image's, in doubt, or told as nobody's.
    every = {f"labels/{folder}{stem}.txt" for folder, stem in labels}
    told = {*taken, *strays, *(label for some in doubtful.values() for label in some)}
    assert told == every
    assert not set(strays) & set(taken)
    # What is called alike, in the same folder, belongs together.
    for folder, stem in images & labels:
        assert found[f"images/{folder}{stem}.jpg"] == f"labels/{folder}{stem}.txt"
    # An image in doubt has none.
    assert all(found[image] is None for image in doubtful)


@settings(max_examples=60, deadline=None)
@given(images=st.sets(st.tuples(FOLDERS, st.sampled_from("abcdef")), min_size=1, max_size=7))
def test_where_each_image_has_its_label_file_nothing_is_told(tmp_path_factory, images):
    root = tmp_path_factory.mktemp("whole")
    tree(
        root,
        *(
            f"{top}/{folder}{stem}.{suffix}"
            for folder, stem in images
            for top, suffix in (("images", "jpg"), ("labels", "txt"))
        ),
    )
    found, doubtful, strays = paired(root, "images")
    assert found == {f"images/{f}{s}.jpg": f"labels/{f}{s}.txt" for f, s in images}
    assert (doubtful, strays) == ({}, {})
    # In one folder, they are found by name alone, if that is the only one.
    for path in sorted((root / "labels").rglob("*.txt")):
        if not (root / "flat" / path.name).exists():
            (root / "flat").mkdir(exist_ok=True)
            path.rename(root / "flat" / path.name)
        else:
            path.unlink()
    found, doubtful, strays = paired(root, "images")
    alone = [stem for _, stem in images if sum(stem == other for _, other in images) == 1]
    for folder, stem in images:
        assert found[f"images/{folder}{stem}.jpg"] == (f"flat/{stem}.txt" if stem in alone else None)
    assert set(doubtful) == {f"images/{folder}{stem}.jpg" for folder, stem in images if stem not in alone}
    assert Path(root).is_dir()
