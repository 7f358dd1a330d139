"""A job on two nodes on a real control plane: its children, its pods' names, and one end for both pods."""

from typing import Any

import pytest
from kubernetes import client

from finetune_api.failures import ExitCode
from finetune_api.job import ObjectMeta
from finetune_operator.desired.names import peers_name
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for

pytestmark = pytest.mark.cluster
INDEX = "batch.kubernetes.io/job-completion-index"


@pytest.fixture
def core(jobs: Any) -> Any:
    return client.CoreV1Api(jobs.cluster.api_client())


@pytest.fixture
def networking(jobs: Any) -> Any:
    return client.NetworkingV1Api(jobs.cluster.api_client())


def pods_of(kubelet: PlayedKubelet, name: str, but: tuple[Any, ...] = ()) -> tuple[Any, Any]:
    """The two pods of the newest attempt, by index."""
    known = {pod.metadata.uid for pod in but}

    def get() -> list[Any] | None:
        pods = [pod for pod in kubelet.pods(name) if pod.metadata.uid not in known]
        return pods if len(pods) == 2 else None

    first, second = sorted(wait_for(get, f"two pods of {name}", 60), key=lambda pod: pod.metadata.annotations[INDEX])
    return first, second


def waits(jobs: Any, name: str, part: str, seconds: float = 120) -> None:
    def says(status: Any) -> bool:
        return any(part in each["message"] for each in status.get("conditions", []))

    jobs.wait(name, says, f"a condition that says {part!r}", seconds)


def test_two_pods_meet_end_together_and_go_on_and_the_first_ones_result_counts(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any, core: Any, networking: Any
) -> None:
    jobs.create("pair", nodes=2)
    first, second = pods_of(kubelet, "pair")
    child = jobs.child("pair")
    name = peers_name(ObjectMeta.model_validate(jobs.get("pair")["metadata"]))

    service = core.read_namespaced_service(name, jobs.namespace)
    assert (service.spec.cluster_ip, service.spec.publish_not_ready_addresses) == ("None", True)
    assert service.spec.selector.items() <= first.metadata.labels.items()
    assert [pod.spec.hostname for pod in (first, second)] == [f"{child['metadata']['name']}-{i}" for i in (0, 1)]
    assert {pod.spec.subdomain for pod in (first, second)} == {name}
    policy = networking.read_namespaced_network_policy(name, jobs.namespace)
    assert policy.spec.pod_selector.match_labels == service.spec.selector

    # All or nothing: one pod that runs waits for the other.
    kubelet.run(first)
    waits(jobs, "pair", "training begins when all 2 pods run, and 1 do")
    assert jobs.get("pair")["status"]["phase"] == "Queued"
    kubelet.run(second)
    jobs.wait_for_phase("pair", "Running")

    # The second pod is killed; the first ends for it, and both are made again.
    kubelet.end(second, 137)
    gone = outcomes.interrupted.model_copy(update={"message": "node 1 is gone"})
    kubelet.end(first, ExitCode.INTERRUPTED, gone.encode())
    again = pods_of(kubelet, "pair", but=(first, second))
    for pod in again:
        kubelet.run(pod)
    running = jobs.wait("pair", lambda status: status.get("retries") == 1 and status["phase"] == "Running", "a retry")
    ended = running["status"]["attempts"][0]
    assert (ended["pod"], ended["exitCode"], ended["reason"]) == (first.metadata.name, 137, "Error")

    core.delete_namespaced_service(name, jobs.namespace)
    networking.delete_namespaced_network_policy(name, jobs.namespace)
    jobs.label("pair", "looked", "at")
    wait_for(lambda: _names(core.list_namespaced_service(jobs.namespace)) == [name], "the Service again")
    wait_for(lambda: _names(networking.list_namespaced_network_policy(jobs.namespace)) == [name], "the policy again")

    kubelet.end(again[0], 0, outcomes.success.encode())
    jobs.wait_for_phase("pair", "Succeeded")
    kubelet.end(again[1], ExitCode.INTERRUPTED)
    wait_for(
        lambda: jobs.job_is_over(child["metadata"]["name"]), "a Job that is complete by the first pod's success", 30
    )

    jobs.delete("pair")
    wait_for(lambda: not _names(core.list_namespaced_service(jobs.namespace)), "no Service", 30)
    wait_for(lambda: not _names(networking.list_namespaced_network_policy(jobs.namespace)), "no policy", 30)


def test_what_one_pod_finds_wrong_ends_the_job_with_its_words(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    jobs.create("wrong", nodes=2)
    first, second = pods_of(kubelet, "wrong")
    for pod in (first, second):
        kubelet.run(pod)
    kubelet.end(second, ExitCode.DATA, outcomes.bad_row.encode())
    kubelet.end(first, ExitCode.INTERRUPTED, outcomes.interrupted.encode())
    failed = jobs.wait_for_phase("wrong", "Failed", 30)["status"]["failure"]
    assert (failed["reason"], failed["exitCode"]) == ("InvalidRow", ExitCode.DATA)
    assert failed["message"] == f"line 2: messages is not a list (pod {second.metadata.name}, node 1)"


def test_suspension_waits_for_both_pods(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    jobs.create("pause", nodes=2)
    first, second = pods_of(kubelet, "pause")
    for pod in (first, second):
        kubelet.run(pod)
    jobs.wait_for_phase("pause", "Running")
    jobs.patch_run_policy("pause", suspend=True)
    kubelet.end(first, ExitCode.INTERRUPTED, outcomes.interrupted.encode())
    kubelet.remove(first)
    jobs.wait("pause", lambda status: status.get("reason") == "Suspending", "a pod that still stops")
    kubelet.end(second, ExitCode.INTERRUPTED, outcomes.interrupted.encode())
    kubelet.remove(second)
    held = jobs.wait_for_phase("pause", "Suspended")["status"]
    assert (held["checkpointStep"], held.get("retries", 0)) == (7, 0)


def test_an_evicted_pod_ends_the_attempt_and_counts_as_no_retry(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any, core: Any
) -> None:
    jobs.create("evicted", nodes=2)
    first, second = pods_of(kubelet, "evicted")
    for pod in (first, second):
        kubelet.run(pod)
    jobs.wait_for_phase("evicted", "Running")

    core.create_namespaced_pod_eviction(
        second.metadata.name, jobs.namespace, {"metadata": {"name": second.metadata.name}}
    )
    kubelet.end(second, 137)
    kubelet.remove(second)
    kubelet.end(first, ExitCode.INTERRUPTED, outcomes.interrupted.encode())
    for pod in pods_of(kubelet, "evicted", but=(first, second)):
        kubelet.run(pod)
    again = jobs.wait("evicted", lambda status: len(status.get("attempts", [])) == 2, "a second attempt", 30)["status"]
    assert again.get("retries", 0) == 0
    assert again["checkpointStep"] == 7


@pytest.mark.stalls
def test_a_pod_that_outlives_its_attempt_is_evicted_and_counts_as_no_retry(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    jobs.create("frozen", nodes=2)
    first, frozen = pods_of(kubelet, "frozen")
    for pod in (first, frozen):
        kubelet.run(pod)
    jobs.wait_for_phase("frozen", "Running")

    gone = outcomes.interrupted.model_copy(update={"message": "node 1 is gone: it showed no sign of life for 20 s"})
    kubelet.end(first, ExitCode.INTERRUPTED, gone.encode())
    known = {first.metadata.uid, frozen.metadata.uid}
    again = wait_for(lambda: [p for p in kubelet.pods("frozen") if p.metadata.uid not in known], "a new first pod", 60)
    kubelet.run(again[0])
    waits(jobs, "frozen", f"pod {frozen.metadata.name} (node 1) did not end with its attempt")

    wait_for(lambda: kubelet.find(frozen.metadata.name).metadata.deletion_timestamp, "the eviction", 30)
    kubelet.end(frozen, 137)
    kubelet.remove(frozen)
    known.add(again[0].metadata.uid)
    (other,) = wait_for(lambda: [p for p in kubelet.pods("frozen") if p.metadata.uid not in known], "its successor", 60)
    kubelet.run(other)
    status = jobs.wait("frozen", lambda status: status["phase"] == "Running", "the next attempt", 30)["status"]
    assert status.get("retries", 0) == 0


def _names(found: Any) -> list[str]:
    return [each.metadata.name for each in found.items]
