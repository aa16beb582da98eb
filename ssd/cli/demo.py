"""``ssd demo``."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ssd.detector import Detector
from ssd.drawing import encoded
from ssd.files import run_folder, write_free
from ssd.shapes import draw_scene


def demo(
    seed: Annotated[int, typer.Option(min=0, help="Another one, another scene.")] = 45,
    output: Annotated[Path | None, typer.Option(help="By default a new folder runs/demo-N.")] = None,
) -> None:
    """No network is needed."""
    with run_folder(output, "demo") as folder:
        image, boxes, _ = draw_scene(np.random.default_rng(seed))
        found = Detector.load("shapes")(image)
        typer.echo(found)
        picture = folder / "detections.jpg"
        contents = {folder / "scene.jpg": encoded(image, quality=95), picture: found.picture_for(picture)}
        _, picture = write_free(contents)
    typer.echo(f"\n{len(boxes)} shapes drawn, {len(found)} detected; picture in {picture}")
