"""A vocabulary with new tokens: the rows of embedding and head that training starts from, and that a merge fills.

A new token's rows are the mean of the rows of the pieces that its text had before, which is what the model made of it
so far, at least to a first approximation. Rows behind the last token, which round the number up, are the mean of all
rows: such a token is never the most probable one. Rejected: transformers' random numbers around the mean of all rows,
with which a token begins as any other.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer

from finetune_api.base import Json
from finetune_trainer.chat.new_tokens import EMBEDDING, HEAD, grown_rows
from finetune_trainer.export.tensor_io.safetensors_files import StoredTensor

TRAINED_ROWS = "trainable_token_indices"
"""peft's setting of the rows that an adapter trains."""
Pieces = Mapping[int, tuple[int, ...]]
"""Ids of the pieces that a new token's text had before, by the new token's id."""


def trained_rows_of(setting: Any) -> list[tuple[str, list[int]]]:
    """Returns the rows that peft's setting names, by the last part of the name of their layer."""
    if isinstance(setting, dict):
        return [(str(layer).rsplit(".", 1)[-1], list(ids)) for layer, ids in setting.items()]
    return [("embed_tokens", list(setting))] if setting else []


def split_into_pieces(description: Json, ids: Collection[int]) -> Pieces:
    """Returns the pieces of the added tokens `ids` of a parsed tokenizer.json, as it encodes them without these."""
    added: list[Json] = description["added_tokens"]
    before = description | {"added_tokens": [token for token in added if token["id"] not in ids]}
    tokenizer = Tokenizer.from_str(json.dumps(before))
    texts = {token["id"]: token["content"] for token in added if token["id"] in ids}
    return {number: tuple(tokenizer.encode(text, add_special_tokens=False).ids) for number, text in texts.items()}


@torch.no_grad()
def fill_new_rows(weights: torch.Tensor, before: int, pieces: Pieces) -> None:
    """Writes the rows [hidden] of new tokens into `weights` [rows, hidden], of which the first `before` are there."""
    old = weights[:before]
    if before < weights.shape[0]:
        weights[before:] = old.mean(0, dtype=torch.float32).to(weights.dtype)
    for number, parts in pieces.items():
        if parts:
            weights[number] = old[list(parts)].float().mean(0).to(weights.dtype)


@dataclass(frozen=True)
class GrownTensor(StoredTensor):
    """An embedding or head with rows for new tokens: offset and size are those of the stored rows."""

    stored: StoredTensor
    pieces: Pieces

    def to_values(self, data: torch.Tensor) -> torch.Tensor:
        """Decode the stored rows, and add the new ones."""
        old = self.stored.to_values(data)
        grown = old.new_empty(self.shape)
        grown[: old.shape[0]] = old
        fill_new_rows(grown, old.shape[0], self.pieces)
        return grown


def grow(tensors: Sequence[StoredTensor], pieces: Pieces) -> tuple[StoredTensor, ...]:
    """Return the tensors with rows for the tokens of `pieces` in embedding and head."""
    return tuple(_grow(tensor, pieces) if tensor.name in (EMBEDDING, HEAD) else tensor for tensor in tensors)


def _grow(tensor: StoredTensor, pieces: Pieces) -> StoredTensor:
    rows, hidden = tensor.shape
    shape = (grown_rows(rows, pieces), hidden)
    place = (tensor.path, tensor.offset, tensor.size)
    return GrownTensor(tensor.name, tensor.dtype, shape, *place, stored=replace(tensor), pieces=pieces)
