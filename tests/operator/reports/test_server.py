"""The progress server over real HTTPS, with the cluster's answers given by the test: every check, in its order."""

import json
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from finetune_api.base import Json
from finetune_api.progress import MAX_BODY_BYTES, progress_path, token_audience
from finetune_operator.cluster.cluster import NamespacedName, TokenIdentity
from finetune_operator.errors import ApiUnavailableError
from finetune_operator.observe.report_store import BURST, ReportStore
from finetune_operator.reports.checks import ReportChecks
from finetune_operator.reports.server import build_progress_app, load_certificate
from finetune_test_servers.certificates import Authority

KEY = NamespacedName("team", "bot")
JOB_UID, CHILD_UID, POD_UID = "job-uid", "child-uid", "pod-uid"
TOKEN = "good-token"
NOW = datetime(2026, 11, 24, tzinfo=UTC)


def _owner(kind: str, name: str, uid: str) -> list[Json]:
    return [{"kind": kind, "name": name, "uid": uid, "controller": True}]


class FakeCluster:
    """A job with one running pod; tests change what they are about."""

    def __init__(self) -> None:
        self.job: Json | None = {"metadata": {"name": "bot", "namespace": "team", "uid": JOB_UID}, "status": {}}
        self.child: Json | None = {
            "metadata": {
                "name": "bot-1",
                "uid": CHILD_UID,
                "ownerReferences": _owner("FineTuneJob", "bot", JOB_UID),
            }
        }

        self.pod: Json | None = {
            "metadata": {"name": "bot-1-x", "uid": POD_UID, "ownerReferences": _owner("Job", "bot-1", CHILD_UID)},
            "status": {
                "phase": "Running",
                "containerStatuses": [{"name": "trainer", "state": {"running": {"startedAt": "2026-11-24T00:00:00Z"}}}],
            },
        }

        self.identity: TokenIdentity | None = TokenIdentity("team", "bot-1-x", POD_UID)
        self.is_down = False

    async def get_fine_tune_job(self, key: NamespacedName) -> Json | None:
        if self.is_down:
            raise ApiUnavailableError("down")
        return self.job if key == KEY else None

    async def get_job(self, namespace: str, name: str) -> Json | None:
        return self.child if name == "bot-1" else None

    async def get_pod(self, namespace: str, name: str) -> Json | None:
        return self.pod

    async def review_token(self, token: str, audience: str) -> TokenIdentity | None:
        return self.identity if (token, audience) == (TOKEN, token_audience(JOB_UID)) else None


class FakeController:
    def __init__(self) -> None:
        self.triggered: list[tuple[str, NamespacedName, str]] = []

    def trigger_report(self, job_uid: str, key: NamespacedName, stage: str) -> None:
        self.triggered.append((job_uid, key, stage))


class Server:
    def __init__(self, url: str, tls: ssl.SSLContext, cluster: FakeCluster, store: ReportStore) -> None:
        self.url, self.tls, self.cluster, self.store = url, tls, cluster, store
        self.controller = FakeController()

    async def post(self, body: Json | bytes, token: str | None = TOKEN, path: str | None = None) -> tuple[int, str]:
        """Status and reason of the answer."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        url = self.url + (path or progress_path("team", "bot"))
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, data=data, headers=headers, ssl=self.tls) as answer,
        ):
            return answer.status, (await answer.json())["reason"] if answer.content_type.endswith("json") else ""


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    authority = Authority.create(tmp_path / "ca")
    pair = authority.server("progress", "progress", ("127.0.0.1",))
    (tmp_path / "tls.crt").write_bytes(pair.certificate.read_bytes())
    (tmp_path / "tls.key").write_bytes(pair.key.read_bytes())

    cluster, store = FakeCluster(), ReportStore()
    tls = ssl.create_default_context(cafile=str(authority.ca.certificate))
    fixture = Server("", tls, cluster, store)
    checks = ReportChecks(cluster, store, lambda: NOW, clock=lambda: 0.0)

    app = build_progress_app(checks, fixture.controller)  # type: ignore[arg-type]
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=load_certificate(tmp_path))
    await site.start()
    fixture.url = f"https://127.0.0.1:{runner.addresses[0][1]}"
    yield fixture
    await runner.cleanup()


def _report(sequence: int = 1, **run: Any) -> Json:
    return {
        "trainerStatus": {"progressPercentage": 40, "lastUpdatedTime": "2026-11-24T00:00:00Z"},
        "finetune": {"sequence": sequence, "stage": "Training", **run},
    }


async def test_a_good_report_is_kept_and_triggers_a_status_write(server: Server) -> None:
    assert await server.post(_report(step=7)) == (202, "Accepted")
    newest = server.store.newest(JOB_UID)
    assert newest is not None
    assert newest.report.finetune.step == 7
    assert newest.received == NOW
    assert server.controller.triggered == [(JOB_UID, KEY, "Training")]


async def test_a_report_is_refused_before_anything_else_where_it_is_too_large(server: Server) -> None:
    assert (await server.post(b" " * (MAX_BODY_BYTES + 1), token="forged"))[0] == 413


async def test_a_chunked_body_without_a_length_is_cut_off_too(server: Server) -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 4096

    headers = {"Authorization": f"Bearer {TOKEN}"}
    url = server.url + progress_path("team", "bot")
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, data=body(), headers=headers, ssl=server.tls) as answer,
    ):
        assert answer.status == 413


async def test_the_largest_body_is_read(server: Server) -> None:
    report = json.dumps(_report()).encode()
    assert (await server.post(report + b" " * (MAX_BODY_BYTES - len(report))))[0] == 202


@pytest.mark.parametrize("token", [None, "", "forged"])
async def test_a_token_that_is_absent_or_forged_is_unauthorized(server: Server, token: str | None) -> None:
    assert await server.post(b"not even JSON", token=token) == (401, "Unauthorized")
    assert server.store.newest(JOB_UID) is None


async def test_an_unknown_job_is_not_told_apart_from_a_bad_token(server: Server) -> None:
    assert await server.post(_report(), path=progress_path("team", "other")) == (401, "Unauthorized")


def _foreign_namespace(cluster: FakeCluster) -> None:
    cluster.identity = TokenIdentity("elsewhere", "bot-1-x", POD_UID)


def _pod_made_again(cluster: FakeCluster) -> None:
    cluster.identity = TokenIdentity("team", "bot-1-x", "another-uid")


def _pod_gone(cluster: FakeCluster) -> None:
    cluster.pod = None


def _pod_without_owner(cluster: FakeCluster) -> None:
    assert cluster.pod
    cluster.pod["metadata"]["ownerReferences"] = []


def _pod_of_a_deployment(cluster: FakeCluster) -> None:
    assert cluster.pod
    cluster.pod["metadata"]["ownerReferences"] = _owner("ReplicaSet", "bot-1", CHILD_UID)


def _job_made_again(cluster: FakeCluster) -> None:
    assert cluster.child
    cluster.child["metadata"]["uid"] = "another-uid"


def _job_of_another_resource(cluster: FakeCluster) -> None:
    assert cluster.child
    cluster.child["metadata"]["ownerReferences"] = _owner("FineTuneJob", "bot", "another-uid")


FOREIGN = {
    "a token of another namespace": _foreign_namespace,
    "a pod that was made again": _pod_made_again,
    "a pod that is gone": _pod_gone,
    "a pod without an owner": _pod_without_owner,
    "a pod that no Job controls": _pod_of_a_deployment,
    "a Job that was made again": _job_made_again,
    "a Job of another FineTuneJob": _job_of_another_resource,
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
async def test_a_pod_that_does_not_lead_to_the_job_is_forbidden(server: Server, change: Any) -> None:
    change(server.cluster)
    assert await server.post(b"not even JSON") == (403, "Forbidden")
    assert server.store.newest(JOB_UID) is None


BAD_BODIES = {
    "no JSON": b"x",
    "no sequence": b'{"trainerStatus": {}, "finetune": {}}',
    "an unknown field": json.dumps(_report(surprise=1)).encode(),
    "not a number": json.dumps(_report(loss=float("nan"))).encode(),
    "infinite": json.dumps(_report(loss=float("inf"))).encode(),
    "a negative step": json.dumps(_report(step=-1)).encode(),
    "a number beyond 64 bits": json.dumps(_report(step=2**63)).encode(),
    "more than 100 percent": json.dumps(
        {**_report(), "trainerStatus": {"progressPercentage": 101, "lastUpdatedTime": "2026-11-24T00:00:00Z"}}
    ).encode(),
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
async def test_a_body_that_does_not_fit_the_schema_is_invalid(server: Server, body: bytes) -> None:
    assert await server.post(body) == (422, "InvalidReport")
    assert server.store.newest(JOB_UID) is None


async def test_a_replayed_or_late_report_is_refused(server: Server) -> None:
    assert (await server.post(_report(5)))[0] == 202
    assert await server.post(_report(5)) == (409, "OldSequence")
    assert await server.post(_report(4)) == (409, "OldSequence")
    assert (await server.post(_report(6)))[0] == 202


async def test_the_sequence_outlives_a_restart_of_the_operator(server: Server) -> None:
    assert server.cluster.job
    server.cluster.job["status"] = {
        "attempts": [{"pod": "bot-1-x", "uid": POD_UID}],
        "progress": {"percent": 1, "completion": "1%", "sequence": 9},
    }
    assert await server.post(_report(9)) == (409, "OldSequence")
    assert (await server.post(_report(10)))[0] == 202


async def test_a_new_pod_starts_to_count_again(server: Server) -> None:
    assert server.cluster.job
    server.cluster.job["status"] = {
        "attempts": [{"pod": "before", "uid": "before"}],
        "progress": {"percent": 1, "completion": "1%", "sequence": 9},
    }
    assert (await server.post(_report(1)))[0] == 202


async def test_an_older_pod_cannot_report_over_a_newer_one(server: Server) -> None:
    assert server.cluster.job
    server.cluster.job["status"] = {"attempts": [{"pod": "x", "uid": POD_UID}, {"pod": "y", "uid": "newer"}]}
    assert await server.post(_report(99)) == (409, "OldPod")


async def test_a_terminal_job_takes_no_report(server: Server) -> None:
    assert server.cluster.job
    server.cluster.job["status"] = {"phase": "Succeeded"}
    assert await server.post(_report()) == (410, "Ended")


async def test_a_pod_that_has_ended_takes_no_report(server: Server) -> None:
    assert server.cluster.pod
    server.cluster.pod["status"] = {"phase": "Failed"}
    assert await server.post(_report()) == (410, "Ended")


async def test_a_job_whose_terminal_status_is_being_written_takes_no_report(server: Server) -> None:
    server.store.lock(JOB_UID)
    assert await server.post(_report()) == (410, "Ended")


async def test_a_job_that_reports_too_often_is_told_to_slow_down(server: Server) -> None:
    answers = [(await server.post(_report(number)))[0] for number in range(int(BURST) + 2)]
    assert answers == [202] * int(BURST) + [429, 429]


async def test_the_trainer_is_asked_to_try_again_while_the_api_server_is_down(server: Server) -> None:
    server.cluster.is_down = True
    assert await server.post(_report()) == (503, "Unavailable")


async def test_plain_http_and_other_methods_are_not_served(server: Server) -> None:
    async with aiohttp.ClientSession() as session:
        url = server.url + progress_path("team", "bot")
        async with session.get(url, ssl=server.tls) as answer:
            assert answer.status == 405
        with pytest.raises(aiohttp.ClientError):
            await session.post(url.replace("https", "http"), data=b"{}")
