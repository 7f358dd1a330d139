"""A TCP proxy that can be cut and mended: the network between two programs, under a test's control."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self, TypeVar

T = TypeVar("T")


class TcpProxy:
    """Forwards connections from its own loopback port to another one, TLS and all, until it is cut."""

    def __init__(self, target_port: int) -> None:
        self._target = target_port
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_cut = False
        self.port = 0

    @classmethod
    @contextmanager
    def start(cls, target_port: int) -> Iterator[Self]:
        """Run a proxy in a thread of its own."""
        proxy = cls(target_port)
        thread = threading.Thread(target=proxy._loop.run_forever, daemon=True)
        thread.start()
        server = proxy._run(asyncio.start_server(proxy._accept, "127.0.0.1", 0))
        proxy.port = server.sockets[0].getsockname()[1]

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

    def mend(self) -> None:
        """Forward again."""
        self._is_cut = False

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
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()
