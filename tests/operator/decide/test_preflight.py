"""The checks before the trainer's Job: when they run, and that they run once."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from finetune_api.failures import ExitCode, FailureReason
from finetune_api.outcome import Outcome, Result
from finetune_api.preflight import PreflightSummary
from finetune_api.status import FineTuneJobStatus, PreflightStatus
from finetune_api.vocabulary import ConditionType, Phase, PreflightResult, Stage
from finetune_operator.decide.decide import PREFLIGHT as CHAIN
from finetune_operator.decide.decision import Actions
from finetune_operator.desired.names import ACTIVE_SECONDS_ANNOTATION, PREFLIGHT, child_name, preflight_name
from finetune_operator.observe.children import TrueCondition
from finetune_operator.observe.snapshot import ChildRun, Predecessor, Snapshot, Waiting
from finetune_test_operator.snapshot_builder import (
    METADATA,
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
    deciding_rule,
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
    "training would take more GPU time than it may": (
        a_preflight_snapshot(
            an_ended_pod(0, PASSED.model_copy(update={"preflight": PreflightSummary(errors=0, gpu_hours=2)})),
            spec=a_spec(runPolicy={"maxGpuSeconds": 3600}),
        ),
        Phase.FAILED,
        "GpuBudgetExhausted",
    ),
    "nothing exists yet": (a_preflight_snapshot(job=None, config_map=None), Phase.VALIDATING, "JobCreated"),
    "a pod is awaited": (a_preflight_snapshot(), Phase.VALIDATING, "WaitingForPod"),
    "the image cannot be pulled": (
        a_preflight_snapshot(a_pod(state={"waiting": {"reason": "ErrImagePull"}})),
        Phase.VALIDATING,
        "ImagePullFailed",
    ),
    "a quota refuses the pod": (
        a_preflight_snapshot(blocker=Waiting("PodRejected", "quota", is_stalled=True)),
        Phase.VALIDATING,
        "PodRejected",
    ),
    "a pod that may not wait any longer": (
        a_preflight_snapshot(
            spec=a_spec(runPolicy={"startupDeadlineSeconds": 60}),
            job=a_preflight_job(started=NOW),
            status=FineTuneJobStatus(phase=Phase.VALIDATING, conditions=(a_condition(ConditionType.QUEUED),)),
            now=NOW + timedelta(seconds=60),
        ),
        Phase.FAILED,
        "StartupDeadlineExceeded",
    ),
    "the checks run": (a_preflight_snapshot(a_running_pod()), Phase.VALIDATING, "Checking"),
    "the checks passed": (a_preflight_snapshot(an_ended_pod(0, PASSED)), Phase.QUEUED, "PreflightPassed"),
    "the result was there already": (a_preflight_snapshot(an_ended_pod(0, REUSED)), Phase.SUCCEEDED, "Reused"),
    "the checks passed while the job is being suspended": (
        a_preflight_snapshot(an_ended_pod(0, PASSED), spec=SUSPENDED),
        Phase.SUSPENDED,
        "PreflightPassed",
    ),
    "the pod of a complete Job is gone": (
        a_preflight_snapshot(job=a_preflight_job(complete=COMPLETE)),
        Phase.QUEUED,
        "PreflightPassed",
    ),
    "exit code 0 without an outcome is no pass": (
        a_preflight_snapshot(an_ended_pod(0), job=a_preflight_job(complete=COMPLETE)),
        Phase.FAILED,
        "TrainerCrashed",
    ),
    "bad data ends the job": (
        a_preflight_snapshot(an_ended_pod(11, BAD_ROW), job=a_preflight_job(failed=_failed("PodFailurePolicy"))),
        Phase.FAILED,
        "InvalidRow",
    ),
    "bad data, before the Job controller has said so": (
        a_preflight_snapshot(an_ended_pod(11, BAD_ROW)),
        Phase.VALIDATING,
        "Ending",
    ),
    "a store that is away is tried again": (
        a_preflight_snapshot(an_ended_pod(20, AWAY)),
        Phase.VALIDATING,
        "Retrying",
    ),
    "a crash after the last retry": (
        a_preflight_snapshot(an_ended_pod(139), job=a_preflight_job(failed=_failed("BackoffLimitExceeded"))),
        Phase.FAILED,
        "TrainerCrashed",
    ),
    "the deadline has passed": (
        a_preflight_snapshot(an_ended_pod(30, STOPPED), job=a_preflight_job(failed=_failed("DeadlineExceeded"))),
        Phase.FAILED,
        "DeadlineExceeded",
    ),
    "a stopped pod is replaced": (
        a_preflight_snapshot(an_ended_pod(30, STOPPED)),
        Phase.VALIDATING,
        "WaitingForPod",
    ),
    "suspension waits for the pod": (
        a_preflight_snapshot(a_running_pod(), spec=SUSPENDED),
        Phase.VALIDATING,
        "Suspending",
    ),
    "suspended": (a_preflight_snapshot(spec=SUSPENDED), Phase.SUSPENDED, "Suspended"),
    "suspended from the start": (a_preflight_snapshot(spec=SUSPENDED, job=None), Phase.SUSPENDED, "Suspended"),
    "the ConfigMap was deleted": (a_preflight_snapshot(a_running_pod(), config_map=None), Phase.VALIDATING, "Checking"),
    "another's Job has the name": (
        a_preflight_snapshot(job=a_preflight_job(owner_uid="someone")),
        Phase.PENDING,
        "NameConflict",
    ),
    "the kernel killed the checks for their memory": (
        a_preflight_snapshot(an_ended_pod(137, terminated={"reason": "OOMKilled"})),
        Phase.FAILED,
        "OutOfMemory",
    ),
    "the Job is being deleted": (
        a_preflight_snapshot(job=a_preflight_job(deleting=True)),
        Phase.VALIDATING,
        "JobDeleted",
    ),
    "a deleted job of the same name still has a pod": (
        a_preflight_snapshot(job=None, predecessor=Predecessor("bot-0", "bot-0-x")),
        Phase.VALIDATING,
        "PredecessorRunning",
    ),
    "a pod of a deleted Job still runs": (
        a_preflight_snapshot(job=None, orphaned_pods=(a_running_pod("old"),)),
        Phase.VALIDATING,
        "JobDeleted",
    ),
}


@pytest.mark.parametrize(("snapshot", "phase", "reason"), CASES.values(), ids=CASES)
def test_phase_and_reason(snapshot: Snapshot, phase: Phase, reason: str) -> None:
    decision = decision_about(snapshot)
    assert (decision.phase, decision.reason) == (phase, reason)
    if phase.is_terminal and snapshot.current_run.job is not None:
        assert decision.requeue_seconds == 0, "the next look ends the Job and gives it its TTL, though nothing happens"


def test_every_rule_of_the_chain_decides_a_case() -> None:
    deciding = {deciding_rule(CHAIN, case[0], case[0].preflight) for case in CASES.values()}
    assert deciding == {rule.__name__ for rule in (*CHAIN.rules, CHAIN.otherwise)}


@pytest.mark.parametrize("name", CASES)
def test_the_trainers_job_is_never_made_before_the_status_says_that_the_checks_passed(name: str) -> None:
    actions = decision_about(CASES[name][0]).actions
    assert actions.create_trainer_job is None
    made = actions.create_preflight_job
    assert made is None or made["metadata"]["name"] == preflight_name(METADATA)
    assert actions.patch_trainer_job is None


def test_children_of_the_checks_are_made_in_order_and_once() -> None:
    actions = decision_about(CASES["nothing exists yet"][0]).actions
    assert actions.create_config_map is not None
    assert actions.create_preflight_job is not None
    assert decision_about(CASES["a pod is awaited"][0]).actions == Actions()
    assert decision_about(CASES["suspended from the start"][0]).actions == Actions()


AFTERWARDS = {
    "the Job of preflight is there": {"job": a_preflight_job(complete=COMPLETE)},
    "its Job was deleted": {"job": None},
    "it runs again, by somebody's hand": {"job": a_preflight_job(), "pods": (a_running_pod(),)},
}


@pytest.mark.parametrize("fields", AFTERWARDS.values(), ids=AFTERWARDS)
def test_once_passed_the_trainers_job_follows_and_the_checks_are_never_started_again(
    fields: dict[str, Any],
) -> None:
    decision = decision_about(a_preflight_snapshot(*fields.get("pods", ()), job=fields["job"], status=CHECKED))
    assert decision.actions.create_trainer_job is not None
    assert decision.actions.create_trainer_job["metadata"]["name"] == child_name(METADATA)
    assert decision.phase is Phase.QUEUED


def test_a_trainers_job_of_an_older_operator_needs_no_checks() -> None:
    decision = decision_about(a_snapshot(pods=(a_running_pod(),)))
    assert decision.phase is Phase.RUNNING
    assert decision.actions == Actions()


def test_checks_are_left_out_where_the_user_says_so() -> None:
    spec = a_spec(runPolicy={"preflight": "Skip"})
    made = decision_about(a_snapshot(spec, job=None, config_map=None)).actions.create_trainer_job
    assert made is not None
    assert made["metadata"]["name"] == child_name(METADATA)


def test_the_time_of_the_checks_counts_towards_the_deadline() -> None:
    spec = a_spec(runPolicy={"activeDeadlineSeconds": 100})
    made = decision_about(a_preflight_snapshot(spec=spec, status=CHECKED, job=None)).actions.create_trainer_job
    assert made is not None
    assert made["spec"]["activeDeadlineSeconds"] == 60
    assert made["metadata"]["annotations"][ACTIVE_SECONDS_ANNOTATION] == "40"
    first = decision_about(a_preflight_snapshot(spec=spec, job=None)).actions.create_preflight_job
    assert first is not None
    assert first["spec"]["activeDeadlineSeconds"] == 100


def test_suspension_and_deadline_follow_the_spec() -> None:
    stopping = decision_about(a_preflight_snapshot(a_running_pod(), spec=SUSPENDED, now=NOW + timedelta(seconds=9)))
    assert stopping.actions == Actions(
        patch_preflight_job={"spec": {"suspend": True}, "metadata": {"annotations": {ACTIVE_SECONDS_ANNOTATION: "9"}}}
    )
    resumed = decision_about(a_preflight_snapshot(job=a_preflight_job(suspended=True, started=None)))
    assert resumed.actions == Actions(patch_preflight_job={"spec": {"suspend": False}})


def test_the_ttl_is_for_both_jobs() -> None:
    spec = a_spec(runPolicy={"ttlSecondsAfterFinished": 60})
    over = CHECKED.model_copy(update={"phase": Phase.SUCCEEDED})
    patch = {"spec": {"ttlSecondsAfterFinished": 60}}

    passed = ChildRun(PREFLIGHT, a_preflight_job(complete=COMPLETE))
    snapshot = a_snapshot(spec, status=over, job=a_trainer_job(complete=COMPLETE), preflight=passed)
    assert decision_about(snapshot).actions == Actions(patch_trainer_job=patch, patch_preflight_job=patch)

    failed = ChildRun(PREFLIGHT, a_preflight_job(failed=_failed("PodFailurePolicy")))
    only_preflight = a_snapshot(spec, status=over, job=None, preflight=failed)
    assert decision_about(only_preflight).actions == Actions(patch_preflight_job=patch)

    foreign = ChildRun(PREFLIGHT, a_preflight_job(complete=COMPLETE, owner_uid="someone"))
    assert decision_about(replace(snapshot, preflight=foreign)).actions == Actions(patch_trainer_job=patch)
