"""Embedding and head: their bytes, whether they can be in host memory, and what the loss needs then. Pure."""

from typing import Any

from finetune_kernels.planning.block_sizes import CHUNK_ROWS, HEAD_ROWS, VOCABULARY_BLOCK
from finetune_kernels.planning.families import family_of_config
from finetune_kernels.planning.parts.expert_shape import BYTES


def vocabulary_bytes(config: Any) -> int:
    """Bytes of embedding and head."""
    return tables(config) * int(config.vocab_size) * int(config.hidden_size) * BYTES


def pinned_table_bytes(movable: int, table: int) -> int:
    """Bytes of host memory that embedding and head take there, `movable` on the GPU and `table` each: PyTorch rounds a
    pinned buffer up to a power of two."""
    return -(-movable // table) * (1 << (table - 1).bit_length())


def layer_input_bytes(config: Any) -> int:
    """Bytes of the second embedding, of which layers have inputs of their own (Gemma 4 E2B)."""
    family = family_of_config(config)
    own = 0 if family is None else family.layer_input_size(config)
    return own and own * int(config.num_hidden_layers) * int(config.vocab_size_per_layer_input) * BYTES


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


def loss_bytes(tokens: int, hidden: int, vocabulary: int, *, stream: int | None) -> int:
    """Bytes that the loss needs: the head's input, its gradient, and the logits of some rows. `stream`: elements of 16
    bits in a row of the input; None: the head is in host memory, two blocks of it are on the GPU at a time, and the
    gradient is summed in fp32."""
    if stream is not None:
        return (3 * tokens * stream + min(tokens, CHUNK_ROWS) * vocabulary) * BYTES

    block, rows = min(VOCABULARY_BLOCK, vocabulary), min(tokens, HEAD_ROWS)
    return 8 * tokens * hidden + rows * (block * BYTES + 4 * hidden) + 2 * block * hidden * BYTES
