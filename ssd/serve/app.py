"""The web application: a page, ``POST /detect``, and what monitoring asks for."""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import math
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from ssd import __version__
from ssd.detections import Detections
from ssd.detector import Detector
from ssd.drawing import class_color
from ssd.errors import ImageMemoryError, MissingExtra, NonFiniteError, UserError, as_line
from ssd.labels import category_ids
from ssd.serve.batches import Batches, Busy
from ssd.serve.bodies import TOLD, images_of

try:
    from fastapi import FastAPI, Query, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from pydantic import BaseModel, ConfigDict, Field
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise MissingExtra("serve") from error

T = TypeVar("T")

PAGE = Path(__file__).with_name("page.html")

_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    408: {"Connection": "close"},  # or the rest of the body would go on coming
    413: {"Connection": "close"},
    503: {"Retry-After": "1"},  # seconds
}

_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # of latency, in seconds


@dataclass(frozen=True)
class Limits:
    """What one request, and all together, may take."""

    max_bytes: int = 32 << 20
    """Of a request's body, and of an image that is fetched from a URL."""
    max_pixels: int = 64_000_000
    """Of an image; see `ssd.load_image`."""
    queue: int = 64
    """Images under way, and requests; those that come then are answered 503."""
    timeout: float = 30.0
    """Seconds for a request to come in, and for its answer."""


# --- What comes in and goes out, for OpenAPI --------------------------------------------------------------


class Choices(BaseModel):
    """The query of ``POST /detect``."""

    model_config = ConfigDict(extra="forbid")
    score_threshold: Annotated[
        Annotated[float, Field(ge=0, le=1)] | Literal["calibrated"],
        Field(description="Least score, or that of each class as training found it."),
    ] = 0.4
    classes: Annotated[str | None, Field(description="Only these, as in person,dog.")] = None
    max_detections: Annotated[int, Field(ge=1, le=200, description="Most objects of an image.")] = 100
    annotate: Annotated[
        bool, Field(description="Answer with a picture (JPEG) of the one image, with boxes and labels.")
    ] = False


class DetectionModel(BaseModel):
    """One object."""

    name: str
    class_id: int
    score: float
    box: Annotated[list[float], Field(description="Left, top, right, bottom in pixels, upright.")]


class ResultModel(BaseModel):
    """The objects of an image, best first."""

    source: str
    width: int
    height: int
    detections: list[DetectionModel]


class ResultsModel(BaseModel):
    """Of all images of a request, in their order."""

    results: list[ResultModel]


class ErrorModel(BaseModel):
    """What was wrong, and with which image."""

    error: str


_IMAGE = {"type": "string", "format": "binary"}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"file": {"type": "array", "items": _IMAGE}}}
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["images"],
                    "properties": {
                        "images": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "properties": {
                                    "name": {"type": "string"},
                                    "data": {"type": "string", "format": "byte"},
                                    "url": {"type": "string", "format": "uri"},
                                },
                            },
                        }
                    },
                }
            },
            "image/*": {"schema": _IMAGE},
        },
    }
}


class Refused(Exception):
    """A request that is not answered with what it asked for."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status, _HEADERS.get(status))


def _problem_of(error: RequestValidationError) -> str:
    first = error.errors()[0]
    name = first["loc"][1]
    if first["type"] == "extra_forbidden":
        return as_line(f"{name}: there is no such option; there are {', '.join(Choices.model_fields)}")
    # One for each kind of value that the option takes.
    problems = dict.fromkeys(each["msg"] for each in error.errors() if each["loc"][1] == name)
    return as_line(f"{name}: {'; or: '.join(problems)}")


# --- The application --------------------------------------------------------------------------------------


def make_app(
    detector: Detector,
    *,
    model: str = "",
    batch_size: int = 8,
    max_wait: float = 0.01,
    limits: Limits = Limits(),
    token: str | None = None,
    allow_urls: bool = False,
    hosts: Sequence[str] = (),
) -> FastAPI:
    """The application, for any ASGI server; its threads end with its lifespan.

    Args:
        detector: of any backend.
        model: what ``/info`` calls it.
        batch_size: most images in the network at a time.
        max_wait: most seconds that an image waits for a batch to fill.
        limits: of a request, and of all.
        token: that programs send as ``Authorization: Bearer TOKEN``, and the page asks for; None for none.
        allow_urls: whether images may be given by URL; never of private addresses.
        hosts: names under which the server is reached, besides localhost and any IP address.
    """
    batches = Batches(
        detector,
        batch_size=batch_size,
        max_wait=max_wait,
        most=limits.queue,
        max_pixels=limits.max_pixels,
        max_bytes=limits.max_bytes,
    )
    metrics = _Metrics()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batches.close)

    app = FastAPI(
        title="ssd serve", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )  # their pages load from elsewhere
    app.add_middleware(_Guard, limits=limits, metrics=metrics, token=token, hosts=hosts)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return _refusal(error.status, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _refusal(400, _problem_of(error))

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    page = PAGE.read_text(encoding="utf-8")
    policy = {"Content-Security-Policy": _policy_of(page), "Cache-Control": "no-cache"}

    @app.get("/", include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers=policy)

    @app.get("/favicon.ico", include_in_schema=False)
    async def no_icon() -> Response:
        return Response(status_code=204)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> str:
        """Counters, for Prometheus."""
        return metrics.text(batches)

    @app.get("/info")
    async def info() -> dict[str, Any]:
        """The model, its classes, the limits and the version."""
        return {
            "version": __version__,
            "model": model,
            "backend": detector.backend.name,
            "device": str(detector.device),
            "precision": detector.precision,
            "size": detector.layout.size,
            "classes": list(detector.class_names),
            "category_ids": list(detector.category_ids or category_ids(detector.class_names)),
            "colors": [f"#{bytes(class_color(i)).hex()}" for i in range(len(detector.class_names))],
            "calibrated": bool(detector.score_thresholds),
            "urls": allow_urls,
            "limits": {**vars(limits), "batch_size": batch_size},
        }

    @app.post(
        "/detect",
        openapi_extra=_BODY,
        response_model=ResultsModel,
        responses={
            200: {"content": {"image/jpeg": {}}},
            **{kind: {"model": ErrorModel, "description": "An error"} for kind in ("4XX", "5XX")},
        },
    )
    async def detect(request: Request, choices: Annotated[Choices, Query()]) -> Response:
        """Detect objects in images: files of a form, one image as the body, or JSON with base64 or URLs."""
        try:
            classes = None if choices.classes is None else choices.classes.split(",")
            options = detector.options(
                choices.score_threshold, max_detections=choices.max_detections, classes=classes
            )
        except ValueError as error:
            raise Refused(400, as_line(str(error))) from error
        try:
            body = await asyncio.wait_for(request.body(), limits.timeout)
        except asyncio.TimeoutError as error:
            raise Refused(408, f"the request did not come in within {limits.timeout:g} s") from error
        kind, read = request.headers.get("content-type", ""), partial(images_of, most=limits.queue)
        try:
            images = await asyncio.to_thread(read, kind, body, allow_urls=allow_urls)
        except ValueError as error:
            raise Refused(400, str(error)) from error
        if choices.annotate and len(images) != 1:
            raise Refused(400, f"annotate=1 gives one picture, of one image; got {len(images)}")
        try:
            futures = batches.submit(images, options)
        except Busy as error:
            raise Refused(503, "too many images are under way; try again") from error
        del images, body
        found = await _unless_gone(request, _results(futures), limits.timeout)
        if not choices.annotate:
            text = json.dumps({"results": [each.to_dict() for each in found]}, ensure_ascii=False)
            return Response(text, media_type="application/json")
        drawn = asyncio.to_thread(found[0].picture_for, "picture.jpg")
        return Response(bytes(await _unless_gone(request, drawn, limits.timeout)), media_type="image/jpeg")

    return app


async def _results(futures: "list[Future[Detections]]") -> list[Detections]:
    """Of all images; where this is cancelled, or one of them fails, the others leave the queue."""
    try:
        return [await asyncio.wrap_future(each) for each in futures]
    finally:
        for each in futures:
            each.cancel()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T], timeout: float) -> T:
    """What is waited for, unless the client goes or it takes too long; it is then cancelled."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = doing, leaving = asyncio.create_task(work), asyncio.create_task(leave())
    try:
        await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        if leaving.done():
            raise ClientDisconnect
        raise Refused(503, f"it took longer than {timeout:g} s; try again")
    except (ImageMemoryError, NonFiniteError) as error:
        raise Refused(503 if isinstance(error, ImageMemoryError) else 500, str(error)) from error
    except (UserError, OSError) as error:
        raise Refused(400, as_line(str(error))) from error
    finally:
        for task in tasks:
            task.cancel()


# --- Before and after each request ------------------------------------------------------------------------


class _Guard:
    """Refuses what other sites send, who has no token, and what is too much; counts the rest."""

    def __init__(
        self, app: ASGIApp, limits: Limits, metrics: "_Metrics", token: str | None, hosts: Sequence[str]
    ) -> None:
        self.app, self.limits, self.metrics, self.hosts = app, limits, metrics, frozenset(hosts)
        self.token = None if token is None else token.encode()
        self.under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0  # until an answer has begun

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers.setdefault("Cache-Control", "no-store")
                headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
            await send(message)

        is_detection = scope["path"] == "/detect" and scope["method"] == "POST"
        problem = self._problem(scope["path"], Headers(scope=scope), is_detection)
        self.under_way += is_detection
        try:
            if problem is not None:
                await problem(scope, receive, sent)
            else:
                await self.app(scope, self._limited(receive), sent)
        except ClientDisconnect:
            pass
        except Exception:
            if not status:
                await _refusal(500, "an error of the server's own; its log has more")(scope, receive, sent)
            raise  # to the log
        finally:
            self.under_way -= is_detection
            if is_detection:
                # 499 is of clients that left, as nginx has it.
                self.metrics.add(status or 499, time.perf_counter() - start)

    def _problem(self, path: str, headers: Headers, is_detection: bool) -> Response | None:
        host = headers.get("host", "")
        if not _is_ours(host, self.hosts):
            return _refusal(
                403, f"this server is not known as {as_line(host, TOLD)}; start it with --host-name NAME"
            )
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
            return _refusal(403, "requests of pages of other sites are not answered")
        if self.token is not None and path not in ("/", "/healthz", "/favicon.ico"):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("latin-1"), self.token)
            if scheme.lower() != "bearer" or not right:
                return _refusal(401, "this needs a token: Authorization: Bearer TOKEN")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.limits.max_bytes:
            return _refusal(413, self._too_large())
        if is_detection and self.under_way >= self.limits.queue:
            return _refusal(503, "too many requests are under way; try again")
        return None

    def _too_large(self) -> str:
        return f"the request is larger than {self.limits.max_bytes / (1 << 20):g} MiB"

    def _limited(self, receive: Receive) -> Receive:
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limits.max_bytes:
                raise Refused(413, self._too_large())
            return message

        return limited


def _is_ours(host: str, names: frozenset[str]) -> bool:
    """Whether a Host header is of this server; a name that somebody made to lead here is not."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost" or name in names
    return True


def _policy_of(page: str) -> str:
    """The Content-Security-Policy under which a page's own scripts and styles run, and nothing else."""

    def digests(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in found]
        return " ".join(f"'sha256-{each}'" for each in hashes)

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; "
        "img-src blob: data:; media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


# --- Metrics ----------------------------------------------------------------------------------------------


class _Metrics:
    """Requests for detection, as Prometheus reads them (its text format 0.0.4)."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.buckets: Counter[float] = Counter()
        self.seconds = 0.0

    def add(self, status: int, seconds: float) -> None:
        self.statuses[status] += 1
        self.seconds += seconds
        self.buckets[next((most for most in _BUCKETS if seconds <= most), math.inf)] += 1

    def text(self, batches: Batches) -> str:
        counts, total = batches.counts, sum(self.statuses.values())
        lines = ["# TYPE ssd_requests_total counter"]
        lines += [f'ssd_requests_total{{status="{key}"}} {n}' for key, n in sorted(self.statuses.items())]
        lines += ["# TYPE ssd_request_seconds histogram"]
        for most in (*_BUCKETS, math.inf):
            name = "+Inf" if most == math.inf else most
            within = sum(n for bound, n in self.buckets.items() if bound <= most)
            lines.append(f'ssd_request_seconds_bucket{{le="{name}"}} {within}')
        lines += [f"ssd_request_seconds_sum {self.seconds}", f"ssd_request_seconds_count {total}"]
        for name, kind, value in (
            ("ssd_images_total", "counter", counts.images),
            ("ssd_batches_total", "counter", counts.batches),
            ("ssd_read_seconds_total", "counter", counts.reading),
            ("ssd_detect_seconds_total", "counter", counts.detecting),
            ("ssd_images_under_way", "gauge", batches.under_way),
        ):
            lines += [f"# TYPE {name} {kind}", f"{name} {value}"]
        return "\n".join(lines) + "\n"
