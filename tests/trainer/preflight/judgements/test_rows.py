"""Judgements: what was counted becomes errors and warnings, each at the field or row to change."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import OnBadRow
from finetune_trainer.preflight.judgements.rows import judge_answer_ends, judge_rows, judge_tokens
from finetune_trainer.preflight.report import Finding, RowCounts, TokenStatistics
from finetune_trainer.preflight.scan import RowProblem, Scan
from finetune_trainer.preflight.statistics import describe_tokens

LIMIT = 64
PROBLEM = RowProblem("rows.jsonl:2", "a role", FailureReason.INVALID_ROW)
ALL_ROWS = RowProblem("rows.jsonl:3", "no column", FailureReason.MISSING_COLUMN)
NO_TEMPLATE = RowProblem("rows.jsonl:1", "none", FailureReason.CHAT_TEMPLATE_MISSING)


def said(findings: Any) -> list[tuple[str, str, str]]:
    """Severity, location and reason of each finding."""
    return [(str(found.severity), found.location, str(found.reason or "")) for found in findings]


def config(on_bad_row: OnBadRow) -> RunConfig:
    return RunConfig.model_construct(dataset=SimpleNamespace(on_bad_row=on_bad_row))


ROWS: dict[str, tuple[Scan, OnBadRow, list[tuple[str, str, str]]]] = {
    "good rows": (Scan(rows=3), OnBadRow.FAIL, []),
    "a bad row": (Scan(rows=3, bad=1, problems=[PROBLEM]), OnBadRow.FAIL, [("Error", "rows.jsonl:2", "InvalidRow")]),
    "a skipped row": (Scan(rows=3, bad=1, problems=[PROBLEM]), OnBadRow.SKIP, [("Warning", "rows.jsonl:2", "")]),
    "more skipped rows than are listed": (
        Scan(rows=9, bad=5, problems=[PROBLEM]),
        OnBadRow.SKIP,
        [("Warning", "rows.jsonl:2", ""), ("Warning", "spec.dataset.source", "")],
    ),
    "control tokens": (
        Scan(rows=3, rows_with_control_tokens=2, control_token_examples=["rows.jsonl:1 (<s>)"]),
        OnBadRow.FAIL,
        [("Warning", "spec.dataset.source", "")],
    ),
    "an error of all rows": (
        Scan(rows=2, stopped=ALL_ROWS),
        OnBadRow.FAIL,
        [("Error", "rows.jsonl:3", "MissingColumn")],
    ),
    "an error of the manifest, met at a row": (
        Scan(rows=0, stopped=NO_TEMPLATE),
        OnBadRow.FAIL,
        [("Error", "spec.model.chatTemplate", "ChatTemplateMissing")],
    ),
    "no rows": (Scan(), OnBadRow.FAIL, [("Error", "spec.dataset.source", "EmptyDataset")]),
}


@pytest.mark.parametrize(("scan", "on_bad_row", "expected"), ROWS.values(), ids=ROWS)
def test_rows_are_judged(scan: Scan, on_bad_row: OnBadRow, expected: list[tuple[str, str, str]]) -> None:
    assert said(judge_rows(scan, config(on_bad_row))) == expected


def test_rows_with_control_tokens_are_named_by_example() -> None:
    scan = Scan(rows=3, rows_with_control_tokens=2, control_token_examples=["rows.jsonl:1 (<s>)"])
    (found,) = judge_rows(scan, config(OnBadRow.FAIL))
    assert found.message.startswith("2 rows (rows.jsonl:1 (<s>), ...) contain control tokens as text")


def counts(**changes: int) -> RowCounts:
    values = {"total": 10, "bad": 0, "duplicates": 0, "duplicates_complete": True, "oversized": 0, "refused": 0}
    return RowCounts.model_validate(values | changes)


def tokens(lengths: list[int], supervised: list[int]) -> TokenStatistics | None:
    return describe_tokens(lengths, supervised, LIMIT)


LENGTH, SOURCE = "spec.model.maxSequenceLength", "spec.dataset.source"
TOKENS: dict[str, tuple[RowCounts, TokenStatistics | None, list[tuple[str, str, str]]]] = {
    "nothing encoded": (counts(), None, []),
    "short rows": (counts(), tokens([9, 9], [3, 3]), []),
    "oversized rows": (counts(oversized=1), None, [("Warning", LENGTH, "")]),
    "a fifth repeated": (counts(duplicates=2), None, []),
    "more than a fifth repeated": (counts(duplicates=3), None, [("Warning", SOURCE, "")]),
    "no token with loss": (
        counts(),
        tokens([9, 9], [0, 0]),
        [("Error", "spec.dataset.trainOn", "NoSupervisedTokens")],
    ),
    "no token with loss, but some rows were not encoded": (
        counts(oversized=1),
        tokens([9, 9], [0, 0]),
        [("Warning", LENGTH, ""), ("Warning", LENGTH, "")],
    ),
    "some rows skipped": (counts(), tokens([9, 9], [3, 0]), [("Warning", LENGTH, "")]),
    "many rows truncated": (counts(), tokens([9, 99], [3, 3]), [("Warning", LENGTH, "")]),
}


@pytest.mark.parametrize(("rows", "statistics", "expected"), TOKENS.values(), ids=TOKENS)
def test_tokens_are_judged(
    rows: RowCounts, statistics: TokenStatistics | None, expected: list[tuple[str, str, str]]
) -> None:
    assert said(judge_tokens(rows, statistics, LIMIT)) == expected


@dataclass(frozen=True)
class Tokenizer:
    eos_token: str | None


@pytest.mark.parametrize(
    ("unended", "tokenizer", "part"),
    [
        (0, Tokenizer("</s>"), None),
        (1, None, None),
        (1, Tokenizer("</s>"), "</s> is added behind the last answer"),
        (1, Tokenizer(None), "the model would never learn to stop"),
    ],
    ids=["all ended", "no tokenizer", "an end is added", "no end there"],
)
def test_answers_without_an_end_are_a_warning(unended: int, tokenizer: Tokenizer | None, part: str | None) -> None:
    found: list[Finding] = list(judge_answer_ends(Scan(answers_without_end=unended), tokenizer))
    assert [part in each.message for each in found if part] == ([True] if part else [])
    assert said(found) == ([("Warning", "spec.model.chatTemplate", "")] if part else [])
