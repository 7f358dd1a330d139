"""What may happen to a job, on a real control plane: hindrances, suspension, deletion, name conflicts; and nothing.

Kills of the operator and faults of its connection are in `faults/`."""

import time
from typing import Any

import pytest
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from finetune_api.base import Json
from finetune_api.failures import ExitCode, FailureReason
from finetune_api.outcome import Outcome, Result
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for

pytestmark = pytest.mark.cluster


def _condition(status: Json, kind: str) -> Json:
    found: Json = next((each for each in status.get("conditions", []) if each["type"] == kind), {})
    return found


def _reason(reason: str) -> Any:
    return lambda status: _condition(status, "Ready").get("reason") == reason


def _interrupted(jobs: Any, step: int) -> str:
    return Outcome(
        result=Result.INTERRUPTED,
        reason=FailureReason.INTERRUPTED,
        exit_code=ExitCode.INTERRUPTED,
        step=step,
        checkpoint_step=step,
        finished="2026-11-24T00:00:00Z",
    ).encode()


def test_a_failure_that_may_pass_is_retried_and_told(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    jobs.create("flaky", maxRetries=1)
    first = kubelet.wait_for_pod("flaky")
    kubelet.run(first)
    kubelet.end(first, 137)
    jobs.wait("flaky", _reason("Retrying"), "retrying")

    second = kubelet.wait_for_pod("flaky", 2)
    kubelet.run(second)
    running = jobs.wait_for_phase("flaky", "Running")["status"]
    assert running["retries"] == 1

    kubelet.end(second, 137)
    status = jobs.wait_for_phase("flaky", "Failed", seconds=10)["status"]
    assert status["failure"]["reason"] == "TrainerCrashed"
    assert [attempt["exitCode"] for attempt in status["attempts"]] == [137, 137]
    assert {"Queued", "Started", "Retrying", "TrainerCrashed"} <= set(jobs.event_reasons("flaky"))


def test_an_interrupted_pod_is_replaced_without_using_a_retry(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet
) -> None:
    jobs.create("moved", maxRetries=0)
    first = kubelet.wait_for_pod("moved")
    kubelet.run(first)
    kubelet.end(first, 30, _interrupted(jobs, 7))
    kubelet.run(kubelet.wait_for_pod("moved", 2))
    status = jobs.wait("moved", lambda s: len(s.get("attempts", [])) == 2, "two attempts")["status"]
    assert status["checkpointStep"] == 7
    assert status.get("retries", 0) == 0


def test_suspension_keeps_the_last_words_and_the_clock(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet
) -> None:
    jobs.create("paused", activeDeadlineSeconds=1000)
    pod = kubelet.wait_for_pod("paused")
    kubelet.run(pod)
    jobs.wait_for_phase("paused", "Running")
    time.sleep(2)

    jobs.patch_run_policy("paused", suspend=True)
    wait_for(lambda: kubelet.pods("paused")[0].metadata.deletion_timestamp, "the pod is told to stop")
    assert jobs.get("paused")["status"]["phase"] == "Running"

    kubelet.end(pod, 30, _interrupted(jobs, 12))
    kubelet.remove(pod)
    status = jobs.wait_for_phase("paused", "Suspended")["status"]
    assert status["checkpointStep"] == 12
    assert status["activeSeconds"] >= 2
    assert _condition(status, "Reconciling")["status"] == "False"
    wait_for(lambda: not kubelet.pods("paused"), "no pod is left")

    time.sleep(2)  # does not count
    jobs.patch_run_policy("paused", suspend=False)
    kubelet.run(kubelet.wait_for_pod("paused"))
    resumed = jobs.wait_for_phase("paused", "Running")["status"]
    assert len(resumed["attempts"]) == 2
    assert jobs.child("paused")["spec"]["activeDeadlineSeconds"] == 1000 - status["activeSeconds"]
    assert {"Suspended", "Resumed"} <= set(jobs.event_reasons("paused"))


def test_a_deadline_fails_the_job(operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet) -> None:
    jobs.create("slow")
    pod = kubelet.wait_for_pod("slow")
    kubelet.run(pod)
    jobs.wait_for_phase("slow", "Running")
    jobs.patch_run_policy("slow", activeDeadlineSeconds=1)
    wait_for(lambda: kubelet.pods("slow")[0].metadata.deletion_timestamp, "the pod is told to stop")
    kubelet.end(pod, 30, _interrupted(jobs, 3))
    kubelet.remove(pod)
    status = jobs.wait_for_phase("slow", "Failed")["status"]
    assert status["failure"]["reason"] == "DeadlineExceeded"
    assert status["checkpointStep"] == 3


HINDRANCES = {
    "an image that cannot be pulled": ("ImagePullBackOff", "ImagePullFailed"),
    "a Secret that does not exist": ("CreateContainerConfigError", "ContainerConfigError"),
}


@pytest.mark.parametrize(("waiting", "reason"), HINDRANCES.values(), ids=HINDRANCES)
def test_what_keeps_the_trainer_from_starting_is_told(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, waiting: str, reason: str
) -> None:
    jobs.create("stuck")
    kubelet.wait_in(kubelet.wait_for_pod("stuck"), waiting, "the test says so")
    status = jobs.wait("stuck", _reason(reason), reason)["status"]
    assert status["phase"] == "Queued"
    assert _condition(status, "Stalled")["status"] == "True"
    assert "the test says so" in _condition(status, "Stalled")["message"]
    assert reason in jobs.event_reasons("stuck")


def test_a_pod_without_a_node_is_unschedulable(operator: OperatorProcess, jobs: Any) -> None:
    jobs.create("homeless")
    status = jobs.wait("homeless", _reason("Unschedulable"), "unschedulable")["status"]
    assert _condition(status, "Stalled")["status"] == "False"


def test_a_quota_that_refuses_the_pod_is_told(operator: OperatorProcess, jobs: Any, namespace: str) -> None:
    core: Any = client.CoreV1Api(jobs.cluster.api_client())
    core.create_namespaced_resource_quota(namespace, {"metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}})
    jobs.create("refused")
    status = jobs.wait("refused", _reason("PodRejected"), "refused", seconds=45)["status"]
    assert "quota" in _condition(status, "Stalled")["message"]


def test_a_volume_that_cannot_be_mounted_is_told(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, namespace: str
) -> None:
    jobs.create("unmounted")
    pod = kubelet.wait_for_pod("unmounted")
    reference = {"kind": "Pod", "namespace": namespace, "name": pod.metadata.name, "uid": pod.metadata.uid}
    said = 'MountVolume.SetUp failed for volume "credentials" : secret "s3" not found'
    core: Any = client.CoreV1Api(jobs.cluster.api_client())
    core.create_namespaced_event(
        namespace,
        {"metadata": {"name": "mount"}, "involvedObject": reference, "reason": "FailedMount", "message": said},
    )
    kubelet.wait_in(pod, "ContainerCreating", "")
    status = jobs.wait("unmounted", _reason("ContainerConfigError"), "told")["status"]
    assert said in _condition(status, "Stalled")["message"]


def test_a_job_of_the_same_name_is_never_adopted(operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet) -> None:
    operator.kill()
    created = jobs.create("taken")
    foreign = jobs.create_foreign_child(created)
    operator.start()
    jobs.wait("taken", _reason("NameConflict"), "conflict")
    assert jobs.child("taken")["metadata"]["uid"] == foreign["metadata"]["uid"]
    assert not kubelet.pods("taken")


def test_a_child_job_deleted_by_hand_is_made_again_unless_the_job_is_over(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    jobs.create("lost")
    kubelet.wait_for_pod("lost")
    old = jobs.child("lost")["metadata"]["uid"]
    jobs.delete_child("lost")
    wait_for(lambda: jobs.find_child("lost") and jobs.child("lost")["metadata"]["uid"] != old, "a new Job", 30)

    pod = kubelet.wait_for_pod("lost")
    kubelet.run(pod)
    kubelet.end(pod, 0, outcomes.success.encode())
    status = jobs.wait_for_phase("lost", "Succeeded")["status"]

    jobs.delete_child("lost")
    wait_for(lambda: jobs.find_child("lost") is None, "no Job")
    jobs.patch_run_policy("lost", activeDeadlineSeconds=99)
    later = jobs.wait("lost", lambda s: s["observedGeneration"] == 2, "generation 2")["status"]
    assert jobs.find_child("lost") is None
    assert later["completionTime"] == status["completionTime"]


def test_pods_go_after_their_ttl_and_the_job_stays(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    jobs.create("tidy", ttlSecondsAfterFinished=1)
    pod = kubelet.wait_for_pod("tidy")
    kubelet.run(pod)
    kubelet.end(pod, 0, outcomes.success.encode())
    jobs.wait_for_phase("tidy", "Succeeded")
    wait_for(lambda: not kubelet.pods("tidy"), "no pod is left", 30)
    assert jobs.get("tidy")["status"]["artifacts"]


def test_deletion_stops_the_pod_and_removes_every_child(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet
) -> None:
    jobs.create("gone")
    pod = kubelet.wait_for_pod("gone")
    kubelet.run(pod)
    jobs.delete("gone")
    stopped = wait_for(lambda: kubelet.pods("gone")[0].metadata.deletion_timestamp and kubelet.pods("gone")[0], "stop")
    assert stopped.metadata.deletion_grace_period_seconds == 120
    kubelet.end(pod, 30)
    kubelet.remove(pod)
    wait_for(lambda: not kubelet.pods("gone") and not jobs.config_maps("gone"), "nothing is left")


def _settled_writes(jobs: Any) -> dict[str, int]:
    """The counters, once jobs of tests before this one no longer move them."""
    before: dict[str, int] = {}
    for _ in range(20):
        counted: dict[str, int] = jobs.writes()
        if counted == before:
            return counted
        before = counted
        time.sleep(3)
    raise TimeoutError(f"writes go on without end: {before}")


def test_an_unchanged_job_costs_no_write(operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet) -> None:
    jobs.create("quiet")
    pod = kubelet.wait_for_pod("quiet")
    kubelet.run(pod)
    jobs.wait_for_phase("quiet", "Running")
    before = _settled_writes(jobs)

    jobs.label("quiet", "touched", "yes")
    jobs.label("quiet", "touched", "again")
    operator.kill()
    operator.start()
    time.sleep(2)
    after = jobs.writes()
    assert after == before

    jobs.patch_run_policy("quiet", activeDeadlineSeconds=500)
    jobs.wait("quiet", lambda s: s["observedGeneration"] == 2, "generation 2")
    assert jobs.writes() != before, "the counters see writes"


def test_the_trainers_pod_is_admitted_where_pods_must_be_restricted(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, namespace: str
) -> None:
    core: Any = client.CoreV1Api(jobs.cluster.api_client())
    label = {"pod-security.kubernetes.io/enforce": "restricted"}
    core.patch_namespace(namespace, {"metadata": {"labels": label}})
    with pytest.raises(ApiException, match="violates PodSecurity"):
        core.create_namespaced_pod(
            namespace, {"metadata": {"name": "plain"}, "spec": {"containers": [{"name": "a", "image": "a"}]}}
        )
    jobs.create("restricted")
    assert kubelet.wait_for_pod("restricted")
