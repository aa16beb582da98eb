import base64
import contextlib
import gc
import io
import random
import re
import socket
import threading
import tracemalloc
from itertools import pairwise

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import serving

from ssd import web
from ssd.detector import Detector
from ssd.errors import NonFiniteError
from ssd.pixels import Room
from ssd.serve.app import PAGE, Limits, _is_ours, _policy_of

NAMES = ("astronaut", "chelsea", "coffee")
THRESHOLD = 0.35


@pytest.fixture(scope="module")
def address(detector):
    with serving(detector, model="small") as found:
        yield found


@pytest.fixture(scope="module")
def files(photos):
    return {f"{name}.jpg": (photos / f"{name}.jpg").read_bytes() for name in NAMES}


def post(address, options="", **content):
    return httpx.post(f"{address}/detect?{options}", timeout=60, **content)


def connected(address):
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)))


def as_form(files):
    return {"files": [("file", item) for item in files.items()]}


def as_json(files):
    images = [{"name": name, "data": base64.b64encode(data).decode()} for name, data in files.items()]
    return {"json": {"images": images}}


def assert_same(answer, expected):
    """The same detections; the network's numbers differ a little with the size of the batch."""
    assert answer.status_code == 200, answer.text
    found = answer.json()["results"]
    assert len(found) == len(expected)
    for one, other in zip(found, (each.to_dict() for each in expected), strict=True):
        assert one.keys() == other.keys()
        assert (one["source"], one["width"], one["height"]) == (
            other["source"],
            other["width"],
            other["height"],
        )
        assert len(one["detections"]) == len(other["detections"]) > 0
        for mine, theirs in zip(one["detections"], other["detections"], strict=True):
            assert (mine["name"], mine["class_id"]) == (theirs["name"], theirs["class_id"])
            assert mine["score"] == pytest.approx(theirs["score"], abs=1e-4)
            assert mine["box"] == pytest.approx(theirs["box"], abs=0.1)


# --- What is asked for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [as_form, as_json])
def test_many_images_give_what_the_detector_gives(address, detector, files, way):
    from ssd.sources import Named

    expected = detector([Named(*each) for each in files.items()], score_threshold=THRESHOLD)
    assert_same(post(address, f"score_threshold={THRESHOLD}", **way(files)), expected)


@pytest.mark.parametrize(
    "kind", ["image/jpeg", "application/octet-stream", "application/x-www-form-urlencoded", None]
)
def test_the_body_may_be_one_image(address, detector, files, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    answer = post(address, f"score_threshold={THRESHOLD}", content=files["coffee.jpg"], headers=headers)
    assert_same(answer, detector([files["coffee.jpg"]], score_threshold=THRESHOLD))


def test_options(address, detector, files):
    body = files["chelsea.jpg"]
    chosen = {"score_threshold": 0.1, "classes": ["cat", "person"], "max_detections": 3}
    query = "score_threshold=0.1&classes=cat,person&max_detections=3"
    assert_same(post(address, query, content=body), detector([body], **chosen))


def test_a_picture(address, detector, files):
    body = files["coffee.jpg"]
    answer = post(address, f"annotate=1&score_threshold={THRESHOLD}", content=body)
    assert answer.headers["content-type"] == "image/jpeg"
    with Image.open(io.BytesIO(answer.content)) as picture, Image.open(io.BytesIO(body)) as source:
        mine, before = np.asarray(picture, int), np.asarray(source, int)
        expected = detector(body, score_threshold=THRESHOLD).picture_for("picture.jpg")
        with Image.open(io.BytesIO(expected)) as drawn:
            theirs = np.asarray(drawn, int)
    assert mine.shape == before.shape
    assert (mine != before).any()
    assert np.abs(mine - theirs).mean() < 1


def test_a_picture_waits_for_room_in_memory(address, files, monkeypatch):
    """It is read anew, which takes as much as the first time."""
    taken, real = [], Room.taken
    monkeypatch.setattr(Room, "taken", lambda room, pixels: taken.append(pixels) or real(room, pixels))
    assert post(address, "annotate=1", content=files["coffee.jpg"]).status_code == 200
    assert taken == [600 * 400] * 2


def test_what_the_server_tells_of_itself(address, detector):
    info = httpx.get(f"{address}/info").json()
    assert (info["model"], info["size"], info["classes"]) == ("small", 300, ["cat", "cup", "person"])
    assert info["category_ids"] == [1, 2, 3]
    assert len(info["colors"]) == 3
    assert info["limits"]["max_bytes"] == Limits().max_bytes
    assert httpx.get(f"{address}/healthz").json() == {"status": "ok"}
    described = httpx.get(f"{address}/openapi.json").json()["paths"]["/detect"]["post"]
    assert {each["name"] for each in described["parameters"]} >= {"score_threshold", "classes", "annotate"}
    assert {"multipart/form-data", "application/json"} < described["requestBody"]["content"].keys()
    assert "422" not in described["responses"]
    for path in ("/docs", "/redoc"):  # which load from elsewhere
        assert httpx.get(address + path).status_code == 404


def test_metrics(detector, files):
    with serving(detector) as address:
        post(address, content=files["coffee.jpg"])
        post(address, content=b"no image")
        lines = httpx.get(f"{address}/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert all(re.fullmatch(r'[a-z_]+(\{(le|status)="[\w.+]+"\})?', name) for name in values)
    assert (values['ssd_requests_total{status="200"}'], values['ssd_requests_total{status="400"}']) == (
        "1",
        "1",
    )
    assert values["ssd_images_total"] == values["ssd_batches_total"] == "1"
    assert values['ssd_request_seconds_bucket{le="+Inf"}'] == values["ssd_request_seconds_count"] == "2"
    assert values["ssd_images_under_way"] == "0"
    rising = [int(value) for name, value in values.items() if "bucket" in name]
    assert rising == sorted(rising)


# --- What is refused --------------------------------------------------------------------------------------

BAD = {
    "no image": ({"content": b""}, "", "image 0: the file is empty"),
    "text": ({"content": b"hello"}, "", "image 0: this is a text file"),
    "cut off": ({"files": {"file": ("cut.png", b"\x89PNG\r\n\x1a\n" + bytes(30))}}, "", "cut.png: "),
    "empty form": ({"files": {}, "data": {}, "headers": {"Content-Type": "multipart/form-data; boundary=x"},
                    "content": b"--x--\r\n"}, "", ""),
    "no boundary": ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, "", "the form"),
    "half a form": ({"content": b"--b\r\nContent-Disposition: form-data; name=a; filename=a\r\n\r\n",
                     "headers": {"Content-Type": "multipart/form-data; boundary=b"}}, "", "its last"),
    "a text in a form": ({"files": {"file": b"x"}, "data": {"score": "1"}}, "", "score: a form"),
    "no JSON": ({"content": b"{", "headers": {"Content-Type": "application/json"}}, "", "JSON has to be as "),
    "deep JSON": ({"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}}, "", "JSON"),
    "no images": ({"json": {"images": []}}, "", "no image in the request"),
    "another shape": ({"json": {"images": [1]}}, "", "JSON has to be as "),
    "no data": ({"json": {"images": [{"name": "a.jpg"}]}}, "", "a.jpg: an image has either data or url"),
    "no base64": ({"json": {"images": [{"name": "a.jpg", "data": "é"}]}}, "", "a.jpg: its data is"),
    "a number": ({"json": {"images": [{"data": 1}]}}, "", "image 0: its data is not base64 (it is no text)"),
    "a typing error": ({"json": {"images": [{"date": "x"}]}}, "", "image 0: an image has either data or url"),
    "a URL": ({"json": {"images": [{"url": "http://example.org/a"}]}}, "", "are not fetched here"),
    "a surrogate": ({"content": b'{"images": [{"name": "\\ud800", "data": "eA=="}]}',
                     "headers": {"Content-Type": "application/json"}}, "", "\\ud800: "),
    "no threshold": ({"content": b"x"}, "score_threshold=2", "score_threshold: "),
    "no number": ({"content": b"x"}, "score_threshold=high", "; or: Input should be 'calibrated'"),
    "not calibrated": ({"content": b"x"}, "score_threshold=calibrated", "these weights have none"),
    "no class": ({"content": b"x"}, "classes=cats", "did you mean cat?"),
    "no option": ({"content": b"x"}, "treshold=0.5", "treshold: there is no such option; there are score_"),
    "many pictures": ({"json": {"images": [{"data": ""}, {"data": ""}]}}, "annotate=1", "one picture"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_say_what_is_wrong(address, case):
    content, query, told = BAD[case]
    if "content" in content:
        content = {key: value for key, value in content.items() if key not in ("files", "data")}
    answer = post(address, query, **content)
    assert answer.status_code == 400, answer.text
    assert told in answer.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/detect", 405), ("GET", "/x", 404), ("POST", "/", 405)]
)
def test_other_requests_are_answered_in_json(address, method, path, status):
    answer = httpx.request(method, address + path)
    assert answer.status_code == status
    assert answer.json()["error"]


@pytest.mark.slow
def test_a_thousand_bad_requests(address, files):
    rng = random.Random(0)
    photo = files["chelsea.jpg"]
    kinds = [
        "image/png",
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=b",
        "x",
        "",
    ]
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nX\r\n--b--\r\n'
    seeds = [
        b"",
        photo[:200],
        b'{"images": [{"data": "eA=="}]}',
        form,
        b"GIF89a" + bytes(20),
        rng.randbytes(300),
    ]

    def body():
        content = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(content) + 1)
            content[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(6))
        return bytes(content)

    def query():
        name = rng.choice(["score_threshold", "classes", "annotate", "max_detections", "x", ""])
        return f"{name}={rng.choice(['', '1', '-1', 'nan', '1e999', 'cat', '%00', '%ff', '9' * 50])}"

    statuses = set()
    with httpx.Client(base_url=address, timeout=60) as client:

        def send(count):
            for _ in range(count):
                answer = client.post("/detect", params=rng.choice(["", query()]), content=body(),
                                     headers={"Content-Type": rng.choice(kinds)})  # fmt: skip
                statuses.add(answer.status_code // 100)
                assert "error" in answer.json(), answer.text

        send(200)
        tracemalloc.start()
        held = []
        for _ in range(4):
            send(200)
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert statuses == {4}
    # What is kept of each request would be so in every part; other threads may hold something in one of them.
    assert min(later - earlier for earlier, later in pairwise(held)) < 100_000


def test_a_body_is_not_read_beyond_the_limit(detector):
    sent = 0

    def endless():
        nonlocal sent
        while sent < 1 << 28:
            sent += 1 << 16
            yield bytes(1 << 16)

    with serving(detector, limits=Limits(max_bytes=1 << 20)) as address:
        with connected(address) as client:
            client.sendall(b"POST /detect HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1048577\r\n\r\n")
            answer = client.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert answer.endswith(b'{"error":"the request is larger than 1 MiB"}')
        with contextlib.suppress(httpx.HTTPError):  # the connection was closed
            assert post(address, content=endless()).status_code == 413
        assert httpx.get(f"{address}/healthz").status_code == 200
    assert sent < 1 << 26


def test_a_body_that_does_not_come(detector):
    with serving(detector, limits=Limits(timeout=0.2)) as address, connected(address) as client:
        client.sendall(b"POST /detect HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx")
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")


def test_pixels_and_images_are_limited(detector, files):
    with serving(detector, limits=Limits(max_pixels=1000, queue=2)) as address:
        answer = post(address, content=files["coffee.jpg"])
        assert (answer.status_code, answer.json()["error"][:9]) == (400, "image 0: ")
        answer = post(address, **as_form(files))
        assert (answer.status_code, answer.json()["error"]) == (
            400,
            "more images than the 2 that a request may have",
        )


class Held:
    """A detector that waits within `detect` until it is let go."""

    def __init__(self, detector: Detector) -> None:
        self.begun, self.go, self.detector = threading.Semaphore(0), threading.Event(), detector

    def detect(self, *arguments):
        self.begun.release()
        assert self.go.wait(20)
        return self.detector.detect(*arguments)

    def __getattr__(self, name):
        return getattr(self.detector, name)


def in_thread(results, function, *arguments, **options):
    thread = threading.Thread(target=lambda: results.append(function(*arguments, **options)))
    thread.start()
    return thread


def test_a_full_queue_says_when_to_come_again(detector, files):
    held, answers = Held(detector), []
    with serving(held, limits=Limits(queue=1)) as address:
        thread = in_thread(answers, post, address, content=files["coffee.jpg"])
        assert held.begun.acquire(timeout=20)
        refused = post(address, content=files["coffee.jpg"])
        assert httpx.get(f"{address}/healthz").status_code == 200
        held.go.set()
        thread.join()
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["error"] == "too many requests are under way; try again"
    assert answers[0].status_code == 200


def test_what_takes_too_long_is_given_up(detector, files):
    held = Held(detector)
    with serving(held, limits=Limits(timeout=0.3)) as address:
        answer = post(address, content=files["coffee.jpg"])
        held.go.set()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"] == "it took longer than 0.3 s; try again"


def test_a_client_that_leaves_takes_nobody_along(detector, files):
    held, answers = Held(detector), []
    body = files["coffee.jpg"]
    with serving(held) as address:
        thread = in_thread(answers, post, address, content=body)
        assert held.begun.acquire(timeout=20)
        head = f"POST /detect HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        for content in (head, head + body[:1000], head + body):
            with connected(address) as client:
                client.sendall(content)
        others = [in_thread(answers, post, address, content=body) for _ in range(3)]
        held.go.set()
        for each in (thread, *others):
            each.join()
        assert "ssd_images_under_way 0" in httpx.get(f"{address}/metrics").text
    assert [each.status_code for each in answers] == [200] * 4


def test_nan_is_told_of_its_image(detector, files):
    class Broken(Held):
        def detect(self, batch, options):
            raise NonFiniteError(f"{batch[0].name}: the network gave NaN", [0])

    with serving(Broken(detector)) as address:
        answer = post(address, **as_form({"a.jpg": files["coffee.jpg"]}))
    assert (answer.status_code, answer.json()) == (500, {"error": "a.jpg: the network gave NaN"})


def test_what_nobody_expected_gives_no_traceback(detector, files, caplog):
    class Broken(Held):
        def detect(self, batch, options):
            raise RuntimeError("secret")

    with serving(Broken(detector)) as address:
        answer = post(address, content=files["coffee.jpg"])
        metrics = httpx.get(f"{address}/metrics").text
    assert (answer.status_code, answer.json()) == (
        500,
        {"error": "an error of the server's own; its log has more"},
    )
    assert (answer.headers["cache-control"], answer.headers["x-content-type-options"]) == (
        "no-store",
        "nosniff",
    )
    assert 'ssd_requests_total{status="500"} 1' in metrics
    assert "secret" in caplog.text


# --- Who may ask ------------------------------------------------------------------------------------------


def test_a_token(detector, files):
    with serving(detector, token="sécret") as address:
        for path in ("/", "/healthz"):
            assert httpx.get(address + path).status_code == 200
        for path in ("/info", "/metrics", "/openapi.json"):
            answer = httpx.get(address + path)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        wrong = [b"Bearer wrong", b"Bearer", b"Basic s\xc3\xa9cret", "sécret".encode(), b"Bearer\xff"]
        for given in wrong:
            assert post(address, content=b"", headers={"Authorization": given}).status_code == 401, given
        right = {"Authorization": "Bearer sécret".encode()}
        assert post(address, content=files["coffee.jpg"], headers=right).status_code == 200


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("localhost", True), ("localhost:8000", True), ("127.0.0.1:80", True), ("[::1]:8000", True),
        ("192.168.1.7", True), ("photos.example.org", True), ("PHOTOS.example.org:443", True),
        ("evil.example", False), ("localhost.evil.example", False), ("127.0.0.1.evil.example", False),
        ("", False), ("[::1", False), ("2130706433", False), ("evil.example:127.0.0.1", False),
        ("localhost@evil.example", False),
    ],
)  # fmt: skip
def test_names_that_others_have_made_to_lead_here(host, ours):
    assert _is_ours(host, frozenset(["photos.example.org"])) == ours


def test_requests_of_other_sites(address, files):
    body = files["coffee.jpg"]
    assert post(address, content=body, headers={"Host": "evil.example"}).status_code == 403
    for origin in ("http://evil.example", "null", "http://localhost:1", "http://127.0.0.1", "http://[", ""):
        assert post(address, content=body, headers={"Origin": origin}).status_code == 403, origin
    for origin in (address, address.replace("http", "https")):  # behind a proxy that brings https
        assert post(address, content=body, headers={"Origin": origin}).status_code == 200


def test_the_page_may_load_nothing_from_elsewhere(address):
    answer = httpx.get(address)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy
    page = PAGE.read_text(encoding="utf-8")
    assert answer.text == page
    assert policy == _policy_of(page)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page)
    assert not re.search(r"<[^>]+\s(style|on\w+)=", page.split("<script>")[0])


# --- URLs -------------------------------------------------------------------------------------------------


def test_urls(detector, server, files, monkeypatch):
    def ask(url):
        return post(address, f"score_threshold={THRESHOLD}", json={"images": [{"url": url}]})

    url = server.serve("/coffee.jpg", files["coffee.jpg"])
    with serving(detector, allow_urls=True, limits=Limits(max_bytes=1 << 20)) as address:
        answer = ask(url)
        assert (answer.status_code, server.requests) == (400, [])
        assert answer.json()["error"] == f"{url}: 127.0.0.1 is not a public address of the internet"
        assert "only http and https" in ask("file:///etc/passwd").json()["error"]
        monkeypatch.setattr(web, "is_public", lambda address: True)
        expected = detector(files["coffee.jpg"], score_threshold=THRESHOLD).to_dict()
        assert ask(url).json()["results"] == [{**expected, "source": url}]
        large = server.serve("/large", bytes((1 << 20) + 1))
        assert ask(large).json()["error"].startswith(f"{large}: more than 1 MiB")
