"""Reading http(s) URLs with timeouts and limits; nothing else is ever opened."""

import http.client
import io
import ipaddress
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO, Any
from urllib.parse import quote, urlsplit, urlunsplit

from ssd.errors import as_line

TIMEOUT = 20.0
"""Seconds from the request to the answer's last header, redirects among them; and what a body may lag."""

MIN_RATE = 16 << 10
"""Bytes of the body that a server has to send in a second; it may lag by `TIMEOUT`, and not get ahead."""

CHUNK = 1 << 18
READ_ERRORS = (OSError, http.client.HTTPException)
"""What opening or reading a URL may raise: URLError, timeouts and resets among them."""


class _Deadline:
    """Until when a server has to have sent what is waited for, in however many pieces it comes."""

    def __init__(self) -> None:
        self.allow(TIMEOUT)

    def allow(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class _Reads(io.RawIOBase):
    """What comes out of a socket, up to a deadline; the socket's own timeout starts anew with each read."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, deadline: _Deadline) -> None:
        self.raw, self.sock, self.deadline = raw, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self.sock.settimeout(self.deadline.left())
        return self.raw.readinto(buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


class Response(http.client.HTTPResponse):
    """An answer, of which no read passes the deadline."""

    def __init__(self, deadline: _Deadline, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.deadline = deadline
        self.fp = io.BufferedReader(_Reads(self.fp.detach(), sock, deadline))


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet: not private, loopback, link-local or special.

    IPv6 addresses that stand for IPv4 ones are judged as those, or refused.

    >>> is_public("93.184.215.14"), is_public("127.0.0.1"), is_public("::ffff:10.0.0.1")
    (True, False, False)
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address) and found in _NAT64:
        found = ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF)
    if found.version == 6 and found not in _UNICAST:
        return False
    return found.is_global and not found.is_multicast and not any(found in each for each in _SPECIAL)


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
_UNICAST = ipaddress.IPv6Network("2000::/3")  # RFC 4291; all else is special
# Of IANA's registries of special addresses, what Python does not know in all versions: protocols, Teredo,
# 6to4 and documentation.
_SPECIAL = [ipaddress.ip_network(each) for each in ("192.0.0.0/24", "2001::/23", "2002::/16", "3fff::/20")]


def _connect(deadline: _Deadline, public_only: bool, address: tuple[str, int], *_: object) -> socket.socket:
    """A connection to the first address of a host that answers; each has its share of the time."""
    if not 0 < address[1] < 1 << 16:  # of which the system takes the lowest bits
        raise OSError(f"there is no port {address[1]}")
    places = [place for *_, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM)]
    # What is judged is what is connected to: a name that is looked up again may lead elsewhere.
    if public_only and not all(is_public(str(place[0])) for place in places):
        raise PermissionError(f"{address[0]} is not a public address of the internet")
    problem = OSError(f"{address[0]} has no address")
    for number, place in enumerate(places):
        try:
            sock = socket.create_connection(place[:2], deadline.left() / (len(places) - number))  # type: ignore[arg-type]
        except OSError as error:
            problem = error
        else:
            sock.settimeout(deadline.left())  # of TLS
            return sock
    raise problem


class _Handler(urllib.request.AbstractHTTPHandler):
    """Opens http(s), with one deadline for all."""

    def __init__(self, public_only: bool) -> None:
        super().__init__()
        self.deadline, self.public_only = _Deadline(), public_only

    def _connection(self, kind: type[http.client.HTTPConnection], host: str, **options: Any) -> Any:
        connection: Any = kind(host, **options)
        connection._create_connection = partial(_connect, self.deadline, self.public_only)
        connection.response_class = partial(Response, self.deadline)
        return connection

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(partial(self._connection, http.client.HTTPConnection), req)

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(partial(self._connection, http.client.HTTPSConnection), req)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


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
        fp.close()  # what is in it would be read whole, however long
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
def open_url(url: str, *, public_only: bool = False) -> Iterator[Response]:
    """Open an http(s) URL for reading; every redirect must be http(s) too, and the answer the whole content.

    Args:
        url: http or https.
        public_only: for URLs of strangers. A host, also one of a redirect, that has any address but
            those of `is_public` is refused, and no proxy is asked, which would look it up itself.

    Raises:
        OSError, http.client.HTTPException: `READ_ERRORS`; an HTTP error status is a `urllib.error.HTTPError`.
    """
    if not is_web_url(url):
        raise urllib.error.URLError(f"{url} is not an http(s) URL")
    parts = urlsplit(url)
    plain = "%/:=&?~#+!$,;'@()*[]"  # reserved characters, and the escapes that a URL may have already
    # Built by hand: urllib's own opener would also read file:, ftp: and data:.
    opener = urllib.request.OpenerDirector()
    for handler in (
        *(() if public_only else (urllib.request.ProxyHandler(),)),
        _Handler(public_only),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _CheckedRedirects(),
    ):
        opener.add_handler(handler)
    try:
        path, query = (quote(part, plain, errors="surrogateescape") for part in (parts.path, parts.query))
        escaped = parts._replace(path=path, query=query, fragment="")
        request = urllib.request.Request(urlunsplit(escaped), headers={"User-Agent": "ssd300"})
        response = opener.open(request)
        if response.status not in (200, 203):  # as 206, a part that was not asked for
            what = f"{response.reason}, which is not what was asked for"
            raise urllib.error.HTTPError(url, response.status, what, response.headers, response)
    except urllib.error.HTTPError as error:
        error.close()  # it is a response too, and holds the connection
        raise
    except ValueError as error:  # a host that cannot be, in the URL or in a redirect
        raise urllib.error.URLError(f"a malformed address ({error})") from error
    with response:
        yield response


def chunks(response: Response) -> Iterator[bytes]:
    """The whole body as it comes in, from a server that keeps to `MIN_RATE`.

    Raises:
        OSError, http.client.HTTPException: `READ_ERRORS`; TimeoutError from a server that only drips, and
            ConnectionError where less comes than was announced.
    """
    announced, received, left = response.length, 0, TIMEOUT
    while announced is None or received < announced:
        start = time.monotonic()
        response.deadline.allow(left)
        chunk = response.read1(CHUNK)
        if not chunk:
            break
        received += len(chunk)
        left = min(left - (time.monotonic() - start) + len(chunk) / MIN_RATE, TIMEOUT)
        yield chunk
    if announced is not None and received != announced:
        raise ConnectionError(f"the connection ended early: got {received:,} of {announced:,} bytes")


def reason(error: BaseException) -> str:
    """A short reason to show a person, for one of `READ_ERRORS`."""
    if isinstance(error, urllib.error.HTTPError):
        return as_line(f"HTTP {error.code} {error.reason}", 200)
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return reason(error.reason)
    if isinstance(error, TimeoutError) and error.errno is None:  # else it is the system's
        return "the server stopped answering, or is too slow"
    if type(error) is http.client.BadStatusLine:
        return f"the server's answer is not HTTP: {as_line(str(error), 100)}"
    return as_line(str(error), 400) or type(error).__name__
