import base64
import errno
import io
import os
import re
import struct
import subprocess
import sys
import types
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, loaded
from PIL import Image, ImageFile

from ssd import images, rgb, web
from ssd.errors import ImageError, ImageMemoryError
from ssd.images import is_image_name, load_image, load_scaled, upright_size

# --- Kinds of sources ---


def test_every_kind_of_source_gives_the_same_pixels(pixels, tmp_path, server, monkeypatch):
    png = encoded(Image.fromarray(pixels))
    path = tmp_path / "ünï cödé 图.png"
    path.write_bytes(png)
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    monkeypatch.chdir(tmp_path)
    for source in (
        path,
        str(path),
        path.name,
        server.serve("/a.png?size=1", png, kind="image/png"),
        png,
        bytearray(png),
        io.BytesIO(png),
        Image.open(path),
        Image.fromarray(pixels),
        pixels,
        pixels / 255,
        (pixels / 255).astype(np.float32),
        pixels.astype(np.uint16) * 257,
        np.array(pixels.tolist()),
        pixels.astype(np.int32),
        pixels[:, ::-1][:, ::-1],
        chw,
        chw / 255,
        (chw / 255).requires_grad_(),
    ):
        np.testing.assert_array_equal(loaded(source), pixels)


def test_an_open_file(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    with open(tmp_path / "photo.png", "rb") as file:
        np.testing.assert_array_equal(loaded(file), pixels)
        assert not file.closed


@pytest.mark.parametrize("source", [3, None, [1, 2], {"a": 1}])
def test_other_things_are_a_type_error(source):
    with pytest.raises(TypeError, match="an image is a path"):
        load_image(source)


def test_the_given_image_is_not_changed(pixels):
    image = Image.fromarray(pixels)
    result = load_image(image)
    result.putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(np.asarray(image), pixels)
    load_image(pixels).putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(np.asarray(image), pixels)


# --- Animations and orientations ---


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue", "green")]
    body = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert np.abs(loaded(body)[2, 2].astype(int) - [255, 0, 0]).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(pixels, orientation):
    # What a camera stores when it is held so: the inverse of what a viewer does.
    stored = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif.tobytes())
    np.testing.assert_array_equal(loaded(body), pixels)
    np.testing.assert_array_equal(loaded(Image.open(io.BytesIO(body))), pixels)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_an_upright_image_is_not_turned_again(pixels, orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, exif=exif)
    once = load_image(file.getvalue())
    assert (once.size == pixels.shape[:2]) == (orientation == 6)
    np.testing.assert_array_equal(np.asarray(load_image(once)), np.asarray(once))


def test_unreadable_exif_does_not_hide_the_picture(pixels):
    body = encoded(Image.fromarray(pixels), exif=b"Exif\0\0 this is no TIFF header")
    np.testing.assert_array_equal(loaded(body), pixels)


@pytest.mark.parametrize(
    "tag", [{0x0132: 1.5}, {0x011A: "7"}, {0x0100: (1, 3)}], ids=["float", "text", "ratio"]
)
def test_odd_exif_tags_do_not_keep_a_picture_from_being_upright(pixels, tag):
    import PIL.TiffImagePlugin as tiff

    block = tiff.ImageFileDirectory_v2()
    block[0x0112] = 6
    for key, value in tag.items():
        block.tagtype[key] = {float: 12, str: 2, tuple: 5}[type(value)]
        block[key] = tiff.IFDRational(*value) if isinstance(value, tuple) else value
    body = encoded(
        Image.fromarray(np.rot90(pixels).copy()), exif=b"Exif\0\0II*\0\x08\0\0\0" + block.tobytes(8)
    )
    np.testing.assert_array_equal(loaded(body), pixels)


def test_one_lazy_image_in_several_threads(pixels):
    body = encoded(Image.fromarray(pixels.repeat(100, 0).repeat(100, 1)), "JPEG")
    for _ in range(5):
        image = Image.open(io.BytesIO(body))
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(loaded, [image] * 4))
        assert all(np.array_equal(result, results[0]) for result in results)


# --- Refusals ---


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_file_cut_off_anywhere_is_an_image_error_or_whole(pixels, format):
    """Never a foreign exception; GIF and TIFF may be whole without their last bytes."""
    body = encoded(Image.fromarray(pixels.repeat(4, 0).repeat(4, 1)), format)
    whole = loaded(body)
    for length in range(len(body) - 1):
        try:
            np.testing.assert_array_equal(loaded(body[:length]), whole)
        except ImageError as error:
            assert str(error).startswith("bytes: ")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "BMP"])
def test_flipped_bytes_raise_nothing_else(pixels, format):
    body = encoded(Image.fromarray(pixels), format)
    random = np.random.RandomState(0)
    for _ in range(200):
        damaged = bytearray(body)
        damaged[random.randint(len(body))] ^= random.randint(1, 256)
        try:
            load_image(bytes(damaged))
        except ImageError:
            pass


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html>", "web page"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
        (b"nothing", "text file"),
        (b"\x01\x02\x03", "not an image"),
        (b"\xff\xd8\xff\xe0", "begins as a JPEG image, and cannot be read"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC photo; pip install pillow-heif"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "video"),
        (b"%PDF-1.4", "PDF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "git lfs pull"),
        (b"II*\0\x10\0\0\0CR\2\0", "raw photo"),
        (bytes(4000), "nothing but zeros"),
    ],
)
def test_refused_files_are_named_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"photo\.jpg: .*{reason}"):
        load_image(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg"):
        load_image(tmp_path / "gone.jpg")
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)


def test_what_a_disk_says_is_no_damage(pixels, tmp_path, monkeypatch):
    Image.fromarray(pixels).save(tmp_path / "photo.png")

    def fails(image):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fails)
    with pytest.raises(OSError, match="Input/output error"):
        load_image(tmp_path / "photo.png")


def test_a_place_that_no_file_has_is_damage(pixels, monkeypatch):
    """To a system, an invalid argument, which of its disks it does not say."""

    def fails(image):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fails)
    with pytest.raises(
        ImageError, match=r"^photo: cannot be read \(Invalid argument\); it is cut off, damaged"
    ):
        load_image(encoded(Image.fromarray(pixels)), name="photo")


def test_a_broken_image_that_pillow_opened_lazily_is_an_image_error(pixels):
    body = encoded(Image.fromarray(pixels.repeat(20, 0).repeat(20, 1)), "JPEG")
    with pytest.raises(ImageError, match="cut off"):
        load_image(Image.open(io.BytesIO(body[: len(body) * 3 // 4])))


def png_header(width, height):
    """A PNG that claims a size and holds nothing."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return header + struct.pack(">I", 1000) + b"IDAT"


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((60000, 60000), "pixels"),
        ((13400, 13400), "pixels"),
        ((1, 65500), "too thin"),
        ((2001, 20), "too thin"),
    ],
)
def test_bombs_and_absurd_shapes_are_refused_by_their_header(size, reason):
    with pytest.raises(ImageError, match=reason):
        load_image(png_header(*size))


# --- Texts and open files ---

PNG = encoded(Image.new("RGB", (3, 2), "red"))


@pytest.mark.parametrize("length", [60, 5000, 2_000_000])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP"])
@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "DATA:;base64,", " \n"])
def test_base64_text_ends_in_a_short_error(length, format, prefix):
    text = prefix + base64.b64encode(encoded(Image.new("RGB", (3, 2)), format)).decode().ljust(length, "A")
    with pytest.raises(ImageError, match="pass (the bytes in it|its bytes)") as caught:
        load_image(text)
    assert len(str(caught.value)) < 400


def test_the_advice_for_base64_works():
    import urllib.request

    text = base64.b64encode(PNG).decode()
    assert load_image(base64.b64decode(text)).size == (3, 2)
    assert load_image(urllib.request.urlopen(f"data:image/png;base64,{text}").read()).size == (3, 2)


def test_a_file_that_is_called_like_base64(tmp_path, monkeypatch):
    (tmp_path / "R0lGODlh.png").write_bytes(PNG)
    monkeypatch.chdir(tmp_path)
    assert load_image("R0lGODlh.png").size == (3, 2)


@pytest.mark.parametrize("text", ["x" * 300, "x/" * 5000, "x" * 1_000_000])
def test_over_long_paths_end_in_a_short_error(text):
    with pytest.raises((ImageError, FileNotFoundError)) as caught:
        load_image(text)
    assert len(str(caught.value)) < 400
    assert isinstance(caught.value, ImageError)


def test_bytes_of_a_path_or_of_text():
    with pytest.raises(ImageError, match="a path is a str"):
        load_image(b"photos/coffee.jpg")
    with pytest.raises(ImageError, match="b64decode"):
        load_image(base64.b64encode(PNG))


def test_open_files_are_read_from_their_start(tmp_path, pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")  # which leaves it at its end
    np.testing.assert_array_equal(loaded(buffer), pixels)
    np.testing.assert_array_equal(loaded(buffer), pixels)

    class Stream:
        """As of a server: read once, and never sought in."""

        def __init__(self):
            self.read = io.BytesIO(buffer.getvalue()).read

    np.testing.assert_array_equal(loaded(Stream()), pixels)


def test_open_files_that_give_no_bytes(tmp_path):
    path = tmp_path / "photo.png"
    path.write_text("a")
    with path.open() as file, pytest.raises(ImageError, match=r"photo\.png: its read\(\) gives str.*'rb'"):
        load_image(file)
    with path.open("rb") as file, pytest.raises(ImageError, match=r"photo\.png: this is a text file"):
        load_image(file)
    with pytest.raises(ImageError, match=r"photo\.png: read of closed file; open the file again"):
        load_image(file)
    with pytest.raises(ImageError, match="BytesIO: the file is empty"):
        load_image(io.BytesIO())


# --- The limit of pixels ---


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "BMP", "PPM"])
def test_the_limit_is_for_files_and_can_be_raised(tmp_path, monkeypatch, format):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # of which Pillow refuses twice as many
    image = Image.new("RGB", (30, 20), "red")
    path = tmp_path / "photo"
    path.write_bytes(encoded(image, format))
    with pytest.raises(ImageError, match=r"photo: 30x20 is more than 200 pixels; .*max_pixels=600"):
        load_image(path)
    assert upright_size(path) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(path, max_pixels=600).size == upright_size(path, max_pixels=600) == (30, 20)
    with pytest.raises(ImageError, match="599"):
        load_image(path, max_pixels=599)
    assert load_image(image).size == load_image(np.asarray(image)).size == (30, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(path).size == upright_size(path) == (30, 20)
    with pytest.raises(ImageError, match="599"):
        load_image(path, max_pixels=599)


def test_a_turned_tiff_above_pillows_limit(tmp_path, monkeypatch, pixels):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "scan.tif", exif=exif)
    expected = loaded(tmp_path / "scan.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "scan.tif", max_pixels=54)), expected)


# --- Formats of other packages ---


@pytest.fixture
def registry(monkeypatch):
    """What is registered with Pillow is forgotten at the end."""
    Image.init()
    for table in ("OPEN", "EXTENSION"):
        monkeypatch.setattr(Image, table, dict(getattr(Image, table)))
    monkeypatch.setattr(Image, "ID", list(Image.ID))


class Toy(ImageFile.ImageFile):
    """A format of one colour: b"TOY", its letter, width and height as bytes."""

    format = "TOY"

    def _open(self):
        head = self.fp.read(6)
        if head[:3] != b"TOY":
            raise SyntaxError
        self._mode, self._size = "RGB", (head[4], head[5])
        self.tile = [ImageFile._Tile("raw", (0, 0, *self._size), 6, ("RGB", 0, 1))]


def test_an_opener_that_was_registered_with_pillow_is_used(registry, tmp_path):
    path = tmp_path / "photo.toy"
    path.write_bytes(b"TOYx\3\2" + bytes([200, 100, 0]) * 6)
    assert not is_image_name(path.name)
    with pytest.raises(ImageError, match="not an image"):
        load_image(path)
    Image.register_open("TOY", Toy, lambda prefix: prefix[:3] == b"TOY")
    Image.register_extension("TOY", ".toy")
    assert is_image_name(path.name)
    assert is_image_name("PHOTO.TOY")
    for source in (path, path.read_bytes()):
        assert loaded(source).tolist() == [[[200, 100, 0]] * 3] * 2
    assert upright_size(path) == (3, 2)
    with pytest.raises(ImageError, match="cut off"):
        load_image(path.read_bytes()[:10])


def test_pillows_own_other_decoders_never_run(registry):
    eps = encoded(Image.new("RGB", (9, 9)), "EPS")
    assert not is_image_name("drawing.eps")
    with pytest.raises(ImageError, match="PostScript"):
        load_image(eps)


HEIC_HEAD = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def test_heic_is_read_where_pillow_heif_is_installed(registry, monkeypatch, tmp_path):
    class Heif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            if len(self.fp.read()) == len(HEIC_HEAD):
                raise SyntaxError("cut off")
            self._mode, self._size = "RGB", (2, 1)
            self.tile = [ImageFile._Tile("raw", (0, 0, 2, 1), len(HEIC_HEAD), ("RGB", 0, 1))]

    def register():
        Image.register_open("HEIF", Heif, lambda prefix: prefix[4:12] == b"ftypheic")

    path = tmp_path / "IMG_1.HEIC"
    path.write_bytes(HEIC_HEAD + bytes([9, 8, 7]) * 2)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
    assert not is_image_name("IMG_1.HEIC")
    with pytest.raises(ImageError, match="HEIC photo; pip install pillow-heif"):
        load_image(path)

    module = types.SimpleNamespace(register_heif_opener=register)
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    assert loaded(path).tolist() == [[[9, 8, 7]] * 2]
    assert upright_size(path) == (2, 1)
    assert is_image_name("IMG_1.HEIC")
    assert not is_image_name("._IMG_1.HEIC")
    with pytest.raises(ImageError, match="begins as a HEIC photo, and cannot be read"):
        load_image(HEIC_HEAD)


# --- Large metadata ---


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


LARGE = zlib.compress(bytes(1_100_000))


def exif_of(value):
    """An EXIF block of nothing but an orientation: 16 bits, or 32 for what does not fit."""
    kind, field = (3, struct.pack("<HH", value, 0)) if value < 65536 else (4, struct.pack("<I", value))
    entry = struct.pack("<HHI4s", 0x0112, kind, 1, field)
    return b"Exif\0\0II*\0\x08\0\0\0\1\0" + entry + bytes(4)


EXIF_OF_6 = chunk(b"eXIf", exif_of(6)[6:])
XMP_OF_6 = b"<x:xmpmeta tiff:Orientation='6'/><tiff:Orientation>6</tiff:Orientation>"


@pytest.mark.parametrize(
    ("before", "after", "turned"),
    [
        (chunk(b"iCCP", b"printer\0\0" + LARGE), b"", False),
        (chunk(b"zTXt", b"Comment\0\0" + LARGE), b"", False),
        (chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE), b"", False),
        (b"", chunk(b"zTXt", b"Comment\0\0" + LARGE), False),
        (
            chunk(b"iCCP", b"printer\0\0" + LARGE)
            + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP_OF_6),
            b"",
            True,
        ),
        (
            chunk(b"zTXt", b"Comment\0\0" + LARGE) + EXIF_OF_6,
            b"",
            True,
        ),
        (
            b"",
            chunk(b"zTXt", b"Comment\0\0" + LARGE) + EXIF_OF_6,
            True,
        ),
    ],
    ids=[
        "profile",
        "comment",
        "xmp",
        "at the end",
        "profile, turned by xmp",
        "turned by exif",
        "exif at the end",
    ],
)
def test_a_png_with_large_metadata(pixels, tmp_path, before, after, turned):
    body = encoded(Image.fromarray(pixels))
    path = tmp_path / "photo.png"
    path.write_bytes(body[:33] + before + body[33:-12] + after + body[-12:])
    expected = np.rot90(pixels, -1) if turned else pixels
    limits = Image.MAX_IMAGE_PIXELS, images.Image.MAX_IMAGE_PIXELS
    with ThreadPoolExecutor(4) as pool:
        for image in pool.map(load_image, [path] * 4):
            np.testing.assert_array_equal(np.asarray(image), expected)
            assert upright_size(path) == image.size
    assert limits == (Image.MAX_IMAGE_PIXELS, images.Image.MAX_IMAGE_PIXELS)


def test_a_png_with_large_metadata_that_is_damaged_all_the_same(pixels):
    body = encoded(Image.fromarray(pixels))
    with pytest.raises(ImageError, match="cut off"):
        load_image(body[:33] + chunk(b"iCCP", b"printer\0\0" + LARGE) + body[33:-30])
    thin = encoded(Image.new("RGB", (1, 500)))
    with pytest.raises(ImageError, match="too thin"):
        load_image(thin[:33] + chunk(b"iCCP", b"printer\0\0" + LARGE) + thin[33:])


# --- Kinds of TIFF ---


def tiff(*tags, pixels=b""):
    """A little-endian TIFF (6.0, section 2) of entries: tag, type (1, 3, 4: of 8, 16, 32 bits) and values."""
    entries, extra = b"", b""
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    size = {3: 2, 4: 4, 1: 1}
    length = sum(len(values) * size[type] for _, type, values in tags if len(values) * size[type] > 4)
    for tag, type, values in sorted((*tags, (273, 4, (start + length,)))):
        content = struct.pack(f"<{len(values)}{ {3: 'H', 4: 'I', 1: 'B'}[type] }", *values)
        if len(content) > 4:
            entries += struct.pack("<HHII", tag, type, len(values), start + len(extra))
            extra += content
        else:
            entries += struct.pack("<HHI4s", tag, type, len(values), content)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags) + 1) + entries + bytes(4) + extra + pixels


def rgb_tiff(width, height, bits, *more, pixels):
    return tiff(
        (256, 3, (width,)),
        (257, 3, (height,)),
        (258, 3, (bits,) * 3),
        (259, 3, (1,)),
        (262, 3, (2,)),
        (277, 3, (3,)),
        (278, 3, (height,)),
        (279, 4, (len(pixels),)),
        *more,
        pixels=pixels,
    )


def test_kinds_of_tiff(pixels):
    height, width, _ = pixels.shape
    np.testing.assert_array_equal(loaded(rgb_tiff(width, height, 8, pixels=pixels.tobytes())), pixels)
    wide = (pixels.astype("<u2") * 257).tobytes()
    np.testing.assert_array_equal(loaded(rgb_tiff(width, height, 16, pixels=wide)), pixels)
    floats = (pixels / 255).astype("<f4").tobytes()
    with pytest.raises(ImageError, match=r"a TIFF with 3 channels of 32 bits \(floats\), and cannot be read"):
        load_image(rgb_tiff(width, height, 32, (339, 3, (3, 3, 3)), pixels=floats))
    grey = Image.fromarray((pixels[..., 0] / 255).astype(np.float32))
    np.testing.assert_array_equal(loaded(encoded(grey, "TIFF"))[..., 1], pixels[..., 0])
    with pytest.raises(ImageError, match="divide by 255"):
        load_image(encoded(Image.fromarray(pixels[..., 0].astype(np.float32)), "TIFF"))


@pytest.mark.parametrize("tags", [[(50706, 1, (1, 4, 0, 0))], [(254, 4, (1,)), (330, 4, (8, 8))]])
def test_the_preview_of_a_raw_photo_is_not_taken_for_it(pixels, tags, tmp_path, registry):
    path = tmp_path / "photo.tif"
    path.write_bytes(rgb_tiff(9, 6, 8, *tags, pixels=pixels.tobytes()))
    with pytest.raises(ImageError, match="this is a raw photo"):
        load_image(path)
    assert upright_size(path) is None
    # Somebody who has registered an opener for them has them read.
    Image.register_open("RAW", lambda file, name: Image.new("RGB", (8, 8)))
    assert load_image(path).size == upright_size(path) == (8, 8)


# --- Memory and time ---


def in_a_child(code, *arguments):
    """What a process of its own prints, which may be given less memory."""
    begin = """
import resource, sys, warnings
from PIL import Image
Image.MAX_IMAGE_PIXELS = 1 << 30
from ssd.images import load_image, load_scaled
Image.init()
load_image(Image.new("RGBA", (9, 9), "red"))
"""
    start = [sys.executable, "-c", begin + code, *map(str, arguments)]
    done = subprocess.run(start, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def black_png(side, bits, channels, *before):
    """A square PNG of zeros, made row by row."""
    packer, row = zlib.compressobj(1), bytes(1 + side * bits * channels // 8)
    body = b"".join([packer.compress(row) for _ in range(side)]) + packer.flush()
    colour = {1: 0, 2: 4, 4: 6}[channels]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, 0))
    return PNG[:8] + header + b"".join(before) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's account of memory")
@pytest.mark.parametrize(("bits", "channels"), [(16, 1), (8, 2), (16, 4)])
def test_eight_bytes_of_memory_for_a_pixel(tmp_path, bits, channels):
    """Of images that lie on their side, for which twice as many were needed."""
    path = tmp_path / "large.png"
    path.write_bytes(black_png(4000, bits, channels, EXIF_OF_6))
    (grown,) = in_a_child(
        """
def most():
    with open("/proc/self/status") as file:  # getrusage counts what the parent process had, too
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))

warnings.simplefilter("ignore")
before = most()
assert load_image(sys.argv[1]).size == (4000, 4000)
print(most() - before)
""",
        path,
    )
    assert int(grown) < 10 * 4000**2


LIMITED = """
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's account of memory")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
def test_an_image_that_does_not_fit_into_memory_is_told_with_its_size(format, tmp_path):
    side = 9000 if format == "WEBP" else 13000
    path, large = (
        tmp_path / "large",
        Image.new("1" if format in ("PNG", "TIFF", "BMP", "PPM") else "L", (side, side)),
    )
    large.save(path, format, **({"quality": 1, "method": 0} if format == "WEBP" else {}))
    lines = in_a_child(
        LIMITED
        + """
for source in (sys.argv[1], open(sys.argv[1], "rb").read()):
    try:
        load_image(source, name="large", max_pixels=1 << 40)
    except MemoryError as error:
        print(type(error).__name__, error)
print(load_image(Image.new("RGB", (9, 8))).size)
print(load_scaled(sys.argv[1], 300)[0].size if sys.argv[2] == "JPEG" else None)
""",
        path,
        format,
    )
    wanted = rf"ImageMemoryError large: there is not enough memory for its {side}x{side} pixels, which may"
    assert re.match(wanted, lines[0])
    assert ("ssd detect --no-images --scaled-decoding" in lines[0]) == (format == "JPEG")
    assert lines[1:] == [lines[0], "(9, 8)", "(1625, 1625)" if format == "JPEG" else "None"]


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"save_all": True}, {"xmp": b"<a/>"}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_webp_of_too_many_pixels_is_refused_before_it_is_opened(monkeypatch, mode, options):
    """Pillow takes memory for all pixels when it opens one."""
    frames = [Image.new(mode, (300, 20), color) for color in ("red", "blue")]
    body = encoded(
        frames[0], "WEBP", **options, **({"append_images": frames[1:]} if "save_all" in options else {})
    )
    assert load_image(body, max_pixels=6000).size == (300, 20)
    monkeypatch.setitem(
        Image.OPEN, "WEBP", (lambda *arguments: pytest.fail("was opened"), lambda prefix: True)
    )
    with pytest.raises(ImageError, match="300x20 is more than 5,999 pixels"):
        load_image(body, max_pixels=5999)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError("out of memory error when reading image file"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
@pytest.mark.parametrize("method", ["load", "transpose", "crop"])
def test_each_word_for_a_lack_of_memory(pixels, monkeypatch, error, method):
    exif = Image.Exif()
    exif[0x0112] = 6
    body = encoded(Image.fromarray(pixels), exif=exif)

    def fails(*arguments):
        raise error

    monkeypatch.setattr(rgb, "_BAND", 20)
    monkeypatch.setattr(ImageFile.ImageFile if method == "load" else Image.Image, method, fails)
    with pytest.raises(
        ImageMemoryError, match=r"^photo: there is not enough memory for its (9x6|6x9) pixels"
    ):
        load_image(body, name="photo")


def test_what_a_disk_says_names_the_image(pixels, monkeypatch):
    def fails(image):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fails)
    with pytest.raises(OSError, match=r"Input/output error: 'photo'") as caught:
        load_image(encoded(Image.fromarray(pixels)), name="photo")
    assert not isinstance(caught.value, ImageError)


def progressive(side, scans):
    """A grey JPEG, of which the last scan is repeated: some bytes that go over all pixels."""
    body = encoded(Image.new("L", (side, side), 90), "JPEG", progressive=True)
    last = body[body.rindex(b"\xff\xda") : -2]
    return body[:-2] + last * (scans - body.count(b"\xff\xda")) + b"\xff\xd9"


def test_a_jpeg_of_very_many_scans_is_refused():
    most = 64 * 64 * 2
    assert load_image(progressive(64, 200), max_pixels=most).size == (64, 64)
    assert load_image(progressive(64, 201)).size == (64, 64)
    with pytest.raises(ImageError, match=r"^photo: a JPEG of 201 scans, .* 64x64 pixels; up to 200 are read"):
        load_image(progressive(64, 201), name="photo", max_pixels=most)
    # What only looks like scans: in a block of the camera's, or a film behind the image.
    body, scan = progressive(64, 200), b"\xff\xda\x00\x02"
    assert load_image(body + scan * 9, max_pixels=most).size == (64, 64)
    noted = body[:2] + b"\xff\xe5\x00\x0a" + scan * 2 + body[2:]
    assert load_image(noted, max_pixels=most).size == (64, 64)


def test_the_size_of_a_png_needs_none_of_its_pixels(pixels, tmp_path, monkeypatch):
    body = encoded(Image.fromarray(pixels))
    for number, notes in enumerate((EXIF_OF_6, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP_OF_6))):
        (tmp_path / f"{number}.png").write_bytes(body[:-12] + notes + body[-12:])
    (tmp_path / "2.png").write_bytes(body[:33] + chunk(b"tEXt", b"Software\0ours") + body[33:])
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert [upright_size(tmp_path / f"{number}.png") for number in range(3)] == [(6, 9), (6, 9), (9, 6)]
    assert [images.is_turned(tmp_path / f"{number}.png") for number in range(3)] == [True, True, False]


@pytest.mark.filterwarnings("error")
def test_warnings_of_pillow_neither_hide_an_image_nor_come_out(pixels, tmp_path, monkeypatch):
    body = encoded(Image.fromarray(pixels))
    path = tmp_path / "photo.png"
    path.write_bytes(body[:33] + chunk(b"acTL", bytes(8)) + body[33:])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # of which Pillow warns
    np.testing.assert_array_equal(
        loaded(encoded(Image.fromarray(pixels[..., 0]), "GIF"))[..., 1], pixels[..., 0]
    )
    before = list(warnings.filters)
    with pytest.raises(UserWarning, match="Invalid APNG"):
        Image.open(path)
    with ThreadPoolExecutor(4) as pool:
        assert all(np.array_equal(each, pixels) for each in pool.map(loaded, [path] * 20))
    assert upright_size(path) == (9, 6)
    assert warnings.filters == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_without_an_end_is_given_up(pixels, tmp_path, monkeypatch):
    pipe, body = tmp_path / "pipe", encoded(Image.fromarray(pixels), "BMP")
    os.mkfifo(pipe)
    monkeypatch.setattr(images, "MAX_BYTES", 1000)

    def write(length):
        with suppress(BrokenPipeError), pipe.open("wb", buffering=0) as file:
            for _ in range(length):
                file.write(bytes(100))

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write, 100_000)
        with pytest.raises(ImageError, match=r"pipe: gives more than .*; write it to a file"):
            load_image(pipe)
        writing.result(60)
        writing = pool.submit(pipe.write_bytes, body)
        np.testing.assert_array_equal(loaded(pipe), pixels)
        writing.result(60)


# --- Sizes from headers ---


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "AVIF"]),
    st.one_of(st.integers(0, 10), st.sampled_from([90, 255, 32768, 65535, 65536, 65537, 2**32 - 1])),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_the_size_in_a_header_is_that_of_the_image(tmp_path_factory, format, orientation, size):
    path = tmp_path_factory.getbasetemp() / f"photo.{format.lower()}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Pillow's writers turn some values into their format's own; the block says what cameras write.
    given = exif if format in ("TIFF", "AVIF") and 1 <= orientation <= 8 else exif_of(orientation)
    options = {} if format in ("TIFF", "AVIF") and not 1 <= orientation <= 8 else {"exif": given}
    Image.new("RGB", size, "red").save(path, format, **options)
    image = load_image(path)
    assert image.size == (size[::-1] if 5 <= orientation <= 8 else size)
    assert upright_size(path) == image.size
    assert load_scaled(path, 4)[1] == image.size


@pytest.mark.parametrize("orientation", [0, 9, 90, 255, 65535, 65537, 65542])
def test_an_orientation_that_is_none_says_nothing(pixels, orientation):
    for format in ("PNG", "WEBP"):
        body = encoded(Image.fromarray(pixels), format, exif=exif_of(orientation), lossless=True)
        np.testing.assert_array_equal(loaded(body), pixels)
        np.testing.assert_array_equal(loaded(Image.open(io.BytesIO(body))), pixels)
    photo = Image.fromarray(np.kron(pixels, np.ones((80, 80, 1), np.uint8)))
    small, size = load_scaled(encoded(photo, "JPEG", exif=exif_of(orientation)), 100)
    assert small.size == (180, 120)
    assert size == (720, 480)


@pytest.mark.parametrize("suffix", [".jfif", ".JFIF", ".jif", ".jpe", ".JPG", ".pjpeg", ".dib", ".apng"])
def test_suffixes_of_photos(suffix):
    assert is_image_name(f"photo{suffix}")
    assert not is_image_name(f"._photo{suffix}")


# --- URLs ---


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x.org/a.jpg"])
def test_only_http_is_opened(url):
    with pytest.raises(ImageError, match="only http and https"):
        load_image(url)


def test_an_rtsp_stream_is_told_what_takes_it():
    with pytest.raises(
        ImageError, match=r"^rtsp://camera/stream: an .* detector\.stream\(\.\.\.\) and ssd"
    ) as told:
        load_image("rtsp://me:secret@camera/stream")
    assert "secret" not in str(told.value)


@pytest.mark.parametrize("url", ["http://a..b/a.jpg", f"http://{'x' * 70}/a.jpg", "http://[x/a.jpg"])
def test_malformed_addresses(url):
    with pytest.raises(ImageError):
        load_image(url)


def test_a_malformed_redirect(server):
    with pytest.raises(ImageError, match="malformed|not allowed|not http"):
        load_image(server.serve("/moved", b"", status=302, headers={"Location": "http://[x"}))


def test_urls_with_letters_of_any_script(server, pixels):
    server.serve("/%C3%BC%20%E5%9B%BE.png?q=%C3%BC", encoded(Image.fromarray(pixels)), kind="image/png")
    np.testing.assert_array_equal(loaded(server.url("/ü 图.png?q=ü")), pixels)


def test_an_impossible_path():
    with pytest.raises(ImageError, match="no possible path"):
        load_image("a\0b.jpg")


def test_answers_that_are_no_image(server):
    with pytest.raises(ImageError, match="sent a web page"):
        load_image(server.serve("/page", b"<html>", kind="text/html"))
    with pytest.raises(ImageError, match="is a web page"):
        load_image(server.serve("/typeless", b"<html>"))
    with pytest.raises(ImageError, match="404"):
        load_image(server.url("/gone.jpg"))


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://localhost/a.jpg"])
def test_redirects_to_elsewhere_are_refused(server, target):
    with pytest.raises(ImageError, match="not allowed|not http"):
        load_image(server.serve("/moved", b"", status=302, headers={"Location": target}))


def test_redirects_within_the_web_are_followed(server, pixels):
    server.serve("/a.png", encoded(Image.fromarray(pixels)), kind="image/png")
    url = server.serve("/moved", b"", status=302, headers={"Location": server.url("/a.png")})
    np.testing.assert_array_equal(loaded(url), pixels)


def test_a_short_answer_is_refused(server, pixels):
    body = encoded(Image.fromarray(pixels))
    with pytest.raises(ImageError, match="early|IncompleteRead|more expected"):
        load_image(server.serve("/short.png", body[:-20], kind="image/png", length=len(body)))


def test_an_endless_answer_is_cut(server, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 1 << 20)

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        while not server.closing.is_set():
            handler.wfile.write(b"\0" * 65536)

    server.pages["/a.jpg"] = endless
    with pytest.raises(ImageError, match="more than 1 MiB"):
        load_image(server.url("/a.jpg"))


def test_a_stalling_server_is_given_up(server, monkeypatch):
    monkeypatch.setattr(web, "TIMEOUT", 0.2)
    server.pages["/a.jpg"] = lambda _: server.closing.wait(30)
    with pytest.raises(ImageError, match="stopped answering|timed out"):
        load_image(server.url("/a.jpg"))


# --- Scaled decoding ---


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpegs_are_read_small_and_keep_their_size(tmp_path, orientation):
    image = Image.fromarray(skimage.data.coffee()).resize((1800, 1200))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "large.jpg", quality=95, exif=exif)
    whole = load_image(tmp_path / "large.jpg")
    small, size = load_scaled(tmp_path / "large.jpg", 300)
    assert size == whole.size == ((1800, 1200) if orientation == 1 else (1200, 1800))
    assert small.size == tuple(side // 4 for side in size)
    difference = np.abs(np.asarray(whole.resize(small.size, Image.Resampling.BOX), float) - np.asarray(small))
    assert difference.mean() < 2


def test_small_images_and_other_formats_are_read_whole(tmp_path):
    image = Image.fromarray(skimage.data.coffee())  # 600 x 400
    for name in ("photo.jpg", "photo.png"):
        image.resize((599, 400) if name.endswith("jpg") else (2400, 1600)).save(tmp_path / name)
        small, size = load_scaled(tmp_path / name, 300)
        assert small.size == size
        assert np.array_equal(np.asarray(small), np.asarray(load_image(tmp_path / name)))


def test_files_that_are_open_otherwise_are_told_as_that(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)
    with path.open(encoding="utf-8") as file, pytest.raises(ImageError, match="open files with mode 'rb'"):
        load_image(file)
    with path.open("ab") as file, pytest.raises(ImageError, match="open files with mode 'rb'"):
        load_image(file)
    with Image.open(path) as image:
        pass
    with pytest.raises(ImageError, match=r"its file was closed .* image\.load\(\)"):
        load_image(image)
    with pytest.raises(ImageError, match="an empty path"):
        load_image("")
