"""Judges rows that the tokenizer does not know: their words all become one token, so nothing is learned. Pure."""

from collections.abc import Iterator, Sequence

from finetune_api.failures import FailureReason
from finetune_trainer.preflight.report import Finding
from finetune_trainer.preflight.sampling import MeasuredRow

MOSTLY = 0.5
"""Share of a row's tokens above which it is mostly unknown, and share of such rows that no training is worth."""
SOME = 0.01
"""Share of all tokens that is worth a warning."""


def judge_unknown_tokens(rows: Sequence[MeasuredRow]) -> Iterator[Finding]:
    """An error if most rows are mostly unknown tokens; a warning if some tokens are unknown."""
    unknown = sum(row.unknown for row in rows)
    if not unknown:
        return

    mostly = sum(row.unknown > MOSTLY * row.length for row in rows) / len(rows)
    share = unknown / sum(row.length for row in rows)
    if mostly >= MOSTLY:
        message = (
            f"{mostly:.1%} of the encoded rows are mostly tokens that the tokenizer does not know ({share:.1%} of all "
            "tokens): check that it is the model's own tokenizer, or take a model that knows the rows' script"
        )
        yield Finding.error("spec.model.source", message, FailureReason.INVALID_CONFIGURATION)
    elif share > SOME:
        message = f"{share:.1%} of the rows' tokens are unknown to the tokenizer, which learns them as one and the same"
        yield Finding.warning("spec.dataset.source", message)
