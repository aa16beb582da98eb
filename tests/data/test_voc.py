import numpy as np
import pytest
from made_data import BOX, VOC_XML, as_flat_voc, as_voc, picture

from ssd.data import AnnotationError, DetectionDataset, find_split, load


def of(name="a.jpg", difficult=0):
    return VOC_XML.format(name=name, difficult=difficult)


def made(folder, stems, lists=None, suffix=".jpg"):
    """Annotations/, JPEGImages/ and, where given, ImageSets/Main/ with lists by name."""
    for stem in stems:
        picture(folder / "JPEGImages" / f"{stem}{suffix}")
        file = folder / "Annotations" / f"{stem}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(of(f"{stem}{suffix}"))
    for name, text in (lists or {}).items():
        (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_bytes(text.encode())
    return folder


def splits(folder):
    return [split for split in ("train", "val", "test") if find_split(folder, split)]


# --- Lists ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lists", "found"),
    [
        ({"train": "a\n", "val": "b\n"}, ["train", "val"]),
        ({"Train": "a\n", "VAL": "b\n", "Test": "b\n"}, ["train", "val", "test"]),
        ({"default": "a\n"}, ["train"]),
        ({"trainval": "a\n", "test": "b\n"}, ["train", "test"]),
        ({"mine": "a\n"}, ["train"]),
        ({"default": "a\n", "cat_default": "a 1\n"}, ["train"]),
        ({"train": "a\n", "cat_train": "a 1\n", "cat_val": "b 1\n"}, ["train"]),
        ({"val": "a\n"}, ["val"]),
        ({"train": ""}, []),
        (None, ["train"]),
    ],
)
def test_lists_of_any_name_make_the_splits(tmp_path, lists, found):
    assert splits(made(tmp_path, ["a", "b"], lists)) == found


def test_errors_name_the_lists_that_are_there(tmp_path):
    made(tmp_path, ["a"], {"first": "a\n", "second": "a\n"})
    with pytest.raises(AnnotationError) as error:
        load(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: there is no train split; the lists are ImageSets/Main/first.txt, "
        "ImageSets/Main/second.txt"
    )
    with pytest.raises(AnnotationError, match="there is no val split; all 1 XML files are train"):
        load(made(tmp_path / "other", ["a"]), "val")


def listed(folder, split):
    return [name.split(".")[0] for name in load(folder, split).file_names.tolist()]


@pytest.mark.parametrize(
    ("train", "val", "line"),
    [
        ("train.txt", "val.txt", "{}"),
        ("train_list.txt", "val_list.txt", "JPEGImages/{0}.jpg Annotations/{0}.xml"),
        ("Annotations/trainval.txt", "Annotations/valid.txt", "{} 12 1 2"),
        ("splits/trainset.txt", "splits/valset.txt", "{}.xml"),
        (
            "2012_train.txt",
            "2012_val.txt",
            "/data/VOC2012/JPEGImages/{}.jpg 48,240,195,371,11 8,12,352,498,14",
        ),
    ],
)
def test_lists_in_other_places_make_the_splits(tmp_path, train, val, line):
    made(tmp_path, ["a", "b", "c", "d 1"])
    for name, stems in ((train, ["a", "d 1"]), (val, ["b"])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join(map(line.format, stems)))
    (tmp_path / "label_list.txt").write_text("cat\ndog\n")
    assert splits(tmp_path) == ["train", "val"]
    assert (listed(tmp_path, "train"), listed(tmp_path, "val")) == (["a", "d 1"], ["b"])
    assert "1 XML files are in no list, such as c.xml, and not used" in load(tmp_path).notes


def test_several_lists_in_other_places_that_may_be_one_splits(tmp_path):
    made(tmp_path, ["a", "b"])
    for name, stem in (("train1", "a"), ("train2", "b"), ("val", "b")):
        (tmp_path / f"{name}.txt").write_text(stem)
    assert splits(tmp_path) == ["val"]
    with pytest.raises(
        AnnotationError, match=r"no train split; the lists are train1\.txt, train2\.txt, val\.txt"
    ):
        load(tmp_path)
    (tmp_path / "train.txt").write_text("a\nb\n")
    assert listed(tmp_path, "train") == ["a", "b"]


def test_text_files_that_list_no_names_make_no_splits(tmp_path):
    made(tmp_path, ["a", "b"])
    for name in ("train", "val", "readme"):
        (tmp_path / f"{name}.txt").write_text("100 epochs, loss 0.3\n")
    assert splits(tmp_path) == ["train"]
    assert listed(tmp_path, "train") == ["a", "b"]


def test_folders_that_are_called_sets_are_splits(tmp_path):
    made(tmp_path / "trainset", ["a"])
    made(tmp_path / "valset", ["b"])
    assert splits(tmp_path) == ["train", "val"]
    assert listed(tmp_path, "val") == ["b"]


@pytest.mark.parametrize(
    ("stem", "line"),
    [
        *(("GSHJ (1)", "GSHJ (1)"), ("GSHJ (1)", "GSHJ (1)  1"), ("GSHJ (1)", '"GSHJ (1)"'), ("a 1", "a 1")),
        *(("a", "a -1"), ("a", "  a  "), ("a", "a.jpg"), ("a", "JPEGImages/a.jpg"), ("a", "a\r")),
        *(("a", "JPEGImages/a.jpg Annotations/a.xml"), ("a b", "JPEGImages/a b.jpg Annotations/a b.xml")),
        *(("a", "/home/me/VOC2007/JPEGImages/a.jpg"), ("a", "C:\\VOC\\JPEGImages\\a.jpg"), ("A", "a")),
        *(
            ("x/a", "x/a"),
            ("x/a", "a"),
            ("x y/a b", '"x y/a b"'),
            ("a.b", "a.b"),
            ("caf\u00e9", "cafe\u0301"),
        ),
    ],
)
def test_lines_of_lists(tmp_path, stem, line):
    made(tmp_path, [stem, "another"], {"train": f"\ufeff{line}\n\n"})
    found = load(tmp_path)
    assert found.file_names.tolist() == [f"{stem}.jpg"]
    assert not found.problems


def test_listed_names_without_a_file_and_files_that_no_list_has_are_told(tmp_path):
    made(tmp_path, ["a", "b", "c"], {"train": "a\nb\ngone\n", "test": "", "b_train": "c 1\n"})
    (tmp_path / "Annotations" / "b.xml").rename(tmp_path / "Annotations" / "x.xml")
    found = load(tmp_path)
    assert [(each.kind, each.file, each.fatal) for each in found.problems] == [
        ("missing annotation file", "b", True),
        ("missing annotation file", "gone", True),
    ]
    assert f"is listed in {tmp_path / 'ImageSets' / 'Main' / 'train.txt'}, but" in str(found.problems[0])
    assert found.notes == ("2 XML files are in no list, such as c.xml, and not used",)
    assert DetectionDataset(found, lenient=True).annotations.file_names.tolist() == ["a.jpg"]


# --- Folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "images", "found"),
    [
        ("train/{}.xml", "train/{}.jpg", ["train"]),
        ("Valid/{}.xml", "Valid/{}.jpg", ["val"]),
        ("train/labels/{}.xml", "train/data/{}.png", ["train"]),
        ("Annotations/train/{}.xml", "images/train/{}.jpg", ["train"]),
        ("annotations/Test/{}.xml", "images/{}.jpg", ["test"]),
        ("xmls/{}.xml", "imgs/{}.JPG", ["train"]),
        ("whatever/{}.xml", "somewhere/{}.jpeg", ["train"]),
        ("labels/{}.xml", "data/{}.webp", ["train"]),
        ("{}.xml", "images/{}.jpg", ["train"]),
        ("{}.xml", "{}.bmp", ["train"]),
        ("export/Annotations/{}.xml", "export/JPEGImages/{}.jpg", ["train"]),
        ("Annotations/{}.xml", "JPEGImages/deep/{}.jpg", ["train"]),
        ("Annotations/{}.jpg.xml", "JPEGImages/{}.jpg", ["train"]),
        ("ANNOTATIONS/{}.XML", "IMAGES/{}.jpg", ["train"]),
    ],
)
def test_folders_of_any_name(tmp_path, files, images, found):
    picture(tmp_path / images.format("a"))
    picture(tmp_path / ".hidden" / "a.jpg")
    file = tmp_path / files.format("a")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(of(images.format("a").rsplit("/", 1)[-1]))
    assert splits(tmp_path) == found
    annotations = load(tmp_path, found[0])
    assert annotations.path(0) == tmp_path / images.format("a")
    assert annotations.boxes.tolist() == [BOX]
    assert not annotations.problems
    picture(tmp_path / "elsewhere" / "a.png")
    moved = load(tmp_path, found[0], images=tmp_path / "elsewhere")
    assert moved.path(0) == tmp_path / "elsewhere" / "a.png"


def test_the_folder_of_the_xml_files_by_itself(tmp_path):
    made(tmp_path, ["a"])
    assert load(tmp_path / "Annotations").path(0) == tmp_path / "JPEGImages" / "a.jpg"


def test_classes_are_those_of_all_splits(tmp_path):
    for split, name in (("train", "cat"), ("valid", "dog")):
        picture(tmp_path / split / "a.jpg")
        (tmp_path / split / "a.xml").write_text(of().replace("cat", name))
    assert load(tmp_path, "val").class_names == load(tmp_path).class_names == ("cat", "dog")


# --- Images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../x.jpg", "C:\\\\photos\\\\a.jpg", "/home/me/a.jpg", "a", "", "a.png"])
def test_voc_names_count_by_their_last_part_or_by_the_annotation_files(tmp_path, name):
    as_voc(tmp_path / "voc")
    picture(tmp_path / "x.jpg")
    (tmp_path / "voc/Annotations/a.xml").write_text(of(name))
    found = load(tmp_path / "voc")
    assert found.file_names.tolist() == ["a.jpg"]
    assert not found.problems


def test_a_file_that_is_called_otherwise_has_the_image_that_it_names(tmp_path):
    made(tmp_path, ["a"])
    (tmp_path / "Annotations" / "a.xml").rename(tmp_path / "Annotations" / "0001.xml")
    assert load(tmp_path).file_names.tolist() == ["a.jpg"]
    (tmp_path / "Annotations" / "0001.xml").write_text(
        of("").replace("<size>", "<path>D:\\x\\a.jpg</path><size>")
    )
    assert load(tmp_path).file_names.tolist() == ["a.jpg"]


def test_of_two_images_of_one_stem_the_file_names_its_own(tmp_path):
    for suffix in (".jpg", ".png"):
        made(tmp_path, ["a"], suffix=suffix)
        assert load(tmp_path).file_names.tolist() == [f"a{suffix}"]


def test_a_copied_voc_file_that_names_the_first_image_is_of_its_own(tmp_path):
    as_flat_voc(tmp_path)
    picture(tmp_path / "a_flip.jpg")
    (tmp_path / "a_flip.xml").write_text(of())
    assert load(tmp_path).file_names.tolist() == ["a.jpg", "a_flip.jpg"]
    (tmp_path / "a_flip.jpg").unlink()
    found = load(tmp_path)
    assert [(each.kind, each.file) for each in found.problems] == [("missing image", "a_flip.jpg")]


@pytest.mark.parametrize("written", ["a.jpg", "a.pdf"])
def test_images_of_a_kind_that_is_not_read_are_told(tmp_path, written):
    made(tmp_path, ["a", "b"])
    (tmp_path / "JPEGImages" / "a.jpg").unlink()
    (tmp_path / "JPEGImages" / "a.pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / "JPEGImages" / "a.txt").touch()
    (tmp_path / "Annotations" / "a.xml").write_text(of(written))
    (problem,) = load(tmp_path).problems
    assert (problem.kind, problem.file, problem.fatal) == ("unreadable image", "a.pdf", True)
    assert "PDF" in problem.message


def test_images_without_a_file_are_counted(tmp_path):
    as_flat_voc(tmp_path)
    picture(tmp_path / "b.jpg")
    picture(tmp_path / "c.jpg")
    note = f"2 images in {tmp_path} have no XML file, such as b.jpg, and are not used"
    assert load(tmp_path).notes == (note,)


@pytest.mark.parametrize(
    ("xml", "written", "others", "told"),
    [
        ("a/0001", "0001.jpg", ["a/0002", "b/0001"], "a/0001.jpg"),
        ("a/0001", "a/0001.jpg", ["a/0002", "b/0001"], "a/0001.jpg"),
        ("a/0001", "0001.jpg", ["a/0002", "0001"], "a/0001.jpg"),
        ("0001", "a/0001.jpg", ["a/0002", "b/0001"], "a/0001.jpg"),
        ("A/0001", "0001.jpg", ["a/0002", "b/0001"], "A/0001.jpg"),
    ],
)
def test_a_file_of_another_folder_does_not_stand_for_a_missing_one(tmp_path, xml, written, others, told):
    for each in others:
        picture(tmp_path / "JPEGImages" / f"{each}.jpg")
    for stem, name in ((xml, written), ("a/0002", "0002.jpg")):
        file = tmp_path / "Annotations" / f"{stem}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(of(name))
    (problem,) = load(tmp_path).problems
    assert (problem.kind, problem.file) == ("missing image", told)


def test_folders_that_are_only_those_of_the_annotation_files_say_nothing_of_the_images(tmp_path):
    picture(tmp_path / "JPEGImages" / "one" / "0001.jpg")
    (tmp_path / "Annotations" / "a").mkdir(parents=True)
    (tmp_path / "Annotations" / "a" / "0001.xml").write_text(of("0001.jpg"))
    found = load(tmp_path)
    assert (found.file_names.tolist(), found.problems) == (["one/0001.jpg"], ())


# --- What files say ---------------------------------------------------------------------------------------


BOMB = (
    '<!DOCTYPE a [<!ENTITY e0 "lol">'
    + "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12))
    + "]><annotation><filename>&e11;</filename></annotation>"
)

BAD = {
    b"": "is empty; that of an image without objects holds <annotation></annotation>",
    b" \n": "is empty",
    of().encode()[:150]: "not an XML file (",
    b"\x00\x01\xff\xd8\x89": "not an XML file (",
    b'<?xml version="1.0" encoding="klingon"?><annotation>\xff</annotation>': "not an XML file (",
    BOMB.encode(): "it defines entities, which may expand without end",
    b'<?xml version="1.0" encoding="utf-7"?>' + BOMB.replace("<", "+ADw-").encode(): "not an XML file (",
    BOMB.encode("utf-16"): "it defines entities, which may expand without end",
    b"<annotations><image/></annotations>": "its root element is <annotations>, not <annotation>; CVAT",
    b"<html><body/></html>": "its root element is <html>, not <annotation>",
}


def test_files_that_cannot_be_read_are_listed_with_all_others(tmp_path):
    made(tmp_path, ["good", *(f"bad{i}" for i in range(len(BAD)))])
    for i, content in enumerate(BAD):
        (tmp_path / "Annotations" / f"bad{i}.xml").write_bytes(content)
    (tmp_path / "Annotations" / "folder.xml").mkdir()
    found = load(tmp_path)
    assert [(each.kind, each.file, each.fatal) for each in found.problems] == [
        ("unreadable annotation file", str(tmp_path / "Annotations" / f"bad{i}.xml"), True)
        for i in range(len(BAD))
    ]
    for problem, told in zip(found.problems, BAD.values(), strict=True):
        assert told in problem.message
    assert not found.notes
    with pytest.raises(AnnotationError, match=f"unreadable annotation file: {len(BAD)}"):
        DetectionDataset(found)
    assert len(DetectionDataset(found, lenient=True)) == 1


def test_an_empty_annotation_is_a_background_image(tmp_path):
    made(tmp_path, ["a", "b"])
    (tmp_path / "Annotations" / "b.xml").write_text("<annotation></annotation>")
    found = load(tmp_path)
    assert not found.problems
    assert (np.diff(found.starts).tolist(), found.sizes.tolist()) == ([1, 0], [[100, 80]] * 2)


def test_where_nothing_can_be_read_the_first_reasons_are_told(tmp_path):
    made(tmp_path, ["a", "b"])
    (tmp_path / "Annotations" / "a.xml").write_text("")
    (tmp_path / "Annotations" / "b.xml").write_text("<annotation/>")
    with pytest.raises(AnnotationError) as error:
        load(tmp_path)
    folder = tmp_path / "Annotations"
    assert str(error.value).splitlines() == [
        f"{folder}: no objects with a name in 2 XML files",
        f"  {folder / 'a.xml'}: is empty; that of an image without objects holds <annotation></annotation>",
    ]


def with_object(tmp_path, text):
    made(tmp_path, ["a", "b"])
    start = "<annotation><filename>a.jpg</filename>"
    (tmp_path / "Annotations" / "a.xml").write_text(f"{start}<object>{text}</object></annotation>")
    return load(tmp_path)


CORNERS = "<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>40</xmax><ymax>60</ymax></bndbox>"
ROTATION = "<attributes><attribute><name>rotation</name><value>{}</value></attribute></attributes>"


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (CORNERS, BOX),
        (CORNERS.replace("11", " 11.5 "), [10.5, 20, 40, 60]),
        ("<bndbox><xmax>40</xmax><xmin>11</xmin><ymax>60</ymax><ymin>21</ymin></bndbox>", BOX),
        (f"{CORNERS}<part><name>ear</name><bndbox><xmin>1</xmin></bndbox></part>", BOX),
        (CORNERS + ROTATION.format("0.0"), BOX),
        (CORNERS + ROTATION.format("90.0"), [5, 25, 45, 55]),
        (CORNERS + ROTATION.format("left"), BOX),
        ("<polygon><x1>10</x1><y1>20</y1><x2>40</x2><y2>20</y2><x3>40</x3><y3>60</y3></polygon>", BOX),
        (
            f"<polygon><username>me</username>{'<pt><x>10</x><y>20</y></pt><pt><x>40</x><y>60</y></pt>' * 2}"
            "</polygon>",
            BOX,
        ),
        (
            "<rotated_bndbox><x1>10</x1><y1>20</y1><x2>40</x2><y2>20</y2><x3>40</x3><y3>60</y3>"
            "<x4>10</x4><y4>60</y4></rotated_bndbox>",
            BOX,
        ),
        (
            "<type>robndbox</type><robndbox><cx>25</cx><cy>40</cy><w>40</w><h>30</h>"
            "<angle>1.5707963267948966</angle></robndbox>",
            BOX,
        ),
        (
            "<robndbox><x_left_top>10</x_left_top><y_left_top>20</y_left_top><x_right_top>40</x_right_top>"
            "<y_right_top>20</y_right_top><x_right_bottom>40</x_right_bottom>"
            "<y_right_bottom>60</y_right_bottom></robndbox>",
            BOX,
        ),
    ],
)
def test_boxes_of_objects(tmp_path, text, box):
    found = with_object(tmp_path, f"<name>\n  cat </name>{text}")
    assert not found.problems
    np.testing.assert_allclose(found.boxes[0], box, atol=1e-9)


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        ("<name>cat</name>", "not a box", "annotation a.xml:1: it has no bndbox"),
        (
            "<name>cat</name><bndbox></bndbox>",
            "not a box",
            "its bndbox (, , , ) is not four finite",
        ),
        (f"<name>cat</name>{CORNERS.replace('11', '1e30')}", "not a box", "its bndbox (1e30, 21, 40, 60) is"),
        ("<name>cat</name><polygon><x1>1</x1><y1>2</y1></polygon>", "not a box", "it has no bndbox"),
        (CORNERS, "unknown category id", "the object has no name"),
        (f"<name> </name>{CORNERS}", "unknown category id", "the object has no name"),
    ],
)
def test_objects_that_are_none(tmp_path, text, kind, told):
    found = with_object(tmp_path, text)
    assert [each.kind for each in found.problems] == [kind]
    assert told in str(found.problems[0])
    assert len(found.boxes) == 1


@pytest.mark.parametrize(
    "size",
    [
        "",
        "<size/>",
        "<size><width>0</width><height>0</height></size>",
        "<size><width>?</width><height>80</height></size>",
    ],
)
def test_sizes_that_are_not_given_are_those_of_the_images(tmp_path, size):
    made(tmp_path, ["a"])
    before = "<size><width>100</width><height>80</height><depth>3</depth></size>"
    text = of()
    assert before in text
    (tmp_path / "Annotations" / "a.xml").write_text(text.replace(before, size))
    found = load(tmp_path)
    assert (found.sizes.tolist(), found.problems) == ([[100, 80]], ())


@pytest.mark.parametrize(
    ("value", "difficult"), [("1", True), ("true", True), ("0", False), ("Unspecified", False), ("", False)]
)
def test_difficult_flags_of_any_kind(tmp_path, value, difficult):
    made(tmp_path, ["a"])
    (tmp_path / "Annotations" / "a.xml").write_text(of(difficult=value))
    assert load(tmp_path).crowd.tolist() == [difficult]


def test_blanks_before_the_declaration_are_no_harm(tmp_path):
    made(tmp_path, ["a"])
    (tmp_path / "Annotations" / "a.xml").write_text(f'\n <?xml version="1.0"?>\n{of()}')
    assert not load(tmp_path).problems


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_of_any_encoding_with_namespaces_or_without(tmp_path, encoding):
    made(tmp_path, ["a"])
    text = of().replace("cat", "\u732b").replace("<annotation>", '<annotation xmlns="http://x/y">')
    (tmp_path / "Annotations" / "a.xml").write_bytes(f"\n{text}".encode(encoding))
    found = load(tmp_path)
    assert (found.class_names, found.boxes.tolist()) == (("\u732b",), [BOX])


XML = "<?xml version='1.0' encoding='{}'?>\n"


@pytest.mark.parametrize(
    ("declared", "saved"),
    [
        *(
            ("GBK", "gbk"),
            ("gb2312", "gbk"),
            ("utf-16", "utf-8"),
            ("Big5", "big5"),
            ("Shift_JIS", "shift_jis"),
        ),
        *(("us-ascii", "utf-8"), ("klingon", "utf-8")),
    ],
)
def test_files_that_declare_another_encoding_than_the_parser_has_or_than_is_theirs(tmp_path, declared, saved):
    made(tmp_path, ["a"])
    text = XML.format(declared) + of().replace("cat", "\u8c93" if declared == "Big5" else "\u732b")
    (tmp_path / "Annotations" / "a.xml").write_bytes(text.encode(saved))
    found = load(tmp_path)
    assert (found.class_names, found.boxes.tolist()) == ((text.split("<name>")[1][0],), [BOX])


def test_a_mark_and_a_line_before_the_declaration(tmp_path):
    made(tmp_path, ["a"])
    (tmp_path / "Annotations" / "a.xml").write_text(f"\ufeff\n{XML.format('utf-8')}{of()}", "utf-8")
    assert load(tmp_path).boxes.tolist() == [BOX]
