"""The operator is killed around every single write of a job's life, and another goes on: nothing is lost or doubled.

The plans are generated: a first, undisturbed life is recorded, and each of its writes is killed once before and once
after the API server has committed it. Lives of plans are lived side by side.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from finetune_api.base import Json
from finetune_api.failures import ExitCode
from finetune_operator.cluster.cluster import Cluster, NamespacedName
from finetune_operator.cluster.connection import ApiConnection
from finetune_operator.desired.installation import Installation
from finetune_operator.desired.names import PREFLIGHT, child_name, preflight_name
from finetune_operator.errors import ConflictError
from finetune_operator.observe.report_store import ReportStore
from finetune_operator.observe.terminated_pods import TerminatedPods
from finetune_operator.reconcile import Reconciler
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for

pytestmark = pytest.mark.cluster

WRITES = ("POST", "PATCH")
AT_ONCE = 8  # lives, each with operators of its own


class KilledError(Exception):
    """Stands for SIGKILL: no code of the operator catches it."""


class KillingConnection:
    """Lets requests through, until the write that it kills."""

    def __init__(self, connection: ApiConnection, number: int, committed: bool) -> None:
        self._connection = connection
        self.clock = connection.clock
        self._number = number
        self._committed = committed
        self.writes: list[str] = []

    async def request(self, verb: str, path: str, body: Json | None = None, **options: Any) -> Json:
        if verb not in WRITES:
            return await self._connection.request(verb, path, body, **options)
        self.writes.append(f"{verb} {path.rsplit('/', 2)[-2]}/{path.rsplit('/', 1)[-1]}")
        is_last = len(self.writes) == self._number
        if is_last and not self._committed:
            raise KilledError
        answer = await self._connection.request(verb, path, body, **options)
        if is_last:
            raise KilledError
        return answer


class Life:
    """One job, from creation to the end, reconciled by operators that may be killed."""

    def __init__(self, connection: ApiConnection, jobs: Any, kubelet: PlayedKubelet, outcomes: Any) -> None:
        self._connection = connection
        self._jobs = jobs
        self._kubelet = kubelet
        self._outcomes = outcomes

    def _operator(self, connection: Any) -> Reconciler:
        installation = Installation("finetune-trainer:test", "https://127.0.0.1:1", "PEM")
        return Reconciler(Cluster(connection), installation, ReportStore(), TerminatedPods())

    async def live(self, name: str, number: int, committed: bool, *, passes: bool) -> tuple[Json, list[str], int]:
        """Returns the final job, the writes until the kill, and how many operators it took."""
        killing = KillingConnection(self._connection, number, committed)
        operator, operators = self._operator(killing), 1

        async def until(holds: Callable[[Json], Any]) -> None:
            nonlocal operator, operators
            for _ in range(200):
                try:
                    await operator.reconcile(NamespacedName(self._jobs.namespace, name))
                except KilledError:
                    operator, operators = self._operator(self._connection), operators + 1
                except ConflictError:
                    continue
                if holds(self._jobs.get(name).get("status", {})):
                    return
                await asyncio.sleep(0.1)
            raise TimeoutError(f"{name}: {self._jobs.get(name).get('status')}")

        self._jobs.create(name, preflight="Run", ttlSecondsAfterFinished=3600)
        await until(lambda status: status.get("phase") == "Validating")
        checks = await asyncio.to_thread(self._kubelet.wait_for_pod, name, component=PREFLIGHT)
        self._kubelet.run(checks)
        await until(lambda status: "startTime" in status.get("preflight", {}))
        if passes:
            self._kubelet.end(checks, 0, self._outcomes.checked.encode())
            await until(lambda _: self._jobs.find_child(name))
            await self._train(name, until)
        else:
            self._kubelet.end(checks, ExitCode.DATA, self._outcomes.refused.encode())
            await asyncio.to_thread(wait_for, lambda: self._verdict(name), "the Job controller's verdict")
            await until(lambda status: status.get("phase") == "Failed")
        await until(lambda _: "ttlSecondsAfterFinished" in self._jobs.child(name, preflight_name)["spec"])
        return self._jobs.get(name), killing.writes, operators

    def _verdict(self, name: str) -> list[str]:
        conditions = self._jobs.child(name, preflight_name).get("status", {}).get("conditions", [])
        return [condition["type"] for condition in conditions if condition["type"] == "Failed"]

    async def _train(self, name: str, until: Callable[[Callable[[Json], Any]], Awaitable[None]]) -> None:
        pod = await asyncio.to_thread(self._kubelet.wait_for_pod, name)
        self._kubelet.run(pod)
        await until(lambda status: status.get("phase") == "Running")
        self._kubelet.end(pod, 0, self._outcomes.success.encode())
        await until(lambda status: status.get("phase") == "Succeeded")
        await until(lambda _: "ttlSecondsAfterFinished" in self._jobs.child(name)["spec"])


@pytest.fixture
async def life(operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any) -> AsyncIterator[Life]:
    operator.kill()  # this test runs operators of its own
    connection = await ApiConnection.open(operator.service_account)
    yield Life(connection, jobs, kubelet, outcomes)
    await connection.close()
    operator.start()


def _without_times(value: Any) -> Any:
    """A status with everything masked that differs between two equal lives."""
    if isinstance(value, dict):
        masked = ("uid", "pod", "jobName", "activeSeconds", "heldSeconds", "usage", "lastTransitionTime")
        return {
            key: "..." if key in masked or key.endswith("Time") else _without_times(item) for key, item in value.items()
        }
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def _story(job: Json) -> Any:
    """A status without times, and without the job's name and UIDs in addresses."""
    text = json.dumps(_without_times(job["status"])).replace(f"/{job['metadata']['name']}/", "/NAME/")
    return json.loads(re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UID", text))


PASSES = ["Validating", "Validated", "Queued", "Started", "Succeeded"]
FAILS = ["Validating", "InvalidRow"]
# ConfigMap; Job, and its ttl, once or twice; a status at each turn, at its start and for the trainer's Job; events.
LIVES = {"a job that passes": (True, 1 + 4 + 6 + len(PASSES), PASSES), "one that fails": (False, 1 + 2 + 3 + 2, FAILS)}


@pytest.mark.parametrize(("passes", "count", "told"), LIVES.values(), ids=LIVES)
async def test_a_kill_around_any_write_changes_nothing(
    passes: bool, count: int, told: list[str], life: Life, jobs: Any, kubelet: PlayedKubelet
) -> None:
    reference, writes, _ = await life.live("reference", 0, False, passes=passes)
    assert len(writes) == count, writes
    assert jobs.event_reasons("reference") == told
    few = asyncio.Semaphore(AT_ONCE)

    async def try_plan(number: int, committed: bool) -> None:
        name = f"plan-{number}-{'after' if committed else 'before'}"
        async with few:
            job, _, operators = await life.live(name, number, committed, passes=passes)

        plan = (name, writes[number - 1])
        assert operators == 2, plan
        assert jobs.event_reasons(name) == told, plan
        assert _story(job) == _story(reference), plan
        assert len(kubelet.pods(name, PREFLIGHT)) == 1, plan
        assert len(kubelet.pods(name)) == int(passes), plan
        assert len(jobs.config_maps(name)) == 1, plan

        for naming in (child_name, preflight_name):
            child = jobs.find_child(name, naming)
            assert (child is not None) == (passes or naming is preflight_name), plan
            assert child is None or child["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"], plan

    await asyncio.gather(*(try_plan(number + 1, late) for number in range(count) for late in (False, True)))
