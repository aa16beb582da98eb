"""``ssd push``."""

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ssd.card import data_of_run, measured_in, measured_in_run, model_card, without_paths
from ssd.hf import CARD, SCHEME, WEIGHTS, push
from ssd.model import load_model
from ssd.pretrained import weights_in


def push_weights(
    weights: Annotated[
        str,
        typer.Argument(help="A checkpoint file, a run folder, its URL, hf://owner/repo.", show_default=False),
    ],
    repo: Annotated[str, typer.Argument(help="owner/repo; made if it is not there.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Of a new repository.")] = False,
    license: Annotated[
        str | None, typer.Option(help="Of the weights, as the Hub calls it, such as apache-2.0.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Name of the training data; by default that of the run folder.")
    ] = None,
    metrics: Annotated[
        Path | None,
        typer.Option(
            help="metrics.json of ssd evaluate; by default what the run folder has.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    replace_card: Annotated[
        bool, typer.Option("--replace-card", help=f"Also where the repository has a {CARD}.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the model card, and send nothing.")
    ] = False,
) -> None:
    """Writes a model card from what the weights and their run folder say.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    repo = repo.removeprefix(SCHEME)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise typer.BadParameter(f"{repo} is not owner/repo", param_hint="REPO")
    model, found = load_model(weights)
    path = Path(weights)
    path = weights_in(path) if path.is_dir() else path
    data = data if data is not None else data_of_run(path)
    measured = measured_in(metrics, found.class_names) if metrics else measured_in_run(path, data)
    card = model_card(found, repo, data=data, measured=measured, license=license)
    if license is None:
        typer.echo("ssd: no licence is given, and the card says so; --license NAME gives one", err=True)
    if measured is None:
        typer.echo("ssd: the card has no metrics; --metrics takes metrics.json of ssd evaluate", err=True)
    if dry_run:
        typer.echo(card, nl=False)
        typer.echo(f"nothing was sent; without --dry-run, {WEIGHTS} and {CARD} go to {repo}", err=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / WEIGHTS
        replace(found, state_dict=model.state_dict(), config=without_paths(found.config)).save(file)
        files: dict[str, bytes | Path] = {WEIGHTS: file, CARD: card.encode()}
        title = f"Weights: {model.backbone}, {len(found.class_names)} classes"
        url, kept = push(repo, files, private=private, replace_card=replace_card, message=title)
    if kept:
        typer.echo(f"ssd: {CARD} was there, and stays; --replace-card replaces it", err=True)
    typer.echo(f"{url}\nDetect with it: ssd detect PHOTO --weights {SCHEME}{repo}")
