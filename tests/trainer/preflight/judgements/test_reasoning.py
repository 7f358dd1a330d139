"""Reasoning that the chat template leaves out or doubles is said, with counts, examples and what to do."""

from collections.abc import Sequence

import pytest

from finetune_trainer.chat.sandbox.reasoning import Fate
from finetune_trainer.preflight.judgements.reasoning import judge_reasoning
from finetune_trainer.preflight.tallies.reasoning import ReasoningTally

P, L, D = Fate.PRINTED, Fate.LEFT_OUT, Fate.DOUBLED
ROWS: dict[str, tuple[list[Sequence[Fate]], list[str]]] = {
    "no reasoning": ([(), ()], []),
    "reasoning that is printed": ([(P,), (P, P)], []),
    "all left out": (
        [(L,), (), (L, L)],
        ["leaves out the reasoning of 3 of 3 answers that have some, in 2 rows (a:1, a:3) of 3 encoded: .*a template"],
    ),
    "all but the last turn": (
        [(L, L, P)],
        ["the reasoning of 2 of 3 answers .*in 1 row (a:1) of 1 encoded: .*that of the other 1, .*end a row behind"],
    ),
    "doubled": ([(D,)], ["prints the reasoning of 1 answers, or the tag in front of it, twice, in 1 row (a:1)"]),
    "both": ([(D,), (L,)], ["leaves out", "twice"]),
}


@pytest.mark.parametrize(("rows", "said"), ROWS.values(), ids=ROWS)
def test_what_becomes_of_reasoning_is_judged(rows: list[Sequence[Fate]], said: list[str]) -> None:
    tally = ReasoningTally()
    for number, fates in enumerate(rows, 1):
        tally.add(f"a:{number}", fates)

    found = list(judge_reasoning(tally))
    assert len(found) == len(said)
    for finding, expected in zip(found, said, strict=True):
        assert (finding.severity, finding.location) == ("Warning", "spec.model.chatTemplate")
        parts = expected.split(".*")
        assert all(part in finding.message for part in parts), finding.message


def test_five_rows_are_named() -> None:
    tally = ReasoningTally()
    for number in range(1, 9):
        tally.add(f"a:{number}", (L,))
    (finding,) = judge_reasoning(tally)
    assert "in 8 rows (a:1, a:2, a:3, a:4, a:5, ...) of 8 encoded" in finding.message
