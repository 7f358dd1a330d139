"""Refuses token ids that the model has no embedding for: a tokenizer that belongs to another model."""

from typing import Any

from finetune_api.failures import FailureReason
from finetune_trainer.data.strict_json import excerpt
from finetune_trainer.errors import TrainerError


def check_token_ids(ids: list[int], embedding_rows: int | None, tokenizer: Any) -> None:
    """Raises TrainerError (InvalidConfiguration) if an id is beyond the embedding; None rows are not checked."""
    largest = max(ids, default=0)
    if embedding_rows is not None and largest >= embedding_rows:
        name = tokenizer.convert_ids_to_tokens(largest)
        raise unknown_token_error({largest: str(name)}, embedding_rows)


def unknown_token_error(tokens: dict[int, str], embedding_rows: int) -> TrainerError:
    """The error for tokens (names by id) beyond an embedding of so many rows."""
    number, name = min(tokens.items())
    more = f" and {len(tokens) - 1} more" if len(tokens) > 1 else ""
    message = (
        f"spec.model.source: the tokenizer's token {excerpt(name)} has id {number}{more}, but the model's embedding "
        f"has {embedding_rows} rows, so the tokenizer belongs to another model: use this model's own tokenizer, "
        "or call resize_token_embeddings and save the model again"
    )
    return TrainerError(FailureReason.INVALID_CONFIGURATION, message)
