"""Weights of the Hugging Face Hub, against a server that speaks its protocol."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
import torch
from conftest import SMALL_LAYOUT, command

from ssd import checkpoint, hf, pretrained
from ssd.detector import Detector
from ssd.errors import CheckpointError, DownloadError, MissingExtra

NAMES = ("cat", "cup", "person")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub, and an empty cache of it; for the processes that a test starts, too."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with hub_server.running() as site:
        for name, value in (
            ("HF_ENDPOINT", site.address),
            ("HF_HOME", str(tmp_path / "hf")),
            ("HF_HUB_CACHE", str(tmp_path / "hf" / "hub")),
            ("HF_XET_CACHE", str(tmp_path / "hf" / "xet")),
            ("HF_HUB_DISABLE_TELEMETRY", "1"),
            ("NO_PROXY", "127.0.0.1,localhost"),
        ):
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        # What the package read from the environment when it was imported.
        template = site.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", site.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its attempts
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield site


@pytest.fixture(scope="module")
def weights(tmp_path_factory, tiny_model) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    checkpoint.save(path, tiny_model.state_dict(), NAMES, layout=SMALL_LAYOUT)
    return path


def loaded(text):
    return Detector.load(text, "cpu", "fp32")


def same(text, model):
    """Whether a reference gives the weights of a model."""
    path = pretrained.fetch(text)
    found = checkpoint.read(path).state_dict
    return all(torch.equal(value, found[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://me/cats", ("me/cats", None, None)),
        ("hf://me/cats@v1.0", ("me/cats", None, "v1.0")),
        ("hf://me/cats/a/b.pt", ("me/cats", "a/b.pt", None)),
        ("hf://me/cats/b.pt@feature/x", ("me/cats", "b.pt", "feature/x")),
        ("hf://me/cats@v1/b.pt", ("me/cats", "b.pt", "v1")),
        ("hf://me/cats@refs/pr/3/b.pt", ("me/cats", "b.pt", "refs/pr/3")),
        *(
            (bad, None)
            for bad in (
                "hf://",
                "hf://cats",
                "hf://me/cats/",
                "hf://me/cats@v1/a@v2",
                "hf://me/cats/../a",
                "hf://a//b",
            )
        ),
    ],
)
def test_references(text, expected):
    if expected is None:
        with pytest.raises(DownloadError, match=r"does not name weights of the Hub: hf://owner/repo"):
            hf.parse(text)
    else:
        assert hf.parse(text) == expected
        assert hf.parse(str(hf.parse(text))) == expected


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["model.safetensors", "best.safetensors", "README.md"], "model.safetensors"),
        (["last.safetensors", "best.safetensors"], "best.safetensors"),
        (["README.md", "ours.pt"], "ours.pt"),
        (
            ["a.pt", "b.safetensors"],
            r"has 2 files of weights; name one: hf://me/cats/a.pt, hf://me/cats/b.safe",
        ),
        (["README.md", "model.onnx"], r"has no file of weights \(.safetensors, .pt"),
        (
            ["model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"],
            "in parts; get all of it",
        ),
    ],
)
def test_which_file_is_taken(hub, weights, names, taken, tiny_model):
    hub.commit("me/cats", {name: weights.read_bytes() if name == taken else b"text" for name in names})
    if taken in names:
        assert same("hf://me/cats", tiny_model)
    else:
        with pytest.raises(CheckpointError, match=taken):
            pretrained.fetch("hf://me/cats")


def test_what_is_in_the_cache_needs_no_network(hub, weights, tiny_model):
    content = weights.read_bytes()
    hub.commit("me/cats", {"model.safetensors": content, "other.pt": b"-"})
    hub.commit("me/dogs", {"dogs.pt": content})
    for text in ("hf://me/cats", "hf://me/dogs"):
        assert loaded(text).class_names == NAMES
    hub.down, hub.requests[:] = True, []
    assert same("hf://me/cats", tiny_model)
    assert same("hf://me/dogs/dogs.pt", tiny_model)
    assert hub.requests == []
    assert same("hf://me/cats/model.safetensors@main", tiny_model)
    with pytest.raises(DownloadError, match=r"could not download hf://me/cats/other.pt: .*503"):
        pretrained.fetch("hf://me/cats/other.pt")


def test_of_a_repository_that_cannot_be_asked_the_cache_is_taken_and_told(hub, weights, monkeypatch, capsys):
    hub.commit("me/dogs", {"dogs.pt": weights.read_bytes()})
    path = pretrained.fetch("hf://me/dogs")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert pretrained.fetch("hf://me/dogs") == path
    assert "the Hub cannot be asked what hf://me/dogs has" in capsys.readouterr().err
    with pytest.raises(
        DownloadError, match=r"hf://me/dogs/b.pt: it is not in the cache, and HF_HUB_OFFLINE is set"
    ):
        pretrained.fetch("hf://me/dogs/b.pt")
    with pytest.raises(
        DownloadError, match=r"hf://me/birds: it is not in the cache, and HF_HUB_OFFLINE is set"
    ):
        pretrained.fetch("hf://me/birds")


def test_a_branch_stays_where_it_was_until_it_is_asked_for_anew(hub, weights, small_model, tmp_path):
    hub.commit("me/cats", {"model.safetensors": weights.read_bytes()})
    before = pretrained.fetch("hf://me/cats").read_bytes()
    newer = tmp_path / "newer.safetensors"
    checkpoint.save(newer, small_model.state_dict(), NAMES)
    hub.commit("me/cats", {"model.safetensors": newer.read_bytes()})
    assert pretrained.fetch("hf://me/cats").read_bytes() == before
    assert pretrained.fetch("hf://me/cats", force=True).read_bytes() == newer.read_bytes()
    assert pretrained.fetch("hf://me/cats").read_bytes() == newer.read_bytes()


def test_revisions(hub, weights, small_model, tiny_model, tmp_path):
    first = hub.commit("me/cats", {"model.safetensors": weights.read_bytes()})
    newer = tmp_path / "newer.safetensors"
    checkpoint.save(newer, small_model.state_dict(), NAMES)
    hub.commit("me/cats", {"model.safetensors": newer.read_bytes()})
    hub.branches["me/cats"]["v1"] = first
    assert same("hf://me/cats@v1", tiny_model)
    assert same(f"hf://me/cats/model.safetensors@{first}", tiny_model)
    assert same("hf://me/cats", small_model)


def test_a_download_that_is_cut_goes_on(hub, weights, tiny_model):
    hub.commit("me/cats", {"model.safetensors": weights.read_bytes()})
    hub.cut["model.safetensors"] = 2
    for _ in range(2):  # of huggingface_hub, some versions go on by themselves, and some with the next call
        with contextlib.suppress(DownloadError):
            pretrained.fetch("hf://me/cats")
    assert same("hf://me/cats", tiny_model)
    assert hub.cut["model.safetensors"] == 0


def test_a_download_that_is_always_cut_gives_no_file(hub, weights, tmp_path):
    hub.commit("me/cats", {"model.safetensors": weights.read_bytes()})
    hub.cut["model.safetensors"] = 10**6
    with pytest.raises(
        DownloadError, match=r"could not download hf://me/cats: .* The same call tries again$"
    ):
        pretrained.fetch("hf://me/cats")
    assert list((tmp_path / "hf").rglob("*.safetensors")) == []


def test_a_wrong_digest_is_refused_and_goes(hub, weights, tiny_model):
    hub.commit("me/cats", {"model.safetensors": weights.read_bytes()})
    hub.wrong.add("model.safetensors")
    with pytest.raises(DownloadError, match="does not have the digest that the Hub gives, and was removed"):
        pretrained.fetch("hf://me/cats")
    hub.wrong.clear()
    assert same("hf://me/cats", tiny_model)


def test_what_was_damaged_in_the_cache_is_downloaded_again(hub, weights, tiny_model):
    hub.commit("me/cats", {"model.safetensors": weights.read_bytes(), "small.pt": b"few bytes"})
    for name in ("model.safetensors", "small.pt"):  # which the Hub knows by different digests
        path = pretrained.fetch(f"hf://me/cats/{name}")
        before = path.read_bytes()
        path.write_bytes(before[:-1] + b"?")
        assert pretrained.fetch(f"hf://me/cats/{name}").read_bytes() == before
    assert same("hf://me/cats", tiny_model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "hf://me/nothing",
            r"hf://me/nothing: HTTP 401; there is no such repository, or it is not open to every",
        ),
        (
            "hf://me/secret",
            r"HTTP 401; .*check the name \(http.*/me/secret\); or log in by `hf auth login`, or set",
        ),
        ("hf://me/gated", r"ask for access at http.*/me/gated, then log in"),
        ("hf://me/cats@v9", "the repository has no revision v9; name a branch"),
        ("hf://me/cats/gone.pt", "the repository has no file gone.pt"),
        ("hf://me/cats/model.onnx", "is no file of weights .* an exported file is a program for its runtime"),
        ("hf://cats", "does not name weights of the Hub"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(hub, weights, text, message):
    for name in ("cats", "secret", "gated"):
        hub.commit(f"me/{name}", {"model.safetensors": weights.read_bytes()})
    hub.private.add("me/secret")
    hub.gated.add("me/gated")
    with pytest.raises((DownloadError, CheckpointError), match=message) as caught:
        loaded(text)
    assert "\n" not in str(caught.value)


def test_a_token_of_the_environment_opens_what_is_private_and_gated(hub, weights, tiny_model, monkeypatch):
    for name in ("secret", "gated"):
        hub.commit(f"me/{name}", {"model.safetensors": weights.read_bytes()})
    hub.private.add("me/secret")
    hub.gated.add("me/gated")
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    assert same("hf://me/secret", tiny_model)
    assert same("hf://me/gated", tiny_model)


def test_pickles_are_not_unpickled(hub, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    hub.commit("me/evil", {"evil.pt": (tmp_path / "evil.pt").read_bytes()})
    with pytest.raises(CheckpointError):
        loaded("hf://me/evil")
    assert not (tmp_path / "executed").exists()


def test_backbone_weights(hub, tmp_path):
    from ssd.model import SSD

    trunk = SSD(2, "resnet18").feature_extractor.feature_extractor.state_dict()
    stages = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3"}
    tensors = {f"{stages[key[0]]}.{key[2:]}": value for key, value in trunk.items()}
    torch.save(tensors, tmp_path / "resnet.pt")
    hub.commit("me/resnet18", {"pytorch_model.bin": (tmp_path / "resnet.pt").read_bytes()})
    made = SSD(2, "resnet18", backbone_weights="hf://me/resnet18").feature_extractor.feature_extractor
    assert all(torch.equal(value, trunk[key]) for key, value in made.state_dict().items())


def test_without_the_package_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"ssd300\[hub\]"):
        pretrained.fetch("hf://me/cats")


def test_the_command_downloads_by_the_environment_alone(hub, weights):
    """With the address and the cache as people set them; and offline after that."""
    hub.commit("me/cats", {"model.safetensors": weights.read_bytes()})
    run = subprocess.run(
        command("download", "hf://me/cats"), check=False, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr
    assert "3 classes" in run.stdout
    assert "downloading hf://me/cats/model.safetensors" in run.stderr
    hub.requests.clear()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    for text, status in (("hf://me/cats", 0),):
        run = subprocess.run(
            command("download", text),
            check=False,
            capture_output=True,
            text=True,
            timeout=200,
            env=environment,
        )
        assert run.returncode == status, run.stderr
    assert hub.requests == []


def test_round_trip(hub, weights, tiny_model, monkeypatch, capsys):
    """Pushed and loaded again: the same weights, names and layout, by a commit with a card and LFS."""
    from ssd.cli.push import push_weights

    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    push_weights(str(weights), "me/cats", license="apache-2.0")
    out, err = capsys.readouterr()
    assert out.startswith(f"{hub.address}/me/cats\nDetect with it: ssd detect PHOTO --weights hf://me/cats")
    assert "the card has no metrics" in err
    assert len(hub.uploaded) == 1  # the weights, as a large file
    files = hub.repos["me/cats"][hub.branches["me/cats"]["main"]]
    assert set(files) == {".gitattributes", "model.safetensors", "README.md"}
    assert hub.cards == [files["README.md"].decode()]  # which the Hub has judged before
    assert same("hf://me/cats", tiny_model)
    assert loaded("hf://me/cats").layout == SMALL_LAYOUT
    assert loaded("hf://me/cats").class_names == NAMES


def test_a_card_that_is_there_stays_unless_it_is_to_be_replaced(hub, weights, monkeypatch, capsys):
    from ssd.cli.push import push_weights

    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    hub.commit("me/cats", {"README.md": b"# By hand"})

    def card():
        return hub.repos["me/cats"][hub.branches["me/cats"]["main"]]["README.md"]

    push_weights(str(weights), "hf://me/cats", license="mit")
    assert card() == b"# By hand"
    assert "README.md was there, and stays; --replace-card" in capsys.readouterr().err
    push_weights(str(weights), "me/cats", license="mit", replace_card=True)
    assert b"# cats" in card()


def test_private(hub, weights, monkeypatch):
    from ssd.cli.push import push_weights

    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    push_weights(str(weights), "me/secret", private=True)
    assert hub.private == {"me/secret"}


def test_without_a_token_nothing_is_sent_and_the_error_says_how_to_log_in(hub, weights):
    from ssd.cli.push import push_weights

    with pytest.raises(
        DownloadError, match=r"could not push to hf://me/cats: .*log in by `hf auth login`, or set"
    ):
        push_weights(str(weights), "me/cats")
    assert hub.repos == {}


def test_a_dry_run_shows_the_card_and_asks_nobody(hub, weights, capsys):
    from ssd.cli.push import push_weights

    push_weights(str(weights), "me/cats", dry_run=True)
    out, err = capsys.readouterr()
    assert out.startswith("---\n")
    assert "pipeline_tag: object-detection" in out
    assert "nothing was sent" in err
    assert hub.requests == []
