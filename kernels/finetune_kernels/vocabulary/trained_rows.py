"""The rows of new tokens, which train beside a frozen embedding and a frozen head.

    embedding:  x[t] = rows[id - first] if first <= id < first + n, else W[id]
    head:       z[:, first : first + n] = h rows^T,  all other columns of z = h W^T

peft holds the rows [n, hidden] (its TrainableTokensLayer) and saves them, but computes with a copy of the whole weight
in every pass, and the gradient of that copy is as large as the weight: 2 GiB each for embedding and head at 8B. Here
nothing of the weight's size is made. Rows that the weight itself has for these tokens are never read.
"""

from functools import partial
from typing import Any

import torch
from torch.nn import functional

from finetune_kernels.ops.linear_cross_entropy import TrainedRows


def frozen_module(module: Any) -> Any:
    """Returns the embedding or head inside peft's wrapper for trained rows; `module` itself if there is none."""
    adapter = getattr(module, "token_adapter", None)
    return module if adapter is None else adapter.base_layer


def trained_rows(module: Any) -> TrainedRows | None:
    """Returns the rows of an embedding or head that train; None if all are frozen."""
    adapter = getattr(module, "token_adapter", None)
    if adapter is None:
        return None

    (name,) = module.active_adapters
    first, *others = adapter.token_indices[name]
    assert others == list(range(first + 1, first + 1 + len(others))), "new tokens have successive ids"
    return TrainedRows(adapter.trainable_tokens_delta[name], first)


def install_trained_rows(causal: Any) -> None:
    """Lets embedding and head of a transformers model compute with the rows that peft gave them, as the formulas above
    say; only the two wrappers get a `forward` of ours."""
    for module, forward in ((causal.get_input_embeddings(), _embed), (causal.get_output_embeddings(), _score)):
        if trained_rows(module) is not None:
            module.forward = partial(forward, module)


def _embed(module: Any, ids: torch.Tensor) -> torch.Tensor:
    found, frozen = trained_rows(module), frozen_module(module)
    assert found is not None
    old: torch.Tensor = frozen(ids)  # [B, T, hidden], scaled if the family scales
    rows = found.rows.to(old.dtype)
    if (scale := getattr(frozen, "embed_scale", None)) is not None:
        rows = rows * (scale.to(old.dtype) if isinstance(scale, torch.Tensor) else scale)

    places = ids - found.first
    is_new = (places >= 0) & (places < rows.shape[0])
    return torch.where(is_new.unsqueeze(-1), functional.embedding(places.clamp(0, rows.shape[0] - 1), rows), old)


def _score(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    found = trained_rows(module)
    assert found is not None
    logits: torch.Tensor = frozen_module(module)(hidden)  # [..., V]
    logits[..., found.columns] = functional.linear(hidden, found.rows.to(hidden.dtype))
    return logits
