import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ssd.cli.coco_ids import _matched, ids_by_name, ids_of_file
from ssd.errors import AnnotationError
from ssd.evaluate import METRICS


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["a/000025.jpg", "000397133.jpg"], [25, 397133]),
        (["7.jpg", "x.jpg"], [1, 2]),
        (["a/7.jpg", "b/7.jpg"], [1, 2]),
        (["a/7.jpg", "a/7.jpg"], [7, 7]),
        (["\u0667.jpg"], [1]),
    ],
)
def test_coco_image_ids(names, ids):
    found = ids_by_name(names)
    assert [found.of(name) for name in names] == ids
    assert ids_by_name([]).of("frame 0") == 1


def coco_file(path, images, categories):
    """A dataset's file; `images` and `categories` are names by id."""
    content = {
        "images": [{"id": number, "file_name": name} for number, name in images.items()],
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
        "annotations": [{"category_id": next(iter(categories))}],
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("sources", "names", "expected"),
    [
        (["p/a.jpg", "p/b.jpg"], ["b.jpg", "a.jpg"], {"p/a.jpg": "a.jpg", "p/b.jpg": "b.jpg"}),
        (["p/a.jpg"], ["C:\\photos\\A.JPG"], {"p/a.jpg": "C:\\photos\\A.JPG"}),
        (["p/a.jpg"], ["a.jpg", "A.jpg"], {"p/a.jpg": "a.jpg"}),
        (["p/a.jpg", "q/a.jpg"], ["q/a.jpg", "p/a.jpg"], {"p/a.jpg": "p/a.jpg", "q/a.jpg": "q/a.jpg"}),
        (["p/a.jpg", "q/a.jpg"], ["q/a.jpg"], {"q/a.jpg": "q/a.jpg"}),
        (["p/a.jpg", "q/a.jpg"], ["a.jpg"], {}),
        (["p/a.jpg"], ["x/a.jpg", "y/a.jpg"], {}),
        (["https://x.org/p/a%20b.jpg?size=1"], ["a b.jpg"], {"https://x.org/p/a%20b.jpg?size=1": "a b.jpg"}),
        (["p/a.png"], ["a.jpg", ""], {}),
        (["p/\u00e9.jpg"], ["e\u0301.jpg"], {"p/\u00e9.jpg": "e\u0301.jpg"}),
    ],
)
def test_sources_are_found_in_a_file_by_as_many_last_parts_as_tell_them_apart(sources, names, expected):
    assert _matched(sources, names) == expected


def test_ids_of_a_file(tmp_path):
    images = {70: "a.jpg", 9: "sub/b.jpg", 1: "never.jpg"}
    file = coco_file(tmp_path / "gt.json", images, {5: "person", 3: "cat", 2: "zebra"})
    ids = ids_of_file(file, ["p/a.jpg", "p/b.jpg", "p/c.jpg"], ["cat", "dog", "person"])
    assert [ids.of(name) for name in ("p/a.jpg", "p/b.jpg", "p/c.jpg")] == [70, 9, None]
    assert ids.categories == (3, 6, 5)
    assert ids.rule == f"image ids are those of {file}"
    assert ids.notes == (
        f"{file} does not have the classes dog; they have ids from 6 on",
        f"the model does not know zebra of {file}, and finds none of them",
        f"1 of 3 images are not in {file}, or not under one name alone; the results leave them out: p/c.jpg",
        f"1 of 3 images of {file} are not among the sources; to be scored, their objects count as missed: "
        "never.jpg",
    )


def test_lvis_names_images_by_their_urls(tmp_path):
    file = coco_file(tmp_path / "lvis.json", {9: "a.jpg"}, {1: "cat"})
    content = json.loads(file.read_text())
    content["images"] = [{"id": 9, "coco_url": "http://images.cocodataset.org/val2017/a.jpg"}]
    file.write_text(json.dumps(content))
    assert ids_of_file(file, ["p/a.jpg"], ["cat"]).of("p/a.jpg") == 9


def test_a_category_that_is_used_goes_before_one_of_its_name(tmp_path):
    """As Roboflow writes the group of its classes."""
    file = coco_file(tmp_path / "gt.json", {1: "a.jpg"}, {4: "cat", 0: "cat"})
    assert ids_of_file(file, ["a.jpg"], ["cat"]).categories == (4,)


def test_a_file_name_with_two_ids_is_told(tmp_path):
    names = {1: "a.jpg", 7: "b.jpg", 2: "a.jpg"}
    file = coco_file(tmp_path / "gt.json", names, {1: "cat"})
    ids = ids_of_file(file, ["a.jpg", "b.jpg"], ["cat"])
    assert (ids.of("a.jpg"), ids.of("b.jpg")) == (2, 7)
    told = f"1 file name stands twice in {file}, with different ids: a.jpg; the results have the last"
    assert ids.notes == (told,)
    assert ids_of_file(file, ["b.jpg"], ["cat"]).notes[0] == told
    content = json.loads(file.read_text())
    content["images"] = [{"id": 1, "file_name": "a.jpg"}] * 2
    file.write_text(json.dumps(content))
    assert ids_of_file(file, ["a.jpg"], ["cat"]).notes == ()


def test_category_ids_of_text_are_numbers_or_told(tmp_path):
    file = coco_file(tmp_path / "gt.json", {1: "a.jpg"}, {"7": "cat", "x": "dog"})
    ids = ids_of_file(file, ["a.jpg"], ["cat", "cup"])
    assert ids.categories == (7, 8)
    assert ids.notes[0] == f"the category ids of {file} are text ('7'); the results have them as numbers"
    with pytest.raises(AnnotationError, match=r"gt\.json: its category ids are text \('x'\), and those of"):
        ids_of_file(file, ["a.jpg"], ["cat", "dog"])


def test_sources_of_one_name_in_two_folders_are_told(tmp_path):
    file = coco_file(tmp_path / "gt.json", {1: "000.jpg", 2: "b.jpg"}, {1: "cat"})
    with pytest.raises(
        AnnotationError, match=r"gt\.json: several sources are called 000\.jpg, and it does not"
    ):
        ids_of_file(file, ["p/000.jpg", "q/000.jpg"], ["cat"])
    ids = ids_of_file(file, ["p/000.jpg", "q/000.jpg", "b.jpg"], ["cat"])
    assert (ids.of("p/000.jpg"), ids.of("b.jpg")) == (None, 2)
    assert "not under one name alone (several sources are called 000.jpg); the results leave" in ids.notes[0]
    assert ids_of_file(file, ["p/000.jpg", "p/000.jpg"], ["cat"]).of("p/000.jpg") == 1


@pytest.mark.parametrize(
    ("classes", "categories", "expected"),
    [
        (["cat", "Cup"], {4: "Cat", 9: "CUP"}, (4, 9)),
        (["cat", "Cat"], {4: "CAT", 9: "Cat"}, (10, 9)),
        (["cat", "Cat", "cup"], {4: "CAT", 9: "cup"}, (10, 11, 9)),
        (["cat", "cup"], {4: "CAT", 5: "Cat", 9: "cup"}, (10, 9)),
        (["cat"], {4: "CAT", 5: "cat"}, (5,)),
    ],
)
def test_letter_case_of_classes_counts_where_it_has_to(tmp_path, classes, categories, expected):
    file = coco_file(tmp_path / "gt.json", {1: "a.jpg"}, categories)
    ids = ids_of_file(file, ["a.jpg"], classes)
    assert ids.categories == expected
    if expected == (4, 9):
        assert ids.notes == (
            f"classes that {file} writes in other letter case are the model's: cat (Cat), Cup (CUP)",
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not a dataset in COCO's format"),
        ("{", "not a dataset in COCO's format"),
        ('{"images": [{"id": null, "file_name": "a.jpg"}], "categories": []}', "an id is a number or a text"),
        (
            '{"images": [{"id": 1, "file_name": "b.jpg"}], "categories": []}',
            "none of the images by name: .*b",
        ),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "categories": []}', "none of the model's classes"),
    ],
)
def test_files_that_give_no_ids_are_refused(tmp_path, content, message):
    (tmp_path / "gt.json").write_text(content)
    with pytest.raises(AnnotationError, match=rf"gt\.json: .*{message}"):
        ids_of_file(tmp_path / "gt.json", ["a.jpg"], ["cat"])


def test_coco_results_score_as_ssd_evaluate_does(run, scenes, tmp_path):
    """With ids of the dataset's own, which are neither those of its file names nor in their order."""
    content = json.loads((scenes / "val.json").read_text())
    new = {image["id"]: 900 - 7 * i for i, image in enumerate(content["images"])}
    new_category = {each["id"]: 40 - each["id"] for each in content["categories"]}
    for each in content["images"]:
        each["id"] = new[each["id"]]
    for each in content["categories"]:
        each["id"] = new_category[each["id"]]
    for each in content["annotations"]:
        each["image_id"], each["category_id"] = new[each["image_id"]], new_category[each["category_id"]]
    own = tmp_path / "own.json"
    own.write_text(json.dumps(content))
    common = ("--weights", "shapes", "--precision", "fp32", "--output")
    as_evaluated = ("--score-threshold", "0.05", "--max-detections", "200", "--no-images", "--format", "coco")
    status, out, err = run(
        "detect", scenes / "val", *common, "a", *as_evaluated, "--annotations", own, weights=False
    )
    assert (status, err) == (0, "")
    assert f"(image ids are those of {own})" in out
    assert run("evaluate", scenes, *common, "b", weights=False)[0] == 0
    expected = json.loads((tmp_path / "b" / "metrics.json").read_text())["metrics"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(own))
        scored = COCOeval(truth, truth.loadRes(str(tmp_path / "a" / "detections.json")), "bbox")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    assert expected["AP"] > 0.3
    np.testing.assert_allclose(scored.stats, [expected[name] for name in METRICS], atol=1e-6)


def test_the_rule_of_ids_is_told(run, photos, tmp_path):
    body = (photos / "coffee.jpg").read_bytes()
    for name in ("12.jpg", "x.jpg"):
        (tmp_path / name).write_bytes(body)
    coco = ("--format", "coco", "--no-images", "--output", "out")
    assert "(image ids are the numbers that the files are called by)" in run("detect", "12.jpg", *coco)[1]
    assert "(image ids count from 1, as the images come; " in run("detect", "12.jpg", "x.jpg", *coco)[1]
    file = coco_file(tmp_path / "gt.json", {7: "x.jpg"}, {3: "cat"})
    status, _, err = run("detect", "12.jpg", "x.jpg", *coco, "--annotations", file)
    assert status == 0
    assert f"ssd: 1 of 2 images are not in {file}" in err
    written = json.loads((tmp_path / "out" / "detections-3.json").read_text())
    assert {each["image_id"] for each in written} == {7}
    status, _, err = run("detect", "x.jpg", "--annotations", file)
    assert status == 2
    assert "goes with --format coco" in err
    status, _, err = run("detect", "12.jpg", *coco, "--annotations", file)
    assert status == 1
    assert "has none of the images by name" in err
