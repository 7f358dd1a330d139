"""The deadline of a pod that does not start: from when it counts, what it ends, and what the job then says."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from finetune_api.failures import ExitCode, FailureReason
from finetune_api.outcome import Outcome, Result
from finetune_api.status import FineTuneJobStatus
from finetune_api.vocabulary import ConditionType, Phase, PreflightResult, Stage
from finetune_operator.decide.waiting.startup_deadline import MAX_HELD_SECONDS
from finetune_operator.observe.children import ChildJob, TrainerPod, TrueCondition
from finetune_operator.observe.snapshot import Snapshot, Waiting
from finetune_operator.status.status import build_status
from finetune_test_operator.snapshot_builder import (
    NOW,
    a_condition,
    a_pod,
    a_preflight_job,
    a_preflight_snapshot,
    a_running_pod,
    a_snapshot,
    a_spec,
    a_trainer_job,
    an_ended_pod,
    decision_about,
)

LIMIT = 600
LIMITED: dict[str, Any] = {"runPolicy": {"startupDeadlineSeconds": LIMIT}}
STOPPED = Outcome(
    result=Result.INTERRUPTED, reason=FailureReason.INTERRUPTED, exit_code=ExitCode.INTERRUPTED, finished=NOW
)
REFUSED = Waiting("PodRejected", "the pod is refused: quota", is_stalled=True)


def _since(seconds: float, *more: ConditionType) -> FineTuneJobStatus:
    """The status of a job that is queued since so many seconds after NOW."""
    conditions = tuple(a_condition(kind, seconds) for kind in (ConditionType.QUEUED, *more))
    return FineTuneJobStatus(phase=Phase.QUEUED, conditions=conditions)


def _waiting(reason: str) -> TrainerPod:
    return a_pod(state={"waiting": {"reason": reason, "message": "says the kubelet"}})


def _after(seconds: float, *pods: TrainerPod, spec: dict[str, Any] = LIMITED, **fields: Any) -> Snapshot:
    """A job that waits since NOW, seen so many seconds later."""
    return a_snapshot(a_spec(**spec), pods=pods, **{"status": _since(0)} | fields, now=NOW + timedelta(seconds=seconds))


NO_NODE = a_pod(conditions=[{"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}])
CAUSES: dict[str, tuple[Snapshot, str, str]] = {
    "no node": (_after(LIMIT, NO_NODE), "Unschedulable", "0/3 nodes"),
    "no image": (_after(LIMIT, _waiting("ImagePullBackOff")), "ImagePullFailed", "says the kubelet"),
    "no Secret": (_after(LIMIT, _waiting("CreateContainerConfigError")), "ContainerConfigError", "says the kubelet"),
    "no place in the quota": (_after(LIMIT, blocker=REFUSED), "PodRejected", "quota"),
    "a slow pull": (_after(LIMIT, _waiting("ContainerCreating")), "StartupDeadlineExceeded", "is starting"),
    "no pod": (_after(LIMIT), "StartupDeadlineExceeded", "waiting for a pod"),
    "no pod after a crash": (_after(LIMIT + 10, an_ended_pod(139)), "StartupDeadlineExceeded", "another pod"),
    "a quota that refuses the next pod after a crash": (
        _after(LIMIT + 10, an_ended_pod(139), blocker=REFUSED),
        "PodRejected",
        "quota",
    ),
}


@pytest.mark.parametrize(("snapshot", "reason", "said"), CAUSES.values(), ids=CAUSES)
def test_the_job_fails_with_the_reason_of_its_wait(snapshot: Snapshot, reason: str, said: str) -> None:
    decision = decision_about(snapshot)
    assert (decision.phase, decision.reason, decision.is_stalled) == (Phase.FAILED, reason, True)
    assert decision.failure is not None
    assert said in decision.failure.message
    assert "startupDeadlineSeconds" in decision.failure.message
    assert f"waited {LIMIT} s" in decision.failure.message
    assert decision.requeue_seconds == 0, "the Job still has to be ended"


@pytest.mark.parametrize(("snapshot", "reason", "said"), CAUSES.values(), ids=CAUSES)
def test_a_second_earlier_it_waits_and_looks_again_in_time(snapshot: Snapshot, reason: str, said: str) -> None:
    decision = decision_about(replace(snapshot, now=snapshot.now - timedelta(seconds=1)))
    assert decision.phase is Phase.QUEUED
    assert decision.requeue_seconds == 1


RESUMED = a_trainer_job(started=NOW + timedelta(seconds=500), active_seconds=300)
QUEUED_JOB = a_trainer_job(suspended=True, started=None)
NOT_YET: dict[str, Snapshot] = {
    "without a limit": _after(10**6, NO_NODE, spec={}),
    "the trainer runs": _after(10**6, a_running_pod()),
    "suspended": _after(10**6, spec={"runPolicy": {"startupDeadlineSeconds": LIMIT, "suspend": True}}),
    "a queue holds the Job": _after(10**6, job=QUEUED_JOB),
    "resumed a short time ago": _after(LIMIT, NO_NODE, job=RESUMED),
    "the pod before ran until a short time ago": _after(
        LIMIT + 8, an_ended_pod(30, STOPPED), a_pod("2", created=10), status=_since(0)
    ),
    "the operator was away while the pod before ran": _after(
        10**6, a_pod("2", created=10), status=FineTuneJobStatus(phase=Phase.RUNNING)
    ),
    "the trainer has ended, and its Job does not say so yet": _after(10**6, an_ended_pod(11)),
}


@pytest.mark.parametrize("snapshot", NOT_YET.values(), ids=NOT_YET)
def test_time_that_does_not_count(snapshot: Snapshot) -> None:
    assert decision_about(snapshot).phase is not Phase.FAILED


def _stalled(reason: str) -> FineTuneJobStatus:
    stalled = a_condition(ConditionType.STALLED).model_copy(update={"reason": reason, "message": "exceeded quota"})
    return FineTuneJobStatus(phase=Phase.QUEUED, conditions=(a_condition(ConditionType.QUEUED), stalled))


UNCHECKED: dict[str, Any] = {"runPolicy": {"preflight": "Skip", "startupDeadlineSeconds": LIMIT}}


def test_a_job_that_the_api_server_refuses_has_the_deadline_too() -> None:
    late = _after(LIMIT, job=None, spec=UNCHECKED, status=_stalled("PermissionDenied"))
    decision = decision_about(late)
    assert (decision.phase, decision.reason) == (Phase.FAILED, "StartupDeadlineExceeded")
    assert "exceeded quota" in decision.message

    # Until then, and if nothing was refused, the Job is made.
    for snapshot in (
        _after(LIMIT - 1, job=None, spec=UNCHECKED, status=_stalled("PermissionDenied")),
        _after(LIMIT, job=None, spec=UNCHECKED, status=_stalled("NameConflict")),
        _after(LIMIT, job=None, spec=UNCHECKED),
    ):
        assert decision_about(snapshot).actions.create_trainer_job is not None


STUCK = _since(0, ConditionType.STALLED)
HELD: dict[str, tuple[Snapshot, bool]] = {
    "an image": (_after(MAX_HELD_SECONDS, _waiting("InvalidImageName"), spec={}, status=STUCK), True),
    "a Secret": (_after(MAX_HELD_SECONDS, _waiting("CreateContainerConfigError"), spec={}, status=STUCK), True),
    "not yet": (_after(MAX_HELD_SECONDS - 1, _waiting("ErrImagePull"), spec={}, status=STUCK), False),
    "hours without a node before": (
        _after(10**6, _waiting("ErrImagePull"), spec={}, status=_since(0)),
        False,
    ),
    "a quota holds nothing": (_after(10**6, blocker=REFUSED, spec={}, status=STUCK), False),
    "a longer limit of the spec's": (
        _after(
            MAX_HELD_SECONDS,
            _waiting("ErrImagePull"),
            spec={"runPolicy": {"startupDeadlineSeconds": 10**6}},
            status=STUCK,
        ),
        False,
    ),
}


@pytest.mark.parametrize(("snapshot", "fails"), HELD.values(), ids=HELD)
def test_a_pod_that_holds_a_node_and_waits_for_a_person_has_a_limit_by_default(snapshot: Snapshot, fails: bool) -> None:
    assert (decision_about(snapshot).phase is Phase.FAILED) == fails


def test_the_checks_have_the_same_deadline() -> None:
    job = a_preflight_job(started=NOW)
    now = NOW + timedelta(seconds=LIMIT)
    snapshot = a_preflight_snapshot(NO_NODE, spec=a_spec(**LIMITED), job=job, status=_since(0), now=now)
    decision = decision_about(snapshot)
    assert (decision.phase, decision.reason, decision.preflight) == (
        Phase.FAILED,
        "Unschedulable",
        PreflightResult.FAILED,
    )
    assert decision.failure is not None
    assert decision.failure.stage is Stage.PREFLIGHT
    status = build_status(snapshot, decision)
    assert {each.type: each.status for each in status.conditions}[ConditionType.VALIDATED] == "Unknown"
    assert status.completion_time == now


ENDS: dict[str, tuple[ChildJob, Phase, Any]] = {
    "a Job that waits": (a_trainer_job(), Phase.FAILED, {"spec": {"activeDeadlineSeconds": 1}}),
    "one that was told": (a_trainer_job(deadline=1), Phase.FAILED, None),
    "one that has no pods": (QUEUED_JOB, Phase.FAILED, None),
    "one that is over": (a_trainer_job(failed=TrueCondition("DeadlineExceeded", "", NOW)), Phase.FAILED, None),
    "one that is about to complete": (a_trainer_job(), Phase.SUCCEEDED, None),
}


@pytest.mark.parametrize(("job", "phase", "patch"), ENDS.values(), ids=ENDS)
def test_the_job_of_a_failed_job_is_ended_once(job: ChildJob, phase: Phase, patch: Any) -> None:
    actions = decision_about(a_snapshot(job=job, status=FineTuneJobStatus(phase=phase))).actions
    assert actions.patch_trainer_job == patch
