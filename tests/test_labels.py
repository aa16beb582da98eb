from ssd.labels import COCO_CATEGORY_IDS, COCO_NAMES, category_ids


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
