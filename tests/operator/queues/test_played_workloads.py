"""Kueue's Workloads, played on a real API server with its CustomResourceDefinitions: what jobs say and write.

`make kueue` has the same with the real Kueue.
"""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from kubernetes import client

from finetune_devcluster.cluster import DevCluster
from finetune_devcluster.kueue import install_kueue_crds
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet

pytestmark = pytest.mark.cluster

NAMESPACE = "played-queues"
OLD_BEHAVIOUR_SECONDS = 2  # an operator that resumes a held Job does it within one


@pytest.fixture(scope="module")
def queue_operator(
    operator_process: OperatorProcess, dev_cluster: DevCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorProcess]:
    """An operator with rights on Kueue's objects, in place of the one of all other tests."""
    operator_process.kill()
    install_kueue_crds(dev_cluster)
    client.CoreV1Api(dev_cluster.api_client()).create_namespace(client.V1Namespace(metadata={"name": NAMESPACE}))
    process = OperatorProcess(dev_cluster, tmp_path_factory.mktemp("queues"), NAMESPACE, kueue=True)
    process.start()
    yield process
    process.stop()


@pytest.fixture
def queued(queue_operator: OperatorProcess, dev_cluster: DevCluster, make_queued: Any) -> Iterator[Any]:
    queued = make_queued(dev_cluster, NAMESPACE)
    queued.create_local_queue()
    yield queued
    queued.jobs.delete_all()
    queued.delete_local_queue()


@pytest.fixture
def kubelet(dev_cluster: DevCluster) -> PlayedKubelet:
    return PlayedKubelet(dev_cluster, NAMESPACE)


def test_a_job_says_what_its_workload_says_from_the_line_to_its_second_trainer(
    queued: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    queued.create("bot", priority="urgent")
    queued.wait_for_message("bot", "Kueue has made no Workload of it yet")
    child = queued.jobs.child("bot")
    assert child["spec"]["suspend"] is True
    assert child["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "urgent"

    queued.play_workload("bot")
    queued.play_condition("bot", "QuotaReserved", "False", "Pending", "no quota in flavor h100")
    queued.wait_for_message("bot", "waits in queue research: Pending: no quota in flavor h100", 10)
    time.sleep(OLD_BEHAVIOUR_SECONDS)
    assert queued.jobs.child("bot")["spec"]["suspend"] is True

    queued.play_condition("bot", "QuotaReserved", "True", "QuotaReserved", "")
    queued.suspend_child("bot", False)
    pod = kubelet.wait_for_pod("bot")
    kubelet.run(pod)
    queued.jobs.wait_for_phase("bot", "Running")

    queued.play_condition("bot", "Evicted", "True", "Preempted", "for job x")
    queued.suspend_child("bot", True)
    queued.wait_for_message("bot", "Kueue evicted the job (Preempted: for job x)")
    kubelet.end(pod, 30, outcomes.interrupted.encode())
    kubelet.remove(pod)
    held = queued.jobs.wait("bot", lambda status: status.get("checkpointStep"), "the checkpoint")["status"]
    assert (held["phase"], held["reason"], held["retries"]) == ("Queued", "EvictedByQueue", 0)

    queued.suspend_child("bot", False)
    again = kubelet.wait_for_pod("bot")
    kubelet.run(again)
    kubelet.end(again, 0, outcomes.success.encode())
    queued.jobs.wait_for_phase("bot", "Succeeded")


def test_suspension_is_told_to_the_workload_and_taken_back(queued: Any) -> None:
    queued.create("paused")
    queued.wait_for_message("paused", "Kueue has made no Workload of it yet")
    queued.jobs.patch_run_policy("paused", suspend=True)
    queued.wait_for_message("paused", "waiting until Kueue has made a Workload of the Job")
    queued.play_workload("paused")
    queued.jobs.wait_for_phase("paused", "Suspended")
    assert queued.workload("paused")["spec"]["active"] is False
    queued.jobs.patch_run_policy("paused", suspend=False)
    queued.jobs.wait_for_phase("paused", "Queued")
    assert queued.workload("paused")["spec"]["active"] is True
    assert "annotations" not in queued.workload("paused")["metadata"]


def test_a_queue_that_does_not_exist_costs_not_even_a_check(queued: Any) -> None:
    queued.create("lost", queue="reserch", preflight="Run")
    queued.jobs.wait("lost", lambda status: status.get("reason") == "QueueNotFound", "the missing queue")
    assert queued.condition("lost", "Stalled")["status"] == "True"
    assert "QueueNotFound" in queued.jobs.event_reasons("lost")
    assert queued.jobs.config_maps("lost") == []


def test_without_rights_on_workloads_the_job_says_what_is_missing(queue_operator: OperatorProcess, queued: Any) -> None:
    queue_operator.stop()
    granted = dict(queue_operator.environment)
    queue_operator.environment = {"FINETUNE_KUEUE": "false"}
    queue_operator.start()
    try:
        queued.create("blind")
        queued.wait_for_message("blind", "The operator says it here if the chart's value kueue.enabled is true")
        queued.jobs.patch_run_policy("blind", suspend=True)
        queued.jobs.wait("blind", lambda status: status.get("reason") == "QueueDecides", "who may suspend the Job")
    finally:
        queue_operator.stop()
        queue_operator.environment = granted
        queue_operator.start()
