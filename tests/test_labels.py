import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

from ssd.labels import COCO_CATEGORY_IDS, COCO_NAMES, category_ids, may_hold_names, read_class_names


def test_coco_has_80_names_and_as_many_ids_up_to_90():
    assert len(set(COCO_NAMES)) == len(set(COCO_CATEGORY_IDS)) == 80
    assert list(COCO_CATEGORY_IDS) == sorted(COCO_CATEGORY_IDS)


def test_known_pairs_of_the_official_annotations():
    official = {1: "person", 13: "stop sign", 27: "backpack", 44: "bottle", 70: "toilet", 90: "toothbrush"}
    ours = dict(zip(COCO_CATEGORY_IDS, COCO_NAMES, strict=True))
    assert {category: ours[category] for category in official} == official


def test_other_classes_are_counted_from_one():
    assert category_ids(("a", "b", "c")) == (1, 2, 3)
    assert category_ids(()) == ()


# --- Names in the forms of others ---

WORDS = st.lists(st.text("abcdeß猫", min_size=1, max_size=4), min_size=1, max_size=6, unique=True)
BACKGROUND = st.sampled_from(["background", "__background__", "BackGround", "_background_", "bg"])


@given(names=WORDS, background=BACKGROUND, order=st.randoms())
def test_every_form_gives_the_same_names_or_none_fit(names, background, order):
    count, expected = len(names), tuple(names)
    with_background = [background, *names]
    forms = [
        names,
        expected,
        with_background,
        dict(enumerate(names)),
        dict(enumerate(names, start=1)),
        dict(enumerate(with_background)),
        {str(number): name for number, name in enumerate(with_background)},
        {name: number for number, name in enumerate(names)},
        {name: str(number) for number, name in enumerate(with_background)},
        [{"id": number, "name": name} for number, name in enumerate(names, start=1)],
        [{"name": name} for name in with_background],
        {float(number): name for number, name in enumerate(names)},
        json.dumps(with_background),
        "\n".join(with_background),
        ", ".join(with_background),
    ]
    for form in forms:
        if isinstance(form, dict):  # numbers count, not their order in the file
            items = list(form.items())
            order.shuffle(items)
            form = dict(items)  # noqa: PLW2901
        assert read_class_names(form, count) == expected
        for other in (count + 2, count - 2):
            with pytest.raises(ValueError, match="for a network of"):
                read_class_names(form, other)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            ["a", "b", "c"],
            r"3 class names \(a, b, c\), of which none seems to be the background, for a network of 2",
        ),
        (["background", "a"], r"'background' seems to be the background, for a network of 2 classes"),
        (["a", "b", "background"], "'background' seems to be"),
        (
            {1: "background", 2: "a"},
            r"2 class names, numbered 1 to 2, \(background, a\), of which 'background'",
        ),
        ({0: "background", 1: "a"}, "2 class names, numbered 0 to 1"),
        ({0: "none", 1: "a", 2: "b"}, "3 class names, numbered 0 to 2"),
        ({2: "a", 7: "b"}, "2 class names, numbered 2 to 7"),
        ({"car": 1, "auto": 1}, "'car' and 'auto' are both class 1"),
        ({"1": "car", 1: "auto"}, "'car' and 'auto' are both class 1"),
        (["a", 3], "1 of 2 class names are no text"),
    ],
)
def test_names_of_which_it_is_open_whose_they_are(given, reason):
    with pytest.raises(ValueError, match=reason):
        read_class_names(given, 2)


@pytest.mark.parametrize(
    "given",
    [
        None,
        3,
        "ab",
        "a,,b",
        "[a, b]",
        "{",
        [],
        {},
        [1, 2],
        {1: 3},
        {"1": 1, "90": 2},
        {"²": "a", "9" * 5000: "b"},
        {0: None},
    ],
)
def test_what_holds_no_names(given):
    assert read_class_names(given, 2) is None


def test_cocos_official_ids_are_known():
    assert read_class_names(dict(zip(COCO_CATEGORY_IDS, COCO_NAMES, strict=True)), 80) == COCO_NAMES


@pytest.mark.parametrize("given", [None, 3, 0.5, "run 7", [], {}, [1, 2.0], {1: 3}, {"1": 1, "90": 2}])
def test_what_has_no_text_is_no_attempt_at_names(given):
    assert not may_hold_names(given)


@pytest.mark.parametrize("given", [object(), "a,,b", "[a, b]", [["a"]], {"cat": [0]}, {0: {"title": "cat"}}])
def test_what_may_be_names_in_an_unknown_form(given):
    assert may_hold_names(given)
    assert read_class_names(given, 2) is None
