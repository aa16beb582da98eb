"""Reading http(s) URLs with timeouts and limits; nothing else is ever opened."""

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO
from urllib.parse import quote, urlsplit, urlunsplit

TIMEOUT = 20.0
"""Seconds that connecting, or any single read, may take."""

MIN_RATE = 16 << 10
"""Bytes a second that a server has to send on average, once `TIMEOUT` has passed."""

CHUNK = 1 << 18
READ_ERRORS = (OSError, http.client.HTTPException)
"""What opening or reading a URL may raise: URLError, timeouts and resets among them."""


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if not is_web_url(newurl):
            raise urllib.error.HTTPError(req.full_url, code, f"to {newurl}, not http(s)", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_web_url(text: str) -> bool:
    """Whether this is an http or https URL with a host.

    >>> is_web_url("https://example.org/cat.jpg"), is_web_url("file:///etc/passwd"), is_web_url("C:/cat.jpg")
    (True, False, False)
    """
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme.lower() in ("http", "https") and bool(parts.netloc)


def is_url(text: str) -> bool:
    """Whether this looks like a URL of any scheme, rather than a path.

    >>> is_url("file:///etc/passwd"), is_url("data:image/png;base64,xyz"), is_url("C:/cat.jpg")
    (True, True, False)
    """
    return "://" in text or text.lower().startswith("data:")


@contextmanager
def open_url(url: str) -> Iterator[http.client.HTTPResponse]:
    """Open an http(s) URL for reading; every redirect must be http(s) too.

    Raises:
        OSError, http.client.HTTPException: `READ_ERRORS`; an HTTP error status is a `urllib.error.HTTPError`.
    """
    if not is_web_url(url):
        raise urllib.error.URLError(f"{url} is not an http(s) URL")
    parts = urlsplit(url)
    plain = "%/:=&?~#+!$,;'@()*[]"  # reserved characters, and the escapes that a URL may have already
    escaped = parts._replace(path=quote(parts.path, plain), query=quote(parts.query, plain), fragment="")
    # Built by hand: urllib's own opener would also read file:, ftp: and data:.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        _CheckedRedirects,
    ):
        opener.add_handler(handler())
    try:
        request = urllib.request.Request(urlunsplit(escaped), headers={"User-Agent": "ssd300"})
        response = opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()  # it is a response too, and holds the connection
        raise
    except ValueError as error:  # a host that cannot be, in the URL or in a redirect
        raise urllib.error.URLError(f"a malformed address ({error})") from error
    with response:
        yield response


def chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The body as it comes in.

    Raises:
        OSError, http.client.HTTPException: `READ_ERRORS`; TimeoutError from a server that only drips.
    """
    start, received = time.monotonic(), 0
    while chunk := response.read1(CHUNK):
        received += len(chunk)
        if time.monotonic() - start > TIMEOUT + received / MIN_RATE:
            raise TimeoutError("the server is too slow")
        yield chunk


def reason(error: BaseException) -> str:
    """A short reason to show a person, for one of `READ_ERRORS`."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    if isinstance(error, TimeoutError) and str(error) in ("", "timed out"):
        return "the server stopped answering"
    return str(error) or type(error).__name__
