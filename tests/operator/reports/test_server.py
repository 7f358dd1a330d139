"""The progress server over real HTTPS, with the cluster's answers given by the test: every check, in its order."""

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from finetune_api.progress import MAX_BODY_BYTES, progress_path
from finetune_operator.cluster.cluster import TokenIdentity
from finetune_operator.observe.children import INDEX_ANNOTATION
from finetune_operator.observe.report_store import Heard
from finetune_operator.reports.checks import BURST
from finetune_test_operator.report_server import (
    CHILD_UID,
    JOB_UID,
    KEY,
    NOW,
    POD_UID,
    TOKEN,
    FakeCluster,
    Server,
    a_report,
    owner,
)


async def test_a_good_report_is_kept_and_triggers_a_status_write(server: Server) -> None:
    assert await server.post(a_report(step=7)) == (202, "Accepted")
    newest = server.store.newest(JOB_UID)
    assert newest is not None
    assert newest.report.finetune.step == 7
    assert newest.received == NOW
    assert server.controller.triggered == [(JOB_UID, KEY)]


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
    report = json.dumps(a_report()).encode()
    assert (await server.post(report + b" " * (MAX_BODY_BYTES - len(report))))[0] == 202


@pytest.mark.parametrize("token", [None, "", "forged"])
async def test_a_token_that_is_absent_or_forged_is_unauthorized(server: Server, token: str | None) -> None:
    assert await server.post(b"not even JSON", token=token) == (401, "Unauthorized")
    assert server.store.newest(JOB_UID) is None


async def test_an_unknown_job_is_not_told_apart_from_a_bad_token(server: Server) -> None:
    assert await server.post(a_report(), path=progress_path("team", "other")) == (401, "Unauthorized")


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
    cluster.pod["metadata"]["ownerReferences"] = owner("ReplicaSet", "bot-1", CHILD_UID)


def _job_made_again(cluster: FakeCluster) -> None:
    assert cluster.child
    cluster.child["metadata"]["uid"] = "another-uid"


def _job_of_another_resource(cluster: FakeCluster) -> None:
    assert cluster.child
    cluster.child["metadata"]["ownerReferences"] = owner("FineTuneJob", "bot", "another-uid")


def _pod_of_another_node(cluster: FakeCluster) -> None:
    assert cluster.pod is not None
    cluster.pod["metadata"]["annotations"] = {INDEX_ANNOTATION: "1"}


FOREIGN = {
    "a pod of a further node": _pod_of_another_node,
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
    "an unknown field": json.dumps(a_report(surprise=1)).encode(),
    "not a number": json.dumps(a_report(loss=float("nan"))).encode(),
    "infinite": json.dumps(a_report(loss=float("inf"))).encode(),
    "a negative step": json.dumps(a_report(step=-1)).encode(),
    "a number beyond 64 bits": json.dumps(a_report(step=2**63)).encode(),
    "more than 100 percent": json.dumps(
        {**a_report(), "trainerStatus": {"progressPercentage": 101, "lastUpdatedTime": "2026-11-24T00:00:00Z"}}
    ).encode(),
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
async def test_a_body_that_does_not_fit_the_schema_is_invalid(server: Server, body: bytes) -> None:
    assert await server.post(body) == (422, "InvalidReport")
    assert server.store.newest(JOB_UID) is None


async def test_a_trainer_is_heard_even_if_its_report_cannot_be_read(server: Server) -> None:
    """A newer trainer under an older operator is not silent, and its pod must not be taken for frozen."""
    await server.post(a_report(), token="forged")
    assert server.store.channel(JOB_UID).heard is None
    assert await server.post(b"x") == (422, "InvalidReport")
    assert server.store.channel(JOB_UID).heard == Heard(POD_UID, NOW)
    assert server.store.channel("another").others_heard == NOW


async def test_a_replayed_or_late_report_is_refused(server: Server) -> None:
    assert (await server.post(a_report(5)))[0] == 202
    assert await server.post(a_report(5)) == (409, "OldSequence")
    assert await server.post(a_report(4)) == (409, "OldSequence")
    assert (await server.post(a_report(6)))[0] == 202


async def test_the_sequence_outlives_a_restart_of_the_operator(server: Server) -> None:
    assert server.cluster.job
    server.cluster.job["status"] = {
        "attempts": [{"pod": "bot-1-x", "uid": POD_UID}],
        "progress": {"percent": 1, "completion": "1%", "sequence": 9},
    }
    assert await server.post(a_report(9)) == (409, "OldSequence")
    assert (await server.post(a_report(10)))[0] == 202


async def test_a_new_pod_starts_to_count_again(server: Server) -> None:
    assert server.cluster.job
    server.cluster.job["status"] = {
        "attempts": [{"pod": "before", "uid": "before"}],
        "progress": {"percent": 1, "completion": "1%", "sequence": 9},
    }
    assert (await server.post(a_report(1)))[0] == 202


async def test_an_older_pod_cannot_report_over_a_newer_one(server: Server) -> None:
    assert server.cluster.job
    server.cluster.job["status"] = {"attempts": [{"pod": "x", "uid": POD_UID}, {"pod": "y", "uid": "newer"}]}
    assert await server.post(a_report(99)) == (409, "OldPod")


async def test_a_terminal_job_takes_noa_report(server: Server) -> None:
    assert server.cluster.job
    server.cluster.job["status"] = {"phase": "Succeeded"}
    assert await server.post(a_report()) == (410, "Ended")


async def test_a_pod_that_has_ended_takes_noa_report(server: Server) -> None:
    assert server.cluster.pod
    server.cluster.pod["status"] = {"phase": "Failed"}
    assert await server.post(a_report()) == (410, "Ended")


async def test_a_job_whose_terminal_status_is_being_written_takes_noa_report(server: Server) -> None:
    server.store.lock(JOB_UID)
    assert await server.post(a_report()) == (410, "Ended")


async def test_a_job_that_reports_too_often_is_told_to_slow_down(server: Server) -> None:
    answers = [(await server.post(a_report(number)))[0] for number in range(int(BURST) + 2)]
    assert answers == [202] * int(BURST) + [429, 429]


async def test_the_trainer_is_asked_to_try_again_while_the_api_server_is_down(server: Server) -> None:
    server.cluster.is_down = True
    assert await server.post(a_report()) == (503, "Unavailable")


async def test_plain_http_and_other_methods_are_not_served(server: Server) -> None:
    async with aiohttp.ClientSession() as session:
        url = server.url + progress_path("team", "bot")
        async with session.get(url, ssl=server.tls) as answer:
            assert answer.status == 405
        with pytest.raises(aiohttp.ClientError):
            await session.post(url.replace("https", "http"), data=b"{}")
