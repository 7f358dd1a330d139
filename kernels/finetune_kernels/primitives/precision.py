"""Types in which the formulas beside the kernels are evaluated."""

import torch


def widen(x: torch.Tensor) -> torch.Tensor:
    """Returns `x` in fp32, as the kernels compute; fp64 stays fp64, so that the formulas can be checked in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
