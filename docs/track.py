"""Draw docs/track.jpg: six frames of a film of moving shapes, tracked and counted with the weights "shapes".

python docs/track.py
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import moving
from made_films import RATE, write_film

from ssd.detector import Detector

SHOWN = (4, 24, 44, 64, 84, 104)
WALL = (205.0, 265.0)
LINE = (330, 10, 330, 350)
ZONE = (15, 185, 190, 185, 190, 350, 15, 350)
GAP, CAPTION = 10, 24


def going(class_id: int, start: tuple[int, int], end: tuple[int, int], side: int) -> moving.Moving:
    """A shape that goes straight on."""
    corner = np.linspace(start, end, SHOWN[-1] + 1)
    boxes = np.hstack([corner, corner + side])
    return moving.Moving(class_id, boxes, boxes)


def main() -> None:
    objects = [
        going(0, (20, 40), (380, 60), 80),
        going(5, (390, 130), (40, 255), 90),
        going(4, (50, 255), (395, 235), 84),
    ]
    with tempfile.TemporaryDirectory() as folder:
        frames = [moving.drawn(objects, i, WALL) for i in range(SHOWN[-1] + 1)]
        film = write_film(Path(folder, "shapes.mkv"), frames)
        results = list(Detector.load("shapes").track(film, lines=[LINE], zones=[ZONE]))
    width, height = moving.WIDTH, moving.HEIGHT
    sheet = Image.new("RGB", (3 * width + 4 * GAP, 2 * (height + CAPTION) + 3 * GAP), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(17)
    for place, number in enumerate(SHOWN):
        left = GAP + place % 3 * (width + GAP)
        top = GAP + place // 3 * (height + CAPTION + GAP)
        sheet.paste(results[number].draw(enlarge=False), (left, top))
        text = f"{float(number / RATE):.2f} s"
        canvas.text((left + width / 2, top + height + CAPTION / 2), text, "black", font, anchor="mm")
        print(number, results[number].track_ids, results[number].counts)
    sheet.save(Path(__file__).with_suffix(".jpg"), quality=80)


if __name__ == "__main__":
    main()
