"""Summary of preflight's findings for the status; the full report is in S3.

The summary travels in the termination message, so every field has a bound.
"""

from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel, Count, Name, NonNegative, Share, Uri

MAX_WARNINGS = 5
MAX_WARNING_CHARACTERS = 320


class TokenLengths(ApiModel):
    """Tokens per row, before rows are truncated to maxSequenceLength."""

    p50: Count
    """Median tokens per row."""

    p95: Count
    """95th percentile of tokens per row."""

    max: Count
    """Tokens of the longest row."""


class PreflightSummary(ApiModel):
    """Findings of preflight."""

    errors: Count | None = None
    """Number of findings that stop the job."""

    rows: Count | None = None
    """Rows in the dataset."""

    bad_rows: Count | None = None
    """Rows that cannot be used."""

    duplicate_rows: Count | None = None
    """Rows that repeat an earlier one."""

    tokens: TokenLengths | None = None
    """Tokens per row."""

    truncated_share: Share | None = None
    """Share of rows that are truncated to maxSequenceLength."""

    supervised_share: Share | None = None
    """Share of the tokens that carry loss."""

    steps: Count | None = None
    """Optimiser steps that training will take."""

    gpu: Name | None = None
    """GPU that the estimate is for, as spec.resources names it."""

    gpu_memory_bytes: Count | None = None
    """Peak GPU memory that the memory plan predicts."""

    smallest_gpu_memory_bytes: Count | None = None
    """Peak GPU memory with training.memory: Smallest."""

    gpu_hours: NonNegative | None = None
    """GPU hours of training, estimated from the tokens and the GPU's speed."""

    warnings: Annotated[
        tuple[Annotated[str, Field(max_length=MAX_WARNING_CHARACTERS)], ...], Field(max_length=MAX_WARNINGS)
    ] = ()
    """The first few warnings."""

    warning_count: Count | None = None
    """Number of warnings in the report."""

    report_uri: Uri | None = None
    """URI of report.html; report.json is beside it."""
