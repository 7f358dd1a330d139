"""A campaign against a Lease in memory: the work begins and ends with the leadership, and the Lease is handed over."""

import asyncio
from typing import Any

import pytest

from finetune_api.base import Json
from finetune_operator.election import campaign as module
from finetune_operator.election.campaign import Campaign
from finetune_operator.election.election import Election
from finetune_operator.election.record import LeaseRecord
from finetune_operator.errors import ApiUnavailableError, ConflictError


class StoredLease:
    """The Lease as the API server keeps it; the real one is in test_replicas.py."""

    def __init__(self) -> None:
        self.body: Json | None = None
        self.is_down = False
        self.answers = True
        self.writes = 0

    @property
    def holder(self) -> str:
        return LeaseRecord.parse(self.body).holder if self.body else ""

    async def get_lease(self, namespace: str, name: str) -> Json | None:
        assert namespace == "system"
        if self.is_down:
            raise ApiUnavailableError("down")
        return self.body

    async def create_lease(self, lease: Json) -> Json:
        if self.body is not None:
            raise ConflictError(409, "POST", "AlreadyExists")
        return await self._store(lease)

    async def replace_lease(self, lease: Json) -> Json:
        if self.body is None or lease["metadata"]["resourceVersion"] != self.body["metadata"]["resourceVersion"]:
            raise ConflictError(409, "PUT", "Conflict")
        return await self._store(lease)

    async def _store(self, lease: Json) -> Json:
        self.writes += 1
        self.body = lease | {"metadata": lease["metadata"] | {"resourceVersion": str(self.writes)}}
        if not self.answers:
            await asyncio.sleep(60)
        return self.body


class Work:
    """What a leader does; knows whether it is being done."""

    def __init__(self) -> None:
        self.is_done = False
        self.begun = 0
        self.error: Exception | None = None

    async def __call__(self) -> None:
        self.begun += 1
        self.is_done = True
        try:
            if self.error is not None:
                raise self.error
            await asyncio.sleep(60)
        finally:
            self.is_done = False


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second takes 10 ms."""
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.02)
    monkeypatch.setattr(module, "FOLLOW_SECONDS", 0.01)


async def until(holds: Any) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.005)


async def stop(running: asyncio.Task[None]) -> None:
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_the_work_is_done_until_the_lease_is_handed_over() -> None:
    lease, work, next_work = StoredLease(), Work(), Work()
    first = asyncio.create_task(Campaign(lease, Election("a", "a:1"), "system").run(work))
    await until(lambda: work.is_done)
    second = asyncio.create_task(Campaign(lease, Election("b", "b:1"), "system").run(next_work))
    await until(lambda: lease.writes > 5)
    assert (lease.holder, next_work.begun) == ("a", 0)

    await stop(first)
    assert not work.is_done
    await until(lambda: next_work.is_done)
    assert lease.holder == "b"
    await stop(second)
    assert lease.holder == ""


async def test_a_lease_whose_last_renewal_got_no_answer_is_handed_over_too() -> None:
    lease, work = StoredLease(), Work()
    running = asyncio.create_task(Campaign(lease, Election("a", "a:1"), "system").run(work))
    await until(lambda: work.is_done)
    lease.answers = False
    before = lease.writes
    await until(lambda: lease.writes > before)
    running.cancel()
    await until(lambda: lease.holder == "")
    await stop(running)


async def test_the_work_stops_when_the_time_is_up_and_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_operator.election.election.RENEW_DEADLINE_SECONDS", 0.2)
    lease, work = StoredLease(), Work()
    campaign = Campaign(lease, Election("a", "a:1"), "system")
    running = asyncio.create_task(campaign.run(work))
    await until(lambda: work.is_done)

    lease.is_down = True
    await until(lambda: not work.is_done)
    assert campaign.round_age() < 5, "it campaigns on, so the kubelet lets it live"
    lease.is_down = False
    await until(lambda: work.is_done)
    assert work.begun == 2
    await stop(running)


async def test_the_work_stops_at_once_when_somebody_else_has_the_lease() -> None:
    lease, work = StoredLease(), Work()
    running = asyncio.create_task(Campaign(lease, Election("a", "a:1"), "system").run(work))
    await until(lambda: work.is_done)
    thief = LeaseRecord("b", "b:1", 60, "", "", 1, "")
    lease.body = thief.to_wire("system") | {"metadata": {"resourceVersion": "stolen"}}
    await until(lambda: not work.is_done)
    assert lease.holder == "b"
    await stop(running)
    assert lease.holder == "b"


async def test_an_error_of_the_work_ends_the_campaign_and_the_lease_is_free() -> None:
    lease, work = StoredLease(), Work()
    work.error = RuntimeError("a defect")
    with pytest.raises(ExceptionGroup) as caught:
        await Campaign(lease, Election("a", "a:1"), "system").run(work)
    assert str(caught.value.exceptions[0]) == "a defect"
    assert lease.holder == ""
