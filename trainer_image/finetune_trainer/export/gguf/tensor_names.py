"""Names of the tensors in GGUF files, from those in Hugging Face's. Needs no PyTorch."""

import re
from collections.abc import Mapping
from typing import Any

from gguf import get_tensor_name_map

from finetune_trainer.export.errors import InvalidBaseError, UnsupportedArchitectureError
from finetune_trainer.export.gguf.families import GgufFamily

# Buffers that old checkpoints carry: llama.cpp computes them, and every converter leaves them out.
COMPUTED_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attention\.masked_bias|self_attn\.bias)$")
OUTPUT_HEAD = "lm_head.weight"


class TensorNames:
    """The names of one model's tensors."""

    def __init__(self, family: GgufFamily, config: Mapping[str, Any]) -> None:
        self._architecture = family.architecture
        self._names = get_tensor_name_map(family.architecture, config["num_hidden_layers"])
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
                f"tensor {name!r} has no name in GGUF's {self._architecture.name} architecture; "
                "is this a plain checkpoint of that family?"
            )
        return renamed
