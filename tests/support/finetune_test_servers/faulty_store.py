"""A proxy in front of the S3 server that fails on request: refusals, broken connections, damaged content, lost answers.

Real requests pass through a real socket, so tests see the client as it runs in a pod.
"""

import http.client
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, Self
from urllib.parse import urlparse

from finetune_test_servers.s3_server import S3Server


@dataclass(frozen=True)
class Request:
    """A client's request; `path` holds the query too."""

    method: str
    path: str
    headers: dict[str, str]
    deletes: tuple[str, ...] = ()
    """Keys of a DeleteObjects request."""


@dataclass
class Fault:
    """Fate of the first `times` requests of a method whose path contains `part`; exactly one kind is set."""

    method: str
    part: str
    times: int = 1
    code: str = ""
    """Answer with this S3 error code, quoting the access key as some stores do."""
    status: int = 403
    damages: bool = False
    """Flip the last byte of the body on its way to the store."""
    breaks_before: bool = False
    """Close the connection instead of forwarding."""
    breaks_after: bool = False
    """Forward, then close the connection without an answer."""
    forwards: bool = False
    """Forward as if there were no fault, after `then`."""
    then: Callable[[], None] = lambda: None
    """Called before anything else happens."""


@dataclass
class FaultyStore:
    """The proxy; `faults` may be changed at any time."""

    store: S3Server
    endpoint_url: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    plan: Callable[[Request], Fault | None] = lambda request: None
    """Asked about every request before `faults` are; the fault that it names, if any, is due."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    @contextmanager
    def start(cls, store: S3Server) -> Iterator[Self]:
        """Listen on loopback."""
        faulty = cls(store)
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"faulty": faulty}))
        server.daemon_threads = True
        faulty.endpoint_url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield faulty
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def take(self, request: Request) -> Fault | None:
        """Record a request; returns the fault that it meets, if any."""
        with self.lock:
            self.requests.append(request)
            if planned := self.plan(request):
                return planned
            for fault in self.faults:
                if fault.times > 0 and fault.method == request.method and fault.part in request.path:
                    fault.times -= 1
                    return fault
        return None

    def paths(self, method: str) -> list[str]:
        """Paths of the requests of a method, in order."""
        return [request.path for request in self.requests if request.method == method]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faulty: ClassVar[FaultyStore]

    def log_message(self, *_: object) -> None:
        """Requests are kept in `FaultyStore.requests`."""

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        keys = re.findall("<Key>(.*?)</Key>", body.decode()) if self.path.endswith("?delete") else []
        request = Request(self.command, self.path, dict(self.headers), tuple(map(unescape, keys)))
        fault = self.faulty.take(request)

        if fault is None:
            return self._forward(body)

        fault.then()
        if fault.forwards:
            return self._forward(body)
        if fault.code:
            return self._refuse(fault)
        if fault.damages:
            return self._forward(body[:-1] + bytes([body[-1] ^ 1]))

        self.close_connection = True
        if fault.breaks_after:
            self._ask(body)
        return None

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815 (names that http.server calls)

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(urlparse(self.faulty.store.endpoint_url).netloc, timeout=30)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            upstream.close()

    def _forward(self, body: bytes) -> None:
        status, headers, content = self._ask(body)
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = dict(headers).get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, fault: Fault) -> None:
        text = f"<Error><Code>{fault.code}</Code><Message>no: {self.headers.get('Authorization')}</Message></Error>"
        body = b"" if self.command == "HEAD" else text.encode()
        self.send_response_only(fault.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
