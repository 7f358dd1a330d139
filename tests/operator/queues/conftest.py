"""Queues of Kueue on a real control plane: Kueue itself, or its CustomResourceDefinitions with played Workloads."""

from collections.abc import Iterator
from typing import Any

import pytest
from kubernetes import client

from finetune_devcluster.cluster import DevCluster
from finetune_devcluster.kueue import Kueue, cluster_queue, kueue_object
from finetune_test_operator.jobs import Jobs
from finetune_test_operator.operator_process import OperatorProcess

NAMESPACE = "team-a"


class Queued:
    """FineTuneJobs in queues, and Kueue's objects of one namespace."""

    def __init__(self, cluster: DevCluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.jobs = Jobs(cluster, namespace)
        self._api: Any = client.CustomObjectsApi(cluster.api_client())

    def create(self, name: str, queue: str = "research", priority: str | None = None, **run_policy: Any) -> None:
        """A small job in a queue."""
        scheduling = {"queueName": queue} | ({"workloadPriorityClassName": priority} if priority else {})
        self.jobs.create(name, scheduling=scheduling, **run_policy)

    def create_local_queue(self, name: str = "research", cluster_queue: str = "all") -> None:
        body = kueue_object("LocalQueue", name, {"clusterQueue": cluster_queue})
        self._api.create_namespaced_custom_object(*self._path("localqueues"), body)

    def delete_local_queue(self, name: str = "research") -> None:
        self._api.delete_namespaced_custom_object(*self._path("localqueues"), name)

    def workloads(self, job: str) -> list[dict[str, Any]]:
        """The Workloads of a FineTuneJob's Job."""
        uid = self.jobs.child(job)["metadata"]["uid"]
        found = self._api.list_namespaced_custom_object(
            *self._path("workloads"), label_selector=f"kueue.x-k8s.io/job-uid={uid}"
        )
        return list(found["items"])

    def workload(self, job: str) -> dict[str, Any]:
        """The only Workload of a FineTuneJob's Job."""
        (found,) = self.workloads(job)
        return found

    def patch_workload(self, job: str, changes: dict[str, Any]) -> None:
        name = self.workload(job)["metadata"]["name"]
        self._api.patch_namespaced_custom_object(*self._path("workloads"), name, changes)

    def play_workload(self, job: str) -> None:
        """Make the Workload that Kueue would make of a FineTuneJob's Job."""
        child = self.jobs.child(job)
        metadata = child["metadata"]
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": metadata["name"], "uid": metadata["uid"]}
        name, template = f"job-{metadata['name']}", child["spec"]["template"]
        spec = {"queueName": "research", "podSets": [{"name": "main", "count": 1, "template": template}]}
        body = kueue_object("Workload", name, spec)
        body["metadata"] |= {
            "labels": {"kueue.x-k8s.io/job-uid": metadata["uid"]},
            "ownerReferences": [owner | {"controller": True}],
        }
        self._api.create_namespaced_custom_object(*self._path("workloads"), body)

    def play_condition(self, job: str, kind: str, status: str, reason: str, message: str) -> None:
        """Write a condition of a Workload, as Kueue would."""
        workload = self.workload(job)
        others = [each for each in workload.get("status", {}).get("conditions", []) if each["type"] != kind]
        condition = {"type": kind, "status": status, "reason": reason, "message": message}
        condition["lastTransitionTime"] = "2026-11-24T12:00:00Z"
        self._api.patch_namespaced_custom_object_status(
            *self._path("workloads"), workload["metadata"]["name"], {"status": {"conditions": [*others, condition]}}
        )

    def suspend_child(self, job: str, suspend: bool) -> None:
        """Suspend or resume a Job, as Kueue would."""
        batch: Any = client.BatchV1Api(self.cluster.api_client())
        name = self.jobs.child(job)["metadata"]["name"]
        batch.patch_namespaced_job(name, self.namespace, {"spec": {"suspend": suspend}}, field_manager="kueue")

    def condition(self, job: str, kind: str = "Queued") -> dict[str, Any]:
        """A condition of a FineTuneJob."""
        conditions = self.jobs.get(job).get("status", {}).get("conditions", [])
        return next((each for each in conditions if each["type"] == kind), {})

    def wait_for_message(self, job: str, part: str, seconds: float = 15) -> dict[str, Any]:
        """The job as soon as its condition Queued or Ready says something."""
        return self.jobs.wait(
            job,
            lambda status: any(part in each["message"] for each in status.get("conditions", [])),
            f"a condition that says {part!r}",
            seconds,
        )

    def _path(self, plural: str) -> tuple[str, str, str, str]:
        return "kueue.x-k8s.io", "v1beta2", self.namespace, plural


@pytest.fixture
def make_queued() -> type[Queued]:
    """The class itself, for modules with a cluster of their own."""
    return Queued


@pytest.fixture(scope="module")
def kueue_cluster() -> Iterator[DevCluster]:
    with DevCluster.start() as cluster:
        client.CoreV1Api(cluster.api_client()).create_namespace(client.V1Namespace(metadata={"name": NAMESPACE}))
        yield cluster


@pytest.fixture(scope="module")
def kueue(kueue_cluster: DevCluster) -> Iterator[Kueue]:
    with Kueue.run(kueue_cluster) as running:
        running.apply(
            kueue_object("ResourceFlavor", "any"),
            cluster_queue(),
            kueue_object("WorkloadPriorityClass", "urgent", value=1000, description=""),
        )
        yield running


@pytest.fixture(scope="module")
def queue_operator(
    kueue: Kueue, kueue_cluster: DevCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorProcess]:
    process = OperatorProcess(kueue_cluster, tmp_path_factory.mktemp("operator"), kueue=True)
    process.start()
    yield process
    process.stop()
