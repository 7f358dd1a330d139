"""Serves the progress server's application on a listening socket, and bounds what any connection may take.

aiohttp bounds lines, headers and bodies, but waits for them without end, and asyncio's own server counts nothing before
TLS is set up. So connections are accepted here. Each has `EXCHANGE_SECONDS`, from TLS handshake to answer. A trainer
whose report was accepted then has `RESTING_SECONDS` until its next one, which has `EXCHANGE_SECONDS` again.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

from aiohttp import web

from finetune_operator.reports.visits import Address, Visits

HANDSHAKE_SECONDS = 5.0
EXCHANGE_SECONDS = 10.0  # trainers give up after as long
RESTING_SECONDS = 75.0  # trainers report at least every minute, even if nothing changes
ACCEPT_RETRY_SECONDS = 1.0
LINGERING_SECONDS = 2.0  # time for a client that still sends to read why it is refused
BACKLOG = 128
MAX_LINE_BYTES = 2048  # names of namespace and job have at most 316 characters
MAX_HEADER_BYTES = 8192  # of one header: tokens have 1 to 3 kB
MAX_HEADERS = 32

logger = logging.getLogger(__name__)


def listen(port: int, host: str = "") -> socket.socket:
    """Opens a socket for IPv4 and, where there is any, IPv6."""
    is_dual = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=is_dual)
    listener.setblocking(False)
    return listener


class Site:
    """An application behind TLS, with bounds on connections."""

    def __init__(self, app: web.Application, tls: ssl.SSLContext, visits: Visits) -> None:
        self._tls = tls
        self._visits = visits
        self._runner = web.AppRunner(
            app,
            access_log=None,
            auto_decompress=False,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            max_headers=MAX_HEADERS,
            lingering_time=LINGERING_SECONDS,
            keepalive_timeout=RESTING_SECONDS,
        )

    async def run(self, listener: socket.socket) -> None:
        """Serve until cancelled."""
        await self._runner.setup()
        try:
            async with asyncio.TaskGroup() as connections:
                while True:
                    accepted = await self._accept(listener)
                    if accepted is not None:
                        self._admit(connections, *accepted)
                    await asyncio.sleep(0)  # a flood of connections must not keep the loop from its other work
        finally:
            listener.close()
            await self._runner.cleanup()

    async def _accept(self, listener: socket.socket) -> tuple[socket.socket, Address] | None:
        try:
            return await asyncio.get_running_loop().sock_accept(listener)
        except OSError as error:
            logger.warning("cannot accept a connection: %s", error)
            await asyncio.sleep(ACCEPT_RETRY_SECONDS)
            return None

    def _admit(self, connections: asyncio.TaskGroup, sock: socket.socket, address: Address) -> None:
        server = self._runner.server
        if server is None:
            raise RuntimeError("the site is not set up")

        task: asyncio.Task[None]
        connection = _Connection(server, sock)
        if self._visits.enter(address, lambda: task.cancel(), connection.rest):
            task = connections.create_task(self._serve(connection, address))
        else:
            sock.close()

    async def _serve(self, connection: "_Connection", address: Address) -> None:
        """Serve one connection to its end. No error leaves: what a stranger sends must not end the operator."""
        try:
            await connection.run(self._tls)
        except OSError as error:  # a time-out and a failed handshake, too
            logger.debug("connection from %s ended: %s", address[0], error or type(error).__name__)
        except Exception:
            logger.exception("defect in the progress server")
        finally:
            self._visits.end(address)


class _Connection(asyncio.Protocol):
    """aiohttp's handler of one connection, with a deadline for what the client does next."""

    def __init__(self, server: Callable[[], asyncio.Protocol], sock: socket.socket) -> None:
        self._http = server()
        self._socket = sock
        self._transport: asyncio.Transport | None = None
        self._closed = asyncio.Event()
        self._deadline = asyncio.timeout(EXCHANGE_SECONDS)
        self._is_resting = False

    async def run(self, tls: ssl.SSLContext) -> None:
        """Serve until the connection is closed; raises TimeoutError after its deadline, and OSError."""
        try:
            async with self._deadline:
                await asyncio.get_running_loop().connect_accepted_socket(
                    lambda: self, self._socket, ssl=tls, ssl_handshake_timeout=HANDSHAKE_SECONDS
                )
                await self._closed.wait()
        finally:
            self._abort()

    def rest(self) -> None:
        """Wait for the next request."""
        self._is_resting = True
        # A little longer than aiohttp, which takes leave of an idle client properly.
        self._allow(RESTING_SECONDS + EXCHANGE_SECONDS)

    def _allow(self, seconds: float) -> None:
        if not self._deadline.expired():
            self._deadline.reschedule(asyncio.get_running_loop().time() + seconds)

    def _abort(self) -> None:
        """Close the connection at once, whatever is still to be sent."""
        transport, self._transport = self._transport, None
        if transport is None:
            return
        if transport.is_closing():
            # In Python 3.11.2, Debian's, a TLS transport that was closed twice cannot be aborted: AttributeError.
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        else:
            transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport if isinstance(transport, asyncio.Transport) else None
        self._http.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._is_resting:
            self._is_resting = False
            self._allow(EXCHANGE_SECONDS)
        self._http.data_received(data)

    def eof_received(self) -> bool | None:
        return self._http.eof_received()

    def pause_writing(self) -> None:
        self._http.pause_writing()

    def resume_writing(self) -> None:
        self._http.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._http.connection_lost(error)
        self._transport = None
        self._closed.set()
