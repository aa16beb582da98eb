"""``python -m tests.fuzz TARGET --seconds 3600``: tries new cases, and writes those that break a promise."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as in pytest's settings

from fuzz import engine


def keep(folder: Path, find: engine.Find, kinds: set[str]) -> None:
    """Write a find where it can be looked at, if it is the first of its kind."""
    if find.kind() in kinds:
        return
    kinds.add(find.kind())
    new = folder / find.name
    new.mkdir(parents=True, exist_ok=True)
    engine.write(find.case, new, Path("/outside"))
    (new / "what.txt").write_text(f"{find.what}\n\n{find.trace}", errors="backslashreplace")
    print(f"{new}: {find.what[:300]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=engine.TARGETS)
    parser.add_argument("--seconds", type=float, default=60, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other cases (default: %(default)s)")
    parser.add_argument(
        "--finds", type=Path, default=Path("fuzz-finds"), help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--guided",
        action="store_true",
        help="by coverage (pip install atheris); stops at a find",
    )
    given = parser.parse_args()
    folder = given.finds / given.target
    if given.guided:
        from fuzz import guided

        return guided.run(given.target, given.seconds, given.seed, folder)
    kinds: set[str] = set()
    outcome = engine.fuzz(given.target, given.seconds, given.seed, lambda find: keep(folder, find, kinds))
    cases = outcome.counts.total()
    counts = ", ".join(f"{number:,} {what}" for what, number in outcome.counts.most_common())
    print(f"{given.target}: {cases:,} cases in {given.seconds:.0f} s, seed {given.seed}: {counts}")
    return 1 if outcome.finds else 0


if __name__ == "__main__":
    sys.exit(main())
