import socket
import threading

import pytest

from ssd import web

RESOLVE = socket.getaddrinfo  # which reads numbers of all forms, and asks no network for them
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def body_of(url):
    with web.open_url(url) as response:
        return b"".join(web.chunks(response))


def plays(server, *script):
    """A page that sends pieces, and repeats the last, slowly, for as long as anyone listens."""

    def answer(handler):
        for piece in script:
            handler.wfile.write(piece)
        while not server.closing.wait(0.02):
            handler.wfile.write(script[-1])

    server.pages["/endless"] = answer
    return server.url("/endless")


@pytest.mark.parametrize(
    "script",
    [
        [b"H"],
        [b"HTTP/1.1 200 ", b"O"],
        [OK, b"X-A: b\r\n"],
        [OK + b"X-A: ", b"b"],
        [b"HTTP/1.1 100 Continue\r\n\r\n"],
        [b"HTTP/1.1 100 Continue\r\n", b"X-A: b\r\n"],
        [CHUNKED, b"0"],
        [CHUNKED + b"5;a=", b"b"],
        [CHUNKED, b"1\r\nx\r\n"],
        [CHUNKED + b"5\r\nwhole\r\n0\r\n", b"X-A: b\r\n"],
        [OK + b"Content-Length: 1000000\r\n\r\n", b"x"],
        [OK + b"\r\n", b"x"],
        [OK + b"\r\n" + b"x" * 100_000, b"x"],
        [b"HTTP/1.1 302 Found\r\nLocation: /endless\r\nContent-Length: 1000000\r\n\r\n", b"x"],
        [b"HTTP/1.1 302 Found\r\nLocation: /endless\r\n", b"X-A: b\r\n"],
    ],
    ids=[
        *("status line", "reason", "headers", "header", "continue", "headers of continue"),
        *("chunk size", "chunk extension", "chunks", "trailers", "body", "body without an end"),
        *("body that slows down", "body of a redirect", "headers of a redirect"),
    ],
)
def test_no_endless_answer_is_waited_for(server, monkeypatch, script):
    monkeypatch.setattr(web, "TIMEOUT", 0.2)
    monkeypatch.setattr(web, "MIN_RATE", 1000)  # of which a piece every 0.02 s falls short
    with pytest.raises(web.READ_ERRORS) as caught:
        body_of(plays(server, *script))
    assert any(part in web.reason(caught.value) for part in ("too slow", "infinite loop", "100 headers"))


def test_tls_that_never_ends_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(web, "TIMEOUT", 0.2)
    closing = threading.Event()

    def drip():
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"\x16\x03\x03\x40\x00")  # a record of 16 kB
            while not closing.wait(0.02):
                connection.sendall(b"\0")

    def until_it_leaves():
        try:
            drip()
        except OSError:
            pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=until_it_leaves)
        thread.start()
        with pytest.raises(web.READ_ERRORS) as caught:
            body_of(f"https://127.0.0.1:{listener.getsockname()[1]}/")
        closing.set()
        thread.join()
    assert web.reason(caught.value) == "the server stopped answering, or is too slow"


def test_a_slow_reader_is_not_taken_for_a_slow_server(server, monkeypatch):
    monkeypatch.setattr(web, "CHUNK", 10)
    with web.open_url(server.serve("/a", b"x" * 100)) as response:
        now, body = web.time.monotonic(), b""
        monkeypatch.setattr(web.time, "monotonic", lambda: now)
        for piece in web.chunks(response):
            body += piece
            now += 2 * web.TIMEOUT
    assert body == b"x" * 100


@pytest.mark.parametrize("status", [201, 202, 204, 206])
def test_an_answer_that_is_not_what_was_asked_for(server, status):
    url = server.serve("/a", b"abc" if status != 204 else b"", status=status)
    with pytest.raises(web.READ_ERRORS) as caught:
        body_of(url)
    assert web.reason(caught.value).startswith(f"HTTP {status} ")
    assert web.reason(caught.value).endswith(", which is not what was asked for")


def test_a_body_has_to_be_as_long_as_announced(server):
    assert body_of(server.serve("/a", b"abc")) == b"abc"
    assert body_of(server.serve("/a", b"abc", length=2)) == b"ab"
    with pytest.raises(ConnectionError, match=r"ended early: got 3 of 1,000 bytes"):
        body_of(server.serve("/a", b"abc", length=1000))


def test_a_host_is_reached_by_any_of_its_addresses(server, monkeypatch):
    url = server.serve("/a", b"abc").replace("127.0.0.1", "localhost")
    resolve = socket.getaddrinfo
    with socket.create_server(("127.0.0.1", 0)) as refusing:
        port = refusing.getsockname()[1]

    def several(host, *args, **kwargs):
        found = resolve("127.0.0.1", *args, **kwargs)
        return [(*found[0][:4], ("127.0.0.1", port)), *found] if host == "localhost" else found

    monkeypatch.setattr(socket, "getaddrinfo", several)
    assert body_of(url) == b"abc"


def test_a_port_that_cannot_be_is_told(server):
    port = int(server.address.rpartition(":")[2]) + (1 << 16)
    with pytest.raises(web.READ_ERRORS) as caught:
        body_of(f"http://127.0.0.1:{port}/a")
    assert web.reason(caught.value) == f"there is no port {port}"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"SSH-2.0-OpenSSH\x1b[31m\r\n", "the server's answer is not HTTP: SSH-2.0-OpenSSH\\x1b[31m"),
        (b"HTTP/1.1 404 " + b"x" * 60_000 + b"\r\n\r\n", "HTTP 404 xxxx"),
        (OK + b"A: " + b"x" * 70_000, "got more than 65536 bytes when reading header line"),
    ],
)
def test_what_a_server_says_is_shown_in_a_line(server, answer, told):
    server.pages["/a"] = lambda handler: handler.wfile.write(answer)
    with pytest.raises(web.READ_ERRORS) as caught:
        body_of(server.url("/a"))
    assert web.reason(caught.value).startswith(told)
    assert len(web.reason(caught.value)) < 250


def test_a_proxy_is_asked(server, monkeypatch):
    url = server.serve("http://photos.example.org/a", b"abc")
    address = server.address
    assert url.startswith(address)
    monkeypatch.setenv("http_proxy", address)
    monkeypatch.setenv("no_proxy", "")
    assert body_of("http://photos.example.org/a") == b"abc"


# --- Addresses that strangers name ------------------------------------------------------------------------

SPECIAL = [
    *("127.0.0.1", "127.255.0.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.0.1", "100.64.0.1"),
    *("169.254.169.254", "192.0.0.8", "192.0.2.1", "198.18.0.1", "203.0.113.9", "224.0.0.1", "240.0.0.1"),
    *(
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd12::1",
        "ff02::1",
        "2001:db8::1",
    ),
    *("::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:10.0.0.1", "::127.0.0.1", "::ffff:0:127.0.0.1"),
    *("64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2001::1", "fec0::1"),
]
PUBLIC = ["8.8.8.8", "93.184.215.14", "172.32.0.1", "2606:4700:4700::1111", "64:ff9b::808:808"]


@pytest.mark.parametrize("address", SPECIAL)
def test_special_addresses_are_not_public(address):
    assert not web.is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address):
    assert web.is_public(address)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "0",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "localhost",
    ],
)
def test_no_spelling_of_a_special_address_is_connected_to(server, monkeypatch, host):
    url = server.serve("/a", b"secret").replace("127.0.0.1", host)
    monkeypatch.setattr(socket, "getaddrinfo", RESOLVE)
    monkeypatch.setenv("http_proxy", server.address)  # which would look the host up itself
    with pytest.raises(web.READ_ERRORS) as caught, web.open_url(url, public_only=True):
        pass
    assert web.reason(caught.value) == f"{host.strip('[]')} is not a public address of the internet"
    assert server.requests == []


def test_redirects_are_judged_too(server, monkeypatch):
    inner = server.serve("/inner", b"secret").replace("127.0.0.1", "localhost")
    url = server.serve("/a", b"", status=302, headers={"Location": inner})
    resolve = socket.getaddrinfo
    monkeypatch.setattr(web, "is_public", lambda address: address == "127.0.0.1")
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **options: (
            [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.2", rest[0]))]
            if host == "localhost"
            else resolve(host, *rest, **options)
        ),
    )
    with pytest.raises(web.READ_ERRORS) as caught, web.open_url(url, public_only=True):
        pass
    assert web.reason(caught.value) == "localhost is not a public address of the internet"
    assert server.requests == ["/a"]


def test_a_name_is_looked_up_once_and_what_was_judged_is_connected_to(monkeypatch):
    answers = [["93.184.215.14"], ["127.0.0.1"]]  # as by a name whose owner changes it in between
    reached = []

    def resolve(host, port, **_):
        assert host == "rebinds.example"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in answers.pop(0)]

    def connect(address, *_):
        reached.append(address)
        raise ConnectionRefusedError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(web.READ_ERRORS), web.open_url("http://rebinds.example/a", public_only=True):
        pass
    assert reached == [("93.184.215.14", 80)]
    assert len(answers) == 1


def test_a_name_with_one_special_address_is_refused(monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 80)) for each in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with (
        pytest.raises(web.READ_ERRORS, match="not a public"),
        web.open_url("http://a.example/", public_only=True),
    ):
        pass
