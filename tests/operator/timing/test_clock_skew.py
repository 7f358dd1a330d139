"""The operator's own clock is wrong, or jumps: the job's life, its deadline and every time in it stay the same."""

import asyncio
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from finetune_api.base import Json
from finetune_api.failures import ExitCode
from finetune_operator.cluster.cluster import Cluster, NamespacedName
from finetune_operator.cluster.connection import ApiConnection
from finetune_operator.desired.installation import Installation
from finetune_operator.desired.names import PREFLIGHT, TRAINER
from finetune_operator.errors import ConflictError
from finetune_operator.gpu_line import GpuLine
from finetune_operator.observe.report_store import ReportStore
from finetune_operator.observe.terminated_pods import TerminatedPods
from finetune_operator.reconcile import Reconciler
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for

pytestmark = pytest.mark.cluster

DEADLINE = 1000  # seconds
CLOCKS: dict[str, Iterator[float]] = {
    "right": itertools.repeat(0.0),
    "an hour ahead": itertools.repeat(3600.0),
    "an hour behind": itertools.repeat(-3600.0),
    "jumping": itertools.cycle((0.0, 3600.0, -3600.0)),
}
"""Seconds by which each reading of the operator's clock is ahead."""


def _set_clock(monkeypatch: pytest.MonkeyPatch, ahead: Iterator[float]) -> None:
    """Give every module of the operator a clock that is wrong."""

    class WrongClock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(seconds=next(ahead))

    for name, module in list(sys.modules.items()):
        if name.startswith("finetune_operator") and getattr(module, "datetime", None) is datetime:
            monkeypatch.setattr(module, "datetime", WrongClock)


def _times(status: Any) -> list[datetime]:
    """Every time in a status."""
    if isinstance(status, dict):
        here = [item for key, item in status.items() if key.endswith("Time") and isinstance(item, str)]
        return [datetime.fromisoformat(each) for each in here] + _times(list(status.values()))
    return [time for item in status for time in _times(item)] if isinstance(status, list) else []


class Life:
    """One job with deadlines: preflight, training, a pause, training again."""

    def __init__(self, connection: ApiConnection, jobs: Any, kubelet: PlayedKubelet, outcomes: Any) -> None:
        installation = Installation("finetune-trainer:test", "https://127.0.0.1:1", "PEM")
        self._operator = Reconciler(Cluster(connection), installation, ReportStore(), TerminatedPods(), GpuLine())
        self._jobs = jobs
        self._kubelet = kubelet
        self._outcomes = outcomes

    async def live(self) -> int:
        """Returns the seconds of the deadline that are left after the pause."""
        self._jobs.create("job", preflight="Run", activeDeadlineSeconds=DEADLINE, startupDeadlineSeconds=DEADLINE)
        await self._until(lambda status: status.get("phase") == "Validating")
        checks = await self._run(PREFLIGHT)
        await self._until(lambda status: "startTime" in status.get("preflight", {}))
        self._kubelet.end(checks, 0, self._outcomes.checked.encode())
        await self._until(lambda _: self._jobs.find_child("job"))

        pod = await self._run(TRAINER)
        await self._until(lambda status: status.get("phase") == "Running")
        await self._pause(pod)
        left: int = self._jobs.child("job")["spec"]["activeDeadlineSeconds"]

        pod = await self._run(TRAINER)
        await self._until(lambda status: status.get("phase") == "Running")
        self._kubelet.end(pod, 0, self._outcomes.success.encode())
        await self._until(lambda status: status.get("phase") == "Succeeded")
        return left

    async def _pause(self, pod: Any) -> None:
        """Suspend and resume: this records the time that the Job has run."""
        self._jobs.patch_run_policy("job", suspend=True)
        await self._until(lambda _: self._jobs.child("job")["spec"]["suspend"])
        pods = self._kubelet.pods
        await asyncio.to_thread(wait_for, lambda: pods("job")[0].metadata.deletion_timestamp, "the pod is to stop")
        self._kubelet.end(pod, ExitCode.INTERRUPTED)
        self._kubelet.remove(pod)
        await self._until(lambda status: status.get("phase") == "Suspended")

        self._jobs.patch_run_policy("job", suspend=False)
        await self._until(lambda _: not self._jobs.child("job")["spec"]["suspend"])

    async def _until(self, holds: Callable[[Json], Any]) -> None:
        for _ in range(100):
            with suppress(ConflictError):  # the Job controller writes too
                await self._operator.reconcile(NamespacedName(self._jobs.namespace, "job"))
            if holds(self._jobs.get("job").get("status", {})):
                return
            await asyncio.sleep(0.1)
        raise TimeoutError(self._jobs.get("job").get("status"))

    async def _run(self, component: str) -> Any:
        pod = await asyncio.to_thread(self._kubelet.wait_for_pod, "job", component=component)
        self._kubelet.run(pod)
        return pod


@pytest.fixture
def life(connection: ApiConnection, jobs: Any, kubelet: PlayedKubelet, outcomes: Any) -> Life:
    return Life(connection, jobs, kubelet, outcomes)


@pytest.mark.parametrize("ahead", CLOCKS.values(), ids=CLOCKS)
async def test_a_wrong_clock_changes_nothing(
    ahead: Iterator[float], life: Life, jobs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _set_clock(monkeypatch, ahead)
    began = datetime.now(UTC).replace(microsecond=0)
    left = await life.live()
    ended = datetime.now(UTC) + timedelta(seconds=1)  # times of Kubernetes are whole seconds

    assert DEADLINE - (ended - began).total_seconds() - 1 <= left <= DEADLINE
    times = _times(jobs.get("job")["status"])
    assert len(times) > 10
    assert began - timedelta(seconds=1) <= min(times)
    assert max(times) <= ended
