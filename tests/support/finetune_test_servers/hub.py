"""A hub over HTTP, as small as huggingface_hub lets it be: repositories, revisions, gates, outages, and commits.

Large files arrive by Git LFS: the Hub's own protocol for them (Xet) has no small server, so clients switch it off.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, Self
from urllib.parse import unquote, urlparse

from finetune_test_servers.hub_writes import handle_write

COMMIT = "a" * 40
OLD_COMMIT = "b" * 40
TOKEN = "hf_canary_token"


@dataclass
class HubRepo:
    """Files of a repository, the same at every revision."""

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False
    refused: dict[str, int] = field(default_factory=dict)
    """Status with which the hub answers for a file, instead of its content."""
    ignores_ranges: bool = False
    """True if the whole file is sent whatever part was asked for, as some proxies do."""
    damaged: dict[str, bytes] = field(default_factory=dict)
    """Content that arrives instead of the listed one."""
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "v1": OLD_COMMIT})


@dataclass
class Hub:
    """A running hub. `repos` by API path, such as models/acme/tiny; `requests`: paths that were asked for; `failures`:
    statuses of the next answers."""

    repos: dict[str, HubRepo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    ranges: list[tuple[int, int]] = field(default_factory=list)
    """First and last byte of each part of a file that was asked for."""
    page: bytes = b""
    """An HTML page that answers every request instead, as a proxy does that wants a login."""
    retry_after: str = ""
    """Header with which failures ask to wait."""
    url: str = ""
    bodies: list[bytes] = field(default_factory=list)
    """Bodies that were posted."""
    halfway: Callable[[str], None] = lambda path: None
    """Called with the path after the first half of a file has been sent."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Git LFS objects by their SHA-256."""

    @classmethod
    @contextmanager
    def start(cls) -> Iterator[Self]:
        """Serve on loopback."""
        hub = cls()
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def fetched(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return {path.split("/resolve/")[1].split("/", 1)[1] for path in self.requests if "/resolve/" in path}


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keep the tests' output clean."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self._write()

    def do_PUT(self) -> None:
        self._write()

    def _write(self) -> None:
        path = unquote(urlparse(self.path).path).lstrip("/")
        body = self._read_body()
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.bodies.append(body)
        if self.hub.failures:
            return self._send(self.hub.failures.pop(0), b"canary body of an error")
        status, answer = handle_write(self.hub, path, self.headers.get("Authorization", ""), body)
        return self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path).lstrip("/")
        self.hub.requests.append(path)
        if self.hub.page:
            return self._send(200, self.hub.page, {"Content-Type": "text/html"})
        if self.hub.failures:
            asked = {"Retry-After": self.hub.retry_after} if self.hub.retry_after else {}
            return self._send(self.hub.failures.pop(0), b"canary body of an error", asked)
        name, rest = _split(path)
        repo = self.hub.repos.get(name)
        if repo is None:
            # The real hub answers so too: a stranger does not learn whether a repository exists.
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        if repo.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(403 if "Authorization" in self.headers else 401, b"", {"X-Error-Code": "GatedRepo"})
        return self._answer(repo, name, rest)

    def _answer(self, repo: HubRepo, name: str, rest: str) -> None:
        kind, _, tail = rest.partition("/")
        if kind == "auth-check":
            return self._send(200 if self.headers.get("Authorization") == f"Bearer {TOKEN}" else 403, b"")

        revision, _, file = (tail or "main").partition("/")
        commit = repo.revisions.get(revision, revision if revision in repo.revisions.values() else None)
        if commit is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})

        if kind == "resolve" and file in repo.refused:
            return self._send(repo.refused[file], b"canary body of an error")
        if kind == "resolve":
            data = repo.damaged.get(file, repo.files[file])
            tag = hashlib.sha256(data).hexdigest()
            status, data = self._cut(repo, data)
            return self._send(status, data, {"X-Repo-Commit": commit, "ETag": f'"{tag}"'})

        if kind == "tree":
            listed = [
                {"type": "file", "path": path, "size": len(data), "oid": "0" * 40} for path, data in repo.files.items()
            ]
            return self._send_json(listed)

        siblings = [_sibling(path, data) for path, data in repo.files.items()]
        described = {"id": name.partition("/")[2], "sha": commit, "siblings": siblings, "private": repo.private}
        return self._send_json(described)

    def _cut(self, repo: HubRepo, data: bytes) -> tuple[int, bytes]:
        """Status and content for the range that was asked for, if any."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or repo.ignores_ranges:
            return 200, data
        self.hub.ranges.append((int(asked[1]), int(asked[2])))
        return 206, data[int(asked[1]) : int(asked[2]) + 1]

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            half = len(body) // 2
            self.wfile.write(body[:half])
            self.hub.halfway(self.path)
            with suppress(BrokenPipeError):  # the client may have ended meanwhile
                self.wfile.write(body[half:])


def _sibling(path: str, data: bytes) -> dict[str, object]:
    """A file as the hub lists it; for weights, with their SHA-256."""
    listed: dict[str, object] = {"rfilename": path, "size": len(data), "blobId": "0"}
    if path.endswith(".safetensors"):
        listed["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
    return listed


def _split(path: str) -> tuple[str, str]:
    """Splits an API path or a file's path into models/org/name and the rest."""
    parts = path.split("/")
    if parts[0] == "api":
        return "/".join(parts[1:4]), "/".join(parts[4:])
    if parts[0] == "datasets":
        return "/".join(parts[:3]), "/".join(parts[3:])
    return "models/" + "/".join(parts[:2]), "/".join(parts[2:])
