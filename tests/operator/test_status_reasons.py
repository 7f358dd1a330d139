"""Every reason has its row, its place in the code and its line in the documents; a new one fails until it does."""

import re
from pathlib import Path
from runpy import run_path

import pytest

import finetune_operator
from finetune_api.failures import FAILURES, Consequence, FailureReason
from finetune_api.vocabulary import Stage
from finetune_operator.status_reasons import STATUS_REASONS, StatusReason, is_warning

CHECKOUT = Path(__file__).parents[2]
OPERATOR = Path(finetune_operator.__file__).parent
STALLED = {reason for reason, row in STATUS_REASONS.items() if row.is_stalled}


def _named_in(*places: str) -> set[StatusReason]:
    """Reasons that files or folders of the operator name."""
    files = [
        path for place in places for path in [OPERATOR / place, *(OPERATOR / place).rglob("*.py")] if path.is_file()
    ]
    assert files
    text = "\n".join(path.read_text() for path in files)
    return {StatusReason[name] for name in re.findall(r"\bStatusReason\.([A-Z_]+)\b", text)}


def test_every_reason_has_a_row() -> None:
    assert set(STATUS_REASONS) == set(StatusReason)


@pytest.mark.parametrize("reason", StatusReason)
def test_a_meaning_is_a_sentence_and_a_reason_is_a_word(reason: StatusReason) -> None:
    assert STATUS_REASONS[reason].meaning.endswith(".")
    assert re.fullmatch(r"[A-Z][A-Za-z]+", reason.value)


def test_reasons_of_conditions_are_those_that_decisions_give() -> None:
    given = _named_in("decide", "observe", "reconcile.py", "status/conditions.py", "status/validated.py")
    assert given == {reason for reason, row in STATUS_REASONS.items() if row.in_conditions}


def test_reasons_of_events_are_those_that_transitions_give() -> None:
    given = _named_in("status/events.py") | STALLED
    assert given == {reason for reason, row in STATUS_REASONS.items() if row.event is not None}


def test_reasons_of_attempts_stand_nowhere_else() -> None:
    elsewhere = {reason for reason, row in STATUS_REASONS.items() if row.in_conditions or row.event}
    assert _named_in("status/attempts.py") == set(StatusReason) - elsewhere


def test_who_waits_for_a_person_is_warned() -> None:
    assert all(is_warning(reason) for reason in STALLED)
    waits = {reason for reason, row in FAILURES.items() if row.seen_by_operator is Consequence.WAITS}
    assert all(is_warning(reason) for reason in waits)


@pytest.mark.parametrize("reason", FailureReason)
def test_a_failure_is_a_warning(reason: FailureReason) -> None:
    assert is_warning(reason)


@pytest.mark.parametrize("stage", Stage)
def test_a_stage_is_no_warning(stage: Stage) -> None:
    assert not is_warning(stage.value)


def test_the_documents_list_every_reason() -> None:
    page = run_path(str(CHECKOUT / "tests/repository/reason_table.py"))["page"]()
    assert (CHECKOUT / "docs/reasons.md").read_text() == page, "run `make generate`"
    for reason in (*FailureReason, *StatusReason):
        assert f"| {reason.value} |" in page
