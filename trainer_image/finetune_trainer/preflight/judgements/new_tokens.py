"""Judges the job's new tokens: what they make of the model, and those that nothing uses, which learn nothing. Pure."""

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune_trainer.chat.new_tokens import EMBEDDING, FIELD, HEAD, check_growable, grown_rows, new_token_ids
from finetune_trainer.data.strict_json import listed
from finetune_trainer.model.safetensors_header import TensorHeader
from finetune_trainer.preflight.report import Finding


@dataclass(frozen=True)
class GrownVocabulary:
    """A model as it will be with rows for new tokens."""

    configuration: Any
    """transformers' configuration of the language model."""
    weights: tuple[TensorHeader, ...] | None
    """Headers of its weights; None if they are not known."""
    sentence: str
    """What trains, for people."""


def plan_vocabulary(
    texts: Sequence[str], tokenizer: Any, configuration: Any, weights: Sequence[TensorHeader] | None
) -> GrownVocabulary:
    """Returns the model with rows for the tokens `texts`, which `tokenizer` has.

    Raises TrainerError (UnsupportedArchitecture) for a model whose vocabulary is more than embedding and head.
    """
    check_growable(configuration.to_dict(), None if weights is None else {header.name for header in weights})
    before, ids = configuration.vocab_size, new_token_ids(tokenizer, texts)
    grown = copy.copy(configuration)
    grown.vocab_size = rows = grown_rows(before, ids)

    headers = None if weights is None else tuple(_grow(header, rows) for header in weights)
    tables = "the embedding" if configuration.tie_word_embeddings else "embedding and head"
    space = f"grows from {before:,} to {rows:,} rows" if rows > before else f"has room for them in its {rows:,} rows"
    return GrownVocabulary(
        grown, headers, f"rows {ids[0]:,} to {ids[-1]:,} of {tables} train beside the adapter; the vocabulary {space}"
    )


def _grow(header: TensorHeader, rows: int) -> TensorHeader:
    return replace(header, shape=(rows, *header.shape[1:])) if header.name in (EMBEDDING, HEAD) else header


def judge_new_tokens(unseen: Collection[str]) -> Iterator[Finding]:
    """A warning about tokens that no row and no chat template holds."""
    if unseen:
        yield Finding.warning(
            FIELD,
            f"{listed(unseen)} occur in no row and not in the chat template: they keep the mean of their pieces in the "
            "embedding, and learn only not to be answered; remove them from the list, or add rows with them",
        )
