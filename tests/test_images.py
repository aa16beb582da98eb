import io
import struct
import zlib

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from ssd import images, web
from ssd.errors import ImageError
from ssd.images import load_image, load_scaled


@pytest.fixture
def pixels():
    """A picture that is not symmetric in any way: uint8 [6, 9, 3]."""
    return np.random.RandomState(0).randint(0, 256, (6, 9, 3), np.uint8)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def loaded(source):
    image = load_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


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
        Image.open(path),
        Image.fromarray(pixels),
        pixels,
        pixels / 255,
        (pixels / 255).astype(np.float32),
        pixels.astype(np.uint16) * 257,
        pixels[:, ::-1][:, ::-1],
        chw,
        chw / 255,
        (chw / 255).requires_grad_(),
    ):
        np.testing.assert_array_equal(loaded(source), pixels)


def test_half_precision_tensors(pixels):
    source = (torch.from_numpy(pixels).permute(2, 0, 1) / 255).half()
    np.testing.assert_allclose(loaded(source).astype(int), pixels, atol=1)


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


# --- Modes ---


def test_grey_is_three_equal_channels_in_the_right_orientation(pixels):
    grey = pixels[:, :, 0]
    expected = np.stack([grey] * 3, axis=-1)
    for source in (
        grey,
        grey[..., None],
        Image.fromarray(grey),
        encoded(Image.fromarray(grey)),
        torch.from_numpy(grey),
        torch.from_numpy(grey)[None],
    ):
        np.testing.assert_array_equal(loaded(source), expected)


def test_sixteen_bits_are_scaled_and_not_clipped():
    wide = np.array([[0, 257, 32768, 65535]], np.uint16)
    expected = [0, 1, 128, 255]
    png = encoded(Image.fromarray(wide))
    big_endian = Image.frombytes("I;16B", (4, 1), wide.astype(">u2").tobytes())
    for source in (wide, png, Image.fromarray(wide), Image.fromarray(wide.astype(np.int32)), big_endian):
        assert loaded(source)[0, :, 0].tolist() == expected
        assert loaded(source).shape == (1, 4, 3)


def test_transparency_is_laid_over_white():
    rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], np.uint8)
    expected = [[200, 100, 0], [255, 255, 255], [244, 224, 204]]
    for source in (rgba, encoded(Image.fromarray(rgba)), torch.from_numpy(rgba).permute(2, 0, 1), rgba / 255):
        np.testing.assert_allclose(loaded(source)[0], expected, atol=1)
    la = Image.fromarray(np.array([[[100, 255], [100, 0]]], np.uint8))
    assert la.mode == "LA"
    for source in (la, encoded(la)):
        assert loaded(source)[0].tolist() == [[100] * 3, [255] * 3]


def test_palettes():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putpixel((1, 0), 1)
    assert loaded(encoded(image))[0].tolist() == [[10, 20, 30], [200, 100, 0]]
    assert loaded(encoded(image, transparency=1))[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_transparent_colour_of_an_rgb_png():
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert loaded(encoded(image, transparency=(4, 5, 6)))[0].tolist() == [[1, 2, 3], [255, 255, 255]]


def test_cmyk_and_one_bit():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(loaded(encoded(red, "JPEG"))[4, 4].astype(int) - [255, 0, 0]).max() < 8
    assert loaded(encoded(Image.new("1", (2, 2), 1))).min() == 255


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
    from concurrent.futures import ThreadPoolExecutor

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
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image"),
        (b"nothing", "not an image"),
        (b"\xff\xd8\xff\xe0", "damaged"),
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


def test_one_pixel_is_an_image():
    assert loaded(np.zeros((1, 1, 3), np.uint8)).shape == (1, 1, 3)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 3, 4, 3), np.uint8), "one image at a time"),
        (np.zeros((4, 4, 2), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.full((2, 2, 3), 255.0), r"\[0, 1\]"),
        (np.full((2, 2, 3), np.nan), r"\[0, 1\]"),
        (np.full((2, 2, 3), -0.1), r"\[0, 1\]"),
        (np.zeros((2, 2, 3), np.int64), "int64"),
        (np.zeros((2, 2, 3), complex), "complex"),
        (torch.zeros(2, 2, 3), r"\[C, H, W\]"),
        (torch.zeros(1, 3, 2, 2), "one image at a time"),
        (torch.zeros(3, 2, 2, device="meta"), "uint8 or floats"),
        (torch.zeros(3, 2, 2).to_sparse(), "uint8 or floats"),
        (np.zeros((2, 2, 3), object), "object"),
    ],
)
def test_refused_arrays(array, reason):
    with pytest.raises(ImageError, match=reason):
        load_image(array)


# --- URLs ---


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x.org/a.jpg", "data:image/png;base64,AAAA"])
def test_only_http_is_opened(url):
    with pytest.raises(ImageError, match="only http and https"):
        load_image(url)


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
