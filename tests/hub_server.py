"""A server that speaks the Hugging Face Hub's protocol, as far as huggingface_hub uses it for weights."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_these_tests"
_LFS_FROM = 4096  # bytes, from which on a file is uploaded as a large one


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """Repositories by name, and what was asked."""

    def __init__(self) -> None:
        self.address = ""
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        """Of each repository its revisions, the newest last, each with its files."""
        self.branches: dict[str, dict[str, str]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.uploaded: dict[str, bytes] = {}
        self.cards: list[str] = []
        """What was sent to be validated."""
        self.requests: list[str] = []
        self.cut: dict[str, int] = {}
        """How often the sending of a file is still to break off half-way."""
        self.wrong: set[str] = set()
        """Files that are sent with another content than their digest says."""
        self.down = False

    def add(self, repo: str, branch: str = "main", **files: bytes) -> str:
        """A new commit of a repository with these files, and those that it has; its name."""
        return self.commit(
            repo, {name.replace("__", "."): content for name, content in files.items()}, branch
        )

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        revisions = self.repos.setdefault(repo, {})
        branches = self.branches.setdefault(repo, {})
        whole = {**revisions.get(branches.get(branch, ""), {}), **files}
        name = hashlib.sha1(f"{repo} {len(revisions)} {branch}".encode()).hexdigest()
        revisions[name], branches[branch] = whole, name
        return name


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def handle_all(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size + 2)[:-2]
            self.rfile.readline()
        self.hub.requests.append(f"{self.command} {path}")
        self.may = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        try:
            if self.hub.down:
                self.answer(503)
                return
            for method, pattern, function in _ROUTES:
                if method == self.command and (found := re.fullmatch(pattern, path)):
                    function(self, body, *found.groups())
                    return
            self.fail(404, "NotHere")
        except (BrokenPipeError, ConnectionResetError):
            pass

    do_GET = do_HEAD = do_POST = do_PUT = handle_all

    def seen(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and the files of a revision; None if an error was answered."""
        if repo not in self.hub.repos or (repo in self.hub.private and not self.may):
            self.fail(404 if self.may else 401, "RepoNotFound")
            return None
        commit = self.hub.branches[repo].get(revision, revision)
        if commit not in self.hub.repos[repo]:
            self.fail(404, "RevisionNotFound")
            return None
        return commit, self.hub.repos[repo][commit]

    def info(self, _: bytes, repo: str, revision: str | None) -> None:
        if found := self.seen(repo, revision or "main"):
            commit, files = found
            siblings = [{"rfilename": name} for name in files]
            self.answer(200, {"id": repo, "sha": commit, "siblings": siblings, "private": False, "tags": []})

    def resolve(self, _: bytes, repo: str, revision: str, name: str) -> None:
        if not (found := self.seen(repo, revision)):
            return
        commit, files = found
        if repo in self.hub.gated and not self.may:
            self.fail(401, "GatedRepo")
            return
        if name not in files:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        content = files[name]
        large = len(content) >= _LFS_FROM
        about = {"X_Repo_Commit": commit, "ETag": f'"{git_digest(content)}"', "Accept_Ranges": "bytes"}
        if large:
            about |= {"X_Linked_Etag": f'"{sha256(content)}"', "X_Linked_Size": str(len(content))}
            # Large files lie on another host, where the token does not go.
            elsewhere = self.hub.address.replace("127.0.0.1", "localhost")
            self.answer(302, Location=f"{elsewhere}/files/{sha256(content)}/{name}", **about)
        else:
            self.answer(200, content, **about)

    def file(self, _: bytes, digest: str, name: str) -> None:
        assert not self.headers.get("Authorization")
        content = next(
            content
            for revisions in self.hub.repos.values()
            for files in revisions.values()
            for content in files.values()
            if sha256(content) == digest
        )
        if name in self.hub.wrong:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") or ["", "0"])[1])
        rest = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut.get(name, 0) > 0:
            self.hub.cut[name] -= 1
            self.wfile.write(rest[: len(rest) // 2])
            self.close_connection = True
            return
        self.wfile.write(rest)

    def create(self, body: bytes) -> None:
        if not self.may:
            self.fail(401, "Invalid credentials")
            return
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        url = {"url": f"{self.hub.address}/{repo}", "name": repo, "id": repo}
        if repo in self.hub.repos:
            self.answer(409, url)
            return
        self.hub.commit(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repo)
        self.answer(200, url)

    def validate(self, body: bytes) -> None:
        card = json.loads(body)["content"]
        self.hub.cards.append(card)
        front = yaml.safe_load(card.split("---\n")[1])
        self.answer(200 if isinstance(front, dict) else 400, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, _: str) -> None:
        if not self.may:
            self.fail(401, "RepoNotFound")
            return
        files = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["size"] >= _LFS_FROM else "regular",
                "shouldIgnore": False,
            }
            for each in json.loads(body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        objects = [
            {
                **each,
                "actions": {
                    "upload": {"href": f"{self.hub.address}/upload/{each['oid']}"},
                    "verify": {"href": f"{self.hub.address}/verify"},
                },
            }
            for each in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, digest: str) -> None:
        assert sha256(body) == digest
        self.hub.uploaded[digest] = body
        self.answer(200)

    def verify(self, body: bytes) -> None:
        asked = json.loads(body)
        known = self.hub.uploaded.get(asked["oid"], b"")
        self.answer(200 if len(known) == asked["size"] else 404, {})

    def commit(self, body: bytes, repo: str, branch: str) -> None:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploaded[value["oid"]]
        name = self.hub.commit(repo, files, branch)
        self.answer(200, {"commitUrl": f"{self.hub.address}/{repo}/commit/{name}", "commitOid": name})


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET", rf"/api/models/{_REPO}(?:/revision/(.+))?", _Handler.info),
    ("HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET", rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("HEAD", r"/files/(\w+)/(.+)", _Handler.file),
    ("GET", r"/files/(\w+)/(.+)", _Handler.file),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/upload/(\w+)", _Handler.upload),
    ("POST", r"/verify", _Handler.verify),
    ("POST", rf"/api/models/{_REPO}/commit/(.+)", _Handler.commit),
]


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        http.daemon_threads = True
        hub.address = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            http.shutdown()
            thread.join()
