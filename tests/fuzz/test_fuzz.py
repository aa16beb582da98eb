"""A little of each target with a fixed seed, and all that was ever found."""

import random
import signal

import pytest

from fuzz import engine


def told(outcome):
    return [f"{find.name}: {find.what}\n{find.trace}" for find in outcome.finds]


@pytest.mark.parametrize("name", engine.TARGETS)
def test_new_cases_break_no_promise(name):
    outcome = engine.fuzz(name, seconds=8)
    assert told(outcome) == []
    assert outcome.counts.total() > 0


@pytest.mark.parametrize("name", engine.TARGETS)
def test_what_once_broke_a_promise_does_so_no_more(name):
    cases = engine.corpus(name)
    outcome = engine.replay(name, cases)
    assert told(outcome) == []
    assert outcome.counts.total() == len(cases)
    assert all((engine.CORPUS / name / each / "story.txt").is_file() for each in cases)


@pytest.mark.slow
def test_a_thousand_mutations_of_films():
    """Of whole films, of all containers and codecs in turn, and of nothing else."""
    films = engine.target("films")
    whole = [case for case in films.seeds() if films.is_playable(case)]
    assert len(whole) >= 4
    cases = {
        str(number): films.mutate(random.Random(number), whole[number % len(whole)]) for number in range(1000)
    }
    outcome = engine.replay("films", cases)
    assert told(outcome) == []
    assert outcome.counts.total() == 1000
    assert min(outcome.counts[each] for each in ("played", "breaks off", "refused")) > 0, outcome.counts


def test_a_number_and_a_seed_make_the_same_case():
    for name in engine.TARGETS:
        assert engine.made(name, 3, 5) == engine.made(name, 3, 5)


# A target of this module: what is found by the engine itself.


def promise(case, folder):
    (content,) = case.values()
    assert (folder / "a").read_bytes() == content
    exec(content)
    return "kept"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        (b"", None),
        (b"1 / 0", "ZeroDivisionError: division by zero"),
        (b"raise MemoryError", "MemoryError"),
        (b"import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "the process ended with -9"),
        (b"import os; os._exit(3)", "the process ended with 3"),
        (b"while True: pass", "it took more than 1 s"),
        (b"open('marker-was-here', 'w').close()", "something in it was run"),
        (b"open('../outside/marker.jpg').close()", "it opened"),
        (b"import os; os.system('true')", "it started"),
    ],
)
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="processes are not killed so here")
def test_what_the_engine_watches(monkeypatch, code, found):
    monkeypatch.setattr(engine, "SECONDS", 1 if b"while" in code else 30)
    outcome = engine.replay("test_fuzz", {"it": {"a": code}, "another": {"a": b""}})
    assert outcome.counts["kept"] == (2 if found is None else 1)
    assert [find.name for find in outcome.finds] == ([] if found is None else ["it"])
    assert all(find.what.startswith(found) for find in outcome.finds)
