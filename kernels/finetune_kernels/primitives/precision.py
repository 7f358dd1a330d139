"""In which type the formulas beside the kernels are evaluated."""

import torch


def widen(x: torch.Tensor) -> torch.Tensor:
    """`x` in fp32, as the kernels compute; in fp64 where it is that, so that the formulas can be checked there."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
