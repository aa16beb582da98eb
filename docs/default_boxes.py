"""Draw docs/default_boxes.jpg: one cell's default boxes on each of the six feature maps.

python docs/default_boxes.py

The photograph is scikit-image's "chelsea" (Stefan van der Walt, CC0).
"""

from pathlib import Path

import skimage.data
from PIL import Image, ImageDraw, ImageFont
from torchvision.ops import box_convert

from ssd.boxes import PUBLISHED_LAYOUT as LAYOUT

PANEL, GAP, CAPTION = 320, 12, 28
CELLS = ((15, 14), (7, 7), (3, 3), (2, 1), (1, 1), (0, 0))  # row and column on each map, near the left eye
COLORS = ("#e6194b", "#ffe119", "#3cb44b", "#42d4f4", "#f58231", "#f032e6")


def main() -> None:
    photo = Image.fromarray(skimage.data.chelsea()).resize((PANEL, PANEL), Image.Resampling.BICUBIC)
    corners = box_convert(LAYOUT.default_boxes(), "cxcywh", "xyxy") * PANEL
    font = ImageFont.load_default(17)
    width, height = 3 * PANEL + 4 * GAP, 2 * (PANEL + CAPTION) + 3 * GAP
    sheet = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(sheet)
    first = 0
    for level, (cells, shapes, step, cell) in enumerate(
        zip(LAYOUT.maps, LAYOUT.boxes_per_cell, LAYOUT.steps, CELLS, strict=True)
    ):
        panel = photo.copy()
        draw = ImageDraw.Draw(panel, "RGBA")
        for line in range(1, cells):
            at = line * step * PANEL / LAYOUT.size
            draw.line((at, 0, at, PANEL), (255, 255, 255, 90))
            draw.line((0, at, PANEL, at), (255, 255, 255, 90))
        row, column = cell
        for shape in range(shapes):
            index = first + shape * cells * cells + row * cells + column
            draw.rectangle(corners[index].tolist(), outline=COLORS[shape], width=2)
        first += shapes * cells * cells
        left = GAP + level % 3 * (PANEL + GAP)
        top = GAP + level // 3 * (PANEL + CAPTION + GAP)
        sheet.paste(panel, (left, top))
        text = f"{cells} x {cells} cells, {shapes} boxes each"
        canvas.text((left + PANEL / 2, top + PANEL + CAPTION / 2), text, "black", font, anchor="mm")
    sheet.save(Path(__file__).with_suffix(".jpg"), quality=80)


if __name__ == "__main__":
    main()
