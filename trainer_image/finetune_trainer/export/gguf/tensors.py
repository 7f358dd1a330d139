"""Conversion of Hugging Face tensors into those that llama.cpp expects: their names, and changes of their values.

llama.cpp rotates neighbouring dimensions (2i, 2i+1) of q and k for the Llama architecture, Hugging Face dimension i
with i + size/2; the rows of both projections are reordered so that the products are the same. Gemma multiplies by 1 +
weight in its norms, llama.cpp by the weight.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from gguf import get_tensor_name_map

from finetune_trainer.export.errors import InvalidBaseError, UnsupportedArchitectureError
from finetune_trainer.export.gguf.families import GgufFamily

# Buffers that old checkpoints carry: llama.cpp computes them, and every converter leaves them out.
COMPUTED_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attention\.masked_bias|self_attn\.bias)$")
OUTPUT_HEAD = "lm_head.weight"


class TensorConverter:
    """Names and transforms the tensors of one model; it holds no weights."""

    def __init__(self, family: GgufFamily, config: Mapping[str, Any]) -> None:
        self._family = family
        self._names = get_tensor_name_map(family.architecture, config["num_hidden_layers"])
        self._heads = {".q_proj.": config["num_attention_heads"], ".k_proj.": config["num_key_value_heads"]}
        self._is_tied = bool(config["tie_word_embeddings"])

    def rename(self, name: str) -> str | None:
        """The GGUF name of Hugging Face tensor `name`; None if GGUF leaves the tensor out.

        Raises InvalidBaseError if the architecture has no such tensor, UnsupportedArchitectureError if that is a head.
        """
        if COMPUTED_BUFFERS.search(name) or (self._is_tied and name == OUTPUT_HEAD):
            return None

        renamed = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if renamed is None and name == OUTPUT_HEAD:
            raise UnsupportedArchitectureError(
                "llama.cpp uses the embedding as output head of this architecture, but the weights hold a head of "
                "their own: export without GGUF"
            )
        if renamed is None:
            raise InvalidBaseError(
                f"tensor {name!r} has no name in GGUF's {self._family.architecture.name} architecture; "
                "is this a plain checkpoint of that family?"
            )
        return renamed

    def transform(self, name: str, weights: torch.Tensor) -> torch.Tensor:
        """The values that llama.cpp expects for Hugging Face tensor `name`, of the same shape.

        They are fp32 if arithmetic was needed, and of the same type otherwise.
        """
        if self._family.permuted_heads:
            for part, heads in self._heads.items():
                if part in name:  # weight [heads * size, hidden] or bias [heads * size]
                    return interleave_heads(weights, heads)

        if self._family.norm_offset and name.endswith("norm.weight"):
            return weights.to(torch.float32) + self._family.norm_offset
        return weights

    def restore(self, name: str, weights: torch.Tensor) -> torch.Tensor:
        """The values of Hugging Face tensor `name` from those that llama.cpp expects: the inverse of `transform`."""
        if self._family.permuted_heads:
            for part, heads in self._heads.items():
                if part in name:
                    return separate_heads(weights, heads)

        if self._family.norm_offset and name.endswith("norm.weight"):
            return weights.to(torch.float32) - self._family.norm_offset
        return weights


def interleave_heads(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows [heads * size, ...] so that dimensions i and i + size/2 of each head become neighbours."""
    halves = weights.reshape(heads, 2, -1, *weights.shape[1:])  # [heads, 2, size / 2, ...]
    return halves.transpose(1, 2).reshape(weights.shape)


def separate_heads(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows [heads * size, ...] so that neighbours of each head are size/2 apart: undoes `interleave_heads`."""
    pairs = weights.reshape(heads, -1, 2, *weights.shape[1:])  # [heads, size / 2, 2, ...]
    return pairs.transpose(1, 2).reshape(weights.shape)
