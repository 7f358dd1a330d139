"""A follower passes reports on to the leader over real HTTPS, and to nobody who is not the leader."""

import json
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from finetune_operator.election.election import Election
from finetune_operator.election.record import LeaseRecord
from finetune_operator.errors import ReportRefusedError
from finetune_operator.observe.report_store import ReportStore
from finetune_operator.reports.checks import ReportChecks, Sender
from finetune_operator.reports.forward import FORWARDED_HEADER, LeaderLink
from finetune_test_operator.report_server import KEY, NOW, POD_UID, TOKEN, FakeCluster, a_report
from finetune_test_servers.certificates import Authority

URL = "https://progress.test:8443"
PATH = "/reports/team/bot?x=1"


class Servers:
    """A follower and whatever stands at the address that it knows of the leader."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.received: list[tuple[str, str, bytes, dict[str, str]]] = []
        self.refusal: web.Response | None = None
        self.election = Election("follower", "127.0.0.1:1")
        self.url = ""
        self._folder = folder
        self._stack = stack
        self._authority = Authority.create(folder)

    async def serve(self, app: web.Application, host: str, authority: Authority | None = None) -> str:
        """Serve an application under a certificate for `host`; returns its address."""
        pair = (authority or self._authority).server(host, host, (host,))
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(pair.certificate, pair.key)
        runner = web.AppRunner(app)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        return f"127.0.0.1:{runner.addresses[0][1]}"

    async def start_follower(self) -> None:
        link = LeaderLink(self.election, URL, self._folder)
        self._stack.push_async_callback(link.close)
        app = self._app("the follower itself")
        app.middlewares.append(link.middleware())
        self.url = f"https://{await self.serve(app, '127.0.0.1')}"

    async def start_leader(self, host: str = "progress.test", authority: Authority | None = None) -> None:
        address = await self.serve(self._app("the leader"), host, authority)
        self.election.see(LeaseRecord("leader", address, 12, "", "", 0, address))

    async def post(self, body: bytes = b"{}", **headers: str) -> tuple[int, str, Any]:
        """Status and text of the follower's answer, and its Retry-After."""
        tls = ssl.create_default_context(cafile=str(self._authority.ca.certificate))
        sent = {"Authorization": "Bearer token"} | headers
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.url + PATH, data=body, headers=sent, ssl=tls) as answer,
        ):
            return answer.status, await answer.text(), answer.headers.get("Retry-After")

    def _app(self, name: str) -> web.Application:
        async def receive(request: web.Request) -> web.Response:
            body = await request.read()
            self.received.append((name, request.path_qs, body, dict(request.headers)))
            return self.refusal or web.json_response({"by": name}, status=202)

        app = web.Application(client_max_size=1000)
        app.add_routes([web.post("/reports/{namespace}/{name}", receive)])
        return app


@pytest.fixture
async def servers(tmp_path: Path) -> AsyncIterator[Servers]:
    async with AsyncExitStack() as stack:
        made = Servers(tmp_path, stack)
        await made.start_follower()
        yield made


async def test_the_leader_gets_what_the_trainer_sent_and_the_trainer_its_answer(servers: Servers) -> None:
    await servers.start_leader()
    assert await servers.post(b'{"a": 1}') == (202, '{"by": "the leader"}', None)
    ((name, path, body, headers),) = servers.received
    assert (name, path, body, headers["Authorization"]) == ("the leader", PATH, b'{"a": 1}', "Bearer token")

    servers.refusal = web.json_response({"reason": "TooManyReports"}, status=429, headers={"Retry-After": "5"})
    assert await servers.post() == (429, '{"reason": "TooManyReports"}', "5")


async def test_a_leader_answers_itself(servers: Servers) -> None:
    record = LeaseRecord("follower", "127.0.0.1:1", 12, "", "", 0, "1")
    servers.election.won(record, servers.election.read_clock())
    assert (await servers.post())[1] == '{"by": "the follower itself"}'


async def test_without_a_leader_the_trainer_is_told_to_come_again(servers: Servers) -> None:
    assert (await servers.post())[::2] == (503, "5")
    servers.election.see(LeaseRecord("leader", "127.0.0.1:1", 12, "", "", 0, "1"))  # where nobody listens
    status, text, retry_after = await servers.post()
    assert (status, retry_after) == (503, "5")
    assert "the leader of the operator does not answer: report again later" in text


async def test_what_was_passed_on_is_not_passed_on_again(servers: Servers) -> None:
    await servers.start_leader()
    assert (await servers.post(**{FORWARDED_HEADER: "1"}))[0] == 503
    assert servers.received == []


async def test_a_body_that_is_too_large_stays_here(servers: Servers) -> None:
    await servers.start_leader()
    assert (await servers.post(b" " * 1001))[0] == 413
    assert servers.received == []


async def test_nobody_gets_a_token_who_cannot_prove_to_be_the_progress_server(servers: Servers, tmp_path: Path) -> None:
    await servers.start_leader(authority=Authority.create(tmp_path / "foreign"))
    assert (await servers.post())[0] == 503
    await servers.start_leader(host="other.test")
    assert (await servers.post())[0] == 503
    assert servers.received == []


async def test_a_leader_that_comes_back_goes_by_what_the_other_has_written() -> None:
    cluster, store = FakeCluster(), ReportStore()
    checks = ReportChecks(cluster, store, lambda: NOW)
    sender = Sender("10.0.0.1", KEY, f"Bearer {TOKEN}")

    async def report(sequence: int) -> None:
        await checks.check(sender, json.dumps(a_report(sequence)).encode())

    await report(5)
    assert cluster.job
    cluster.job["status"] = {
        "attempts": [{"pod": "bot-1-x", "uid": POD_UID}],
        "progress": {"percent": 1, "completion": "1%", "sequence": 9},
    }
    checks.start_over()
    with pytest.raises(ReportRefusedError, match="report 7 is not newer than report 9"):
        await report(7)
    await report(10)

    cluster.job["status"] |= {"phase": "Failed"}
    checks.start_over()
    with pytest.raises(ReportRefusedError, match="has ended"):
        await report(11)
