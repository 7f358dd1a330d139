"""A job on two nodes in a JobSet of the real controller, in a queue of the real Kueue. `make kueue` runs it."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from kubernetes import client

from finetune_api.failures import ExitCode
from finetune_api.job import ObjectMeta
from finetune_devcluster.cluster import DevCluster
from finetune_devcluster.jobset import run_job_set
from finetune_devcluster.kueue import Kueue, cluster_queue, kueue_object
from finetune_operator.desired.names import job_set_name
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for

pytestmark = [pytest.mark.kueue, pytest.mark.cluster]
NAMESPACE = "team-a"
ADMISSION_SECONDS = 3  # Kueue admits within one
FRAMEWORKS = ["batch/job", "jobset.x-k8s.io/jobset"]


@pytest.fixture(scope="module")
def kueue(kueue_cluster: DevCluster) -> Iterator[Kueue]:
    """Kueue that manages JobSets, with room for one pod of the two."""
    with run_job_set(kueue_cluster), Kueue.run(kueue_cluster, integrations={"frameworks": FRAMEWORKS}) as running:
        running.apply(kueue_object("ResourceFlavor", "any"), cluster_queue())
        yield running


@pytest.fixture(scope="module")
def set_operator(
    kueue: Kueue, kueue_cluster: DevCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorProcess]:
    process = OperatorProcess(kueue_cluster, tmp_path_factory.mktemp("operator"), kueue=True, job_sets=True)
    process.start()
    yield process
    process.stop()


def test_a_job_set_is_admitted_whole_drained_and_admitted_again(
    set_operator: OperatorProcess, kueue_cluster: DevCluster, kueue: Kueue, make_queued: Any, outcomes: Any
) -> None:
    queued, kubelet = make_queued(kueue_cluster, NAMESPACE), PlayedKubelet(kueue_cluster, NAMESPACE)
    api: Any = client.CustomObjectsApi(kueue_cluster.api_client())
    queued.create_local_queue()
    queued.jobs.multi_node = "JobSet"

    def job_set() -> Any:
        name = job_set_name(ObjectMeta.model_validate(queued.jobs.get("gang")["metadata"]))
        return api.get_namespaced_custom_object("jobset.x-k8s.io", "v1alpha2", NAMESPACE, "jobsets", name)

    def run_both(known: set[str]) -> list[Any]:
        """Both pods, once they are made."""

        def get() -> list[Any] | None:
            pods = [pod for pod in kubelet.pods("gang") if pod.metadata.uid not in known]
            return sorted(pods, key=lambda pod: pod.spec.hostname) if len(pods) == 2 else None

        pods = wait_for(get, "both pods", 60)
        for pod in pods:
            kubelet.run(pod)
        queued.jobs.wait_for_phase("gang", "Running", 30)
        return list(pods)

    # One Workload stands for the JobSet, and none for its Job.
    queued.create("gang", nodes=2)
    queued.wait_for_message("gang", "insufficient", 30)
    (workload,) = api.list_namespaced_custom_object("kueue.x-k8s.io", "v1beta2", NAMESPACE, "workloads")["items"]
    assert workload["metadata"]["labels"]["kueue.x-k8s.io/job-uid"] == job_set()["metadata"]["uid"]
    assert [each["count"] for each in workload["spec"]["podSets"]] == [2]
    time.sleep(ADMISSION_SECONDS)
    assert not kubelet.pods("gang")
    assert job_set()["spec"]["suspend"] is True

    kueue.apply(cluster_queue(pods=2))
    pods = run_both(set())

    kueue.apply(cluster_queue("HoldAndDrain", pods=2))
    queued.wait_for_message("gang", "ClusterQueueStopped", 30)
    for pod in pods:
        kubelet.end(pod, ExitCode.INTERRUPTED, outcomes.interrupted.encode())
        kubelet.remove(pod)
    held = queued.jobs.wait_for_phase("gang", "Queued", 30)["status"]
    assert held["checkpointStep"] == 7
    assert job_set()["spec"]["suspend"] is True

    kueue.apply(cluster_queue(pods=2))
    first, second = run_both({pod.metadata.uid for pod in pods})
    kubelet.end(first, 0, outcomes.success.encode())
    kubelet.end(second, ExitCode.INTERRUPTED)
    ended = queued.jobs.wait_for_phase("gang", "Succeeded", 30)["status"]
    assert ended["retries"] == 0
