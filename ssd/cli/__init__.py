"""The command ``ssd``: a table of verbs. What a verb needs is imported when it runs."""

import inspect
import io
import os
import signal
import sys
import warnings
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ssd import __version__
from ssd.cli.options import with_choices
from ssd.errors import UserError, as_line
from ssd.web import READ_ERRORS

FAILED = 1
INTERRUPTED = 130
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_SETTINGS = {"help_option_names": ["-h", "--help"]}


@dataclass(frozen=True)
class Verb:
    """What a verb of the command is."""

    function: str
    """``module:function``; its arguments are the verb's, its docstring ends the verb's help."""
    help: str
    """The line that ``ssd --help`` shows."""


VERBS = {
    "detect": Verb(
        "ssd.cli.detect:detect", "Detect objects in images; write results, and pictures with boxes."
    ),
    "train": Verb(
        "ssd.cli.train:train", "Train or fine-tune on labelled images; interrupt and resume as you like."
    ),
    "evaluate": Verb(
        "ssd.cli.evaluate:evaluate",
        "Measure detections with the official COCO numbers, and AP of each class.",
    ),
    "calibrate": Verb(
        "ssd.cli.calibrate:calibrate",
        "Find thresholds of classes, probabilities for scores, and margins of boxes, on labelled images.",
    ),
    "check": Verb(
        "ssd.cli.data:check", "Read a whole dataset, and tell what is in it and what is wrong with it."
    ),
    "shapes": Verb("ssd.cli.data:shapes", "Draw a dataset of made-up scenes, to try things on."),
    "demo": Verb(
        "ssd.cli.demo:demo",
        "Draw a scene of shapes, and detect them with the weights that come with the package.",
    ),
    "export": Verb(
        "ssd.cli.export:export_weights", "Export weights to ONNX, OpenVINO, torch.export or TorchScript."
    ),
    "serve": Verb(
        "ssd.cli.serve:serve", "Detect over HTTP: a page for people, an API for programs, batches for both."
    ),
    "verify": Verb("ssd.cli.verify:verify_export", "Prove an exported file again, on this machine."),
    "benchmark": Verb(
        "ssd.cli.benchmark:benchmark",
        "Measure images a second, latency, and the time and memory of each stage.",
    ),
    "download": Verb(
        "ssd.cli.weights:download", "Fetch weights ahead of use, check them, and say where they are."
    ),
    "push": Verb(
        "ssd.cli.push:push_weights",
        "Put weights, with a model card, into a repository of the Hugging Face Hub.",
    ),
    "info": Verb(
        "ssd.cli.weights:info",
        "Show versions, devices, the precisions that run well on them, and cached weights.",
    ),
}


class _Group(TyperGroup):
    """The verbs of the table."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        # A list of verbs needs a line of each, and not what they import; completion needs their options.
        return _command(cmd_name) if ctx.resilient_parsing else _line(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        self.commands = {each: _line(each) for each in VERBS}  # among which it looks for what was meant
        name, command, rest = super().resolve_command(ctx, args)
        return name, _command(name) if name in VERBS else command, rest


def _line(name: str) -> TyperCommand:
    return TyperCommand(name, help=VERBS[name].help)


def _command(name: str) -> Any:
    module, function = VERBS[name].function.split(":")
    run = getattr(import_module(module), function)
    alone = typer.Typer(add_completion=False, context_settings=_SETTINGS)
    alone.command(name, help=f"{VERBS[name].help}\n\n{inspect.getdoc(run) or ''}")(with_choices(run))
    return typer.main.get_command(alone)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=_SETTINGS,
    help="SSD300 object detection.",
)


@app.callback(invoke_without_command=True)
def _top(
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if show_version:
        typer.echo(f"ssd300 {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command; errors that the user can mend end in a line, not in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    if "WORLD_SIZE" not in os.environ:  # processes of torchrun may wait for each other without an end
        # As Ctrl-C: results are kept, and what is half written goes.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Pillow's blocks of 16 MB stay with the thread that freed them; larger ones go back to the system, which
    # for photos of 50 megapixels is a third of a gigabyte less.
    os.environ.setdefault("PILLOW_BLOCK_SIZE", "64m")
    show = warnings.formatwarning
    warnings.formatwarning = lambda message, category, file, *rest: (  # one of ours is a line for the user
        f"ssd: {message}\n" if file.startswith(_PACKAGE) else show(message, category, file, *rest)
    )
    try:
        app(prog_name="ssd")
    except (UserError, *READ_ERRORS) as error:  # the latter are OSErrors, such as FileNotFoundError, too
        message = str(error) if isinstance(error, UserError) else as_line(str(error))
        typer.echo(f"ssd: {message}", err=True)
        sys.exit(FAILED)
