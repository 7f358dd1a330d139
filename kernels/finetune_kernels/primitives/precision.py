"""Types in which cards compute, and in which the formulas beside the kernels are evaluated.

Cards before Ampere multiply no bfloat16, run neither FlashAttention nor cuDNN's attention, and have no tensor cores for
Triton since its version 3.3 (its pull request 5066): on Turing `tl.dot` is made of single multiply-adds, a program
keeps whole rows of both operands in registers, and large tiles spill. Matrix products of whole layers are cuBLAS's,
which uses Turing's tensor cores.
"""

import torch

AMPERE = (8, 0)
"""Compute capability."""


def before_ampere(x: torch.Tensor) -> bool:
    """True if `x` is on a card older than Ampere."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) < AMPERE


def widen(x: torch.Tensor) -> torch.Tensor:
    """Returns `x` in fp32, as the kernels compute; fp64 stays fp64, so that the formulas can be checked in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
