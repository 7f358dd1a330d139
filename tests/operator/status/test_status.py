"""The status as a whole: conditions, progress, attempts, and that nothing known is lost."""

from dataclasses import replace
from datetime import timedelta

import pytest

from finetune_api.failures import ExitCode, FailureReason
from finetune_api.outcome import FailedExport, Result
from finetune_api.status import FineTuneJobStatus
from finetune_api.vocabulary import ArtifactType, ConditionType, Phase, Stage
from finetune_operator.observe.observe import read_status
from finetune_operator.observe.snapshot import Snapshot
from finetune_operator.status.events import find_transitions
from finetune_operator.status.status import build_status, has_changed
from finetune_test_operator.outcomes import ARTIFACT, BAD_ROW, END, FAILED, STAGES, SUCCEEDED
from finetune_test_operator.snapshot_builder import (
    METADATA,
    NOW,
    a_pod,
    a_report,
    a_running_pod,
    a_snapshot,
    a_spec,
    a_trainer_job,
    an_ended_pod,
    decision_about,
)


def _status_of(snapshot: Snapshot) -> FineTuneJobStatus:
    return build_status(snapshot, decision_about(snapshot))


def _truths(status: FineTuneJobStatus) -> dict[ConditionType, str]:
    return {condition.type: condition.status for condition in status.conditions}


TRUTHS: dict[str, tuple[Snapshot, set[str]]] = {
    "queued": (a_snapshot(), {"Queued", "Reconciling"}),
    "running": (a_snapshot(pods=(a_running_pod(),)), {"Running", "Reconciling"}),
    "training": (
        a_snapshot(pods=(a_running_pod(),), report=a_report()),
        {"Running", "Reconciling", "Validated"},
    ),
    "waiting for a person": (
        a_snapshot(pods=(a_pod(state={"waiting": {"reason": "ErrImagePull"}}),)),
        {"Queued", "Stalled"},
    ),
    "suspended": (a_snapshot(a_spec(runPolicy={"suspend": True})), {"Suspended"}),
    "succeeded": (a_snapshot(pods=(an_ended_pod(0, SUCCEEDED),)), {"Ready", "Succeeded", "Validated"}),
    "failed": (
        a_snapshot(pods=(an_ended_pod(11, BAD_ROW),), job=a_trainer_job(failed=FAILED)),
        {"Failed", "Stalled"},
    ),
}


@pytest.mark.parametrize(("snapshot", "true"), TRUTHS.values(), ids=TRUTHS)
def test_which_conditions_are_true(snapshot: Snapshot, true: set[str]) -> None:
    if snapshot.training.report:
        snapshot = replace(snapshot, training=replace(snapshot.training, report=a_report(stages=STAGES)))
    status = _status_of(snapshot)
    assert {kind for kind, truth in _truths(status).items() if truth == "True"} == true
    assert set(_truths(status)) == set(ConditionType)
    assert all(each.observed_generation == METADATA.generation and each.reason for each in status.conditions)


def test_bad_inputs_are_not_validated() -> None:
    assert _truths(_status_of(TRUTHS["failed"][0]))[ConditionType.VALIDATED] == "False"


def test_a_condition_keeps_its_time_until_it_turns() -> None:
    first = _status_of(a_snapshot())
    later = a_snapshot(status=first, pods=(a_running_pod(),), now=NOW + timedelta(minutes=1))
    times = {each.type: each.last_transition_time for each in _status_of(later).conditions}
    assert times[ConditionType.RECONCILING] == NOW
    assert times[ConditionType.RUNNING] == times[ConditionType.QUEUED] == NOW + timedelta(minutes=1)


@pytest.mark.parametrize("name", TRUTHS)
def test_looking_again_later_changes_nothing(name: str) -> None:
    snapshot = TRUTHS[name][0]
    status = _status_of(snapshot)
    again = _status_of(replace(snapshot, status=read_status(status.to_wire()), now=NOW + timedelta(minutes=59)))
    assert not has_changed(status, again)
    assert find_transitions(status, again) == []


def test_a_changed_phase_is_a_change() -> None:
    assert has_changed(_status_of(a_snapshot()), _status_of(a_snapshot(pods=(a_running_pod(),))))


def test_a_report_becomes_progress() -> None:
    report = a_report(step=8, totalSteps=20, loss=1.5, checkpointStep=5, resolved={"rows": 9}, stages=STAGES)
    status = _status_of(a_snapshot(pods=(a_running_pod(),), report=report))
    assert status.progress is not None
    assert (status.progress.step, status.progress.percent, status.progress.eta) == (8, 40, "1m15s")
    assert status.progress.last_report_time == NOW
    assert status.checkpoint_step == 5
    assert status.resolved is not None
    assert status.resolved.rows == 9
    assert status.start_time == NOW + timedelta(seconds=1)


def test_the_last_words_of_a_pod_count_though_another_one_runs_before_they_are_seen() -> None:
    stopped = SUCCEEDED.model_copy(update={"result": Result.INTERRUPTED, "checkpoint_step": 7})
    pods = (an_ended_pod(30, stopped, uid="old"), a_running_pod())
    late = _status_of(a_snapshot(pods=pods))
    assert late.checkpoint_step == 7
    # Once its end is known, it says nothing new: the pod that runs is further by now.
    later = late.model_copy(update={"checkpoint_step": 20})
    assert _status_of(a_snapshot(pods=pods, status=later)).checkpoint_step == 20


def test_only_the_outcome_can_say_one_hundred_percent() -> None:
    running = _status_of(a_snapshot(pods=(a_running_pod(),), report=a_report(percent=100)))
    assert running.progress is not None
    assert running.progress.percent == 99
    done = _status_of(a_snapshot(pods=(an_ended_pod(0, SUCCEEDED),), status=running))
    assert done.progress is not None
    assert (done.progress.percent, done.progress.completion, done.progress.eta) == (100, "100%", None)


def test_success_takes_everything_from_the_outcome_and_the_last_report() -> None:
    report = a_report(7, stages=STAGES, learningRate=0.1)
    status = _status_of(a_snapshot(pods=(an_ended_pod(0, SUCCEEDED),), report=report))
    assert status.artifacts == (ARTIFACT,)
    assert status.manifest_uri == SUCCEEDED.manifest_uri
    assert status.hub_url == SUCCEEDED.hub_url
    assert status.reused is False
    assert status.progress is not None
    assert (status.progress.step, status.progress.loss, status.progress.learning_rate) == (20, 1.25, 0.1)
    assert status.completion_time == END
    assert [stage.end_time for stage in status.stages] == [NOW + timedelta(seconds=2), END]


def test_failure_keeps_what_was_reported() -> None:
    before = _status_of(a_snapshot(pods=(a_running_pod(),), report=a_report(step=8, checkpointStep=5)))
    snapshot = TRUTHS["failed"][0]
    status = _status_of(replace(snapshot, status=before))
    assert status.failure is not None
    assert (status.failure.reason, status.failure.stage) == ("InvalidRow", Stage.DATA_FORMATTING)
    assert status.checkpoint_step == 5
    assert status.artifacts == ()


def test_a_terminal_status_only_answers_new_generations() -> None:
    done = _status_of(TRUTHS["succeeded"][0])
    metadata = METADATA.model_copy(update={"generation": 2})
    late = a_snapshot(metadata=metadata, status=done, report=a_report(99, step=1), now=NOW + timedelta(hours=1))
    again = _status_of(late)
    assert again.observed_generation == 2
    assert {each.observed_generation for each in again.conditions} == {2}
    same = again.model_copy(update={"observed_generation": 1, "conditions": done.conditions})
    assert same == done


@pytest.mark.parametrize("name", TRUTHS)
def test_a_job_that_is_over_stays_over_whatever_is_decided(name: str) -> None:
    for over in ("succeeded", "failed"):
        done = _status_of(TRUTHS[over][0])
        late = replace(TRUTHS[name][0], status=done)
        assert build_status(late, decision_about(TRUTHS[name][0])) == done


def test_a_terminal_status_that_is_read_in_part_is_not_written_again() -> None:
    """A newer operator wrote it: with the fields that this one does not know, the artifacts would be lost."""
    wire = _status_of(TRUTHS["succeeded"][0]).to_wire() | {"fromTheFuture": True}
    read = read_status(wire)
    assert read.phase is Phase.SUCCEEDED
    assert not has_changed(read, _status_of(replace(TRUTHS["succeeded"][0], status=read)))


def test_a_new_pod_starts_a_new_sequence() -> None:
    first = _status_of(a_snapshot(pods=(a_running_pod("1"),), report=a_report(9, pod="1", step=8)))
    pods = (an_ended_pod(30, uid="1"), a_running_pod("2", created=20))
    second = _status_of(a_snapshot(pods=pods, status=first))
    assert second.progress is not None
    assert (second.progress.step, second.progress.sequence) == (8, None)


MEMORY = {"mode": "Fastest", "predictedPeakBytes": 30, "microBatch": 8}


def test_best_step_and_memory_come_from_the_outcome_too() -> None:
    report = a_report(7, pod="1", bestStep=2, bestEvalLoss=1.5, memory=MEMORY)
    status = _status_of(a_snapshot(pods=(a_running_pod("1"),), report=report))
    assert status.progress is not None
    assert (status.progress.best_step, status.progress.best_eval_loss) == (2, 1.5)
    memory = status.memory.model_copy(update={"measured_peak_bytes": 31}) if status.memory else None
    outcome = SUCCEEDED.model_copy(
        update={"best_step": 4, "best_eval_loss": 1.25, "stopped_early": True, "memory": memory}
    )
    done = _status_of(a_snapshot(pods=(an_ended_pod(0, outcome, uid="1"),), status=status))
    assert done.progress is not None
    assert (done.progress.best_step, done.progress.best_eval_loss, done.progress.stopped_early) == (4, 1.25, True)
    assert done.memory == memory


def test_a_job_whose_export_failed_shows_what_it_published() -> None:
    """Nothing that worked is lost, and the job has failed, so that nobody overlooks it."""
    missing = FailedExport(type=ArtifactType.GGUF, quantization="Q8_0", message="no such words")
    outcome = SUCCEEDED.model_copy(
        update={
            "result": Result.FAILED,
            "reason": FailureReason.EXPORT_FAILED,
            "message": "not GGUF Q8_0. To go on: finetune export --gguf Q8_0",
            "exit_code": ExitCode.EXPORT,
            "failed_exports": (missing,),
        }
    )
    status = _status_of(a_snapshot(pods=(an_ended_pod(17, outcome),), job=a_trainer_job(failed=FAILED)))
    assert (status.phase, status.artifacts, status.manifest_uri) == (Phase.FAILED, (ARTIFACT,), SUCCEEDED.manifest_uri)
    assert status.failed_exports == (missing,)
    assert status.failure is not None
    assert (status.failure.reason, status.failure.exit_code) == ("ExportFailed", 17)
    assert "finetune export --gguf Q8_0" in status.failure.message
