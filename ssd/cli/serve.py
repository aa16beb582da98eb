"""``ssd serve``."""

import os
import socket
from contextlib import suppress
from typing import Annotated

import typer
from PIL import Image

from ssd.cli.common import AUTO, BatchSize, Device, Precision, chosen_device, load_detector
from ssd.distributed import World
from ssd.errors import MissingExtra, UserError


def serve(
    model: Annotated[
        str, typer.Argument(help='"coco", "shapes", a checkpoint or exported file, a URL.')
    ] = "coco",
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(envvar="SSD_TOKEN", help="That requests have to bring; better in SSD_TOKEN, unseen."),
    ] = None,
    host_name: Annotated[
        list[str] | None, typer.Option(help="A name under which it is reached, as behind a proxy.")
    ] = None,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch images by URL, of public addresses alone.")
    ] = False,
    device: Device = None,
    precision: Precision = AUTO,
    batch_size: BatchSize = 8,
    max_wait: Annotated[
        float, typer.Option(min=0, help="Milliseconds that an image waits for a batch to fill.")
    ] = 10,
    queue: Annotated[
        int, typer.Option(min=1, help="Most images, and requests, under way; more are answered 503.")
    ] = 64,
    max_megabytes: Annotated[float, typer.Option(min=0.001, help="Most of a request (MiB).")] = 32,
    max_pixels: Annotated[int, typer.Option(min=1, help="Most of an image.")] = 64_000_000,
    timeout: Annotated[float, typer.Option(min=0.001, help="Most seconds of a request.")] = 30,
) -> None:
    """Ctrl-C or SIGTERM ends it, after what is under way."""
    try:
        import uvicorn  # noqa: PLC0415 (an extra)

        from ssd.serve.app import Limits, make_app  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("serve") from error
    if token == "":
        raise typer.BadParameter("is empty", param_hint="--token")
    with _listening(host, port) as listener:
        detector = load_detector(model, World(0, 1, chosen_device(device)), device, precision)
        detector(Image.new("RGB", (64, 64)))  # the first one takes longest
        app = make_app(
            detector,
            model=model,
            batch_size=batch_size,
            max_wait=max_wait / 1000,
            limits=Limits(round(max_megabytes * (1 << 20)), max_pixels, queue, timeout),
            token=token,
            allow_urls=allow_urls,
            hosts=[name.lower() for name in host_name or ()],
        )
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                http="h11",  # httptools, if it is there, limits no headers
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=round(2 * timeout + 1),
            )
        )
        at = f"[{host}]" if ":" in host else host
        typer.echo(f"{detector}: http://{at}:{listener.getsockname()[1]}/")
        if token is None and host not in ("127.0.0.1", "::1", "localhost"):
            typer.echo("ssd: whoever reaches this address may use it; --token TOKEN asks for one", err=True)
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again that it ended for
            server.run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        is_systems = isinstance(error.errno, int) and error.errno > 0  # whose own words repeat the address
        reason = os.strerror(error.errno or 0) if is_systems else error.strerror
        raise UserError(
            f"cannot listen on port {port} of {host} ({reason}); choose another --port, or 0 for a free one"
        ) from error
