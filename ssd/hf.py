"""Weights on the Hugging Face Hub (extra ``hub``): found, downloaded into its own cache, and pushed.

All that comes from there is a file of weights for the usual readers; nothing else is downloaded or run.
"""

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ssd.errors import DownloadError, MissingExtra, UserError, as_line
from ssd.terminal import is_watched

SCHEME = "hf://"
CARD = "README.md"
WEIGHTS = "model.safetensors"
"""What `push` calls weights, and what is taken of a repository that has it, where no file is named."""

_REFERENCE = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<first>refs/(?:pr|convert)/[^/@]+|[^/@]+))?"  # as huggingface_hub writes it
    r"(?:/(?P<file>[^@]+))?"
    r"(?:@(?P<last>.+))?"
)


class Reference(NamedTuple):
    """What ``hf://`` names."""

    repo: str
    """Owner and name."""
    file: str | None = None
    """Path in the repository; None where none is named."""
    revision: str | None = None
    """A branch, a tag or a commit; None for the main branch."""

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return f"{SCHEME}{self.repo}{file}" + (f"@{self.revision}" if self.revision else "")


def parse(text: str) -> Reference:
    """What a reference names: ``hf://owner/repo[/file][@revision]``; the revision may stand before the file.

    >>> parse("hf://me/cats/best.safetensors@v2"), parse("hf://me/cats@v2/best.safetensors").revision
    (Reference(repo='me/cats', file='best.safetensors', revision='v2'), 'v2')

    Raises:
        DownloadError: it is none.
    """
    found = _REFERENCE.fullmatch(text)
    parts = (found["file"] or "").split("/") if found else []
    if not found or (found["first"] and found["last"]) or {".", ".."} & set(parts) or "" in parts[1:]:
        raise DownloadError(f"{text} does not name weights of the Hub: {SCHEME}owner/repo[/file][@revision]")
    return Reference(found["repo"], found["file"], found["first"] or found["last"])


def fetch(
    text: str, choose: Callable[[list[str]], str], *, force: bool = False, progress: bool = True
) -> Path:
    """The file that a reference names, in the Hub's cache (``HF_HOME`` moves it); downloaded if not there.

    What is in the cache is used without asking the Hub, so that a branch stays where it was until `force`.
    A file whose content is not what its name in the cache says, its digest, is downloaded again.

    Args:
        text: see `parse`.
        choose: of the names of all files of a repository, that of the weights; it raises where none fits.
        force: ask the Hub for the newest.
        progress: show a progress bar.

    Raises:
        DownloadError: it cannot be had; the message says what to do.
        MissingExtra: huggingface_hub is not installed.
    """
    wanted, hub = parse(text), _package()
    if not force and (cached := _cached(hub, wanted, wanted.file or WEIGHTS)) and _is_whole(cached):
        return cached
    with _told(wanted, "download"), _bars(shown=progress):
        name = wanted.file or choose(_names(hub, wanted))
        cached = _cached(hub, wanted, name)
        intact = cached is not None and _is_whole(cached)
        if cached is not None and intact and not force:
            return cached
        if progress and not is_watched():
            print(f"downloading {as_line(str(wanted._replace(file=name)))}", file=sys.stderr)
        path = Path(
            hub.hf_hub_download(
                wanted.repo,
                name,
                revision=wanted.revision,
                library_name="ssd300",
                force_download=cached is not None and not intact,
            )
        )
        if not _is_whole(path):
            with contextlib.suppress(OSError):
                _blob(path).unlink()
                path.unlink()
            raise DownloadError(
                f"could not download {wanted._replace(file=name)}: what came does not have the digest that "
                "the Hub gives, and was removed. The same call tries again"
            )
        return path


def _names(hub: Any, wanted: Reference) -> list[str]:
    """The files of a repository; where the Hub cannot be asked, those that are in the cache."""
    try:
        info = hub.HfApi(library_name="ssd300").model_info(wanted.repo, revision=wanted.revision)
        return [each.rfilename for each in info.siblings or ()]
    except Exception as error:
        if getattr(error, "response", None) is not None:  # it answered
            raise
        try:
            folder = Path(hub.snapshot_download(wanted.repo, revision=wanted.revision, local_files_only=True))
        except Exception:
            raise error from None
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        print(
            f"ssd: the Hub cannot be asked what {wanted} has; the weights among the files of it that are in "
            "the cache are taken",
            file=sys.stderr,
        )
        return names


def _cached(hub: Any, wanted: Reference, name: str) -> Path | None:
    with contextlib.suppress(ValueError):  # a name that cannot be; the download says so
        found = hub.try_to_load_from_cache(wanted.repo, name, revision=wanted.revision)
        return Path(found) if isinstance(found, str) else None
    return None


def _blob(path: Path) -> Path:
    """What a name in a snapshot leads to, which is called by its digest; the path itself without links."""
    return path.parent / os.readlink(path) if path.is_symlink() else path


def _is_whole(path: Path) -> bool:
    """Whether a file of the cache has the digest that it is called by: SHA-256, or Git's of small ones."""
    blob = _blob(path)
    digest = hashlib.sha256() if len(blob.name) == 64 else hashlib.sha1(usedforsecurity=False)
    if blob == path or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return path.is_file()  # nothing is known
    try:
        with blob.open("rb") as file:
            if len(blob.name) == 40:
                digest.update(b"blob %d\0" % os.fstat(file.fileno()).st_size)
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError:
        return False
    return digest.hexdigest() == blob.name


def push(
    repo: str, files: Mapping[str, bytes | Path], *, private: bool, replace_card: bool, message: str
) -> tuple[str, list[str]]:
    """Make a repository, if it is not there, and add files to its main branch, in one commit.

    Args:
        repo: owner and name.
        files: contents, or paths of local files, by their names there.
        private: of a new repository; one that is there stays as it is.
        replace_card: whether a `CARD` that is there is replaced.
        message: of the commit.

    Returns:
        The address of the repository, and the names of the files that were left as they were.

    Raises:
        DownloadError: it cannot be done; the message says what to do. Nothing of the files is there then.
        MissingExtra: huggingface_hub is not installed.
    """
    hub = _package()
    api = hub.HfApi(library_name="ssd300")
    with _told(Reference(repo), "push to"):
        url = str(api.create_repo(repo, private=private, exist_ok=True))
        kept = [CARD] if CARD in files and not replace_card and api.file_exists(repo, CARD) else []
        changes = [
            hub.CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
            if name not in kept
        ]
        api.create_commit(repo, changes, commit_message=message)
    return url, kept


def _package() -> Any:
    try:
        import huggingface_hub  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise MissingExtra("hub") from error
    return huggingface_hub


@contextlib.contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    """Without the progress bars of huggingface_hub, unless they are wanted; they need a terminal anyway."""
    utils: Any = _package().utils
    if shown or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


_LOGIN = "log in by `hf auth login`, or set HF_TOKEN to a token"


@contextlib.contextmanager
def _told(wanted: Reference, doing: str) -> Iterator[None]:
    """Within the block, what huggingface_hub raises becomes an error of ours, with what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of whatever library it uses for HTTP, which changed twice
        raise DownloadError(f"could not {doing} {wanted}: {_problem(error, wanted, doing)}") from error


def _problem(error: Exception, wanted: Reference, doing: str) -> str:
    from huggingface_hub import constants, errors  # noqa: PLC0415

    right = "read it" if doing == "download" else "write there"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"who wants it has to be let in: ask for access at {constants.ENDPOINT}/{wanted.repo}, then "
            f"{_LOGIN} of that account"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        there = (
            "there is no such repository, or it is not open to everyone: check the name "
            f"({constants.ENDPOINT}/{wanted.repo}); or "
        )
        return f"HTTP {status}; {'' if status == 403 else there}{_LOGIN} that may {right}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {wanted.revision}; name a branch, a tag or a commit of it"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        if constants.HF_HUB_OFFLINE:
            return "it is not in the cache, and HF_HUB_OFFLINE is set; unset that, or pass the path of a file"
        why = _line(error.__cause__ or error)
        asked = f"it is not in the cache, and asking {constants.ENDPOINT} failed"
        return f"{asked} ({why}). The same call tries again"
    if isinstance(error, errors.EntryNotFoundError):
        return f"the repository has no file {wanted.file}; without a file, its weights are looked for"
    return f"{_line(error)}. The same call tries again" if doing == "download" else _line(error)


def _line(error: BaseException) -> str:
    return as_line(str(error).strip().split("\n")[0] or type(error).__name__, 300).rstrip(".")
