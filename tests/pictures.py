"""Images encoded, and read again."""

import io

import numpy as np

from ssd.images import load_image


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def loaded(source):
    image = load_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)
