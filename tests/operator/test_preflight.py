"""The checks before the trainer's Job: when they run, that they run once, what they leave in status and events."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from finetune_api.failures import ExitCode, FailureReason
from finetune_api.outcome import Outcome, Result
from finetune_api.preflight import PreflightSummary, TokenLengths
from finetune_api.status import FineTuneJobStatus, PreflightStatus
from finetune_api.vocabulary import ConditionType, Phase, PreflightResult, Stage
from finetune_devcluster.observed_builder import (
    METADATA,
    NOW,
    a_child,
    a_pod,
    a_preflight,
    a_running_pod,
    a_spec,
    an_ended_pod,
    an_observation,
    at,
    decision_about,
)
from finetune_operator.children import TrueCondition
from finetune_operator.decision import Actions
from finetune_operator.desired.names import ACTIVE_SECONDS_ANNOTATION, child_name, preflight_name
from finetune_operator.events import turning_points
from finetune_operator.observe import read_status
from finetune_operator.observed import Observed
from finetune_operator.status import build_status, has_changed
from finetune_operator.waiting import Waiting

END = datetime(2026, 11, 24, 12, 0, 10, tzinfo=UTC)
SUMMARY = PreflightSummary(
    errors=0,
    rows=400,
    bad_rows=2,
    duplicate_rows=1,
    tokens=TokenLengths(p50=90, p95=300, max=512),
    truncated_share=0.01,
    supervised_share=0.4,
    steps=50,
    gpu_memory_bytes=7 * 2**30,
    gpu_hours=1.25,
    warnings=("spec.dataset.source: 100 of 400 rows repeat an earlier row",),
    warning_count=3,
    report_uri="s3://results/team/bot/preflight/report.html",
)
PASSED = Outcome(
    result=Result.SUCCEEDED, message="400 rows", stage=Stage.PREFLIGHT, total_steps=50, preflight=SUMMARY, finished=END
)
BAD_ROW = Outcome(
    result=Result.FAILED,
    reason=FailureReason.INVALID_ROW,
    message="2 errors: chat.jsonl:2: no role; chat.jsonl:7: no role",
    exit_code=ExitCode.DATA,
    stage=Stage.PREFLIGHT,
    preflight=SUMMARY.model_copy(update={"errors": 2}),
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


def checking(*pods: object, **fields: object) -> Observed:
    """A job whose preflight Job exists; keyword arguments replace fields of the observation."""
    given = {"preflight": a_preflight(), "preflight_pods": pods} | fields
    return an_observation(given.pop("spec", None), child=None, **given)  # type: ignore[arg-type]


CASES: dict[str, tuple[Observed, Phase, str]] = {
    "nothing exists yet": (checking(preflight=None, config_map=None), Phase.VALIDATING, "JobCreated"),
    "a pod is awaited": (checking(), Phase.VALIDATING, "WaitingForPod"),
    "the image cannot be pulled": (
        checking(a_pod(state={"waiting": {"reason": "ErrImagePull"}})),
        Phase.VALIDATING,
        "ImagePullFailed",
    ),
    "a quota refuses the pod": (
        checking(obstacle=Waiting("PodRejected", "quota", is_stalled=True)),
        Phase.VALIDATING,
        "PodRejected",
    ),
    "the checks run": (checking(a_running_pod()), Phase.VALIDATING, "Checking"),
    "the checks passed": (checking(an_ended_pod(0, PASSED)), Phase.QUEUED, "PreflightPassed"),
    "the checks passed while the job is being suspended": (
        checking(an_ended_pod(0, PASSED), spec=SUSPENDED),
        Phase.SUSPENDED,
        "PreflightPassed",
    ),
    "the pod of a complete Job is gone": (
        checking(preflight=a_preflight(complete=COMPLETE)),
        Phase.QUEUED,
        "PreflightPassed",
    ),
    "exit code 0 without an outcome is no pass": (
        checking(an_ended_pod(0), preflight=a_preflight(complete=COMPLETE)),
        Phase.FAILED,
        "TrainerCrashed",
    ),
    "bad data ends the job": (
        checking(an_ended_pod(11, BAD_ROW), preflight=a_preflight(failed=_failed("PodFailurePolicy"))),
        Phase.FAILED,
        "InvalidRow",
    ),
    "bad data, before the Job controller has said so": (
        checking(an_ended_pod(11, BAD_ROW)),
        Phase.VALIDATING,
        "InvalidRow",
    ),
    "a store that is away is tried again": (checking(an_ended_pod(20, AWAY)), Phase.VALIDATING, "Retrying"),
    "a crash after the last retry": (
        checking(an_ended_pod(139), preflight=a_preflight(failed=_failed("BackoffLimitExceeded"))),
        Phase.FAILED,
        "TrainerCrashed",
    ),
    "the deadline has passed": (
        checking(an_ended_pod(30, STOPPED), preflight=a_preflight(failed=_failed("DeadlineExceeded"))),
        Phase.FAILED,
        "DeadlineExceeded",
    ),
    "a stopped pod is replaced": (checking(an_ended_pod(30, STOPPED)), Phase.VALIDATING, "WaitingForPod"),
    "suspension waits for the pod": (checking(a_running_pod(), spec=SUSPENDED), Phase.VALIDATING, "Suspending"),
    "suspended": (checking(spec=SUSPENDED), Phase.SUSPENDED, "Suspended"),
    "suspended from the start": (checking(spec=SUSPENDED, preflight=None), Phase.SUSPENDED, "Suspended"),
    "another's Job has the name": (
        checking(preflight=a_preflight(owner_uid="someone")),
        Phase.PENDING,
        "NameConflict",
    ),
    "the Job is being deleted": (checking(preflight=a_preflight(deleting=True)), Phase.VALIDATING, "JobDeleted"),
    "a pod of a deleted Job still runs": (
        checking(preflight=None, strays=(a_running_pod("old"),)),
        Phase.VALIDATING,
        "JobDeleted",
    ),
}


@pytest.mark.parametrize(("observed", "phase", "reason"), CASES.values(), ids=CASES)
def test_phase_and_reason(observed: Observed, phase: Phase, reason: str) -> None:
    decision = decision_about(observed)
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
    decision = decision_about(checking(status=CHECKED, **fields))
    assert decision.actions.create_job is not None
    assert decision.actions.create_job["metadata"]["name"] == child_name(METADATA)
    assert decision.phase is Phase.QUEUED


def test_a_trainers_job_of_an_older_operator_needs_no_checks() -> None:
    decision = decision_about(an_observation(pods=(a_running_pod(),)))
    assert decision.phase is Phase.RUNNING
    assert decision.actions == Actions()


def test_checks_are_left_out_where_the_user_says_so() -> None:
    spec = a_spec(runPolicy={"preflight": "Skip"})
    made = decision_about(an_observation(spec, child=None, config_map=None)).actions.create_job
    assert made is not None
    assert made["metadata"]["name"] == child_name(METADATA)


def test_the_time_of_the_checks_counts_towards_the_deadline() -> None:
    spec = a_spec(runPolicy={"activeDeadlineSeconds": 100})
    made = decision_about(checking(spec=spec, status=CHECKED, preflight=None)).actions.create_job
    assert made is not None
    assert made["spec"]["activeDeadlineSeconds"] == 60
    assert made["metadata"]["annotations"][ACTIVE_SECONDS_ANNOTATION] == "40"
    first = decision_about(checking(spec=spec, preflight=None)).actions.create_job
    assert first is not None
    assert first["spec"]["activeDeadlineSeconds"] == 100


def test_suspension_and_deadline_follow_the_spec() -> None:
    stopping = decision_about(checking(a_running_pod(), spec=SUSPENDED, now=NOW + timedelta(seconds=9)))
    assert stopping.actions == Actions(
        patch_preflight={"spec": {"suspend": True}, "metadata": {"annotations": {ACTIVE_SECONDS_ANNOTATION: "9"}}}
    )
    resumed = decision_about(checking(preflight=a_preflight(suspended=True, started=None)))
    assert resumed.actions == Actions(patch_preflight={"spec": {"suspend": False}})


def test_the_ttl_is_for_both_jobs() -> None:
    spec = a_spec(runPolicy={"ttlSecondsAfterFinished": 60})
    over = CHECKED.model_copy(update={"phase": Phase.SUCCEEDED})
    patch = {"spec": {"ttlSecondsAfterFinished": 60}}
    observed = an_observation(
        spec, status=over, child=a_child(complete=COMPLETE), preflight=a_preflight(complete=COMPLETE)
    )
    assert decision_about(observed).actions == Actions(patch_job=patch, patch_preflight=patch)
    failed = replace(observed, child=None, preflight=a_preflight(failed=_failed("PodFailurePolicy")))
    assert decision_about(failed).actions == Actions(patch_preflight=patch)
    foreign = replace(observed, preflight=a_preflight(complete=COMPLETE, owner_uid="someone"))
    assert decision_about(foreign).actions == Actions(patch_job=patch)


def _life(*observations: Observed) -> tuple[FineTuneJobStatus, list[str]]:
    """The last status, and the reasons of all events on the way."""
    status, told = FineTuneJobStatus(), []
    for observed in observations:
        seen = replace(observed, status=status)
        new = build_status(seen, decision_about(seen))
        told += [turn.reason for turn in turning_points(status, new)]
        status = new
    return status, told


def test_the_story_of_a_job_that_passes() -> None:
    observations = [CASES[name][0] for name in ("nothing exists yet", "the checks run", "the checks passed")]
    after = an_observation(child=None)
    status, told = _life(*observations, after, an_observation(pods=(a_running_pod(created=20),)))
    assert told == ["Validating", "PreflightWarning", "Validated", "Queued", "Started"]
    assert status.preflight is not None
    assert status.preflight.result is PreflightResult.PASSED
    assert status.preflight.rows == 400
    assert status.preflight.report_uri == SUMMARY.report_uri
    assert [each.exit_code for each in status.preflight.attempts] == [0]
    assert [each.uid for each in status.attempts] == ["pod-1"]
    assert [(stage.name, stage.end_time) for stage in status.stages] == [(Stage.PREFLIGHT, END)]
    validated = next(each for each in status.conditions if each.type is ConditionType.VALIDATED)
    assert (validated.status, validated.reason, validated.message) == ("True", "PreflightPassed", "400 rows")
    assert status.progress is None
    assert status.retries == 0


def test_the_story_of_a_job_that_fails() -> None:
    status, told = _life(
        *(CASES[name][0] for name in ("nothing exists yet", "the checks run", "bad data ends the job"))
    )
    assert told == ["Validating", "InvalidRow"]
    assert status.phase is Phase.FAILED
    assert status.failure is not None
    assert (status.failure.stage, status.failure.exit_code) == (Stage.PREFLIGHT, ExitCode.DATA)
    assert status.failure.message.startswith("2 errors: chat.jsonl:2")
    assert "onBadRow" in status.failure.hint
    assert status.preflight is not None
    assert (status.preflight.result, status.preflight.errors) == (PreflightResult.FAILED, 2)
    assert status.completion_time == END
    assert status.job_name is None
    assert status.stages[0].end_time == END


VALIDATED = {
    "the checks run": "Unknown",
    "the checks passed": "True",
    "bad data ends the job": "False",
    "a crash after the last retry": "Unknown",
    "the deadline has passed": "Unknown",
}


@pytest.mark.parametrize(("name", "truth"), VALIDATED.items())
def test_validated_says_what_the_checks_said(name: str, truth: str) -> None:
    status, _ = _life(CASES[name][0])
    assert {each.type: each.status for each in status.conditions}[ConditionType.VALIDATED] == truth


def test_a_full_store_or_a_small_gpu_is_not_validated() -> None:
    for reason, code in ((FailureReason.BUCKET_NOT_FOUND, 15), (FailureReason.CUDA_OUT_OF_MEMORY, 13)):
        outcome = BAD_ROW.model_copy(update={"reason": reason, "exit_code": ExitCode(code)})
        failed = checking(an_ended_pod(code, outcome), preflight=a_preflight(failed=_failed("PodFailurePolicy")))
        status, _ = _life(failed)
        assert {each.type: each.status for each in status.conditions}[ConditionType.VALIDATED] == "False"


def test_memory_of_the_checks_has_its_own_hint() -> None:
    pod = an_ended_pod(137, terminated={"reason": "OOMKilled"})
    status, _ = _life(checking(pod, preflight=a_preflight(failed=_failed("BackoffLimitExceeded"))))
    assert status.failure is not None
    assert "spec.runPolicy.preflight" in status.failure.hint
    assert "spec.resources" not in status.failure.hint


def test_a_retry_of_the_checks_is_told_and_is_none_of_the_trainer() -> None:
    second = a_running_pod("2", created=20)
    status, told = _life(checking(an_ended_pod(20, AWAY, uid="1")), checking(an_ended_pod(20, AWAY, uid="1"), second))
    assert told == ["Validating", "Retrying"]
    assert status.retries is None
    assert status.attempts == ()


PASSES = [name for name, (observed, _, _) in CASES.items() if decision_about(observed).preflight is not None]


@pytest.mark.parametrize("name", [name for name in CASES if name not in PASSES])
def test_looking_again_later_changes_nothing(name: str) -> None:
    observed = CASES[name][0]
    status = build_status(observed, decision_about(observed))
    seen = replace(observed, status=read_status(status.to_wire()), now=NOW + timedelta(hours=1))
    again = build_status(seen, decision_about(seen))
    assert not has_changed(status, again)
    assert turning_points(status, again) == []


def test_a_status_of_another_version_keeps_that_the_checks_passed() -> None:
    raw = CHECKED.to_wire() | {"fromTheFuture": {"a": 1}}
    read = read_status(raw)
    assert read.preflight is not None
    assert read.preflight.result is PreflightResult.PASSED
    assert read_status(raw | {"preflight": {"result": "Perhaps"}}).preflight is None


def test_the_end_of_the_checks_is_measured_by_the_pod() -> None:
    status, _ = _life(CASES["the checks passed"][0])
    assert status.preflight is not None
    assert status.preflight.start_time == NOW + timedelta(seconds=1)
    assert status.preflight.end_time is not None
    assert status.preflight.end_time.strftime("%Y-%m-%dT%H:%M:%SZ") == at(10)
