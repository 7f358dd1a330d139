"""What an open TLS connection holds in memory."""

import asyncio
import tracemalloc
from asyncio.sslproto import SSLProtocol
from contextlib import closing

import pytest

from finetune_operator.reports.tls_buffers import RECEIVE_BYTES, shrink_tls_buffers
from finetune_test_operator.report_server import Server

CONNECTIONS = 20


async def _bytes_of_buffers(server: Server) -> float:
    """Returns the bytes that asyncio's TLS holds for each end of a connection."""
    host, port = server.url.removeprefix("https://").split(":")
    tracemalloc.start()
    try:
        opened = [await asyncio.open_connection(host, int(port), ssl=server.tls) for _ in range(CONNECTIONS)]
        snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/asyncio/sslproto.py")])
    finally:
        tracemalloc.stop()

    for _, writer in opened:
        with closing(writer):
            pass
    return sum(trace.size for trace in snapshot.traces) / CONNECTIONS / 2


async def test_a_connection_holds_little(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await _bytes_of_buffers(server) > 200_000, "asyncio has mended it: the patch is not needed any more"
    monkeypatch.setattr(SSLProtocol, "max_size", SSLProtocol.max_size)  # which puts it back afterwards
    shrink_tls_buffers()
    assert await _bytes_of_buffers(server) < RECEIVE_BYTES + 8_000
