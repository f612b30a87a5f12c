"""A hub on loopback: as much of its API and of its files' addresses as huggingface_hub asks for to fetch a model."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

Client = Callable[..., None]  # sets constants of huggingface_hub
API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)(/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Repository:
    """Commits with their files, the branches and tags that name them, and what goes wrong."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gate: int | None = None  # 401 without a token, 403 where the terms are not accepted: the listing is open, the files are not
    gate_says: str = "Access to this repository is restricted."
    damaged: set[str] = field(default_factory=set)  # files that are sent as other bytes than they are
    dying: dict[str, int] = field(default_factory=dict)  # how often the connection still dies halfway through a file

    def commit(self, files: dict[str, bytes], *names: str) -> str:
        """Add a commit and let branches or tags name it; its hash."""
        made = _sha1(b"".join(name.encode() + content for name, content in sorted(files.items())))
        self.commits[made] = files
        self.refs.update(dict.fromkeys(names, made))
        return made


class Hub:
    """What is served, and what was asked for. A dataset's name is `datasets/ORG/NAME`."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []  # (method, path)
        self.tokens: set[str | None] = set()
        self.refusal: tuple[int, dict[str, str]] | None = None  # answered to everything
        self.error_of_missing = 404  # the hub answers 401 to those who are not logged in

    def add(self, name: str, files: dict[str, bytes], *names: str) -> str:
        """Add a commit to a repository; its hash."""
        return self.repositories.setdefault(name, Repository()).commit(files, *(names or ("main",)))

    def asked(self) -> list[tuple[str, str]]:
        """The requests since the last call."""
        seen, self.requests = self.requests, []
        return seen


def read_folder(folder: Path) -> dict[str, bytes]:
    """A model folder as files of a commit."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def running() -> Iterator[Hub]:
    """A hub on a free loopback port."""
    hub = Hub()

    class Handler(_Handler):
        served = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.served.requests.append((self.command, path))
        self.served.tokens.add(self.headers.get("Authorization"))
        if self.served.refusal:
            status, headers = self.served.refusal
            return self._answer(status, headers)
        found = API.fullmatch(url.path) or FILE.fullmatch(url.path)
        kind = "datasets/" if found and (found["kind"] or "").startswith("datasets") else ""
        repository = self.served.repositories.get(kind + found["name"]) if found else None
        if not found or not repository:
            return self._refuse(self.served.error_of_missing, "RepoNotFound", "Repository not found")
        revision = unquote(found["revision"] or "main")
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[commit]
        if "path" not in found.groupdict():
            listing = [_listed(name, content) for name, content in files.items()]
            return self._answer(200, {}, json.dumps(listing if found["what"] == "tree" else {"id": found["name"], "sha": commit}).encode())
        if repository.gate:
            return self._refuse(repository.gate, "GatedRepo", repository.gate_says)
        name = unquote(found["path"])
        if name not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        return self._send_file(repository, commit, name, files[name])

    do_HEAD = do_GET

    def _send_file(self, repository: Repository, commit: str, name: str, content: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, size = int(wanted[1]) if wanted else 0, len(content)
        headers = {"ETag": f'"{_sha256(content) if is_large(name) else _sha1(content)}"', "X-Repo-Commit": commit}
        if wanted:
            content = content[: int(wanted[2]) + 1] if wanted[2] else content
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{size}"
        of_header = wanted and wanted[2]
        if name in repository.damaged and not of_header:
            content = bytes(len(content) - 1) + b"!"
        dies = self.command == "GET" and repository.dying.get(name, 0) > 0 and not of_header
        if dies:
            repository.dying[name] -= 1
            self.close_connection = True
        self._answer(206 if wanted else 200, headers, content[start:], sent=max(0, len(content) // 2 - start) if dies else None)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._answer(status, {"X-Error-Code": code, "X-Error-Message": message})

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"", sent: int | None = None) -> None:
        """Answer with a body, of which only `sent` bytes are written."""
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])

    def log_message(self, *args: object) -> None:
        pass


def is_large(name: str) -> bool:
    """Whether the hub keeps a file beside git, and lists its SHA-256."""
    return name.endswith(".safetensors")


def _listed(name: str, content: bytes) -> dict[str, object]:
    large = {"lfs": {"oid": _sha256(content), "size": len(content), "pointerSize": 134}} if is_large(name) else {}
    return {"type": "file", "path": name, "size": len(content), "oid": _sha1(content), **large}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
