"""The page in a real browser: Chromium, where it and its driver are installed."""

import base64
import csv
import io
import json
import re
import shutil
from fractions import Fraction

import numpy as np
import pytest
from made_films import drawn, write_film
from serving import serving

from ssd.detector import Detector
from ssd.serve.app import PAGE
from ssd.shapes import CLASSES, draw_scene

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SOON = 60

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium or its driver is not installed")


@pytest.fixture(scope="module")
def detector():
    return Detector.load("shapes", precision="fp32")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for seed in (45, 7):
        draw_scene(np.random.default_rng(seed))[0].save(folder / f'scene {seed}, "{seed}".png')
    return sorted(folder.iterdir(), reverse=True)


@pytest.fixture(scope="module")
def address(detector):
    with serving(detector, model="shapes") as found:
        yield found


@pytest.fixture(scope="module")
def chromium():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"),
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    try:
        driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    except WebDriverException as error:
        pytest.skip(f"Chromium does not start: {error.msg}")
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium, address):
    """The page, open and ready."""
    chromium.get(address)
    soon(chromium, lambda: by_id(chromium, "model").text)
    return chromium


def by_id(page, name):
    return page.find_element(By.ID, name)


def soon(page, condition):
    return WebDriverWait(page, SOON, 0.05).until(lambda _: condition())


def upload(page, paths, entries):
    by_id(page, "files").send_keys("\n".join(map(str, paths)))
    soon(page, lambda: page.execute_script("return entries.filter((each) => each.result).length") == entries)
    soon(page, lambda: page.find_elements(By.CSS_SELECTOR, "#objects tr"))


def rows(page):
    script = "return [...document.querySelectorAll('#objects tr')].map((row) => row.firstChild.textContent)"
    return page.execute_script(script)


def names(detector, path, least, without=()):
    found = detector(path, score_threshold=0.05, max_detections=200)
    return [each.name for each in found if each.score >= least and each.name not in without]


def test_photos_slider_and_classes(page, detector, scenes):
    upload(page, scenes, 2)
    assert rows(page) == names(detector, scenes[0], 0.4)
    assert by_id(page, "status").text.startswith(f"{scenes[0].name}: ")
    assert by_id(page, "canvas").get_attribute("aria-label") == by_id(page, "status").text
    slider = by_id(page, "threshold")
    slider.send_keys(Keys.HOME)
    assert rows(page) == names(detector, scenes[0], 0.05)
    slider.send_keys(Keys.ARROW_RIGHT * 85)
    assert by_id(page, "least").text == "90 %"
    assert rows(page) == names(detector, scenes[0], 0.9)
    first = page.find_element(By.CSS_SELECTOR, "#classes input")
    first.send_keys(Keys.SPACE)
    assert rows(page) == names(detector, scenes[0], 0.9, first.get_attribute("value"))
    by_id(page, "none").click()
    assert rows(page) == []
    assert by_id(page, "status").text.endswith(": no objects")
    by_id(page, "all").click()
    by_id(page, "next").click()
    soon(page, lambda: rows(page) == names(detector, scenes[1], 0.9))
    by_id(page, "clear").click()
    assert by_id(page, "hint").is_displayed()
    assert not by_id(page, "canvas").is_displayed()


def test_boxes_are_drawn_where_the_objects_are(page, detector, scenes):
    """Most of the left edge of the best object's box has the colour of its class; labels may cover some."""
    upload(page, scenes[:1], 1)
    found = detector(scenes[0])
    best = found[0]
    color, pixels = page.execute_script(
        "const [left, top, right, bottom] = arguments[0], by = $('canvas').width / arguments[1];"
        "const at = (part) => [by * left, by * (top + part * (bottom - top))].map(Math.round);"
        "const pen = $('canvas').getContext('2d');"
        "return [colorOf(arguments[2]), Array.from({length: 20}, (_, i) =>"
        "  [...pen.getImageData(...at((i + 0.5) / 20), 1, 1).data])]",
        best.box, found.image_size[1], best.name,
    )  # fmt: skip
    assert sum("#" + bytes(pixel[:3]).hex() == color for pixel in pixels) > 10


def test_results_as_files(page, detector, scenes, tmp_path):
    page.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    upload(page, scenes, 2)
    expected = [detector(each, score_threshold=0.4) for each in scenes]
    texts = {}
    for kind, name in (
        ("json", "detections.json"),
        ("coco", "detections-coco.json"),
        ("csv", "detections.csv"),
    ):
        Select(by_id(page, "format")).select_by_value(kind)
        by_id(page, "download").click()
        soon(page, lambda file=tmp_path / name: file.exists() and file.stat().st_size)  # it begins empty
        texts[kind] = (tmp_path / name).read_text()
    listed = json.loads(texts["json"])["results"]
    assert [each["source"] for each in listed] == [each.name for each in scenes]
    for mine, theirs in zip(listed, (each.to_dict() for each in expected), strict=True):
        assert [each["name"] for each in mine["detections"]] == [
            each["name"] for each in theirs["detections"]
        ]
        for one, other in zip(mine["detections"], theirs["detections"], strict=True):
            assert [*one["box"], one["score"]] == pytest.approx([*other["box"], other["score"]], abs=0.1)
    coco = json.loads(texts["coco"])
    assert [each["name"] for each in coco["categories"]] == list(CLASSES)
    entries = [each for i, found in enumerate(expected) for each in found.to_coco(i + 1)]
    assert [(each["image_id"], each["category_id"]) for each in coco["annotations"]] == [
        (each["image_id"], each["category_id"]) for each in entries
    ]
    for one, other in zip(coco["annotations"], entries, strict=True):
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.1)
    table = list(csv.reader(io.StringIO(texts["csv"])))
    lines = "".join(each.to_csv(header=not i) for i, each in enumerate(expected))
    written = list(csv.reader(io.StringIO(lines)))
    assert table[0] == written[0]
    assert [row[1:3] for row in table] == [row[1:3] for row in written]
    assert {row[0] for row in table[1:]} == {each.name for each in scenes}


def test_a_picture_is_pasted_and_dropped(page, detector, scenes):
    page.execute_script(
        "const bytes = Uint8Array.from(atob(arguments[0]), (each) => each.charCodeAt(0));"
        "for (const kind of ['paste', 'drop']) {"
        "  const data = new DataTransfer();"
        "  data.items.add(new File([bytes], kind + '.png', {type: 'image/png'}));"
        "  const made = kind === 'drop' ? new DragEvent(kind, {dataTransfer: data, bubbles: true})"
        "    : new ClipboardEvent(kind, {clipboardData: data, bubbles: true});"
        "  document.body.dispatchEvent(made);"
        "}",
        base64.b64encode(scenes[0].read_bytes()).decode(),
    )
    soon(page, lambda: page.execute_script("return entries.filter((each) => each.result).length") == 2)
    titles = page.execute_script("return entries.map((each) => each.name)")
    assert titles == ["paste.png", "drop.png"]
    soon(page, lambda: rows(page) == names(detector, scenes[0], 0.4))


def test_a_film(page, tmp_path):
    path = tmp_path / "clip.webm"
    frames = [drawn(number, (320, 240)) for number in range(30)]
    try:
        write_film(path, frames, [Fraction(i, 25) for i in range(30)], codec="libvpx", pixels="yuv420p")
    except ValueError as error:
        pytest.skip(f"this FFmpeg writes no VP8: {error}")
    by_id(page, "files").send_keys(str(path))
    soon(page, lambda: page.execute_script("return entries.filter((each) => each.result).length") == 3)
    assert page.execute_script("return entries.map((each) => each.time)") == [0, 0.5, 1]
    assert page.execute_script("return entries[2].result.width") == 320
    text = page.execute_script("return WRITERS.csv(results())")
    assert text.splitlines()[0].endswith(",bottom,time")


def test_a_busy_server_is_asked_again_but_not_forever(page, scenes):
    page.execute_script(
        "window.asked = 0;"
        'window.fetch = async () => (asked++, new Response(\'{"error": "too much"}\','
        "  {status: 503, headers: {'Retry-After': '0.01'}}))"
    )
    by_id(page, "files").send_keys(str(scenes[0]))
    soon(page, lambda: by_id(page, "status").text == "too much")
    assert page.execute_script("return asked") == 10


def test_the_camera(page):
    by_id(page, "camera").click()
    soon(page, lambda: page.execute_script("return entries.length === 1 && Boolean(entries[0].result)"))
    assert by_id(page, "camera").text == "Stop camera"
    assert by_id(page, "canvas").is_displayed()
    by_id(page, "camera").click()
    assert by_id(page, "camera").text == "Camera"
    assert page.execute_script("return live === null")


def test_what_cannot_be_read_is_told(page, scenes, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    by_id(page, "files").send_keys(f"{bad}\n{scenes[0]}")
    soon(page, lambda: page.execute_script("return entries.every((each) => each.result || each.error)"))
    soon(page, lambda: "bad" in by_id(page, "status").get_attribute("class"))
    assert by_id(page, "status").text.startswith("bad.png: this is a text file")
    assert page.execute_script("return results().length") == 1


def test_nothing_leaves_the_server(page, address, scenes, server):
    page.get_log("performance")
    page.get(address)
    soon(page, lambda: by_id(page, "model").text)
    upload(page, scenes[:1], 1)
    messages = [json.loads(each["message"])["message"] for each in page.get_log("performance")]
    urls = [
        each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"
    ]
    assert {f"{address}/", f"{address}/info"} < set(urls)
    assert all(url.startswith((f"{address}/", "blob:", "data:")) for url in urls)
    page.set_script_timeout(SOON)
    blocked = page.execute_async_script(
        "const go = arguments[1];"
        "fetch(arguments[0], {mode: 'no-cors'}).then(() => go(false), () => go(true))",
        server.serve("/secret", b""),
    )
    assert blocked
    assert server.requests == []
    assert page.execute_script(
        "const script = document.createElement('script'); script.textContent = 'window.ran = 1';"
        "document.body.append(script); return window.ran === undefined"
    )


def test_a_token_is_asked_for(chromium, detector, scenes):
    with serving(detector, token="Öffne dich ✓") as address:
        chromium.get(address)
        soon(chromium, lambda: by_id(chromium, "ask").is_displayed())
        by_id(chromium, "token").send_keys("wrong" + Keys.ENTER)
        soon(chromium, lambda: by_id(chromium, "token").get_attribute("value") == "")
        soon(chromium, lambda: by_id(chromium, "ask").is_displayed())
        by_id(chromium, "token").send_keys("Öffne dich ✓" + Keys.ENTER)
        soon(chromium, lambda: by_id(chromium, "model").text)
        upload(chromium, scenes[:1], 1)


# --- For everybody ----------------------------------------------------------------------------------------


def test_everything_is_reached_by_keyboard_and_seen(page, scenes):
    upload(page, scenes, 2)
    page.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
    reached = []
    for _ in range(40):
        page.switch_to.active_element.send_keys(Keys.TAB)
        name, outline = page.execute_script(
            "const at = document.activeElement, style = getComputedStyle(at);"
            "return [at.id || at.value || at.tagName, style.outlineStyle + ' ' + style.outlineWidth]"
        )
        if name in reached or name == "BODY":
            break
        assert outline == "solid 3px", name
        reached.append(name)
    expected = ["camera", "clear", "choose", "entries", "next", "threshold", "all", "none", *CLASSES,
                "scroll", "format", "copy", "download"]  # fmt: skip
    assert reached == expected


def test_everything_has_a_name_and_a_role(page, scenes):
    upload(page, scenes, 2)
    nodes = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    found = [
        (node["role"]["value"], node["name"]["value"])
        for node in nodes
        if not node["ignored"] and "name" in node and "role" in node
    ]
    operable = {
        "button",
        "checkbox",
        "slider",
        "combobox",
        "textbox",
        "image",
        "navigation",
        "complementary",
        "group",
    }
    unnamed = [role for role, name in found if role in operable and not name.strip()]
    assert unnamed == []
    assert {("slider", "Least score"), ("button", "Choose files"), ("combobox", "Image")} <= set(found)
    assert "status" in {node["role"]["value"] for node in nodes if "role" in node}
    assert page.execute_script("return document.documentElement.lang") == "en"
    ids = page.execute_script("return [...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_no_width_needs_scrolling_to_the_side(page, scenes, width):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    try:
        upload(page, scenes, 2)
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        least = page.execute_script(
            "return Math.min(...[...document.querySelectorAll('button, select')]"
            ".filter((each) => each.offsetParent).map((each) => each.offsetHeight))"
        )
        assert least >= (44 if width < 600 else 24)  # WCAG 2.5.5 and 2.5.8
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def luminance(color):
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
              for v in (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))]  # fmt: skip
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_contrast_of_both_schemes():
    """By WCAG 1.4.3, 4.5:1 for text."""
    schemes = re.findall(r":root \{(.*?)\}", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(schemes) == 2
    for text in schemes:
        colors = dict(re.findall(r"--([\w-]+): (#\w+)", text))
        colors = {name: "#" + "".join(2 * c for c in value[1:]) if len(value) == 4 else value
                  for name, value in colors.items()}  # fmt: skip
        pairs = [(one, other) for one in ("text", "faint", "bad") for other in ("back", "card")]
        for one, other in (*pairs, ("on-accent", "accent")):
            dark, bright = sorted((luminance(colors[one]), luminance(colors[other])))
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (one, other)
