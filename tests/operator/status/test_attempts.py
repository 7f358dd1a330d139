"""Pods as attempts: remembered after they are gone, and counted as retries only if they failed."""

import pytest

from finetune_api.status import Attempt
from finetune_operator.status.attempts import MAX_ATTEMPTS, count_retries, merge_attempts
from finetune_test_operator.snapshot_builder import a_running_pod, an_ended_pod


def test_attempts_are_remembered_after_their_pods() -> None:
    first = merge_attempts((), (an_ended_pod(139, uid="1"),))
    both = merge_attempts(first, (a_running_pod("2", created=20),))
    assert [(each.uid, each.exit_code) for each in both] == [("1", 139), ("2", None)]
    assert count_retries(both, 0) == 1


def test_a_pod_whose_end_nobody_saw_is_gone() -> None:
    first = merge_attempts((), (a_running_pod("1"),))
    assert merge_attempts(first, (a_running_pod("2", created=20),))[0].reason == "PodGone"


NO_FAILURES = {
    "a stopped pod": an_ended_pod(30, uid="1"),
    "an evicted pod": an_ended_pod(137, uid="1", reason="Evicted"),
    "a preempted pod": an_ended_pod(137, uid="1", conditions=[{"type": "DisruptionTarget", "status": "True"}]),
}


@pytest.mark.parametrize("pod", NO_FAILURES.values(), ids=NO_FAILURES)
def test_no_retry_is_counted_for(pod: object) -> None:
    attempts = merge_attempts((), (pod, a_running_pod("2", created=20)))  # type: ignore[arg-type]
    assert count_retries(attempts, 0) == 0


def test_only_the_newest_attempts_are_kept_and_no_retry_is_forgotten() -> None:
    old = tuple(Attempt(pod=str(n), uid=str(n), exit_code=1, reason="Error") for n in range(MAX_ATTEMPTS))
    merged = merge_attempts(old, (a_running_pod("new"),))
    assert len(merged) == MAX_ATTEMPTS
    assert merged[-1].uid == "new"
    assert count_retries(merged, known=30) == 30
