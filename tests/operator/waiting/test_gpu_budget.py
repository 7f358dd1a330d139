"""GPU time on the real API server: counted over a suspension, and ended when the budget is spent."""

import time
from typing import Any

import pytest
from kubernetes import client

from finetune_operator.desired.names import TRAINER
from finetune_test_operator.operator_process import OperatorProcess
from finetune_test_operator.played_kubelet import PlayedKubelet, wait_for

pytestmark = pytest.mark.cluster


def create(jobs: Any, name: str, **run_policy: Any) -> None:
    """A job that asks for a GPU, which the played node does not have to have."""
    spec = {
        "model": {"source": "s3://models/tiny/"},
        "dataset": {"source": "s3://data/chat.jsonl"},
        "output": {"s3": {"bucket": "results"}},
        "resources": {"gpus": 1},
        "runPolicy": {"preflight": "Skip"} | run_policy,
    }
    body = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}
    api: Any = client.CustomObjectsApi(jobs.cluster.api_client())
    api.create_namespaced_custom_object("finetune.dev", "v1alpha1", jobs.namespace, "finetunejobs", body)


def test_a_budget_ends_the_trainer_in_time_and_time_in_suspension_is_free(
    operator: OperatorProcess, kubelet: PlayedKubelet, jobs: Any, outcomes: Any
) -> None:
    create(jobs, "spender", maxGpuSeconds=12)

    # Six seconds of GPU time, then a suspension that is longer than what is left.
    first = kubelet.wait_for_pod("spender")
    kubelet.run(first)
    jobs.wait_for_phase("spender", "Running")
    time.sleep(5)
    jobs.patch_run_policy("spender", suspend=True)
    wait_for(lambda: kubelet.pods("spender")[0].metadata.deletion_timestamp, "the pod is stopped")
    kubelet.end(first, 30)
    kubelet.remove(first)
    jobs.wait_for_phase("spender", "Suspended")
    used = jobs.get("spender")["status"]["usage"]["gpuSeconds"]
    assert 4 <= used <= 9
    time.sleep(8)
    assert jobs.get("spender")["status"]["usage"]["gpuSeconds"] == used

    # The rest of the budget: the job fails on time, and its pod is told to stop.
    jobs.patch_run_policy("spender", suspend=False)
    second = kubelet.wait_for_pod("spender")
    kubelet.run(second)
    begun = time.monotonic()
    status = jobs.wait_for_phase("spender", "Failed", seconds=20)["status"]
    assert time.monotonic() - begun < 12 - used + 5
    assert status["failure"]["reason"] == "GpuBudgetExhausted"
    assert "spec.runPolicy.maxGpuSeconds allows 12" in status["failure"]["message"]
    assert 12 <= status["usage"]["gpuSeconds"] <= 16
    wait_for(lambda: kubelet.pods("spender", TRAINER)[-1].metadata.deletion_timestamp, "the trainer is stopped")
