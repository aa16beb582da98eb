import threading
from dataclasses import dataclass, field
from queue import SimpleQueue

import pytest

from ssd.backends import Options
from ssd.errors import ImageError
from ssd.serve.batches import Batches, Busy

OPTIONS = Options()
SOON = 20  # seconds, after which a test has failed


@dataclass
class Stub:
    """Stands for a detector: images are bytes, results are what they say. `gate` lets a batch through."""

    gate: "SimpleQueue[None]" = field(default_factory=SimpleQueue)
    begun: "SimpleQueue[list[bytes]]" = field(default_factory=SimpleQueue)
    unreadable: threading.Event = field(default_factory=threading.Event)

    def read(self, named, how):
        if named.image == b"slow":
            assert self.unreadable.wait(SOON)
        if named.image == b"bad":
            raise ImageError(f"{named.name}: bad")
        return named.image

    def detect(self, batch, options):
        self.begun.put(batch)
        self.gate.get(timeout=SOON)
        if b"nan" in batch:
            raise FloatingPointError("nan")
        return [(image, options) for image in batch]


@pytest.fixture
def stub():
    return Stub()


@pytest.fixture
def made(stub):
    """Makes batches, and ends them, whatever is under way."""
    all_made = []

    def make(**options):
        all_made.append(Batches(stub, **options))
        return all_made[-1]

    yield make
    stub.unreadable.set()
    for _ in range(100):
        stub.gate.put(None)
    for each in all_made:
        each.close()


def send(batches, *images, options=OPTIONS):
    return batches.submit([(f"{i}.jpg", image) for i, image in enumerate(images)], options)


def settle(batches, ready):
    """Wait until so many images were read."""
    with batches._changed:
        assert batches._changed.wait_for(lambda: len(batches._ready) == ready, SOON)


def test_images_that_wait_are_detected_together(stub, made):
    batches = made(batch_size=3)
    first = send(batches, b"a")
    assert stub.begun.get(timeout=SOON) == [b"a"]
    later = [send(batches, image) for image in (b"b", b"c", b"d", b"e")]
    settle(batches, 4)
    for _ in range(3):
        stub.gate.put(None)
    assert sorted(stub.begun.get(timeout=SOON)) != []
    found = [each.result(SOON)[0] for futures in (first, *later) for each in futures]
    assert found == [b"a", b"b", b"c", b"d", b"e"]
    assert (batches.counts.images, batches.counts.batches) == (5, 3)
    assert batches.under_way == 0


def test_images_of_other_options_are_in_other_batches(stub, made):
    batches = made()
    send(batches, b"a")
    stub.begun.get(timeout=SOON)
    others = [send(batches, bytes([i]), options=Options(max_detections=1 + i % 2)) for i in range(4)]
    settle(batches, 4)
    for _ in range(3):
        stub.gate.put(None)
    for i, [future] in enumerate(others):
        assert future.result(SOON) == (bytes([i]), Options(max_detections=1 + i % 2))
    assert len(stub.begun.get(timeout=SOON)) == len(stub.begun.get(timeout=SOON)) == 2


def test_what_is_ready_does_not_wait_long_for_what_is_not(stub, made, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    batches = made(max_wait=0.01)
    [slow] = send(batches, b"slow")
    [quick] = send(batches, b"quick")
    stub.gate.put(None)
    assert quick.result(SOON)[0] == b"quick"
    assert not slow.done()


def test_more_than_may_be_under_way_is_refused(stub, made):
    batches = made(most=3)
    taken = send(batches, b"a", b"b")
    with pytest.raises(Busy):
        send(batches, b"c", b"d")
    assert batches.under_way == 2
    taken += send(batches, b"e")
    for _ in range(3):
        stub.gate.put(None)
    assert [each.result(SOON)[0] for each in taken] == [b"a", b"b", b"e"]
    send(batches, b"f", b"g", b"h")


def test_a_bad_image_costs_no_other(stub, made):
    batches = made()
    good, bad, nan, other = send(batches, b"a", b"bad", b"nan", b"b")
    for _ in range(9):
        stub.gate.put(None)
    assert (good.result(SOON)[0], other.result(SOON)[0]) == (b"a", b"b")
    with pytest.raises(ImageError, match=r"1\.jpg: bad"):
        bad.result(SOON)
    with pytest.raises(FloatingPointError):
        nan.result(SOON)
    assert batches.under_way == 0


def test_who_has_left_is_left_out(stub, made):
    batches = made()
    send(batches, b"a")
    stub.begun.get(timeout=SOON)
    [gone], [stays] = send(batches, b"b"), send(batches, b"c")
    settle(batches, 2)
    assert gone.cancel()
    stub.gate.put(None)
    stub.gate.put(None)
    assert stays.result(SOON)[0] == b"c"
    assert stub.begun.get(timeout=SOON) == [b"c"]
    with batches._changed:
        assert batches._changed.wait_for(lambda: batches.under_way == 0, 0.5) or batches.under_way == 0


def test_the_end_comes_after_what_is_under_way(stub, made):
    batches = made()
    futures = send(batches, *[b"a"] * 20)
    for _ in range(20):
        stub.gate.put(None)
    batches.close()
    assert all(each.done() for each in futures)
