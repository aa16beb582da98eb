"""A real server of `ssd.serve.app` on loopback, for the tests."""

import socket
import threading
from contextlib import contextmanager

import uvicorn

from ssd.serve.app import make_app


@contextmanager
def serving(detector, **options):
    """The address of a server in a thread, on a free port."""
    app = make_app(detector, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
