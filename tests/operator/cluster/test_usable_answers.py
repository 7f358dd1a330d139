"""kopf's session: what kopf would die of becomes an outage, and everything else passes."""

from collections.abc import AsyncIterator

import aiohttp
import pytest
from kopf._cogs.clients.api import iter_jsonlines

from finetune_operator.cluster.connection import ApiConnection
from finetune_operator.cluster.usable_answers import LIST_AGAIN
from finetune_test_servers.fake_api_server import FakeApiServer

EVENT = '{"type": "ADDED", "object": {"kind": "Pod"}}\n'
TOO_OLD = '{"type": "ERROR", "object": {"code": 410}}\n'


@pytest.fixture
async def session(connection: ApiConnection) -> AsyncIterator[aiohttp.ClientSession]:
    async with connection.open_session() as opened:
        yield opened


OUTAGES: dict[str, tuple[int, str, dict[str, str]]] = {
    "a login page": (200, "<html>Sign in</html>", {}),
    "nothing": (200, "", {}),
    "a page that was cut off": (200, '{"kind": "PodList", "items": [{', {}),
    "a list": (200, "[]", {}),
    "a CRD that was deleted": (404, "{}", {}),
    "a request that a proxy does not like": (400, "{}", {}),
    "a pause until a date": (429, "{}", {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
}


@pytest.mark.parametrize(("status", "text", "headers"), OUTAGES.values(), ids=OUTAGES)
async def test_what_kopf_cannot_read_is_a_failed_connection(
    server: FakeApiServer, session: aiohttp.ClientSession, status: int, text: str, headers: dict[str, str]
) -> None:
    server.status, server.text, server.headers = status, text, headers
    with pytest.raises(aiohttp.ClientConnectionError, match="GET /api/v1/pods"):
        await session.get(f"https://127.0.0.1:{server.port}/api/v1/pods")


@pytest.mark.parametrize("status", [200, 401, 403, 429, 500, 503])
async def test_what_kopf_understands_passes(server: FakeApiServer, session: aiohttp.ClientSession, status: int) -> None:
    server.status = status
    async with session.get(f"https://127.0.0.1:{server.port}/api/v1/pods") as response:
        assert (response.status, await response.json()) == (status, {"kind": "List"})


async def test_a_page_that_has_expired_is_not_asked_for_again(
    server: FakeApiServer, session: aiohttp.ClientSession
) -> None:
    server.status = 410
    with pytest.raises(aiohttp.ClientPayloadError, match="410"):
        await session.get(f"https://127.0.0.1:{server.port}/api/v1/pods?continue=x")


WATCHES = {
    "events": (EVENT * 3, EVENT * 3),
    "a version that is too old": (EVENT + TOO_OLD, EVENT + TOO_OLD),
    "an error of another kind": (EVENT + '{"type": "ERROR", "object": {"code": 500}}\n' + EVENT, EVENT + "again"),
    "a page of a proxy": ("<html>\n", "again"),
    "JSON that is no event": ("[]\n", "again"),
    "an event that was cut off": (EVENT + EVENT[:20], EVENT + "again"),
    "nothing": ("", "again"),
}


@pytest.mark.parametrize(("sent", "read"), WATCHES.values(), ids=WATCHES)
async def test_a_watch_ends_in_a_new_list_at_the_first_line_that_is_no_event(
    server: FakeApiServer, session: aiohttp.ClientSession, sent: str, read: str
) -> None:
    server.text = sent
    async with session.get(f"https://127.0.0.1:{server.port}/api/v1/pods?watch=true") as response:
        lines = [line async for line in iter_jsonlines(response.content)]
    assert b"\n".join(lines) + b"\n" == read.encode().replace(b"again", LIST_AGAIN)
