"""The pods of a run on several nodes: whose end is the attempt's, and which pod the run waits for."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from finetune_api.failures import ExitCode, FailureReason
from finetune_api.vocabulary import Phase
from finetune_operator.decide.decision import Decision, Eviction
from finetune_operator.observe.children import TrainerPod
from finetune_operator.observe.several_pods import end_of_attempt, explain_ends, newest_others
from finetune_operator.observe.snapshot import Snapshot
from finetune_operator.status.attempts import count_retries, merge_attempts
from finetune_test_operator.jobs import Outcomes
from finetune_test_operator.snapshot_builder import (
    OWN,
    a_pod,
    a_running_pod,
    a_snapshot,
    a_spec,
    a_trainer_job,
    an_ended_pod,
    decision_about,
)

TWO = a_spec(resources={"nodes": 2, "gpus": 1})
STOPPED = Outcomes.interrupted
GONE = STOPPED.model_copy(update={"message": "node 1 is gone"})


def of_two(*pods: TrainerPod, **job: Any) -> Snapshot:
    """A job on two nodes with these pods, as `observe` tells them."""
    others = [pod for pod in pods if pod.index]
    leaders = explain_ends([pod for pod in pods if not pod.index], others)
    snapshot = a_snapshot(TWO, job=a_trainer_job(TWO, **job), pods=leaders)
    waited_for = newest_others(leaders[-1] if leaders else None, others)
    return replace(snapshot, training=replace(snapshot.training, others=waited_for))


def decided(*pods: TrainerPod, **job: Any) -> Decision:
    snapshot = of_two(*pods, **job)
    return decision_about(replace(snapshot, peers=replace(snapshot.peers, service=OWN, network_policy=OWN)))


DISRUPTED = [{"type": "DisruptionTarget", "status": "True"}]


def test_training_begins_when_all_pods_run() -> None:
    first = a_running_pod("first")
    assert decided(first, a_running_pod("second", index=1)).phase is Phase.RUNNING

    condition = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}
    pending = decided(first, a_pod("second", index=1, phase="Pending", conditions=[condition]))
    assert (pending.phase, pending.reason) == (Phase.QUEUED, FailureReason.UNSCHEDULABLE)
    assert pending.message == (
        "no node fits the pod: 0/3 nodes are available; training begins when all 2 pods run, and 1 do"
    )

    missing = decided(first)
    assert (missing.phase, missing.reason) == (Phase.QUEUED, "WaitingForPod")


ENDS: dict[str, tuple[TrainerPod, str, str]] = {
    "killed by hand": (
        an_ended_pod(137, uid="second", index=1),
        "TrainerCrashed",
        "the trainer was ended by signal 9 and wrote no result (pod bot-second, node 1)",
    ),
    "its own reason": (
        an_ended_pod(ExitCode.DATA, Outcomes.bad_row, uid="second", index=1),
        "InvalidRow",
        "line 2: messages is not a list (pod bot-second, node 1)",
    ),
    "out of memory": (
        an_ended_pod(137, uid="second", index=1, terminated={"reason": "OOMKilled"}),
        "OutOfMemory",
        "the trainer was killed when its memory reached the limit of 32Gi (pod bot-second, node 1)",
    ),
}


@pytest.mark.parametrize(("second", "reason", "message"), ENDS.values(), ids=ENDS)
def test_an_attempt_ends_with_the_reason_of_the_pod_that_ended_it(
    second: TrainerPod, reason: str, message: str
) -> None:
    found = decided(an_ended_pod(ExitCode.INTERRUPTED, GONE, uid="first"), second)
    if found.phase is Phase.FAILED:
        assert (found.failure.reason, found.failure.message) == (reason, message)  # type: ignore[union-attr]
    else:
        assert f"{reason}: {message}" in found.message

    attempts = merge_attempts((), of_two(an_ended_pod(ExitCode.INTERRUPTED, GONE, uid="first"), second).training.pods)
    (attempt,) = attempts
    assert (attempt.uid, attempt.exit_code) == ("first", second.termination.exit_code)  # type: ignore[union-attr]


def test_only_memory_and_configuration_end_the_job_at_once() -> None:
    first = an_ended_pod(ExitCode.INTERRUPTED, GONE, uid="first")
    assert decided(first, ENDS["out of memory"][0]).phase is Phase.FAILED
    assert decided(first, ENDS["killed by hand"][0]).phase is Phase.QUEUED


def test_a_failure_of_one_pod_is_one_retry_and_an_eviction_none() -> None:
    ends = {
        1: an_ended_pod(137, uid="second", index=1),
        0: an_ended_pod(137, uid="second", index=1, conditions=DISRUPTED),
    }
    for retries, second in ends.items():
        pods = of_two(an_ended_pod(ExitCode.INTERRUPTED, GONE, uid="first"), second, a_running_pod("third", 20))
        assert count_retries(merge_attempts((), pods.training.pods), 0) == retries


def test_a_pod_of_the_attempt_before_explains_nothing_of_the_next() -> None:
    old = an_ended_pod(137, uid="second", index=1)
    leaders = [an_ended_pod(30, GONE, uid="first"), an_ended_pod(30, STOPPED, uid="third", created=20)]
    blamed, innocent = explain_ends(leaders, [old])
    assert (blamed.ended_by, innocent.ended_by) == ("pod bot-second, node 1", "")
    assert newest_others(innocent, [old]) == ()


def test_a_first_pod_that_failed_itself_or_was_evicted_keeps_its_end() -> None:
    second = an_ended_pod(137, uid="second", index=1)
    for first in (
        an_ended_pod(ExitCode.DATA, Outcomes.bad_row, uid="first"),
        an_ended_pod(ExitCode.INTERRUPTED, STOPPED, uid="first", conditions=DISRUPTED),
        an_ended_pod(ExitCode.SUCCESS, Outcomes.success, uid="first"),
    ):
        assert explain_ends([first], [second]) == (first,)


def test_a_pod_that_outlives_its_attempt_is_evicted_and_another_one_takes_its_place() -> None:
    over = an_ended_pod(ExitCode.INTERRUPTED, GONE, uid="first")
    frozen = a_running_pod("second", index=1)
    again = a_running_pod("third", created=20)

    def at(seconds: float, *pods: TrainerPod) -> Decision:
        snapshot = of_two(*pods)
        end = end_of_attempt(snapshot.training.pods)
        assert end is not None
        peers = replace(snapshot.peers, service=OWN, network_policy=OWN)
        return decision_about(replace(snapshot, peers=peers, now=end + timedelta(seconds=seconds)))

    for pods in ((over, frozen), (over, frozen, again)):
        soon, late = at(59, *pods), at(61, *pods)
        assert soon.actions.evict_pod is None
        assert soon.requeue_seconds == pytest.approx(1)
        assert late.actions.evict_pod == Eviction("bot-second", "second")
        assert late.message.startswith("pod bot-second (node 1) did not end with its attempt")

    leaving = at(61, over, replace(frozen, deleting=True), again)
    assert leaving.actions.evict_pod is None
    assert "kubectl delete node" in leaving.message

    # A pod of the attempt that goes on is left alone.
    former = an_ended_pod(ExitCode.INTERRUPTED, uid="old", index=1)
    assert at(3600, over, former, again, a_running_pod("fourth", 21, index=1)).actions.evict_pod is None
