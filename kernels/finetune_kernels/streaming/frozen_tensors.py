"""The tensors of bitsandbytes' NF4 weights whose sizes grow with them: codes, scales, and scales of scales."""

from typing import Any

import torch
from torch import nn


def scales_of(weight: Any) -> list[torch.Tensor]:
    """The scales of a weight in NF4, and theirs; none of another weight."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return []
    return [state.absmax, *([state.state2.absmax] if state.nested else [])]


def nf4_tensors(weight: Any) -> list[torch.Tensor]:
    """The codes of a weight in NF4, and its scales."""
    return [weight, *scales_of(weight)]


def nf4_tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """The same of all weights in NF4 of a decoder layer."""
    weights = [weight for weight in module.parameters() if getattr(weight, "quant_state", None) is not None]
    return [tensor for weight in weights for tensor in nf4_tensors(weight)]
