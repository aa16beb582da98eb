"""The page of `ssd export --html`, in Chromium without a network; and how its runtime is fetched."""

import hashlib
import io
import json
import os
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_LAYOUT, made_model
from PIL import ExifTags, Image

from ssd import browser, checkpoint, pretrained
from ssd.browser import RUNTIME_FILES, runtime_files, write_page
from ssd.detector import Detector
from ssd.errors import DownloadError

NAMES = ("cat", "<b>cup</b></script>", "Bär")
CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
RUNTIME = Path(
    os.environ.get("ONNXRUNTIME_WEB", Path(__file__).parents[1] / "node_modules" / "onnxruntime-web")
)
LOW = 0.2


# --- The runtime ---


def packed(contents):
    """An npm package."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(f"package/dist/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def test_the_runtime_is_fetched_once_and_has_its_digest(server, monkeypatch):
    contents = {name: name.encode() for name in RUNTIME_FILES}
    package = packed(contents)
    url = server.serve("/onnxruntime-web-1.30.0.tgz", package)
    monkeypatch.setattr(browser, "RUNTIME_URL", url)
    monkeypatch.setattr(browser, "RUNTIME_SHA256", hashlib.sha256(package).hexdigest())
    for _ in range(2):
        assert runtime_files() == tuple(contents.values())
    assert len(server.requests) == 1
    shutil.rmtree(pretrained.cache_dir())
    server.serve("/onnxruntime-web-1.30.0.tgz", package + b"\0")
    with pytest.raises(DownloadError):
        runtime_files()


def test_the_address_is_of_the_public_registry():
    assert browser.RUNTIME_URL.startswith("https://registry.npmjs.org/onnxruntime-web/-/")


@pytest.mark.parametrize("place", [".", "dist", "package/dist"])
def test_the_runtime_of_a_folder(tmp_path, monkeypatch, place):
    contents = {name: name.encode() for name in RUNTIME_FILES}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(browser, "RUNTIME_FILES", digests)
    with pytest.raises(FileNotFoundError, match=r"npm pack onnxruntime-web@1\.30\.0"):
        runtime_files(tmp_path)
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (tmp_path / place / name).write_bytes(content)
    assert runtime_files(tmp_path) == tuple(contents.values())
    (tmp_path / place / name).write_bytes(b"other")
    with pytest.raises(DownloadError, match=r"is not the file of onnxruntime-web 1\.30\.0"):
        runtime_files(tmp_path)


# --- The page ---


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    state = made_model(layout=SMALL_LAYOUT).state_dict()
    checkpoint.save(path, state, NAMES, layout=SMALL_LAYOUT, score_thresholds=(0.3, 0.2, 0.4))
    return path


@pytest.fixture(scope="module")
def page(weights, tiny_exported, tmp_path_factory):
    """Around an ONNX file that other tests use, too: exporting takes long."""
    if not all((RUNTIME / "dist" / name).is_file() for name in RUNTIME_FILES):
        pytest.skip(f"no npm package onnxruntime-web in {RUNTIME}; ONNXRUNTIME_WEB may say where it is")
    from conftest import with_metadata

    changes = {"class_names": NAMES, "score_thresholds": [0.3, 0.2, 0.4]}

    def export(_, path, **choices):
        assert choices == {"nms": True, "uint8": True, "precision": "fp32"}
        return with_metadata(tiny_exported["onnx nms"], path, changes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(browser, "export", export)
        return write_page(weights, tmp_path_factory.mktemp("page") / "page.html", runtime=RUNTIME)


@pytest.fixture(scope="module")
def chromium():
    """Chromium that reaches nothing but files."""
    webdriver = pytest.importorskip("selenium.webdriver")
    for path in (CHROMIUM, DRIVER):
        if not os.path.exists(path):
            pytest.skip(f"no {path}")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for each in (
        *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"),
        *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ):
        options.add_argument(each)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def loaded(chromium, page):
    chromium.get(page.as_uri())
    wait(chromium, "document.getElementById('status').textContent === 'Ready.'")
    return chromium


@pytest.fixture
def opened(loaded):
    """The page, with nothing on it; opening it anew takes long."""
    for each in loaded.find_elements("css selector", "figure button"):
        each.click()
    yield loaded
    assert [entry["message"] for entry in loaded.get_log("browser")] == []


def wait(driver, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 60, 0.1).until(lambda each: each.execute_script(f"return {condition}"))


def detect(driver, paths):
    """What the page finds in files, or why not."""
    driver.find_element("id", "photos").send_keys("\n".join(map(str, paths)))
    wait(driver, f"document.querySelectorAll('[data-found],[data-error]').length === {len(paths)}")
    figures = driver.find_elements("css selector", "figure")[::-1]  # the last is on top
    return [
        json.loads(each.get_attribute("data-found") or "null") or each.get_attribute("data-error")
        for each in figures
    ]


def noise(width, height, channels=3):
    small = np.random.default_rng(width).integers(0, 256, (9, 7, channels), np.uint8)
    return Image.fromarray(small if channels > 1 else small[..., 0]).resize((width, height))


def test_same_as_the_detector(opened, weights, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    noise(1800, 1201).save(tmp_path / "large.png")
    noise(40, 30).save(tmp_path / "small.png")
    noise(200, 611).save(tmp_path / "portrait.webp", lossless=True)
    noise(161, 90).save(tmp_path / "turned.jpg", exif=exif, quality=95, subsampling=0)
    noise(160, 91).save(tmp_path / "photo.jpg")
    noise(90, 160, 1).save(tmp_path / "grey.png")
    noise(90, 160, 4).save(tmp_path / "rgba.png")
    noise(90, 160).quantize(200).save(tmp_path / "palette.gif")
    paths = sorted(tmp_path.glob("*.*"))
    detector = Detector.load(weights, "cpu", "fp32")
    total = 0
    for found, path in zip(detect(opened, paths), paths, strict=True):
        expected = detector(path, score_threshold=0.05, max_detections=200)
        assert (found["height"], found["width"]) == expected.image_size
        ours = [each for each in found["detections"] if each["score"] > LOW]
        theirs = expected[expected.scores > LOW]
        assert [each["class_id"] for each in ours] == theirs.class_ids.tolist(), path
        scores, boxes = ([each[key] for each in ours] for key in ("score", "box"))
        np.testing.assert_allclose(scores, theirs.scores, atol=1e-3)
        np.testing.assert_allclose(boxes, theirs.boxes, atol=2e-3 * max(expected.image_size))
        total += len(ours)
    assert total > 40


def test_the_page_proves_itself(opened):
    opened.find_element("id", "check").click()
    wait(opened, "document.getElementById('proof').dataset.wrong !== undefined")
    assert opened.find_element("id", "proof").text.startswith("Proved; ")
    opened.execute_script("about.check.detections[0].score -= 0.1; delete find('proof').dataset.wrong")
    opened.find_element("id", "check").click()
    wait(opened, "document.getElementById('proof').dataset.wrong !== undefined")
    opened.execute_script("about.check.detections[0].score += 0.1")
    assert opened.find_element("id", "proof").text.startswith("NOT PROVED: 2 differ; ")


def test_threshold_and_names(opened, tmp_path):
    """Names are text, whatever is in them; the slider and the box work by keys."""
    noise(120, 90).save(tmp_path / "photo.png")
    [found] = detect(opened, [tmp_path / "photo.png"])
    slider = opened.find_element("id", "threshold")
    assert slider.get_attribute("min") == "0.05"

    def shown():
        return [each.text for each in opened.find_elements("css selector", "figure li")]

    def above(*limits):
        return [
            f"{NAMES[each['class_id']]} {each['score']:.2f}"
            for each in found["detections"]
            if each["score"] > limits[each["class_id"]]
        ]

    assert shown() == above(0.4, 0.4, 0.4)
    slider.send_keys("\ue011")  # Home
    assert shown() == above(0.05, 0.05, 0.05)
    assert any("<b>cup</b>" in each for each in shown())
    calibrated = opened.find_element("id", "calibrated")
    calibrated.send_keys(" ")
    assert shown() == above(0.3, 0.2, 0.4)
    calibrated.send_keys(" ")
    assert opened.find_element("css selector", "canvas").get_attribute("aria-label").startswith("photo.png")
    opened.find_element("css selector", "figure button").send_keys("\n")
    assert opened.find_elements("css selector", "figure") == []


def test_what_is_no_photo_is_told(opened, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (900, 5)).save(tmp_path / "thin.png")
    text, thin = detect(opened, [tmp_path / "text.png", tmp_path / "thin.png"])
    assert text == "this browser cannot read it as an image"
    assert thin == "900x5 is too thin to be seen in a square"


def test_the_camera(opened):
    button = opened.find_element("id", "camera")
    button.click()
    wait(opened, "document.querySelector('figure[data-found]') !== null")
    assert button.get_attribute("aria-pressed") == "true"
    assert opened.find_element("css selector", "figcaption").text.startswith("Camera: ")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"


def test_a_camera_that_fails_is_told_and_closed(opened):
    button = opened.find_element("id", "camera")
    opened.execute_script(
        "window.tracks = [];"
        "const real = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);"
        "navigator.mediaDevices.getUserMedia = async (what) => {"
        "  const stream = await real(what); tracks.push(...stream.getTracks()); return stream; };"
        "HTMLVideoElement.prototype.play = async () => { throw new Error('no picture'); };"
    )
    button.click()
    wait(opened, "document.getElementById('status').textContent === 'Camera: no picture.'")
    assert button.get_attribute("aria-pressed") == "false"
    assert opened.find_elements("css selector", "figure") == []
    wait(opened, "tracks.length === 1 && tracks.every((track) => track.readyState === 'ended')")


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_screen(opened, width, tmp_path):
    noise(900, 300).save(tmp_path / "wide.png")
    opened.set_window_size(width, 800)
    detect(opened, [tmp_path / "wide.png"])
    assert opened.execute_script(
        "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    for each in opened.find_elements("css selector", "button, input"):
        assert each.accessible_name, each.get_attribute("id")
