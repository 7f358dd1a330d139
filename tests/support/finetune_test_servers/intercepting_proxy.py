"""A company's forward proxy that opens TLS: it answers for every host with a certificate of its own authority.

Names that it routes exist nowhere else, so whoever gets an answer came through it.
"""

import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from finetune_test_servers.certificates import Authority

CHUNK = 65_536


class InterceptingProxy:
    """Answers CONNECT, ends the client's TLS, and passes what it reads on in the clear."""

    def __init__(self, folder: Path, routes: dict[str, int]) -> None:
        """`routes`: ports of loopback by host, as clients name it."""
        self._authority = Authority.create(folder)
        self.ca_certificate = self._authority.ca.certificate.read_text()
        self._routes = routes
        self._contexts = {host: self._context(host) for host in routes}
        self.url = ""
        self.opened: list[str] = []
        """Hosts whose TLS was opened, one for each connection."""

        self.refused: list[str] = []
        """Hosts whose certificate a client did not trust."""

    @classmethod
    @contextmanager
    def start(cls, folder: Path, routes: dict[str, int]) -> Iterator[Self]:
        """Serve on loopback."""
        proxy = cls(folder, routes)

        class Handler(socketserver.StreamRequestHandler):
            rbufsize = 0  # what follows the blank line belongs to TLS

            def handle(self) -> None:
                proxy._serve(self.connection, self.rfile.readline, self.wfile.write)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            block_on_close = False

        with Server(("127.0.0.1", 0), Handler) as server:
            proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            try:
                yield proxy
            finally:
                server.shutdown()
                thread.join()

    def _context(self, host: str) -> ssl.SSLContext:
        pair = self._authority.server(f"for-{host}", host, (host,))
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(pair.certificate, pair.key)
        return context

    def _serve(self, client: socket.socket, read_line: Callable[[], bytes], write: Callable[[bytes], object]) -> None:
        method, target, *_ = str(read_line(), "latin-1").split()
        while read_line().strip():
            pass
        host = target.rsplit(":", 1)[0].strip("[]")
        if method != "CONNECT" or host not in self._routes:
            write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            return

        write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        try:
            opened = self._contexts[host].wrap_socket(client, server_side=True)
            # With TLS 1.3, a client refuses the certificate after the server has finished: its alert comes first.
            first = opened.recv(CHUNK)
        except OSError:
            self.refused.append(host)
            return

        self.opened.append(host)
        with opened, socket.create_connection(("127.0.0.1", self._routes[host])) as upstream, suppress(OSError):
            upstream.sendall(first)
            back = threading.Thread(target=_pump, args=(upstream, opened), daemon=True)
            back.start()
            _pump(opened, upstream)
            back.join(30)


def _pump(source: socket.socket, target: socket.socket) -> None:
    """Pass bytes on until one side ends."""
    with suppress(OSError):
        while data := source.recv(CHUNK):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
