"""All nine conditions in every situation of a job's life, as a golden file has them: status, reason, message, time."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.failures import FailureReason
from finetune_api.outcome import Outcome, Result
from finetune_api.status import Condition, FineTuneJobStatus
from finetune_api.vocabulary import ConditionType, Stage
from finetune_operator.decide.decision import Decision
from finetune_operator.observe.snapshot import Snapshot, UnreadableSnapshot, Waiting
from finetune_operator.status.status import build_status
from finetune_operator.status_reasons import STATUS_REASONS, StatusReason
from finetune_test_operator.outcomes import BAD_ROW, END, FAILED, STAGES, SUCCEEDED
from finetune_test_operator.snapshot_builder import (
    METADATA,
    NOW,
    a_pod,
    a_preflight_job,
    a_preflight_snapshot,
    a_report,
    a_running_pod,
    a_snapshot,
    a_spec,
    a_trainer_job,
    an_ended_pod,
    an_unreadable_snapshot,
    at,
    decision_about,
)

GOLDEN = Path(__file__).parent / "golden/conditions.yaml"
CHECKED = Outcome(result=Result.SUCCEEDED, message="400 rows", stage=Stage.PREFLIGHT, finished=END)
PAUSED = a_spec(runPolicy={"suspend": True})
LIMITED = a_spec(runPolicy={"startupDeadlineSeconds": 90})
NO_NODE = a_pod(conditions=[{"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}])
NO_IMAGE = a_pod(state={"waiting": {"reason": "ErrImagePull", "message": "not found"}})
RUNS = a_running_pod()
TRAINS = a_snapshot(pods=(RUNS,), report=a_report(stages=STAGES))

Life = dict[str, Snapshot | UnreadableSnapshot]
LIVES: dict[str, Life] = {
    "it passes": {
        "nothing exists yet": a_preflight_snapshot(job=None, config_map=None),
        "the pod of the checks waits": a_preflight_snapshot(a_pod()),
        "the checks run": a_preflight_snapshot(RUNS),
        "the checks passed": a_preflight_snapshot(an_ended_pod(0, CHECKED)),
        "the trainer's Job is made": a_snapshot(job=None),
        "no node fits": a_snapshot(pods=(NO_NODE,)),
        "the trainer runs, silently": a_snapshot(pods=(RUNS,)),
        "the trainer trains": TRAINS,
        "it uploads": a_snapshot(pods=(RUNS,), report=a_report(stage=Stage.UPLOADING)),
        "it has succeeded": a_snapshot(pods=(an_ended_pod(0, SUCCEEDED),)),
    },
    "somebody mends it": {
        "an image is missing": a_snapshot(pods=(NO_IMAGE,)),
        "a quota refuses the pod": a_snapshot(blocker=Waiting("PodRejected", "exceeded quota", is_stalled=True)),
        "it trains": TRAINS,
        "a newer operator's spec cannot be read": an_unreadable_snapshot("spec.magic: unknown", pods=(RUNS,)),
    },
    "it is paused": {
        "it trains": TRAINS,
        "the checkpoint is written": a_snapshot(PAUSED, pods=(RUNS,)),
        "it is suspended": a_snapshot(PAUSED, job=a_trainer_job(PAUSED)),
        "it is resumed": a_snapshot(),
        "it is deleted": a_snapshot(
            metadata=METADATA.model_copy(update={"deletion_timestamp": at(0)}), pods=(a_running_pod(),)
        ),
    },
    "it crashes, and its data are bad": {
        "it runs": a_snapshot(pods=(RUNS,)),
        "another pod follows": a_snapshot(pods=(an_ended_pod(139),)),
        "the last pod has ended": a_snapshot(pods=(an_ended_pod(11, BAD_ROW),)),
        "it has failed": a_snapshot(pods=(an_ended_pod(11, BAD_ROW),), job=a_trainer_job(failed=FAILED)),
    },
    "its pod does not start in time": {
        "no node fits": a_snapshot(LIMITED, pods=(NO_NODE,)),
        "no node fits still": a_snapshot(LIMITED, pods=(NO_NODE,)),
        "it has failed": a_snapshot(LIMITED, pods=(NO_NODE,)),
    },
    "the checks refuse it": {
        "bad data": a_preflight_snapshot(an_ended_pod(11, BAD_ROW), job=a_preflight_job(failed=FAILED)),
    },
    "its result was there": {
        "it is reused": a_preflight_snapshot(an_ended_pod(0, CHECKED.model_copy(update={"reused": True}))),
    },
    "its name is taken": {"a foreign Job is in its place": a_snapshot(job=a_trainer_job(owner="someone"))},
}


def _live(life: Life) -> dict[str, FineTuneJobStatus]:
    """The status in each situation; one a minute."""
    status, found = FineTuneJobStatus(), {}
    for minute, (situation, snapshot) in enumerate(life.items()):
        seen = replace(snapshot, status=status, now=NOW + timedelta(minutes=minute))
        status = build_status(seen, decision_about(seen))
        found[situation] = status
    return found


def _golden(conditions: tuple[Condition, ...]) -> dict[str, str]:
    """Conditions as the golden file writes them: status, reason, the minute of the turn, and the message."""
    minutes = {each.type: (each.last_transition_time - NOW).seconds // 60 for each in conditions}
    return {each.type.value: f"{each.status} {each.reason} {minutes[each.type]}: {each.message}" for each in conditions}


def all_lives() -> dict[str, Any]:
    """What the golden file holds."""
    return {
        name: {situation: _golden(status.conditions) for situation, status in _live(life).items()}
        for name, life in LIVES.items()
    }


@pytest.mark.parametrize("name", LIVES)
def test_the_conditions_are_the_golden_ones(name: str) -> None:
    assert all_lives()[name] == yaml.safe_load(GOLDEN.read_text())[name]


SITUATIONS = {
    f"{name}: {situation}": status for name, life in LIVES.items() for situation, status in _live(life).items()
}


@pytest.mark.parametrize("status", SITUATIONS.values(), ids=SITUATIONS)
def test_kstatus_finds_one_answer(status: FineTuneJobStatus) -> None:
    """It takes the first of Reconciling and Stalled that is true, so a stuck job with both would look busy."""
    true = {each.type for each in status.conditions if each.status == "True"}
    assert len(true & {ConditionType.READY, ConditionType.RECONCILING, ConditionType.STALLED}) <= 1
    assert tuple(each.type for each in status.conditions) == tuple(ConditionType)


@pytest.mark.parametrize("status", SITUATIONS.values(), ids=SITUATIONS)
def test_every_condition_has_a_documented_reason_and_a_message(status: FineTuneJobStatus) -> None:
    documented = {*(reason for reason, row in STATUS_REASONS.items() if row.in_conditions), *FailureReason, *Stage}
    assert {each.reason for each in status.conditions} <= documented
    assert all(each.message for each in status.conditions)
    assert status.reason == next(each.reason for each in status.conditions if each.type is ConditionType.READY)


@pytest.mark.parametrize("status", SITUATIONS.values(), ids=SITUATIONS)
def test_what_is_wrong_is_said_by_no_condition_that_is_not_about_it(status: FineTuneJobStatus) -> None:
    by_type = {each.type: each for each in status.conditions}
    problem = by_type[ConditionType.STALLED]
    if problem.status != "True":
        return
    for kind in (ConditionType.RECONCILING, ConditionType.RUNNING, ConditionType.SUSPENDED):
        assert by_type[kind].message != problem.message


def test_a_refused_write_leaves_what_is_true_of_a_job_that_runs() -> None:
    snapshot = replace(TRAINS, status=build_status(TRAINS, decision_about(TRAINS)))
    refused = Decision(
        snapshot.status.phase or decision_about(snapshot).phase,
        StatusReason.PERMISSION_DENIED,
        "the API server refused PATCH jobs",
        is_stalled=True,
    )
    found = {each.type: each for each in build_status(snapshot, refused).conditions}
    assert (found[ConditionType.RUNNING].status, found[ConditionType.RUNNING].reason) == ("True", "Started")
    assert (found[ConditionType.QUEUED].status, found[ConditionType.QUEUED].reason) == ("False", "Started")
    assert found[ConditionType.STALLED].reason == "PermissionDenied"
