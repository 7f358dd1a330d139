"""Writes of a status that arrive late, held up by the network or sent by a leader that is dying."""

import asyncio
from typing import Any

import pytest

from finetune_api.base import Json
from finetune_operator.cluster.cluster import Cluster, NamespacedName
from finetune_operator.cluster.connection import APPLY, ApiConnection
from finetune_operator.desired.installation import Installation
from finetune_operator.errors import ConflictError
from finetune_operator.gpu_line import GpuLine
from finetune_operator.observe.report_store import ReportStore
from finetune_operator.observe.terminated_pods import TerminatedPods
from finetune_operator.reconcile import Reconciler
from finetune_test_operator.played_kubelet import PlayedKubelet

pytestmark = pytest.mark.cluster


class Network:
    """The way to the API server. It can hold up the next write of a status, and keeps those that it has carried."""

    def __init__(self, connection: ApiConnection) -> None:
        self._connection = connection
        self.clock = connection.clock
        self.holds = False
        self.has_held = asyncio.Event()
        self.lets_go = asyncio.Event()
        self.statuses: list[Json] = []

    async def request(self, verb: str, path: str, body: Json | None = None, **options: Any) -> Json:
        if verb == "PATCH" and path.endswith("/status") and body is not None:
            self.statuses.append(body)
            if self.holds:
                self.has_held.set()
                await self.lets_go.wait()
        return await self._connection.request(verb, path, body, **options)


def _operator(network: Network) -> Reconciler:
    installation = Installation("finetune-trainer:test", "https://127.0.0.1:1", "PEM")
    return Reconciler(Cluster(network), installation, ReportStore(), TerminatedPods(), GpuLine())  # type: ignore[arg-type]


async def test_a_late_running_never_follows_succeeded(
    connection: ApiConnection, jobs: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    slow, quick = Network(connection), Network(connection)
    old, new, name = _operator(slow), _operator(quick), NamespacedName(jobs.namespace, "late")
    jobs.create("late")
    await old.reconcile(name)
    pod = await asyncio.to_thread(kubelet.wait_for_pod, "late")
    kubelet.run(pod)

    slow.holds = True
    late = asyncio.create_task(old.reconcile(name))
    await asyncio.wait_for(slow.has_held.wait(), 15)
    kubelet.end(pod, 0, outcomes.success.encode())
    await new.reconcile(name)
    succeeded = jobs.get("late")["status"]
    assert (succeeded["phase"], len(succeeded["artifacts"])) == ("Succeeded", 1)

    slow.lets_go.set()
    with pytest.raises(ConflictError):
        await late
    written = len(slow.statuses)
    await old.reconcile(name)
    assert len(slow.statuses) == written, "the next look sees that the job is over"
    assert jobs.get("late")["status"] == succeeded

    # Without the version that it was decided from, the very same write would have lost the artifacts.
    body = slow.statuses[-1]
    del body["metadata"]["resourceVersion"]
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{jobs.namespace}/finetunejobs/late/status"
    query = {"fieldManager": "finetune-operator", "force": "true"}
    await connection.request("PATCH", path, body, query=query, content_type=APPLY)
    lost = jobs.get("late")["status"]
    assert (lost["phase"], lost["artifacts"]) == ("Running", [])


async def test_an_edit_between_reading_and_writing_costs_one_more_write(connection: ApiConnection, jobs: Any) -> None:
    network = Network(connection)
    operator, name = _operator(network), NamespacedName(jobs.namespace, "edited")
    jobs.create("edited", suspend=True)

    network.holds = True
    first = asyncio.create_task(operator.reconcile(name))
    await asyncio.wait_for(network.has_held.wait(), 15)
    jobs.label("edited", "touched", "yes")
    jobs.patch_run_policy("edited", activeDeadlineSeconds=60)
    network.lets_go.set()
    with pytest.raises(ConflictError):
        await first

    await operator.reconcile(name)
    await operator.reconcile(name)
    edited = jobs.get("edited")
    assert (edited["metadata"]["labels"]["touched"], edited["status"]["observedGeneration"]) == ("yes", 2)
    assert len(network.statuses) == 2, "the one that was refused, and the one that tells the newest"
