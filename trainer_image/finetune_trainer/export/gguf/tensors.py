"""Conversion of Hugging Face tensors into those that llama.cpp expects: their names, and changes of their values.

llama.cpp rotates neighbouring dimensions (2i, 2i+1) of q and k for the Llama architecture, Hugging Face dimension i
with i + size/2; the rows of both projections are reordered so that the products are the same. Gemma multiplies by 1 +
weight in its norms, llama.cpp by the weight.
"""

from collections.abc import Mapping
from typing import Any

import torch

from finetune_trainer.export.gguf.families import GgufFamily
from finetune_trainer.export.gguf.tensor_names import TensorNames


class TensorConverter:
    """Names and transforms the tensors of one model; it holds no weights."""

    def __init__(self, family: GgufFamily, config: Mapping[str, Any]) -> None:
        self._family = family
        self._names = TensorNames(family, config)
        self._heads = {".q_proj.": config["num_attention_heads"], ".k_proj.": config["num_key_value_heads"]}

    def rename(self, name: str) -> str | None:
        """The GGUF name of Hugging Face tensor `name`; None if GGUF leaves the tensor out. Raises as TensorNames."""
        return self._names.rename(name)

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
