"""Retries on a clock that only waits move: limits by cause, growing waits, a steady pace for credentials."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage import retry as module
from finetune_trainer.storage.retry import Cause, RetryPolicy, asked_wait, retry
from finetune_trainer.storage.s3_faults import FaultKind

POLICY = RetryPolicy(outage_seconds=100, expired_seconds=10, rejected_seconds=3, first_wait=0.5, max_wait=8)


class Clock(threading.Event):
    """An event whose waits take no time, and a clock that they move."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        self.now += timeout
        return self.is_set()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(module.random, "uniform", lambda low, high: high)
    return clock


def failing(count: int) -> Callable[[], int]:
    """An action that fails `count` times, and then returns how often it was called."""
    calls: list[None] = []

    def action() -> int:
        calls.append(None)
        if len(calls) <= count:
            raise ConnectionError("canary")
        return len(calls)

    return action


def explained(cause: Cause) -> Callable[[Exception], tuple[TrainerError, Cause]]:
    return lambda error: (TrainerError(FailureReason.STORAGE_UNAVAILABLE, f"no answer ({type(error).__name__})"), cause)


def run(clock: Clock, cause: Cause, failures: int) -> int:
    return retry(failing(failures), POLICY, (ConnectionError,), explained(cause), clock)


def test_waits_double_up_to_their_maximum(clock: Clock) -> None:
    assert run(clock, Cause.OUTAGE, 7) == 8
    assert clock.waits == [0.5, 1, 2, 4, 8, 8, 8]


def test_credentials_are_polled_at_a_steady_pace(clock: Clock) -> None:
    assert run(clock, Cause.EXPIRED, 6) == 7
    assert clock.waits == [0.5] * 6


@pytest.mark.parametrize(("cause", "seconds"), [(Cause.OUTAGE, 100), (Cause.EXPIRED, 10), (Cause.REJECTED, 3)])
def test_a_failure_is_raised_when_the_time_for_its_cause_is_over(clock: Clock, cause: Cause, seconds: float) -> None:
    with pytest.raises(TrainerError, match="no answer") as refusal:
        run(clock, cause, 1000)
    assert refusal.value.__suppress_context__, "the original may quote the request"
    assert seconds - POLICY.max_wait <= sum(clock.waits) <= seconds


def test_a_permanent_failure_and_one_after_the_end_are_raised_at_once(clock: Clock) -> None:
    with pytest.raises(TrainerError):
        run(clock, Cause.PERMANENT, 1)
    clock.set()
    with pytest.raises(TrainerError):
        run(clock, Cause.OUTAGE, 1)
    assert clock.waits == []


def answered(header: str) -> dict[str, Exception]:
    botocore: Any = {"ResponseMetadata": {"HTTPHeaders": {"retry-after": header}}}
    request = httpx.Request("GET", "http://hub")
    response = httpx.Response(429, headers={"Retry-After": header}, request=request)
    return {
        "httpx": httpx.HTTPStatusError("slow down", request=request, response=response),
        "botocore": ClientError(botocore, "GetObject"),
    }


@pytest.mark.parametrize("library", ["httpx", "botocore"])
def test_a_server_is_not_asked_sooner_than_it_wants(clock: Clock, library: str) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert asked_wait(answered("7")[library]) == 7
    assert 28 <= asked_wait(answered(later)[library]) <= 30
    assert [asked_wait(answered(odd)[library]) for odd in ("", "soon", "-3", "Fri, 01 Jan 2010 00:00:00 GMT")] == [
        0
    ] * 4

    errors = [answered("7")[library], answered("")[library]]

    def action() -> str:
        if errors:
            raise errors.pop(0)
        return "done"

    kinds = (httpx.HTTPStatusError, ClientError)
    assert retry(action, POLICY, kinds, explained(Cause.OUTAGE), clock) == "done"
    assert clock.waits == [7, 1]


def test_a_wait_beyond_the_limit_is_not_begun(clock: Clock) -> None:
    def action() -> None:
        raise answered("3600")["httpx"]

    with pytest.raises(TrainerError):
        retry(action, POLICY, (httpx.HTTPStatusError,), explained(Cause.OUTAGE), clock)
    assert clock.waits == []


def test_other_errors_are_not_caught(clock: Clock) -> None:
    def action() -> None:
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        retry(action, POLICY, (ConnectionError,), explained(Cause.OUTAGE), clock)


def test_only_faults_that_may_pass_are_retried() -> None:
    retried = {kind: kind.cause for kind in FaultKind if kind.cause is not Cause.PERMANENT}
    assert retried == {
        FaultKind.UNAVAILABLE: Cause.OUTAGE,
        FaultKind.CORRUPTED: Cause.OUTAGE,
        FaultKind.EXPIRED: Cause.EXPIRED,
        FaultKind.REJECTED: Cause.REJECTED,
    }
