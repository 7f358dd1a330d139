"""A TCP proxy that can be cut and mended: the network between two programs, under a test's control."""

import asyncio
import socket
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self, TypeVar

T = TypeVar("T")


class TcpProxy:
    """Forwards connections from its own loopback port to another one, TLS and all, until it is cut."""

    def __init__(self, target_port: int, bytes_per_second: int | None = None) -> None:
        self._target = target_port
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_cut = False
        self._rate = bytes_per_second
        self._is_open = asyncio.Event()
        self._is_open.set()
        self.port = 0

    @classmethod
    @contextmanager
    def start(cls, target_port: int, bytes_per_second: int | None = None) -> Iterator[Self]:
        """Run a proxy in a thread of its own. `bytes_per_second`: what each connection lets through, either way."""
        proxy = cls(target_port, bytes_per_second)
        thread = threading.Thread(target=proxy._loop.run_forever, daemon=True)
        thread.start()
        listener = socket.create_server(("127.0.0.1", 0))
        if bytes_per_second is not None:  # or megabytes would be gone at once, into the kernel's buffers
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        server = proxy._run(asyncio.start_server(proxy._accept, sock=listener, limit=16_384))
        proxy.port = listener.getsockname()[1]

        try:
            yield proxy
        finally:
            server.close()
            proxy.cut()
            proxy._loop.call_soon_threadsafe(proxy._loop.stop)
            thread.join(5)
            proxy._loop.close()

    def cut(self) -> None:
        """Break every connection, and refuse new ones."""
        self._is_cut = True
        self._run(self._break())

    def hold(self) -> None:
        """Let no byte through any more, and keep every connection open: half-open, as after a lost route."""
        self._loop.call_soon_threadsafe(self._is_open.clear)

    def mend(self) -> None:
        """Forward again."""
        self._is_cut = False
        self._loop.call_soon_threadsafe(self._is_open.set)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _break(self) -> None:
        for writer in tuple(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0.1)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers |= {writer, far_writer}
        await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))
        self._writers -= {writer, far_writer}

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536 if self._rate is None else 16_384):
                await self._is_open.wait()
                if self._rate is not None:
                    await asyncio.sleep(len(data) / self._rate)
                writer.write(data)
                await writer.drain()
        writer.close()
