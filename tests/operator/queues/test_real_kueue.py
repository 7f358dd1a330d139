"""Jobs in queues of the real Kueue: admitted, preempted, evicted, suspended, resumed, ended. `make kueue` runs them."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from finetune_api.failures import ExitCode
from finetune_devcluster.cluster import DevCluster
from finetune_devcluster.kueue import Kueue, cluster_queue
from finetune_operator.desired.names import PREFLIGHT, preflight_name
from finetune_test_operator.jobs import Jobs
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet

pytestmark = [pytest.mark.kueue, pytest.mark.cluster]

ADMISSION_SECONDS = 3  # Kueue admits within one; a job that should be held is watched for this long
NAMESPACE = "team-a"


@pytest.fixture
def queued(queue_operator: OperatorProcess, kueue_cluster: DevCluster, make_queued: Any) -> Iterator[Any]:
    queued = make_queued(kueue_cluster, NAMESPACE)
    queued.create_local_queue()
    yield queued
    _clean_up(queued)


def _clean_up(queued: Any) -> None:
    """Delete all jobs: they leave nothing behind, in the queue either."""
    queued.jobs.delete_all()
    queued.delete_local_queue()
    deadline = time.monotonic() + 60
    while queued.cluster.kubectl("get", "workloads,jobs,pods", "-n", NAMESPACE, "-o", "name").stdout:
        assert time.monotonic() < deadline, "a deleted job leaves nothing behind"
        queued.cluster.kubectl("delete", "pods", "--all", "--grace-period=0", "--force", "-n", NAMESPACE)
        time.sleep(0.2)


@pytest.fixture
def kubelet(kueue_cluster: DevCluster) -> PlayedKubelet:
    return PlayedKubelet(kueue_cluster, NAMESPACE)


def test_kueue_may_be_installed_after_the_operator_and_after_a_job(
    kueue_cluster: DevCluster, make_queued: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    early = OperatorProcess(kueue_cluster, tmp_path, kueue=True)
    early.start()
    queued = make_queued(kueue_cluster, NAMESPACE)
    queued.create("early")
    queued.wait_for_message(
        "early", "spec.scheduling.queueName is research, but Kueue is not installed in this cluster"
    )

    request.getfixturevalue("kueue")
    queued.create_local_queue()
    kubelet = PlayedKubelet(kueue_cluster, NAMESPACE)
    kubelet.run(kubelet.wait_for_pod("early"))
    queued.jobs.wait_for_phase("early", "Running")
    assert "ERROR" not in early.log
    early.stop()
    _clean_up(queued)


def _start(queued: Any, kubelet: PlayedKubelet, name: str, number: int = 1) -> Any:
    """Let the trainer of an admitted job run."""
    pod = kubelet.wait_for_pod(name, number)
    kubelet.run(pod)
    queued.jobs.wait_for_phase(name, "Running")
    return pod


def _interrupt(kubelet: PlayedKubelet, pod: Any, outcomes: Any) -> None:
    """Let a trainer that is being stopped write its checkpoint and end."""
    kubelet.end(pod, ExitCode.INTERRUPTED, outcomes.interrupted.encode())
    kubelet.remove(pod)


def test_a_job_is_admitted_and_the_next_one_waits_with_its_place_in_the_line(
    queued: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    queued.create("first")
    pod = _start(queued, kubelet, "first")
    for name in ("second", "third"):
        queued.create(name)
        queued.wait_for_message(name, "position")
        time.sleep(1)  # Kueue's order is that of creation, in whole seconds
    assert "waits in queue research at position 1: Pending: couldn't assign flavors" in _said(queued, "second")
    assert "insufficient unused quota for cpu" in _said(queued, "second")
    assert "at position 2" in _said(queued, "third")
    assert queued.condition("second")["reason"] == "WaitingInQueue"

    kubelet.end(pod, 0, outcomes.success.encode())
    queued.jobs.wait_for_phase("first", "Succeeded")
    _start(queued, kubelet, "second")
    queued.wait_for_message("third", "at position 1", 90)
    assert queued.jobs.child("second")["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"


def _said(queued: Any, name: str) -> str:
    return str(queued.condition(name)["message"])


def test_a_preempted_job_goes_on_from_its_checkpoint_and_has_not_failed(
    queued: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    queued.create("patient")
    pod = _start(queued, kubelet, "patient")
    queued.create("pressing", priority="urgent")
    queued.wait_for_message("patient", "Kueue evicted the job (Preempted: ", 20)
    _interrupt(kubelet, pod, outcomes)
    held = queued.wait_for_message("patient", "it goes on from its newest checkpoint. Job")["status"]
    assert (held["phase"], held["reason"]) == ("Queued", "EvictedByQueue")
    assert held["checkpointStep"] == 7

    kubelet.end(_start(queued, kubelet, "pressing"), 0, outcomes.success.encode())
    queued.jobs.wait_for_phase("pressing", "Succeeded")
    again = _start(queued, kubelet, "patient")
    kubelet.end(again, 0, outcomes.success.encode())
    ended = queued.jobs.wait_for_phase("patient", "Succeeded")["status"]
    assert ended["retries"] == 0
    assert "failure" not in ended


def test_a_stopped_cluster_queue_drains_its_jobs_and_gives_them_back(
    queued: Any, kubelet: PlayedKubelet, kueue: Kueue, outcomes: Any
) -> None:
    queued.create("drained")
    pod = _start(queued, kubelet, "drained")
    kueue.apply(cluster_queue("HoldAndDrain"))
    queued.wait_for_message("drained", "ClusterQueueStopped")
    _interrupt(kubelet, pod, outcomes)
    queued.jobs.wait_for_phase("drained", "Queued")
    assert queued.jobs.child("drained")["spec"]["suspend"] is True
    kueue.apply(cluster_queue())
    _start(queued, kubelet, "drained")


def test_a_suspended_job_leaves_the_line_and_comes_back(queued: Any, kubelet: PlayedKubelet, outcomes: Any) -> None:
    queued.create("paused")
    pod = _start(queued, kubelet, "paused")
    queued.create("next")
    queued.wait_for_message("next", "position 1")
    queued.jobs.patch_run_policy("paused", suspend=True)
    queued.jobs.wait("paused", lambda status: status.get("reason") == "Suspending", "the stop")
    _interrupt(kubelet, pod, outcomes)
    queued.jobs.wait_for_phase("paused", "Suspended")
    assert queued.workload("paused")["spec"]["active"] is False

    other = _start(queued, kubelet, "next")
    queued.jobs.patch_run_policy("paused", suspend=False)
    queued.jobs.wait_for_phase("paused", "Queued")
    assert queued.workload("paused")["spec"]["active"] is True
    kubelet.end(other, 1)
    queued.jobs.delete("next")
    _start(queued, kubelet, "paused")


def test_a_job_that_is_suspended_from_the_start_never_starts_a_pod(queued: Any, kubelet: PlayedKubelet) -> None:
    queued.create("later", suspend=True)
    queued.jobs.wait_for_phase("later", "Suspended")
    time.sleep(ADMISSION_SECONDS)
    assert queued.jobs.find_child("later") is None
    queued.jobs.patch_run_policy("later", suspend=False)
    _start(queued, kubelet, "later")


def test_a_job_that_waits_is_suspended_before_it_is_admitted(queued: Any, kubelet: PlayedKubelet) -> None:
    queued.create("holder")
    pod = _start(queued, kubelet, "holder")
    queued.create("waiter")
    queued.wait_for_message("waiter", "position 1")
    queued.jobs.patch_run_policy("waiter", suspend=True)
    queued.jobs.wait_for_phase("waiter", "Suspended")
    kubelet.end(pod, 5)
    queued.jobs.delete("holder")
    time.sleep(ADMISSION_SECONDS)
    assert kubelet.pods("waiter") == []


def test_a_job_that_is_deleted_while_it_waits_leaves_nothing_in_the_queue(queued: Any, kubelet: PlayedKubelet) -> None:
    queued.create("holder")
    _start(queued, kubelet, "holder")
    queued.create("gone")
    queued.wait_for_message("gone", "position 1")
    name = queued.workload("gone")["metadata"]["name"]
    queued.jobs.delete("gone")
    queued.create("heir")
    queued.wait_for_message("heir", "position 1")
    assert name not in queued.cluster.kubectl("get", "workloads", "-n", NAMESPACE, "-o", "name").stdout


def test_a_job_that_fails_while_kueue_holds_it_is_taken_out_of_the_line(
    queued: Any, kubelet: PlayedKubelet, kueue: Kueue, outcomes: Any
) -> None:
    queued.create("doomed")
    pod = _start(queued, kubelet, "doomed")
    kueue.apply(cluster_queue("HoldAndDrain"))
    queued.wait_for_message("doomed", "ClusterQueueStopped")
    kubelet.end(pod, 137, reason="OOMKilled")
    kubelet.remove(pod)
    queued.jobs.wait_for_phase("doomed", "Failed")
    kueue.apply(cluster_queue())
    time.sleep(ADMISSION_SECONDS)
    assert queued.workload("doomed")["spec"]["active"] is False
    assert kubelet.pods("doomed") == []


def test_a_workload_that_an_administrator_deactivates_is_left_alone(
    queued: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    queued.create("stopped")
    pod = _start(queued, kubelet, "stopped")
    queued.patch_workload("stopped", {"spec": {"active": False}})
    queued.wait_for_message("stopped", "and the trainer is writing its checkpoint before it stops")
    _interrupt(kubelet, pod, outcomes)
    found = queued.jobs.wait("stopped", lambda status: status.get("reason") == "QueueDeactivated", "who acted")
    assert "was deactivated (Deactivated: " in found["status"]["conditions"][0]["message"]
    time.sleep(ADMISSION_SECONDS)
    assert queued.workload("stopped")["spec"]["active"] is False
    queued.patch_workload("stopped", {"spec": {"active": True}})
    _start(queued, kubelet, "stopped")


def test_a_queue_that_does_not_exist_is_said_before_anything_is_made(queued: Any, kubelet: PlayedKubelet) -> None:
    queued.create("lost", queue="reserch", preflight="Run")
    found = queued.jobs.wait("lost", lambda status: status.get("reason") == "QueueNotFound", "the missing queue")
    assert "namespace team-a has no LocalQueue reserch: create it" in found["status"]["conditions"][0]["message"]
    assert "QueueNotFound" in queued.jobs.event_reasons("lost")
    assert queued.jobs.find_child("lost") is None

    queued.create_local_queue("reserch")
    queued.jobs.wait_for_phase("lost", "Validating", 45)
    queued.delete_local_queue("reserch")


def test_time_in_the_queue_counts_for_no_deadline(queued: Any, kubelet: PlayedKubelet, outcomes: Any) -> None:
    queued.create("timed", activeDeadlineSeconds=60)
    pod = _start(queued, kubelet, "timed")
    time.sleep(4)
    queued.create("pressing", priority="urgent")
    queued.wait_for_message("timed", "Kueue evicted the job", 20)
    _interrupt(kubelet, pod, outcomes)
    queued.jobs.wait_for_phase("timed", "Queued")
    time.sleep(5)
    queued.jobs.delete("pressing")
    queued.cluster.kubectl("delete", "pods", "--all", "--grace-period=0", "--force", "-n", NAMESPACE)
    _start(queued, kubelet, "timed")
    spent = 60 - queued.jobs.child("timed")["spec"]["activeDeadlineSeconds"]
    assert 4 <= spent <= 9, "the seconds of the first run, and none of those in the queue"
    assert _jobs_are_never_touched(queued.jobs)


def test_where_kueue_manages_every_job_the_checks_wait_in_the_queue_too(
    queued: Any, queue_operator: OperatorProcess, kueue: Kueue, kubelet: PlayedKubelet
) -> None:
    with kueue.managing_every_job():
        queued.create("checked", preflight="Run")
        found = queued.jobs.wait("checked", lambda status: status.get("reason") == "QueueRequired", "what is needed")
        assert "kueue.queuePreflight is true" in found["status"]["conditions"][0]["message"]
        held = queued.jobs.child("checked", preflight_name)
        time.sleep(ADMISSION_SECONDS)
        later = queued.jobs.child("checked", preflight_name)
        assert later["metadata"]["generation"] == held["metadata"]["generation"], "nobody fights for it"
        queued.jobs.delete("checked")

        queue_operator.stop()
        queue_operator.environment |= {"FINETUNE_QUEUE_PREFLIGHT": "true"}
        queue_operator.start()
        try:
            queued.create("again", preflight="Run")
            kubelet.wait_for_pod("again", component=PREFLIGHT)
            assert queued.jobs.find_child("again") is None
        finally:
            queue_operator.stop()
            del queue_operator.environment["FINETUNE_QUEUE_PREFLIGHT"]
            queue_operator.start()


def _jobs_are_never_touched(jobs: Jobs) -> bool:
    """True if the operator owns no `suspend` of any Job but by its creation."""
    batch: Any = client.BatchV1Api(jobs.cluster.api_client())
    for job in batch.list_namespaced_job(NAMESPACE).items:
        for entry in job.metadata.managed_fields or ():
            fields = (entry.fields_v1 or {}).get("f:spec", {})
            if entry.manager == "finetune-operator" and "f:suspend" in fields and not job.spec.suspend:
                return False
    return True
