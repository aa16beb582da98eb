import errno
import hashlib
import io
import multiprocessing
import os
import signal
import socket
import threading
import warnings

import pytest
import safetensors.torch
import torch

from ssd import containers, pretrained, web
from ssd.errors import CheckpointError, DownloadError
from ssd.model import SSD, load_model


@pytest.fixture
def body(weights_file):
    return weights_file.read_bytes()


def cached():
    """All that is in the cache."""
    folder = pretrained.cache_dir()
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") if folder.exists() else []


# --- Download ---


def test_a_download_is_cached_and_then_needs_no_network(server, body, small_model):
    url = server.serve("/small.safetensors", body)
    model, _ = load_model(url, progress=False)
    assert torch.equal(model.conf[0].weight, small_model.conf[0].weight)
    server.pages.clear()
    load_model(url, progress=False)
    assert server.requests == ["/small.safetensors"]


def test_published_weights_have_a_place_and_an_address_that_can_be_changed(server, body, monkeypatch):
    record = pretrained.PUBLISHED["coco"]
    url = server.serve("/coco", body)
    monkeypatch.setitem(pretrained.PUBLISHED, "coco", pretrained.Weights(**(vars(record) | {"url": url})))
    assert pretrained.fetch("coco", progress=False) == pretrained.cache_dir() / "nvidia_ssdpyt_amp_200703.pt"
    assert pretrained.fetch("coco", progress=False).read_bytes() == body


def test_equal_names_at_different_addresses_do_not_meet_in_the_cache(server, body):
    first = pretrained.fetch(server.serve("/a/model.safetensors", body), progress=False)
    second = pretrained.fetch(server.serve("/b/model.safetensors", BODIES["safetensors"]), progress=False)
    assert first != second
    assert first.read_bytes() == body


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


CONTENT = {"first": torch.arange(20.0), "second": torch.arange(5)}
BODIES = {
    "zip": saved(CONTENT),
    "legacy": saved(CONTENT, _use_new_zipfile_serialization=False),
    "safetensors": safetensors.torch.save(CONTENT),
}


def without_length(handler, body):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(body)


def with_its_length(handler, body, status=200):
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def in_chunks(handler, body):
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n")


@pytest.mark.parametrize("send", [without_length, with_its_length, in_chunks])
@pytest.mark.parametrize("kind", BODIES)
def test_what_was_cut_off_never_gets_into_the_cache(server, kind, send):
    body = BODIES[kind]
    url = server.url("/w.pt")
    for end in {0, 1, 9, *range(0, len(body), 40), len(body) - 30, len(body) - 1}:
        server.pages["/w.pt"] = lambda handler, end=end: send(handler, body[:end])
        with pytest.raises(DownloadError, match="cannot be used: .* The same call tries again"):
            pretrained.fetch(url, progress=False)
        assert cached() == []
    server.pages["/w.pt"] = lambda handler: send(handler, body)
    assert pretrained.fetch(url, progress=False).read_bytes() == body


def test_a_part_that_was_not_asked_for_is_refused(server, body):
    url = server.url("/w.safetensors")
    server.pages["/w.safetensors"] = lambda handler: with_its_length(handler, body, 206)
    with pytest.raises(DownloadError, match="HTTP 206 Partial Content, which is not what was asked for"):
        load_model(url, progress=False)
    assert cached() == []


def short(body):
    return {"body": body[: len(body) // 2], "length": len(body)}


def redirect(target):
    return {"body": b"", "status": 302, "headers": {"Location": target}}


@pytest.mark.parametrize(
    ("page", "reason", "attempts"),
    [
        (short, "got .* of .* bytes|IncompleteRead", 3),
        (lambda _: {"body": b"<html>sorry</html>", "kind": "text/html"}, "a web page", 1),
        (lambda _: {"body": b"<html>sorry</html>"}, "not a checkpoint", 1),
        (lambda _: {"body": b""}, "cannot be used: the file is empty", 1),
        (lambda body: {"body": body, "status": 403}, "403", 1),
        (lambda body: {"body": body, "status": 503}, "503", 3),
        (lambda _: redirect("file:///etc/passwd"), "not allowed", 1),
        (lambda _: redirect("ftp://localhost/w.pt"), "not http", 1),
    ],
    ids=["truncated", "html", "html without a type", "empty", "forbidden", "busy", "to a file", "to ftp"],
)
def test_a_bad_download_is_an_error_and_leaves_the_cache_as_it_was(server, body, page, reason, attempts):
    url = server.serve("/w.pt", **page(body))
    with pytest.raises(DownloadError, match=reason) as caught:
        pretrained.fetch(url, progress=False)
    assert url in str(caught.value)
    assert "pass its path instead" in str(caught.value)
    assert str(pretrained.cached_path(url)) in str(caught.value)
    assert len(server.requests) == attempts
    assert cached() == []


def test_a_missing_page_is_not_asked_for_again(server):
    with pytest.raises(DownloadError, match="404"):
        pretrained.fetch(server.url("/gone.pt"), progress=False)
    assert len(server.requests) == 1


def test_a_second_attempt_may_succeed(server, body):
    url = server.serve("/w.pt", body)
    whole = server.pages["/w.pt"]
    server.serve("/w.pt", **short(body))
    broken = server.pages["/w.pt"]
    answers = iter([broken, whole])
    server.pages["/w.pt"] = lambda handler: next(answers)(handler)
    assert pretrained.fetch(url, progress=False).read_bytes() == body


def test_a_stalling_server_is_given_up(server, monkeypatch):
    monkeypatch.setattr(web, "TIMEOUT", 0.2)
    monkeypatch.setattr(pretrained, "ATTEMPTS", 2)

    def stall(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"PK")
        handler.wfile.flush()
        server.closing.wait(30)

    server.pages["/slow.pt"] = stall
    with pytest.raises(DownloadError, match="stopped answering|timed out"):
        pretrained.fetch(server.url("/slow.pt"), progress=False)
    assert len(server.requests) == 2
    assert cached() == []


def test_an_endless_body_is_cut(server, monkeypatch):
    monkeypatch.setattr(pretrained, "MAX_BYTES", 1 << 20)

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        while not server.closing.is_set():
            handler.wfile.write(b"\0" * 65536)

    server.pages["/w.pt"] = endless
    with pytest.raises(DownloadError, match="sent more than"):
        pretrained.fetch(server.url("/w.pt"), progress=False)
    assert cached() == []


def test_without_network_the_error_says_what_to_do():
    with pytest.raises(DownloadError) as caught:
        load_model("coco", progress=False)
    message = str(caught.value)
    record = pretrained.PUBLISHED["coco"]
    for part in (record.url, str(pretrained.cache_dir() / record.file_name), "--weights", "weights=..."):
        assert part in message


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.org/w.pt"])
def test_only_http_is_opened(url):
    with pytest.raises(DownloadError, match="not an http"):
        pretrained.fetch(url, progress=False)


def test_digest_that_is_known_is_checked(server, body, weights_file):
    url = server.serve("/w.safetensors", body)
    right = pretrained._digest(weights_file)
    assert pretrained.fetch(url, sha256=right[:12], progress=False).exists()
    with pytest.raises(DownloadError, match=f"{right}, expected 00000000"):
        pretrained.fetch(url, sha256="0" * 8, progress=False)
    with pytest.raises(CheckpointError, match=right):
        pretrained.fetch(weights_file, sha256="0" * 8)


def test_a_cached_file_that_changed_after_its_first_good_load_is_fetched_anew(server, body):
    url = server.serve("/w.safetensors", body)
    load_model(url, progress=False)
    path = pretrained.cached_path(url)
    damaged = bytearray(body)
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    load_model(url, progress=False)
    assert path.read_bytes() == body
    assert len(server.requests) == 2


@pytest.mark.parametrize("content", [b"", b"\xff\xfe nonsense", b"0" * 63])
def test_a_damaged_record_of_the_digest_counts_as_none(server, body, content):
    url = server.serve("/w.safetensors", body)
    load_model(url, progress=False)
    sidecar = pretrained.cached_path(url).with_name(f"{pretrained.cached_path(url).name}.sha256")
    digest = sidecar.read_text()
    sidecar.write_bytes(content)
    load_model(url, progress=False)
    assert sidecar.read_text() == digest
    assert len(server.requests) == 1


def test_without_network_a_changed_file_is_named(server, body):
    url = server.serve("/w.safetensors", body)
    load_model(url, progress=False)
    pretrained.cached_path(url).write_bytes(body + b" ")
    server.pages.clear()
    with pytest.raises(DownloadError, match=r"does not have the SHA-256 [0-9a-f]{64}\)"):
        load_model(url, progress=False)


def test_a_dripping_server_is_given_up(server, monkeypatch):
    monkeypatch.setattr(web, "TIMEOUT", 0.2)
    monkeypatch.setattr(pretrained, "ATTEMPTS", 1)

    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        while not server.closing.wait(0.02):
            handler.wfile.write(b"x")

    server.pages["/drip.pt"] = drip
    with pytest.raises(DownloadError, match="too slow"):
        pretrained.fetch(server.url("/drip.pt"), progress=False)


@pytest.mark.parametrize("url", ["http://a..b/w.pt", f"http://{'x' * 70}/w.pt", "http://[x/w.pt"])
def test_malformed_addresses_are_download_errors(url):
    with pytest.raises(DownloadError):
        pretrained.fetch(url, progress=False)


def test_long_and_odd_names_find_a_place_in_the_cache(server, body):
    for path in (f"/{'w' * 300}.pt", "/w.pt%00x", "/%2e%2e%2fw"):
        assert pretrained.fetch(server.serve(path, body), progress=False).parent == pretrained.cache_dir()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize("content", [b"PK\x03\x04 and nothing of use", *BODIES.values()])
def test_a_file_in_the_cache_that_fails_its_first_load_is_removed(server, body, content):
    url = server.serve("/w.pt", body)
    path = pretrained.cached_path(url)
    put(path, content)
    with pytest.raises(CheckpointError, match="removed from the cache; the same call downloads it again$"):
        load_model(url, progress=False)
    assert cached() == []
    load_model(url, progress=False)
    assert path.read_bytes() == body


def test_a_whole_file_of_another_network_is_fetched_anew(server, body):
    url = server.serve("/w.pt", BODIES["zip"])
    with pytest.raises(CheckpointError, match="not an SSD300 .* was removed from the cache"):
        load_model(url, progress=False)
    server.serve("/w.pt", body)
    load_model(url, progress=False)


def test_trunks_that_fail_are_removed_too(server, monkeypatch):
    digest = hashlib.sha256(BODIES["zip"]).hexdigest()[:8]
    url = server.serve(f"/resnet18-{digest}.pth", BODIES["zip"])
    monkeypatch.setitem(pretrained.BACKBONE_WEIGHTS, "resnet18", {"V1": url})
    with pytest.raises(CheckpointError, match="not a ResNet .* was removed from the cache"):
        SSD(2, "resnet18", backbone_weights="imagenet")
    assert cached() == []


def test_a_file_that_is_named_by_its_path_stays_wherever_it_is():
    path = pretrained.cache_dir() / "mine.pt"
    put(path, BODIES["zip"][:-1])
    for name in (path, str(path)):
        with pytest.raises(CheckpointError, match="get it again$"):
            load_model(name, progress=False)
    assert path.read_bytes() == BODIES["zip"][:-1]


def test_a_file_that_loaded_once_stays(server):
    url = server.url("/w.pt")
    path = pretrained.cached_path(url)
    put(path, BODIES["zip"])
    digest = hashlib.sha256(BODIES["zip"]).hexdigest()
    path.with_name(f"{path.name}.sha256").write_text(f"{digest}  {path.name}\n")
    with pytest.raises(CheckpointError, match="not an SSD300"):
        load_model(url, progress=False)
    assert path.exists()


def test_a_file_that_advice_is_about_stays(server, small_model):
    state_dict = small_model.state_dict()
    both = saved({name: {key: value.clone() for key, value in state_dict.items()} for name in "ab"})
    url = server.serve("/w.pt", both)
    with pytest.raises(CheckpointError, match=r"holds 2 networks: .*containers.read\(") as caught:
        load_model(url, progress=False)
    assert "removed" not in str(caught.value)
    assert pretrained.cached_path(url).read_bytes() == both


def test_a_file_for_which_memory_is_short_stays(server, monkeypatch):
    url = server.url("/w.pt")
    path = pretrained.cached_path(url)
    put(path, BODIES["zip"])

    def short_of_memory(*_):
        raise MemoryError

    monkeypatch.setattr(containers, "_loaded", short_of_memory)
    with pytest.raises(CheckpointError, match="takes more memory than there is"):
        load_model(url, progress=False)
    assert path.exists()


def test_what_another_process_has_downloaded_since_stays(server, body):
    url = server.url("/w.pt")
    path = pretrained.cached_path(url)
    put(path, BODIES["zip"][:-1])
    with pytest.raises(CheckpointError, match="cut off.* the same call"), pretrained.loading(path, url):
        new = path.with_name("new")
        put(new, body)
        new.replace(path)
        raise CheckpointError("cut off")
    assert path.read_bytes() == body


def test_a_file_that_cannot_be_removed_is_named(server, monkeypatch):
    url = server.url("/w.pt")
    path = pretrained.cached_path(url)
    put(path, BODIES["zip"][:-1])

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(pretrained, "FileLock", read_only)
    with pytest.raises(
        CheckpointError, match=r"cannot be removed \(Read-only file system\); remove it"
    ) as caught:
        load_model(url, progress=False)
    assert str(path) in str(caught.value)


def test_force_downloads_again(server, body):
    url = server.serve("/w.safetensors", body)
    load_model(url, progress=False)
    load_model(url, progress=False, force=True)
    assert len(server.requests) == 2


def fetch_in_process(url, home, barrier, results):
    os.environ["TORCH_HOME"] = home
    barrier.wait()
    results.put(pretrained.fetch(url, progress=False).read_bytes())


def test_two_processes_download_once(server, body):
    both_started = threading.Event()
    url = server.serve("/w.safetensors", body)
    whole = server.pages["/w.safetensors"]

    def slow(handler):
        both_started.wait(30)
        whole(handler)

    server.pages["/w.safetensors"] = slow
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    arguments = (url, os.environ["TORCH_HOME"], barrier, results)
    processes = [context.Process(target=fetch_in_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    barrier.wait(30)
    both_started.set()
    assert [results.get(timeout=30) for _ in processes] == [body, body]
    for process in processes:
        process.join(30)
    assert server.requests == ["/w.safetensors"]


def test_a_killed_download_leaves_the_cache_as_it_was(server, body):
    half_sent = threading.Event()
    url = server.serve("/w.safetensors", body)
    whole = server.pages["/w.safetensors"]

    def half(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2])
        handler.wfile.flush()
        half_sent.set()
        server.closing.wait(30)

    server.pages["/w.safetensors"] = half
    context = multiprocessing.get_context("fork")
    arguments = (url, os.environ["TORCH_HOME"], context.Barrier(1), context.Queue())
    process = context.Process(target=fetch_in_process, args=arguments)
    process.start()
    assert half_sent.wait(30)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert not pretrained.cached_path(url).exists()
    server.pages["/w.safetensors"] = whole
    assert pretrained.fetch(url, progress=False).read_bytes() == body
    assert cached() == [pretrained.cached_path(url).name]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, server, body):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(DownloadError, match="TORCH_HOME") as caught:
        pretrained.fetch(server.serve("/w.pt", body), progress=False)
    assert str(tmp_path / "file") in str(caught.value)
    assert server.requests == []


def test_a_good_cache_is_read_without_writing_or_sockets(server, body, monkeypatch):
    url = server.serve("/w.safetensors", body)
    load_model(url, progress=False)

    def forbidden(*_, **__):
        raise AssertionError("not needed for a cached file")

    monkeypatch.setattr(socket, "socket", forbidden)
    monkeypatch.setattr(pretrained, "atomic_file", forbidden)
    monkeypatch.setattr(pretrained, "FileLock", forbidden)
    load_model(url, progress=False)


def test_a_full_disk_is_told_at_once(server, body, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pretrained, "_download_once", full)
    url = server.serve("/w.pt", body)
    with pytest.raises(DownloadError, match="No space left"):
        pretrained.fetch(url, progress=False)
    assert cached() == []


def test_a_missing_file_is_named_with_what_could_be_passed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt.*coco"):
        pretrained.fetch(tmp_path / "nowhere.pt")


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["best.safetensors", "last.safetensors", "state.pt", "config.json"], "best.safetensors"),
        (["last.safetensors", "state.pt", "metrics.csv"], "last.safetensors"),
        (["state.pt", "config.json"], "state.pt"),
        (["model.safetensors", "optimizer.bin", "scheduler.bin"], "model.safetensors"),
        (
            ["pytorch_model.bin.index.json", "pytorch_model-1.bin", "pytorch_model-2.bin"],
            "pytorch_model.bin.index.json",
        ),
        (["epoch=3-step=10.ckpt", "hparams.yaml"], "epoch=3-step=10.ckpt"),
        (["README.md", "model_best.pth.tar"], "model_best.pth.tar"),
    ],
)
def test_a_folder_stands_for_its_weights(tmp_path, names, wanted):
    for name in names:
        (tmp_path / name).touch()
    assert pretrained.fetch(tmp_path) == tmp_path / wanted


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], r"a folder without weights \(best\.safetensors, \.safetensors, \.pt"),
        (["photo.jpg"], "a folder without weights"),
        (["b.pt", "a.ckpt", "photo.jpg"], "a folder with 2 files of weights; pass one: a.ckpt, b.pt$"),
        (["data.pkl", "version"], "that was unpacked; pass the file"),
        ([".metadata", "__0_0.distcp"], r"make one file of them.*dcp_to_torch \S+ weights\.pt"),
    ],
)
def test_a_folder_in_which_it_is_open_what_is_meant(tmp_path, names, reason):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=reason):
        pretrained.fetch(tmp_path)


def test_a_checkpoint_of_many_processes_becomes_a_file_as_advised(tmp_path, monkeypatch):
    from torch.distributed import checkpoint as distributed
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        distributed.save(
            {"model": {"a": torch.ones(3)}}, checkpoint_id=str(tmp_path / "step 1"), no_dist=True
        )
        with pytest.raises(CheckpointError, match=r"format_utils dcp_to_torch '.*step 1' weights\.pt$"):
            pretrained.fetch(tmp_path / "step 1")
        dcp_to_torch_save(tmp_path / "step 1", tmp_path / "w.pt")
    assert torch.equal(torch.load(tmp_path / "w.pt")["model"]["a"], torch.ones(3))


def test_a_download_of_another_kind_is_named(server):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    with pytest.raises(DownloadError, match="sent cannot be used: this is a Git LFS pointer, .*git lfs pull"):
        pretrained.fetch(server.serve("/w.pt", pointer), progress=False)


def test_a_digest_that_is_asked_for_is_checked_of_weights_in_the_package_too():
    path = pretrained.fetch("shapes")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert pretrained.fetch("shapes", sha256=digest[:10].upper()) == path
    with pytest.raises(CheckpointError, match=f"its SHA-256 {digest} does not begin with 0000"):
        load_model("shapes", sha256="0000")
