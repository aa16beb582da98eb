import pytest
from made_data import VOC_XML, as_flat_voc, as_voc, picture

from ssd.data import AnnotationError, load


@pytest.mark.parametrize("name", ["../../x.jpg", "C:\\\\photos\\\\a.jpg", "/home/me/a.jpg", "a", "", "a.png"])
def test_voc_names_count_by_their_last_part_or_by_the_annotation_files(tmp_path, name):
    as_voc(tmp_path / "voc")
    picture(tmp_path / "x.jpg")
    (tmp_path / "voc/Annotations/a.xml").write_text(VOC_XML.format(name=name, difficult=0))
    found = load(tmp_path / "voc")
    assert found.file_names.tolist() == ["a.jpg"]
    assert not found.problems


def test_a_copied_voc_file_that_names_the_first_image_is_of_its_own(tmp_path):
    as_flat_voc(tmp_path)
    picture(tmp_path / "a_flip.jpg")
    (tmp_path / "a_flip.xml").write_text(VOC_XML.format(name="a.jpg", difficult=0))
    assert load(tmp_path).file_names.tolist() == ["a.jpg", "a_flip.jpg"]


def test_xml_that_expands_without_end_is_refused(tmp_path):
    as_voc(tmp_path)
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12))
    bomb = f'<!DOCTYPE a [<!ENTITY e0 "lol">{entities}]><annotation><filename>&e11;</filename></annotation>'
    (tmp_path / "Annotations/a.xml").write_text(bomb)
    with pytest.raises(AnnotationError, match=r"a\.xml: not an XML file"):
        load(tmp_path)
