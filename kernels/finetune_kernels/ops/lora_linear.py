"""A frozen linear layer with a LoRA adapter, with a backward of our own.

    y  = x W^T + b + s (x A^T) B^T
    dx = dy W + s (dy B) A,   dA = s (dy B)^T x,   dB = s dy^T (x A^T)

The adapter's share is added by the GEMM itself (beta = 1), so no pass over [T, out] is spent on scaling and adding. W
is either in bfloat16 already, or 4-bit and dequantised where it is used: never kept between forward and backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

Weight = Callable[[], torch.Tensor]
"""Gives W [out, in] in the compute type: the resident tensor, or a fresh dequantisation."""


def reference(
    x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The formula by autograd: x [..., in], w [out, in], a [r, in], b [out, r]."""
    return functional.linear(x, w, bias) + scale * functional.linear(functional.linear(x, a), b)


class LoraLinearFunction(torch.autograd.Function):
    """Autograd with the products above; nothing but x and the adapter is saved."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: Weight,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `reference`."""
        rows = x.reshape(-1, x.shape[-1])
        y = functional.linear(rows, weight(), bias)
        inner = rows @ a.T  # [T, r]
        y.addmm_(inner, b.T, alpha=scale)
        ctx.save_for_backward(rows, a, b, inner)
        ctx.weight, ctx.scale = weight, scale
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(
        ctx: Any, dy: torch.Tensor
    ) -> tuple[torch.Tensor | None, None, torch.Tensor, torch.Tensor, None, None]:
        """Gradients of x, A and B."""
        rows, a, b, inner = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1])
        d_inner = (flat @ b).mul_(ctx.scale)  # [T, r]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = flat @ ctx.weight()
            dx.addmm_(d_inner, a)
            dx = dx.view(*dy.shape[:-1], dx.shape[-1])
        return dx, None, d_inner.T @ rows, (flat.T @ inner).mul_(ctx.scale), None, None


def lora_linear(
    x: torch.Tensor, weight: Weight, a: torch.Tensor, b: torch.Tensor, scale: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """LoRA linear over a frozen weight; A and B are brought to the type of x (and their gradients back to their
    own)."""
    return LoraLinearFunction.apply(x, weight, a.to(x.dtype), b.to(x.dtype), scale, bias)  # type: ignore[no-untyped-call, no-any-return]
