"""FP8 products, where a job asks for them: whether they stay is decided by the loss of its first batch."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from finetune_api.vocabulary import Precision
from finetune_kernels.layers.fused_layers import FusedLayers

MAX_DIFFERENCE = 0.01
"""Of the loss, relative. On an H200 it was 2.8e-4 (8B, random weights) and 3.7e-3 (four layers that learn; 6.8e-3 at
most over 200 steps, after which the losses were equal within 3e-3)."""


@dataclass(frozen=True)
class Fp8Decision:
    """What frozen weights are multiplied in, and why."""

    precision: Precision
    reason: str


def decide_fp8(layers: FusedLayers, loss: Callable[[], torch.Tensor]) -> Fp8Decision:
    """Change `layers` to 8 bits, and back if that changes `loss` (of one batch, without gradients) too much."""
    exact = loss().item()
    layers.use_fp8()
    difference = abs(loss().item() - exact) / max(exact, sys.float_info.min)
    reason = f"8 bits change the loss of the first batch by {difference:.2%}; up to {MAX_DIFFERENCE:.0%} is accepted"
    if difference <= MAX_DIFFERENCE:
        return Fp8Decision(Precision.FP8, reason)
    layers.use_compute_dtype()
    return Fp8Decision(Precision.BF16, reason)
