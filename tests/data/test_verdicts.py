"""`ssd check` ends with 1 exactly where training or evaluation refuses: both judge many datasets."""

import json
import random
from dataclasses import replace

import pytest
import typer
from PIL import Image
from training import ALONE, QUICK

from ssd.cli.data import check
from ssd.cli.train import _datasets
from ssd.data import find_split, load, usable_for_evaluation
from ssd.detections import Detections
from ssd.errors import UserError
from ssd.evaluate import detect_all
from ssd.images import load_image
from ssd.train import setup
from ssd.train.setup import set_up

SIZE = (80, 60)
BOX = (10, 10, 40, 30)
CLASSES = ("cat", "dog")


def split(rng, name):
    """Images of a split: file name to its objects, each a class, an xyxy box and whether it is crowd."""
    images = {}
    for number in range(rng.randint(2, 4)):
        objects = [(rng.choice(CLASSES), BOX, False) for _ in range(rng.randint(0, 2))]
        images[f"{name}{number}.png"] = objects or ([("cat", BOX, False)] if number == 0 else [])
    return images


# --- What may be wrong with the annotations: each changes the images of one split ---


def no_images(rng, images):
    images.clear()


def a_single_image(rng, images):
    for name in list(images)[1:]:
        del images[name]


def no_boxes(rng, images):
    for objects in images.values():
        objects.clear()


def all_crowd(rng, images):
    for objects in images.values():
        objects[:] = [(name, box, True) for name, box, _ in objects]


def one_crowd(rng, images):
    next(iter(images.values()))[:] = [("cat", BOX, True), ("dog", BOX, False)]


def box(*values):
    def change(rng, images):
        rng.choice(list(images.values())).append(("cat", values, False))

    change.__name__ = f"box {values}"
    return change


def unknown_class(rng, images):
    rng.choice(list(images.values())).append(("unicorn", BOX, False))


DESCRIBED = [
    *(no_images, a_single_image, no_boxes, all_crowd, one_crowd, unknown_class),
    *(box(10, 10, 10, 30), box(40, 10, 10, 30), box(100, 10, 120, 30), box(60, 40, 90, 70)),
    *(box(float("nan"), 10, 40, 30), box(0, 0, 1e12, 30)),
]


# --- What may be wrong with the files: each gets the folder of a split's images ---


def one_of(rng, folder):
    files = sorted(folder.glob("*.png"))
    return rng.choice(files) if files else folder / "none.png"


def missing(rng, folder):
    one_of(rng, folder).unlink(missing_ok=True)


def cut_off(rng, folder):
    path = one_of(rng, folder)
    if path.exists():
        path.write_bytes(path.read_bytes()[:60])


def no_image(rng, folder):
    path = one_of(rng, folder)
    if path.exists():
        path.write_bytes(b"hello")


def another_size(rng, folder):
    path = one_of(rng, folder)
    if path.exists():
        Image.new("RGB", (33, 44)).save(path)


def too_thin(rng, folder):
    path = one_of(rng, folder)
    if path.exists():
        Image.new("RGB", (400, 2)).save(path)


def a_stray_image(rng, folder):
    Image.new("RGB", SIZE).save(folder / "stray.png")


FILES = [missing, cut_off, no_image, another_size, too_thin, a_stray_image]


# --- The formats, and what may be wrong in them alone ---


def paint(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for name in images:
        Image.effect_noise(SIZE, 90).convert("RGB").save(folder / name)
    return folder


def write_coco(root, name, images, classes, rng, odd):
    ids = {each: number for number, each in enumerate(classes, start=1)}
    entries = [
        {"id": i, "file_name": each, "width": SIZE[0], "height": SIZE[1]} for i, each in enumerate(images)
    ]
    boxes = [
        {
            "id": i,
            "image_id": i,
            "category_id": ids.get(label, 77),
            "bbox": [left, top, right - left, bottom - top],
            "iscrowd": int(crowd),
        }
        for i, objects in enumerate(images.values())
        for label, (left, top, right, bottom), crowd in objects
    ]
    categories = [{"id": number, "name": each} for each, number in ids.items()]
    content = {"images": entries, "annotations": boxes, "categories": categories}
    if odd == "an entry twice" and entries:
        entries.append(dict(entries[0], id=900))
    if odd == "no sizes":
        for each in entries:
            del each["width"], each["height"]
    if odd == "an unused category":
        categories.append({"id": 50, "name": "nothing"})
    if odd == "an annotation of no image":
        boxes.append({"id": 9, "image_id": 12345, "category_id": 1, "bbox": [1, 1, 5, 5]})
    if odd == "a category twice":
        categories.append({"id": 51, "name": "cat"})
    text = json.dumps(content)
    (root / f"{name}.json").write_text(text[:-9] if odd == "cut off" else text)
    return paint(root / name, images)


def write_yolo(root, name, images, classes, rng, odd):
    (root / "labels" / name).mkdir(parents=True)
    for each, objects in images.items():
        lines = []
        for label, (left, top, right, bottom), _ in objects:
            number = list(classes).index(label) if label in classes else 9
            x, y = (left + right) / 2 / SIZE[0], (top + bottom) / 2 / SIZE[1]
            lines.append(f"{number} {x} {y} {(right - left) / SIZE[0]} {(bottom - top) / SIZE[1]}")
        if odd == "cut off" and each == next(iter(images)):
            lines.append("0 0.5 0.5")
        if lines:
            (root / "labels" / name / each.replace(".png", ".txt")).write_text("\n".join(lines))
    if odd == "a label file of no image":
        (root / "labels" / name / "zebra.txt").write_text("0 0.5 0.5 0.1 0.1")
    with (root / "data.yaml").open("a") as file:
        if name == "train":
            file.write(f"names: [{', '.join(classes)}]\n")
        file.write(f"{name}: images/{name}\n")
    return paint(root / "images" / name, images)


def write_voc(root, name, images, classes, rng, odd):
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for each, objects in images.items():
        parts = "".join(
            f"<object><name>{label}</name><difficult>{int(crowd)}</difficult><bndbox><xmin>{left + 1}</xmin>"
            f"<ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
            for label, (left, top, right, bottom), crowd in objects
        )
        size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height></size>"
        text = f"<annotation><filename>{each}</filename>{size}{parts}</annotation>"
        if odd == "cut off" and each == next(iter(images)):
            text = text[:-20]
        (root / "Annotations" / each.replace(".png", ".xml")).write_text(text)
    stems = [each.removesuffix(".png") for each in images]
    if odd == "a name of no file":
        stems.append("zebra")
    (root / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(stems))
    return paint(root / "JPEGImages", images)


WRITERS = {
    "coco": (
        write_coco,
        ["an entry twice", "no sizes", "an unused category", "an annotation of no image", "a category twice"],
    ),
    "yolo": (write_yolo, ["a label file of no image"]),
    "voc": (write_voc, ["a name of no file"]),
}


def make(root, seed, kind):
    """A dataset with up to two faults; what was done to it."""
    rng = random.Random(f"{kind} {seed}")
    write, own = WRITERS[kind]
    names = rng.choice([("train",), ("train", "val"), ("train", "val", "test")])
    told = []
    for name in names:
        images, odd = split(rng, name), ""
        if rng.random() < 0.35:
            change = rng.choice(DESCRIBED)
            change(rng, images)
            told.append(f"{name}: {change.__name__}")
        if rng.random() < 0.2:
            odd = rng.choice([*own, "cut off"])
            told.append(f"{name}: {odd}")
        folder = write(root, name, images, CLASSES, rng, odd)
        if rng.random() < 0.25:
            harm = rng.choice(FILES)
            harm(rng, folder)
            told.append(f"{name}: {harm.__name__}")
    return told


def checked(data):
    """The exit status of ``ssd check``."""
    try:
        check(data, None, "300", as_json=True)
    except typer.Exit as end:
        return end.exit_code
    except (UserError, FileNotFoundError):
        return 1
    raise AssertionError("it always ends with a status")


class Seen:
    """A detector that finds nothing, but reads the images as every other."""

    def __init__(self, class_names):
        self.class_names = class_names

    def stream(self, sources, **options):
        for source in sources:
            image = load_image(source)
            yield Detections([], [], [], self.class_names, (image.height, image.width))


class Ready(Exception):
    """Nothing is left to refuse."""


def refused(data, state_file):
    """Why training or evaluation refuses a dataset; None where all of it is used."""
    try:
        train, val = _datasets({"data": data}, crowd=False)
        with pytest.raises(Ready):
            set_up(
                *(train, val, replace(QUICK, batch_size=2), state_file, ALONE),
                class_names=None,
                category_ids=None,
                resume=False,
            )
        for i in range(len(train)):
            train[i]
        for name in ("val", "test"):
            if find_split(data, name):
                truth = load(data, name, class_names=train.class_names)
                detect_all(Seen(train.class_names), usable_for_evaluation(truth), ALONE)
    except (UserError, ValueError, FileNotFoundError) as error:
        return error
    return None


@pytest.mark.parametrize("kind", WRITERS)
def test_check_refuses_what_training_and_evaluation_refuse(tmp_path, monkeypatch, capsys, kind):
    def ready(*arguments, **options):
        raise Ready

    monkeypatch.setattr(setup, "_begin", ready)  # the network: what comes after the data
    verdicts = set()
    for seed in range(40):
        root = tmp_path / str(seed)
        root.mkdir()
        told = make(root, seed, kind)
        error = refused(root, tmp_path / "state.pt")
        status = checked(root)
        output = capsys.readouterr().out
        assert (status == 1) == (error is not None), (seed, told, error, output)
        verdicts.add(status)
    assert verdicts == {0, 1}
