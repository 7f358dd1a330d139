"""Rows that are in GPU memory at once: the kernels cut their work by these numbers, the memory plan counts by them."""

CHUNK_ROWS = 1024
"""Tokens whose logits are in memory at once in the loss."""

VOCABULARY_BLOCK = 8192
"""Rows of a head in host memory that come to the GPU as one block, of two (64 MiB each at 8B)."""

HEAD_ROWS = 4096
"""Tokens whose scores for such a block are in memory at once."""

TILE_ROWS = 2048
"""Tokens in one tile of the MLP; matrix products of this size still run at full rate."""
FLASH_HEAD_SIZE = 256
"""Elements of the largest head that FlashAttention takes; larger ones go to PyTorch's memory-efficient kernel."""
