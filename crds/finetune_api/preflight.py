"""What preflight found, as the status tells it: few numbers and few words. The whole report lies in S3.

It travels in the termination message, so everything in it has a bound.
"""

from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel
from finetune_api.progress import Count, NonNegative

MOST_WARNINGS = 3
LONGEST_WARNING = 200

Share = Annotated[float, Field(ge=0, le=1)]


class TokenLengths(ApiModel):
    """Tokens per row, before rows are cut to maxSequenceLength."""

    p50: Count
    """Half of the rows have at most so many."""

    p95: Count
    """Nineteen of twenty rows have at most so many."""

    max: Count
    """The longest row."""


class PreflightSummary(ApiModel):
    """What was found."""

    errors: Count | None = None
    """Findings that stop the job."""

    rows: Count | None = None
    """Rows of the dataset."""

    bad_rows: Count | None = None
    """Rows that cannot be used."""

    duplicate_rows: Count | None = None
    """Rows that repeat an earlier one."""

    tokens: TokenLengths | None = None
    """Tokens per row."""

    truncated_share: Share | None = None
    """Share of rows that are cut to maxSequenceLength."""

    supervised_share: Share | None = None
    """Share of the tokens that carry loss."""

    steps: Count | None = None
    """Optimiser steps that will be taken."""

    gpu: str | None = None
    """GPU that the estimate is for, as spec.resources names it."""

    gpu_memory_bytes: Count | None = None
    """Peak GPU memory that the memory plan predicts."""

    smallest_gpu_memory_bytes: Count | None = None
    """Peak GPU memory with training.memory: Smallest."""

    gpu_hours: NonNegative | None = None
    """GPU hours of training, estimated from the tokens and the GPU's speed."""

    warnings: Annotated[
        tuple[Annotated[str, Field(max_length=LONGEST_WARNING)], ...], Field(max_length=MOST_WARNINGS)
    ] = ()
    """The first few warnings."""

    warning_count: Count | None = None
    """How many warnings the report holds."""

    report_uri: str | None = None
    """Where report.html is; report.json lies beside it."""
