import os

import numpy as np
import pytest
from PIL import Image, ImageFont

from ssd import drawing
from ssd.detections import Detections
from ssd.drawing import class_color, missing_letters

NAMES = ("cat", "dog", "tiger cub")


@pytest.mark.parametrize("size", [(1, 1), (20, 900), (900, 20), (3000, 2000)])
def test_labels_lie_inside_pictures_of_any_size_and_do_not_cover_each_other(size, monkeypatch):
    areas = []
    original = drawing._label_area
    monkeypatch.setattr(
        drawing, "_label_area", lambda *arguments: areas.append(original(*arguments)) or areas[-1]
    )
    width, height = size
    found = Detections(
        [[0, 0, width, height], [0, 0, width / 2, height / 2], [width / 2, height / 2, width, height]],
        [0.9, 0.8, 0.7],
        [2, 1, 0],
        class_names=NAMES,
        image_size=(height, width),
        image=Image.new("RGB", size),
    )
    picture = found.draw()
    for left, top, right, bottom in areas:
        assert left >= 0
        assert top >= 0
        assert right <= picture.width
        assert bottom <= picture.height
    for i, a in enumerate(areas):
        for b in areas[:i]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]


def test_labels_that_are_kept_are_drawn_as_new_ones_and_large_ones_are_not_kept():
    def drawn(size):
        boxes = [[20 * i, 10 * i, 20 * i + 60, 10 * i + 40] for i in range(6)]
        scores, image = [0.9 - 0.1 * i for i in range(6)], Image.new("RGB", size, "grey")
        classes = [i % 3 for i in range(6)]
        found = Detections(boxes, scores, classes, class_names=NAMES, image_size=size[::-1], image=image)
        return np.asarray(found.draw())

    drawing._kept_label.cache_clear()
    first = drawn((640, 480))
    assert drawing._kept_label.cache_info().currsize == 6
    for _ in range(2):
        np.testing.assert_array_equal(drawn((640, 480)), first)
    assert drawing._kept_label.cache_info().hits == 12
    drawn((9000, 6000))
    assert drawing._kept_label.cache_info().currsize == 6


def test_a_class_has_one_colour_and_coco_has_80():
    assert len({class_color(i) for i in range(80)}) == 80
    assert class_color(3) == class_color(3)
    nearest = min(
        sum((a - b) ** 2 for a, b in zip(class_color(i), class_color(j), strict=True))
        for i in range(80)
        for j in range(i)
    )
    assert nearest > 100


# --- Letters ---

OWN = "cat 90%"  # letters that Pillow's own font has
FOREIGN = "\u732b"  # and one that it lacks


@pytest.fixture
def no_fonts(monkeypatch):
    """A system without fonts, on which nothing was drawn yet."""
    monkeypatch.setattr(drawing, "_system_fonts", list)
    monkeypatch.setattr(drawing, "_home_of", {})
    monkeypatch.setattr(drawing, "_told", set())


@pytest.fixture
def font_file(tmp_path):
    """Pillow's own font as a file."""
    path = tmp_path / "own.ttf"
    path.write_bytes(ImageFont.load_default(20).font_bytes)
    return path


def named(*names):
    boxes = [[10, 10 + 60 * i, 200, 60 + 60 * i] for i in range(len(names))]
    return Detections(
        boxes,
        [0.9] * len(names),
        list(range(len(names))),
        class_names=names,
        image_size=(400, 400),
        image=Image.new("RGB", (400, 400)),
    )


def test_letters_that_no_font_has_are_told_once_and_drawn_as_a_question_mark(no_fonts):
    assert missing_letters([OWN, f"{FOREIGN}\u72d7 {OWN}", "\ud800"]) == ["\u72d7", FOREIGN, "\ud800"]
    found = named(f"{FOREIGN} cat", "dog")
    with pytest.warns(UserWarning, match=f"no font here can draw {FOREIGN} of the class names"):
        picture = found.draw()
    assert picture.tobytes() == named("? cat", "dog").draw().tobytes()  # without a warning
    assert found.draw().tobytes() == picture.tobytes()
    assert FOREIGN in found.to_json()


def test_the_first_font_of_the_system_that_has_a_letter_is_taken(no_fonts, monkeypatch, tmp_path, font_file):
    """As if Pillow's own font had no letters but a file did, and another file were no font."""
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    files = [drawing._FontFile(str(tmp_path / name)) for name in ("gone.ttf", "broken.ttf", "own.ttf")]
    monkeypatch.setattr(drawing, "_system_fonts", lambda: files)
    expected = named("cat").draw()
    monkeypatch.setattr(drawing, "_pillows_letters", lambda letters: set(letters) - {"c", "a", FOREIGN})
    assert missing_letters(["cat", FOREIGN]) == [FOREIGN]
    assert drawing._home_of == {"c": files[2], "a": files[2], FOREIGN: None}
    runs = drawing._lay_out(["cat 90%"], 20, drawing._choose_fonts(set("cat 90%"), None))[0].runs
    assert [run.letters for run in runs] == ["ca", "t 90%"]
    assert [run.font.path for run in runs][0] == str(font_file)
    assert np.abs(np.asarray(named("cat").draw(), int) - np.asarray(expected, int)).mean() < 0.5


def test_a_font_that_is_given_comes_first(no_fonts, font_file):
    fonts = drawing._choose_fonts(set(f"cat {FOREIGN}"), font_file)
    assert fonts.pop(FOREIGN) is None
    assert {home.path for home in fonts.values()} == {str(font_file)}
    given, own = (np.asarray(named("cat").draw(font=font), int) for font in (font_file, None))
    assert np.abs(given - own).mean() < 0.5  # kerning, where Pillow has Raqm


def test_a_file_that_is_no_font_is_named(tmp_path):
    (tmp_path / "bad.ttf").write_bytes(b"x")
    for name in ("bad.ttf", "gone.ttf"):
        with pytest.raises(OSError, match=rf"{name}: cannot be read as a font"):
            named("cat").draw(font=tmp_path / name)


def test_accents_of_their_own_are_part_of_their_letter(no_fonts):
    assert missing_letters(["e\u0301"]) == missing_letters(["\u00e9"])
    drawing._told.update("\u00e9")  # whether or not Pillow's own font has it
    assert named("e\u0301").draw().tobytes() == named("\u00e9").draw().tobytes()


def fake_program(folder, text):
    program = folder / "fc-match"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands for fontconfig")
@pytest.mark.parametrize(
    ("script", "found"),
    [
        (r"printf '0\t/a b.ttf\n65538\t/c.ttc\n\nnonsense\n'", [("/a b.ttf", 0), ("/c.ttc", 2)]),
        ("exit 1", []),
        (None, []),
    ],
)
def test_fonts_of_fontconfig(tmp_path, monkeypatch, script, found):
    if script is not None:
        fake_program(tmp_path, script)
    monkeypatch.setattr(drawing.shutil, "which", lambda name: script and str(tmp_path / name))
    assert list(drawing._fontconfigs()) == found


def test_pictures_of_a_sheet_stand_side_by_side_whole_and_under_their_headings():
    rows = [[Image.new("RGB", size, color) for color in ("red", "blue")] for size in ((960, 360), (100, 300))]
    sheet = np.asarray(drawing.side_by_side(rows, ("left", "right")))
    for color, channel in (("red", 0), ("blue", 2)):
        mine = (sheet == np.eye(3)[channel] * 255).all(-1)
        rows_of, columns = np.nonzero(mine)
        assert (columns >= 488).all() == (color == "blue")
        assert (columns < 480).all() == (color == "red")
        assert mine.sum() == 480 * 180 + 120 * 360  # as large as their cells
        assert rows_of.min() == 32
    heading = (sheet[:32] < 128).any((0, 2))
    assert heading[:480].any()
    assert heading[488:].any()
