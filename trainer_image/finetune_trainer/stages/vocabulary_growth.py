"""Rows for new tokens in a loaded model, filled with what training starts from."""

import json
from typing import Any

import torch
from torch import nn

from finetune_trainer.chat.new_tokens import EMBEDDING, HEAD, HEAD_BIAS, check_growable, grown_rows
from finetune_trainer.export.base_model.grown_vocabulary import Pieces, fill_new_rows, split_into_pieces


def grow_vocabulary(model: Any, tokenizer: Any, ids: tuple[int, ...]) -> None:
    """Gives embedding and head of a transformers model rows for the tokens `ids`, which `tokenizer` has.

    Raises TrainerError (UnsupportedArchitecture) for a model whose vocabulary is more than these two.
    """
    if not ids:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    config = model.config.get_text_config()
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    plain = type(head) is nn.Linear and isinstance(embedding, nn.Embedding)
    check_growable(config.to_dict(), names & {EMBEDDING, HEAD, HEAD_BIAS} if plain else ())

    pieces = split_into_pieces(json.loads(tokenizer.backend_tokenizer.to_str()), ids)
    is_tied = head.weight is embedding.weight
    before = embedding.num_embeddings
    rows = grown_rows(before, ids)

    embedding.weight = _grown(embedding.weight, rows, before, pieces)
    head.weight = embedding.weight if is_tied else _grown(head.weight, rows, before, pieces)
    embedding.num_embeddings = head.out_features = config.vocab_size = rows
    if hasattr(model, "vocab_size"):
        model.vocab_size = rows


def _grown(weight: nn.Parameter, rows: int, before: int, pieces: Pieces) -> nn.Parameter:
    """`weight` [before, hidden] with `rows` rows, in its own memory if it has enough."""
    data = weight.data
    if rows > before:
        data = torch.empty(rows, data.shape[1], dtype=data.dtype, device=data.device)
        data[:before] = weight.data
    fill_new_rows(data, before, pieces)
    return nn.Parameter(data, requires_grad=False)
