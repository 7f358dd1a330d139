"""Judges a scan: turns what was counted into errors and warnings. Pure."""

from collections.abc import Iterator
from typing import Any

from finetune_api.failures import FailureReason
from finetune_api.run_config import RunConfig
from finetune_api.vocabulary import OnBadRow
from finetune_trainer.preflight.report import Finding, RowCounts, TokenStatistics
from finetune_trainer.preflight.scan import Scan

SOURCE = "spec.dataset.source"
EVALUATION = "spec.dataset.evaluation"
SEQUENCE_LENGTH = "spec.model.maxSequenceLength"
CHAT_TEMPLATE = "spec.model.chatTemplate"

MANY = 0.2
"""Share of rows that is worth a warning."""

FIELD_OF = {
    FailureReason.CHAT_TEMPLATE_MISSING: CHAT_TEMPLATE,
    FailureReason.INVALID_CHAT_TEMPLATE: CHAT_TEMPLATE,
}
"""Field to change for errors that come up elsewhere, such as at a row."""

WITH_CONTROL_TOKENS = (
    "contain control tokens as text, which are trained as plain text; if they are meant as control tokens, write rows "
    "of format Text that hold the whole conversation as the model sees it"
)


def judge_rows(scan: Scan, config: RunConfig, source: str = SOURCE) -> Iterator[Finding]:
    """Findings about rows that cannot be used; `source` is the field that names the rows."""
    fails = config.dataset.on_bad_row is OnBadRow.FAIL
    for problem in scan.problems:
        if fails:
            yield Finding.error(problem.location, problem.message, problem.reason)
        else:
            yield Finding.warning(problem.location, f"{problem.message} (the row is skipped)")
    if not fails and scan.unlisted_bad:
        yield Finding.warning(source, f"{scan.unlisted_bad} more rows are skipped; the first are named above")

    # Not an error: the text may be about chat templates.
    if count := scan.rows_with_control_tokens:
        more = ", ..." if count > len(scan.control_token_examples) else ""
        yield Finding.warning(
            source, f"{count} rows ({', '.join(scan.control_token_examples)}{more}) {WITH_CONTROL_TOKENS}"
        )

    if (stopped := scan.stopped) is not None:
        yield Finding.error(FIELD_OF.get(stopped.reason, stopped.location), stopped.message, stopped.reason)
    elif scan.template_problem is not None:
        yield Finding.error(CHAT_TEMPLATE, scan.template_problem, FailureReason.INVALID_CHAT_TEMPLATE)
    elif scan.rows == scan.bad:
        yield Finding.error(source, f"none of {scan.rows} rows can be used", FailureReason.EMPTY_DATASET)


def judge_tokens(counts: RowCounts, tokens: TokenStatistics | None, limit: int) -> Iterator[Finding]:
    """Findings about duplicates and lengths; `limit` is the job's maxSequenceLength."""
    if counts.oversized:
        yield Finding.warning(
            SEQUENCE_LENGTH,
            f"{counts.oversized} rows have more than a million characters: they were not encoded here, and training "
            "truncates them",
        )
    if counts.duplicates > MANY * counts.total:
        yield Finding.warning(SOURCE, f"{counts.duplicates} of {counts.total} rows repeat an earlier row")
    if tokens is None:
        return

    # Oversized rows were not encoded: they may have the tokens with loss that the others lack.
    if tokens.unsupervised_row_share == 1 and not counts.oversized:
        message = f"no token with loss is left within {limit} tokens in any of {tokens.rows} encoded rows"
        yield Finding.error("spec.dataset.trainOn", message, FailureReason.NO_SUPERVISED_TOKENS)
    elif tokens.unsupervised_row_share > 0:
        message = f"{tokens.unsupervised_row_share:.1%} of rows are skipped: no answer starts within {limit} tokens"
        yield Finding.warning(SEQUENCE_LENGTH, message)

    if tokens.truncated_share > MANY:
        message = f"{tokens.truncated_share:.1%} of rows are longer than {limit} tokens and are truncated"
        yield Finding.warning(SEQUENCE_LENGTH, message)


def judge_evaluation(tokens: TokenStatistics | None, limit: int, *, oversized: int) -> Iterator[Finding]:
    """Findings about rows to evaluate on that lose every answer; `oversized` rows were not encoded."""
    if tokens is None or not tokens.unsupervised_row_share:
        return

    if tokens.unsupervised_row_share == 1 and not oversized:
        message = f"no token with loss is left within {limit} tokens in any of {tokens.rows} rows to evaluate on"
        yield Finding.error(EVALUATION, message, FailureReason.NO_SUPERVISED_TOKENS)
    else:
        share = f"{tokens.unsupervised_row_share:.1%} of the rows to evaluate on"
        yield Finding.warning(EVALUATION, f"{share} are left out: no answer starts within {limit} tokens")


def judge_answer_ends(scan: Scan, tokenizer: Any | None) -> Iterator[Finding]:
    """A warning if the chat template never says when an answer is over."""
    if not scan.answers_without_end or tokenizer is None:
        return

    problem = "the chat template ends answers without a control token"
    if (end := tokenizer.eos_token) is None:
        effect = "and the tokenizer has no end-of-sequence token, so the model would never learn to stop"
        remedy = "write a control token behind each answer in spec.model.chatTemplate"
    else:
        effect = f"so {end} is added behind the last answer of each row and learned"
        remedy = "to end the other answers as well, write it behind each of them in spec.model.chatTemplate"
    yield Finding.warning(CHAT_TEMPLATE, f"{problem}, {effect}; {remedy}")
