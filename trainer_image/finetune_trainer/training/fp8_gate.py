"""Decides for or against FP8, where a job asks for it, by the loss of the run's first batch."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from finetune_api.vocabulary import Precision
from finetune_kernels.layers.fused_layers import FusedLayers

MAX_DIFFERENCE = 0.01
"""Accepted change of the loss, relative. Measured on an H200: 2.8e-4 (8B, random weights) and 3.7e-3 (four layers that
learn; at most 6.8e-3 over 200 steps, after which the losses were equal within 3e-3)."""


@dataclass(frozen=True)
class Fp8Decision:
    """The precision in which frozen weights are multiplied, and the reason, for people."""

    precision: Precision
    reason: str


def decide_fp8(layers: FusedLayers, loss: Callable[[], torch.Tensor]) -> Fp8Decision:
    """Switches `layers` to FP8, and back if that changes the loss by more than MAX_DIFFERENCE.

    `loss` computes the loss of one batch, without gradients; it is called once in each precision.
    """
    exact = loss().item()
    layers.use_fp8()
    # NaN compares as false, so a loss that is NaN gives BF16, too.
    difference = abs(loss().item() - exact) / max(exact, sys.float_info.min)

    reason = f"FP8 changes the loss of the first batch by {difference:.2%}; up to {MAX_DIFFERENCE:.0%} is accepted"
    if difference <= MAX_DIFFERENCE:
        return Fp8Decision(Precision.FP8, reason)

    layers.use_compute_dtype()
    return Fp8Decision(Precision.BF16, reason)
