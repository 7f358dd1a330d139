"""The controller keeps its heart beating, which the liveness probe listens to while this replica leads; and reports of
one job share writes, however often they arrive."""

import asyncio
import time
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from finetune_operator import health
from finetune_operator.cluster.cluster import Listed, NamespacedName
from finetune_operator.election.campaign import Campaign
from finetune_operator.election.election import Election
from finetune_operator.election.record import LeaseRecord
from finetune_operator.errors import ApiUnavailableError
from finetune_operator.gpu_line import GpuLine
from finetune_operator.health import build_health_app
from finetune_operator.observe import report_store
from finetune_operator.observe.report_store import ReceivedReport, ReportStore
from finetune_operator.watch import controller
from finetune_operator.watch.controller import GATHER_SECONDS, Controller
from finetune_test_operator.snapshot_builder import a_report

JOB = NamespacedName("team", "bot")


class EmptyCluster:
    """A cluster without jobs."""

    async def list_versions(self) -> dict[str, Listed]:
        return {}


@pytest.fixture
def beating(monkeypatch: pytest.MonkeyPatch) -> Controller:
    """A controller whose heart beats every 20 ms; the probe waits for twelve beats, as always."""
    monkeypatch.setattr(controller, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(health, "DEAD_AFTER_SECONDS", 12 * 0.02)
    return Controller(EmptyCluster(), None, ReportStore(), GpuLine())  # type: ignore[arg-type]


@pytest.fixture
def election() -> Election:
    """A replica that leads."""
    election = Election("a", "10.0.0.1:8443")
    election.won(LeaseRecord("a", "10.0.0.1:8443", 12, "", "", 0, "1"), election.read_clock())
    return election


class FreshCampaign(Campaign):
    """A campaign whose last round ended just now."""

    def __init__(self) -> None: ...

    def round_age(self) -> float:
        return 0.0


class DeadCampaign(FreshCampaign):
    def round_age(self) -> float:
        return 60.0


async def test_the_liveness_probe_is_answered_for_longer_than_its_limit(
    beating: Controller, election: Election
) -> None:
    running = asyncio.create_task(beating.run())
    try:
        async with TestClient(TestServer(build_health_app(election, FreshCampaign(), beating))) as client:
            for _ in range(4):
                await asyncio.sleep(0.2)
                assert (await client.get("/healthz")).status == 200
            assert (await client.get("/readyz")).status == 200
    finally:
        running.cancel()


async def test_a_leader_whose_workers_do_not_run_is_not_alive(beating: Controller, election: Election) -> None:
    async with TestClient(TestServer(build_health_app(election, FreshCampaign(), beating))) as client:
        await asyncio.sleep(0.3)
        assert (await client.get("/healthz")).status == 500
        assert (await client.get("/readyz")).status == 503


class WrittenReports:
    """A reconcile that writes what a job's report says, and whose writes are events that have the job looked at."""

    def __init__(self, reports: ReportStore) -> None:
        self._reports = reports
        self.controller = Controller(EmptyCluster(), self, reports, GpuLine())  # type: ignore[arg-type]
        self.writes: list[tuple[float, ReceivedReport]] = []

    async def reconcile(self, _: NamespacedName, **__: Any) -> float | None:
        report = self._reports.show("uid")
        if report is not None and (not self.writes or self.writes[-1][1] is not report):
            self.writes.append((time.monotonic(), report))
            self.controller.trigger(JOB, "uid", "1")
        return self._reports.seconds_until_shown("uid")

    def wrote(self, job_uid: str, version: str) -> bool:
        return False


@pytest.mark.parametrize("every", [0.01, 0.1], ids=["often", "twice per write"])
async def test_progress_is_written_again_and_again_however_often_reports_arrive(
    every: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_store, "SHOW_SECONDS", 0.2)
    reports = ReportStore()
    written = WrittenReports(reports)
    task, begun = asyncio.create_task(written.controller.run()), time.monotonic()
    try:
        for sequence in range(round(4 / every)):
            reports.put("uid", a_report(sequence))
            written.controller.trigger_report("uid", JOB)
            await asyncio.sleep(every)
        await asyncio.sleep(0.4)
    finally:
        task.cancel()

    assert len(written.writes) <= (time.monotonic() - begun) / 0.2 + 1, "at most one write per SHOW_SECONDS"
    times = [when for when, _ in written.writes]
    assert max(later - earlier for earlier, later in pairwise(times)) < 0.7, "no report waits for the next one"
    assert written.writes[-1][1] is reports.newest("uid"), "the last report is written, although none follows it"


class OwnWrite:
    """A reconcile whose write is seen by the watch before its answer has come."""

    def __init__(self) -> None:
        self.controller = Controller(EmptyCluster(), self, ReportStore(), GpuLine())  # type: ignore[arg-type]
        self.looks = 0
        self.written = ""

    async def reconcile(self, _: NamespacedName, **__: Any) -> None:
        self.looks += 1
        if self.looks == 1:
            self.controller.trigger(JOB, "uid", "2")
            await asyncio.sleep(0.05)
            self.written = "2"

    def wrote(self, _: str, version: str) -> bool:
        return version == self.written

    def forget(self, _: str) -> None: ...


@pytest.mark.parametrize(("others", "looks"), {(): 1, ("3",): 2, ("3", "4"): 2}.items(), ids=str)
async def test_only_changes_of_others_have_a_job_looked_at_again(others: tuple[str, ...], looks: int) -> None:
    own = OwnWrite()
    task = asyncio.create_task(own.controller.run())
    try:
        own.controller.trigger(JOB, "uid", "1")
        await asyncio.sleep(0.02)
        for version in others:
            own.controller.trigger(JOB, "uid", version)
        await asyncio.sleep(0.3)
        assert own.looks == looks
        own.controller.trigger(JOB, "uid", "2")
        await asyncio.sleep(0.1)
        assert own.looks == looks, "the write's own event, after its answer"
    finally:
        task.cancel()


class KnownLooks:
    """A reconcile that fails if it is told to, and knows of each look whether anything but reports was new."""

    def __init__(self, reports: ReportStore) -> None:
        self.controller = Controller(EmptyCluster(), self, reports, GpuLine())  # type: ignore[arg-type]
        self.looks: list[bool] = []
        self.fails = False
        self.settled = ""
        """UID of a job that needs nothing more."""

    def is_settled(self, job_uid: str) -> bool:
        return job_uid == self.settled

    async def reconcile(self, _: NamespacedName, *, has_changed: bool) -> None:
        self.looks.append(has_changed)
        if self.fails:
            self.fails = False
            raise ApiUnavailableError("PATCH: no answer")

    def wrote(self, _: str, version: str) -> bool:
        return False


async def test_a_job_is_read_again_if_more_than_its_report_may_be_new_and_not_for_children_that_do_not_matter() -> None:
    reports = ReportStore()
    known = KnownLooks(reports)
    task = asyncio.create_task(known.controller.run())

    async def expect(*looks: bool) -> None:
        async with asyncio.timeout(10):
            while len(known.looks) < len(looks):
                await asyncio.sleep(0.01)
        assert tuple(known.looks) == looks
        known.looks.clear()

    try:
        while not known.controller.has_listed:  # the list of an empty cluster has a known job forgotten
            await asyncio.sleep(0.01)
        known.controller.trigger(JOB, "uid", "1")
        await expect(True)
        reports.put("uid", a_report(1))
        known.controller.trigger_report("uid", JOB)
        await expect(False)

        known.fails = True
        known.controller.trigger_report("uid", JOB)
        await expect(False, True)

        known.controller.trigger_report("uid", JOB)
        known.controller.trigger_owner("uid")
        await expect(True)
        for _ in range(4):
            known.controller.trigger_owner("uid")
            await asyncio.sleep(GATHER_SECONDS / 10)
        await expect(True)

        known.settled = "uid"
        known.controller.trigger_owner("uid")
        await asyncio.sleep(2 * GATHER_SECONDS)
        await expect()
        known.controller.trigger(JOB, "uid", "2")
        await expect(True)
    finally:
        task.cancel()


async def test_a_follower_is_alive_while_it_campaigns_and_ready_once_it_knows_the_lease(beating: Controller) -> None:
    follower = Election("b", "10.0.0.2:8443")
    async with TestClient(TestServer(build_health_app(follower, FreshCampaign(), beating))) as client:
        await asyncio.sleep(0.3)
        assert (await client.get("/healthz")).status == 200
        assert (await client.get("/readyz")).status == 503
        follower.see(LeaseRecord("a", "10.0.0.1:8443", 12, "", "", 0, "1"))
        assert (await client.get("/readyz")).status == 200
    async with TestClient(TestServer(build_health_app(follower, DeadCampaign(), beating))) as client:
        assert (await client.get("/healthz")).status == 500


class OneJob(EmptyCluster):
    """A cluster with one job, of which nothing changes."""

    async def list_versions(self) -> dict[str, Listed]:
        return {"uid": Listed(JOB, frozenset({"1"}))}


class Looks:
    """A reconcile that takes its time, and counts its looks and those that ended."""

    def __init__(self) -> None:
        self.controller = Controller(OneJob(), self, ReportStore(), GpuLine())  # type: ignore[arg-type]
        self.begun = self.ended = 0
        self.seconds = 0.0

    async def reconcile(self, _: NamespacedName, **__: Any) -> None:
        self.begun += 1
        await asyncio.sleep(self.seconds)
        self.ended += 1

    def wrote(self, _: str, version: str) -> bool:
        return False

    async def lead(self, seconds: float = 0.2) -> None:
        """Works for a while, as a leader whose time then runs out."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.controller.run()


async def test_a_leader_that_leads_again_looks_only_at_what_it_has_not_seen() -> None:
    looks = Looks()
    await looks.lead()
    await looks.lead()
    assert (looks.begun, looks.ended) == (1, 1)

    looks.controller.trigger(JOB, "uid", "2")  # a watch goes on while nobody leads
    await looks.lead()
    assert looks.ended == 2

    looks.controller.start_over()  # another replica has led
    await looks.lead()
    assert looks.ended == 3


async def test_a_look_that_is_broken_off_is_made_in_the_next_run() -> None:
    looks = Looks()
    looks.seconds = 5.0
    await looks.lead()
    assert (looks.begun, looks.ended) == (1, 0)

    looks.seconds = 0.0
    await looks.lead()
    assert (looks.begun, looks.ended) == (2, 1)
