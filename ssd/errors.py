"""Every error of this package: what a person can mend, and what to do about it.

Each is also one of Python's own errors, by which it was always caught.
"""

from collections.abc import Sequence


class UserError(Exception):
    """Something that the user can mend; its message says all, and is what a command ends in."""


class ImageError(UserError, ValueError):
    """An image cannot be used; the message names it and says why."""


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
