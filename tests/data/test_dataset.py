import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_data import BOX, annotation, as_voc, as_yolo, coco, picture, plain
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision import datasets, tv_tensors

from ssd import shapes
from ssd.data import (
    AnnotationError,
    DetectionDataset,
    Problem,
    annotations_of,
    as_targets,
    item_name,
    load,
    require_items,
)
from ssd.data.dataset import parts_of, require_in_pixels

NAN = float("nan")


def test_a_subset_has_the_annotations_of_its_images(tmp_path):
    names = [f"{letter}.jpg" for letter in "abc"]
    images = [{"id": 10 + i, "file_name": name} for i, name in enumerate(names)]
    places = [0, 0, 2, 2, 2]
    boxes = [annotation(id=i, image_id=10 + place, bbox=[i, 0, 9, 9]) for i, place in enumerate(places)]
    boxes.append(annotation(id=9, image_id=11, bbox=[7, 7, 0, 0]))
    dataset = DetectionDataset(load(plain(tmp_path, coco(images, boxes), names)), lenient=True)
    part = annotations_of(Subset(Subset(dataset, [1, 2, 0]), [1, 0, 2]))  # images c, b, a
    assert part.file_names.tolist() == ["c.jpg", "b.jpg", "a.jpg"]
    assert part.image_ids == (12, 11, 10)
    assert part.starts.tolist() == [0, 3, 4, 6]
    assert part.boxes[:, 0].tolist() == [2, 3, 4, 7, 0, 1]
    assert part.left_out == {"zero area": 1}
    whole = dataset.annotations
    whole = replace(whole, problems=tuple(Problem("note", name, "", "", fatal=False) for name in names))
    assert [each.file for each in whole.select([2, 0]).problems] == ["a.jpg", "c.jpg"]
    assert annotations_of(Subset([1, 2], [0])) is None


def test_crowd_is_for_evaluation_only_unless_asked(tmp_path):
    plain(tmp_path, coco(annotations=[annotation(), annotation(id=2, iscrowd=1, bbox=[0, 0, 90, 70])]))
    found = load(tmp_path)
    assert found.crowd.tolist() == [False, True]
    assert len(DetectionDataset(found)[0][1]["boxes"]) == 1
    assert len(DetectionDataset(found, crowd=True)[0][1]["boxes"]) == 2
    assert load(as_voc(tmp_path / "voc", difficult=1)).crowd.tolist() == [True]


def test_background_images_stay(tmp_path):
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}]
    dataset = DetectionDataset(load(plain(tmp_path, coco(images), ("a.jpg", "b.jpg"))))
    assert len(dataset) == 2
    _, target = dataset[1]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)


def test_another_size_than_annotated(tmp_path):
    plain(tmp_path)
    picture(tmp_path / "train" / "a.jpg", (80, 100))
    with pytest.raises(
        AnnotationError, match=r"a\.jpg: is 80x100, but .*train\.json says 100x80 .*exchanged"
    ):
        DetectionDataset(load(tmp_path))[0]


def test_exif_turned_images_have_upright_boxes(tmp_path):
    as_yolo(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "images/train/a.jpg", (80, 100), exif=exif)  # upright: 100x80
    image, target = DetectionDataset(load(tmp_path))[0]
    assert image.size == (100, 80)
    np.testing.assert_allclose(target["boxes"], [BOX])


def test_indices_count_from_the_end_where_they_are_negative(tmp_path):
    names = [f"{letter}.jpg" for letter in "ab"]
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    boxes = [annotation(id=i, image_id=i, bbox=[i, 0, 9, 9]) for i in range(2)]
    dataset = DetectionDataset(load(plain(tmp_path, coco(images, boxes), names)))
    np.testing.assert_allclose(dataset[-1][1]["boxes"], [[1, 0, 10, 9]])
    assert annotations_of(Subset(dataset, [-1])).boxes[:, 0].tolist() == [1]
    with pytest.raises(IndexError):
        dataset[2]
    assert len(list(dataset)) == 2


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"boxes": [[0, 0, 5, 5]]}, '"boxes" and "labels"'),
        ({"boxes": [[0, 0, 5, 5]], "labels": []}, "1 boxes and 0 labels"),
        ({"boxes": [[0, 0, 0, 5]], "labels": [1]}, "no area"),
        ({"boxes": [[0, 0, NAN, 5]], "labels": [1]}, "not finite"),
        ({"boxes": [[0, 0, 5, 5]], "labels": [0]}, "count from 1"),
        ({"boxes": np.ones((4, 3)), "labels": [1, 1, 1]}, r"boxes are \[M, 4\] .*; got \[4, 3\]"),
        ({"boxes": [0, 0, 5, 5], "labels": [1]}, r"boxes are \[M, 4\] .*; got \[4\]"),
        ({"boxes": np.ones((1, 2, 4)), "labels": [1, 1]}, r"boxes are \[M, 4\] .*; got \[1, 2, 4\]"),
        ({"boxes": [[0, 0, 5, 5]], "labels": [[1]]}, r"labels are \[M\].*; got \[1, 1\]"),
        ({"boxes": [[0, 0, 5, 5]], "labels": 1}, r"labels are \[M\].*; got \[\]"),
        ({"boxes": [[0, 0, 5, 5]], "labels": [1.5]}, "whole numbers"),
        ({"boxes": [[0, 0, 5, 5]], "labels": [NAN]}, "whole numbers"),
        ({"boxes": [[0, 0, 5, 5], [1]], "labels": [1, 1]}, "its boxes are no array of numbers"),
        ({"boxes": [[0, 0, 5, 5]], "labels": ["cat"]}, "its labels are no numbers"),
        ({"boxes": [[0, 0, 5, 1e300]], "labels": [1]}, "not finite"),
        ({"boxes": None, "labels": [1]}, "its boxes are no numbers"),
        (None, '"boxes" and "labels", not a NoneType'),
        ({}, '"boxes" and "labels", not one with nothing'),
        ({"bboxes": [], "class": []}, "not one with 'bboxes', 'class'"),
        ({"image_id": 3, "bboxes": []}, "not one with 'image_id', 'bboxes'"),
        ([{"bbox": [0, 0, 5, 5], "category_id": 1}], "not a list.*wrap_dataset_for_transforms_v2"),
        ({"annotation": {"object": []}}, "not one with 'annotation'.*wrap_dataset_for_transforms_v2"),
    ],
)
def test_targets_of_other_datasets_are_checked(target, message):
    with pytest.raises(AnnotationError, match=f"photo 3: .*{message}"):
        as_targets(target, "photo 3")


def test_targets_of_torchvisions_kind():
    boxes, labels = as_targets({"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}, "x")
    assert boxes.shape == (0, 4)
    assert labels.dtype == np.int64


@pytest.mark.parametrize(
    ("box_format", "box"),
    [("XYXY", [20, 15, 70, 60]), ("XYWH", [20, 15, 50, 45]), ("CXCYWH", [45, 37.5, 50, 45])],
)
def test_boxes_that_say_their_format_are_converted(box_format, box):
    boxes = tv_tensors.BoundingBoxes([box], format=box_format, canvas_size=(90, 120))
    found, _ = as_targets({"boxes": boxes, "labels": torch.tensor([1])}, "x")
    assert (found.tolist(), found.dtype) == ([[20, 15, 70, 60]], np.float32)
    empty = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format=box_format, canvas_size=(90, 120))
    assert as_targets({"boxes": empty, "labels": []}, "x")[0].shape == (0, 4)


@pytest.mark.parametrize(
    ("box_format", "box"),
    [
        ("XYWHR", [20, 15, 50, 45, 30]),
        ("CXCYWHR", [45, 37, 50, 45, 30]),
        ("XYXYXYXY", [0, 0, 9, 0, 9, 9, 0, 9]),
    ],
)
def test_rotated_boxes_are_refused(box_format, box):
    if not hasattr(tv_tensors.BoundingBoxFormat, box_format):
        pytest.skip("an older torchvision has no rotated boxes")
    boxes = tv_tensors.BoundingBoxes(torch.tensor([box]).float(), format=box_format, canvas_size=(90, 120))
    with pytest.raises(
        AnnotationError, match=rf"^x: its boxes are rotated \({box_format}\); give the upright"
    ):
        as_targets({"boxes": boxes, "labels": [1]}, "x")


def test_torchvisions_wrapped_datasets_are_taken(tmp_path, capsys):
    """The COCO one has nothing but an id for an image without annotations; VOC's labels are those of VOC."""
    images = [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}]
    plain(tmp_path, coco(images, [annotation(image_id=7)]), ("a.jpg", "b.jpg"))
    raw = datasets.CocoDetection(tmp_path / "train", tmp_path / "train.json")
    wrapped = datasets.wrap_dataset_for_transforms_v2(raw)
    boxes, labels = as_targets(wrapped[0][1], "x")
    assert (boxes.tolist(), labels.tolist()) == ([BOX], [annotation()["category_id"]])
    boxes, labels = as_targets(wrapped[1][1], "x")
    assert (boxes.shape, labels.shape) == ((0, 4), (0,))
    with pytest.raises(AnnotationError, match="wrap_dataset_for_transforms_v2"):
        as_targets(raw[0][1], "x")
    as_voc(tmp_path / "VOCdevkit" / "VOC2012")
    wrapped = datasets.wrap_dataset_for_transforms_v2(datasets.VOCDetection(tmp_path, image_set="train"))
    boxes, labels = as_targets(wrapped[0][1], "x")
    assert (boxes.tolist(), labels.tolist()) == ([[11, 21, 40, 60]], [8])  # cat


@pytest.mark.parametrize("boxes", [[], np.zeros((4, 0)), torch.zeros(0), torch.zeros(0, 4).bfloat16()])
def test_targets_without_boxes(boxes):
    boxes, labels = as_targets({"boxes": boxes, "labels": []}, "x")
    assert (boxes.shape, boxes.dtype) == ((0, 4), np.float32)
    assert (labels.shape, labels.dtype) == ((0,), np.int64)


def test_targets_of_every_kind_of_number():
    given = torch.tensor([[1.0, 2, 3, 4]], dtype=torch.bfloat16, requires_grad=True)
    boxes, labels = as_targets({"boxes": given, "labels": torch.tensor([2.0])}, "x")
    assert boxes.tolist() == [[1, 2, 3, 4]]
    assert labels.tolist() == [2]


def test_an_empty_dataset_is_told(tmp_path):
    dataset = DetectionDataset(load(plain(tmp_path)))
    assert require_items(dataset, "to train on") == 1
    with pytest.raises(AnnotationError, match="no images to train on: the dataset is empty"):
        require_items(Subset(dataset, []), "to train on")
    with pytest.raises(AnnotationError, match=r"train\.json: there are no images to evaluate on"):
        require_items(dataset.annotations.select([]), "to evaluate on")


def test_items_are_called_by_their_file_where_the_dataset_tells(tmp_path):
    dataset = DetectionDataset(load(plain(tmp_path)))
    assert item_name(Subset(dataset, [0]), 0) == str(tmp_path / "train" / "a.jpg")
    assert item_name([1, 2, 3], 2) == "item 2"


def test_a_dataset_travels_to_a_worker(tmp_path):
    shapes.write_dataset(tmp_path, 2, 0)
    dataset = pickle.loads(pickle.dumps(DetectionDataset(load(tmp_path))))
    assert len(dataset[1][1]["boxes"]) == len(dataset[1][1]["labels"])


def test_items_of_parts_keep_their_names(tmp_path):
    first, second = (
        DetectionDataset(
            load(plain(tmp_path / name, coco([{"id": 1, "file_name": f"{name}.jpg"}]), [f"{name}.jpg"]))
        )
        for name in "ab"
    )
    both = ConcatDataset([first, Subset(ConcatDataset([second, first]), [1, 0])])
    named = [item_name(both, i).rsplit("/", 1)[-1] for i in (0, 1, 2, -1)]
    assert named == ["a.jpg", "a.jpg", "b.jpg", "b.jpg"]
    assert parts_of(both) == [first, second, first]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[5, 5, 9, 9], [700, 20, 900, 60]], r"item 2: the box \[700.0, 20.0, 900.0, 60.0\] .*of 100x80"),
        ([[-9, 5, 0, 9]], "is outside its image"),
        ([[5, 80, 9, 99]], "is outside its image"),
        ([[0.1, 0.2, 0.5, 1], [0, 0, 1, 1]], "item 2: its boxes, such as .* parts of the image of 100x80"),
        ([[-9, -9, 5, 5], [90, 70, 200, 300]], None),
        ([[0, 0, 0.5, 0.5], [0.5, 0.5, 1.5, 1]], None),
        ([], None),
    ],
)
def test_boxes_that_nobody_judged_have_to_be_in_their_image(boxes, message):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    if message is None:
        require_in_pixels(boxes, (100, 80), Dataset(), 2)
        return
    with pytest.raises(AnnotationError, match=message):
        require_in_pixels(boxes, (100, 80), Dataset(), 2)


def test_a_box_of_one_pixel_in_the_corner_is_one_where_it_was_judged(tmp_path):
    dataset = DetectionDataset(load(plain(tmp_path)))
    corner = np.array([[0, 0, 1, 1]], np.float32)
    require_in_pixels(corner, (100, 80), Subset(ConcatDataset([dataset, dataset]), [1]), 0)
    with pytest.raises(AnnotationError, match="parts of the image"):
        require_in_pixels(corner, (100, 80), Dataset(), 0)
