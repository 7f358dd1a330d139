"""The tensors of weights in NF4 whose sizes grow with them: codes, scales, and scales of scales; of bitsandbytes'
matrices, and of stacks of experts."""

from typing import Any

import torch
from torch import nn

from finetune_kernels.experts.stacked_weight import StackedWeight
from finetune_kernels.primitives.nf4_stack import Nf4Stack


def scales_of(weight: Any) -> list[torch.Tensor]:
    """The scales of a weight in NF4, and theirs; none of another weight."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return []
    return [state.absmax, *([state.state2.absmax] if state.nested else [])]


def nf4_tensors(weight: Any) -> list[torch.Tensor]:
    """The codes of a weight in NF4, and its scales."""
    return [weight, *scales_of(weight)]


def stack_tensors(stack: Nf4Stack) -> list[torch.Tensor]:
    """The codes of a stack of matrices in NF4, its scales, theirs, and a matrix's offsets."""
    found = (stack.codes, stack.scales, stack.scales2, stack.offsets)
    return [tensor for tensor in found if tensor is not None]


def nf4_tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """The same of all weights in NF4 of a decoder layer, its experts' among them."""
    weights = [weight for weight in module.parameters() if getattr(weight, "quant_state", None) is not None]
    stacks = [part.stack() for part in module.modules() if isinstance(part, StackedWeight) and part.is_quantized]
    linears = [tensor for weight in weights for tensor in nf4_tensors(weight)]
    return linears + [tensor for stack in stacks for tensor in stack_tensors(stack)]
