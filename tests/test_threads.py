import os
import threading
from queue import SimpleQueue

import pytest

from ssd.errors import ImageError
from ssd.threads import Behind, Readers, _Ahead, ahead, submit


def threads():
    return [each for each in threading.enumerate() if each.name.startswith("ssd-")]


@pytest.fixture(autouse=True)
def _no_thread_stays():
    before = threads()
    yield
    assert threads() == before


def test_items_come_in_their_order():
    assert list(ahead(iter(range(100)), 3)) == list(range(100))
    assert list(ahead(iter(()), 3)) == []


def test_only_so_many_are_made_ahead():
    made, asked = [], SimpleQueue()

    def items():
        for number in range(20):
            made.append(number)
            asked.put(number)
            yield number

    found = ahead(items(), 3)
    assert next(found) == 0
    for _ in range(5):  # three that wait, the one that was taken, and the one for which there is no room
        asked.get()
    assert len(made) <= 6
    found.close()
    assert len(made) <= 6


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise ImageError("film: breaks off")

    found = ahead(items(), 3)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(ImageError, match="breaks off"):
        next(found)


@pytest.mark.parametrize("way", ["close", "error", "lost"])
def test_the_thread_ends_with_its_consumer(way):
    closed = SimpleQueue()

    def items():
        try:
            while True:
                yield 0
        finally:
            closed.put(threading.current_thread().name)

    found = ahead(items(), 2)
    next(found)
    assert threads()
    if way == "close":
        found.close()
    elif way == "error":
        with pytest.raises(KeyboardInterrupt):
            found.throw(KeyboardInterrupt)
    del found
    assert closed.get() == "ssd-ahead"  # what it reads is closed where it is used


def test_live_items_are_dropped_oldest_first():
    made, dropped, go = SimpleQueue(), [], SimpleQueue()

    def items():
        yield from range(10)
        made.put(None)
        go.get()

    found = _Ahead(items(), 3, dropped.append)
    made.get()  # nobody has taken any, and all ten are made
    assert dropped == [0, 1, 2, 3, 4, 5, 6]
    go.put(None)
    assert list(found) == [7, 8, 9]
    found.join(float("inf"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_in_a_forked_process_it_says_so():
    found = ahead(iter(range(9)), 2)
    next(found)
    pid = os.fork()
    if not pid:
        try:
            next(found)
        except RuntimeError as error:
            os._exit(7 if "begin it anew" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    found.close()


def test_what_is_done_behind_is_done_in_order():
    done = []
    behind = Behind(done.append, 3)
    for number in range(100):
        behind.put(number)
    behind.end()
    assert done == list(range(100))
    assert behind.error is None
    behind.join(float("inf"))


def test_one_waits_for_what_is_behind():
    begun, go = SimpleQueue(), SimpleQueue()

    def do(number):
        begun.put(number)
        go.get()

    behind = Behind(do, 2)
    behind.put(0)
    behind.put(1)
    waiting = threading.Thread(target=behind.put, args=(2,))
    waiting.start()
    assert begun.get() == 0
    waiting.join(0.05)
    assert waiting.is_alive()
    for _ in range(3):
        go.put(None)
    waiting.join()
    behind.end()
    behind.join(float("inf"))


def test_nothing_is_done_after_an_error():
    done = []

    def do(number):
        done.append(number)
        if number == 1:
            raise OSError("the disk is full")

    behind = Behind(do, 1)
    for number in range(9):
        behind.put(number)
    behind.end()
    assert done == [0, 1]
    assert str(behind.error) == "the disk is full"
    behind.join(float("inf"))


def test_readers_do_all_tasks_or_those_that_they_are_at():
    readers, begun, go = Readers(2), SimpleQueue(), SimpleQueue()
    outcomes = [submit(readers, lambda number=number: begun.put(number) or go.get()) for number in range(4)]
    assert {begun.get(), begun.get()} == {0, 1}
    readers.shutdown(wait=False)
    go.put("a")
    go.put("b")
    assert {outcomes[0].get(), outcomes[1].get()} == {"a", "b"}
    readers.join()
    assert outcomes[2].empty()
    assert outcomes[3].empty()

    readers = Readers(2)
    outcomes = [submit(readers, int, text) for text in ("1", "x", "3")]
    readers.shutdown(wait=True)
    one, error, three = (outcome.get() for outcome in outcomes)
    assert (one, three) == (1, 3)
    assert isinstance(error, ValueError)
