import http.client
import re
import signal
import socket
import subprocess
import sys

import pytest
from conftest import command


@pytest.fixture
def started(weights_file, tmp_path):
    """Starts the command on a free port, and gives its process and the port."""
    running = []

    def start(*arguments):
        process = subprocess.Popen(
            command("serve", weights_file, "--port", 0, *arguments),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        )  # fmt: skip
        running.append(process)
        line = process.stdout.readline()
        assert re.fullmatch(r"Detector\(3 classes, .*\): http://127\.0\.0\.1:\d+/\n", line), (
            process.stderr.read()
        )
        return process, int(line.rstrip("/\n").rpartition(":")[2])

    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_after_what_is_under_way(started, photos, name):
    process, port = started()
    body = (photos / "coffee.jpg").read_bytes()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest("POST", "/detect")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body[:1000])
    asked = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    asked.request("GET", "/info")  # that it has taken up the first request, too
    asked.getresponse().read()
    process.send_signal(getattr(signal, name))
    while True:  # it listens no more
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            break
    connection.send(body[1000:])
    response = connection.getresponse()
    assert response.status == 200
    assert response.read().startswith(b'{"results": [{"source": "image 0", "width": 600')
    for each in (connection, asked):
        each.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == ""


def test_options_reach_the_server(run, monkeypatch, weights_file):
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from ssd.serve import app

    made = {}
    real = app.make_app
    monkeypatch.setattr(
        app, "make_app", lambda *args, **options: made.update(options) or real(*args, **options)
    )
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda self, sockets: (self.config.load(), made.update(config=self.config))
    )
    monkeypatch.setattr("ssd.cli.common.keep_memory", lambda most: made.update(kept=most))
    monkeypatch.setenv("SSD_TOKEN", "secret")
    status, _, err = run(
        *(
            "serve",
            weights_file,
            "--port",
            0,
            "--host",
            "0.0.0.0",
            "--allow-urls",
            "--host-name",
            "A.example",
        ),
        *("--max-megabytes", 1, "--max-pixels", 1000, "--queue", 3, "--timeout", 2, "--max-wait", 5),
    )
    assert (status, err) == (0, "")
    assert made["limits"] == app.Limits(1 << 20, 1000, 3, 2.0)
    assert (made["token"], made["hosts"], made["allow_urls"]) == ("secret", ["a.example"], True)
    assert (made["max_wait"], made["batch_size"]) == (0.005, 8)
    assert made["kept"] == 256 << 20
    assert made["config"].http_protocol_class is H11Protocol


def test_an_open_door_is_told(run, monkeypatch, weights_file):
    import uvicorn

    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    status, _, err = run("serve", weights_file, "--port", 0, "--host", "0.0.0.0")
    assert status == 0
    assert err == "ssd: whoever reaches this address may use it; --token TOKEN asks for one\n"


def test_a_port_that_is_taken(run, weights_file):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, err = run("serve", weights_file, "--port", port)
    assert status == 1
    assert err == (
        f"ssd: cannot listen on port {port} of 127.0.0.1 (Address already in use); "
        "choose another --port, or 0 for a free one\n"
    )


def test_without_the_extra(run, monkeypatch, weights_file):
    for name in ("uvicorn", "fastapi"):
        monkeypatch.setitem(sys.modules, name, None)
        status, _, err = run("serve", weights_file)
        assert (status, err) == (1, "ssd: this needs an extra: pip install 'ssd300[serve]'\n")
