import os
import sys
import unicodedata
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from ssd.data.names import Found, ImageFolder, files_below


@pytest.fixture
def folder(tmp_path):
    def make(*names):
        for name in names:
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return ImageFolder(tmp_path / "root")

    return make


@pytest.mark.parametrize(
    "written",
    [
        "sub/a b.jpg",
        "./sub/a b.jpg",
        "sub//a b.jpg",
        "x/../sub/a b.jpg",
        r"sub\a b.jpg",
        " sub/a b.jpg\n",
        "/data/local-files/?d=sub/a%20b.jpg",
    ],
)
def test_a_name_within_the_folder_is_that_file(folder, written):
    images = folder("sub/a b.jpg", "other/a b.jpg", "a b.jpg")
    assert images.find(written) == Found("sub/a b.jpg")
    assert images.find_as_written(written) == "sub/a b.jpg"


@pytest.mark.parametrize(
    "written",
    [
        "/home/someone/data/sub/a b.jpg",
        r"D:\data\sub\a b.jpg",
        "D:/data/sub/a b.jpg",
        r"\\server\share\sub\a b.jpg",
        "../../sub/a b.jpg",
        r"..\..\media\sub\a b.jpg",
        "file:///C:/data/sub/a%20b.jpg",
        "file:///data/sub/a b.jpg",
        "https://example.org/x/sub/a%20b.jpg?versionId=3&x=/y/z.jpg",
        "https://example.org/o/sub%2Fa%20b.jpg?alt=media",
        "s3://bucket/sub/a b.jpg",
        "http://localhost:8080/data/local-files/?d=some%2Fsub%2Fa%20b.jpg",
        "Sub/A B.JPG",
        "sub/a%20b.jpg",
    ],
)
def test_names_of_other_machines(folder, written):
    images = folder("sub/a b.jpg", "other/a b.jpg", "a c.jpg")
    assert images.find(written) == Found("sub/a b.jpg", guessed=True)


@pytest.mark.parametrize(
    "name", ["12:30:00.png", "C:a.jpg", "%41.jpg", "a?b.jpg", "a#b.jpg", "a\\b.jpg", "~.jpg"]
)
@pytest.mark.skipif(os.name == "nt", reason="such names cannot be there")
def test_odd_names_are_plain_ones_where_such_a_file_is_there(folder, name):
    assert folder(name, "A.jpg", "b.jpg").find(name) == Found(name)


@pytest.mark.parametrize("written", ["/data/upload/1/abcd1234-photo.jpg", "abcd1234-photo.jpg"])
def test_what_label_studio_puts_before_a_name(folder, written):
    assert folder("photo.jpg", "x/other.jpg").find(written).name == "photo.jpg"
    assert folder("photo.jpg", "sub/abcd1234-photo.jpg").find(written).name == "sub/abcd1234-photo.jpg"


def test_unicode_of_another_system(folder):
    name = "Höhle/é.jpg"
    for there, written in (("NFC", "NFD"), ("NFD", "NFC")):
        images = folder(unicodedata.normalize(there, f"{there}/{name}"))
        found = images.find(unicodedata.normalize(written, f"{there}/{name}"))
        assert unicodedata.normalize("NFC", found.name) == f"{there}/{name}"


def test_of_several_spellings_the_closest_is_taken(folder):
    images = folder("A.jpg", "a.jpg")
    assert images.find("/x/a.jpg").name == "a.jpg"
    assert images.find("/x/A.jpg").name == "A.jpg"
    assert "2 files" in images.find("/x/a.JPG").why
    assert folder("x/b%20c.jpg", "y/b c.jpg").find("z/b%20c.jpg").name == "x/b%20c.jpg"


def test_what_fits_several_files_is_told_with_them(folder):
    found = folder("s1/a.jpg", "s2/a.jpg").find("/x/a.jpg")
    assert found.name == "/x/a.jpg"
    assert "2 files of " in found.why
    assert "are called so: s1/a.jpg, s2/a.jpg; write more of the path" in found.why
    assert "--images" in found.why


def test_more_parts_tell_files_apart_also_those_above_the_folder(folder):
    images = folder("a.jpg", "s1/a.jpg", "s2/a.jpg")
    assert images.find("/x/s2/a.jpg").name == "s2/a.jpg"
    assert images.find("C:/y/root/a.jpg").name == "a.jpg"
    assert images.find(str(images.root / "a.jpg")) == Found("a.jpg")


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("gone.jpg", ""),
        ("sub/gone.jpg", ""),
        ("../gone.jpg", "names a file elsewhere"),
        ("/x/gone.jpg", "names a file elsewhere"),
        ("https://example.org/gone.jpg", "is a URL"),
        ("", "the name is empty"),
        ("..", "the name is empty"),
        ("a\0.jpg", "names a file elsewhere"),
        ("x" * 5000, "names a file elsewhere"),
    ],
)
def test_what_is_not_there(folder, written, why):
    found = folder("a.jpg").find(written)
    assert found.why.startswith(why)
    assert bool(found.why) == bool(why)
    assert len(found.name) < 300
    assert "\0" not in found.name
    found.name.encode()


def test_a_file_of_another_folder_is_not_taken_where_the_folder_that_is_named_is_there(tmp_path):
    for name in ("cam1/1.jpg", "cam2/2.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    folder = ImageFolder(tmp_path)
    assert folder.find("cam1/2.jpg") == ("cam1/2.jpg", "", False)
    assert folder.find("elsewhere/2.jpg").name == "cam2/2.jpg"


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_a_link_that_cannot_be_followed_hides_nothing_beside_it(tmp_path):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "notes").symlink_to("notes")
    assert list(files_below(tmp_path)) == ["a.jpg", "notes"]
    assert ImageFolder(tmp_path).find("a.jpg").name == "a.jpg"


def test_lone_surrogates_can_be_shown(folder):
    found = folder("a.jpg").find("/x/\ud800.jpg")
    assert found.why
    found.name.encode()


def test_a_folder_that_is_not_there_has_no_files(tmp_path):
    assert ImageFolder(tmp_path / "gone").find("x/a.jpg") == Found("x/a.jpg")
    assert list(files_below(tmp_path / "gone")) == []


def test_files_below_follow_links_once_and_leave_out_what_is_hidden(tmp_path):
    for name in ("root/b/x.jpg", "root/a.jpg", "root/.git/y.jpg", "root/._a.jpg", "store/z.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.symlink(tmp_path / "store", tmp_path / "root" / "c")
    os.symlink(tmp_path / "root", tmp_path / "root" / "b" / "loop")
    assert list(files_below(tmp_path / "root")) == ["a.jpg", "b/x.jpg", "c/z.jpg"]


def test_a_name_is_found_in_a_linked_folder(tmp_path, folder):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "z.jpg").touch()
    images = folder("a.jpg")
    os.symlink(tmp_path / "store", images.root / "c")
    assert images.find("D:/z.jpg").name == "c/z.jpg"
    assert images.find("c/z.jpg") == Found("c/z.jpg")


PARTS = st.sampled_from(
    ["a", "A", "b.jpg", "B.jpg", "é.png", "e\u0301.png", "c d", "c%20d", "x:y", "..", ".", ""]
)
PATHS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
WRITTEN = st.builds(
    lambda before, path, separator: before + path.replace("/", separator),
    st.sampled_from(["", "/", "C:\\", "../", "file:///", "https://h/", "s3://b/", "/data/local-files/?d="]),
    st.one_of(PATHS, st.text(max_size=12)),
    st.sampled_from(["/", "\\", "%2F"]),
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder with files of many spellings, among others outside of it."""
    base = tmp_path_factory.mktemp("names")
    for name in ("b.jpg", "a/b.jpg", "a/é.png", "A/a/B.jpg", "c d/b.jpg", "a/c%20d/x.png", "x:y"):
        for above in ("root", ""):
            path = base / above / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.touch()
    return base / "root"


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written=WRITTEN)
def test_whatever_is_written_is_a_file_inside_or_no_file_that_is_there(tree, written):
    found = ImageFolder(tree).find(written)
    if found.why:
        return
    path = Path(os.path.normpath(tree / found.name))
    assert path.is_relative_to(tree)
    assert ".." not in Path(found.name).parts
    if found.guessed:
        assert path.is_file()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.sets(
        st.text("abAB/", min_size=1, max_size=5).filter(lambda name: "//" not in f"/{name}/"),
        min_size=1,
        max_size=8,
    ),
    above=st.sampled_from(["/m/", "C:\\m\\", "../", "https://h/m/", ""]),
    count=st.integers(1, 3),
    data=st.data(),
)
def test_a_name_that_is_unique_by_its_last_parts_is_found(tmp_path_factory, files, above, count, data):
    root = tmp_path_factory.mktemp("unique")
    there = []
    for name in sorted(files):
        path = root / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        there.append(f"{name}.jpg")
    chosen = data.draw(st.sampled_from(there))
    last = chosen.split("/")[-count:]
    alike = [
        name for name in there if name.lower().split("/")[-len(last) :] == [part.lower() for part in last]
    ]
    found = ImageFolder(root).find(above + "/".join(last))
    if len(alike) == 1:
        assert (found.name, found.why) == (chosen, "")
    elif not found.why:
        assert found.name in alike
