"""What the checks before a GPU leave behind: status, conditions and events."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from finetune_api.failures import ExitCode, FailureReason
from finetune_api.outcome import Outcome, Result
from finetune_api.preflight import PreflightSummary, TokenLengths
from finetune_api.status import FineTuneJobStatus, PreflightStatus
from finetune_api.vocabulary import ConditionType, Phase, PreflightResult, Stage
from finetune_operator.observe.children import TrueCondition
from finetune_operator.observe.observe import read_status
from finetune_operator.observe.snapshot import Snapshot
from finetune_operator.status.events import find_transitions
from finetune_operator.status.status import build_status, has_changed
from finetune_test_operator.snapshot_builder import (
    NOW,
    a_pod,
    a_preflight_job,
    a_preflight_snapshot,
    a_running_pod,
    a_snapshot,
    an_ended_pod,
    at,
    decision_about,
)

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
REFUSED = TrueCondition("PodFailurePolicy", "the Job controller says so", NOW)
GIVEN_UP = TrueCondition("BackoffLimitExceeded", "the Job controller says so", NOW)
EXPIRED = TrueCondition("DeadlineExceeded", "the Job controller says so", NOW)

STATES: dict[str, Snapshot] = {
    "nothing exists yet": a_preflight_snapshot(job=None, config_map=None),
    "a pod waits": a_preflight_snapshot(a_pod(state={"waiting": {"reason": "ErrImagePull"}})),
    "the checks run": a_preflight_snapshot(a_running_pod()),
    "the checks passed": a_preflight_snapshot(an_ended_pod(0, PASSED)),
    "bad data ends the job": a_preflight_snapshot(an_ended_pod(11, BAD_ROW), job=a_preflight_job(failed=REFUSED)),
    "a crash after the last retry": a_preflight_snapshot(an_ended_pod(139), job=a_preflight_job(failed=GIVEN_UP)),
    "the deadline has passed": a_preflight_snapshot(job=a_preflight_job(failed=EXPIRED)),
    "a store that is away": a_preflight_snapshot(an_ended_pod(20, AWAY)),
}
CHECKED = FineTuneJobStatus(phase=Phase.QUEUED, preflight=PreflightStatus(result=PreflightResult.PASSED))
ENDS = [name for name, snapshot in STATES.items() if decision_about(snapshot).preflight is not None]


def _life(*snapshots: Snapshot) -> tuple[FineTuneJobStatus, list[str]]:
    """The last status, and the reasons of all events on the way."""
    status, reported = FineTuneJobStatus(), []
    for snapshot in snapshots:
        seen = replace(snapshot, status=status)
        new = build_status(seen, decision_about(seen))
        reported += [transition.reason for transition in find_transitions(status, new)]
        status = new
    return status, reported


def test_the_story_of_a_job_that_passes() -> None:
    snapshots = [STATES[name] for name in ("nothing exists yet", "the checks run", "the checks passed")]
    after = a_snapshot(job=None)
    status, reported = _life(*snapshots, after, a_snapshot(pods=(a_running_pod(created=20),)))
    assert reported == ["Validating", "PreflightWarning", "Validated", "Queued", "Started"]
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


def test_a_job_whose_result_is_there_succeeds_without_a_trainer() -> None:
    reused = PASSED.model_copy(update={"reused": True, "manifest_uri": "s3://r/manifest.json", "preflight": None})
    status, reported = _life(STATES["the checks run"], a_preflight_snapshot(an_ended_pod(0, reused)))
    assert reported == ["Validating", "Succeeded"]
    assert (status.phase, status.reused, status.manifest_uri) == (Phase.SUCCEEDED, True, reused.manifest_uri)
    assert status.progress is not None
    assert status.progress.percent == 100
    assert status.completion_time == END
    assert status.attempts == ()
    assert {each.type: each.status for each in status.conditions}[ConditionType.VALIDATED] == "True"


def test_the_story_of_a_job_that_fails() -> None:
    names = ("nothing exists yet", "the checks run", "bad data ends the job")
    status, reported = _life(*(STATES[name] for name in names))
    assert reported == ["Validating", "InvalidRow"]
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
    status, _ = _life(STATES[name])
    assert {each.type: each.status for each in status.conditions}[ConditionType.VALIDATED] == truth


def test_a_full_store_or_a_small_gpu_is_not_validated() -> None:
    for reason, code in ((FailureReason.BUCKET_NOT_FOUND, 15), (FailureReason.CUDA_OUT_OF_MEMORY, 13)):
        outcome = BAD_ROW.model_copy(update={"reason": reason, "exit_code": ExitCode(code)})
        failed = a_preflight_snapshot(an_ended_pod(code, outcome), job=a_preflight_job(failed=REFUSED))
        status, _ = _life(failed)
        assert {each.type: each.status for each in status.conditions}[ConditionType.VALIDATED] == "False"


def test_memory_of_the_checks_has_its_own_hint() -> None:
    pod = an_ended_pod(137, terminated={"reason": "OOMKilled"})
    status, _ = _life(a_preflight_snapshot(pod, job=a_preflight_job(failed=GIVEN_UP)))
    assert status.failure is not None
    assert "spec.runPolicy.preflight" in status.failure.hint
    assert "spec.resources" not in status.failure.hint


def test_a_retry_of_the_checks_is_told_and_is_none_of_the_trainer() -> None:
    second = a_running_pod("2", created=20)
    status, reported = _life(
        a_preflight_snapshot(an_ended_pod(20, AWAY, uid="1")),
        a_preflight_snapshot(an_ended_pod(20, AWAY, uid="1"), second),
    )
    assert reported == ["Validating", "Retrying"]
    assert status.retries is None
    assert status.attempts == ()


@pytest.mark.parametrize("name", [name for name in STATES if name not in ENDS and name != "nothing exists yet"])
def test_looking_again_later_changes_nothing(name: str) -> None:
    snapshot = STATES[name]
    status = build_status(snapshot, decision_about(snapshot))
    seen = replace(snapshot, status=read_status(status.to_wire()), now=NOW + timedelta(minutes=59))
    again = build_status(seen, decision_about(seen))
    assert not has_changed(status, again)
    assert find_transitions(status, again) == []


def test_the_end_of_the_checks_is_measured_by_the_pod() -> None:
    status, _ = _life(STATES["the checks passed"])
    assert status.preflight is not None
    assert status.preflight.start_time == NOW + timedelta(seconds=1)
    assert status.preflight.end_time is not None
    assert status.preflight.end_time.strftime("%Y-%m-%dT%H:%M:%SZ") == at(10)
