import io
import sys
from dataclasses import replace

import numpy as np
import pytest
from made_data import blurred, perfect
from PIL import Image

from ssd import plots, shapes
from ssd.data import load
from ssd.detections import Detections
from ssd.evaluate import match
from ssd.plots import compare, draw_curves, draw_plots


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    shapes.write_dataset(folder, 0, 8, seed=1)
    return load(folder, "val")


def test_pictures_are_drawn(scenes):
    pytest.importorskip("matplotlib", reason="matplotlib is an extra")
    drawn = draw_plots(scenes, blurred(scenes))
    assert set(list(drawn)[:2]) == {"precision_recall.png", "confusion.png"}
    assert len(drawn) > 4
    for content in drawn.values():
        with Image.open(io.BytesIO(content)) as picture:
            assert min(picture.size) >= 300


def test_a_truth_that_is_inverted_is_drawn_all_the_same(scenes):
    pytest.importorskip("matplotlib", reason="matplotlib is an extra")
    boxes = scenes.boxes.copy()
    boxes[0] = boxes[0][[2, 3, 0, 1]]
    assert len(draw_plots(replace(scenes, boxes=boxes), blurred(scenes))) > 2


def test_of_perfect_detections_there_are_no_worst_images(scenes):
    pytest.importorskip("matplotlib", reason="matplotlib is an extra")
    assert len(draw_plots(scenes, perfect(scenes))) == 2


def test_pairs_by_hand(scenes):
    """Two boxes of one image: one found twice, one taken for another class; and something out of nothing."""
    i = int(np.diff(scenes.starts).argmax())
    part = scenes.of_image(i)
    boxes, labels = scenes.boxes[part], scenes.labels[part] - 1
    other = int((labels[1] + 1) % 6)
    found = Detections(
        [boxes[0], boxes[0], boxes[1], [0, 0, 3, 3]],
        [0.9, 0.8, 0.7, 0.6],
        [labels[0], labels[0], other, 2],
        scenes.class_names,
        (480, 480),
    )
    mistakes = compare(scenes, i, found)
    expected = [(labels[0], labels[0]), (6, labels[0]), (labels[1], other), (6, 2)]
    expected += [(label, 6) for label in labels[2:]]
    assert mistakes.pairs == expected
    assert mistakes.number() == len(expected) - 1
    np.testing.assert_array_equal(mistakes.missed, boxes[2:])


def test_low_scores_and_crowd_are_left_aside(scenes):
    i = int(np.diff(scenes.starts).argmax())
    part = scenes.of_image(i)
    box, label = scenes.boxes[part][0], int(scenes.labels[part][0]) - 1
    low = Detections([box], [0.3], [label], scenes.class_names, (480, 480))
    assert all(detected == 6 for _, detected in compare(scenes, i, low).pairs)
    # A crowd over the whole image: the small part of it that is detected is no mistake, as in COCOeval.
    boxes, crowd = scenes.boxes.copy(), scenes.crowd.copy()
    boxes[part], crowd[part] = [0, 0, 480, 480], True
    one = Detections([[10, 10, 30, 40]], [0.9], [label], scenes.class_names, (480, 480))
    assert compare(replace(scenes, boxes=boxes, crowd=crowd), i, one).pairs == []
    boxes[part] = [20, 0, 480, 480]  # half of the detection lies outside
    assert compare(replace(scenes, boxes=boxes, crowd=crowd), i, one).pairs == []
    boxes[part] = [21, 0, 480, 480]
    assert compare(replace(scenes, boxes=boxes, crowd=crowd), i, one).pairs == [(6, label)]


def test_without_matplotlib_the_command_is_named(scenes, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'ssd300\[plots\]'"):
        draw_plots(scenes, {})


def test_curves_show_each_column_and_leave_out_what_was_not_measured(monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is an extra")
    seen = []
    real = plots._png
    monkeypatch.setattr(plots, "_png", lambda figure: seen.append(figure) or real(figure))
    losses = {"loss": 3.0, "loc_loss": 1.0, "conf_loss": 2.0, "lr": 0.01}
    history = [losses, losses | {"AP": 0.2, "AP50": 0.4}, losses | {"AP": -1.0, "AP50": -1.0}, losses]
    with Image.open(io.BytesIO(draw_curves(history))) as picture:
        assert min(picture.size) >= 300
    (figure,) = seen
    shown = [{line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes]
    whole = {name: [[epoch, value] for epoch in (1, 2, 3, 4)] for name, value in losses.items()}
    assert shown == [
        {"sum": whole["loss"], "conf": whole["conf_loss"], "loc": whole["loc_loss"]},
        {"rate": whole["lr"]},
        {"AP50": [[2, 0.4]], "AP": [[2, 0.2]]},
    ]
    for axes in figure.axes:
        highest = max(line.get_ydata().max() for line in axes.lines)
        assert axes.get_ylim()[0] == 0 < highest < axes.get_ylim()[1]
    assert "not measured" in [text.get_text() for text in _axes_of([losses], seen)[2].texts]


def _axes_of(history, seen):
    draw_curves(history)
    return seen[-1].axes


def test_what_the_metrics_take_for_found_is_no_mistake(scenes):
    """Where an IoU is 0.5 but for rounding, as of boxes of which one is half of the other."""
    one = scenes.select([0])
    boxes = np.full((len(one.boxes), 4), [400.0, 400.0, 402.0, 402.0])
    boxes[0] = [0.1, 0.0, 2.1, 10.0]
    one = replace(one, boxes=boxes, areas=(boxes[:, 2:] - boxes[:, :2]).prod(1))
    label = int(one.labels[0]) - 1
    found = Detections([[0.1, 0.0, 4.1, 10.0]], [0.9], [label], one.class_names, (480, 480))
    assert match(one, {0: found}).hits.all()
    assert compare(one, 0, found).pairs[0] == (label, label)
