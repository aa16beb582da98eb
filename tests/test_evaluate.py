import contextlib
import io
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_data import blurred, perfect
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ssd import evaluate as evaluation
from ssd import shapes
from ssd.data import AnnotationError, DetectionDataset, load
from ssd.detections import Detections
from ssd.detector import Detector
from ssd.distributed import World
from ssd.evaluate import METRICS, coco_results, detect_all, evaluate_detector, measure
from ssd.export import export
from ssd.images import ImageError

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A dataset of twelve scenes, in the COCO format."""
    folder = tmp_path_factory.mktemp("scenes")
    shapes.write_dataset(folder, 0, 12, seed=1)
    return folder


def test_equals_pycocotools_on_files(scenes, tmp_path):
    """The official way: both files, COCO.loadRes, COCOeval."""
    annotations = load(scenes, "val")
    found = blurred(annotations)
    results = tmp_path / "results.json"
    results.write_text(json.dumps(coco_results(annotations, found)))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(scenes / "val.json"))
        official = COCOeval(truth, truth.loadRes(str(results)), "bbox")
        official.evaluate(), official.accumulate(), official.summarize()
    ours = measure(annotations, found)
    assert list(ours.metrics) == list(METRICS)
    np.testing.assert_allclose(list(ours.metrics.values()), official.stats, atol=1e-6)
    assert 0.2 < ours.metrics["AP"] < 0.9
    per_class = official.eval["precision"][:, :, :, 0, 2].mean((0, 1))
    np.testing.assert_allclose([row["AP"] for row in ours.per_class.values()], per_class, atol=1e-6)
    np.testing.assert_allclose(ours.metrics["AP"], per_class.mean(), atol=1e-6)


@pytest.mark.parametrize("package", ["pycocotools", "faster_coco_eval"])
def test_both_packages_give_the_same_numbers(scenes, monkeypatch, package):
    if package == "faster_coco_eval":
        pytest.importorskip(package, reason="faster-coco-eval is an extra")
    annotations = load(scenes, "val")
    monkeypatch.setattr(evaluation, "find_spec", lambda name: package == name)
    chosen = measure(annotations, blurred(annotations))
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    official = measure(annotations, blurred(annotations))
    assert chosen.per_class.keys() == official.per_class.keys()
    np.testing.assert_allclose(list(chosen.metrics.values()), list(official.metrics.values()), atol=1e-9)
    for name, row in official.per_class.items():
        assert chosen.per_class[name] == pytest.approx(row, abs=1e-9)


def renumber(content):
    for number, each in enumerate(content["annotations"]):
        each["id"] = number  # from 0: pycocotools takes a match with 0 for none


def same_ids(content):
    for each in content["annotations"]:
        each["id"] = 7


def bare(content):
    for each in content["annotations"]:
        del each["area"], each["iscrowd"], each["id"]


def image_ids(name):
    def change(content):
        ids = {each["id"]: name(each["id"]) for each in content["images"]}
        for each in content["images"]:
            each["id"] = ids[each["id"]]
        for each in content["annotations"]:
            each["image_id"] = ids[each["image_id"]]

    return change


def sparse_categories(content):
    for each in content["annotations"]:
        each["category_id"] = 1000 * each["category_id"]
    for each in content["categories"]:
        each["id"] = 1000 * each["id"]


@pytest.mark.parametrize(
    "change",
    [
        renumber,
        same_ids,
        bare,
        image_ids(lambda i: f"photo {i}"),
        image_ids(lambda i: 2**53 + i),
        image_ids(lambda i: i - 1),
        sparse_categories,
    ],
    ids=[
        "ids from 0",
        "equal ids",
        "fields missing",
        "text ids",
        "huge ids",
        "image id 0",
        "sparse categories",
    ],
)
def test_odd_files_do_not_bend_the_result(scenes, tmp_path, change):
    content = json.loads((scenes / "val.json").read_text())
    change(content)
    (tmp_path / "odd.json").write_text(json.dumps(content))
    odd = load(tmp_path / "odd.json", images=scenes / "val")
    plain = load(scenes, "val")
    assert measure(odd, perfect(odd)).metrics["AP"] == pytest.approx(1)
    assert measure(odd, blurred(odd)).metrics == pytest.approx(measure(plain, blurred(plain)).metrics)


def test_nothing_detected_is_zero_and_a_warning(scenes, capsys):
    annotations = load(scenes, "val")
    with pytest.warns(UserWarning, match="nothing was detected"):
        result = measure(annotations, {})
    assert result.metrics["AP"] == result.metrics["AR100"] == 0
    assert all(row["AP"] == 0 for row in result.per_class.values())
    assert capsys.readouterr().out == ""


def test_images_without_boxes_count(scenes):
    annotations = load(scenes, "val")
    found = perfect(annotations)
    empty = next(i for i in range(len(annotations)) if annotations.starts[i] == annotations.starts[i + 1])
    box = Detections([[10, 10, 60, 60]], [0.95], [0], annotations.class_names, (480, 480))
    assert (
        measure(annotations, found | {empty: box}).metrics["AP"] < measure(annotations, found).metrics["AP"]
    )


def test_crowd_is_ignored(scenes):
    annotations = load(scenes, "val")
    crowd = replace(annotations, crowd=np.arange(len(annotations.labels)) == 0)
    image = int(np.repeat(np.arange(len(annotations)), np.diff(annotations.starts))[0])
    found = perfect(crowd)
    without = found | {image: found[image][1:]}
    assert measure(crowd, found).metrics["AP"] == pytest.approx(1)
    assert measure(crowd, without).metrics["AP"] == pytest.approx(1)
    assert measure(crowd, found).boxes == len(annotations.labels) - 1


def test_without_any_box_there_is_nothing_to_measure(scenes):
    annotations = load(scenes, "val")
    empty = replace(
        annotations,
        starts=np.zeros_like(annotations.starts),
        **{name: getattr(annotations, name)[:0] for name in ("boxes", "labels", "crowd", "areas", "usable")},
    )
    result = measure(empty, perfect(annotations))
    assert result.metrics["AP"] == -1
    assert "-" in str(result)


class Items(torch.utils.data.Dataset):
    """Any torch Dataset, as torchvision's references have them."""

    def __init__(self, folder):
        self._dataset = DetectionDataset(load(folder, "val"))

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, index):
        image, target = self._dataset[index]
        return image, {name: torch.from_numpy(value) for name, value in target.items()}


def test_any_dataset_gives_what_the_folder_gives(scenes, scene_model):
    detector = Detector(scene_model, shapes.CLASSES)
    expected = evaluate_detector(detector, load(scenes, "val"), ALONE)
    assert expected.detections > 20
    assert evaluate_detector(detector, Items(scenes), ALONE) == expected
    assert evaluate_detector(detector, DetectionDataset(load(scenes, "val")), ALONE) == expected


def test_a_part_of_a_folder_gives_what_its_annotations_give(scenes, scene_model):
    """With crowd boxes and areas, which the items of a dataset do not have."""
    detector = Detector(scene_model, shapes.CLASSES)
    whole = load(scenes, "val", class_names=shapes.CLASSES)
    whole = replace(whole, crowd=np.arange(len(whole.labels)) % 2 == 0, areas=whole.areas / 4)
    part = torch.utils.data.Subset(DetectionDataset(whole), range(0, 12, 2))
    found = evaluate_detector(detector, part)
    assert found == evaluate_detector(detector, whole.select(range(0, 12, 2)))
    assert found.boxes == sum(int((~whole.crowd[whole.of_image(i)]).sum()) for i in range(0, 12, 2))


class OneItem(torch.utils.data.Dataset):
    """An image with two boxes, and what else an item says of them."""

    def __init__(self, **more):
        self._more = more

    def __len__(self):
        return 1

    def __getitem__(self, index):
        boxes = torch.tensor([[10.0, 10, 60, 60], [80, 80, 150, 150]])
        return Image.new("RGB", (200, 200)), {"boxes": boxes, "labels": torch.tensor([1, 2])} | self._more


def test_crowd_and_areas_of_items_count(scene_model):
    detector = Detector(scene_model, shapes.CLASSES)
    truth, _ = detect_all(detector, OneItem(iscrowd=torch.tensor([0, 1]), area=[9.5, 8]), ALONE)
    assert truth.crowd.tolist() == [False, True]
    assert truth.areas.tolist() == [9.5, 8]
    truth, _ = detect_all(detector, OneItem(), ALONE)
    assert truth.crowd.tolist() == [False, False]
    assert truth.areas.tolist() == [2500, 4900]


def test_sizes_that_are_the_boxes_own_are_told(scenes, scene_model):
    detector = Detector(scene_model, shapes.CLASSES)
    given = evaluate_detector(detector, OneItem(area=[2000, 4000]), ALONE)
    assert (given.sizes_by_box, "area of the box" in str(given)) == (0, False)
    own = evaluate_detector(detector, OneItem(), ALONE)
    assert "small, medium and large are by the area of the box for 2 of 2 boxes" in str(own)
    assert own.to_dict()["sizes_by_box"] == 2
    annotations = load(scenes, "val")
    some = replace(annotations, areas_given=np.arange(len(annotations.labels)) > 2)
    assert measure(some, perfect(some)).sizes_by_box == 3
    assert measure(annotations, perfect(annotations)).sizes_by_box == 0


def test_areas_that_cannot_be_do_not_bend_the_sizes(scenes, tmp_path):
    """As where a converter wrote 1 everywhere: then those of the boxes count, which here are right."""
    content = json.loads((scenes / "val.json").read_text())
    for each in content["annotations"]:
        each["area"] = each["bbox"][2] * each["bbox"][3]
    (tmp_path / "right.json").write_text(json.dumps(content))
    for each in content["annotations"]:
        each["area"] = 1.0
    (tmp_path / "ones.json").write_text(json.dumps(content))
    right, ones = (load(tmp_path / name, images=scenes / "val") for name in ("right.json", "ones.json"))
    found = measure(ones, blurred(ones))
    assert found.metrics == measure(right, blurred(right)).metrics
    assert found.metrics["APm"] >= 0
    assert found.sizes_by_box == found.boxes


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"iscrowd": torch.zeros(3)}, r'"iscrowd" is \[M\], a number for each of its 2 boxes; got \[3\]'),
        ({"iscrowd": [0]}, r'"iscrowd" is \[M\].*; got \[1\]'),
        ({"iscrowd": 0}, r'"iscrowd" is \[M\].*; got \[\]'),
        ({"iscrowd": []}, r'"iscrowd" is \[M\].*; got \[0\]'),
        ({"area": torch.ones(2, 1)}, r'"area" is \[M\].*; got \[2, 1\]'),
        ({"area": ["big", "small"]}, r'its "area" are no numbers'),
        ({"boxes": torch.ones(4, 2)}, r"boxes are \[M, 4\] .*; got \[4, 2\]"),
    ],
)
def test_an_item_that_does_not_fit_is_told(scene_model, more, message):
    with pytest.raises(AnnotationError, match=f"item 0: {message}"):
        detect_all(Detector(scene_model, shapes.CLASSES), OneItem(**more), ALONE)


def test_an_item_whose_image_cannot_be_read_is_named(scene_model):
    class Broken(OneItem):
        def __getitem__(self, index):
            return b"no image", super().__getitem__(index)[1]

    with pytest.raises(ImageError, match="^item 0: this is a text file"):
        detect_all(Detector(scene_model, shapes.CLASSES), Broken(), ALONE)


def test_an_empty_dataset_is_told(scenes, scene_model):
    detector = Detector(scene_model, shapes.CLASSES)
    annotations = load(scenes, "val", class_names=shapes.CLASSES)
    for empty in (annotations.select([]), torch.utils.data.Subset(OneItem(), [])):
        with pytest.raises(AnnotationError, match="there are no images to evaluate on"):
            evaluate_detector(detector, empty)


def test_what_was_left_out_is_told(scenes):
    """Boxes without area are not trained on, but evaluated."""
    annotations = replace(load(scenes, "val"), left_out={"missing image": 2, "zero area": 3})
    result = measure(annotations, perfect(annotations))
    assert result.to_dict()["left_out"] == {"missing image": 2}
    assert "left out of these numbers (missing image: 2)" in str(result)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_shares_are_whole_and_without_overlap(scenes, scene_model, size, monkeypatch):
    detector = Detector(scene_model, shapes.CLASSES)
    annotations = load(scenes, "val")
    _, expected = detect_all(detector, annotations, ALONE)
    shares = []
    for rank in range(size):
        monkeypatch.setattr(World, "gather", lambda self, value: shares.append(value) or [value])
        detect_all(detector, annotations, World(rank, size, torch.device("cpu")))
    assert sorted(i for found, _ in shares for i in found) == list(range(len(annotations)))
    monkeypatch.setattr(World, "gather", lambda self, value: shares)
    _, merged = detect_all(detector, annotations, World(0, size, torch.device("cpu")))
    assert list(merged) == list(expected)
    for i, each in expected.items():
        np.testing.assert_allclose(merged[i].boxes, each.boxes, atol=1e-3)
        assert merged[i].class_ids.tolist() == each.class_ids.tolist()


def test_other_classes_are_refused(scenes, detector):
    with pytest.raises(AnnotationError, match="class_names=detector"):
        detect_all(detector, load(scenes, "val"), ALONE)


def test_an_image_of_another_size_is_refused(scenes, tmp_path, scene_model):
    shapes.write_dataset(tmp_path, 0, 1, seed=9)
    Image.new("RGB", (100, 50)).save(tmp_path / "val" / "000000.jpg")
    with pytest.raises(AnnotationError, match="is 100x50, but"):
        detect_all(Detector(scene_model, shapes.CLASSES), load(tmp_path, "val"), ALONE)


def test_the_table_lines_up(scenes):
    annotations = load(scenes, "val")
    with warnings.catch_warnings():
        lines = str(measure(annotations, blurred(annotations))).splitlines()
    numbers = [line for line in lines if line.startswith(("AP", "AR")) and "." in line]
    assert len({line.index(".") for line in numbers}) == 1
    table = lines[lines.index("") :][-7:]
    assert len({len(line) for line in table}) == 1


@pytest.mark.slow
def test_shipped_weights_keep_their_ap_in_every_precision(tmp_path):
    """AP on scenes within 0.005 of fp32: in bf16, and in int8 by OpenVINO."""
    shapes.write_dataset(tmp_path / "data", 24, 160, 3)
    reference = Detector.load("shapes", "cpu", "fp32")
    val = load(tmp_path / "data", "val", class_names=reference.class_names)
    expected = evaluate_detector(reference, val, ALONE).metrics
    assert expected["AP"] > 0.7
    path = export(
        "shapes", tmp_path / "ir", "openvino", precision="int8", calibrate=tmp_path / "data" / "train"
    )
    for other in (Detector.load("shapes", "cpu", "bf16"), Detector.load(path)):
        found = evaluate_detector(other, val, ALONE).metrics
        assert abs(found["AP"] - expected["AP"]) <= 0.005, other


# --- Thresholds ---


def f1_by_coco(annotations, found, class_id, least):
    """F1 of the detections of a class whose score is above `least`, counted in what pycocotools matched."""
    kept = {
        i: each[((each.class_ids == class_id) & (each.scores > least)).tolist()] for i, each in found.items()
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth, results = COCO(), COCO()
        truth.dataset = evaluation._truth(annotations)
        results.dataset = truth.dataset | {"annotations": evaluation._results(kept)}
        truth.createIndex(), results.createIndex()
        official = COCOeval(truth, results, "bbox")
        official.params.iouThrs, official.params.areaRng = np.array([0.5]), [[0, 1e10]]
        official.params.areaRngLbl, official.params.catIds = ["all"], [class_id + 1]
        official.evaluate()
    images = [each for each in official.evalImgs if each is not None]
    hits = sum(((each["dtMatches"][0] > 0) & ~each["dtIgnore"][0].astype(bool)).sum() for each in images)
    boxes = sum((np.array(each["gtIgnore"]) == 0).sum() for each in images)
    detections = sum((~each["dtIgnore"][0].astype(bool)).sum() for each in images)
    return 2 * hits / max(boxes + detections, 1)


@pytest.mark.parametrize("crowd", [False, True])
def test_no_threshold_has_a_higher_f1_than_the_best(scenes, crowd):
    annotations = load(scenes, "val")
    annotations = replace(annotations, crowd=(np.arange(len(annotations.labels)) % 4 == 0) & crowd)
    found = blurred(annotations)
    found[3] = replace(found[3], scores=found[4].scores[:1].repeat(len(found[3])))  # equal scores
    thresholds = evaluation.best_thresholds(annotations, found)
    assert len(set(thresholds)) > 3
    for class_id, threshold in enumerate(thresholds):
        scores = sorted(
            {s for each in found.values() for s in each.scores[each.class_ids == class_id].tolist()} | {0.05}
        )
        f1 = {least: f1_by_coco(annotations, found, class_id, least) for least in scores}
        best = max(least for least in scores if f1[least] == max(f1.values()))
        above = min(score for score in scores if score > best)
        assert threshold == pytest.approx((best + above) / 2)
        assert np.float32(threshold) == threshold


def test_thresholds_by_hand(scenes):
    """Of the first class: found, found, the first again, wrong, found, wrong; another box is missed."""
    one = load(scenes, "val").select([0])
    boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10], [0, 20, 10, 30.0]])
    truth = replace(
        one,
        starts=np.array([0, 5]),
        boxes=boxes,
        labels=np.array([1, 1, 1, 1, 2]),
        crowd=np.zeros(5, bool),
        areas=np.full(5, 100.0),
        areas_given=np.ones(5, bool),
        usable=np.ones(5, bool),
    )
    wrong = np.array([[100, 100, 110, 110.0]])
    places = np.concatenate([boxes[:2], boxes[:1], wrong, boxes[2:3], wrong])
    found = Detections(places, [0.9, 0.8, 0.7, 0.6, 0.3, 0.2], [0] * 6, one.class_names, (480, 480))
    # F1 is 2/5, 4/6, 4/7, 4/8, 6/9, 6/10: of the two best the higher, half-way from 0.8 to 0.7.
    assert evaluation.best_thresholds(truth, {0: found})[:2] == (pytest.approx(0.75), 0.4)
    assert evaluation.best_thresholds(truth, {}) == (0.4,) * 6
    few = evaluation.best_thresholds(truth, {0: found[:1]})
    assert few[0] == pytest.approx((0.9 + 0.05) / 2)
