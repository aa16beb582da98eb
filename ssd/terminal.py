"""Whether somebody is watching."""

import sys


def is_watched() -> bool:
    """Whether a person sees a progress bar: in a terminal or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules
