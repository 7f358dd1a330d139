"""Judgement of published weights: the losses of the base, of the trained model and of every file on the same rows.

The losses of files are fields of their artifacts; here is what they are measured against.
"""

from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel, Count
from finetune_api.vocabulary import JudgedRows

MAX_WARNINGS = 3
MAX_WARNING_CHARACTERS = 400


class Judgement(ApiModel):
    """Losses on a few rows before and after training, in nats per supervised token, and what published files lost."""

    data: JudgedRows
    """Evaluation or Training: where the rows are from."""

    rows: Count
    """Rows that the losses are measured on."""

    tokens: Count
    """Supervised tokens in these rows."""

    base_loss: float
    """Loss of the base model."""

    adapter_loss: float | None = None
    """Loss of the model as it was trained: the base as it was loaded, with the adapter."""

    merged_loss: float | None = None
    """Loss of the base with the adapter merged into its original weights; absent if it is not a number."""

    warnings: Annotated[
        tuple[Annotated[str, Field(max_length=MAX_WARNING_CHARACTERS)], ...], Field(max_length=MAX_WARNINGS)
    ] = ()
    """Published weights that lost part of the training, with what to do."""
