"""Runs cases against a promise, in a process of its own, and keeps those that break it.

A target is a module of this folder with three functions: ``seeds()`` gives whole cases; ``mutate(rng, case)``
a new one; ``promise(case, folder)``, with the case written to the folder, the outcome in a word, or raises.
What no promise can see of itself is watched here: time, memory, death by a signal, processes that are
started, and files outside that are opened.
"""

import importlib
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

TARGETS = ("images", "films", "checkpoints", "states", "annotations", "settings", "exchanges")
CORPUS = Path(__file__).parent / "corpus"

Case = dict[str, bytes]
"""Files by their path, with "/". One that ends in "/" is an empty folder; one that ends in "@" is a link, and
its content where to."""

OUTSIDE = b"@outside@"
"""In a content, this stands for the path of a folder that nothing may look into."""

PAYLOAD = "marker-was-here"
"""A file of this name in the current folder shows that something in a case was run."""

SECONDS = 30.0
"""That one case may take, on a machine that has other things to do."""
MEMORY = 1 << 30
"""Bytes that one case may add to the most that the process has had."""


@dataclass(frozen=True)
class Find:
    """A case that broke its promise."""

    name: str
    case: Case
    what: str
    """The last line of the traceback, or what was watched."""
    trace: str = ""

    def kind(self) -> str:
        """What finds with one cause have in common, mostly: the error, and the line that it comes from."""
        lines = re.findall(r'File "(.+)", line (\d+)', self.trace)
        return f"{self.what.split(':')[0]} {lines[-1] if lines else ''}"


@dataclass
class Outcome:
    """What came of some cases."""

    counts: Counter[str] = field(default_factory=Counter)
    finds: list[Find] = field(default_factory=list)


def target(name: str) -> ModuleType:
    """The module of a target."""
    return importlib.import_module(f"fuzz.{name}")


def fuzz(
    name: str, seconds: float, seed: int = 0, on_find: Callable[[Find], None] = lambda find: None
) -> Outcome:
    """Try new cases of a target for some time.

    Args:
        name: in `TARGETS`.
        seconds: to go on for, after what is needed is imported.
        seed: with the number of a case, what it depends on.
        on_find: called with each find as it comes.
    """
    return _run(name, lambda first: ("fuzz", seed, first), seconds, on_find)


def replay(name: str, cases: dict[str, Case]) -> Outcome:
    """Try some given cases of a target, by their names."""
    listed = list(cases.items())
    return _run(name, lambda first: ("replay", listed, first), None, lambda find: None)


def corpus(name: str) -> dict[str, Case]:
    """The cases that once broke the promise of a target, by what they are."""
    cases = {}
    for folder in sorted((CORPUS / name).glob("*/")):
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "story.txt"]
        cases[folder.name] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return cases


def made(name: str, seed: int, number: int) -> Case:
    """The case of a number."""
    module = target(name)
    rng = random.Random(f"{name} {seed} {number}")
    case: Case = module.mutate(rng, rng.choice(module.seeds()))
    return case


def write(case: Case, folder: Path, outside: Path) -> None:
    """Write a case into a folder."""
    for name, content in case.items():
        path = folder / name.rstrip("/@")
        path.parent.mkdir(parents=True, exist_ok=True)
        placed = content.replace(OUTSIDE, os.fsencode(outside))
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        elif name.endswith("@"):
            path.symlink_to(os.fsdecode(placed))
        else:
            path.write_bytes(placed)


_INTERESTING = (0, 1, 7, 8, 127, 128, 255, 256, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)


def some_bytes(rng: random.Random, data: bytes, most: int = 1 << 20) -> bytes:
    """Some of the bytes otherwise: flipped, cut, repeated, moved, or numbers that are often wrong.

    Args:
        rng: which decides.
        data: any.
        most: bytes of the result.
    """
    new = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(new) + 1)
        length = min(rng.choice((1, 2, 4, 8, 64, 1024)), len(new) - at)
        way = rng.randrange(8)
        if way == 0:
            del new[at:]
        elif way == 1:
            del new[at : at + length]
        elif way == 2:
            new[at:at] = new[at : at + length] * rng.choice((1, 2, 16))
        elif way == 3:
            new[at : at + length] = rng.randbytes(length)
        elif way == 4:
            other = rng.randrange(len(new) + 1)
            new[at:at] = new[other : other + length]
        elif way == 5:
            size, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
            value = rng.choice(_INTERESTING) % 256**size
            new[at : at + size] = value.to_bytes(size, order)
        elif at < len(new):
            new[at] ^= 1 << rng.randrange(8)
    return bytes(new[:most])


# --- The process of the cases -----------------------------------------------------------------------------


def _run(
    name: str, task: Callable[[int], tuple[Any, ...]], seconds: float | None, on_find: Callable[[Find], None]
) -> Outcome:
    """Cases from the first on, in new processes where one is lost."""
    outcome = Outcome()
    first, end = 0, None
    with tempfile.TemporaryDirectory(prefix="fuzz-") as home:
        while first is not None:
            first, end = _run_some(name, task(first), Path(home), first, seconds, end, outcome, on_find)
    return outcome


def _run_some(
    name: str,
    task: tuple[Any, ...],
    home: Path,
    first: int,
    seconds: float | None,
    end: float | None,
    outcome: Outcome,
    on_find: Callable[[Find], None],
) -> tuple[int | None, float | None]:
    """Cases in one process: the number of the next one if it was lost, and when all of them have to end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(name, task, home, theirs), daemon=True)
    process.start()
    theirs.close()
    number, label, case, lost = first, "", {}, ""

    def found(what: str, trace: str = "") -> None:
        outcome.counts["found"] += 1
        outcome.finds.append(Find(label, case, what, trace))
        on_find(outcome.finds[-1])

    try:
        while True:
            if not ours.poll(SECONDS if label else 300):  # the first message waits for imports
                lost = f"it took more than {SECONDS:.0f} s" if label else "it did not begin"
                break
            kind, *content = ours.recv()
            if kind == "begin":
                if end is None and seconds is not None:
                    end = time.monotonic() + seconds
                number, label, case = content
                if end is not None and time.monotonic() > end:
                    return None, end
                ours.send("go")
            elif kind == "end":
                outcome.counts[content[0]] += 1
            elif kind == "broke":
                found(*content)
            else:
                return None, end
    except EOFError:
        process.join(10)
        lost = f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
        ours.close()
    if not label:
        raise RuntimeError(f"{name}: {lost}")
    found(lost)
    return number + 1, end


def _work(name: str, task: tuple[Any, ...], home: Path, parent: Connection) -> None:
    """Runs cases, and tells of each when it begins and how it ended."""
    module = target(name)
    outside = home / "outside"
    outside.mkdir(exist_ok=True)
    for each in ("marker.jpg", "marker.txt", "marker.xml", "marker.json"):
        (outside / each).write_bytes(b"0 0.5 0.5 0.1 0.1\n")
    watched: list[str] = []
    outside = outside.resolve()
    sys.addaudithook(lambda event, arguments: _watch(event, arguments, outside, watched))
    for number, label, case in _cases(name, task):
        parent.send(("begin", number, label, case))
        parent.recv()
        folder = home / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        os.chdir(folder)
        write(case, folder, outside)
        watched.clear()
        before = _most_memory()
        try:
            result = module.promise(case, folder)
        except BaseException as error:
            what = traceback.format_exception_only(error)[-1].strip()
            parent.send(("broke", what, traceback.format_exc()))
            continue
        grown = _most_memory() - before
        if grown > MEMORY:
            watched.append(f"it took {grown / 1e9:.1f} GB")
        if any(folder.rglob(PAYLOAD)):
            watched.append("something in it was run")
        parent.send(("broke", watched[0], "") if watched else ("end", result))
    parent.send(("over",))


def _cases(name: str, task: tuple[Any, ...]) -> Iterator[tuple[int, str, Case]]:
    if task[0] == "replay":
        _, listed, first = task
        for number in range(first, len(listed)):
            yield number, *listed[number]
        return
    _, seed, first = task
    for number in count(first):
        yield number, f"{seed}-{number}", made(name, seed, number)


def _watch(event: str, arguments: tuple[Any, ...], outside: Path, watched: list[str]) -> None:
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile"):
        watched.append(f"it started {arguments[0]}")
    elif event == "open" and isinstance(arguments[0], str) and _is_in(outside, arguments[0]):
        watched.append(f"it opened {arguments[0]}")


def _is_in(folder: Path, path: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(folder)


def _most_memory() -> int:
    """Bytes that this process had at most; 0 where the system does not say."""
    try:  # getrusage begins with what the parent had
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0
