"""All nine conditions in every situation of a job's life, as a golden file has them: status, reason, message, time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.failures import FailureReason
from finetune_api.status import Condition, FineTuneJobStatus
from finetune_api.vocabulary import ConditionType, Stage
from finetune_operator.decide.decision import Decision
from finetune_operator.status.status import build_status
from finetune_operator.status_reasons import STATUS_REASONS, StatusReason
from finetune_test_operator.situations import LIVES, TRAINS, live
from finetune_test_operator.snapshot_builder import NOW, decision_about

GOLDEN = Path(__file__).parent / "golden/conditions.yaml"


def _golden(conditions: tuple[Condition, ...]) -> dict[str, str]:
    """Conditions as the golden file writes them: status, reason, the minute of the turn, and the message."""
    minutes = {each.type: (each.last_transition_time - NOW).seconds // 60 for each in conditions}
    return {each.type.value: f"{each.status} {each.reason} {minutes[each.type]}: {each.message}" for each in conditions}


def all_lives() -> dict[str, Any]:
    """What the golden file holds."""
    return {
        name: {situation: _golden(status.conditions) for situation, status in live(life).items()}
        for name, life in LIVES.items()
    }


@pytest.mark.parametrize("name", LIVES)
def test_the_conditions_are_the_golden_ones(name: str) -> None:
    assert all_lives()[name] == yaml.safe_load(GOLDEN.read_text())[name]


SITUATIONS = {
    f"{name}: {situation}": status for name, life in LIVES.items() for situation, status in live(life).items()
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
