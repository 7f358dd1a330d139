"""A proxy in front of the API server that reads along: it records writes, and can hold requests back for ever.

It ends TLS with a certificate of the cluster's authority, so a client that trusts the cluster trusts the proxy.
"""

import asyncio
import json
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import aiohttp
from aiohttp import web

from finetune_api.base import Json
from finetune_devcluster.cluster import DevCluster

_HOP_BY_HOP = {"host", "connection", "transfer-encoding", "content-length", "keep-alive"}


@dataclass
class ApiWrite:
    """A write that was forwarded to the API server."""

    time: float
    """Reading of this machine's monotonic clock."""

    verb: str
    path: str
    body: Json
    status: int = 0
    """The API server's answer; 0 if the client went away before it."""


class ApiProxy:
    """Forwards requests, and records those that write."""

    def __init__(self, cluster: DevCluster) -> None:
        self._target = cluster.api_url
        self._trust = ssl.create_default_context(cafile=str(cluster.ca_file))
        self._identity = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._identity.load_cert_chain(*cluster.serving_certificate("api-proxy", ["127.0.0.1"]))
        self._loop = asyncio.new_event_loop()
        self._holds: Callable[[str, str], bool] = lambda verb, path: False
        self._changed = asyncio.Event()
        self.writes: list[ApiWrite] = []
        self.held = 0
        """Requests that are held back now."""
        self.port = 0

    @classmethod
    @contextmanager
    def start(cls, cluster: DevCluster) -> Iterator[Self]:
        """Listen on loopback, in a thread of its own."""
        proxy = cls(cluster)
        thread = threading.Thread(target=proxy._loop.run_forever, daemon=True)
        thread.start()
        runner = proxy._run(proxy._serve())
        try:
            yield proxy
        finally:
            proxy._run(proxy._end(runner))
            proxy._loop.call_soon_threadsafe(proxy._loop.stop)
            thread.join(5)
            proxy._loop.close()

    def hold(self, holds: Callable[[str, str], bool] = lambda verb, path: True) -> None:
        """Hold back requests (verb, path) and the streams of watches, from now on: neither refused nor answered."""
        self._loop.call_soon_threadsafe(self._set, holds)

    def mend(self) -> None:
        """Let everything through again, also what was held back and is still wanted."""
        self._loop.call_soon_threadsafe(self._set, lambda verb, path: False)

    def _set(self, holds: Callable[[str, str], bool]) -> None:
        self._holds = holds
        self._changed.set()
        self._changed = asyncio.Event()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _serve(self) -> web.AppRunner:
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._forward)
        app.cleanup_ctx.append(self._session)
        # A client that goes away takes its request back, as on a direct connection.
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=self._identity)
        await site.start()
        self.port = runner.addresses[0][1]
        return runner

    async def _end(self, runner: web.AppRunner) -> None:
        """Stop serving; connections are aborted, because nobody waits for their TLS to end."""
        transports = [each.transport for each in (runner.server.connections if runner.server else ())]
        await runner.cleanup()
        for transport in transports:
            if transport is not None:
                with suppress(AttributeError):  # of a TLS transport whose connection was aborted before
                    transport.abort()
        await asyncio.sleep(0.1)

    async def _session(self, _: web.Application) -> Any:
        connector = aiohttp.TCPConnector(ssl=self._trust, limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False, timeout=timeout) as session:
            self._client = session
            yield

    async def _pass(self, verb: str, path: str) -> None:
        while self._holds(verb, path):
            self.held += 1
            try:
                await self._changed.wait()
            finally:
                self.held -= 1

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        await self._pass(request.method, request.path)
        write = None
        if request.method != "GET":
            write = ApiWrite(time.monotonic(), request.method, request.path, json.loads(body))
            self.writes.append(write)

        async with self._client.request(
            request.method, self._target + request.path_qs, data=body or None, headers=end_to_end(request.headers)
        ) as answer:
            if write is not None:
                write.status = answer.status
            response = web.StreamResponse(status=answer.status, headers=end_to_end(answer.headers))
            with suppress(ConnectionError):  # the client may go away at any time
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await self._pass(request.method, request.path)
                    await response.write(chunk)
            return response


def end_to_end(headers: Any) -> dict[str, str]:
    """Headers without those that belong to one connection."""
    return {name: value for name, value in headers.items() if name.lower() not in _HOP_BY_HOP}
