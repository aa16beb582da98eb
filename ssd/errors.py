"""Every error of this package: what a person can mend, and what to do about it.

Each is also one of Python's own errors, by which it was always caught.
"""

import re
import reprlib
from collections.abc import Sequence

_MOST_SHOWN = 900  # characters of a line, of which a path may take many
_MOST_SAID = 2000  # and of a line of a message, which may give long paths twice, and code to run
# What ends a line, steers a terminal, turns the direction of what follows, or is in no encoding.
_UNPRINTABLE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxstring = 3, 8, 8, 80


class UserError(Exception):
    """Something that the user can mend; its message says all, and is what a command ends in."""

    def __str__(self) -> str:
        return "\n".join(as_line(line, _MOST_SAID) for line in super().__str__().split("\n"))


def as_line(text: str, most: int = _MOST_SHOWN) -> str:
    """Text of anybody's as a line that a terminal can show; if it is too long, its beginning and its end.

    >>> as_line("cat\\n\\x1b[31m"), as_line("0123456789" * 100, 20)
    ('cat\\\\n\\\\x1b[31m', '0123456789 ... 56789')
    """
    escaped = _UNPRINTABLE.sub(
        lambda found: found[0].encode("unicode_escape").decode(), _shortened(text, most)
    )
    return _shortened(escaped, most)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[len(text) - most // 4 :]}"


def shown(value: object) -> str:
    """A value out of a file, as Python writes it; no more text is made of it than is shown."""
    return as_line(_SHORT.repr(value), 100)


class ImageError(UserError, ValueError):
    """An image cannot be used; the message names it and says why."""


class ImageMemoryError(ImageError, MemoryError):
    """There is not enough memory for an image; the message names it and says what it needs."""


class AnnotationError(UserError, ValueError):
    """Annotations cannot be used; the message names the file and the annotations, and says why."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint or an exported file cannot be used; the message names it and says why."""


class DownloadError(UserError, OSError):
    """A file could not be fetched; the message says from where, why, and what to do instead."""


class ExportError(UserError, RuntimeError):
    """An exported file does not compute what torch does; it was removed."""


class LostContactError(UserError, RuntimeError):
    """Another process of the run, or one that reads for it, has died or hangs; the message says which."""


class NonFiniteError(UserError, FloatingPointError):
    """Numbers that should be finite hold NaN or infinity; `images` are the indices of theirs in the batch."""

    def __init__(self, message: str, images: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.images = tuple(images)


class MissingExtra(UserError, ImportError):
    """A package that only some need is not installed; the message has the command that installs it.

    Args:
        name: of the extra in pyproject.toml.

    >>> str(MissingExtra("onnx"))
    "this needs an extra: pip install 'ssd300[onnx]'"
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"this needs an extra: pip install 'ssd300[{name}]'", name=name)

    def __reduce__(self) -> tuple[type, tuple[str | None]]:
        return type(self), (self.name,)
