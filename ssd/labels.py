"""Class names: COCO's 80, with their official category ids, and those that other people's files give."""

import json
import re
from collections.abc import Iterable, Mapping

from ssd.errors import as_line, shown

COCO_NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""Names in the order of `instances_val2017.json`; class id ``i`` (0-based) is ``COCO_NAMES[i]``."""

_UNUSED_CATEGORY_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}

COCO_CATEGORY_IDS = tuple(i for i in range(1, 91) if i not in _UNUSED_CATEGORY_IDS)
"""Official category id (1 to 90, with ten gaps) of each 0-based class id."""


def category_ids(class_names: tuple[str, ...]) -> tuple[int, ...]:
    """Category ids for COCO output, one for each class name.

    COCO's own 80 names get the official ids; any other set of classes is counted from 1.

    >>> category_ids(COCO_NAMES)[79]
    90
    >>> category_ids(("cat", "dog"))
    (1, 2)
    """
    if class_names == COCO_NAMES:
        return COCO_CATEGORY_IDS
    return tuple(range(1, len(class_names) + 1))


def is_background(name: str) -> bool:
    """Whether a name is that of the background, as people write it.

    >>> is_background("__background__"), is_background("backdrop")
    (True, False)
    """
    return re.sub(r"[\W_]", "", name.casefold()) in ("background", "bg")


def read_class_names(given: object, count: int) -> tuple[str, ...] | None:
    """The names of a network's classes, from any of the forms in which files give them.

    A list of names, or of COCO's categories, {number: name} and {name: number} are known, and text with
    commas or JSON; numbers may be text, and count from the background or from the first class. Names are
    taken where one reading alone fits the network.

    Args:
        given: what a file says, of any type.
        count: the network's classes, without the background.

    Returns:
        One name for each class but the background; None where `given` holds no names.

    Raises:
        ValueError: they are names, but not of so many classes, or it is open which is whose.

    >>> read_class_names(["__background__", "cat", "cup"], 2)
    ('cat', 'cup')
    >>> read_class_names({"cat": 0, "cup": 1}, 2)
    ('cat', 'cup')
    """
    if isinstance(given, str):
        given = _from_text(given)
    if isinstance(given, Mapping):
        return _from_numbers(_numbered(given.items()), count)
    if not isinstance(given, list | tuple):
        return None
    if given and all(isinstance(each, Mapping) and "name" in each for each in given):
        if not any("id" in each for each in given):
            return read_class_names([each["name"] for each in given], count)
        return _from_numbers(_numbered((each.get("id"), each["name"]) for each in given), count)
    names = tuple(each for each in given if isinstance(each, str))
    if not names:
        return None
    if len(names) != len(given):
        raise ValueError(f"{len(given) - len(names)} of {len(given)} class names are no text")
    if len(names) == count + 1 and is_background(names[0]):
        names = names[1:]
    if len(names) != count or any(map(is_background, names)):
        raise ValueError(_misfit(names, count))
    return names


def may_hold_names(given: object) -> bool:
    """Whether there may be names in what a file says, be they in a form that is not known.

    >>> may_hold_names({"cat": [0]}), may_hold_names({1: 3}), may_hold_names("experiment 7")
    (True, False, False)
    """
    if isinstance(given, str):
        return re.search(r"[,;\n\[{]", given) is not None
    if isinstance(given, Mapping):
        given = [*given.keys(), *given.values()]
    parts = given if isinstance(given, list | tuple) else [given]
    return not all(
        each is None or isinstance(each, int | float) or _number(each) is not None for each in parts
    )


def _from_text(text: str) -> object:
    """What a text has of names: JSON's value, or its parts between commas, semicolons or lines."""
    if text.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return None
    parts = [part.strip() for part in re.split(r"[,;\n]", text.strip())]
    return parts if len(parts) > 1 and all(parts) else None


def _numbered(entries: Iterable[tuple[object, object]]) -> dict[int, str]:
    """The names by number, of pairs of either order; what is neither is left out."""
    pairs = list(entries)
    if pairs and all(isinstance(key, str) and _number(value) is not None for key, value in pairs):
        if all(_number(key) is not None for key, _ in pairs):  # numbers of numbers, such as category ids
            return {}
        pairs = [(value, key) for key, value in pairs]
    found: dict[int, str] = {}
    for key, name in pairs:
        number = _number(key)
        if number is None or not isinstance(name, str):
            continue
        if found.setdefault(number, name) != name:
            raise ValueError(f"{shown(found[number])} and {shown(name)} are both class {shown(number)}")
    return found


def _number(value: object) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _from_numbers(found: dict[int, str], count: int) -> tuple[str, ...] | None:
    if not found:
        return None
    has_background = is_background(found.get(0, ""))
    numbers = sorted(found)[has_background:]
    names = tuple(found[number] for number in numbers)
    if (tuple(numbers), names) == (COCO_CATEGORY_IDS, COCO_NAMES):
        numbers = list(range(1, len(names) + 1))
    first = 1 if has_background or 0 not in found else 0
    # Where the background has its own, a class may be called so, too: labelme has one.
    if numbers != list(range(first, first + count)) or (
        not has_background and any(map(is_background, names))
    ):
        raise ValueError(
            _misfit(tuple(found.values()), count, f", numbered {shown(min(found))} to {shown(max(found))},")
        )
    return names


def _misfit(names: tuple[str, ...], count: int, numbered: str = "") -> str:
    few = ", ".join(as_line(name, 60) for name in names[:4]) + (", ..." if len(names) > 4 else "")
    background = next((shown(name) for name in names if is_background(name)), "none")
    return (
        f"{len(names)} class name{'s' * (len(names) != 1)}{numbered} ({few}), of which {background} seems "
        f"to be the background, for a network of {count} class{'es' * (count != 1)} and the background"
    )
