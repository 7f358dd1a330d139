"""The checks before the trainer's Job: when they run, and that they run once."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from finetune_api.failures import ExitCode, FailureReason
from finetune_api.outcome import Outcome, Result
from finetune_api.status import FineTuneJobStatus, PreflightStatus
from finetune_api.vocabulary import Phase, PreflightResult, Stage
from finetune_operator.decide.decision import Actions
from finetune_operator.desired.names import ACTIVE_SECONDS_ANNOTATION, child_name, preflight_name
from finetune_operator.observe.children import TrueCondition
from finetune_operator.observe.snapshot import Snapshot, Waiting
from finetune_test_operator.snapshot_builder import (
    METADATA,
    NOW,
    a_checked_job,
    a_child,
    a_pod,
    a_preflight,
    a_running_pod,
    a_snapshot,
    a_spec,
    an_ended_pod,
    decision_about,
)

END = datetime(2026, 11, 24, 12, 0, 10, tzinfo=UTC)
PASSED = Outcome(result=Result.SUCCEEDED, message="400 rows", stage=Stage.PREFLIGHT, finished=END)
REUSED = PASSED.model_copy(update={"reused": True, "manifest_uri": "s3://results/manifest.json"})
BAD_ROW = Outcome(
    result=Result.FAILED,
    reason=FailureReason.INVALID_ROW,
    message="2 errors: chat.jsonl:2: no role; chat.jsonl:7: no role",
    exit_code=ExitCode.DATA,
    stage=Stage.PREFLIGHT,
    finished=END,
)
AWAY = BAD_ROW.model_copy(update={"reason": FailureReason.STORAGE_UNAVAILABLE, "exit_code": ExitCode.UNAVAILABLE})
STOPPED = Outcome(
    result=Result.INTERRUPTED, reason=FailureReason.INTERRUPTED, exit_code=ExitCode.INTERRUPTED, finished=END
)
COMPLETE = TrueCondition("CompletionsReached", "", NOW)
SUSPENDED = a_spec(runPolicy={"suspend": True})
CHECKED = FineTuneJobStatus(
    phase=Phase.QUEUED, preflight=PreflightStatus(result=PreflightResult.PASSED), active_seconds=40
)


def _failed(reason: str) -> TrueCondition:
    return TrueCondition(reason, "the Job controller says so", NOW)


CASES: dict[str, tuple[Snapshot, Phase, str]] = {
    "nothing exists yet": (a_checked_job(preflight=None, config_map=None), Phase.VALIDATING, "JobCreated"),
    "a pod is awaited": (a_checked_job(), Phase.VALIDATING, "WaitingForPod"),
    "the image cannot be pulled": (
        a_checked_job(a_pod(state={"waiting": {"reason": "ErrImagePull"}})),
        Phase.VALIDATING,
        "ImagePullFailed",
    ),
    "a quota refuses the pod": (
        a_checked_job(blocker=Waiting("PodRejected", "quota", is_stalled=True)),
        Phase.VALIDATING,
        "PodRejected",
    ),
    "the checks run": (a_checked_job(a_running_pod()), Phase.VALIDATING, "Checking"),
    "the checks passed": (a_checked_job(an_ended_pod(0, PASSED)), Phase.QUEUED, "PreflightPassed"),
    "the result was there already": (a_checked_job(an_ended_pod(0, REUSED)), Phase.SUCCEEDED, "Reused"),
    "the checks passed while the job is being suspended": (
        a_checked_job(an_ended_pod(0, PASSED), spec=SUSPENDED),
        Phase.SUSPENDED,
        "PreflightPassed",
    ),
    "the pod of a complete Job is gone": (
        a_checked_job(preflight=a_preflight(complete=COMPLETE)),
        Phase.QUEUED,
        "PreflightPassed",
    ),
    "exit code 0 without an outcome is no pass": (
        a_checked_job(an_ended_pod(0), preflight=a_preflight(complete=COMPLETE)),
        Phase.FAILED,
        "TrainerCrashed",
    ),
    "bad data ends the job": (
        a_checked_job(an_ended_pod(11, BAD_ROW), preflight=a_preflight(failed=_failed("PodFailurePolicy"))),
        Phase.FAILED,
        "InvalidRow",
    ),
    "bad data, before the Job controller has said so": (
        a_checked_job(an_ended_pod(11, BAD_ROW)),
        Phase.VALIDATING,
        "InvalidRow",
    ),
    "a store that is away is tried again": (a_checked_job(an_ended_pod(20, AWAY)), Phase.VALIDATING, "Retrying"),
    "a crash after the last retry": (
        a_checked_job(an_ended_pod(139), preflight=a_preflight(failed=_failed("BackoffLimitExceeded"))),
        Phase.FAILED,
        "TrainerCrashed",
    ),
    "the deadline has passed": (
        a_checked_job(an_ended_pod(30, STOPPED), preflight=a_preflight(failed=_failed("DeadlineExceeded"))),
        Phase.FAILED,
        "DeadlineExceeded",
    ),
    "a stopped pod is replaced": (a_checked_job(an_ended_pod(30, STOPPED)), Phase.VALIDATING, "WaitingForPod"),
    "suspension waits for the pod": (a_checked_job(a_running_pod(), spec=SUSPENDED), Phase.VALIDATING, "Suspending"),
    "suspended": (a_checked_job(spec=SUSPENDED), Phase.SUSPENDED, "Suspended"),
    "suspended from the start": (a_checked_job(spec=SUSPENDED, preflight=None), Phase.SUSPENDED, "Suspended"),
    "another's Job has the name": (
        a_checked_job(preflight=a_preflight(owner_uid="someone")),
        Phase.PENDING,
        "NameConflict",
    ),
    "the Job is being deleted": (a_checked_job(preflight=a_preflight(deleting=True)), Phase.VALIDATING, "JobDeleted"),
    "a pod of a deleted Job still runs": (
        a_checked_job(preflight=None, orphaned_pods=(a_running_pod("old"),)),
        Phase.VALIDATING,
        "JobDeleted",
    ),
}


@pytest.mark.parametrize(("snapshot", "phase", "reason"), CASES.values(), ids=CASES)
def test_phase_and_reason(snapshot: Snapshot, phase: Phase, reason: str) -> None:
    decision = decision_about(snapshot)
    assert (decision.phase, decision.reason) == (phase, reason)


@pytest.mark.parametrize("name", CASES)
def test_the_trainers_job_is_never_made_before_the_status_says_that_the_checks_passed(name: str) -> None:
    made = decision_about(CASES[name][0]).actions.create_job
    assert made is None or made["metadata"]["name"] == preflight_name(METADATA)
    assert decision_about(CASES[name][0]).actions.patch_job is None


def test_children_of_the_checks_are_made_in_order_and_once() -> None:
    actions = decision_about(CASES["nothing exists yet"][0]).actions
    assert actions.create_config_map is not None
    assert actions.create_job is not None
    assert decision_about(CASES["a pod is awaited"][0]).actions == Actions()
    assert decision_about(CASES["suspended from the start"][0]).actions == Actions()


AFTERWARDS = {
    "the Job of preflight is there": {"preflight": a_preflight(complete=COMPLETE)},
    "its Job was deleted": {"preflight": None},
    "it runs again, by somebody's hand": {"preflight": a_preflight(), "preflight_pods": (a_running_pod(),)},
}


@pytest.mark.parametrize("fields", AFTERWARDS.values(), ids=AFTERWARDS)
def test_once_passed_the_trainers_job_follows_and_the_checks_are_never_started_again(
    fields: dict[str, object],
) -> None:
    decision = decision_about(a_checked_job(status=CHECKED, **fields))
    assert decision.actions.create_job is not None
    assert decision.actions.create_job["metadata"]["name"] == child_name(METADATA)
    assert decision.phase is Phase.QUEUED


def test_a_trainers_job_of_an_older_operator_needs_no_checks() -> None:
    decision = decision_about(a_snapshot(pods=(a_running_pod(),)))
    assert decision.phase is Phase.RUNNING
    assert decision.actions == Actions()


def test_checks_are_left_out_where_the_user_says_so() -> None:
    spec = a_spec(runPolicy={"preflight": "Skip"})
    made = decision_about(a_snapshot(spec, child=None, config_map=None)).actions.create_job
    assert made is not None
    assert made["metadata"]["name"] == child_name(METADATA)


def test_the_time_of_the_checks_counts_towards_the_deadline() -> None:
    spec = a_spec(runPolicy={"activeDeadlineSeconds": 100})
    made = decision_about(a_checked_job(spec=spec, status=CHECKED, preflight=None)).actions.create_job
    assert made is not None
    assert made["spec"]["activeDeadlineSeconds"] == 60
    assert made["metadata"]["annotations"][ACTIVE_SECONDS_ANNOTATION] == "40"
    first = decision_about(a_checked_job(spec=spec, preflight=None)).actions.create_job
    assert first is not None
    assert first["spec"]["activeDeadlineSeconds"] == 100


def test_suspension_and_deadline_follow_the_spec() -> None:
    stopping = decision_about(a_checked_job(a_running_pod(), spec=SUSPENDED, now=NOW + timedelta(seconds=9)))
    assert stopping.actions == Actions(
        patch_preflight={"spec": {"suspend": True}, "metadata": {"annotations": {ACTIVE_SECONDS_ANNOTATION: "9"}}}
    )
    resumed = decision_about(a_checked_job(preflight=a_preflight(suspended=True, started=None)))
    assert resumed.actions == Actions(patch_preflight={"spec": {"suspend": False}})


def test_the_ttl_is_for_both_jobs() -> None:
    spec = a_spec(runPolicy={"ttlSecondsAfterFinished": 60})
    over = CHECKED.model_copy(update={"phase": Phase.SUCCEEDED})
    patch = {"spec": {"ttlSecondsAfterFinished": 60}}
    snapshot = a_snapshot(spec, status=over, child=a_child(complete=COMPLETE), preflight=a_preflight(complete=COMPLETE))
    assert decision_about(snapshot).actions == Actions(patch_job=patch, patch_preflight=patch)
    failed = replace(snapshot, child=None, preflight=a_preflight(failed=_failed("PodFailurePolicy")))
    assert decision_about(failed).actions == Actions(patch_preflight=patch)
    foreign = replace(snapshot, preflight=a_preflight(complete=COMPLETE, owner_uid="someone"))
    assert decision_about(foreign).actions == Actions(patch_job=patch)
