"""The failure table is complete: a new reason or exit code fails here until each place that must know it does."""

import re
from pathlib import Path

import pytest

from finetune_api import failures
from finetune_api.failures import (
    FAILURES,
    Consequence,
    ExitCode,
    FailureReason,
    PodFailureAction,
    action_after,
    ends_the_job,
    exit_code_of,
    exit_codes_with,
)

CHECKOUT = Path(__file__).parents[2]
OPERATOR_ONLY = {reason for reason, row in FAILURES.items() if row.exit_code is None}


def _given_by(package: str) -> set[FailureReason]:
    """Reasons that the code of a package names."""
    text = "\n".join(path.read_text() for path in (CHECKOUT / package).rglob("*.py"))
    return {FailureReason[name] for name in re.findall(r"\bFailureReason\.([A-Z_0-9]+)\b", text)}


GIVEN_BY_TRAINER = _given_by("trainer_image/finetune_trainer")
GIVEN_BY_OPERATOR = _given_by("operator/finetune_operator")


def test_every_reason_has_a_row_and_every_row_a_reason() -> None:
    assert set(FAILURES) == set(FailureReason)


@pytest.mark.parametrize("reason", FailureReason)
def test_a_hint_is_a_sentence_that_fits_an_event(reason: FailureReason) -> None:
    hint = FAILURES[reason].hint
    assert hint[0].isupper()
    assert hint.endswith(".")
    assert len(hint) < 200


@pytest.mark.parametrize("reason", FailureReason)
def test_a_reason_is_a_word_that_conditions_and_events_allow(reason: FailureReason) -> None:
    assert re.fullmatch(r"[A-Z][A-Za-z]+", reason.value)


@pytest.mark.parametrize("reason", FailureReason)
def test_somebody_gives_every_reason(reason: FailureReason) -> None:
    assert reason in (GIVEN_BY_OPERATOR if reason in OPERATOR_ONLY else GIVEN_BY_TRAINER)


def test_the_trainer_gives_no_reason_without_an_exit_code() -> None:
    assert not GIVEN_BY_TRAINER & OPERATOR_ONLY
    with pytest.raises(ValueError, match="reason of the operator"):
        exit_code_of(FailureReason.EVICTED)


@pytest.mark.parametrize("code", [code for code in ExitCode if code is not ExitCode.SUCCESS])
def test_every_exit_code_has_an_action_and_a_reason(code: ExitCode) -> None:
    assert sum(code in exit_codes_with(action) for action in PodFailureAction) == 1
    assert code in {row.exit_code for row in FAILURES.values()}
    assert code < 64


def test_what_ends_the_job_and_what_is_tried_again_is_what_the_docstring_says() -> None:
    assert exit_codes_with(PodFailureAction.FAIL_JOB) == tuple(range(10, 18))
    assert exit_codes_with(PodFailureAction.IGNORE) == (30, 31, 32)
    assert exit_codes_with(PodFailureAction.COUNT) == (20, 40)
    rows = re.findall(r"^    (\S.*?\S)  +\S.*  (FailJob|Ignore|Count)$", failures.__doc__ or "", flags=re.MULTILINE)
    assert [(action, re.findall(r"\b\d+\b", how)) for how, action in rows] == [
        ("FailJob", ["10", "17"]),
        ("Ignore", ["30"]),
        ("Ignore", ["31", "32"]),
        ("Count", ["20", "40", "128"]),
    ]


@pytest.mark.parametrize("code", [1, 2, 137, 139, 143, 255])
def test_a_crash_or_a_kill_is_tried_again(code: int) -> None:
    assert action_after(code) is PodFailureAction.COUNT


def test_memory_that_runs_out_ends_the_job_whoever_notices_though_a_kill_is_counted() -> None:
    assert ends_the_job(FailureReason.OUT_OF_MEMORY)
    assert action_after(exit_code_of(FailureReason.OUT_OF_MEMORY)) is PodFailureAction.FAIL_JOB
    assert action_after(128 + 9) is PodFailureAction.COUNT
    row = FAILURES[FailureReason.OUT_OF_MEMORY]
    assert (row.after_exit, row.seen_by_operator) == (Consequence.JOB_FAILS, Consequence.JOB_FAILS)


@pytest.mark.parametrize("reason", sorted(OPERATOR_ONLY))
def test_a_reason_of_the_operator_has_a_consequence_and_no_exit_code(reason: FailureReason) -> None:
    assert FAILURES[reason].seen_by_operator is not None
    assert FAILURES[reason].after_exit is None
    assert not ends_the_job(reason)


def test_the_operator_gives_the_reasons_that_the_table_says() -> None:
    # InternalError is what it says of a trainer that gave no reason.
    given = GIVEN_BY_OPERATOR - {FailureReason.INTERNAL_ERROR}
    assert given == {reason for reason, row in FAILURES.items() if row.seen_by_operator is not None}
