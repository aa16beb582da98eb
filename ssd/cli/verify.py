"""``ssd verify``."""

from pathlib import Path
from typing import Annotated

import typer

from ssd.errors import as_line
from ssd.proof import Difference, Verdict, verify


def verify_export(
    file: Annotated[
        Path,
        typer.Argument(help="What ssd export wrote: a file, a folder (OpenVINO's, --standalone), a page."),
    ],
) -> None:
    """It runs here, in its runtime, and is compared with what torch gave; the exit status is 1 where it
    differs.
    """
    verdict = verify(file)
    for line in _table(verdict):
        typer.echo(line)
    if verdict.accuracy:
        typer.echo(f"the weights that it was made of: {as_line(verdict.accuracy, 200)}")
    if not verdict.is_proved:
        typer.echo(f"NOT PROVED: {file} does not compute here what it was exported to; export it again")
        raise typer.Exit(1)
    typer.echo(f"proved: {verdict.runtime} computes here what torch did where {file} was exported")


def _table(verdict: Verdict) -> list[str]:
    rows = [("", "exported", "here", "allowed")]
    for name in {**verdict.exported_by, **verdict.versions}:
        then, here = (as_line(each.get(name, "-"), 40) for each in (verdict.exported_by, verdict.versions))
        rows.append((as_line(name, 40), then, here, ""))
    rows += [
        (f"largest {name}", f"{then:.2g}", f"{here:.2g}", f"{most:.2g}")
        for name, then, here, most in zip(
            Difference._fields, verdict.largest, verdict.found, verdict.allowed, strict=True
        )
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
