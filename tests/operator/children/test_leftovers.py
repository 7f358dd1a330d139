"""Jobs that are deleted and made again, by name or by hand: never two trainers at once, and no stranger in the way."""

from typing import Any

import pytest
from kubernetes import client

from finetune_api.base import Json
from finetune_operator.desired.names import child_name
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for

pytestmark = pytest.mark.cluster


def _waits_for_predecessor(status: Json) -> bool:
    return any(each["reason"] == "PredecessorRunning" for each in status.get("conditions", []))


def _make_again(jobs: Any, name: str, propagation: str) -> str:
    """Delete a job and create it again; returns what the new one waits for, in its own words."""
    jobs.delete(name, propagation)
    wait_for(lambda: not jobs.exists(name), "the old job is gone")
    jobs.create(name)
    status = jobs.wait(name, _waits_for_predecessor, "the new job waits")["status"]
    assert jobs.find_child(name) is None
    return str(status["conditions"][0]["message"])


def test_a_job_that_is_made_again_waits_for_the_pod_of_the_first(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    jobs.create("again")
    first = kubelet.wait_for_pod("again")
    kubelet.run(first)
    jobs.wait_for_phase("again", "Running")

    message = _make_again(jobs, "again", "Background")
    assert first.metadata.name in message
    assert "kubectl" not in message, "nobody has to do anything"
    assert [pod.metadata.uid for pod in kubelet.pods("again")] == [first.metadata.uid]

    # Until the garbage collector came, which learns of a new CRD late, the first Job would replace its pod.
    wait_for(lambda: kubelet.pods("again")[0].metadata.deletion_timestamp, "the first pod is told to stop", 90)
    kubelet.end(first, 30)
    kubelet.remove(first)
    second = kubelet.wait_for_pod("again")
    kubelet.run(second)
    status = jobs.wait_for_phase("again", "Running")["status"]
    assert [attempt["uid"] for attempt in status["attempts"]] == [second.metadata.uid]


def test_a_job_that_was_kept_when_its_owner_was_deleted_is_waited_for(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    jobs.create("kept")
    first = kubelet.wait_for_pod("kept")
    kubelet.run(first)
    jobs.wait_for_phase("kept", "Running")
    kept = jobs.child("kept")["metadata"]["name"]

    message = _make_again(jobs, "kept", "Orphan")
    assert f"kubectl delete job {kept}" in message
    assert first.metadata.deletion_timestamp is None
    assert len(kubelet.pods("kept")) == 1

    kubelet.end(first, 0, outcomes.success.encode())
    wait_for(lambda: jobs.job_is_over(kept), "the kept Job is complete")
    jobs.label("kept", "look", "now")
    assert kubelet.wait_for_pod("kept", 2).metadata.uid != first.metadata.uid


def test_an_orphan_of_ours_is_waited_for_and_a_strangers_pod_is_not(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, namespace: str
) -> None:
    created = jobs.create("labelled")
    first = kubelet.wait_for_pod("labelled")
    kubelet.run(first)
    jobs.wait_for_phase("labelled", "Running")

    # The stranger's pod has every label, but no Job made it.
    core: Any = client.CoreV1Api(jobs.cluster.api_client())
    labels = {key: value for key, value in first.metadata.labels.items() if key.startswith("finetune.dev/")}
    assert labels["finetune.dev/job-uid"] == created["metadata"]["uid"]
    containers = [{"name": "trainer", "image": "busybox"}]
    core.create_namespaced_pod(
        namespace, {"metadata": {"name": "stranger", "labels": labels}, "spec": {"containers": containers}}
    )

    jobs.delete_child("labelled", child_name, "Orphan")
    waits = f"waiting until pod {first.metadata.name} has ended"
    status = jobs.wait("labelled", lambda s: waits in s["conditions"][0]["message"], "the orphan is waited for")
    assert status["status"]["conditions"][0]["reason"] == "JobDeleted"
    assert jobs.find_child("labelled") is None

    kubelet.end(first, 30)
    wait_for(lambda: jobs.find_child("labelled"), "a new Job, although the stranger's pod is still there")
