"""A Hub on this machine for the real huggingface_hub client: repositories, one-commit publishing, Xet and LFS uploads.

It checks what the real one checks (tokens, parent commits, that uploaded bytes exist) and can be told to fail.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.servers.xet import XetFile, XetStores

TOKEN = "hf_loopback"
_REGULAR_BYTES = 1 << 20
"""Files of at least this size are kept outside of git, as is all that is no text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """One file of a commit: in `path`, or in a Xet store."""

    num_bytes: int
    oid: str
    sha256: str | None = None
    """Of files outside of git."""
    path: Path | None = None
    xet: XetFile | None = None

    def entry(self, name: str) -> dict[str, Any]:
        """Return how a listing shows it."""
        lfs = {"lfs": {"oid": self.sha256, "size": self.num_bytes, "pointerSize": 134}} if self.sha256 else {}
        return {"type": "file", "path": name, "size": self.num_bytes, "oid": self.oid, **lfs}


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One commit."""

    oid: str
    title: str
    description: str
    files: dict[str, Blob]


@dataclass(slots=True, kw_only=True)
class Fault:
    """What goes wrong with the next requests that match."""

    method: str
    path: re.Pattern[str]
    status: int | None
    """Answer this. None: do what was asked, and close the connection without an answer."""
    times: int


@dataclass(slots=True, kw_only=True)
class Hub:
    """The state of the server, for tests to look at and to change."""

    directory: Path
    xet: XetStores
    endpoint: str = ""
    repos: dict[str, list[Commit]] = field(default_factory=dict)
    """Commits on `main`, oldest first."""
    faults: list[Fault] = field(default_factory=list)
    lfs_puts: list[str] = field(default_factory=list)
    """Digests of the files whose bytes came by LFS, in order."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def environment(self) -> dict[str, str]:
        """Return the variables that make a client use this server."""
        return {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN}

    def fail(self, method: str, path: str, *, status: int | None = None, times: int = 1) -> None:
        """Make the next requests that match fail with a status, or succeed with their answer lost."""
        self.faults.append(Fault(method=method, path=re.compile(path), status=status, times=times))

    def create(self, repo_id: str, files: dict[str, bytes] | None = None) -> None:
        """Make a repository with what a fresh one has, and some small files."""
        self.repos[repo_id] = []
        added = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"} | (files or {})
        self.commit(repo_id, "initial commit", {name: self.keep(data) for name, data in added.items()})

    def commit(self, repo_id: str, title: str, changed: dict[str, Blob], description: str = "") -> Commit:
        """Add a commit that changes some files."""
        history = self.repos[repo_id]
        files = (history[-1].files if history else {}) | changed
        oid = hashlib.sha1(f"{repo_id} {len(history)} {time.time_ns()}".encode()).hexdigest()
        history.append(Commit(oid=oid, title=title, description=description, files=files))
        return history[-1]

    def keep(self, data: bytes) -> Blob:
        """Keep a small file, as git would."""
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        path = self.directory / "git" / oid
        _write_whole(path, data)
        return Blob(num_bytes=len(data), oid=oid, path=path)

    def uploaded(self, sha256: str, num_bytes: int) -> Blob | None:
        """Return the large file that has been uploaded under a digest."""
        oid = hashlib.sha1(sha256.encode()).hexdigest()
        if (path := self.directory / "lfs" / sha256).exists():
            return Blob(num_bytes=num_bytes, oid=oid, sha256=sha256, path=path)
        xet = self.xet.find(sha256)
        return Blob(num_bytes=num_bytes, oid=oid, sha256=sha256, xet=xet) if xet else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *_: object) -> None: ...

    def do_any(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self._next_fault(path)
        self.lost = fault is not None and fault.status is None
        if fault and fault.status:
            return self.refuse(fault.status, "", "told to fail")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/lfs-put/"):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        for method, pattern, handle in _ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                self.repo = match.groupdict().get("repo", "")
                if self.repo and self.repo not in self.hub.repos:
                    return self.refuse(404, "RepoNotFound", "Repository not found")
                return handle(self, **{name: text for name, text in match.groupdict().items() if name != "repo"})
        return self.refuse(404, "", f"no such endpoint: {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_any

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if self.lost:
            self.close_connection = True
            return
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, text: str) -> None:
        self.answer({"error": text}, status, {"X-Error-Code": code, "X-Error-Message": text})

    def find(self, revision: str | None) -> Commit | None:
        history = self.hub.repos[self.repo]
        if revision in (None, "main"):
            return history[-1]
        found = next((commit for commit in history if commit.oid == revision), None)
        if found is None:
            self.refuse(404, "RevisionNotFound", f"no revision {revision}")
        return found

    def create_repo(self) -> None:
        asked = json.loads(self.body)
        repo_id = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
        with self.hub.lock:
            if is_new := repo_id not in self.hub.repos:
                self.hub.create(repo_id)
        self.answer({"url": f"{self.hub.endpoint}/{repo_id}"}, 200 if is_new else 409)

    def info(self, revision: str | None = None) -> None:
        if commit := self.find(revision):
            self.answer({"id": self.repo, "sha": commit.oid})

    def tree(self, revision: str) -> None:
        if commit := self.find(revision):
            self.answer([blob.entry(name) for name, blob in sorted(commit.files.items())])

    def history(self) -> None:
        same = {"date": "2026-01-01T00:00:00.000Z", "authors": []}
        history = reversed(self.hub.repos[self.repo])
        self.answer([{"id": c.oid, "title": c.title, "message": c.description, **same} for c in history])

    def preupload(self) -> None:
        files = []
        for asked in json.loads(self.body)["files"]:
            is_text = b"\0" not in base64.b64decode(asked["sample"]) and not asked["path"].endswith(".safetensors")
            mode = "regular" if is_text and asked["size"] < _REGULAR_BYTES else "lfs"
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False})
        self.answer({"files": files})

    def xet_token(self, kind: str) -> None:
        stores = self.hub.xet
        url = stores.url(stores.fresh() if kind == "write" else stores.copy(self.query["store"][0]))
        expires = int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "x", "X-Xet-Token-Expiration": str(expires)}
        self.answer({"casUrl": url, "accessToken": "x", "exp": expires}, headers=headers)

    def lfs_batch(self) -> None:
        objects = json.loads(self.body)["objects"]
        for each in objects:
            if (self.hub.directory / "lfs" / each["oid"]).exists():
                continue  # as git-lfs has it: what the server has, it names no action for
            each["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs-put/{each['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, sha256: str) -> None:
        self.hub.lfs_puts.append(sha256)
        if hashlib.sha256(self.body).hexdigest() != sha256:
            return self.refuse(400, "", "these bytes have another SHA-256")
        _write_whole(self.hub.directory / "lfs" / sha256, self.body)
        return self.answer({})

    def create_commit(self) -> None:
        hub = self.hub
        header, *lines = (json.loads(line)["value"] for line in self.body.splitlines())
        changed = {}
        for line in lines:
            small = line.get("content")
            blob = hub.uploaded(line["oid"], line["size"]) if small is None else hub.keep(base64.b64decode(small))
            if blob is None:
                return self.refuse(400, "", f"{line['path']} was not uploaded")
            changed[line["path"]] = blob
        with hub.lock:
            if header.get("parentCommit") not in (None, hub.repos[self.repo][-1].oid):
                return self.refuse(412, "", "A commit has happened since. Please refresh and try again.")
            commit = hub.commit(self.repo, header["summary"], changed, header["description"])
        return self.answer({"commitOid": commit.oid, "commitUrl": f"{hub.endpoint}/{self.repo}/commit/{commit.oid}"})

    def resolve(self, revision: str, name: str) -> None:
        if (commit := self.find(revision)) is None:
            return None
        if (blob := commit.files.get(name)) is None:
            return self.refuse(404, "EntryNotFound", f"no file {name}")
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.sha256 or blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.xet:  # bytes come through Xet only
            url = f"{self.hub.endpoint}/api/models/{self.repo}/xet-read-token/{commit.oid}?store={blob.xet.store}"
            headers |= {"X-Xet-Hash": blob.xet.hash, "X-Xet-Refresh-Route": url, "X-Linked-Size": str(blob.num_bytes)}
            return self.answer(b"", 200 if self.command == "HEAD" else 501, headers)
        data = blob.path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.answer(data, headers=headers)
        start, end = int(asked[1]), int(asked[2] or len(data) - 1) + 1
        return self.answer(data[start:end], 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})

    def _next_fault(self, path: str) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and fault.method == self.command and fault.path.search(path):
                    fault.times -= 1
                    return fault
        return None


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file that others may be reading under the same name, with the same bytes."""
    part = path.with_name(f"{path.name}.{threading.get_ident()}")
    part.write_bytes(data)
    part.replace(path)


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_AT = r"(?P<revision>[^/]+)"
_ROUTES = (
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("POST", r"/api/validate-yaml", lambda handler: handler.answer({"errors": [], "warnings": []})),
    ("GET", rf"/api/models/{_REPO}", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/revision/{_AT}", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/tree/{_AT}", _Handler.tree),
    ("GET", rf"/api/models/{_REPO}/commits/[^/]+", _Handler.history),
    ("GET", rf"/api/models/{_REPO}/xet-(?P<kind>read|write)-token/[^/]+", _Handler.xet_token),
    ("POST", rf"/api/models/{_REPO}/preupload/[^/]+", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/[^/]+", _Handler.create_commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs-put/(?P<sha256>[0-9a-f]{64})", _Handler.lfs_put),
    ("GET", rf"/{_REPO}/resolve/{_AT}/(?P<name>.+)", _Handler.resolve),
    ("HEAD", rf"/{_REPO}/resolve/{_AT}/(?P<name>.+)", _Handler.resolve),
)


@contextlib.contextmanager
def serve_hub(directory: Path) -> Iterator[Hub]:
    """Run a Hub that keeps its files in `directory`, on a free port of 127.0.0.1."""
    hub = Hub(directory=directory, xet=XetStores(directory=directory / "xet"))
    for name in ("git", "lfs", "xet"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
