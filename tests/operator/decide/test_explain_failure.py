"""Reasons and sentences for runs that failed."""

import pytest

from finetune_api.failures import FAILURES, ExitCode, FailureReason
from finetune_api.outcome import Outcome, Result
from finetune_api.status import Failure
from finetune_api.vocabulary import Stage
from finetune_operator.observe.children import TrainerPod, TrueCondition
from finetune_test_operator.snapshot_builder import (
    NOW,
    a_pod,
    a_preflight_job,
    a_preflight_snapshot,
    a_report,
    a_snapshot,
    a_spec,
    a_trainer_job,
    an_ended_pod,
    decision_about,
)

BAD_ROW = Outcome(
    result=Result.FAILED, reason=FailureReason.INVALID_ROW, message="line 2", exit_code=ExitCode.DATA, finished=NOW
)
KILLED = an_ended_pod(137, terminated={"reason": "OOMKilled"})
GIVEN_UP = TrueCondition("BackoffLimitExceeded", "Job has reached the specified backoff limit", NOW)
EXPIRED = TrueCondition("DeadlineExceeded", "Job was active longer than specified deadline", NOW)
SPEC = a_spec(resources={"memory": "8Gi"}, runPolicy={"activeDeadlineSeconds": 60})


def _failure(*pods: TrainerPod, verdict: TrueCondition = GIVEN_UP) -> Failure:
    failure = decision_about(a_snapshot(SPEC, pods=pods, job=a_trainer_job(SPEC, failed=verdict))).failure
    assert failure is not None
    return failure


SENTENCES: dict[str, tuple[tuple[TrainerPod, ...], str]] = {
    "the trainer says why": ((an_ended_pod(11, BAD_ROW),), "line 2"),
    "a signal": ((an_ended_pod(139),), "the trainer was ended by signal 11 and wrote no result"),
    "an exit code": ((an_ended_pod(1),), "the trainer ended with exit code 1 and wrote no result"),
    "memory": ((KILLED,), "the trainer was killed when its memory reached the limit of 8Gi"),
    "no pod": ((), "the trainer's pod is gone: Job has reached the specified backoff limit"),
    "an eviction": ((an_ended_pod(137, reason="Evicted", message="low on disk"),), "low on disk"),
    "a preemption": (
        (an_ended_pod(137, conditions=[{"type": "DisruptionTarget", "status": "True"}]),),
        "the cluster removed the pod",
    ),
    "a pod without a container": ((a_pod(phase="Failed"),), "the pod ended before its trainer did"),
    "a pod that the kubelet refused": ((a_pod(phase="Failed", message="too many pods"),), "too many pods"),
}


@pytest.mark.parametrize(("pods", "sentence"), SENTENCES.values(), ids=SENTENCES)
def test_a_failure_is_a_sentence(pods: tuple[TrainerPod, ...], sentence: str) -> None:
    assert _failure(*pods).message == sentence


def test_a_deadline_is_named() -> None:
    failure = _failure(verdict=EXPIRED)
    assert (failure.reason, failure.message) == ("DeadlineExceeded", "the job ran longer than its deadline of 60 s")


def test_memory_of_preflight_is_that_of_its_own_job() -> None:
    for job in (a_preflight_job(), a_preflight_job(failed=GIVEN_UP)):
        failed = decision_about(a_preflight_snapshot(KILLED, spec=SPEC, job=job))
        assert failed.message == "the checks were killed when their memory reached its limit of 1Gi"


def test_a_failure_has_a_hint_and_the_trainers_own_words() -> None:
    failure = _failure(an_ended_pod(11, BAD_ROW))
    assert (failure.message, failure.exit_code) == ("line 2", ExitCode.DATA)
    assert failure.hint == FAILURES[FailureReason.INVALID_ROW].hint


def test_a_termination_message_that_is_no_outcome_is_not_shown() -> None:
    failure = _failure(an_ended_pod(1, terminated={"message": "secret rows of the dataset"}))
    assert "secret" not in failure.message
    assert failure.reason == "TrainerCrashed"


def test_the_stage_of_a_crash_is_the_reported_one() -> None:
    snapshot = a_snapshot(
        pods=(an_ended_pod(139),), job=a_trainer_job(failed=GIVEN_UP), report=a_report(stage=Stage.SAVING)
    )
    failure = decision_about(snapshot).failure
    assert failure is not None
    assert failure.stage is Stage.SAVING
