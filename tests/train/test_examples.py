import json
import os
import re
import signal

import pytest
import torch
from PIL import Image
from training import ALONE, CPU

from ssd.data import DetectionDataset, item_name, load
from ssd.distributed import World
from ssd.errors import AnnotationError, ImageError, ImageMemoryError, LostContactError
from ssd.train import examples
from ssd.train.examples import EpochBatches, Examples, Key, Loader, whole_steps


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_process_has_as_many_batches_and_no_image_comes_twice(size, accumulate):
    samplers = [
        EpochBatches(29, batch_size=2, accumulate=accumulate, seed=0, world=World(rank, size, CPU))
        for rank in range(size)
    ]
    for epoch in (0, 1):
        for each in samplers:
            each.epoch = epoch
        batches = [list(each) for each in samplers]
        assert (
            {len(each) for each in batches}
            == {len(samplers[0])}
            == {29 // (2 * size * accumulate) * accumulate}
        )
        seen = [index for each in batches for batch in each for _, index, _ in batch]
        assert len(seen) == len(set(seen))
        assert all(key[0] == epoch for each in batches for batch in each for key in batch)
    assert batches[0] != [[(1, index, 0) for _, index, _ in batch] for batch in batches[0][::-1]]
    samplers[0].start = 1
    assert list(samplers[0]) == batches[0][1:]


def test_the_order_changes_with_epoch_and_seed():
    def order(epoch, seed):
        sampler = EpochBatches(50, batch_size=2, accumulate=1, seed=seed, world=ALONE)
        sampler.epoch = epoch
        return [index for batch in sampler for _, index, _ in batch]

    assert order(0, 0) != order(1, 0) != order(0, 1)
    assert order(3, 4) == order(3, 4)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory")])
@pytest.mark.parametrize("function", ["load_image", "augment"])
def test_a_lack_of_memory_names_the_image_and_what_needs_less(monkeypatch, error, function):
    def fails(*arguments, **options):
        raise error if function == "augment" else ImageMemoryError("a.png: not enough") from error

    class One:
        def __getitem__(self, index):
            return Image.new("RGB", (9, 9)), {"boxes": [[0, 0, 5, 5]], "labels": [1]}

        def name(self, index):
            return "a.png"

    monkeypatch.setattr(examples, function, fails)
    told = Examples(One(), 2, "ssd", 0)[Key(0, 0, 300)]
    assert type(told) is ImageError
    assert re.match(r"a\.png: .*not enough.*; fewer processes need less \(--workers 1", str(told))


@pytest.mark.parametrize("orientation", [3, 6])
def test_boxes_of_turned_photos_stay_on_what_they_mark(tmp_path, orientation):
    """A red quarter, at the top left of the upright image, and the box on it."""
    upright = Image.new("RGB", (100, 80), "blue")
    upright.paste("red", (0, 0, 50, 40))
    stored = upright.transpose(Image.Transpose.ROTATE_180 if orientation == 3 else Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "train").mkdir()
    stored.save(tmp_path / "train" / "a.png", exif=exif)
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 80}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 40]}],
        "categories": [{"id": 1, "name": "red"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    examples = Examples(DetectionDataset(load(tmp_path)), 2, "none", 0)
    image, boxes, _, _ = examples[Key(0, 0, 300)]
    torch.testing.assert_close(boxes, torch.tensor([[0, 0, 0.5, 0.5]]))
    assert (image[10:140, 10:140] == torch.tensor([255, 0, 0])).all()


@pytest.mark.parametrize("recipe", ["none", "default"])
def test_the_size_is_that_of_the_network(images, recipe):
    image, boxes, labels, index = Examples(images, 7, recipe, 0)[Key(0, 3, 96)]
    assert image.shape == (96, 96, 3)
    assert (boxes.dtype, labels.dtype, index) == (torch.float32, torch.int64, 3)
    assert boxes.numel() == 0 or boxes.max() <= 1


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([0.1, 0.2, 0.6, 0.7], "seem to be parts of the image"),
        ([50, 10, 90, 30], "outside its image of 40x30"),
    ],
)
def test_boxes_that_are_not_in_pixels_of_the_image_are_told(box, message):
    class Own(torch.utils.data.Dataset):
        def name(self, index):
            return f"frame-{index}"

        def __getitem__(self, index):
            return Image.new("RGB", (40, 30)), {"boxes": [box], "labels": [1]}

    told = Examples(Own(), 2, "none", 0)[Key(0, 7, 96)]
    assert isinstance(told, AnnotationError)
    assert str(told).startswith("frame-7: ")
    assert message in str(told)


def test_a_part_of_a_dataset_keeps_the_names_of_its_items(images):
    part = torch.utils.data.random_split(images, [4, 2], torch.Generator().manual_seed(0))[1]
    assert item_name(part, 1) == images.name(part.indices[1])


def test_a_batch_that_cannot_be_read_comes_between_two_steps():
    steps = whole_steps([1, 2, 3, ImageError("damaged")], 2)
    assert [next(steps), next(steps)] == [1, 2]
    with pytest.raises(ImageError, match="damaged"):
        next(steps)
    assert list(whole_steps([1, 2, 3], 2)) == [1, 2]


class Process:
    """One of a loader's that has ended; as of a real one, its status may come only to who waits for it."""

    def __init__(self, exitcode):
        self.sentinel, other = os.pipe()
        os.close(other)
        self.exitcode, self._status = None, exitcode

    def join(self, timeout):
        self.exitcode = self._status

    def is_alive(self):
        return False


class Dying:
    """A loader one of whose processes has died, which shows as an error when a batch is due."""

    num_workers = 1

    def __init__(self, error, *exitcodes):
        self._error, self._workers = error, [Process(code) for code in exitcodes]
        self._iterator = self

    def __iter__(self):
        yield 1
        raise self._error

    def _shutdown_workers(self):
        pass


LATE = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")


@pytest.mark.parametrize(
    ("error", "exitcodes", "told"),
    [
        (LATE, [None, -9], "(SIGKILL); where memory ran out, fewer processes need less (--workers 1; "),
        (LATE, [-7], "(SIGBUS); --workers 0 does without shared memory, and docker run --shm-size"),
        (LATE, [3], "(status 3); where memory ran out, "),
        (LATE, [-250], "(status -250); where memory ran out, "),
        (ConnectionResetError("reset by peer"), [-9], "(SIGKILL); where"),
        (ConnectionResetError("reset by peer"), [], "(reset by peer); where"),
        (EOFError("ended"), [], "(ended); where"),
        (EOFError(), [], "(EOFError); where"),
    ],
)
@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="there are no such signals here")
def test_the_death_of_a_reader_is_told_in_place_of_its_batch(error, exitcodes, told):
    first, last = Loader(Dying(error, *exitcodes))
    assert first == 1
    assert isinstance(last, LostContactError)
    assert str(last).startswith(f"a process that reads images has died {told}")


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="there is no such signal here")
def test_torchs_handler_of_dead_processes_is_set_aside_until_the_end():
    def torchs(number, frame):
        raise AssertionError("it came while something else was being done")

    before = signal.signal(signal.SIGCHLD, torchs)
    try:
        loader = Loader(Dying(LATE, -signal.SIGKILL))
        batches = iter(loader)
        assert next(batches) == 1
        os.kill(os.getpid(), signal.SIGCHLD)
        assert isinstance(next(batches), LostContactError)
        loader.close()
        assert signal.getsignal(signal.SIGCHLD) is torchs
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_other_errors_of_the_loader_are_as_they_are():
    with pytest.raises(RuntimeError, match="^something else$"):
        list(Loader(Dying(RuntimeError("something else"))))
