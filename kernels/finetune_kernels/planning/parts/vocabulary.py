"""Embedding and head: their bytes, and whether they can be in host memory. Pure."""

from typing import Any

from finetune_kernels.planning.families import family_of_config
from finetune_kernels.planning.parts.expert_shape import BYTES


def vocabulary_bytes(config: Any) -> int:
    """Bytes of embedding and head."""
    return tables(config) * int(config.vocab_size) * int(config.hidden_size) * BYTES


def tables(config: Any) -> int:
    """Embedding and head, which may be one tensor."""
    return 1 if getattr(config, "tie_word_embeddings", False) else 2


def keeps_vocabulary(config: Any) -> bool:
    """True if embedding and head stay on the GPU: the embedding is a module of the family's own, or the head has a
    bias."""
    family = family_of_config(config)
    # Gemmas without a row (3n, 4) scale their embedding, too.
    if family is None:
        return str(getattr(config, "model_type", "")).startswith("gemma")
    return family.scales_embedding or family.head_bias
