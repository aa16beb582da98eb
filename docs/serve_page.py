"""Take docs/serve.jpg: the page of `ssd serve shapes` in Chromium, with the picture of `ssd demo`.

python docs/serve_page.py
"""

import io
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from serving import serving

from ssd.detector import Detector
from ssd.shapes import draw_scene


def main() -> None:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--window-size=1265,1000"):
        options.add_argument(argument)
    with tempfile.TemporaryDirectory() as folder, serving(Detector.load("shapes"), model="shapes") as address:
        scene = Path(folder, "scene.jpg")
        draw_scene(np.random.default_rng(45))[0].save(scene, quality=95)
        # Without the driver's path, selenium asks the network for one.
        page = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        page.get(address)
        page.find_element("id", "files").send_keys(str(scene))
        WebDriverWait(page, 60).until(lambda _: page.find_elements("css selector", "#objects tr"))
        shown = Image.open(io.BytesIO(page.get_screenshot_as_png())).convert("RGB")
        page.quit()
    file = Path(__file__).with_name("serve.jpg")
    shown.crop((0, 0, shown.width, min(shown.height, 860))).save(file, quality=85)
    print(file)


if __name__ == "__main__":
    main()
