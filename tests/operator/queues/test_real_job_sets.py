"""A job on two nodes whose Job a JobSet of the real controller makes. `make kueue` runs it."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from finetune_api.failures import ExitCode
from finetune_api.job import ObjectMeta
from finetune_devcluster.cluster import DevCluster
from finetune_devcluster.jobset import run_job_set
from finetune_operator.desired.names import ACTIVE_SECONDS_ANNOTATION, job_set_job_name, job_set_name
from finetune_test_operator.jobs import Jobs
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for

pytestmark = [pytest.mark.kueue, pytest.mark.cluster]
NAMESPACE = "in-sets"


class Sets:
    """FineTuneJobs in JobSets, on a cluster of their own."""

    def __init__(self, cluster: DevCluster) -> None:
        self.jobs, self.kubelet = Jobs(cluster, NAMESPACE), PlayedKubelet(cluster, NAMESPACE)
        self.jobs.multi_node = "JobSet"
        self._api: Any = client.CustomObjectsApi(cluster.api_client())

    def find(self, name: str) -> dict[str, Any] | None:
        """The JobSet of a FineTuneJob; None if it does not exist."""
        try:
            found: dict[str, Any] = self._api.get_namespaced_custom_object(*self._path(), self._set_name(name))
            return found
        except ApiException as error:
            if error.status == 404:
                return None
            raise

    def get(self, name: str) -> dict[str, Any]:
        found = self.find(name)
        assert found is not None
        return found

    def names(self) -> list[str]:
        """Names of all JobSets."""
        return [each["metadata"]["name"] for each in self._api.list_namespaced_custom_object(*self._path())["items"]]

    def delete(self, name: str) -> None:
        self._api.delete_namespaced_custom_object(*self._path(), self._set_name(name))

    def job(self, name: str) -> dict[str, Any] | None:
        """The batch/v1 Job that JobSet's controller made."""
        return self.jobs.find_child(name, job_set_job_name)

    def start(self, name: str, known: tuple[Any, ...] = ()) -> tuple[Any, Any]:
        """Run both pods of a job once they are made; returns them by index."""
        seen = {pod.metadata.uid for pod in known}

        def get() -> list[Any] | None:
            pods = [pod for pod in self.kubelet.pods(name) if pod.metadata.uid not in seen]
            return pods if len(pods) == 2 else None

        first, second = sorted(wait_for(get, f"two pods of {name}", 60), key=lambda pod: pod.spec.hostname)
        for pod in (first, second):
            self.kubelet.run(pod)
        self.jobs.wait_for_phase(name, "Running", 30)
        return first, second

    def stop(self, pods: tuple[Any, Any], outcome: str) -> None:
        """End and remove the pods as their kubelet does when they are stopped."""
        for pod in pods:
            self.kubelet.end(pod, ExitCode.INTERRUPTED, outcome)
            self.kubelet.remove(pod)

    def _set_name(self, name: str) -> str:
        return job_set_name(ObjectMeta.model_validate(self.jobs.get(name)["metadata"]))

    def _path(self) -> tuple[str, str, str, str]:
        return "jobset.x-k8s.io", "v1alpha2", NAMESPACE, "jobsets"


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    with DevCluster.start() as started:
        client.CoreV1Api(started.api_client()).create_namespace(client.V1Namespace(metadata={"name": NAMESPACE}))
        yield started


@pytest.fixture(scope="module")
def set_operator(cluster: DevCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    process = OperatorProcess(cluster, tmp_path_factory.mktemp("operator"), job_sets=True)
    process.start()
    yield process
    process.stop()


@pytest.fixture(scope="module")
def waiting(set_operator: OperatorProcess, cluster: DevCluster) -> str:
    """A job that was made before JobSet was installed."""
    jobs = Jobs(cluster, NAMESPACE)
    jobs.multi_node = "JobSet"
    jobs.create("early", nodes=2)
    status = jobs.wait("early", lambda status: status.get("reason") == "JobSetUnavailable", "a reason", 30)["status"]
    message = next(each["message"] for each in status["conditions"] if each["type"] == "Stalled")
    assert "installs JobSet" in message
    assert "multiNode: Job" in message
    assert "JobSetUnavailable" in jobs.event_reasons("early")
    return "early"


@pytest.fixture(scope="module")
def sets(waiting: str, cluster: DevCluster) -> Iterator[Sets]:
    with run_job_set(cluster):
        yield Sets(cluster)


def test_a_job_that_waited_for_jobset_goes_on_is_suspended_resumed_and_succeeds(
    sets: Sets, waiting: str, outcomes: Any
) -> None:
    wait_for(lambda: sets.find(waiting), "the JobSet, once it can be made", 60)
    pods = sets.start(waiting)
    (owner,) = (sets.job(waiting) or {})["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("JobSet", sets.get(waiting)["metadata"]["uid"])

    sets.jobs.patch_run_policy(waiting, suspend=True)
    wait_for(lambda: (sets.job(waiting) or {})["spec"]["suspend"], "the Job suspended by JobSet", 30)
    assert sets.get(waiting)["spec"]["suspend"] is True
    sets.stop(pods, outcomes.interrupted.encode())
    held = sets.jobs.wait_for_phase(waiting, "Suspended", 30)["status"]
    assert held["checkpointStep"] == 7
    wait_for(lambda: _noted(sets, waiting) >= 1, "the seconds that it has run", 30)

    sets.jobs.patch_run_policy(waiting, suspend=False, ttlSecondsAfterFinished=3600)
    first, second = sets.start(waiting, known=pods)
    sets.kubelet.end(first, 0, outcomes.success.encode())
    sets.jobs.wait_for_phase(waiting, "Succeeded", 30)
    sets.kubelet.end(second, ExitCode.INTERRUPTED)
    wait_for(lambda: sets.get(waiting)["spec"].get("ttlSecondsAfterFinished") == 3600, "the JobSet's TTL", 60)
    assert "ttlSecondsAfterFinished" not in (sets.job(waiting) or {})["spec"]

    name = sets.get(waiting)["metadata"]["name"]
    sets.jobs.delete(waiting)
    wait_for(lambda: name not in sets.names(), "a JobSet that the garbage collector deletes", 60)


def test_a_job_that_fails_takes_its_job_set_along(sets: Sets, outcomes: Any) -> None:
    sets.jobs.create("wrong", nodes=2)
    first, second = sets.start("wrong")
    sets.kubelet.end(second, ExitCode.DATA, outcomes.bad_row.encode())
    sets.kubelet.end(first, ExitCode.INTERRUPTED, outcomes.interrupted.encode())
    failed = sets.jobs.wait_for_phase("wrong", "Failed", 30)["status"]["failure"]
    assert failed["reason"] == "InvalidRow"
    wait_for(lambda: sets.get("wrong").get("status", {}).get("terminalState") == "Failed", "a JobSet that failed", 30)


def test_a_job_set_that_somebody_deletes_is_made_again_and_no_second_is_lost(sets: Sets, outcomes: Any) -> None:
    sets.jobs.create("again", nodes=2)
    pods = sets.start("again")
    time.sleep(2)  # seconds that must not be lost
    sets.jobs.patch_run_policy("again", ttlSecondsAfterFinished=3600)  # time alone is not worth a write
    sets.jobs.wait("again", lambda status: status.get("activeSeconds", 0) >= 1, "seconds that it has run", 30)
    former = sets.get("again")["metadata"]["uid"]
    sets.delete("again")
    wait_for(lambda: all(sets.kubelet.find(p.metadata.name).metadata.deletion_timestamp for p in pods), "the stop", 30)
    sets.stop(pods, outcomes.interrupted.encode())

    sets.start("again", known=pods)
    assert sets.get("again")["metadata"]["uid"] != former
    assert "NameConflict" not in sets.jobs.event_reasons("again")
    assert _noted(sets, "again") >= 1


def _noted(sets: Sets, name: str) -> int:
    job = sets.job(name) or {}
    return int(job["metadata"]["annotations"][ACTIVE_SECONDS_ANNOTATION])
