import copy
import csv
import io
import json
import pickle
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ssd.detections import Detection, Detections, LineCount, ZoneCount
from ssd.drawing import class_color
from ssd.errors import ImageError
from ssd.labels import COCO_NAMES
from ssd.pixels import Original, opened_path, origin

NAMES = ("cat", "dog", "wine glass")


@pytest.fixture
def image():
    return Image.effect_mandelbrot((200, 100), (-2, -1, 1, 1), 50).convert("RGB")


@pytest.fixture
def found(image):
    """Three objects in an image 200 wide and 100 high."""
    return Detections(
        boxes=[[10, 20, 50, 60], [0, 0, 200, 100], [150.25, 1.5, 199, 99]],
        scores=[0.9, 0.5, 0.4],
        class_ids=[1, 0, 2],
        class_names=NAMES,
        image_size=(100, 200),
        source="a,b.jpg",
        image=image,
    )


@pytest.fixture
def nothing(image):
    return Detections([], [], [], class_names=NAMES, image_size=(100, 200), image=image)


@pytest.mark.parametrize("way", ["elsewhere", "renamed", "open"])
def test_the_source_image_is_never_overwritten_whatever_it_is_called(image, tmp_path, monkeypatch, way):
    path = tmp_path / "a.png"
    image.save(path)
    monkeypatch.chdir(tmp_path)
    with path.open("rb") as file:
        kept = Original(*origin("a.png", file), "a.png", image.size)
        if way == "open":
            kept = Original(path.read_bytes(), None, "a.png", image.size, opened=opened_path(file))
    made = Detections(
        [], [], [], NAMES, (100, 200), source="photo 1" if way == "renamed" else "a.png", image=kept
    )
    monkeypatch.chdir("/")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is the source image, which is never overwritten"):
        made.save(path)
    assert path.read_bytes() == before


def test_types_and_shapes(found, nothing):
    for each, count in ((found, 3), (nothing, 0)):
        assert each.boxes.shape == (count, 4)
        assert each.scores.shape == each.class_ids.shape == (count,)
        assert (each.boxes.dtype, each.scores.dtype, each.class_ids.dtype) == (
            np.float32,
            np.float32,
            np.int64,
        )
        assert len(each) == count


def test_it_cannot_be_changed(found):
    with pytest.raises(AttributeError):
        found.scores = None
    with pytest.raises(ValueError, match="read-only"):
        found.scores[0] = 1


def test_pickled_and_copied_it_is_the_same_and_cannot_be_changed_either(found):
    for other in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert other.to_dict() == found.to_dict()
        with pytest.raises(ValueError, match="read-only"):
            other.boxes[0] = 0


def test_it_does_not_share_the_given_arrays():
    boxes = np.array([[1, 2, 3, 4]], np.float32)
    found = Detections(boxes, [1], [0], class_names=NAMES, image_size=(9, 9))
    boxes[0, 0] = 2
    assert found.boxes[0, 0] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": [[1, 2, 3]]}, r"boxes must be \[K, 4\]; got \[1, 3\]"),
        ({"boxes": [1, 2, 3, 4]}, r"boxes must be \[K, 4\]"),
        ({"boxes": [[1, 2, float("nan"), 4]]}, "NaN"),
        ({"boxes": [[3, 2, 1, 4]]}, "right < left"),
        ({"scores": [0.1, 0.2]}, r"1 boxes need as many .* \[2\]"),
        ({"scores": [1.5]}, r"\[0, 1\]"),
        ({"scores": [float("nan")]}, r"\[0, 1\]"),
        ({"class_ids": [3]}, "from 0 to 2"),
        ({"class_ids": [-1]}, "from 0 to 2"),
        ({"class_ids": [0.5]}, "integers"),
        ({"class_ids": [[0]]}, "as many"),
        ({"image_size": (0, 9)}, "image_size"),
    ],
)
def test_wrong_values_are_refused_with_what_is_wrong(changes, message):
    values = {"boxes": [[1, 2, 3, 4]], "scores": [0.5], "class_ids": [0]} | changes
    with pytest.raises(ValueError, match=message):
        Detections(**({"class_names": NAMES, "image_size": (9, 9)} | values))


# --- Choosing ---


def test_iteration_and_integers_give_single_detections(found):
    assert list(found)[0] == found[0] == Detection((10, 20, 50, 60), 0.9, 1, "dog")
    assert found[-1] == found[np.int64(2)] == list(found)[2]
    assert found.names.tolist() == ["dog", "cat", "wine glass"]
    with pytest.raises(IndexError):
        found[3]
    with pytest.raises(TypeError):
        found[True]


@pytest.mark.parametrize(
    ("index", "scores"),
    [
        (slice(1, None), [0.5, 0.4]),
        (np.array([True, False, True]), [0.9, 0.4]),
        ([True, False, False], [0.9]),
        (np.array([2, 0]), [0.4, 0.9]),
        ([2], [0.4]),
        ([], []),
        (np.zeros(3, bool), []),
        (torch.tensor([False, True, True]), [0.5, 0.4]),
    ],
)
def test_slices_masks_and_lists_give_detections(found, index, scores):
    chosen = found[index]
    assert isinstance(chosen, Detections)
    np.testing.assert_allclose(chosen.scores, scores)
    assert chosen.boxes.shape == (len(scores), 4)
    assert chosen.class_names == NAMES
    assert chosen.source == found.source


def test_filter_by_an_expression(found):
    assert found[(found.scores > 0.4) & (found.class_ids == 1)].names.tolist() == ["dog"]
    assert found[found.names == "wine glass"].class_ids.tolist() == [2]


def test_text(found, nothing):
    assert repr(found) == "Detections(1 dog, 1 cat, 1 wine glass)"
    assert repr(nothing) == "Detections(no objects)"
    assert str(nothing) == "no objects"
    lines = str(found).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["dog", "90%", "10.0", "20.0", "50.0", "60.0"]


# --- Writing ---


def test_dict_and_json(found, nothing):
    content = json.loads(found.to_json())
    assert content == found.to_dict()
    assert (content["source"], content["width"], content["height"]) == ("a,b.jpg", 200, 100)
    assert content["detections"][0] == {"name": "dog", "class_id": 1, "score": 0.9, "box": [10, 20, 50, 60]}
    assert json.loads(nothing.to_json())["detections"] == []


def test_numbers_come_back_exactly():
    boxes = (
        np.sort(np.random.RandomState(0).uniform(0, 500, (50, 2, 2)), axis=1)
        .reshape(50, 4)
        .astype(np.float32)
    )
    scores = np.random.RandomState(1).uniform(0, 1, 50).astype(np.float32)
    found = Detections(boxes, scores, [0] * 50, class_names=NAMES, image_size=(500, 500))
    entries = json.loads(found.to_json())["detections"]
    np.testing.assert_array_equal(np.array([each["box"] for each in entries], np.float32), boxes)
    np.testing.assert_array_equal(np.array([each["score"] for each in entries], np.float32), scores)


def test_coco_has_official_ids_and_xywh(found, nothing):
    coco = Detections([[10, 20, 50, 60]], [0.9], [79], class_names=COCO_NAMES, image_size=(100, 200))
    assert coco.to_coco(397133) == [
        {"image_id": 397133, "category_id": 90, "bbox": [10, 20, 40, 40], "score": 0.9}
    ]
    assert [each["category_id"] for each in found.to_coco("x")] == [2, 1, 3]
    assert nothing.to_coco(1) == []


def test_names_may_be_a_list():
    assert Detections([[1, 2, 3, 4]], [1], [79], list(COCO_NAMES), (9, 9)).to_coco(1)[0]["category_id"] == 90


def test_coco_entries_are_taken_by_pycocotools(found):
    from pycocotools.coco import COCO

    truth = COCO()
    truth.dataset = {"images": [{"id": 7}], "categories": [{"id": i} for i in (1, 2, 3)], "annotations": []}
    truth.createIndex()
    results = truth.loadRes(found.to_coco(7))
    assert [each["area"] for each in results.anns.values()][:2] == [40 * 40, 200 * 100]


def test_yolo(found, nothing):
    lines = found.to_yolo().splitlines()
    assert lines[0] == "1 0.150000 0.400000 0.200000 0.400000"
    assert lines[1] == "0 0.500000 0.500000 1.000000 1.000000"
    assert found.to_yolo(scores=True).splitlines()[0] == "1 0.150000 0.400000 0.200000 0.400000 0.900000"
    assert nothing.to_yolo() == ""


def test_csv_is_quoted(found, nothing):
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert rows[2]["source"] == "a,b.jpg"
    assert rows[2]["name"] == "wine glass"
    assert float(rows[2]["left"]) == 150.25
    assert found.to_csv(header=False).count("\n") == 3
    assert nothing.to_csv().count("\n") == 1


@pytest.mark.filterwarnings("ignore:OpenCV")
def test_supervision(found, nothing):
    for each in (found, nothing):
        converted = each.to_supervision()
        np.testing.assert_array_equal(converted.xyxy, each.boxes)
        np.testing.assert_array_equal(converted.class_id, each.class_ids)
        assert converted["class_name"].tolist() == each.names.tolist()


def test_supervision_where_it_is_missing_names_the_command(found, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "supervision", None)
    with pytest.raises(ImportError, match=r"pip install 'ssd300\[supervision\]'"):
        found.to_supervision()


# --- Drawing ---


def test_draw_marks_the_box_and_leaves_the_rest(image):
    found = Detections([[40, 30, 120, 90]], [0.8], [1], class_names=NAMES, image_size=(100, 200), image=image)
    before = np.asarray(image).copy()
    picture = found.draw()
    assert picture.size == (400, 200)  # enlarged by a whole factor
    np.testing.assert_array_equal(np.asarray(image), before)
    plain = np.asarray(image.resize(picture.size, Image.Resampling.BICUBIC))
    changed = (np.asarray(picture) != plain).any(axis=2)
    assert changed[100, 80]  # the left edge
    assert changed[60, 150]  # the top edge
    assert not changed[100, 150]  # the middle
    assert not changed[:, 260:].any()  # right of the box
    assert changed[45:58, 84:110].mean() > 0.9  # the label, above


def test_draw_nothing_is_the_image(nothing):
    picture = nothing.draw()
    np.testing.assert_array_equal(
        np.asarray(picture.resize((200, 100), Image.Resampling.BOX)).shape, (100, 200, 3)
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
def test_save(found, tmp_path, suffix):
    path = found.save(tmp_path / f"out{suffix}")
    with Image.open(path) as picture:
        assert picture.size == (400, 200)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_save_never_overwrites_the_source_and_names_unknown_suffixes(image, tmp_path):
    source = tmp_path / "a.png"
    image.save(source)
    found = Detections([], [], [], class_names=NAMES, image_size=(100, 200), source=str(source), image=image)
    with pytest.raises(ValueError, match="never overwritten"):
        found.save(tmp_path / "." / "a.png")
    for name in ("a.text", "a.psd", "a"):
        with pytest.raises(ValueError, match=r"\.jpg, \.png"):
            found.save(tmp_path / name)


def test_save_into_no_folder_names_it(found, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        found.save(tmp_path / "nowhere" / "a.jpg")


def test_without_an_image_there_is_no_picture(found):
    bare = Detections(found.boxes, found.scores, found.class_ids, class_names=NAMES, image_size=(100, 200))
    with pytest.raises(ValueError, match="no image"):
        bare.draw()
    assert bare._repr_png_() is None
    assert "<img" not in bare._repr_html_()


def test_notebook_representations(image):
    found = Detections(
        [[0, 0, 9, 9]],
        [0.9],
        [0],
        class_names=("<b>&",),
        image_size=(100, 200),
        source="<x>.jpg",
        image=image,
    )
    text = found._repr_html_()
    assert "&lt;b&gt;&amp;" in text
    assert "<b>" not in text
    assert "<x>" not in text
    assert text.count("<tr>") == 2
    with Image.open(io.BytesIO(found._repr_png_())) as picture:
        assert max(picture.size) <= 960


def test_drawing_from_several_threads(found):
    expected = found.draw().tobytes()
    wrong = []

    def draw():
        if found.draw().tobytes() != expected:
            wrong.append(1)

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- Images that are not kept ---


@pytest.fixture
def reread(image, tmp_path):
    """What was found in a file, whose pixels are not kept."""
    path = tmp_path / "photo.png"
    image.save(path)
    with path.open("rb") as file:
        where = origin(path, file)
    return Detections(
        [[10, 20, 50, 60]],
        [0.9],
        [1],
        class_names=NAMES,
        image_size=(100, 200),
        source=str(path),
        image=Original(*where, str(path), (200, 100)),
    )


def test_the_image_of_a_file_is_read_when_it_is_asked_for(reread, image, monkeypatch):
    reads = []
    read = Original.read
    monkeypatch.setattr(Original, "read", lambda original: reads.append(1) or read(original))
    assert reread.has_image
    chosen = pickle.loads(pickle.dumps(reread[:0][[]]))
    assert chosen.to_dict()["detections"] == []
    assert reads == []
    for each in (reread.image, chosen.image):
        np.testing.assert_array_equal(np.asarray(each), np.asarray(image))
    assert len(reads) == 2
    bare = replace(reread, image=None)
    assert bare.image is None
    assert not bare.has_image
    assert len(reads) == 2


def test_pixels_become_an_image_when_it_is_asked_for(monkeypatch):
    pixels = np.full((330, 400, 3), 7, np.uint8)
    found = Detections([[10, 10, 90, 90]], [0.9], [1], class_names=NAMES, image_size=(330, 400), image=pixels)
    monkeypatch.setattr(Image, "fromarray", None)  # not for a part, nor with other values
    found = found.changed(boxes=found.boxes + 1)[:1]
    monkeypatch.undo()
    assert np.array_equal(np.asarray(found.image), pixels)
    drawn = np.asarray(found.draw())
    assert not np.array_equal(drawn, pixels)
    assert (pixels == 7).all()
    assert found.image is found.image
    assert np.array_equal(np.asarray(found.draw()), drawn)
    assert np.array_equal(np.asarray(found.image), pixels)
    assert np.array_equal(np.asarray(replace(found, image=Image.fromarray(pixels)).draw()), drawn)


def test_a_picture_of_a_file_is_that_of_its_image(reread, image, tmp_path):
    kept = replace(reread, image=image.copy())
    assert reread.draw().tobytes() == kept.draw().tobytes() == reread.draw().tobytes()
    whole = Image.effect_mandelbrot((400, 330), (-2, -1, 1, 1), 50).convert("RGB")  # not to be enlarged
    for each in (whole.copy(), whole.copy()):
        before = each.tobytes()
        replace(reread, image=each, image_size=(330, 400)).draw()
        assert each.tobytes() == before


def test_a_file_that_is_gone_is_told_where_it_is_drawn(reread, tmp_path):
    (tmp_path / "photo.png").unlink()
    for use in (reread.draw, lambda: reread.image, lambda: reread.save(tmp_path / "out.png")):
        with pytest.raises(ImageError, match=r"photo\.png: cannot be read again .*; detect in it anew"):
            use()
    assert reread._repr_png_() is None  # a notebook shows the rest
    assert "cannot be read again" in reread._repr_html_()
    assert "dog" in reread._repr_html_()
    assert len(reread.to_coco(1)) == 1


# --- Ids ---


@pytest.mark.parametrize("number", [7, np.int64(7), np.uint8(7), torch.tensor(7), np.array(7)])
def test_ids_of_any_integer_type_can_be_written(found, number):
    entries = json.loads(json.dumps(found.to_coco(number)))
    assert {each["image_id"] for each in entries} == {7}
    own = replace(found, category_ids=np.array([4, 8, 15]), image_size=np.array([100, 200]))
    assert [each["category_id"] for each in json.loads(json.dumps(own.to_coco("a")))] == [8, 4, 15]
    assert json.loads(own.to_json())["width"] == 200


@pytest.mark.parametrize("wrong", [7.0, np.float32(7), None, [7], torch.tensor([7, 8])])
def test_other_ids_are_refused_at_once(found, nothing, wrong):
    for each in (found, nothing):
        with pytest.raises(TypeError, match="image_id is an integer or a text"):
            each.to_coco(wrong)


# --- Tracked objects --------------------------------------------------------------------------------------


@pytest.fixture
def tracked(found):
    return replace(
        found,
        frame=7,
        time=0.28,
        track_ids=[4, -1, 12],
        counts=(LineCount((0, 50, 200, 50), 3, 1), ZoneCount((0, 0, 90, 0, 90, 90), 2, 5)),
    )


def test_ids_go_where_their_boxes_go(tracked):
    assert tracked.track_ids.dtype == np.int64
    for index, ids in ((slice(1), [4]), (tracked.scores < 0.6, [-1, 12]), ([2, 0], [12, 4]), ([], [])):
        part = tracked[index]
        assert part.track_ids.tolist() == ids
        assert part.counts == tracked.counts
    for same in (copy.deepcopy(tracked), pickle.loads(pickle.dumps(tracked))):
        assert same.track_ids.tolist() == [4, -1, 12]
        with pytest.raises(ValueError, match="read-only"):
            same.track_ids[0] = 1
    assert replace(tracked, boxes=[], scores=[], class_ids=[], track_ids=[]).track_ids.shape == (0,)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2], r"3 boxes need as many track ids; got \[2\]"),
        ([1.5, 2, 3], "track ids must be integers; got float64"),
    ],
)
def test_wrong_ids_are_refused(found, ids, message):
    with pytest.raises(ValueError, match=message):
        replace(found, track_ids=ids)


def test_every_writer_has_the_ids(tracked, found):
    written = tracked.to_dict()
    assert [each["track_id"] for each in written["detections"]] == [4, -1, 12]
    assert written["counts"] == [
        {"line": [0, 50, 200, 50], "in": 3, "out": 1},
        {"zone": [0, 0, 90, 0, 90, 90], "inside": 2, "total": 5},
    ]
    assert json.loads(tracked.to_json()) == written
    assert [each["track_id"] for each in tracked.to_coco(1)] == [4, -1, 12]
    rows = list(csv.reader(io.StringIO(tracked.to_csv())))
    assert rows[0][-3:] == ["frame", "time", "track_id"]
    assert [row[-3:] for row in rows[1:]] == [["7", "0.28", each] for each in ("4", "-1", "12")]
    for scores, columns in ((False, 6), (True, 7)):  # as ultralytics writes them: last
        lines = [line.split() for line in tracked.to_yolo(scores).splitlines()]
        assert [(len(line), line[-1]) for line in lines] == [(columns, each) for each in ("4", "-1", "12")]
    assert str(tracked).splitlines()[0].split()[:2] == ["#4", "dog"]
    assert "#12 wine glass" in tracked._repr_html_()

    assert "counts" not in found.to_dict()
    assert not any("track_id" in each for each in (*found.to_dict()["detections"], *found.to_coco(1)))
    assert "track_id" not in found.to_csv()


def test_supervision_has_the_ids(tracked, found):
    pytest.importorskip("supervision")
    assert tracked.to_supervision().tracker_id.tolist() == [4, -1, 12]
    assert found.to_supervision().tracker_id is None


def test_colours_are_those_of_objects_and_counts_are_drawn(tracked):
    plain = Image.new("RGB", (200, 100), (90, 90, 90))
    tracked = replace(tracked, image=plain, counts=())[:1]
    picture = np.asarray(tracked.draw(enlarge=False))
    assert (picture[60 - 1, 30] == class_color(4)).all()
    assert (np.asarray(replace(tracked, track_ids=[-1]).draw(enlarge=False))[59, 30] == 160).all()
    for scale, enlarge in ((1, False), (2, True)):
        line = replace(tracked[[]], counts=(LineCount((0, 80, 200, 80), 0, 0),)).draw(enlarge=enlarge)
        drawn = np.asarray(line)
        assert (drawn[80 * scale, 120 * scale :] == 255).all()
        up, down = drawn[60 * scale : 76 * scale, 100 * scale], drawn[85 * scale : 97 * scale, 100 * scale]
        assert (up == 255).any()  # the arrow, to the left of one who looks to the right
        assert (down == 90).all()
