"""The connection to the API server: credentials that change, refusals as errors, requests as they arrive."""

import json
import sys
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import ClientTimeout
from kubernetes.aio.config import incluster_config

from finetune_api.base import Json
from finetune_operator.cluster import connection as connection_module
from finetune_operator.cluster.connection import APPLY, MERGE_PATCH, ApiConnection
from finetune_operator.errors import (
    ApiError,
    ApiUnavailableError,
    ConflictError,
    ForbiddenError,
    NotFoundError,
    SettingsError,
)
from finetune_operator.settings import Kubeconfig, ServiceAccount
from finetune_test_servers.fake_api_server import SERVER_NAME, FakeApiServer

REFUSALS = {
    "a role that lacks the verb": (403, ForbiddenError),
    "an object that does not exist": (404, NotFoundError),
    "a name that is taken": (409, ConflictError),
    "an invalid object": (422, ApiError),
    "a token that is not valid": (401, ApiError),
    "too many requests": (429, ApiUnavailableError),
    "a server in trouble": (500, ApiUnavailableError),
    "a server that is starting": (503, ApiUnavailableError),
}


@pytest.mark.parametrize(("status", "expected"), REFUSALS.values(), ids=REFUSALS)
async def test_a_refusal_is_one_of_our_errors_and_is_not_tried_again(
    server: FakeApiServer, connection: ApiConnection, status: int, expected: type[Exception]
) -> None:
    server.status, server.text = status, '{"kind": "Status", "message": "because"}'
    with pytest.raises(expected, match=f"GET /api/v1/pods: {status}: because") as caught:
        await connection.request("GET", "/api/v1/pods")
    assert type(caught.value) is expected
    assert len(server.requests) == 1


async def test_a_server_that_does_not_answer_is_unavailable(
    server: FakeApiServer, connection: ApiConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "TIMEOUT", ClientTimeout(total=0.1))
    server.seconds = 5
    with pytest.raises(ApiUnavailableError, match="TimeoutError"):
        await connection.request("GET", "/version")


async def test_a_server_that_is_gone_is_unavailable(server: FakeApiServer) -> None:
    account = server.service_account("first")
    opened = await ApiConnection.open(ServiceAccount(account.host, 1, account.folder))
    with pytest.raises(ApiUnavailableError, match="GET /version"):
        await opened.request("GET", "/version")
    await opened.close()


PATCHES = {"server-side apply": APPLY, "merge patch": MERGE_PATCH}


@pytest.mark.parametrize("content_type", PATCHES.values(), ids=PATCHES)
async def test_a_patch_arrives_as_json_under_its_own_content_type(
    server: FakeApiServer, connection: ApiConnection, content_type: str
) -> None:
    body: Json = {"status": {"phase": "Running", "none": None, "list": [1, 2.5, True]}}
    await connection.request("PATCH", "/apis/x/status", body, query={"force": "true"}, content_type=content_type)
    (request,) = server.requests
    assert (request["verb"], request["Content-Type"], request["query"]) == ("PATCH", content_type, {"force": "true"})
    assert json.loads(request["body"]) == body


async def test_queries_and_the_wanted_form_arrive_as_they_were_given(
    server: FakeApiServer, connection: ApiConnection
) -> None:
    query = {"labelSelector": "finetune.dev/job-uid=1,a in (b)", "continue": "a+b/c==&d"}
    wanted = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
    assert await connection.request("GET", "/api/v1/pods", query=query, accept=wanted) == {"kind": "List"}
    (request,) = server.requests
    assert (request["query"], request["Accept"], request["body"]) == (query, wanted, "")


async def test_a_service_accounts_token_is_read_again_after_a_minute(
    server: FakeApiServer, connection: ApiConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await connection.request("GET", "/version")
    server.service_account("second\n")
    await connection.request("GET", "/version")
    assert server.tokens == ["first", "first"]

    later = SimpleNamespace(now=lambda: datetime.now() + timedelta(seconds=61))  # noqa: DTZ005 (as the loader does)
    monkeypatch.setattr(incluster_config, "datetime", SimpleNamespace(datetime=later, timedelta=timedelta))
    await connection.request("GET", "/version")
    async with connection.open_session() as session:
        await session.get(f"{connection.api_url}/version")
    assert server.tokens[2:] == ["second", "second"], "kopf's session has the new token as well"


async def test_a_kubeconfig_is_read_again_when_it_is_old(
    server: FakeApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = server.folder / "user-token"
    token.write_text("first")
    opened = await ApiConnection.open(server.kubeconfig(tokenFile=str(token)))
    await opened.request("GET", "/version")
    token.write_text("second")
    await opened.request("GET", "/version")
    assert server.tokens == ["first", "first"]

    reader = opened._configuration.refresh_api_key_hook
    monkeypatch.setattr(reader, "_due", 0.0)
    await opened.request("GET", "/version")
    assert server.tokens[-1] == "second"
    await opened.close()


async def test_an_exec_plugin_of_a_kubeconfig_is_asked(server: FakeApiServer) -> None:
    version = "client.authentication.k8s.io/v1"
    credential = {"apiVersion": version, "kind": "ExecCredential", "status": {"token": "from-plugin"}}
    plugin = {"apiVersion": version, "command": sys.executable, "args": ["-c", f"print({json.dumps(credential)!r})"]}
    opened = await ApiConnection.open(server.kubeconfig(exec=plugin))
    await opened.request("GET", "/version")
    async with opened.open_session() as session:
        await session.get(f"{opened.api_url}/version")
    assert server.tokens == ["from-plugin", "from-plugin"]
    await opened.close()


async def test_a_client_certificate_needs_no_token(server: FakeApiServer) -> None:
    pair = server.authority.client("me", "me")
    user = {"client-certificate": str(pair.certificate), "client-key": str(pair.key)}
    opened = await ApiConnection.open(server.kubeconfig(**user))
    await opened.request("GET", "/version")
    assert server.requests[0]["Authorization"] is None
    await opened.close()


async def test_a_server_behind_another_name_is_trusted_by_the_name_of_its_certificate(server: FakeApiServer) -> None:
    elsewhere = {"server": f"https://localhost:{server.port}"}
    refused = await ApiConnection.open(server.kubeconfig(elsewhere, token="t"))
    with pytest.raises(ApiUnavailableError, match="certificate"):
        await refused.request("GET", "/version")
    await refused.close()

    opened = await ApiConnection.open(server.kubeconfig(elsewhere | {"tls-server-name": SERVER_NAME}, token="t"))
    await opened.request("GET", "/version")
    async with opened.open_session() as session:
        await session.get(f"{opened.api_url}/version")
    assert server.tokens == ["t", "t"]
    await opened.close()


async def test_credentials_that_become_unreadable_are_an_outage(
    server: FakeApiServer, connection: ApiConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    (server.folder / "token").write_text("")
    later = SimpleNamespace(now=lambda: datetime.now() + timedelta(seconds=61))  # noqa: DTZ005 (as the loader does)
    monkeypatch.setattr(incluster_config, "datetime", SimpleNamespace(datetime=later, timedelta=timedelta))
    with pytest.raises(ApiUnavailableError, match="Token file exists but empty"):
        await connection.request("GET", "/version")


async def test_missing_credentials_are_named_at_the_start(server: FakeApiServer, tmp_path: Path) -> None:
    kubeconfig = server.kubeconfig(token="t")
    absent = tmp_path / "absent"

    wrong = {
        ServiceAccount("127.0.0.1", server.port, absent): "service account .*absent: Service token file does not exist",
        Kubeconfig(absent, None): "kubeconfig .*absent: there is no such file",
        Kubeconfig(kubeconfig.path, "other"): "context other: .*Expected object with name other",
        Kubeconfig(_file(tmp_path / "text", "no mapping"), None): "kubeconfig .*text: ",
        Kubeconfig(_file(tmp_path / "open", "users: ["), None): "kubeconfig .*open: while parsing",
        ServiceAccount("127.0.0.1", server.port, _file(tmp_path / "bad/ca.crt", "no certificate").parent): "bad: ",
    }
    for api_server, message in wrong.items():
        with pytest.raises(SettingsError, match=message):
            await ApiConnection.open(api_server)


def _file(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    (path.parent / "token").write_text("token")
    path.write_text(text)
    return path


async def test_an_ipv6_address_is_bracketed(server: FakeApiServer) -> None:
    account = server.service_account("first")
    opened = await ApiConnection.open(ServiceAccount("fd00::1", 443, account.folder))
    assert opened.api_url == "https://[fd00::1]:443"
    await opened.close()
