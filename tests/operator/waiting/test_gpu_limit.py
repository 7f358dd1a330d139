"""A namespace's limit of GPUs on the real API server: the chart's value, and Kubernetes' own quota of the documents."""

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from finetune_api.base import Json
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for

pytestmark = pytest.mark.cluster
DOCUMENT = Path(__file__).parents[3] / "docs/namespaces.md"
LIMIT = "FINETUNE_MAX_GPUS_PER_NAMESPACE"


@pytest.fixture
def limited(operator: OperatorProcess) -> Iterator[OperatorProcess]:
    """The operator with two GPUs for each namespace."""
    operator.kill()
    operator.environment[LIMIT] = "2"
    operator.start()
    yield operator
    operator.kill()
    del operator.environment[LIMIT]
    operator.start()


def create(jobs: Any, name: str, gpus: int, **run_policy: Any) -> None:
    """A job that asks for GPUs, which the played node does not have to have."""
    spec: Json = {
        "model": {"source": "s3://models/tiny/"},
        "dataset": {"source": "s3://data/chat.jsonl"},
        "output": {"s3": {"bucket": "results"}},
        "resources": {"gpus": gpus},
        "runPolicy": {"preflight": "Skip"} | run_policy,
    }
    body = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}
    api: Any = client.CustomObjectsApi(jobs.cluster.api_client())
    api.create_namespaced_custom_object("finetune.dev", "v1alpha1", jobs.namespace, "finetunejobs", body)


def wait_for_message(jobs: Any, name: str, *parts: str, seconds: float = 15) -> str:
    """Condition Ready's message, once it has all parts."""

    def said(status: Json) -> str:
        return next((each["message"] for each in status.get("conditions", []) if each["type"] == "Ready"), "")

    found = jobs.wait(name, lambda status: all(part in said(status) for part in parts), f"says {parts}", seconds)
    return said(found["status"])


def test_jobs_take_turns_in_the_order_of_their_creation(
    limited: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, outcomes: Any
) -> None:
    create(jobs, "a-first", 2)
    kubelet.run(kubelet.wait_for_pod("a-first"))
    create(jobs, "b-large", 2)
    wait_for_message(jobs, "b-large", "may use 2 GPUs at a time", "in use: 2 GPUs by a-first (2)")
    create(jobs, "c-small", 1)
    wait_for_message(jobs, "c-small", "first in line, as created earlier: b-large (2)")
    assert jobs.get("b-large")["status"]["reason"] == "GpuLimitReached"
    assert jobs.find_child("b-large") is None

    # One that could never start is refused at once, before any pod.
    create(jobs, "d-huge", 4, preflight="Run")
    failed = jobs.wait_for_phase("d-huge", "Failed")["status"]["failure"]
    assert failed["reason"] == "GpuLimitExceeded"
    assert "spec.resources.gpus is 4, and the administrator allows 2 at a time" in failed["message"]

    # An operator that starts anew finds the same line in the cluster.
    limited.kill()
    limited.start()
    kubelet.end(kubelet.pods("a-first")[0], 0, outcomes.success.encode())
    jobs.wait_for_phase("a-first", "Succeeded", 30)
    kubelet.run(kubelet.wait_for_pod("b-large", seconds=10))
    wait_for_message(jobs, "c-small", "in use: 2 GPUs by b-large (2)")
    assert jobs.find_child("c-small") is None

    # Whoever is suspended gives its GPUs away once its pod has ended, and waits when it is resumed.
    jobs.patch_run_policy("b-large", suspend=True)
    (pod,) = kubelet.pods("b-large")
    wait_for(lambda: kubelet.pods("b-large")[0].metadata.deletion_timestamp, "the pod is stopped")
    assert jobs.find_child("c-small") is None
    kubelet.end(pod, 30)
    kubelet.remove(pod)
    kubelet.run(kubelet.wait_for_pod("c-small", seconds=10))
    jobs.patch_run_policy("b-large", suspend=False)
    wait_for_message(jobs, "b-large", "in use: 1 GPU by c-small (1)")
    assert jobs.child("b-large")["spec"]["suspend"] is True
    kubelet.end(kubelet.pods("c-small")[0], 0, outcomes.success.encode())
    wait_for(lambda: jobs.child("b-large")["spec"]["suspend"] is False, "the job is resumed", 10)


def test_jobs_that_are_resumed_in_one_moment_do_not_share_the_last_gpu(limited: OperatorProcess, jobs: Any) -> None:
    names = [f"at-once-{number}" for number in range(8)]
    for name in names:
        create(jobs, name, 1, suspend=True)
    for name in names:
        jobs.wait_for_phase(name, "Suspended")

    # While each is looked at, the others still seem to be suspended.
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: jobs.patch_run_policy(name, suspend=False), names))
    for name in names:
        jobs.wait_for_phase(name, "Queued")
    assert sum(not jobs.child(name)["spec"]["suspend"] for name in names) == 2


def test_without_a_limit_all_of_them_start(operator: OperatorProcess, jobs: Any) -> None:
    for number in range(3):
        create(jobs, f"free-{number}", 2)
    for number in range(3):
        wait_for(lambda name=f"free-{number}": jobs.find_child(name), "its Job is made")


def test_the_quota_of_the_documents_refuses_one_job_too_many_and_the_pod_of_one_gpu_too_many(
    operator: OperatorProcess, jobs: Any, kubelet: PlayedKubelet, namespace: str
) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (quota,) = (block for block in blocks if "kind: ResourceQuota" in block)
    small = quota.replace('"100"', '"2"').replace('"8"', '"1"').replace("namespace: team", f"namespace: {namespace}")
    assert small.count('"2"') == small.count('"1"') == 1
    _apply_quota(jobs, small)

    create(jobs, "one", 1)
    kubelet.wait_for_pod("one")
    create(jobs, "two", 1)
    wait_for_message(jobs, "two", "the pod is refused", "exceeded quota", "requests.nvidia.com/gpu=1", seconds=60)
    with pytest.raises(ApiException, match=r"exceeded quota: .*count/finetunejobs.finetune.dev=1"):
        create(jobs, "three", 1)


def _apply_quota(jobs: Any, manifest: str) -> None:
    """Apply a quota once its controller knows FineTuneJobs: it looks for new kinds every 30 s, and works out a quota
    that it had before every 5 minutes."""
    core: Any = client.CoreV1Api(jobs.cluster.api_client())
    for _ in range(10):
        jobs.cluster.kubectl("apply", "-f", "-", stdin=manifest)
        for _ in range(12):
            used = core.list_namespaced_resource_quota(jobs.namespace).items[0].status.used or {}
            if "count/finetunejobs.finetune.dev" in used:
                return
            time.sleep(0.5)
        jobs.cluster.kubectl("delete", "-f", "-", stdin=manifest)
    raise TimeoutError("the quota controller does not count FineTuneJobs")
