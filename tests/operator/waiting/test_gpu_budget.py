"""GPU time on the real API server: counted over a suspension, and ended when the budget is spent."""

import time
from typing import Any

import pytest
from kubernetes import client

from finetune_operator.decide.gpu_time import BACKSTOP_SECONDS
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

    # The rest of the budget: the trainer is told on time, and the job fails when it has stored its checkpoint.
    jobs.patch_run_policy("spender", suspend=False)
    second = kubelet.wait_for_pod("spender")
    kubelet.run(second)
    begun = time.monotonic()
    wait_for(lambda: kubelet.pods("spender", TRAINER)[-1].metadata.deletion_timestamp, "the trainer is stopped")
    assert 12 - used - 3 < time.monotonic() - begun < 12 - used + 5
    stopping = jobs.wait("spender", lambda status: status.get("reason") == "GpuBudgetSpent", "it is said")
    assert stopping["status"]["phase"] == "Running"

    time.sleep(3)
    kubelet.end(second, 30, outcomes.interrupted.model_copy(update={"energy_joules": 1800}).encode())
    kubelet.remove(second)
    status = jobs.wait_for_phase("spender", "Failed", seconds=20)["status"]
    assert status["failure"]["reason"] == "GpuBudgetExhausted"
    assert "spec.runPolicy.maxGpuSeconds allows 12" in status["failure"]["message"]
    assert 15 <= status["usage"]["gpuSeconds"] <= 21, "the seconds of grace count"
    assert status["usage"]["energyWattHours"] == 0.5
    assert status["usage"]["energyMeasuredGpuSeconds"] < status["usage"]["gpuSeconds"], "the first pod said nothing"


def test_a_limit_that_is_raised_in_time_lets_the_trainer_go_on(
    operator: OperatorProcess, kubelet: PlayedKubelet, jobs: Any
) -> None:
    create(jobs, "saver", maxGpuSeconds=6)
    pod = kubelet.wait_for_pod("saver")
    kubelet.run(pod)
    jobs.wait_for_phase("saver", "Running")
    jobs.patch_run_policy("saver", maxGpuSeconds=3600)
    time.sleep(8)
    assert jobs.get("saver")["status"]["phase"] == "Running"
    assert kubelet.pods("saver")[0].metadata.deletion_timestamp is None
    guard = jobs.child_deadline("saver")
    assert 3600 + BACKSTOP_SECONDS <= guard <= 3600 + BACKSTOP_SECONDS + 30


def test_a_budget_that_is_spent_while_no_operator_runs_is_enforced_by_the_job_and_by_the_next_operator(
    operator: OperatorProcess, kubelet: PlayedKubelet, jobs: Any, outcomes: Any
) -> None:
    for name in ("first", "second"):
        create(jobs, name, maxGpuSeconds=5)
    pods = {name: kubelet.wait_for_pod(name) for name in ("first", "second")}
    for name, pod in pods.items():
        kubelet.run(pod)
        jobs.wait_for_phase(name, "Running")
        jobs.wait(name, lambda _, name=name: jobs.child_deadline(name), "its Job has a deadline")
    operator.kill()

    # A minute of the first one's backstop passes, as its deadline is that much nearer.
    jobs.set_child_deadline("first", jobs.child_deadline("first") - BACKSTOP_SECONDS)
    wait_for(lambda: kubelet.pods("first")[0].metadata.deletion_timestamp, "Kubernetes itself stops the first trainer")
    kubelet.end(pods["first"], 30, outcomes.interrupted.encode())
    kubelet.remove(pods["first"])
    assert kubelet.pods("second")[0].metadata.deletion_timestamp is None

    operator.start()
    wait_for(lambda: kubelet.pods("second")[0].metadata.deletion_timestamp, "the operator stops the second trainer")
    kubelet.end(pods["second"], 30, outcomes.interrupted.encode())
    kubelet.remove(pods["second"])
    for name in ("first", "second"):
        status = jobs.wait_for_phase(name, "Failed", seconds=20)["status"]
        assert status["failure"]["reason"] == "GpuBudgetExhausted", status["failure"]
        assert status["usage"]["gpuSeconds"] >= 5
