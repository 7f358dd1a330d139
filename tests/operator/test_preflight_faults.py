"""The checks before a GPU is asked for, on a real control plane: what stops, repeats or outlives them."""

import time
from typing import Any

import pytest
from kubernetes import client

from finetune_api.failures import ExitCode, FailureReason
from finetune_api.outcome import Outcome, Result
from finetune_operator.desired.names import PREFLIGHT, preflight_name
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for

pytestmark = pytest.mark.cluster

STOPPED = Outcome(
    result=Result.INTERRUPTED,
    reason=FailureReason.INTERRUPTED,
    exit_code=ExitCode.INTERRUPTED,
    finished="2026-11-24T00:00:00Z",
).encode()
AWAY = Outcome(
    result=Result.FAILED,
    reason=FailureReason.STORAGE_UNAVAILABLE,
    exit_code=ExitCode.UNAVAILABLE,
    finished="2026-11-24T00:00:00Z",
).encode()


def _reason(reason: str) -> Any:
    def holds(status: dict[str, Any]) -> bool:
        return any(each["type"] == "Ready" and each["reason"] == reason for each in status.get("conditions", []))

    return holds


def test_a_job_that_is_refused_never_has_a_trainer(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    jobs.create("refused", preflight="Run", ttlSecondsAfterFinished=1)
    pod = kubelet.wait_for_pod("refused", component=PREFLIGHT)
    columns = jobs.cluster.kubectl("get", "ftj", "-n", jobs.namespace).stdout

    kubelet.run(pod)
    kubelet.end(pod, ExitCode.DATA, outcomes.refused.encode())
    status = jobs.wait_for_phase("refused", "Failed")["status"]
    assert "Validating" in columns
    assert status["failure"]["message"] == outcomes.refused.message
    assert "onBadRow" in status["failure"]["hint"]
    assert (status["preflight"]["result"], status["preflight"]["badRows"]) == ("Failed", 2)
    wait_for(lambda: not kubelet.pods("refused", PREFLIGHT), "the ttl removes the pod", 30)
    assert jobs.find_child("refused") is None
    assert jobs.event_reasons("refused") == ["Validating", "InvalidRow"]


def test_checks_that_passed_are_not_repeated_when_their_job_is_deleted(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    jobs.create("checked", preflight="Run")
    pod = kubelet.wait_for_pod("checked", component=PREFLIGHT)
    kubelet.run(pod)
    kubelet.end(pod, 0, outcomes.checked.encode())

    trainer = kubelet.wait_for_pod("checked")
    jobs.delete_child("checked", preflight_name)
    jobs.delete_child("checked")
    wait_for(lambda: jobs.find_child("checked", preflight_name) is None, "no Job of preflight")

    operator.kill()
    operator.start()
    again = wait_for(
        lambda: [p for p in kubelet.pods("checked") if p.metadata.uid != trainer.metadata.uid], "again", 30
    )
    assert len(again) == 1
    assert jobs.find_child("checked", preflight_name) is None
    assert jobs.get("checked")["status"]["preflight"]["rows"] == 40


def test_a_job_of_the_checks_that_is_deleted_by_hand_is_made_again(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet
) -> None:
    jobs.create("lost", preflight="Run")
    kubelet.wait_for_pod("lost", component=PREFLIGHT)
    old = jobs.child("lost", preflight_name)["metadata"]["uid"]
    jobs.delete_child("lost", preflight_name)

    def is_new() -> bool:
        found = jobs.find_child("lost", preflight_name)
        return found is not None and found["metadata"]["uid"] != old

    wait_for(is_new, "a new Job", 30)
    assert not kubelet.pods("lost")


def test_suspension_stops_the_checks_and_resuming_starts_them_afresh(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    jobs.create("paused", preflight="Run", activeDeadlineSeconds=1000)
    pod = kubelet.wait_for_pod("paused", component=PREFLIGHT)
    kubelet.run(pod)
    jobs.wait("paused", _reason("Checking"), "checking")
    time.sleep(2)

    jobs.patch_run_policy("paused", suspend=True)
    wait_for(lambda: kubelet.pods("paused", PREFLIGHT)[0].metadata.deletion_timestamp, "the pod is told to stop")
    kubelet.end(pod, 30, STOPPED)
    kubelet.remove(pod)
    status = jobs.wait_for_phase("paused", "Suspended")["status"]
    assert status["activeSeconds"] >= 2
    wait_for(lambda: not kubelet.pods("paused", PREFLIGHT), "no pod is left")

    jobs.patch_run_policy("paused", suspend=False)
    second = kubelet.wait_for_pod("paused", component=PREFLIGHT)
    kubelet.run(second)
    kubelet.end(second, 0, outcomes.checked.encode())
    kubelet.wait_for_pod("paused")
    assert jobs.child("paused")["spec"]["activeDeadlineSeconds"] <= 1000 - status["activeSeconds"]
    assert {"Suspended", "Resumed", "Validated"} <= set(jobs.event_reasons("paused"))


def test_a_job_that_is_held_from_the_start_has_no_pod(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet
) -> None:
    jobs.create("held", preflight="Run", suspend=True)
    jobs.wait_for_phase("held", "Suspended")
    assert jobs.find_child("held", preflight_name) is None
    jobs.patch_run_policy("held", suspend=False)
    assert kubelet.wait_for_pod("held", component=PREFLIGHT)


def test_a_store_that_is_away_is_tried_again_and_uses_a_retry(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet
) -> None:
    jobs.create("away", preflight="Run", maxRetries=1)
    first = kubelet.wait_for_pod("away", component=PREFLIGHT)
    kubelet.run(first)
    kubelet.end(first, ExitCode.UNAVAILABLE, AWAY)
    second = kubelet.wait_for_pod("away", 2, component=PREFLIGHT)
    kubelet.run(second)
    kubelet.end(second, ExitCode.UNAVAILABLE, AWAY)
    status = jobs.wait_for_phase("away", "Failed", seconds=15)["status"]
    assert status["failure"]["reason"] == "StorageUnavailable"
    assert [attempt["exitCode"] for attempt in status["preflight"]["attempts"]] == [20, 20]
    assert "Retrying" in jobs.event_reasons("away")


def test_a_deadline_ends_the_checks(operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet) -> None:
    jobs.create("slow", preflight="Run")
    pod = kubelet.wait_for_pod("slow", component=PREFLIGHT)
    kubelet.run(pod)
    jobs.wait("slow", _reason("Checking"), "checking")
    jobs.patch_run_policy("slow", activeDeadlineSeconds=1)
    wait_for(lambda: kubelet.pods("slow", PREFLIGHT)[0].metadata.deletion_timestamp, "the pod is told to stop")
    kubelet.end(pod, 30, STOPPED)
    kubelet.remove(pod)
    status = jobs.wait_for_phase("slow", "Failed")["status"]
    assert status["failure"]["reason"] == "DeadlineExceeded"
    assert jobs.find_child("slow") is None


def test_another_job_of_that_name_is_never_taken_for_the_checks(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet
) -> None:
    operator.kill()
    created = jobs.create("taken", preflight="Run")
    foreign = jobs.create_foreign_child(created, preflight_name)
    operator.start()
    jobs.wait("taken", _reason("NameConflict"), "conflict")
    assert jobs.child("taken", preflight_name)["metadata"]["uid"] == foreign["metadata"]["uid"]
    assert jobs.find_child("taken") is None


def test_deletion_ends_the_checks_and_leaves_nothing(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, namespace: str
) -> None:
    core: Any = client.CoreV1Api(jobs.cluster.api_client())
    label = {"pod-security.kubernetes.io/enforce": "restricted"}
    core.patch_namespace(namespace, {"metadata": {"labels": label}})  # the pod is admitted even here
    jobs.create("gone", preflight="Run")
    pod = kubelet.wait_for_pod("gone", component=PREFLIGHT)
    kubelet.run(pod)
    jobs.delete("gone")
    stopping = wait_for(lambda: [p for p in kubelet.pods("gone", PREFLIGHT) if p.metadata.deletion_timestamp], "stop")
    assert stopping[0].metadata.deletion_grace_period_seconds == 30
    kubelet.end(pod, 30, STOPPED)
    kubelet.remove(pod)
    wait_for(lambda: not kubelet.pods("gone", PREFLIGHT) and not jobs.config_maps("gone"), "nothing is left")
