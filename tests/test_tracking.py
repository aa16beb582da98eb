import itertools
import pickle
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import require_trackers

require_trackers()

import moving
from made_films import write_film
from moving import detected, hidden

from ssd.detections import Detections, LineCount, ZoneCount
from ssd.detector import Detector
from ssd.errors import ImageError
from ssd.sources import Film
from ssd.tracking import Counter, Tracker, checked_points, tracked

LEAST = np.full(len(moving.CLASSES), 0.4)


def ids_of(results):
    return [each.track_ids.tolist() for each in results]


def one(box, frame, *, score=0.9, class_id=0, rate=25, source="film", number=0):
    return Detections(
        [box],
        [score],
        [class_id],
        moving.CLASSES,
        (moving.HEIGHT, moving.WIDTH),
        source=source,
        number=number,
        frame=frame,
        time=frame / rate,
    )


def moved(frame, left=10, step=4, top=100):
    return [left + step * frame, top, left + step * frame + 50, top + 60]


@pytest.mark.parametrize("rate", [5, pytest.param(15, marks=pytest.mark.slow)])
@pytest.mark.parametrize("wall", [False, True], ids=["gone and back", "behind a wall"])
def test_ids_stay_through_two_seconds_out_of_sight(wall, rate):
    kept = 0
    for seed in range(25):
        times, each = hidden(seed, rate, wall=wall)
        unseen = np.flatnonzero(each.share < moving.LEAST_SEEN)
        assert abs(times[unseen[-1]] - times[unseen[0]] - 2) < 2.1 / rate
        results = list(tracked(detected(times, [each], seed), LEAST))
        ids = {number for numbers in ids_of(results) for number in numbers} - {-1}
        kept += ids == {1} and ids_of(results)[-1] in ([1], [])
    assert kept >= 0.95 * 25


def test_an_id_comes_with_the_second_frame_and_low_scores_go_on_but_do_not_begin():
    scores = [0.9, 0.9, 0.2, 0.15, 0.9]
    results = tracked((one(moved(i), i, score=score) for i, score in enumerate(scores)), LEAST)
    assert ids_of(results) == [[-1], [1], [1], [1], [1]]
    assert ids_of(tracked((one(moved(i), i, score=0.3) for i in range(5)), LEAST)) == [[]] * 5


def test_thresholds_are_those_of_classes():
    least = LEAST.copy()
    least[2] = 0.1
    results = tracked((one(moved(i), i, score=0.2, class_id=2) for i in range(3)), least)
    assert ids_of(results) == [[-1], [1], [1]]


def test_boxes_stay_with_their_scores_classes_and_ids():
    """Also where the tracker gives them in an order of its own."""

    def frame(i):
        boxes = [moved(i), moved(i, 300, -3, 20), moved(i, 200, 1, 250)]
        order = np.roll([0, 1, 2], i)
        scores = np.sort([0.9, 0.3, 0.6])[::-1]
        return Detections(
            np.array(boxes)[order],
            scores,
            order,
            moving.CLASSES,
            (moving.HEIGHT, moving.WIDTH),
            number=0,
            frame=i,
            time=i / 25,
        )

    of_class = {}
    for each in list(tracked((frame(i) for i in range(12)), LEAST))[4:]:
        assert np.all(np.diff(each.scores) <= 0)
        for box, _, class_id, _ in each:
            given = frame(each.frame)
            assert np.allclose(box, given.boxes[given.class_ids == class_id])
        for class_id, number in zip(each.class_ids.tolist(), each.track_ids.tolist(), strict=True):
            assert of_class.setdefault(class_id, number) == number
    assert sorted(of_class.values()) == [1, 2, 3]


def test_classes_do_not_share_ids():
    """What is of one class for some frames, and of another for the next, in the same place."""
    classes = {}
    for each in tracked((one(moved(i), i, class_id=i // 5 % 2 * 5) for i in range(20)), LEAST):
        for class_id, number in zip(each.class_ids.tolist(), each.track_ids.tolist(), strict=True):
            if number >= 0:
                assert classes.setdefault(number, class_id) == class_id
    assert sorted(classes.values()) == [0, 5]


def test_films_one_after_the_other_share_no_ids_also_where_they_are_called_the_same():
    both = [one(moved(i), i, number=number) for number in (0, 1) for i in range(4)]
    assert ids_of(tracked(iter(both), LEAST)) == [[-1], [1], [1], [1], [-1], [2], [2], [2]]


def test_films_at_the_same_time_do_not_know_of_each_other():
    first = tracked((one(moved(i), i) for i in range(6)), LEAST)
    second = tracked((one(moved(i, 300, -4), i) for i in range(6)), LEAST)
    for _ in range(6):
        assert next(first).track_ids.tolist() == next(second).track_ids.tolist()


def test_times_count_and_not_frames():
    """One of five frames; and a rate that changes on the way."""
    frames = [i for i in range(100) if i % 5 == 0 or i > 60]
    results = tracked((one(moved(i, step=3), i) for i in frames), LEAST)
    assert {number for each in results for number in each.track_ids.tolist()} == {-1, 1}


@pytest.mark.parametrize("times", [[0, 0.04, 0.04, 0.08], [0, 0.04, 0.02, 0.08]])
def test_wrong_times_do_no_harm(times):
    results = tracked((replace(one(moved(i), i), time=time) for i, time in enumerate(times)), LEAST)
    assert ids_of(results) == [[-1], [1], [1], [1]]


def test_nothing_is_nothing():
    empty = [replace(one(moved(i), i), boxes=[], scores=[], class_ids=[]) for i in range(3)]
    for each in tracked(iter(empty), LEAST, [(0.0, 10.0, 100.0, 10.0)], [(0.0, 0.0, 9.0, 0.0, 9.0, 9.0)]):
        assert each.track_ids.dtype == np.int64
        assert each.track_ids.shape == (0,)
        assert [str(count) for count in each.counts] == ["0 in, 0 out", "0 inside, 0 in all"]


def test_images_are_refused():
    with pytest.raises(ImageError, match="cat.jpg: is an image, and tracking follows objects"):
        list(tracked(iter([replace(one(moved(0), 0), frame=None, source="cat.jpg")]), LEAST))


# --- Counts -----------------------------------------------------------------------------------------------


def test_in_is_to_the_left_of_a_line_as_one_looks_along_it():
    """Upwards, for one from left to right, as y grows downwards."""
    up = [[100, 300 - 10 * i, 140, 340 - 10 * i] for i in range(25)]
    for line, into, out in (((0, 205, 480, 205), 1, 0), ((480, 205, 0, 205), 0, 1)):
        results = list(tracked((one(box, i) for i, box in enumerate(up)), LEAST, [line]))
        assert results[-1].counts == (LineCount(line, into, out),)
        first = next(i for i, each in enumerate(results) if each.counts[0][1:] != (0, 0))
        assert up[first][3] < 205 < up[first - 1][3]  # when its whole box is there


@pytest.mark.parametrize("seed", range(6))
def test_crossings_and_presence_are_those_of_the_truth(seed):
    """Of objects that go up and down in their columns, some across the line and some not quite."""
    rng = np.random.default_rng(seed)
    times = np.arange(0, 6, 1 / 12)
    line, zone = (0.0, 180.0, 480.0, 180.0), (0.0, 0.0, 480.0, 0.0, 480.0, 180.0, 0.0, 180.0)
    objects, into, out = [], 0, 0
    for column in range(5):
        # Its upper side at each of its turns; its height is 50, so 120 to 190 is on the line.
        turns = rng.choice([20, 60, 110, 130, 180, 200, 250, 290], 4)
        top = np.interp(times, [0, 2, 4, 6], turns)
        boxes = np.stack([0 * top + 95 * column + 10, top, 0 * top + 95 * column + 70, top + 50], 1)
        objects.append(moving.Moving(column % 2, boxes, boxes))
        sides = [top < 125 for top in turns if not 125 <= top <= 185]
        into += sum(b and not a for a, b in itertools.pairwise(sides))
        out += sum(a and not b for a, b in itertools.pairwise(sides))
    results = list(tracked(detected(times, objects, seed, noise=0.5), LEAST, [line], [zone]))
    assert results[-1].counts[0][1:] == (into, out)
    for each in results:
        assert each.counts[1].inside == (each.boxes[:, 3].round() <= 180).sum()


def test_who_crosses_out_of_sight_is_counted():
    frames = [i for i in range(60) if not 10 <= i < 40]
    for step, expected in ((4, (0, 1)), (0, (0, 0))):
        results = [one([200 + step, 20 + step * i, 240 + step, 60 + step * i], i) for i in frames]
        # An empty frame where it is hidden, as a film has it.
        results += [replace(one(moved(i), i), boxes=[], scores=[], class_ids=[]) for i in range(10, 40)]
        results.sort(key=lambda each: each.frame)
        counts = list(tracked(iter(results), LEAST, [(0, 150, 480, 150)]))[-1].counts
        assert counts[0][1:] == expected


def test_each_film_is_counted_by_itself():
    both = [
        one([100, 300 - 30 * i, 140, 340 - 30 * i], i, number=number) for number in (0, 1) for i in range(8)
    ]
    results = list(tracked(iter(both), LEAST, [(0, 200, 480, 200)]))
    assert [results[i].counts[0].into for i in (0, 7, 8, 15)] == [0, 1, 0, 1]


def test_a_zone_counts_each_object_once_in_all():
    there_and_back = [*range(20), *range(20, 0, -1), *range(20)]
    boxes = [[8 * i, 100, 8 * i + 60, 160] for i in there_and_back]
    zone = (100, 0, 480, 0, 480, 360, 100, 360)
    last = list(tracked((one(box, i) for i, box in enumerate(boxes)), LEAST, (), [zone]))[-1]
    assert last.counts == (ZoneCount(zone, 1, 1),)


@pytest.mark.parametrize("line", [(0, 100, 481, 100), (-1, 100, 200, 100), (0, 0, 0, 361)])
def test_a_line_outside_of_the_film_is_told(line):
    with pytest.raises(ImageError, match="film: has 480 x 360 pixels, and .* reaches outside of it"):
        list(tracked(iter([one(moved(0), 0)]), LEAST, [line]))


@pytest.mark.parametrize(
    ("points", "closed", "message"),
    [
        ((1, 2, 3), False, "a line is two points: x1,y1,x2,y2; got 1,2,3"),
        ((), False, "got nothing"),
        ((1, 2, 3, 4, 5, 6), False, "a line is two points"),
        ((1, 2, 1, 2), False, "a line has two points; 1,2,1,2 is one"),
        ((1, 2, 3, float("nan")), False, "a line is two points"),
        ((1, 2, 3, 4), True, "a zone is three or more points"),
        ((1, 2, 3, 4, 5), True, "a zone is three or more points"),
        ((0, 0, 5, 5, 10, 10), True, "a zone has an area; 0,0,5,5,10,10 has none"),
    ],
)
def test_points_that_are_no_line_or_zone(points, closed, message):
    with pytest.raises(ValueError, match=message):
        checked_points(points, closed=closed)


# --- The detector -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Two shapes that cross its middle, and what each frame shows."""
    times = np.arange(0, 2, 1 / 12.5)
    objects = []
    for class_id, top, start, speed in ((0, 40, 20, 150), (1, 220, 390, -150)):
        left = start + speed * times
        boxes = np.stack([left, 0 * left + top, left + 80, 0 * left + top + 80], 1)
        objects.append(moving.Moving(class_id, boxes, boxes))
    frames = [moving.drawn(objects, i) for i in range(len(times))]
    path = tmp_path_factory.mktemp("film") / "shapes.mkv"
    return write_film(path, frames, [Fraction(2 * i, 25) for i in range(len(times))]), objects


@pytest.fixture(scope="module")
def detector():
    return Detector.load("shapes", precision="fp32")


def test_a_film_of_shapes(film, detector):
    path, objects = film
    line = [(240, 0), (240, 360)]
    results = list(detector.track(path, lines=[line], score_threshold=0.5, batch_size=5))
    assert [each.frame for each in results] == list(range(25))
    names = {}
    for each in results[1:]:
        assert set(each.names[each.track_ids >= 0]) >= {"circle", "square"}
        for name, number in zip(each.names.tolist(), each.track_ids.tolist(), strict=True):
            names.setdefault(name, set()).add(number)
        for index, truth in enumerate(objects):
            box = each.boxes[list(each.class_ids).index(index)]
            assert np.abs(box - truth.boxes[each.frame]).max() < 12
    assert sorted([*names["circle"], *names["square"]]) == [1, 2]
    assert results[-1].counts[0][1:] == (1, 1)

    two = list(detector.track([path, Film(str(path))], every=3, score_threshold=0.5, batch_size=8))
    by_film = [
        {*np.concatenate([each.track_ids for each in two if each.number == n])} - {-1} for n in range(2)
    ]
    assert by_film == [{1, 2}, {3, 4}]


def test_options_are_checked_at_once(detector):
    with pytest.raises(ValueError, match="a line is two points"):
        detector.track("film.mp4", lines=[(1, 2)])
    with pytest.raises(ValueError, match="score_threshold must be in"):
        detector.track("film.mp4", score_threshold=2)
    with pytest.raises(TypeError, match="scores"):
        detector.track("film.mp4", scores=2)


def test_an_image_is_no_film(detector, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="a.png: is an image"):
        list(detector.track(tmp_path / "a.png"))
    assert len(list(detector.track(tmp_path / "a.png", all_frames=True))) == 1


def test_results_go_to_other_processes():
    found = next(tracked(iter([one(moved(0), 0)]), LEAST, [(0, 100, 480, 100)]))
    same = pickle.loads(pickle.dumps(found))
    assert same.counts == found.counts
    assert same.track_ids.tolist() == [-1]
    with pytest.raises(ValueError, match="read-only"):
        same.track_ids[0] = 3


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "ssd.tracking")
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(ImportError, match=r"pip install 'ssd300\[track\]'"):
        import ssd.tracking  # noqa: F401


def test_trackers_of_their_own():
    """As `tracked` uses them."""
    tracker, counter = Tracker(LEAST, 7), Counter([(0, 150, 480, 150)], [])
    numbers = [counter(tracker(one(moved(i), i))).track_ids.tolist() for i in range(3)]
    assert numbers == [[-1], [7], [7]]
    assert tracker.next_id == 8


def test_low_scores_go_on_with_what_they_overlap_alone():
    """A faint box that is several times as large, while the object is out of sight, does not lead it away."""

    def frame(i):
        large = [moved(i)[0] - 25, 55, moved(i)[0] + 75, 205]
        return one(large, i, score=0.15) if 10 <= i < 15 else one(moved(i), i)

    results = list(tracked((frame(i) for i in range(25)), LEAST))
    assert ids_of(results) == [[-1], *[[1]] * 9, *[[]] * 5, *[[1]] * 10]


@pytest.mark.slow
def test_the_page_is_true(film, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "video.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0].replace('"coco"', '"shapes"')
    (tmp_path / "clip.mp4").write_bytes(film[0].read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "video.md", "exec"), {})
    out = capsys.readouterr().out
    assert "clip.mp4 24 1.92 1 circle, 1 square" in out
    assert "24 1 " in out
