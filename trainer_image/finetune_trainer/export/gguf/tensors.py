"""From a Hugging Face tensor to the one llama.cpp expects: its name, and what must be done to its values.

llama.cpp rotates neighbouring dimensions (2i, 2i+1) of q and k for the Llama architecture, Hugging Face dimension i
with i + size/2; the rows of both projections are reordered so that the products are the same. Gemma multiplies by 1 +
weight in its norms, llama.cpp by the weight.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from gguf import get_tensor_name_map

from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.gguf.families import GgufFamily

# Buffers that old checkpoints carry: llama.cpp computes them, and every converter leaves them out.
COMPUTED_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attention\.masked_bias|self_attn\.bias)$")
OUTPUT_HEAD = "lm_head.weight"


class TensorConverter:
    """Names and transforms the tensors of one model; it holds no weights."""

    def __init__(self, family: GgufFamily, config: Mapping[str, Any]) -> None:
        self._family = family
        self._names = get_tensor_name_map(family.architecture, config["num_hidden_layers"])
        self._heads = {
            ".q_proj.": config["num_attention_heads"],
            ".k_proj.": config["num_key_value_heads"],
        }
        self._tied = bool(config["tie_word_embeddings"])

    @property
    def output_name(self) -> str:
        """The GGUF name of the tensor that makes the logits: the embedding where the two are tied."""
        return "token_embd.weight" if self._tied else "output.weight"

    def rename(self, name: str) -> str | None:
        """The GGUF name of Hugging Face tensor `name`; None for what GGUF leaves out. Raises where it has no name."""
        if COMPUTED_BUFFERS.search(name) or (self._tied and name == OUTPUT_HEAD):
            return None
        renamed = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if renamed is None:
            raise InvalidBaseError(
                f"tensor {name!r} has no name in GGUF's {self._family.architecture.name} architecture; "
                "is this a plain checkpoint of that family?"
            )
        return renamed

    def transform(self, name: str, weights: torch.Tensor) -> torch.Tensor:
        """The values llama.cpp expects for Hugging Face tensor `name`, of the same shape: fp32 where arithmetic was
        needed."""
        if self._family.permuted_heads:
            for part, heads in self._heads.items():
                if part in name:
                    return interleave_heads(weights, heads)
        if self._family.norm_offset and name.endswith("norm.weight"):
            return weights.to(torch.float32) + self._family.norm_offset
        return weights


def interleave_heads(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rows [heads * size, ...] so that dimensions i and i + size/2 of each head become neighbours."""
    halves = weights.reshape(heads, 2, -1, *weights.shape[1:])  # heads, half, size / 2, ...
    return halves.transpose(1, 2).reshape(weights.shape)
