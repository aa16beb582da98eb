"""COCO's 80 object classes: names, official category ids, and the way between them."""

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
