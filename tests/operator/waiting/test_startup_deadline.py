"""A pod that does not start, on a real control plane: the job fails with the cause, and gives back what it held."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from kubernetes import client

from finetune_api.base import Json
from finetune_api.failures import ExitCode, FailureReason
from finetune_api.outcome import Outcome, Result
from finetune_operator.cluster.cluster import Cluster, NamespacedName
from finetune_operator.cluster.connection import ApiConnection
from finetune_operator.desired.installation import Installation
from finetune_operator.desired.names import PREFLIGHT, child_name, preflight_name
from finetune_operator.gpu_line import GpuLine
from finetune_operator.observe.report_store import ReportStore
from finetune_operator.observe.terminated_pods import TerminatedPods
from finetune_operator.reconcile import Reconciler
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for

pytestmark = pytest.mark.cluster

STOPPED = Outcome(
    result=Result.INTERRUPTED,
    reason=FailureReason.INTERRUPTED,
    exit_code=ExitCode.INTERRUPTED,
    step=7,
    checkpoint_step=7,
    finished="2026-11-24T00:00:00Z",
).encode()


def _is_stopped(jobs: Any, name: str, naming: Callable[..., str] = child_name) -> bool:
    """True if the Job controller has given up the Job for good."""
    conditions = jobs.child(name, naming).get("status", {}).get("conditions", [])
    return any(each["type"] == "Failed" and each["reason"] == "DeadlineExceeded" for each in conditions)


def _has_failed(jobs: Any, name: str) -> bool:
    return bool(jobs.get(name)["status"]["phase"] == "Failed")


def _fails(jobs: Any, name: str, reason: str, said: str) -> Json:
    """Waits until the job has failed for a reason and its Job is stopped; returns the status."""
    status: Json = jobs.wait_for_phase(name, "Failed", 30)["status"]
    assert status["failure"]["reason"] == reason
    assert said in status["failure"]["message"]
    assert "startupDeadlineSeconds" in status["failure"]["message"]
    assert reason in jobs.event_reasons(name)
    wait_for(lambda: _is_stopped(jobs, name), "the Job is stopped", 30)
    return status


WAITS = {
    "an image": ("ImagePullBackOff", "ImagePullFailed"),
    "a Secret": ("CreateContainerConfigError", "ContainerConfigError"),
}


@pytest.mark.parametrize(("waiting", "reason"), WAITS.values(), ids=WAITS)
def test_a_container_that_cannot_start_ends_the_job(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, waiting: str, reason: str
) -> None:
    jobs.create("stuck")
    kubelet.wait_in(kubelet.wait_for_pod("stuck"), waiting, "the test says so")
    jobs.wait("stuck", lambda status: status.get("phase") == "Queued", "queued")
    jobs.patch_run_policy("stuck", startupDeadlineSeconds=1)
    _fails(jobs, "stuck", reason, "the test says so")
    wait_for(lambda: not kubelet.pods("stuck"), "no pod is left")


def test_a_volume_that_cannot_be_mounted_ends_the_job(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, namespace: str
) -> None:
    jobs.create("unmounted")
    pod = kubelet.wait_for_pod("unmounted")
    reference = {"kind": "Pod", "namespace": namespace, "name": pod.metadata.name, "uid": pod.metadata.uid}
    said = 'MountVolume.SetUp failed for volume "credentials" : secret "s3" not found'
    core: Any = client.CoreV1Api(jobs.cluster.api_client())
    event = {"metadata": {"name": "mount"}, "involvedObject": reference, "reason": "FailedMount", "message": said}
    core.create_namespaced_event(namespace, event)
    kubelet.wait_in(pod, "ContainerCreating", "")
    jobs.wait("unmounted", lambda status: status.get("reason") == "ContainerConfigError", "its volumes", 30)
    jobs.patch_run_policy("unmounted", startupDeadlineSeconds=1)
    _fails(jobs, "unmounted", "ContainerConfigError", said)


def test_a_job_that_the_api_server_refuses_ends(operator: OperatorProcess, jobs: Any, namespace: str) -> None:
    core: Any = client.CoreV1Api(jobs.cluster.api_client())
    hard = {"count/jobs.batch": "0"}
    core.create_namespaced_resource_quota(namespace, {"metadata": {"name": "none"}, "spec": {"hard": hard}})
    wait_for(lambda: core.read_namespaced_resource_quota("none", namespace).status.hard, "the quota is counted")

    jobs.create("refused")
    jobs.wait("refused", lambda status: status.get("reason") == "PermissionDenied", "refused")
    jobs.patch_run_policy("refused", startupDeadlineSeconds=1)
    # A refused write is tried again after 30 s; a change of the job is looked at at once.
    wait_for(lambda: jobs.label("refused", "look", str(time.time())) or _has_failed(jobs, "refused"), "failed", 30)
    failure = jobs.get("refused")["status"]["failure"]
    assert failure["reason"] == "StartupDeadlineExceeded"
    assert "exceeded quota" in failure["message"]


def test_a_pod_without_a_node_ends_the_job_and_keeps_its_checkpoint(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet
) -> None:
    """The second attempt waits; the first one ran."""
    jobs.create("homeless")
    first = kubelet.wait_for_pod("homeless")
    kubelet.run(first)
    jobs.wait_for_phase("homeless", "Running")
    kubelet.end(first, 30, STOPPED)
    kubelet.wait_for_pod("homeless", 2)
    jobs.wait("homeless", lambda status: len(status.get("attempts", [])) == 2, "the second attempt")
    jobs.patch_run_policy("homeless", startupDeadlineSeconds=1)

    status = _fails(jobs, "homeless", "Unschedulable", "no node fits the pod")
    assert status["checkpointStep"] == 7


def test_the_checks_have_the_same_deadline(operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet) -> None:
    jobs.create("unchecked", preflight="Run")
    kubelet.wait_for_pod("unchecked", component=PREFLIGHT)
    jobs.wait(
        "unchecked", lambda s: any(each["reason"] == "Unschedulable" for each in s.get("conditions", [])), "no node"
    )
    jobs.patch_run_policy("unchecked", startupDeadlineSeconds=1)
    status = jobs.wait_for_phase("unchecked", "Failed", 30)["status"]
    assert (status["failure"]["reason"], status["failure"]["stage"]) == ("Unschedulable", "Preflight")
    wait_for(lambda: _is_stopped(jobs, "unchecked", preflight_name), "the Job of the checks is stopped", 30)


def test_a_quota_that_refuses_the_pod_ends_the_job_and_what_a_stuck_job_held_is_free_again(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, namespace: str
) -> None:
    core: Any = client.CoreV1Api(jobs.cluster.api_client())
    core.create_namespaced_resource_quota(namespace, {"metadata": {"name": "one"}, "spec": {"hard": {"pods": "1"}}})
    quota = wait_for(lambda: core.read_namespaced_resource_quota("one", namespace).status.hard, "the quota is counted")
    assert quota == {"pods": "1"}

    jobs.create("holds")
    kubelet.wait_in(kubelet.wait_for_pod("holds"), "ErrImagePull", "not found")
    jobs.create("refused")
    refused = f"involvedObject.name={wait_for(lambda: jobs.find_child('refused'), 'a Job')['metadata']['name']}"
    wait_for(
        lambda: core.list_namespaced_event(namespace, field_selector=f"{refused},reason=FailedCreate").items, "refusal"
    )
    jobs.wait("refused", lambda status: status.get("reason") == "PodRejected", "refused", 30)
    jobs.patch_run_policy("refused", startupDeadlineSeconds=1)
    _fails(jobs, "refused", "PodRejected", "quota")

    jobs.patch_run_policy("holds", startupDeadlineSeconds=1)
    _fails(jobs, "holds", "ImagePullFailed", "not found")
    jobs.create("next")
    assert kubelet.wait_for_pod("next")


def test_time_in_suspension_does_not_count(operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet) -> None:
    jobs.create("paused")
    kubelet.wait_for_pod("paused")
    jobs.patch_run_policy("paused", suspend=True)
    jobs.wait_for_phase("paused", "Suspended")
    time.sleep(3)

    resumed = time.monotonic()
    jobs.patch_run_policy("paused", suspend=False, startupDeadlineSeconds=1)
    message = jobs.wait_for_phase("paused", "Failed", 30)["status"]["failure"]["message"]
    waited = int(message.split("has waited ")[1].split(" s")[0])
    # Times of the API server are whole seconds, so two of them may differ by one more.
    assert 1 <= waited <= time.monotonic() - resumed + 1


async def test_an_operator_that_dies_after_the_verdict_leaves_the_job_to_the_next_one(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet
) -> None:
    jobs.create("orphaned")
    kubelet.wait_for_pod("orphaned")
    operator.kill()
    jobs.patch_run_policy("orphaned", startupDeadlineSeconds=1)
    time.sleep(2)

    connection = await ApiConnection.open(operator.service_account)
    installation = Installation("finetune-trainer:test", "https://127.0.0.1:1", "PEM")
    dying = Reconciler(Cluster(connection), installation, ReportStore(), TerminatedPods(), GpuLine())
    await dying.reconcile(NamespacedName(jobs.namespace, "orphaned"))
    await connection.close()
    assert jobs.get("orphaned")["status"]["phase"] == "Failed"
    assert "activeDeadlineSeconds" not in jobs.child("orphaned")["spec"]

    operator.start()
    wait_for(lambda: _is_stopped(jobs, "orphaned"), "the Job is stopped", 30)
