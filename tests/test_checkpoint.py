import errno
import multiprocessing
import os
import pickle
import signal
import socket
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import made_model

from ssd import checkpoint, web
from ssd.checkpoint import CheckpointError, DownloadError
from ssd.labels import COCO_NAMES
from ssd.model import load_model


@pytest.fixture
def body(weights_file):
    return weights_file.read_bytes()


def cached():
    """All that is in the cache."""
    folder = checkpoint.cache_dir()
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
    record = checkpoint.PUBLISHED["coco"]
    url = server.serve("/coco", body)
    monkeypatch.setitem(checkpoint.PUBLISHED, "coco", checkpoint.Weights(**(vars(record) | {"url": url})))
    assert checkpoint.fetch("coco", progress=False) == checkpoint.cache_dir() / "nvidia_ssdpyt_amp_200703.pt"
    assert checkpoint.fetch("coco", progress=False).read_bytes() == body


def test_equal_names_at_different_addresses_do_not_meet_in_the_cache(server, body):
    first = checkpoint.fetch(server.serve("/a/model.safetensors", body), progress=False)
    second = checkpoint.fetch(server.serve("/b/model.safetensors", body + b" "), progress=False)
    assert first != second
    assert first.read_bytes() == body


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
        (lambda _: {"body": b""}, "not a checkpoint", 1),
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
        checkpoint.fetch(url, progress=False)
    assert url in str(caught.value)
    assert "pass its path instead" in str(caught.value)
    assert str(checkpoint.cached_path(url)) in str(caught.value)
    assert len(server.requests) == attempts
    assert cached() == []


def test_a_missing_page_is_not_asked_for_again(server):
    with pytest.raises(DownloadError, match="404"):
        checkpoint.fetch(server.url("/gone.pt"), progress=False)
    assert len(server.requests) == 1


def test_a_second_attempt_may_succeed(server, body):
    url = server.serve("/w.pt", body)
    whole = server.pages["/w.pt"]
    server.serve("/w.pt", **short(body))
    broken = server.pages["/w.pt"]
    answers = iter([broken, whole])
    server.pages["/w.pt"] = lambda handler: next(answers)(handler)
    assert checkpoint.fetch(url, progress=False).read_bytes() == body


def test_a_stalling_server_is_given_up(server, monkeypatch):
    monkeypatch.setattr(web, "TIMEOUT", 0.2)
    monkeypatch.setattr(checkpoint, "ATTEMPTS", 2)

    def stall(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"PK")
        handler.wfile.flush()
        server.closing.wait(30)

    server.pages["/slow.pt"] = stall
    with pytest.raises(DownloadError, match="stopped answering|timed out"):
        checkpoint.fetch(server.url("/slow.pt"), progress=False)
    assert len(server.requests) == 2
    assert cached() == []


def test_an_endless_body_is_cut(server, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_BYTES", 1 << 20)

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        while not server.closing.is_set():
            handler.wfile.write(b"\0" * 65536)

    server.pages["/w.pt"] = endless
    with pytest.raises(DownloadError, match="sent more than"):
        checkpoint.fetch(server.url("/w.pt"), progress=False)
    assert cached() == []


def test_without_network_the_error_says_what_to_do():
    with pytest.raises(DownloadError) as caught:
        load_model("coco", progress=False)
    message = str(caught.value)
    record = checkpoint.PUBLISHED["coco"]
    for part in (record.url, str(checkpoint.cache_dir() / record.file_name), "--weights", "weights=..."):
        assert part in message


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.org/w.pt"])
def test_only_http_is_opened(url):
    with pytest.raises(DownloadError, match="not an http"):
        checkpoint.fetch(url, progress=False)


def test_digest_that_is_known_is_checked(server, body, weights_file):
    url = server.serve("/w.safetensors", body)
    right = checkpoint._digest(weights_file)
    assert checkpoint.fetch(url, sha256=right[:12], progress=False).exists()
    with pytest.raises(DownloadError, match=f"{right}, expected 00000000"):
        checkpoint.fetch(url, sha256="0" * 8, progress=False)
    with pytest.raises(CheckpointError, match=right):
        checkpoint.fetch(weights_file, sha256="0" * 8)


def test_a_cached_file_that_changed_after_its_first_good_load_is_fetched_anew(server, body):
    url = server.serve("/w.safetensors", body)
    load_model(url, progress=False)
    path = checkpoint.cached_path(url)
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
    sidecar = checkpoint.cached_path(url).with_name(f"{checkpoint.cached_path(url).name}.sha256")
    digest = sidecar.read_text()
    sidecar.write_bytes(content)
    load_model(url, progress=False)
    assert sidecar.read_text() == digest
    assert len(server.requests) == 1


def test_without_network_a_changed_file_is_named(server, body):
    url = server.serve("/w.safetensors", body)
    load_model(url, progress=False)
    checkpoint.cached_path(url).write_bytes(body + b" ")
    server.pages.clear()
    with pytest.raises(DownloadError, match=r"differs from the digest in .*\.sha256"):
        load_model(url, progress=False)


def test_a_dripping_server_is_given_up(server, monkeypatch):
    monkeypatch.setattr(web, "TIMEOUT", 0.2)
    monkeypatch.setattr(checkpoint, "ATTEMPTS", 1)

    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        while not server.closing.wait(0.02):
            handler.wfile.write(b"x")

    server.pages["/drip.pt"] = drip
    with pytest.raises(DownloadError, match="too slow"):
        checkpoint.fetch(server.url("/drip.pt"), progress=False)


@pytest.mark.parametrize("url", ["http://a..b/w.pt", f"http://{'x' * 70}/w.pt", "http://[x/w.pt"])
def test_malformed_addresses_are_download_errors(url):
    with pytest.raises(DownloadError):
        checkpoint.fetch(url, progress=False)


def test_long_and_odd_names_find_a_place_in_the_cache(server, body):
    for path in (f"/{'w' * 300}.pt", "/w.pt%00x", "/%2e%2e%2fw"):
        assert checkpoint.fetch(server.serve(path, body), progress=False).parent == checkpoint.cache_dir()


def test_a_file_that_does_not_load_is_not_trusted(server):
    url = server.serve("/w.pt", b"PK\x03\x04 and then nothing of use")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="cut off"):
            load_model(url, progress=False)
    assert cached() == [checkpoint.cached_path(url).name]


def test_force_downloads_again(server, body):
    url = server.serve("/w.safetensors", body)
    load_model(url, progress=False)
    load_model(url, progress=False, force=True)
    assert len(server.requests) == 2


def fetch_in_process(url, home, barrier, results):
    os.environ["TORCH_HOME"] = home
    barrier.wait()
    results.put(checkpoint.fetch(url, progress=False).read_bytes())


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
    assert not checkpoint.cached_path(url).exists()
    server.pages["/w.safetensors"] = whole
    assert checkpoint.fetch(url, progress=False).read_bytes() == body
    assert cached() == [checkpoint.cached_path(url).name]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, server, body):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(DownloadError, match="TORCH_HOME") as caught:
        checkpoint.fetch(server.serve("/w.pt", body), progress=False)
    assert str(tmp_path / "file") in str(caught.value)
    assert server.requests == []


def test_a_good_cache_is_read_without_writing_or_sockets(server, body, monkeypatch):
    url = server.serve("/w.safetensors", body)
    load_model(url, progress=False)

    def forbidden(*_, **__):
        raise AssertionError("not needed for a cached file")

    monkeypatch.setattr(socket, "socket", forbidden)
    monkeypatch.setattr(checkpoint, "atomic_file", forbidden)
    monkeypatch.setattr(checkpoint, "FileLock", forbidden)
    load_model(url, progress=False)


def test_a_full_disk_is_told_at_once(server, body, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_download_once", full)
    url = server.serve("/w.pt", body)
    with pytest.raises(DownloadError, match="No space left"):
        checkpoint.fetch(url, progress=False)
    assert cached() == []


def test_a_missing_file_is_named_with_what_could_be_passed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt.*coco"):
        checkpoint.fetch(tmp_path / "nowhere.pt")


# --- Reading ---


def training_checkpoint(model, prefix=""):
    """What NVIDIA's training code saves."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [43, 54])
    return {
        "epoch": 64,
        "iteration": 240_000,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict() | {"milestones": Counter([43, 54])},
        "label_map": {0: "background", 1: "cat", 2: "cup", 3: "person"},
        "model": {prefix + key: value for key, value in model.state_dict().items()},
    }


@pytest.mark.parametrize("prefix", ["", "module.", "module.1."])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_training_checkpoints(tmp_path, small_model, prefix, zipped):
    path = tmp_path / "epoch_64.pt"
    torch.save(training_checkpoint(small_model, prefix), path, _use_new_zipfile_serialization=zipped)
    found = checkpoint.read(path)
    assert list(found.state_dict) == list(small_model.state_dict())
    assert (found.backbone, found.num_classes, found.head_norm) == ("resnet18", 4, False)
    assert found.class_names == ("cat", "cup", "person")


def test_a_bare_state_dict(tmp_path, small_model):
    torch.save(small_model.state_dict(), tmp_path / "bare.pth")
    found = checkpoint.read(tmp_path / "bare.pth")
    assert found.class_names == ("class 0", "class 1", "class 2")


def test_81_classes_without_names_are_cocos(tmp_path):
    torch.save(made_model(num_classes=81).state_dict(), tmp_path / "coco.pth")
    assert checkpoint.read(tmp_path / "coco.pth").class_names == COCO_NAMES


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_code_in_a_pickle_is_refused_and_never_runs(tmp_path, small_model, kind):
    marker, path = tmp_path / "ran", tmp_path / "hostile.pt"
    content = {"model": dict(small_model.state_dict()), "extra": Hostile(marker)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"hostile\.pt") as caught:
        load_model(path)
    assert not marker.exists()
    assert "weights_only" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_program_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "program.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        checkpoint.read(tmp_path / "program.pt")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"hello", "not a checkpoint"),
        (b"\x80\x02 nonsense", "cut off"),
        (b"\x10\0\0\0\0\0\0\0{}", "safetensors"),
    ],
)
def test_what_is_no_checkpoint_says_what_it_is(tmp_path, content, reason):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"w.pt: .*{reason}"):
        checkpoint.read(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".legacy"])
def test_a_file_cut_off_anywhere_is_an_error(tmp_path, small_model, weights_file, suffix):
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    if suffix == ".safetensors":
        whole = weights_file
    else:
        torch.save(small_model.state_dict(), whole, _use_new_zipfile_serialization=suffix == ".pt")
    body = whole.read_bytes()
    for share in (0.0001, 0.01, 0.3, 0.7, 0.99, 1 - 1 / len(body)):
        cut.write_bytes(body[: int(len(body) * share)])
        with pytest.raises(CheckpointError, match=r"cut\."):
            load_model(cut)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "a list"),
        ({}, "a dict"),
        ({"model": {"a": 3}}, "'a' is a int"),
        ({"fc.weight": torch.zeros(2)}, "not an SSD300"),
        ({3: torch.zeros(2)}, "3 is a Tensor"),
    ],
)
def test_other_contents_are_refused(tmp_path, content, reason):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=reason):
        checkpoint.read(tmp_path / "other.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, small_model, value):
    state = {key: tensor.clone() for key, tensor in small_model.state_dict().items()}
    state["conf.5.bias"][-1] = value
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(CheckpointError, match=r"conf\.5\.bias holds NaN"):
        load_model(tmp_path / "nan.pt")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (torch.zeros(1).expand(24), "not stored whole"),
        (torch.zeros(24, dtype=torch.complex64), "complex64"),
        (torch.zeros(24, dtype=torch.int64), "int64"),
        (torch.zeros(24).to_sparse(), "no plain tensor|not to be loaded safely"),
        (torch.zeros(24, device="meta"), "no plain tensor"),
        (torch.zeros(24).to(torch.float8_e4m3fn), "float8"),
    ],
    ids=["expanded", "complex", "integer", "sparse", "meta", "float8"],
)
def test_odd_tensors_are_refused_before_they_are_used(tmp_path, small_model, value, problem):
    torch.save(dict(small_model.state_dict()) | {"loc.2.bias": value}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=problem):
        load_model(tmp_path / "odd.pt")


def test_a_few_bytes_that_stand_for_a_hundred_million_classes_are_refused(tmp_path, small_model):
    head = torch.zeros(1).expand(4 * 10**8, 256, 3, 3)
    torch.save(dict(small_model.state_dict()) | {"conf.0.weight": head}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError, match="not an SSD300"):
        load_model(tmp_path / "bomb.pt")


@pytest.mark.parametrize("labels", [{"²": "a", "--1": "b", "9" * 5000: "c"}, [1], {1: 3}, None])
def test_odd_class_names_are_left_out(tmp_path, small_model, labels):
    torch.save({"model": small_model.state_dict(), "label_map": labels}, tmp_path / "odd.pt")
    assert checkpoint.read(tmp_path / "odd.pt").class_names == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize("names", ["5", "null", "[" * 100_000, "{"])
def test_odd_metadata_is_refused(tmp_path, small_model, names):
    import safetensors.torch

    state = {key: value.contiguous() for key, value in small_model.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "odd.safetensors", {"class_names": names})
    with pytest.raises(CheckpointError, match="odd.safetensors"):
        load_model(tmp_path / "odd.safetensors")


def test_a_loaded_network_does_not_depend_on_its_file(tmp_path, small_model, body):
    path = tmp_path / "w.safetensors"
    path.write_bytes(body)
    model, _ = load_model(path)
    with path.open("r+b") as file:
        file.write(bytes(len(body)))
    assert torch.equal(model.conf[0].weight, small_model.conf[0].weight)


# --- Writing ---


def test_names_must_fit_the_network(tmp_path, small_model):
    with pytest.raises(ValueError, match="3 classes and the background; got 2 names"):
        checkpoint.save(tmp_path / "w.pt", small_model.state_dict(), ("a", "b"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_being_written_does_not_show(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), checkpoint.atomic_file(path) as file:
        file.write(b"after")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]
    with checkpoint.atomic_file(path) as file:
        file.write(b"after")
    assert path.read_text() == "after"
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
