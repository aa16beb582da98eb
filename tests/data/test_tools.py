"""What annotation tools write, made after their own descriptions and source, is read without options."""

import json

import numpy as np
import pytest
from made_data import picture

from ssd.data import find_split, load

# Everywhere: in image a a cat in BOX and a dog, in b a dog, and where there is a second split, in c a cat.
BOX, DOG = (10, 20, 40, 60), (50, 10, 90, 30)  # xyxy in pixels of 100x80
OBJECTS = {"a": [("cat", BOX), ("dog", DOG)], "b": [("dog", DOG)], "c": [("cat", BOX)]}
ONE = {"train": (2, 3)}
"""Images and boxes of each split."""
TWO = ONE | {"val": (1, 1)}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def pictures(folder, stems, suffix=".jpg"):
    for stem in stems:
        picture(folder / f"{stem}{suffix}")


def coco(stems, name="{}.jpg", ids=(1, 2), categories=(), **changes):
    """A COCO file of some images, where dog and cat have the ids; `changes` is in each annotation."""
    images, annotations = [], []
    for k, stem in enumerate(stems, start=1):
        images.append({"id": k, "file_name": name.format(stem), "width": 100, "height": 80})
        for category, (left, top, right, bottom) in OBJECTS[stem]:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": k,
                    "category_id": ids[["dog", "cat"].index(category)],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "segmentation": [],
                    "iscrowd": 0,
                }
                | changes
            )
    own = [{"id": each, "name": name} for each, name in zip(ids, ("dog", "cat"), strict=True)]
    return {"images": images, "annotations": annotations, "categories": [*categories, *own]}


def xml(stem, filename, start=0, head="", extra="", difficult="0"):
    """A VOC file whose corners count from `start`."""
    objects = "".join(
        f"<object><name>{name}</name><pose>Unspecified</pose><truncated>0</truncated>"
        f"<difficult>{difficult}</difficult><bndbox><xmin>{box[0] + start}</xmin>"
        f"<ymin>{box[1] + start}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>{extra}</object>"
        for name, box in OBJECTS[stem]
    )
    return (
        f"<annotation>{head}<filename>{filename}</filename><size><width>100</width><height>80</height>"
        f"<depth>3</depth></size><segmented>0</segmented>{objects}</annotation>"
    )


def yolo(stem):
    lines = []
    for name, (left, top, right, bottom) in OBJECTS[stem]:
        centre = (left + right) / 200, (top + bottom) / 160
        values = (*centre, (right - left) / 100, (bottom - top) / 80)
        lines.append(f"{['dog', 'cat'].index(name)} " + " ".join(f"{value:.6f}" for value in values) + "\n")
    return "".join(lines)


# CVAT: https://docs.cvat.ai/docs/dataset_management/formats/, written by datumaro


def cvat_coco(root):
    pictures(root / "images" / "default", "ab")
    changes = {"attributes": {"occluded": False, "rotation": 0.0}}
    write(root / "annotations" / "instances_default.json", coco("ab", **changes))
    return ONE


def cvat_coco_of_older_versions(root):
    pictures(root / "images", "ab")
    write(root / "annotations" / "instances_default.json", coco("ab"))
    write(root / "annotations" / "person_keypoints_default.json", {"images": [], "categories": []})
    return ONE


def cvat_coco_with_subsets(root):
    for subset, stems in (("Train", "ab"), ("Validation", "c")):
        pictures(root / "images" / subset / "Data", stems, ".bmp")
        write(root / "annotations" / f"instances_{subset}.json", coco(stems, "Data/{}.bmp"))
    return TWO


def cvat_voc(root):
    pictures(root / "JPEGImages", "ab")
    rotation = "<attributes><attribute><name>rotation</name><value>0.0</value></attribute></attributes>"
    for stem in "ab":
        write(root / "Annotations" / f"{stem}.xml", xml(stem, f"{stem}.jpg", extra=rotation))
    write(root / "ImageSets" / "Main" / "default.txt", "a\nb\n")
    write(root / "ImageSets" / "Main" / "cat_default.txt", "a  1\nb -1\n")
    write(root / "labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:128,0,0::\n")
    return ONE


def cvat_voc_with_subsets_and_folders(root):
    for subset, stems in (("Train", "ab"), ("Val", "c")):
        pictures(root / "JPEGImages" / "my data", stems)
        for stem in stems:
            name = f"my data/{stem}"
            write(root / "Annotations" / f"{name}.xml", xml(stem, f"{name}.jpg"))
        lines = "".join(f'"my data/{stem}"\n' for stem in stems)
        write(root / "ImageSets" / "Main" / f"{subset}.txt", lines)
    return TWO


def cvat_yolo(root):
    pictures(root / "obj_train_data", "ab")
    for stem in "ab":
        write(root / "obj_train_data" / f"{stem}.txt", yolo(stem))
    write(root / "obj.names", "dog\ncat\n")
    write(root / "train.txt", "data/obj_train_data/a.jpg\ndata/obj_train_data/b.jpg\n")
    write(
        root / "obj.data",
        "classes = 2\nnames = data/obj.names\ntrain = data/train.txt\nbackup = backup/\n",
    )
    return ONE


def cvat_yolo_with_subsets(root):
    for subset, stems in (("train", "ab"), ("valid", "c")):
        pictures(root / f"obj_{subset}_data", stems)
        for stem in stems:
            write(root / f"obj_{subset}_data" / f"{stem}.txt", yolo(stem))
        write(root / f"{subset}.txt", "".join(f"obj_{subset}_data/{stem}.jpg\n" for stem in stems))
    write(root / "obj.names", "dog\ncat\n")
    write(root / "obj.data", "classes = 2\nnames = obj.names\ntrain = train.txt\nvalid = valid.txt\n")
    return TWO


def cvat_ultralytics(root):
    for subset, stems in (("Train", "ab"), ("Validation", "c")):
        pictures(root / "images" / subset, stems)
        for stem in stems:
            write(root / "labels" / subset / f"{stem}.txt", yolo(stem))
        write(root / f"{subset}.txt", "".join(f"data/images/{subset}/{stem}.jpg\n" for stem in stems))
    write(
        root / "data.yaml",
        "Train: Train.txt\nValidation: Validation.txt\nnames:\n  0: dog\n  1: cat\npath: .\n",
    )
    return TWO


# Label Studio: https://labelstud.io/guide/export, written by label-studio-converter


def label_studio_coco(root):
    pictures(root / "images", ["3f1a0b2c-a", "3f1a0b2c-b"])
    write(root / "result.json", coco("ab", "images/3f1a0b2c-{}.jpg", ids=(1, 0)))
    return ONE | {"classes": ("cat", "dog")}


def label_studio_coco_on_windows(root):
    pictures(root / "images", ["3f1a0b2c-a", "3f1a0b2c-b"])
    name = "..\\..\\label-studio\\label-studio\\media\\upload\\4\\3f1a0b2c-{}.jpg"
    write(root / "result.json", coco("ab", name, ids=(1, 0), ignore=0))
    return ONE | {"classes": ("cat", "dog")}


def label_studio_voc(root):
    pictures(root / "images", ["3f1a0b2c-a", "3f1a0b2c-b"], ".png")
    for stem in "ab":
        text = xml(stem, f"3f1a0b2c-{stem}", head="<folder>images</folder>")
        write(
            root / "Annotations" / f"3f1a0b2c-{stem}.xml", f'<?xml version="1.0" encoding="utf-8"?>\n{text}'
        )
    return ONE


def label_studio_yolo(root):
    pictures(root / "images", ["3f1a0b2c-a", "3f1a0b2c-b"])
    for stem in "ab":
        write(root / "labels" / f"3f1a0b2c-{stem}.txt", yolo(stem))
    write(root / "classes.txt", "dog\ncat\n")
    categories = [{"id": 0, "name": "dog"}, {"id": 1, "name": "cat"}]
    write(root / "notes.json", {"categories": categories, "info": {"contributor": "Label Studio"}})
    return ONE


# Roboflow: https://docs.roboflow.com/datasets/exporting-data, https://roboflow.com/formats


ROBOFLOW = "{}_jpg.rf.0123456789abcdef0123456789abcdef"


def roboflow_coco(root):
    group = {"id": 0, "name": "animals", "supercategory": "none"}
    for folder, stems in (("train", "ab"), ("valid", "c")):
        pictures(root / folder, [ROBOFLOW.format(stem) for stem in stems])
        write(root / folder / "_annotations.coco.json", coco(stems, ROBOFLOW + ".jpg", categories=[group]))
        for category in (content := coco(stems, ROBOFLOW + ".jpg"))["categories"]:
            category["supercategory"] = "animals"
        write(
            root / folder / "_annotations.coco.json",
            content | {"categories": [group, *content["categories"]]},
        )
    write(root / "README.dataset.txt", "animals > 2024-01-01\n")
    return TWO


def roboflow_voc(root):
    for folder, stems in (("train", "ab"), ("valid", "c")):
        for stem in stems:
            name = ROBOFLOW.format(stem)
            pictures(root / folder, [name])
            head = f"<folder></folder><path>{name}.jpg</path>"
            write(root / folder / f"{name}.xml", xml(stem, f"{name}.jpg", start=1, head=head))
    write(root / "README.roboflow.txt", "animals\n")
    return TWO


def roboflow_yolo(root):
    for folder, stems in (("train", "ab"), ("valid", "c")):
        pictures(root / folder / "images", [ROBOFLOW.format(stem) for stem in stems])
        for stem in stems:
            write(root / folder / "labels" / f"{ROBOFLOW.format(stem)}.txt", yolo(stem).rstrip("\n"))
    write(
        root / "data.yaml",
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\n"
        "nc: 2\nnames: ['dog', 'cat']\n\nroboflow:\n  workspace: me\n  project: animals\n  version: 1\n",
    )
    return TWO


# FiftyOne: https://docs.voxel51.com/user_guide/export_datasets.html


def fiftyone_coco(root):
    pictures(root / "data", "ab")
    content = coco("ab")
    for category in content["categories"]:
        category["supercategory"] = None
    write(root / "labels.json", {"info": {"year": "", "url": "https://voxel51.com/fiftyone"}} | content)
    return ONE


def fiftyone_coco_with_splits(root):
    for folder, stems in (("train", "ab"), ("validation", "c")):
        pictures(root / folder / "data", stems)
        write(root / folder / "labels.json", coco(stems))
    return TWO


def fiftyone_voc(root):
    pictures(root / "data", "ab", ".png")
    for stem in "ab":
        head = f"<folder></folder><path>/home/me/export/data/{stem}.png</path>"
        write(root / "labels" / f"{stem}.xml", xml(stem, f"{stem}.png", head=head))
    return ONE


def fiftyone_voc_with_splits(root):
    for folder, stems in (("train", "ab"), ("val", "c")):
        pictures(root / folder / "data", stems)
        for stem in stems:
            write(root / folder / "labels" / f"{stem}.xml", xml(stem, f"{stem}.jpg"))
    return TWO


def fiftyone_yolo(root):
    for folder, stems in (("train", "ab"), ("val", "c")):
        pictures(root / "images" / folder, stems)
        for stem in stems:
            write(root / "labels" / folder / f"{stem}.txt", yolo(stem))
    write(
        root / "dataset.yaml",
        "names:\n  0: dog\n  1: cat\npath: /home/me/export\ntrain: ./images/train/\nval: ./images/val/\n",
    )
    return TWO


# Supervisely: https://github.com/supervisely-ecosystem/export-to-coco


def supervisely_coco(root):
    pictures(root / "ds0" / "images", "ab")
    content = coco("ab")
    for entry in content["annotations"]:
        left, top, width, height = entry["bbox"]
        entry["segmentation"] = [
            [left, top, left + width, top, left + width, top + height, left, top + height]
        ]
    for category in content["categories"]:
        category["supercategory"] = category["name"]
    write(root / "ds0" / "annotations" / "instances.json", content)
    return ONE


def supervisely_coco_with_two_datasets(root):
    for folder, stems in (("train", "ab"), ("val", "c")):
        pictures(root / folder / "img", stems)
        write(root / folder / "annotations" / "instances.json", coco(stems))
    return TWO


# LabelImg: https://github.com/HumanSignal/labelImg


def labelimg_voc(root):
    pictures(root, "ab")
    for stem in "ab":
        head = f"<folder>photos</folder><path>C:\\Users\\me\\photos\\{stem}.jpg</path>"
        write(root / f"{stem}.xml", xml(stem, f"{stem}.jpg", start=1, head=head))
    return ONE


def labelimg_voc_in_folders(root):
    pictures(root / "photos", "ab", ".JPG")
    for stem in "ab":
        write(root / "saved" / f"{stem}.xml", xml(stem, f"{stem}.JPG", start=1))
    return ONE


def labelimg_yolo(root):
    pictures(root, "ab")
    for stem in "ab":
        write(root / f"{stem}.txt", yolo(stem))
    write(root / "classes.txt", "dog\ncat\n")
    return ONE


# labelme2coco: https://github.com/fcakyon/labelme2coco; labelme's own: examples/instance_segmentation


def labelme2coco(root):
    pictures(root, "ab", ".png")
    for stem in "ab":  # labelme's own files lie there, too
        shapes = [{"label": "cat", "points": [[1, 2], [3, 4]], "shape_type": "rectangle"}]
        write(root / f"{stem}.json", {"version": "5.4.1", "shapes": shapes, "imagePath": f"{stem}.png"})
    write(root / "dataset.json", coco("ab", "{}.png", ids=(1, 0)))
    return ONE | {"classes": ("cat", "dog")}


def labelme2coco_with_splits(root):
    pictures(root / "images", "abc")
    write(root / "train.json", coco("ab", ids=(1, 0)))
    write(root / "val.json", coco("c", ids=(1, 0)))
    return TWO | {"classes": ("cat", "dog")}


def labelmes_own_script(root):
    pictures(root / "JPEGImages", "ab")
    background = {"supercategory": None, "id": 0, "name": "_background_"}
    write(root / "annotations.json", coco("ab", "JPEGImages/{}.jpg", categories=[background]))
    pictures(root / "Visualization", "ab")
    return ONE


# makesense: https://github.com/SkalskiP/make-sense, which writes files without the images


def makesense_coco(root):
    pictures(root, "ab")
    write(root / "labels_my-project-name_2024-01-31-03-05-59.json", coco("ab"))
    return ONE


def makesense_voc(root):
    pictures(root, "ab")
    for stem in "ab":
        head = "<folder>my-project-name</folder>"
        text = xml(stem, f"{stem}.jpg", head=head, difficult="Unspecified")
        write(root / "labels_my-project-name_2024-01-31-03-05-59" / f"{stem}.xml", text)
    return ONE


def makesense_yolo(root):
    pictures(root, "ab")
    for stem in "ab":
        write(root / f"{stem}.txt", yolo(stem).rstrip("\n"))
    write(root / "labels.txt", "dog\ncat\n")  # of which the names were loaded
    return ONE


# COCO itself: https://cocodataset.org/#download


def coco2017(root):
    for split, stems in (("train2017", "ab"), ("val2017", "c")):
        pictures(root / split, stems)
        write(root / "annotations" / f"instances_{split}.json", coco(stems))
        content = coco(stems)
        for kind in ("person_keypoints", "captions", "panoptic", "stuff"):
            write(root / "annotations" / f"{kind}_{split}.json", content | {"annotations": []})
    return TWO


TOOLS = [
    *(cvat_coco, cvat_coco_of_older_versions, cvat_coco_with_subsets, cvat_voc),
    *(cvat_voc_with_subsets_and_folders, cvat_yolo, cvat_yolo_with_subsets, cvat_ultralytics),
    *(label_studio_coco, label_studio_coco_on_windows, label_studio_voc, label_studio_yolo),
    *(roboflow_coco, roboflow_voc, roboflow_yolo),
    *(fiftyone_coco, fiftyone_coco_with_splits, fiftyone_voc, fiftyone_voc_with_splits, fiftyone_yolo),
    *(supervisely_coco, supervisely_coco_with_two_datasets),
    *(labelimg_voc, labelimg_voc_in_folders, labelimg_yolo),
    *(labelme2coco, labelme2coco_with_splits, labelmes_own_script),
    *(makesense_coco, makesense_voc, makesense_yolo, coco2017),
]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_an_export_is_read_without_options(tmp_path, tool):
    expected = tool(tmp_path)
    names = expected.pop("classes", ("cat", "dog") if "voc" in tool.__name__ else ("dog", "cat"))
    assert [split for split in ("train", "val", "test") if find_split(tmp_path, split)] == list(expected)
    for split, (images, boxes) in expected.items():
        found = load(tmp_path, split)
        assert not [problem for problem in found.problems if problem.fatal]
        assert (len(found), len(found.boxes)) == (images, boxes)
        assert found.class_names == names
        cats = found.boxes[[names[label - 1] == "cat" for label in found.labels]]
        # Tools count VOC's corners from 0 or from 1.
        np.testing.assert_allclose(cats, [BOX], atol=1 if "voc" in tool.__name__ else 1e-3)
        for i in range(len(found)):
            assert found.path(i).is_file()
