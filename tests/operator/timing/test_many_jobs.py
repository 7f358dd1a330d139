"""Many jobs at once, on the real API server: events come first, and what does not change costs nothing."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from kubernetes import client

from finetune_api.base import Json
from finetune_operator.cluster.cluster import Cluster, NamespacedName
from finetune_operator.cluster.connection import ApiConnection
from finetune_operator.desired.installation import Installation
from finetune_operator.gpu_line import GpuLine
from finetune_operator.observe.report_store import ReportStore
from finetune_operator.observe.terminated_pods import TerminatedPods
from finetune_operator.reconcile import Reconciler
from finetune_operator.watch import controller as controller_module
from finetune_operator.watch.controller import WORKERS, Controller

pytestmark = pytest.mark.cluster

PAUSED = [f"paused-{number}" for number in range(30)]
OVER = [f"over-{number}" for number in range(70)]
READY = {
    "type": "Ready",
    "status": "True",
    "reason": "Completed",
    "message": "",
    "lastTransitionTime": "2026-11-24T00:00:00Z",
    "observedGeneration": 1,
}


class CountingConnection:
    """Keeps verb and path of every request."""

    def __init__(self, connection: ApiConnection) -> None:
        self._connection = connection
        self.clock = connection.clock
        self.requests: list[str] = []

    async def request(self, verb: str, path: str, body: Json | None = None, **options: Any) -> Json:
        self.requests.append(f"{verb} {path}")
        return await self._connection.request(verb, path, body, **options)


class Operator(Reconciler):
    """A controller at work, without watches: events are the test's. It keeps the jobs in the order of their looks."""

    def __init__(self, connection: ApiConnection, namespace: str) -> None:
        self.connection = CountingConnection(connection)
        cluster, reports = Cluster(self.connection, [namespace]), ReportStore()  # type: ignore[arg-type]
        installation, line = Installation("finetune-trainer:test", "https://a", "PEM"), GpuLine()
        super().__init__(cluster, installation, reports, TerminatedPods(), line)
        self.controller = Controller(cluster, self, reports, line)
        self.looks: list[str] = []

    async def reconcile(self, key: NamespacedName, *, has_changed: bool = True) -> float | None:
        self.looks.append(key.name)
        return await super().reconcile(key, has_changed=has_changed)

    def count(self, *words: str) -> int:
        """Number of requests that hold all the words."""
        return sum(all(word in request for word in words) for request in self.connection.requests)


@pytest.fixture
def many(connection: ApiConnection, jobs: Any) -> list[str]:
    """Jobs that wait and jobs that are over, most of them in the API server only."""

    def create(name: str) -> None:
        jobs.create(name, suspend=name in PAUSED)
        if name in OVER:
            jobs.set_status(name, {"phase": "Succeeded", "observedGeneration": 1, "conditions": [READY]})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(create, [*PAUSED, *OVER]))
    return [*PAUSED, *OVER]


@pytest.fixture
async def start(connection: ApiConnection, jobs: Any) -> AsyncIterator[Callable[[], Operator]]:
    """Starts the operator anew; its predecessor stops."""
    running: list[asyncio.Task[None]] = []

    def begin() -> Operator:
        for task in running:
            task.cancel()
        operator = Operator(connection, jobs.namespace)
        running.append(asyncio.create_task(operator.controller.run()))
        return operator

    yield begin
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def _until(holds: Callable[[], Any], what: str) -> None:
    for _ in range(1200):
        if holds():
            return
        await asyncio.sleep(0.05)
    raise TimeoutError(what)


async def _until_nothing_changes(jobs: Any) -> None:
    """Waits for the writes that a conflict has put off by a moment."""
    api: Any = client.CustomObjectsApi(jobs.cluster.api_client())
    before: list[str] = []
    while True:
        items = api.list_namespaced_custom_object("finetune.dev", "v1alpha1", jobs.namespace, "finetunejobs")["items"]
        versions = [item["metadata"]["resourceVersion"] for item in items]
        if versions == before:
            return
        before = versions
        await asyncio.sleep(2)


def _is_paused(job: Any) -> bool:
    """True once the Job controller has said so; it changes the Job no more."""
    return any(condition.type == "Suspended" for condition in job.status.conditions or ())


async def test_events_come_first_and_idle_jobs_cost_nothing(
    many: list[str], start: Callable[[], Operator], jobs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):  # without events, it takes a second look to see what the first has created
        first = start()
        await _until(lambda each=first: each.count("PATCH", "/status") == len(PAUSED), "every job has a status")

    batch: Any = client.BatchV1Api(jobs.cluster.api_client())
    await _until(lambda: all(_is_paused(each) for each in batch.list_namespaced_job(jobs.namespace).items), "paused")
    await _until_nothing_changes(jobs)

    # After a restart, all jobs are due, and an event arrives.
    again = start()
    await _until(lambda: len(again.looks) > WORKERS, "looks begin")
    late = next(name for name in reversed(many) if name not in again.looks)
    before = len(again.looks)
    again.controller.trigger(NamespacedName(jobs.namespace, late), jobs.get(late)["metadata"]["uid"], "unseen")
    await _until(lambda: late in again.looks, "the event's look begins")
    assert again.looks.index(late) <= before + 1

    await _until(lambda: set(again.looks) == set(many), "every job is looked at")
    assert len(again.looks) == len(many)
    assert again.count("POST") + again.count("PATCH") == 0
    assert again.count("GET", "over-") == len(OVER), "one request for each job that is over"

    # From now on a list is made every moment: only what has changed is looked at.
    monkeypatch.setattr(controller_module, "RESYNC_SECONDS", 0.2)
    monkeypatch.setattr(controller_module, "LIST_AGAIN_SECONDS", 0.2)
    again.controller.trigger_list()
    lists = again.count("finetunejobs") - again.count("finetunejobs/")
    await _until(lambda: again.count("finetunejobs") - again.count("finetunejobs/") > lists + 5, "five lists")
    assert len(again.looks) == len(many)

    jobs.label("paused-7", "touched", "yes")
    jobs.label_child("paused-8", "touched", "yes")
    await _until(lambda: {"paused-7", "paused-8"} <= set(again.looks[len(many) :]), "lost events are made good")
    assert set(again.looks[len(many) :]) == {"paused-7", "paused-8"}
