import os
import pickle
import threading

import numpy as np
import pytest
from PIL import Image

from ssd.errors import ImageError
from ssd.pixels import Original, Room, origin


def waiting(room):
    """A thread that takes 6 pixels of room, and an event that says whether it has them."""
    has, leave = threading.Event(), threading.Event()

    def work():
        with room.taken(6):
            has.set()
            leave.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, has, leave


def test_room_is_for_so_many_pixels_and_in_turn():
    room = Room(10)
    first, has_first, leave_first = waiting(room)
    assert has_first.wait(60)
    second, has_second, leave_second = waiting(room)
    while len(room._waiting) < 1:
        pass
    third, has_third, leave_third = waiting(room)
    while len(room._waiting) < 2:
        pass
    assert not has_second.is_set()
    leave_first.set()
    assert has_second.wait(60)
    assert not has_third.is_set()
    leave_second.set()
    assert has_third.wait(60)
    leave_third.set()
    for thread in (first, second, third):
        thread.join(60)
    assert room._free == 10


def test_what_is_larger_than_the_room_has_it_alone():
    room = Room(10)
    with room.taken(99):
        assert room._free == 0
    assert room._free == 10


def test_room_comes_back_after_an_error():
    room = Room(10)
    with pytest.raises(KeyboardInterrupt), room.taken(7):
        raise KeyboardInterrupt
    with room.taken(10):
        pass
    room._free = 3  # as in a fork, while others had some
    room.reset()
    with room.taken(10):
        pass


@pytest.fixture
def photo(tmp_path):
    """A photo that lies on its side, and what it shows."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    return tmp_path / "photo.png", np.rot90(pixels, -1)


def opened(source, **options):
    with open(source, "rb") as file:
        where = origin(source, file)
    return Original(*where, "photo", (20, 30), **options)


def test_an_original_is_read_again_upright(photo, monkeypatch, tmp_path):
    path, shown = photo
    monkeypatch.chdir(path.parent)
    original = opened(path.name)
    monkeypatch.chdir("/")
    again = pickle.loads(pickle.dumps(original))
    for each in (original, again):
        np.testing.assert_array_equal(np.asarray(each.read()), shown)
    assert original.pixels == 600


def test_one_that_is_gone_or_changed_is_told(photo):
    path, _ = photo
    original = opened(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ImageError, match="^photo: was changed since objects were detected in it; .* anew"):
        original.read()
    path.unlink()
    with pytest.raises(ImageError, match="^photo: cannot be read again"):
        original.read()


def test_it_keeps_to_the_limit_that_it_was_read_with(photo):
    path, _ = photo
    with pytest.raises(ImageError, match="600"):
        opened(path, max_pixels=599).read()
    assert opened(path, max_pixels=600).read().size == (20, 30)
