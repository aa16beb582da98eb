"""Answers of servers, as scripts: what is sent verbatim, with marks for what else a server does."""

import io
import os
import random
import re
import socket
import threading
import unicodedata
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from PIL import Image

from fuzz.checkpoints import saved
from fuzz.engine import Case, some_bytes
from ssd import containers, images, pretrained, web
from ssd.errors import DownloadError, ImageError

PAUSE = b"@pause@"
AGAIN = b"@again@"  # the piece before it is sent over and over, for as long as anyone listens
NEXT = b"@next@"  # the connection ends, and what follows answers the next one
HERE = b"@here@"  # the server's host and port
_MARKS = (PAUSE, AGAIN, NEXT, HERE)

_VALUES = (
    *(b"0", b"1", b"-1", b"65536", b"4294967295", b"9" * 40, b"9" * 5000, b"f" * 20, b"1_0", b"+5", b"0x10"),
    *(
        b"chunked",
        b"gzip, chunked",
        b"identity",
        b"text/html",
        b"image/png",
        b"application/octet-stream; a=b",
    ),
    *(b"close", b"keep-alive", b"bytes 0-9/100", b"/again", b"//", b"http://[x", b"file:///etc/passwd"),
    *(
        b"http://@here@/a",
        b"https://@here@/a",
        b"http://a..b/",
        b"http://127.0.0.1:99999/",
        b"ftp://127.0.0.1/",
        b"\xff\xfe",
        b"a" * 70_000,
    ),
)
_LINES = (
    *(
        b"Content-Length: 100",
        b"Content-Length: 5",
        b"Transfer-Encoding: chunked",
        b"Location: http://@here@/b",
    ),
    *(b"Content-Type: text/html", b"Content-Encoding: gzip", b"X-A: b", b" folded", b"", b"no header", b":"),
    *(b"HTTP/1.1 100 Continue\r\n", b"HTTP/1.1 200 OK", b"HTTP/1.0 206 Partial Content", b"HTTP/9.9 200 OK"),
    *(b"HTTP/1.1 302 Found", b"HTTP/1.1 503 Busy", b"HTTP/1.1 204 No Content", b"HTTP/1.1 103 Early Hints"),
    *(b"0", b"5", b"ffffffff", b"5;a=b"),
)


def _bodies() -> tuple[bytes, ...]:
    content = {"a": torch.arange(6.0)}
    png = io.BytesIO()
    Image.linear_gradient("L").resize((20, 10)).save(png, "PNG")
    return saved(content), saved(content, zipped=False), safetensors.torch.save(content), png.getvalue()


def seeds() -> list[Case]:
    scripts = []
    for body in _bodies():
        half = len(body) // 2
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        scripts += [
            answer,
            b"HTTP/1.0 200 OK\r\nContent-Type: image/png\r\n\r\n" + body,
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"%x\r\n%b\r\n%x;a=b\r\n%b\r\n0\r\nX-A: b\r\n\r\n"
            % (half, body[:half], len(body) - half, body[half:]),
            b"HTTP/1.1 100 Continue\r\n\r\n" + answer,
            b"HTTP/1.1 302 Found\r\nLocation: http://@here@/b\r\nContent-Length: 3\r\n\r\nabc@next@" + answer,
        ]
    return [{"exchange": script} for script in scripts]


def mutate(rng: random.Random, case: Case) -> Case:
    script = case["exchange"]
    for _ in range(rng.choice((1, 1, 2, 3))):
        lines = script.split(b"\r\n")
        at = rng.randrange(len(lines))
        way = rng.randrange(8)
        if way == 0:
            lines.insert(at, rng.choice(_LINES))
        elif way == 1:
            del lines[at]
        elif way == 2:
            name, colon, _ = lines[at].partition(b":")
            lines[at] = name + colon + b" " * len(colon) + rng.choice(_VALUES)
        elif way == 3:
            lines[at] = rng.choice(_LINES)
        elif way == 4:
            lines[at] = some_bytes(rng, lines[at], 1 << 17)
        elif way == 5:
            script = script[: rng.randrange(len(script) + 1)]
        if way < 5:
            script = b"\r\n".join(lines)
        elif way > 5:
            place = rng.choice((rng.randrange(len(script) + 1), rng.randrange(min(len(script), 100) + 1)))
            script = script[:place] + rng.choice(_MARKS) + script[place:]
    return {"exchange": script[: 1 << 20]}


def promise(case: Case, folder: Path) -> str:
    """Whatever a server sends, reading ends soon: in the whole content, or in a line of ours and no file."""
    script = case["exchange"]
    with ExitStack() as stack:
        for module, name, value in (
            *((web, "TIMEOUT", 0.1), (web, "MIN_RATE", 1 << 20), (pretrained, "ATTEMPTS", 1)),
            *((pretrained, "MAX_BYTES", 1 << 20), (images, "MAX_BYTES", 1 << 20)),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(mock.patch.dict(os.environ, TORCH_HOME=str(folder / "home"), no_proxy="*"))
        return f"weights {_weights(script)}, image {_image(script)}"


def _weights(script: bytes) -> str:
    with _server(script) as url:
        try:
            path = pretrained.fetch(url, progress=False)
        except DownloadError as error:
            _require_line(error)
            path = None
    kept = [each for each in pretrained.cache_dir().iterdir() if each.suffix != ".lock"]
    if path is None:
        assert kept == []
        return "refused"
    assert kept == [path]
    containers.read(path)
    assert pretrained.fetch(url, progress=False) == path  # without a server
    if not any(mark in script.lower() for mark in (*_MARKS, b"chunked")):
        assert path.read_bytes() in script
    return "read"


def _image(script: bytes) -> str:
    with _server(script) as url:
        try:
            images.load_image(url)
        except ImageError as error:
            _require_line(error)
            return "refused"
    return "read"


def _require_line(error: Exception) -> None:
    text = str(error).replace("\t", " ")
    assert not {"Cc", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, text))
    assert 0 < len(text) < 1500


@contextmanager
def _server(script: bytes) -> Any:
    """The URL of a server that plays a script; within the block, nothing else can be reached."""
    resolve, done = socket.getaddrinfo, threading.Event()

    def only_here(host: Any, number: Any, *args: Any, **options: Any) -> Any:
        if (host, number) != ("127.0.0.1", port):
            raise socket.gaierror(f"cases do not reach {host}, {number}")
        return resolve(host, number, *args, **options)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        answers = script.replace(HERE, b"127.0.0.1:%d" % port).split(NEXT)
        thread = threading.Thread(target=_play, args=(listener, answers, done))
        thread.start()
        with mock.patch.object(socket, "getaddrinfo", only_here):
            try:
                yield f"http://127.0.0.1:{port}/a"
            finally:
                done.set()
                thread.join()


def _play(listener: socket.socket, answers: list[bytes], done: threading.Event) -> None:
    listener.settimeout(0.01)
    waiting = iter(answers)
    while not done.is_set():
        with suppress(OSError):  # nobody has come yet, or the client has had enough
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(0.5)
                connection.recv(1 << 16)
                _answer(connection, next(waiting, answers[-1]), done)


def _answer(connection: socket.socket, answer: bytes, done: threading.Event) -> None:
    last = b""
    for piece in re.split(b"(%b|%b)" % (PAUSE, AGAIN), answer):
        if piece == PAUSE:
            done.wait(0.03)
        elif piece == AGAIN:
            while last and not done.wait(0.005):
                connection.sendall(last)
        else:
            connection.sendall(piece)
            last = piece
