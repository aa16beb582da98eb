"""A window that shows results as they come."""

import time
from collections import deque
from pathlib import Path
from typing import Any

from ssd.detections import Detections
from ssd.drawing import write_on

try:
    import tkinter
except ImportError:  # Debian and others have it in a package of its own
    tkinter = None  # type: ignore[assignment]

_ROOM = 0.9  # of the screen, that a picture takes at most
_SPAN = 2.0  # seconds over which frames are counted


class NoWindow(Exception):
    """No window can be opened; the message says why, and what to do."""


class Window:
    """Shows pictures with boxes; q, Esc or closing it ends that.

    Args:
        font: of the labels; see `Detections.draw`.

    Raises:
        NoWindow: there is no display, or no tkinter.
    """

    def __init__(self, font: Path | None = None) -> None:
        if tkinter is None:
            raise NoWindow(
                "this Python has no tkinter; install it (on Debian and Ubuntu: apt-get install python3-tk), "
                "or leave it out: pictures and films with boxes are in the folder of results"
            )
        try:
            self._root = tkinter.Tk(className="ssd")
        except tkinter.TclError as error:
            raise NoWindow(
                f"there is no display to open a window on ({error}); leave it out: pictures and films with "
                "boxes are in the folder of results"
            ) from error
        self._font, self._is_open = font, True
        self._shown: deque[float] = deque()
        self._label = tkinter.Label(self._root, borderwidth=0)
        self._label.pack()
        for event in ("<q>", "<Q>", "<Escape>"):
            self._root.bind(event, self._end)
        self._root.protocol("WM_DELETE_WINDOW", self._end)
        self._root.title("ssd")
        self._root.update()

    def _end(self, *_: Any) -> None:
        self._is_open = False

    def show(self, found: Detections) -> bool:
        """Show a result that has its image, with frames a second and the delay; whether to go on."""
        from PIL import ImageTk  # noqa: PLC0415 (it needs tkinter)

        picture = found.draw(font=self._font, enlarge=found.frame is None)
        room = (round(_ROOM * self._root.winfo_screenwidth()), round(_ROOM * self._root.winfo_screenheight()))
        picture.thumbnail(room)
        write_on(picture, self._status(found, time.monotonic()))
        self._image = ImageTk.PhotoImage(picture, master=self._root)  # which Tk itself does not hold
        self._label.configure(image=self._image)
        self._root.title(found.source)
        self._root.update()
        return self._is_open

    def _status(self, found: Detections, now: float) -> str:
        self._shown.append(now)
        while now - self._shown[0] > _SPAN:
            self._shown.popleft()
        return status(len(self._shown) - 1, now - self._shown[0], found, now)

    def close(self) -> None:
        """Close it."""
        self._root.destroy()


def status(count: int, seconds: float, found: Detections, now: float) -> str:
    """What stands in the corner: frames a second, and how old what one sees is, where that is known.

    Args:
        count: of frames that were shown.
        seconds: in which they were.
        found: the result that is shown.
        now: by `time.monotonic`.
    """
    parts = [] if found.time is None else [f"{found.time:.1f} s"]
    parts += [f"{count / seconds:.1f} frames/s"] if count and seconds else []
    parts += [] if found.taken is None else [f"delay {now - found.taken:.2f} s"]
    return ", ".join(parts) or found.source
