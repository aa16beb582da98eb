"""Where YOLO datasets tell their classes and splits, as tools write them."""

import numpy as np
import pytest
from made_data import BOX, picture

from ssd.data import AnnotationError, find_split, load
from ssd.data.yolo_settings import find_listings, find_settings

LINE = "1 0.25 0.5 0.3 0.5\n"  # BOX, of class cat


def write(root, *names, line=LINE):
    """Files by their names: images, their label files, and whatever has its text behind a colon."""
    for each in names:
        name, colon, text = each.partition(": ")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if colon:
            path.write_text(text)
        elif path.suffix == ".txt":
            path.write_text(line)
        else:
            picture(path)
    return root


YAML = "data.yaml: {}\nnames: [dog, cat]\nnc: 2\n"
CLASSES = "dog\ncat\n"
LAYOUTS = {
    "ultralytics": (
        YAML.format("path: ../datasets/coco8\ntrain: images/train\nval: images/val\ntest: # none"),
        *("images/train/a.jpg", "labels/train/a.txt", "images/val/b.jpg", "labels/val/b.txt"),
    ),
    "folders of another machine": (
        YAML.format("train: /content/drive/MyDrive/x/train/images\nval: D:\\x\\valid\\images"),
        *("train/images/a.jpg", "train/labels/a.txt", "valid/images/b.jpg", "valid/labels/b.txt"),
    ),
    "roboflow": (
        YAML.format("train: ../train/images\nval: ../valid/images\ntest: ../test/images"),
        *("train/images/a.jpg", "train/labels/a.txt", "valid/images/b.jpg", "valid/labels/b.txt"),
        "README.roboflow.txt: Provided by a user",
    ),
    "fiftyone v5": (
        "dataset.yaml: names:\n  0: dog\n  1: cat\npath: /home/me/export\n"
        "train: ./images/train/\nval: ./images/val/\n",
        *("images/train/a.jpg", "labels/train/a.txt", "images/val/b.jpg", "labels/val/b.txt"),
    ),
    "supervisely, a YAML of another name": (
        "data_config.yaml: names: [dog, cat]\ncolors: [[1, 2, 3], [4, 5, 6]]\ntrain: ../lemons/images/train\n"
        "val: ../lemons/images/val\n",
        *("images/train/a.jpg", "labels/train/a.txt", "images/val/b.jpg", "labels/val/b.txt"),
        "args.yaml: lr0: 0.01\n",
    ),
    "keys and folders in any case": (
        "Data.YML: Names: [dog, cat]\nTrain: Images/Train\nVALID: images/validation\n",
        *("images/train/a.jpg", "Labels/Train/a.txt", "images/Validation/b.jpg", "Labels/Validation/b.txt"),
    ),
    "cvat ultralytics, lists": (
        YAML.format("path: .\ntrain: train.txt\nval: val.txt"),
        "train.txt: data/images/train/a.jpg\n",
        "val.txt: data/images/val/b.jpg\n",
        *("images/train/a.jpg", "labels/train/a.txt", "images/val/b.jpg", "labels/val/b.txt"),
    ),
    "cvat 1.1": (
        "obj.data: classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\n"
        "names = data/obj.names\nbackup = backup/\n",
        f"obj.names: {CLASSES}",
        "train.txt: data/obj_train_data/a.jpg\n",
        "valid.txt: data/obj_valid_data/b.jpg\n",
        *("obj_train_data/a.jpg", "obj_train_data/a.txt", "obj_valid_data/b.jpg", "obj_valid_data/b.txt"),
    ),
    "cvat 1.1, subsets of its own": (
        "obj.data: classes = 2\nTrain = data/Train.txt\nValidation = data/Validation.txt\n"
        "names = data/obj.names\n",
        f"obj.names: {CLASSES}",
        "Train.txt: data/obj_Train_data/a.jpg\n",
        "Validation.txt: data/obj_Validation_data/b.jpg\n",
        *(
            "obj_Train_data/a.jpg",
            "obj_Train_data/a.txt",
            "obj_Validation_data/b.jpg",
            "obj_Validation_data/b.txt",
        ),
    ),
    "classes.txt and folders": (
        f"classes.txt: {CLASSES}",
        *("images/train/a.jpg", "labels/train/a.txt", "images/val/b.jpg", "labels/val/b.txt"),
    ),
    "classes.txt in the folders": (
        f"train/classes.txt: {CLASSES}",
        f"val/classes.txt: {CLASSES}",
        *("train/a.jpg", "train/a.txt", "val/b.jpg", "val/b.txt"),
    ),
    "roboflow darknet": (
        f"train/_darknet.labels: {CLASSES}",
        f"valid/_darknet.labels: {CLASSES}",
        *("train/a.jpg", "train/a.txt", "valid/b.jpg", "valid/b.txt"),
    ),
    "splits with images and labels": (
        f"classes.txt: {CLASSES}",
        *("Train/Images/a.jpg", "Train/Labels/a.txt", "Val/Images/b.jpg", "Val/Labels/b.txt"),
    ),
    "a YAML that tells the classes only": (
        "data.yaml: names: [dog, cat]\n",
        *("images/train/a.jpg", "labels/train/a.txt", "images/val/b.jpg", "labels/val/b.txt"),
    ),
    "a YAML without names beside classes.txt": (
        "data.yaml: train: images/train\nval: images/val\nnc: 2\n",
        f"classes.txt: {CLASSES}",
        *("images/train/a.jpg", "labels/train/a.txt", "images/val/b.jpg", "labels/val/b.txt"),
    ),
    "label studio": (
        f"classes.txt: {CLASSES}",
        'notes.json: {"categories": [{"id": 0, "name": "dog"}, {"id": 1, "name": "cat"}]}',
        *("images/a.jpg", "labels/a.txt"),
    ),
    "labelImg": (f"classes.txt: {CLASSES}", "a.jpg", "a.txt"),
    "labelImg, saved elsewhere": (f"labels/classes.txt: {CLASSES}", "images/a.jpg", "labels/a.txt"),
    "makesense, unpacked beside": (f"labels/labels.txt: {CLASSES}", "imgs/a.jpg", "labels/a.txt"),
    "fiftyone v4": (f"obj.names: {CLASSES}", "images.txt: data/a.jpg\n", "data/a.jpg", "data/a.txt"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_tools_are_read_without_options(tmp_path, layout):
    write(tmp_path, *LAYOUTS[layout])
    there = {split for split in ("train", "val", "test") if find_split(tmp_path, split)}
    assert there == ({"train", "val"} if any("b.jpg" in each for each in LAYOUTS[layout]) else {"train"})
    for split in there:
        found = load(tmp_path, split)
        assert found.class_names == ("dog", "cat")
        assert [name[-5:] for name in found.file_names] == ["a.jpg" if split == "train" else "b.jpg"]
        np.testing.assert_allclose(found.boxes, [BOX])
        assert found.labels.tolist() == [2]
        assert found.problems == ()


@pytest.mark.parametrize(
    "name",
    [
        "02146",
        "on",
        "off",
        "yes",
        "~",
        "null",
        "1e3",
        "1_000",
        "0x1F",
        "2024-01-01",
        "1.0",
        "Ärzte",
        ".5",
        "True",
        "1:30",
    ],
)
def test_class_names_are_those_that_stand_in_the_file(tmp_path, name):
    write(tmp_path, "images/a.jpg", "labels/a.txt")
    for text in (
        f"[dog, {name}]",
        f"\n- dog\n- {name}",
        f"\n  0: dog\n  1: {name}",
        f'{{"0": dog, "1": \'{name}\'}}',
    ):
        (tmp_path / "data.yaml").write_text(f"train: images\nnames: {text}\n", encoding="utf-8")
        assert load(tmp_path).class_names == ("dog", name)


def test_a_yaml_of_any_encoding_with_a_mark(tmp_path):
    write(tmp_path, "images/a.jpg", "labels/a.txt")
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "data.yaml").write_text("train: images\nnames: [Bär, ñandú]\n", encoding=encoding)
        assert load(tmp_path).class_names == ("Bär", "ñandú")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("names: {1: dog, 2: cat}", r'"names" has to number the classes from 0 on; it has \[1, 2\]'),
        ("names: {a: 0}", r'"names" has to number the classes from 0 on'),
        ("nc: 3", r'has no "names" \(only nc: 3\); add the names of the classes'),
        ("names: cat", r'"names" has to list the classes, such as \[cat, dog\]; it is \'cat\''),
        ("names: [[a], b]", '"names" has to list one text for each class'),
        ("names: {0: a, 0: b}", "not a YAML file .*'0' is there twice.*line 2"),
        ("names: []", "there are no categories"),
        ("names: [a", "not a YAML file"),
    ],
)
def test_what_is_wrong_with_the_names(tmp_path, names, message):
    write(tmp_path, "images/a.jpg", "labels/a.txt", f"data.yaml: train: images\n{names}\n")
    with pytest.raises(AnnotationError, match=rf"data\.yaml: {message}"):
        load(tmp_path)


def test_of_several_yaml_files_the_usual_one_is_read_and_others_are_listed(tmp_path):
    write(tmp_path, "images/a.jpg", "labels/a.txt", "one.yaml: train: images\nnames: [a, b]\n")
    assert load(tmp_path).class_names == ("a", "b")
    write(tmp_path, "two.yaml: train: images\nnames: [c, d]\n", "hyp.yaml: lr: 1\n")
    with pytest.raises(AnnotationError, match=r"give one of .*one\.yaml, .*two\.yaml$"):
        load(tmp_path)
    assert load(tmp_path / "two.yaml").class_names == ("c", "d")
    write(tmp_path, "data.yaml: train: images\nnames: [e, f]\n")
    found = load(tmp_path)
    assert found.class_names == ("e", "f")
    assert found.notes == ("data.yaml is read; one.yaml, two.yaml could be given in its place",)


def test_lists_of_classes_that_disagree_are_refused(tmp_path):
    write(tmp_path, "train/a.jpg", "train/a.txt", "val/b.jpg", "val/b.txt")
    write(tmp_path, "train/classes.txt: dog\ncat\n", "val/classes.txt: dog\n")
    assert load(tmp_path, "val").class_names == ("dog", "cat")
    write(tmp_path, "val/classes.txt: cat\ndog\n")
    with pytest.raises(AnnotationError, match=r"numbers the classes otherwise than .*: .*cat, dog.*; write"):
        load(tmp_path)


def test_labels_without_any_class_names_say_what_is_missing(tmp_path):
    write(tmp_path, "images/a.jpg", "labels/a.txt")
    with pytest.raises(
        AnnotationError, match=r"nothing names their classes; put the names into classes\.txt"
    ):
        load(tmp_path)


def test_messages_tell_what_is_there(tmp_path):
    write(tmp_path, "pictures/a.jpg", "data.yaml: train: somewhere/else\nval:\nnames: [a]\n")
    with pytest.raises(
        AnnotationError, match=r"there is no folder somewhere/else; .* holds pictures/, data\.yaml$"
    ):
        load(tmp_path)
    with pytest.raises(AnnotationError, match=r"there is no val split; it has train$"):
        load(tmp_path, "val")
    (tmp_path / "data.yaml").unlink()
    write(tmp_path, "train/a.jpg", "train/a.txt", "classes.txt: a\nb\n")
    with pytest.raises(
        AnnotationError, match=r"there is no val split; .* holds pictures/, train/, classes\.txt$"
    ):
        load(tmp_path, "val")


def test_the_last_part_of_a_path_alone_does_not_make_a_split(tmp_path):
    """Else what is validated on would be what was trained on."""
    write(tmp_path, "images/a.jpg", "labels/a.txt")
    write(tmp_path, YAML.format("train: /content/x/images\nval: /content/x/valid/images"))
    assert find_split(tmp_path, "train")
    assert not find_split(tmp_path, "val")


def test_a_number_of_classes_that_is_not_that_of_the_names_is_told(tmp_path):
    write(tmp_path, "images/a.jpg", "labels/a.txt", "data.yaml: train: images\nnames: [a, b]\nnc: 3\n")
    assert load(tmp_path).notes == ("data.yaml says nc: 3, but has 2 names, which count",)


@pytest.mark.parametrize(
    ("named", "files"),
    [
        ("../val/images", ("valid/images/b.jpg", "valid/labels/b.txt")),
        ("./valid/images", ("val/images/b.jpg", "val/labels/b.txt")),
        ("images/val", ("images/Validation/b.jpg", "labels/Validation/b.txt")),
        ("D:\\data\\valid\\images", ("val/images/b.jpg", "val/labels/b.txt")),
        ("val.txt", ("valid.txt: photos/b.jpg\n", "photos/b.jpg", "photos/b.txt")),
    ],
)
def test_a_split_may_go_by_its_other_names(tmp_path, named, files):
    write(
        tmp_path,
        YAML.format(f"train: train/images\nval: {named}"),
        "train/images/a.jpg",
        "train/labels/a.txt",
    )
    assert not find_split(tmp_path, "val")
    write(tmp_path, *files)
    assert find_split(tmp_path, "val")
    np.testing.assert_allclose(load(tmp_path, "val").boxes, [BOX])
    assert load(tmp_path).notes == ()


def test_a_val_split_that_leads_nowhere_is_told(tmp_path):
    write(
        tmp_path,
        YAML.format("train: images/train\nval: images/nope"),
        "images/train/a.jpg",
        "labels/train/a.txt",
    )
    assert load(tmp_path).notes == ("data.yaml names images/nope as val, which is not there",)
    (tmp_path / "images" / "nope").mkdir()
    assert load(tmp_path).notes == ("data.yaml names images/nope as val, where there are no images",)


def test_tags_of_yaml_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "images/a.jpg", "labels/a.txt: 0 0.25 0.5 0.3 0.5")
    write(tmp_path, "data.yaml: train: images\nnames: !!python/object/apply:os.mkdir [owned]\n")
    assert load(tmp_path).class_names == ("owned",)
    write(tmp_path, "data.yaml: train: images\nnames: !!python/tuple [a, b]\n")
    assert load(tmp_path).class_names == ("a", "b")
    assert not (tmp_path / "owned").exists()


def test_a_split_that_is_named_again_and_again_is_read_once(tmp_path):
    aliases = ", ".join(["*a"] * 20_000)
    (tmp_path / "data.yaml").write_text(f"names: [cat]\nx: &a images\ntrain: [{aliases}]\n")
    (tmp_path / "images").mkdir()
    settings = find_settings(tmp_path)
    assert settings.splits["train"] == ["images"]
    assert find_listings(settings, "train") == [tmp_path / "images"]


def test_a_key_in_capital_and_small_letters_is_told(tmp_path):
    (tmp_path / "data.yaml").write_text("names: [cat]\nNames: [dog]\ntrain: images\n")
    with pytest.raises(AnnotationError, match="'names' is there twice, in capital and in small letters"):
        find_settings(tmp_path)
