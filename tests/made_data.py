"""Datasets of every format that tests write, and detections on them that tests make up."""

import json

import numpy as np
from PIL import Image

from ssd.detections import Detections


def coco(images=None, annotations=None, categories=None):
    return {
        "images": images or [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 80}],
        "annotations": annotations if annotations is not None else [annotation()],
        "categories": categories or [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def annotation(**changes):
    base = {"id": 1, "image_id": 1, "category_id": 5, "bbox": [10, 20, 30, 40], "area": 900, "iscrowd": 0}
    return base | changes


def picture(path, size=(100, 80), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 200, 30)).save(path, **options)


def plain(folder, content=None, names=("a.jpg",)):
    """train.json and train/ with images of 100x80."""
    for name in names:
        picture(folder / "train" / name)
    (folder / "train.json").write_text(json.dumps(content or coco()))
    return folder


BOX = [10, 20, 40, 60]  # xyxy, class cat, in image a.jpg of 100x80


def as_plain(root):
    plain(root)
    return root


def as_official(root):
    picture(root / "train2017" / "a.jpg")
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(coco()))
    return root


def as_official_with_images_folder(root):
    picture(root / "images" / "train2017" / "a.jpg")
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(coco()))
    return root


def as_roboflow(root):
    picture(root / "train" / "a.jpg")
    (root / "train" / "_annotations.coco.json").write_text(json.dumps(coco()))
    return root


def as_one_file(root):
    return plain(root) / "train.json"


def as_yolo(root, folder="images/train"):
    picture(root / folder / "a.jpg")
    labels = root / folder.replace("images", "labels")
    labels.mkdir(parents=True, exist_ok=True)
    (labels / "a.txt").write_text("1 0.25 0.5 0.3 0.5\n")
    (root / "data.yaml").write_text(f"train: {folder}\nval: images/nowhere\nnames: [dog, cat]\n")
    return root


def as_yolo_of_roboflow(root):
    as_yolo(root, "train/images")
    (root / "data.yaml").write_text("train: ../train/images\nnc: 2\nnames:\n  0: dog\n  1: cat\n")
    return root / "data.yaml"


def as_yolo_list(root):
    as_yolo(root)
    (root / "train.txt").write_text("./images/train/a.jpg\n")
    (root / "data.yaml").write_text("path: .\ntrain: train.txt\nnames: [dog, cat]\n")
    return root


VOC_XML = """<annotation><filename>{name}</filename>
<size><width>100</width><height>80</height><depth>3</depth></size>
<object><name>cat</name><difficult>{difficult}</difficult>
<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>40</xmax><ymax>60</ymax></bndbox></object></annotation>"""


def as_voc(root, difficult=0):
    picture(root / "JPEGImages" / "a.jpg")
    (root / "Annotations").mkdir()
    (root / "Annotations" / "a.xml").write_text(VOC_XML.format(name="a.jpg", difficult=difficult))
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    return root


def as_voc_devkit(root):
    as_voc(root / "VOC2007")
    main = root / "VOC2007" / "ImageSets" / "Main"
    (main / "train.txt").rename(main / "trainval.txt")
    return root


def as_kaggles_voc(root):
    picture(root / "images" / "a.png")
    (root / "annotations").mkdir()
    (root / "annotations" / "a.xml").write_text(VOC_XML.format(name="a.jpg", difficult=0))
    return root


def as_flat_voc(root):
    picture(root / "a.jpg")
    (root / "a.xml").write_text(VOC_XML.format(name="a.jpg", difficult=0))
    return root


def as_cvat(root):
    picture(root / "images" / "a.jpg")
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_default.json").write_text(json.dumps(coco()))
    return root


def as_annotations_and_splits(root):
    picture(root / "train" / "a.jpg")
    (root / "annotations").mkdir()
    (root / "annotations" / "train.json").write_text(json.dumps(coco()))
    return root


def as_flat_images(root):
    picture(root / "images" / "a.jpg")
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train.json").write_text(json.dumps(coco()))
    return root


def as_two_years_of_which_one_has_images(root):
    as_official(root)
    (root / "annotations" / "instances_train2014.json").write_text("{}")
    return root


def as_yolo_with_labels_inside(root):
    """Below a folder that is itself called images."""
    root = root / "images"
    as_yolo(root, "train")
    (root / "train" / "a.txt").unlink()
    (root / "train" / "labels").mkdir()
    (root / "train" / "labels" / "a.txt").write_text("1 0.25 0.5 0.3 0.5\n")
    picture(root / "train" / "._a.jpg")
    return root


def as_yolo_by_a_way_around(root):
    return as_yolo_with_labels_inside(root) / "train" / ".."


def as_yolo_pose(root):
    as_yolo(root)
    (root / "labels/train/a.txt").write_text("1 0.25 0.5 0.3 0.5 0.9 0.9 0.1 0.1\n")
    with (root / "data.yaml").open("a") as file:
        file.write("kpt_shape: [2, 2]\n")
    return root


def as_names_with_the_folder(root):
    picture(root / "train" / "a.jpg")
    content = coco([{"id": 1, "file_name": "train/a.jpg", "width": 100, "height": 80}])
    (root / "train.json").write_text(json.dumps(content))
    return root


def as_label_studio(root):
    picture(root / "images" / "a.jpg")
    content = coco([{"id": 1, "file_name": "images/a.jpg", "width": 100, "height": 80}])
    (root / "result.json").write_text(json.dumps(content))
    return root / "result.json"


def as_coco_without_sizes(root):
    return plain(root, coco([{"id": 1, "file_name": "a.jpg"}]))


def as_voc_beside(root):
    picture(root / "train" / "a.jpg")
    (root / "train" / "a.xml").write_text(VOC_XML.format(name="a.jpg", difficult=0))
    return root


EVERY_FOLDER = [value for name, value in list(globals().items()) if name.startswith("as_")]
"""Functions that write the same image and box in a folder, and give the path to load; one for each layout."""


def perfect(annotations, score=0.9):
    """Detections that are the boxes."""
    return {
        i: Detections(
            annotations.boxes[part],
            np.full(part.stop - part.start, score),
            annotations.labels[part] - 1,
            annotations.class_names,
            (480, 480),
        )
        for i in range(len(annotations))
        for part in [annotations.of_image(i)]
    }


def blurred(annotations, seed=0):
    """Detections as of a mediocre network: moved, missed, mistaken and surplus ones, with scores to match."""
    random = np.random.default_rng(seed)
    found = {}
    for i in range(len(annotations)):
        part = annotations.of_image(i)
        boxes, classes = annotations.boxes[part], annotations.labels[part] - 1
        kept = random.random(len(boxes)) < 0.8
        boxes, classes = boxes[kept], classes[kept].copy()
        size = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        boxes = boxes + random.normal(0, 0.06, boxes.shape) * size
        classes[random.random(len(classes)) < 0.1] = 0
        extra = random.uniform(0, 200, (3, 2))
        boxes = np.concatenate([boxes, np.hstack([extra, extra + random.uniform(20, 150, (3, 2))])])
        classes = np.concatenate([classes, random.integers(0, 6, 3)])
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        order = random.permutation(len(boxes))
        scores = np.sort(random.uniform(0.05, 1, len(boxes)))[::-1].astype(np.float32)
        found[i] = Detections(boxes[order], scores, classes[order], annotations.class_names, (480, 480))
    return found
