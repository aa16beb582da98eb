"""What a dataset names outside of the folders that the user gave is not opened, unless it is trusted."""

import json
import os
import sys
from pathlib import Path

import pytest
from made_data import annotation, coco, picture
from PIL import Image

from ssd.check import check_dataset, read_splits
from ssd.cli.train import _datasets
from ssd.data import AnnotationError, load, usable_for_evaluation

watched = []
"""What was opened or listed since a test began."""

sys.addaudithook(lambda event, args: watched.append(args[0]) if event in _EVENTS else None)
_EVENTS = ("open", "os.scandir", "os.listdir")


@pytest.fixture
def outside(tmp_path):
    """A folder beside the dataset's, with an image of 100x80 and its labels: a cat at (10, 20, 40, 60)."""
    folder = tmp_path / "outside"
    picture(folder / "images/marker.png")
    (folder / "labels").mkdir()
    (folder / "labels/marker.txt").write_text("0 0.25 0.5 0.3 0.5\n")
    (folder / "images/secrets.txt").write_text("root:x:0:0\nkey=123456\n")
    (folder / "heic").mkdir()
    (folder / "heic/marker.heic").write_bytes(b"0000ftypheic")
    watched.clear()
    return folder


def opened(folder):
    """What was looked into in a folder, or below it."""
    paths = [os.path.realpath(each) for each in watched if isinstance(each, str | Path)]
    return [path for path in paths if Path(path).is_relative_to(folder)]


def of_coco(root, name, key="file_name"):
    images = [
        {"id": 1, "file_name": "a.jpg", "width": 100, "height": 80},
        {"id": 2, key: name},
    ]
    content = coco(images, [annotation(), annotation(id=2, image_id=2)])
    picture(root / "train/a.jpg")
    (root / "train.json").write_text(json.dumps(content))


def of_coco_url(root, name):
    of_coco(root, name, "coco_url")


def of_voc(root, name, key="filename"):
    text = (
        "<annotation>{}<object><name>cat</name><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>40</xmax>"
        "<ymax>60</ymax></bndbox></object></annotation>"
    )
    picture(root / "JPEGImages/a.jpg")
    (root / "Annotations").mkdir()
    (root / "Annotations/a.xml").write_text(text.format(""))
    (root / "Annotations/b.xml").write_text(text.format(f"<folder>..</folder><{key}>{name}</{key}>"))


def of_voc_path(root, name):
    of_voc(root, name, "path")


def of_yolo(root, name, settings="train: train.txt\n"):
    picture(root / "images/a.jpg")
    (root / "labels").mkdir()
    (root / "labels/a.txt").write_text("0 0.25 0.5 0.3 0.5\n")
    (root / "train.txt").write_text(f"images/a.jpg\n{name}\n")
    (root / "data.yaml").write_text(f"{settings}names: [cat]\n")


def of_darknet(root, name):
    of_yolo(root, name)
    (root / "data.yaml").unlink()
    (root / "obj.data").write_text("classes = 1\ntrain = train.txt\nnames = obj.names\n")
    (root / "obj.names").write_text("cat\n")


def of_yolo_from_the_disk(root, name):
    of_yolo(root, name, "path: /\ntrain: train.txt\n")


def of_yolo_from_above(root, name):
    of_yolo(root, name, "path: ..\ntrain: data/train.txt\n")


FORMATS = [
    of_coco,
    of_coco_url,
    of_voc,
    of_voc_path,
    of_yolo,
    of_darknet,
    of_yolo_from_the_disk,
    of_yolo_from_above,
]


def ways(path):
    """Names of a file of another folder than the dataset's, by which somebody may try to have it read."""
    up = f"../outside/{path.parent.name}/{path.name}"
    return [
        str(path),
        up,
        f"../{up}",
        f"images/../../{up}",
        f"./{up}",
        up.replace("/", "\\"),
        up.replace("..", "%2e%2e").replace("/", "%2F"),
        f"C:{path}",
        f"file://{path}",
        f"file://localhost{path}",
        f"http://localhost/data/local-files/?d={path}",
        f"/{path}",
        f"/proc/self/cwd/../../..{path}",
    ]


def judged(root, **options):
    """The images of a dataset, after check, training and evaluation have looked at it."""
    splits, _ = read_splits(root, **options)
    check_dataset(splits)
    source = {"data": str(root), "lenient": True, **options}
    trained, _ = _datasets(source, crowd=False)
    measured = usable_for_evaluation(load(root, **options), lenient=True)
    assert measured.file_names.tolist() == trained.annotations.file_names.tolist()
    for i in range(len(trained)):
        trained[i]
    return [trained.annotations.path(i) for i in range(len(trained))]


@pytest.mark.parametrize("suffix", ["images/marker.png", "heic/marker.heic"])
@pytest.mark.parametrize("write", FORMATS)
def test_no_name_leads_out(write, suffix, tmp_path, outside):
    for number, name in enumerate(ways(outside / suffix)):
        root = tmp_path / str(number) / "data"
        root.mkdir(parents=True)
        (root.parent / "outside").symlink_to(outside)
        write(root, name)
        watched.clear()
        assert [path.name for path in judged(root)] == ["a.jpg"], name
        assert opened(outside) == [], name


@pytest.mark.parametrize("write", FORMATS)
def test_names_lead_out_where_the_dataset_is_trusted(write, tmp_path, outside):
    # From the list, or from the folder of the images.
    up = ".." if "yolo" in write.__name__ or "darknet" in write.__name__ else "../.."
    for number, start in enumerate((outside, f"{up}/outside", f"file://{outside}")):
        root = tmp_path / f"data{number}"
        root.mkdir()
        write(root, f"{start}/images/marker.png")
        if write is of_yolo_from_above:
            (root / "data.yaml").write_text(f"path: ..\ntrain: data{number}/train.txt\nnames: [cat]\n")
        paths = [Path(os.path.normpath(path)) for path in judged(root, follow=True)]
        assert paths == [paths[0].parent / "a.jpg", outside / "images/marker.png"]
        found = load(root, follow=True)
        assert len(found.boxes) == 2
        assert not any(problem.fatal for problem in found.problems)


@pytest.mark.parametrize(
    "settings",
    [
        "train: /\n",
        "train: ..\n",
        "train: ~\ntrain: {home}\n",
        "train: {outside}/images/secrets.txt\n",
        "train: /etc/passwd\n",
        "train: {outside}/labels\n",
        "path: {outside}\ntrain: labels\n",
        "path: /\ntrain: .\n",
        "path: {outside}/images\ntrain: secrets.txt\n",
        "train: /proc/self/root\n",
    ],
)
def test_a_split_outside_is_a_folder_of_images_or_a_list_of_them(settings, tmp_path, outside, monkeypatch):
    root, home = tmp_path / "home/u/data", tmp_path / "home/u"
    root.mkdir(parents=True)
    picture(home / "private.png")
    monkeypatch.setenv("HOME", str(home))
    of_yolo(root, "b.jpg", settings.format(outside=outside, home=home).removeprefix("train: ~\n"))
    watched.clear()
    with pytest.raises(AnnotationError, match=r"is outside of .*, and neither a folder of images nor a list"):
        load(root)
    try:
        load(root)
    except AnnotationError as error:
        assert "123456" not in str(error)
        assert "root:x" not in str(error)
    assert opened(home / "private.png") == []


def test_a_folder_of_images_outside_is_read_with_the_labels_beside_it(tmp_path, outside):
    for number, settings in enumerate(
        [f"train: {outside}/images\n", "train: ../outside/images\n", f"path: {outside}\ntrain: images\n"]
    ):
        root = tmp_path / f"data{number}"
        of_yolo(root, "b.jpg", settings)
        found = load(root)
        assert [found.path(0), *found.boxes.round(6).tolist()] == [
            outside / "images/marker.png",
            [10, 20, 40, 60],
        ]


def test_of_several_folders_each_has_its_own_labels(tmp_path, outside):
    root = tmp_path / "data"
    of_yolo(root, "", f"train: [images, {outside}/images]\n")
    picture(tmp_path / "other/private.png")
    watched.clear()
    found = load(root)
    assert [found.path(i).name for i in range(2)] == ["a.jpg", "marker.png"]
    assert len(found.boxes) == 2
    assert tmp_path / "other" not in map(Path, opened(tmp_path))


def test_a_list_outside_names_images_in_its_folder(tmp_path, outside):
    (outside / "list.txt").write_text(f"./images/marker.png\n{tmp_path}/private.png\n../private.png\n")
    picture(tmp_path / "private.png")
    of_yolo(tmp_path / "data", "", f"train: {outside}/list.txt\n")
    watched.clear()
    found = load(tmp_path / "data")
    assert [found.path(i) for i in range(len(found))] == [outside / "images/marker.png"]
    assert len(found.boxes) == 1
    assert [problem.kind for problem in found.problems if problem.fatal] == ["missing image"] * 2
    assert opened(tmp_path / "private.png") == []


@pytest.mark.parametrize(
    "text",
    [
        "train: images\nnames: {outside}/names.txt\n",
        "train: images\nnames: ../outside/names.txt\n",
        "train: images\nnames: images/../../outside/names.txt\n",
    ],
)
def test_names_of_classes_are_not_read_from_outside(text, tmp_path, outside):
    (outside / "names.txt").write_text("secret\n")
    root = tmp_path / "data"
    of_yolo(root, "")
    (root / "data.yaml").write_text(text.format(outside=outside))
    watched.clear()
    with pytest.raises(AnnotationError, match='"names" has to list the classes'):
        load(root)
    (root / "data.yaml").unlink()
    names = text.splitlines()[1].format(outside=outside).replace(": ", " = ")
    (root / "obj.data").write_text(f"train = train.txt\n{names}\n")
    with pytest.raises(AnnotationError, match="with its names is not there"):
        load(root)
    assert opened(outside) == []


def test_a_link_inside_is_the_users_own(tmp_path, outside):
    root = tmp_path / "data"
    of_coco(root, "link.png")
    (root / "train/link.png").symlink_to(outside / "images/marker.png")
    assert [path.name for path in judged(root)] == ["a.jpg", "link.png"]


def test_a_link_to_a_folder_above_is_not_walked(tmp_path):
    root = tmp_path / "data"
    of_yolo(root, "", "train: images\n")
    Image.new("RGB", (9, 9)).save(tmp_path / "private.png")
    (root / "images/up").symlink_to(tmp_path)
    (root / "images/all").symlink_to("/")
    assert load(root).file_names.tolist() == ["a.jpg"]


def write_yolo(root, settings, *, images, lists=()):
    for name in images:
        picture(root / name)
        label = root / "labels" / f"{Path(name).stem}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("0 0.5 0.5 0.2 0.2\n")
    for name, text in dict(lists).items():
        (root / name).write_text(text)
    file = root / "cfg" / "data.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"names: [cat]\n{settings}")
    return file


@pytest.mark.parametrize(
    ("settings", "image", "lists"),
    [
        ("path: ..\ntrain: train.txt\n", "images/a.jpg", {"train.txt": "./images/a.jpg\n"}),
        ("path: ..\ntrain: images\n", "images/a.jpg", {}),
        ("train: ../raw\n", "raw/2011/drive/image/data/a.jpg", {}),
        ("train: ../train.txt\n", "images/a.jpg", {"train.txt": "images/a.jpg\n# nothing\nimages/a.jpg\n"}),
    ],
    ids=["list above", "folder above", "deep folders", "list with a comment"],
)
def test_settings_in_a_folder_of_their_own_find_their_images(tmp_path, settings, image, lists):
    file = write_yolo(tmp_path / "ds", settings, images=[image], lists=lists)
    annotations = load(file, "train")
    assert [Path(name).name for name in annotations.file_names][0] == "a.jpg"
    assert annotations.path(0).samefile(tmp_path / "ds" / image)


def test_labels_are_looked_for_in_folders_of_labels_alone(tmp_path):
    """Beside a list outside of the dataset lie others' files of the same names."""
    for name in ("ds/images/0.png", "ds/images/1.png"):
        picture(tmp_path / name)
    for name in ("private/0.txt", "deep/er/1.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "train.txt").write_text(f"{tmp_path}/ds/images/0.png\n{tmp_path}/ds/images/1.png\n")
    (tmp_path / "ds" / "data.yaml").write_text("names: [a]\ntrain: ../train.txt\n")
    assert len(load(tmp_path / "ds", "train").boxes) == 0


def test_labels_beside_the_images_of_settings_in_a_folder_of_their_own(tmp_path):
    file = write_yolo(tmp_path / "ds", "path: ..\ntrain: images\n", images=["images/a.jpg"])
    assert len(load(file, "train").boxes) == 1


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="there is no such folder here")
def test_the_systems_own_folders_hold_no_dataset(tmp_path):
    (tmp_path / "data.yaml").write_text("names: [a]\ntrain: /proc\n")
    with pytest.raises(AnnotationError, match="neither a folder of images nor a list of them"):
        load(tmp_path, "train")
