"""What kernels and memory plan have to agree on. Imports nothing, so that a plan can be made where PyTorch is not
loaded: before a GPU is asked for."""

from enum import Enum

CHUNK_ROWS = 1024
"""Rows whose logits are in memory at once."""

VOCABULARY_BLOCK = 8192
"""Rows of a head in host memory that are on the GPU as one block, of two (64 MiB each at 8B)."""

HEAD_ROWS = 4096
"""Rows whose scores for such a block are in memory at once."""

TILE_ROWS = 2048
"""Rows of the MLP in one tile; products of this size still run at full rate."""


class ActivationPolicy(Enum):
    """What a layer saves for its backward pass; each costs less memory and more time than the one before."""

    SAVE_ALL = "save all"
    RECOMPUTE_MLP = "recompute the MLP"
    """All but gate and up, which are projected again."""
    RECOMPUTE_ALL = "recompute all"
    """Its input; the forward pass is made again."""
    OFFLOAD = "offload"
    """Its input, in pinned host memory."""
