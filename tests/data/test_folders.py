import pytest
from made_data import picture

from ssd.data.folders import (
    dataset_of,
    files_of,
    image_folders,
    most_telling,
    speaks_of,
    split_of,
    subfolders,
)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("train", "train"), ("Training", "train"), ("instances_train2017", "train"), ("VALID", "val")),
        *(("my_Validation-set", "val"), ("test-dev2017", "test"), ("coco.test", "test")),
        *(
            ("trainset", "train"),
            ("ValSet", "val"),
            ("my_testset2", "test"),
            ("dataset", None),
            ("sets", None),
        ),
        *(("", None), ("latest", None), ("trainval", None), ("train_val", None), ("default", None)),
    ],
)
def test_names_speak_of_splits(name, split):
    assert split_of(name) == split
    assert [each for each in ("train", "val", "test") if speaks_of(name, each)] == ([split] if split else [])


def test_other_splits_have_their_own_name_only():
    assert speaks_of("Mini", "mini")
    assert not speaks_of("mini_1", "mini")


def test_folders_and_files_in_any_case_without_hidden_ones(tmp_path):
    for name in ("Images", "b", ".git", "__MACOSX"):
        (tmp_path / name).mkdir()
    for name in ("B.XML", "a.xml", "._a.xml", "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.xml").mkdir()
    assert subfolders(tmp_path) == {
        "images": tmp_path / "Images",
        "b": tmp_path / "b",
        "folder.xml": tmp_path / "folder.xml",
    }
    assert files_of(tmp_path, ".xml") == [tmp_path / "B.XML", tmp_path / "a.xml"]
    assert subfolders(tmp_path / "gone") == {}
    assert files_of(tmp_path / "gone", ".xml") == []


def test_the_dataset_of_an_annotation_file(tmp_path):
    assert dataset_of(tmp_path / "a.json") == tmp_path
    assert dataset_of(tmp_path / "Annotations" / "a.json") == tmp_path
    assert dataset_of(tmp_path / "annotations" / "train" / "a.json") == tmp_path


def test_image_folders_are_told_by_the_most_telling_name_first(tmp_path):
    for name in ("images/Train", "images/val", "train/img", "annotations"):
        (tmp_path / name).mkdir(parents=True)
    assert list(image_folders(tmp_path, ["train", "training"])) == [
        tmp_path / "images" / "Train",
        tmp_path / "train" / "img",
        tmp_path / "train",
        tmp_path / "images",
        tmp_path,
    ]


def test_the_folder_that_has_most_of_the_images(tmp_path):
    for name in ("a/1.jpg", "b/1.jpg", "b/2.jpg", "c/1.jpg", "c/2.jpg"):
        picture(tmp_path / name)
    folders = [tmp_path / name for name in ("gone", "a", "b", "c")]
    assert most_telling(folders, ["1.jpg", "2.jpg"]) == tmp_path / "b"
    assert most_telling(folders, ["D:\\photos\\2.jpg", "http://x/y/1.jpg?v=1"]) == tmp_path / "b"
    assert most_telling([tmp_path, *folders], ["c\\1.jpg"]) == tmp_path
    assert most_telling(folders, ["3.jpg", "a\0.jpg", ""]) is None
    assert most_telling(folders, []) is None
