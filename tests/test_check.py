import json
import re
import shutil
from dataclasses import replace
from itertools import product

import pytest
from made_data import annotation, coco, picture, plain
from PIL import Image

from ssd import shapes
from ssd.boxes import Layout
from ssd.check import check_dataset, load_beside, size_limits
from ssd.data import load
from ssd.tiles import cut


@pytest.fixture
def scenes(tmp_path):
    shapes.write_dataset(tmp_path, 4, 2, seed=1)
    return tmp_path


def report(folder, *splits):
    return check_dataset({split: load(folder, split) for split in splits or ("train",)})


def test_a_clean_dataset(scenes):
    found = report(scenes, "train", "val")
    assert found.fatal == 0
    train = found.splits[0]
    content = json.loads((scenes / "train.json").read_text())
    assert train.images == 4
    assert sum(train.boxes.values()) == len(content["annotations"]) == sum(row[1] for row in train.sizes)
    assert list(train.boxes) == list(shapes.CLASSES)
    assert train.background == 4 - len({each["image_id"] for each in content["annotations"]})
    assert train.matched > 0.9
    text = str(found)
    assert "train: nothing wrong" in text
    table = text[: text.index("what could be")].splitlines()
    assert len({len(line) for line in table if not line.startswith("boxes")}) == 1
    json.dumps(found.to_dict())


def test_what_stands_in_for_a_val_split_is_told_where_there_is_none(scenes):
    end = "hold images out with --val-fraction 0.2"
    assert str(report(scenes, "train")).endswith(end)
    assert end not in str(report(scenes, "train", "val"))
    unread = check_dataset({"train": load(scenes, "train")}, unread={"val": "gone"})
    assert end not in str(unread)


def test_without_boxes_there_is_no_part_that_is_matched(tmp_path):
    found = report(plain(tmp_path, coco(annotations=[])))
    assert re.search(r"^  all +-$", str(found), re.MULTILINE)


def test_what_default_boxes_can_match(tmp_path):
    """Of a 300x300 image: one box that is a default box, one too small for all of them, one too thin."""
    Image.new("RGB", (300, 300)).save(tmp_path / "a.jpg")
    boxes = [(142 - 10.5, 142 - 10.5, 21, 21), (100, 100, 5, 5), (10, 100, 280, 20)]
    content = coco(
        [{"id": 1, "file_name": "a.jpg", "width": 300, "height": 300}],
        [annotation(id=i, bbox=list(box)) for i, box in enumerate(boxes)],
    )
    (tmp_path / "x.json").write_text(json.dumps(content))
    (split,) = check_dataset({"train": load(tmp_path / "x.json")}).splits
    assert split.matched == pytest.approx(1 / 3)
    assert {name: (count, part) for name, count, part in split.sizes} == {
        "under 8 px": (1, 0.0),
        "8 to 16 px": (0, 0.0),
        "16 to 32 px": (1, 1.0),
        "32 to 64 px": (0, 0.0),
        "64 to 128 px": (1, 0.0),
        "128 to 300 px": (0, 0.0),
    }


def test_files_that_are_wrong(scenes):
    (scenes / "train" / "000000.jpg").unlink()
    path = scenes / "train" / "000001.jpg"
    path.write_bytes(path.read_bytes()[:1000])
    Image.new("RGB", (40, 30)).save(scenes / "train" / "000002.jpg")
    shutil.copy(scenes / "val" / "000000.jpg", scenes / "val" / "000001.jpg")
    shutil.copy(scenes / "train" / "000003.jpg", scenes / "val" / "000000.jpg")
    content = json.loads((scenes / "val.json").read_text())
    for image in content["images"]:
        del image["width"], image["height"]
    (scenes / "val.json").write_text(json.dumps(content))
    found = report(scenes, "train", "val")
    train = {(problem.kind, problem.file) for problem in found.splits[0].problems}
    assert train == {
        ("missing image", "000000.jpg"),
        ("unreadable image", "000001.jpg"),
        ("wrong size", "000002.jpg"),
    }
    (twin,) = [problem for problem in found.splits[1].problems if problem.kind == "image in two splits"]
    assert "000003.jpg of train" in twin.message
    assert found.fatal == 3
    assert "train: missing image: 1\n  000000.jpg: there is no such file" in str(found)


def test_long_lists_are_cut_in_the_text_only(tmp_path):
    plain(tmp_path, coco(annotations=[annotation(id=i, bbox=[i, 2, 0, 5]) for i in range(9)]))
    found = report(tmp_path)
    assert found.fatal == 9
    assert "and 4 more (--json lists all)" in str(found)
    assert len(found.to_dict()["splits"][0]["problems"]) == 9


SMALL = Layout(
    size=64, maps=(8, 4, 2), steps=(8, 16, 32), scales=(8, 20, 40, 60), aspect_ratios=((2,), (2, 3), (2,))
)


def test_sizes_and_matches_are_those_of_the_layout(tmp_path):
    """Of a 300x300 image: a box that is a default box of the small layout, and one that is one at 300."""
    Image.new("RGB", (300, 300)).save(tmp_path / "a.jpg")
    factor = 300 / 64
    boxes = [(8 * factor, 8 * factor, 8 * factor, 8 * factor), (142 - 10.5, 142 - 10.5, 21, 21)]
    content = coco(
        [{"id": 1, "file_name": "a.jpg", "width": 300, "height": 300}],
        [annotation(id=i, bbox=list(box)) for i, box in enumerate(boxes)],
    )
    (tmp_path / "x.json").write_text(json.dumps(content))
    found = check_dataset({"train": load(tmp_path / "x.json")}, SMALL)
    (split,) = found.splits
    assert {name: (count, part) for name, count, part in split.sizes} == {
        "under 8 px": (1, 0.0),
        "8 to 16 px": (1, 1.0),
        "16 to 32 px": (0, 0.0),
        "32 to 64 px": (0, 0.0),
    }
    assert "boxes by size at 64x64, and" in str(found)
    assert found.to_dict()["size"] == 64
    assert "boxes by size at 300x300, and" in str(check_dataset({"train": load(tmp_path / "x.json")}))


def boxes_in_images(folder, size, side, count=6, step=61):
    """Images of a size with boxes of `side` pixels in rows, `step` apart."""
    images, boxes = [], []
    for i in range(2):
        Image.new("RGB", size, (i, 0, 0)).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]})
        boxes += [
            annotation(
                id=10_000 * i + k,
                image_id=i,
                bbox=[across * step + 5 * k % 11, down * step + 3 * k % 7, side, side],
                area=side**2,
            )
            for k, (down, across) in enumerate(product(range(count), repeat=2))
        ]
    (folder / "x.json").write_text(json.dumps(coco(images, boxes)))
    return check_dataset({"train": load(folder / "x.json")})


def test_what_could_be_trained_and_what_is_recommended(tmp_path):
    """Boxes of 15 pixels of 320: too small for the published layout, and not for one that is fitted."""
    found = boxes_in_images(tmp_path, (320, 320), 15, step=49)
    matched = {(choice.layout, choice.tiles): choice.matched for choice in found.choices}
    assert set(matched) == {("300", None), ("fitted", None), ("512", None), ("fitted-512", None)}
    assert matched["300", None] < 0.2
    assert matched["512", None] > 0.9
    assert [round(choice.time, 2) for choice in found.choices] == [1, 1, 2.91, 2.91]
    most = max(matched.values())
    first = next(choice for choice in found.choices if choice.matched >= most - 0.02)
    assert found.recommended == first
    (line,) = [line for line in str(found).splitlines() if line.endswith("recommended")]
    assert f"--layout {first.layout} " in line
    assert found.to_dict()["recommended"]["layout"] == first.layout


def test_large_boxes_need_no_other_layout(tmp_path):
    found = boxes_in_images(tmp_path, (320, 320), 60, count=3, step=90)
    assert found.recommended == found.choices[0]
    assert (found.recommended.layout, found.recommended.matched) == ("300", 1)


def test_small_boxes_of_large_images_need_tiles(tmp_path):
    """24 pixels of 2,000 are 3.6 of 300, and 6.1 of 512; in tiles of 320 pixels they are 22.5."""
    found = boxes_in_images(tmp_path, (2000, 1500), 24)
    assert all(choice.matched < 0.5 for choice in found.choices if choice.tiles is None)
    best = found.recommended
    assert best.tiles in (320, 480)
    assert best.matched > 0.9
    assert best.time == len(cut(2000, 1500, best.tiles))
    assert f"{best.options()} " in str(found)


def test_images_that_claim_to_be_huge_cost_nothing(tmp_path):
    found = boxes_in_images(tmp_path, (320, 320), 4)
    content = json.loads((tmp_path / "x.json").read_text())
    content["images"][0] |= {"width": 3_000_000, "height": 3_000_000}
    (tmp_path / "x.json").write_text(json.dumps(content))
    again = check_dataset({"train": load(tmp_path / "x.json")})
    assert again.choices[-1].time > 1e6 > found.choices[-1].time


def test_boxes_outside_of_their_image_are_left_out_of_the_choices(tmp_path):
    boxes_in_images(tmp_path, (2000, 1500), 24)
    annotations = load(tmp_path / "x.json")
    moved = annotations.boxes.copy()
    moved[0] = (-5, 3, 1e-323, 20)
    report = check_dataset({"train": replace(annotations, boxes=moved)})
    assert report.recommended.tiles


@pytest.mark.parametrize(
    ("size", "limits"),
    [
        (300, [0, 8, 16, 32, 64, 128, 300]),
        (512, [0, 8, 16, 32, 64, 128, 256, 512]),
        (64, [0, 8, 16, 32, 64]),
        (15, [0, 15]),
        (8, [0, 8]),
    ],
)
def test_limits_of_the_size_classes(size, limits):
    assert size_limits(size) == limits


def test_an_image_that_vanishes_while_it_is_checked_is_told(scenes):
    annotations = load(scenes, "train")
    (scenes / "train" / "000000.jpg").unlink()
    (problem,) = check_dataset({"train": annotations}).splits[0].problems
    assert (problem.kind, problem.file) == ("unreadable image", "000000.jpg")


def test_boxes_without_area_are_refused_of_the_split_that_is_trained_on(tmp_path):
    """Evaluation takes them, as the official code."""
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2)]
    boxes = [annotation(id=1), annotation(id=2, image_id=2, bbox=[5, 5, 0, 9])]
    found = load(plain(tmp_path, coco(images, boxes), ("1.jpg", "2.jpg")))
    report = check_dataset({"train": found, "val": found})
    assert report.fatal == 1
    kinds = [[(each.kind, each.fatal) for each in split.problems] for split in report.splits]
    assert kinds[0] == [("zero area", True), ("image twice", False)]
    assert kinds[1][0] == ("zero area", False)
    assert "train: zero area: 1\n" in str(report)
    assert "val: note: zero area: 1\n" in str(report)


def test_what_is_told_of_a_split_is_in_the_text_and_the_data(tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2)]
    plain(tmp_path, coco(images), ("1.jpg", "2.jpg"))
    found = replace(load(tmp_path), notes=("1 image has no label file",))
    report = check_dataset({"train": found})
    text = str(report)
    assert "train: note: 1 image has no label file\n" in text
    assert "train: note: 1 of 2 images have no boxes to train on and are background\n" in text
    assert len(report.to_dict()["splits"][0]["notes"]) == 2


def test_a_second_split_finds_its_images_beside_or_where_the_first_ones_are(tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").write_text(json.dumps(coco([{"id": 1, "file_name": f"{split}.jpg"}])))
    picture(tmp_path / "photos" / "val.jpg")
    assert load_beside(tmp_path, "val", tmp_path / "photos", ["dog", "cat"]).root == tmp_path / "photos"
    picture(tmp_path / "val" / "val.jpg")
    found = load_beside(tmp_path, "val", tmp_path / "photos", ["dog", "cat"])
    assert (found.root, found.class_names) == (tmp_path / "val", ("dog", "cat"))
