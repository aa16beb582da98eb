import io
import pickle
import sqlite3
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssd.images import DECODERS
from ssd.signatures import HEAD, identify


def written(write, *given, **options):
    file = io.BytesIO()
    write(file, *given, **options)
    return file.getvalue()


def zipped(name):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, b"content")
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("photo.jpg"))
    return file.getvalue()


def media(*brands):
    """The first box of an ISO media file (ISO/IEC 14496-12, 4.3): major brand, version, others."""
    body = b"ftyp" + brands[0].encode() + b"\0\0\0\0" + "".join(brands[1:]).encode()
    return (len(body) + 4).to_bytes(4, "big") + body


@pytest.mark.parametrize("format", DECODERS)
def test_what_pillow_writes_is_an_image(format):
    kind = identify(written(Image.new("RGB", (9, 7)).save, format)[:HEAD])
    assert kind.as_image == ""
    assert kind.as_weights
    assert {"PPM": "NetPBM", "WEBP": "WebP"}.get(format, format) in kind.name


@pytest.mark.parametrize("format", ["ICO", "PDF", "EPS", "JPEG2000", "DDS"])
def test_images_that_pillow_writes_and_that_are_not_read(format):
    kind = identify(written(Image.new("RGB", (16, 16)).save, format)[:HEAD])
    expected = {"ICO": "an icon", "EPS": "PostScript", "JPEG2000": "JPEG 2000"}.get(format, format)
    assert expected in kind.name
    assert kind.as_image


TENSORS = {"a.weight": torch.ones(2)}


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (written(lambda file: torch.save(TENSORS, file)), "a file of torch"),
        (
            written(lambda file: torch.save(TENSORS, file, _use_new_zipfile_serialization=False)),
            "a file of torch",
        ),
        (
            written(lambda file: torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), file)),
            "a file of torch",
        ),
        (safetensors.numpy.save({"a": np.ones(2)}), "a safetensors file"),
        (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x10", "an ONNX model"),
        (pickle.dumps({"a": 1}), "a pickle of Python"),
        (pickle.dumps([1], protocol=2), "a pickle of Python"),
    ],
)
def test_what_may_hold_weights(content, name):
    kind = identify(content[:HEAD])
    assert kind.name == name
    assert kind.as_image
    assert kind.as_weights == ""


PACKET = b"\x47\x40\0\x10" + bytes(184)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (media("heic", "mif1", "heic"), "a HEIC photo"),
        (media("mif1", "mif1", "miaf", "heix"), "a HEIC photo"),
        (media("hevc", "msf1"), "a HEIC photo"),
        (media("mif1", "mif1", "unci"), "a HEIF image"),
        (media("avis", "msf1"), "an AVIF image"),
        (media("mif1", "miaf", "avif"), "an AVIF image"),
        (media("isom", "iso2", "avc1", "mp41"), "a video (MP4, MOV)"),
        (media("qt  "), "a video (MP4, MOV)"),
        (b"\0\0\0\x08wide\0\0\0\0mdat", "a video (MP4, MOV)"),
        (media("crx ", "isom"), "a raw photo (Canon)"),
        (b"II*\0\x10\0\0\0CR\2\0", "a raw photo (Canon)"),
        (b"RIFF\0\1\0\0AVI LIST", "a video (AVI)"),
        (b"\x1aE\xdf\xa3\x01\0\0\0", "a video (MKV, WebM)"),
        (PACKET * 3, "a video (MPEG)"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\4CgBI", "a PNG image as Xcode packs it"),
        (b"\xff\x0a\xfa\x7f", "a JPEG XL image"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image"),
        (b"8BPS\0\1", "a Photoshop document"),
        (b'<?xml version="1.0"?>\n<!-- by hand -->\n<svg xmlns="x">', "an SVG drawing"),
        (b"<svg width='1'>", "an SVG drawing"),
        (b"<!DOCTYPE html><html><body><svg>", "a web page or other markup"),
        ("\ufeff  <html>".encode(), "a web page or other markup"),
        (b"<annotation><folder>", "a web page or other markup"),
        (b'<?xml version="1.0"?><net name="m" version="11">', "an OpenVINO model"),
        (b'{"images": []}', "JSON text"),
        (b"[[1, 2]]", "JSON text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "a Git LFS pointer"),
        (b"/annex/objects/SHA256E-s1--2.jpg\n", "a git-annex pointer"),
        (b"outs:\n- md5: a1\n  path: photo.jpg\n", "a DVC pointer"),
        (zipped("photos/1.jpg"), "a zip archive"),
        (zipped("data/0001.jpg"), "a zip archive"),
        (zipped("[Content_Types].xml"), "an office document"),
        (written(lambda file: np.savez(file, a=np.ones(2))), "a NumPy archive"),
        (written(np.save, np.ones(2)), "a NumPy array"),
        (tarred(), "a tar archive"),
        (b"\x1f\x8b\x08\0", "a gzip archive"),
        (b"\x89HDF\r\n\x1a\n\0", "an HDF5 file"),
        (b"MATLAB 5.0 MAT-file, Platform: GLNXA64", "a MATLAB file"),
        (bytes(128) + b"DICM", "a DICOM file"),
        (bytes(HEAD), "a file that begins with nothing but zeros"),
        (b"\0", "a file that begins with nothing but zeros"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X", "a side file of macOS (AppleDouble)"),
        (b"\x7fELF\2\1\1", "a program"),
        (b"data:image/png;base64,iVBOR", "an image as base64 text"),
        (b"/9j/4AAQSkZJRgABAQ", "an image as base64 text"),
        (b"The free lunch\n", "a text file"),
        ("Größe: 图\n".encode(), "a text file"),
        ("über".encode("utf-16"), "a text file"),
    ],
)
def test_what_is_neither(content, name):
    kind = identify(content[:HEAD])
    assert kind.name == name


def test_a_database(tmp_path):
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute("create table t (x)")
    assert identify((tmp_path / "a.db").read_bytes()[:HEAD]).name == "an SQLite database"


def test_a_letter_cut_by_the_end_of_the_head_is_text_still():
    assert identify(("a" + "ü" * HEAD).encode()[:HEAD]).name == "a text file"


def test_only_what_may_be_a_path_is_told_as_one():
    assert "not bytes" in identify(b"photos/a b.jpg").as_image
    for text in (b"hello", b"photo.jpg\n", b"one line\nphoto.jpg"):
        assert identify(text).as_image == "pass an image file, such as a JPEG or PNG"


@pytest.mark.parametrize(
    "content", [b"", b"\x01\x02nothing known", bytes(range(256)), b"\xe9t\xe9", b"\xff\xfe\0"]
)
def test_unknown(content):
    assert identify(content) is None


@given(st.binary(max_size=HEAD))
def test_any_bytes_are_told_or_not(content):
    kind = identify(content)
    assert kind is None or kind.name


@given(st.text(st.characters(codec="utf-8", categories=["L", "N", "Zs"]), min_size=1, max_size=80))
def test_words_are_text(text):
    """Whatever is written, it is not taken for a video, an archive or the like."""
    kind = identify(f"On {text}".encode())
    assert kind.name == "a text file"
