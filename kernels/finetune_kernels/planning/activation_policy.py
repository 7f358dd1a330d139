"""The four choices of selective activation checkpointing, from most memory to least."""

from enum import Enum


class ActivationPolicy(Enum):
    """Activations that a layer saves for its backward pass; each policy costs less memory and more time than the one
    before. The values are words for people: logs and reports show them."""

    SAVE_ALL = "save all"
    RECOMPUTE_MLP = "recompute the MLP"
    """Saves everything but gate and up, which backward projects again."""
    RECOMPUTE_ALL = "recompute all"
    """Saves the layer's input; backward runs the forward pass again."""
    OFFLOAD = "offload"
    """Saves the layer's input in pinned host memory; backward runs the forward pass again."""
