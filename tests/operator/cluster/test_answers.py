"""Answers that no API server gives, and those that ask for a pause."""

import time
from types import SimpleNamespace

import pytest

from finetune_operator.cluster import connection as connection_module
from finetune_operator.cluster.answers import MAX_PAUSE_SECONDS
from finetune_operator.cluster.connection import ApiConnection
from finetune_operator.errors import ApiUnavailableError
from finetune_test_servers.fake_api_server import FakeApiServer


async def test_a_proxy_in_between_may_answer_with_anything(server: FakeApiServer, connection: ApiConnection) -> None:
    server.status, server.text = 502, "<html>" + "x" * 1000
    with pytest.raises(ApiUnavailableError) as caught:
        await connection.request("GET", "/version")
    assert "<html>xxx" in str(caught.value)
    assert len(str(caught.value)) < 300


NO_OBJECTS = {
    "a login page": "<html>Sign in</html>",
    "nothing": "",
    "a page that was cut off": '{"kind": "PodList", "items": [{"metadata": {"na',
    "JSON of something else": '{"error": "upstream"}',
    "a list": "[]",
    "null": "null",
}


@pytest.mark.parametrize("text", NO_OBJECTS.values(), ids=NO_OBJECTS)
async def test_a_good_answer_that_is_no_object_is_an_outage(
    server: FakeApiServer, connection: ApiConnection, text: str
) -> None:
    server.text = text
    with pytest.raises(ApiUnavailableError, match="GET /api/v1/pods: the answer is no object of Kubernetes"):
        await connection.request("GET", "/api/v1/pods")

    server.text = '{"kind": "PodList"}'
    assert await connection.request("GET", "/api/v1/pods") == {"kind": "PodList"}


@pytest.mark.parametrize("status", [429, 503])
async def test_a_server_that_asks_for_a_pause_gets_no_request_meanwhile(
    server: FakeApiServer, connection: ApiConnection, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    server.status, server.headers = status, {"Retry-After": "7"}
    with pytest.raises(ApiUnavailableError) as refused:
        await connection.request("GET", "/one")
    assert refused.value.retry_after == 7

    server.status = 200
    with pytest.raises(ApiUnavailableError, match="not sent") as held_back:
        await connection.request("GET", "/another")
    assert 6 < held_back.value.retry_after <= 7
    assert [request["path"] for request in server.requests] == ["/one"]

    monkeypatch.setattr(connection_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 7))
    assert await connection.request("GET", "/another") == {"kind": "List"}


@pytest.mark.parametrize("value", ["soon", "-1", "Wed, 21 Oct 2026 07:28:00 GMT", ""])
async def test_a_pause_that_cannot_be_read_is_none_and_a_very_long_one_is_shortened(
    server: FakeApiServer, connection: ApiConnection, value: str
) -> None:
    server.status = 429
    for text, expected in ((value, 0.0), ("9999999999", MAX_PAUSE_SECONDS)):
        server.headers = {"Retry-After": text}
        with pytest.raises(ApiUnavailableError) as refused:
            await connection.request("GET", "/one")
        assert refused.value.retry_after == expected
