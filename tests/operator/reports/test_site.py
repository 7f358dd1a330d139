"""Connections over real TLS: which are kept, and that none that ends in an unusual way ends the server, and with it
the operator."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
import pytest

from finetune_api.progress import progress_path
from finetune_operator.reports import site, visits
from finetune_test_operator.report_server import TOKEN, Server, a_report


async def test_clients_that_close_while_the_server_closes_do_no_harm(server: Server) -> None:
    url, headers = server.url + progress_path("team", "bot"), {"Authorization": f"Bearer {TOKEN}"}
    connector = aiohttp.TCPConnector(ssl=server.tls, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        for sequence in range(1, 31):
            body = json.dumps(a_report(sequence))
            async with session.post(url, data=body, headers=headers) as answer:
                assert answer.status in (202, 429), "the server has ended"


@dataclass
class Wire:
    """One TLS connection to the server, written and read by hand."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    sequence: int = 0

    def request(self, token: str = TOKEN) -> bytes:
        """A report, as bytes of HTTP."""
        self.sequence += 1
        body = json.dumps(a_report(self.sequence))
        path = progress_path("team", "bot")
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n"
        return f"{head}\r\n{body}".encode()

    async def post(self, token: str = TOKEN) -> int:
        """Sends a report; returns the status of the answer."""
        self.writer.write(self.request(token))
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
        await self.reader.readexactly(int(length.split(b":")[1]))
        return int(head.split(b" ")[1])

    async def is_closed(self, seconds: float) -> bool:
        """True if the server closes the connection within `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                return await self.reader.read(1) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False


@asynccontextmanager
async def _wire(server: Server) -> AsyncIterator[Wire]:
    host, port = server.url.removeprefix("https://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=server.tls)
    yield Wire(reader, writer)
    writer.close()


async def test_a_trainer_keeps_its_connection_from_report_to_report(server: Server) -> None:
    async with _wire(server) as wire:
        assert [await wire.post() for _ in range(5)] == [202] * 5
        assert not await wire.is_closed(0.2)


async def test_a_refused_report_closes_its_connection(server: Server) -> None:
    async with _wire(server) as wire:
        assert await wire.post() == 202
        assert await wire.post("forged") == 401
        assert await wire.is_closed(5)


async def test_a_kept_connection_is_closed_when_no_report_comes(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "RESTING_SECONDS", 0.3)
    monkeypatch.setattr(site, "EXCHANGE_SECONDS", 0.3)
    async with _wire(server) as wire:
        assert await wire.post() == 202
        assert not await wire.is_closed(0.4)
        assert await wire.is_closed(5)


async def test_the_next_report_has_to_be_sent_as_fast_as_the_first(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "EXCHANGE_SECONDS", 0.5)
    async with _wire(server) as wire:
        assert await wire.post() == 202
        wire.writer.write(wire.request()[:20])
        assert await wire.is_closed(3), "half a report may take as long as a connection may rest"


async def test_an_old_connection_is_closed_with_its_next_answer(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visits, "KEPT_SECONDS", 0.2)
    async with _wire(server) as wire:
        assert await wire.post() == 202
        await asyncio.sleep(0.3)
        assert await wire.post() == 202
        assert await wire.is_closed(5)
