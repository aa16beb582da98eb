import pytest
from PIL import Image

from ssd import drawing
from ssd.detections import Detections
from ssd.drawing import class_color

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


def test_a_class_has_one_colour_and_coco_has_80():
    assert len({class_color(i) for i in range(80)}) == 80
    assert class_color(3) == class_color(3)
    nearest = min(
        sum((a - b) ** 2 for a, b in zip(class_color(i), class_color(j), strict=True))
        for i in range(80)
        for j in range(i)
    )
    assert nearest > 100
