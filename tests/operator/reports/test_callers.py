"""Requests to the API server that a report costs: as few as possible, whoever sends it."""

import asyncio

from finetune_api.progress import ProgressReport
from finetune_operator.observe.report_store import ReceivedReport
from finetune_operator.reports.callers import LOOKUP_BURST, POD_SECONDS
from finetune_operator.reports.checks import BURST
from finetune_test_operator.report_server import JOB_UID, NOW, POD_UID, Server, a_report


async def test_a_job_beyond_its_rate_costs_no_request(server: Server) -> None:
    for number in range(int(BURST)):
        await server.post(a_report(number))
    server.cluster.requests.clear()
    assert (await server.post(a_report(99)))[0] == 429
    assert server.cluster.requests == []


async def test_a_known_token_costs_one_request_in_ten_seconds_and_a_refused_one_none(server: Server) -> None:
    assert (await server.post(a_report(1)))[0] == 202
    assert (await server.post(a_report(1), token="forged"))[0] == 401
    server.cluster.requests.clear()
    for number in range(2, 12):
        assert (await server.post(a_report(number)))[0] == 202
    assert server.cluster.requests == []

    server.clock_seconds = POD_SECONDS
    assert (await server.post(a_report(12)))[0] == 202
    assert server.cluster.requests == ["pod"]
    assert (await server.post(a_report(13), token="forged"))[0] == 401
    assert server.cluster.requests == ["pod"]


async def test_a_token_that_comes_often_at_once_is_looked_up_once(server: Server) -> None:
    answers = await asyncio.gather(*(server.post(a_report(1), token="forged") for _ in range(20)))
    assert {status for status, _ in answers} == {401}
    assert server.cluster.requests == ["job", "review"]


async def test_new_tokens_are_limited_by_peer(server: Server) -> None:
    answers = [(await server.post(a_report(), token=f"forged-{number}"))[0] for number in range(int(LOOKUP_BURST) + 1)]
    assert answers == [401] * int(LOOKUP_BURST) + [429]


async def test_a_pod_that_ends_is_refused_soon_though_its_token_is_known(server: Server) -> None:
    assert (await server.post(a_report(1)))[0] == 202
    assert server.cluster.pod
    server.cluster.pod["status"] = {"phase": "Failed"}
    server.clock_seconds = POD_SECONDS
    assert await server.post(a_report(2)) == (410, "Ended")

    server.cluster.pod = None
    server.clock_seconds *= 2
    assert await server.post(a_report(3)) == (403, "Forbidden")


async def test_an_older_pod_is_found_out_though_its_token_is_known(server: Server) -> None:
    assert (await server.post(a_report(1)))[0] == 202
    newer = ReceivedReport("newer", NOW, ProgressReport.model_validate(a_report(1)))
    server.store.put(JOB_UID, newer)
    assert server.cluster.job
    server.cluster.job["status"] = {"attempts": [{"pod": "x", "uid": POD_UID}, {"pod": "y", "uid": "newer"}]}
    assert await server.post(a_report(2)) == (409, "OldPod")


async def test_an_outage_is_not_remembered(server: Server) -> None:
    server.cluster.is_down = True
    assert (await server.post(a_report()))[0] == 503
    server.cluster.is_down = False
    assert (await server.post(a_report()))[0] == 202
