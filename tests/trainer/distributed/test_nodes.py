"""Two pods of a job on two nodes, as their manifest starts them: the curve of one process, and one end for both."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import ExitCode, FailureReason
from finetune_api.outcome import Result
from finetune_api.pod_ends.stalls import StallLimit
from finetune_api.run_config import RunConfig
from finetune_test_models.ranks.nodes import NodeJob, NodePod
from finetune_test_models.ranks.processes import other_ranks
from finetune_test_servers.s3_server import S3Server

Builder = Callable[..., RunConfig]
DATA = {"evaluation": {"fraction": 0.275}, "packing": False}
TRAINING = {
    "maxSteps": 10,
    "batchSize": 2,
    "gradientAccumulation": 2,
    "precision": "FP32",
    "evaluationSteps": 4,
    "loggingSteps": 1,
    "checkpointSteps": 3,
}
TOLERANCES = {"losses": 1e-5, "evaluations": 1e-5, "norms": 2e-4}
"""Relative, as on one node (test_same_curve.py)."""
END_SECONDS = 30
STALL_SECONDS = 60  # importing torch is silent for nearly as long on a busy machine


@pytest.fixture
def make_job(run_config: Builder, bucket: str, credentials: Path, s3_server: S3Server, tmp_path: Path) -> Any:
    def make(name: str, nodes: int, ranks: int = 1, **training: Any) -> NodeJob:
        output = {"s3": {"bucket": bucket, "prefix": name, "endpointURL": s3_server.endpoint_url}}
        config = run_config(training=TRAINING | training, dataset=DATA, output=output)
        config = config.model_copy(update={"output_prefix": f"{name}/default/tiny"})
        return NodeJob(config, tmp_path / name, credentials, nodes, ranks)

    return make


def wait_for_step(pod: NodePod, text: str, seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while text not in pod.log:
        assert time.monotonic() < deadline, pod.log[-3000:]
        assert pod.process.poll() is None, pod.log[-3000:]
        time.sleep(0.05)


def train(job: NodeJob, fault: str = "") -> NodePod:
    """The first pod of an attempt that all pods come through."""
    with job.attempt("a", fault=fault) as pods:
        codes = [pod.end() for pod in pods]
    assert codes == [0] * len(pods), "\n".join(pod.log[-2500:] for pod in pods)
    assert pods[0].outcome.result is Result.SUCCEEDED
    return pods[0]


def largest_differences(found: NodePod, expected: NodePod) -> dict[str, float]:
    largest = {}
    for kind, values in expected.curve.items():
        assert found.curve[kind].keys() == values.keys() != set()
        largest[kind] = max(abs(found.curve[kind][step] - value) / abs(value) for step, value in values.items())
    return largest


def test_two_nodes_give_the_curve_of_one_process(make_job: Any) -> None:
    one, two = train(make_job("one", 1)), train(make_job("two", 2))
    found = largest_differences(two, one)
    print("two nodes:", found)
    assert len(one.curve["losses"]) == 10
    assert all(found[kind] < TOLERANCES[kind] for kind in TOLERANCES), found


@pytest.mark.stalls
@pytest.mark.timeout(1200)
def test_two_processes_on_each_of_two_nodes_do_so_too_and_a_wrong_reduction_is_seen(make_job: Any) -> None:
    one, four = train(make_job("one", 1)), train(make_job("four", 2, ranks=2))
    found = largest_differences(four, one)
    print("two processes on each of two nodes:", found)
    assert all(found[kind] < TOLERANCES[kind] for kind in TOLERANCES), found

    wrong = largest_differences(train(make_job("wrong", 2), "NoTokenWeights"), one)
    print("mean of means:", wrong)
    assert all(wrong[kind] > 10 * TOLERANCES[kind] for kind in ("losses", "norms")), wrong


@pytest.mark.stalls
@pytest.mark.timeout(1200)
def test_a_process_that_is_killed_is_the_reason_in_both_pods(make_job: Any) -> None:
    job = make_job("rank", 2, ranks=2, maxSteps=400)
    with job.attempt("a") as (first, second):
        wait_for_step(first, "checkpoint of step 3 is stored")
        (other,) = other_ranks(second.process.pid)
        os.kill(other, signal.SIGKILL)
        assert second.end(END_SECONDS) == ExitCode.INTERNAL, "the Job counts this one"
        assert first.end(END_SECONDS) == ExitCode.INTERRUPTED, "and not this one"

    killed = "rank 3 of 4 was killed by signal 9"
    assert killed in second.outcome.message
    assert first.outcome.message.startswith(f"node 1 of 2: {killed}")
    assert (first.outcome.reason, first.outcome.result) == (FailureReason.INTERNAL_ERROR, Result.FAILED)
    assert (first.outcome.checkpoint_step or 0) >= 3


@pytest.mark.stalls
@pytest.mark.timeout(1200)
def test_a_pod_that_is_killed_ends_the_other_and_both_go_on_from_the_checkpoint(make_job: Any) -> None:
    job = make_job("killed", 2, maxSteps=40)
    with job.attempt("a") as (first, second):
        wait_for_step(first, "checkpoint of step 6 is stored")
        second.process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        assert first.end(END_SECONDS) == ExitCode.INTERRUPTED, "the Job counts the killed pod, and this one not"
        print(f"the other pod ended after {time.monotonic() - killed:.1f} s")
    assert "node 1 is gone" in first.outcome.message

    with job.attempt("b") as pods:
        assert [pod.end() for pod in pods] == [0, 0], pods[0].log[-3000:]
    assert (pods[0].outcome.resumed_from_step or 0) >= 6
    assert max(pods[0].curve["losses"]) == 40
    assert min(pods[0].curve["losses"]) == 1, "the metrics of the attempt before are there"


@pytest.mark.stalls
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_any_pod_stores_one_checkpoint(make_job: Any, told: int) -> None:
    job = make_job("stopped", 2, maxSteps=400, checkpointSteps=300)
    with job.attempt("a") as pods:
        wait_for_step(pods[0], "'loss'")
        pods[told].process.terminate()
        assert [pod.end(END_SECONDS) for pod in pods] == [ExitCode.INTERRUPTED] * 2
    first, second = (pod.outcome for pod in pods)
    assert first.checkpoint_step == first.step
    assert (first.reason, second.reason) == (FailureReason.INTERRUPTED, FailureReason.INTERRUPTED)
    stored = [line for pod in pods for line in pod.log.splitlines() if line.endswith("is stored")]
    assert len([line for line in stored if "stopped after" not in line]) == 1


@pytest.mark.stalls
@pytest.mark.timeout(1200)
def test_a_frozen_process_of_another_pod_ends_the_run_with_the_stacks_of_all(make_job: Any) -> None:
    job = make_job("frozen", 2, ranks=2, maxSteps=400)
    limit = StallLimit(seconds=STALL_SECONDS, adapts=False)
    job = replace(job, config=job.config.model_copy(update={"stall": limit}))
    with job.attempt("a") as (first, second):
        wait_for_step(first, "checkpoint of step 3 is stored")
        (other,) = other_ranks(second.process.pid)
        os.kill(other, signal.SIGSTOP)
        assert first.end(STALL_SECONDS + END_SECONDS) == ExitCode.STALLED, first.log[-3000:]
        ended = time.monotonic()
        assert second.end(END_SECONDS) == ExitCode.INTERRUPTED
        print(f"the other pod ended after {time.monotonic() - ended:.1f} s")

    assert first.outcome.reason is FailureReason.COLLECTIVE_TIMEOUT
    assert "for another rank: the log has all ranks' stacks" in first.outcome.message
    # Each of four processes shows where its main thread is; the frozen one goes on for it.
    stacks = [pod.log.count('qlora_trainer.py", line') > 0 for pod in (first, second)]
    assert stacks == [True, True]
    assert [pod.log.count("most recent call first") >= 2 for pod in (first, second)] == [True, True]
    assert [pod.log.count("in train_along") >= 1 for pod in (first, second)] == [True, True]
    assert second.log.count("cli/rank.py") >= 1, "the stack of the frozen process itself"

    with replace(job, config=job.config.model_copy(update={"stall": None})).attempt("b") as pods:
        wait_for_step(pods[0], "resuming from the checkpoint of step")


@pytest.mark.stalls
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_pod_that_is_frozen_whole_is_lost_to_the_other(make_job: Any, frozen: int) -> None:
    with make_job("whole", 2, maxSteps=400).attempt("a") as pods:
        wait_for_step(pods[0], "checkpoint of step 3 is stored")
        pods[frozen].process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        assert pods[1 - frozen].end(END_SECONDS) == ExitCode.INTERRUPTED
        print(f"the other pod ended after {time.monotonic() - begun:.1f} s")
    assert f"node {frozen} is gone" in pods[1 - frozen].outcome.message


@pytest.mark.stalls
@pytest.mark.timeout(1200)
def test_a_pod_that_hangs_before_the_training_says_so_itself(make_job: Any) -> None:
    job = make_job("before", 2)
    limit = StallLimit(seconds=STALL_SECONDS, adapts=False)
    job = replace(job, config=job.config.model_copy(update={"stall": limit}))
    with job.attempt("a", fault="HangingLoad", fault_at=1) as (first, second):
        assert second.end(2 * STALL_SECONDS + END_SECONDS) == ExitCode.STALLED, second.log[-3000:]
        assert first.end(END_SECONDS) == ExitCode.INTERRUPTED
    assert second.outcome.reason is FailureReason.STALLED
    assert first.outcome.message.startswith("node 1 of 2: the run did nothing for")
    assert "waits for nodes: 1" in first.log
