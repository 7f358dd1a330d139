"""A frozen linear layer with a LoRA adapter, with a backward pass of its own.

    y  = x W^T + bias + s (x A^T) B^T
    dx = dy W + s (dy B) A,            dA = s (dy B)^T x,            dB = s dy^T (x A^T)

Shapes: x [T, in], W [out, in], A [r, in], B [out, r], bias [out], y [T, out], all of one float type.

The adapter's part is added by the product itself (beta = 1), so no pass over [T, out] is spent on scaling and adding.
W is either in bfloat16 already, or 4-bit and dequantised where it is used: it is not kept between forward and backward.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; Dettmers et al., "QLoRA", 2023.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from finetune_kernels.primitives.lora_delta import LoraDelta

Weight = Callable[[], torch.Tensor]
"""Gives W [out, in] in the compute type: a tensor that is kept, or a fresh dequantisation."""


def reference(
    x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns y by the formula, for autograd: x [..., in], w [out, in], a [r, in], b [out, r] -> [..., out]."""
    return functional.linear(x, w, bias) + scale * functional.linear(functional.linear(x, a), b)


def forward(
    rows: torch.Tensor, weight: Weight, a: torch.Tensor, b: torch.Tensor, scale: float, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y [T, out] for `rows` [T, in], and x A^T [T, r]."""
    y = functional.linear(rows, weight(), bias)
    xa = rows @ a.T  # [T, r]
    y.addmm_(xa, b.T, alpha=scale)
    return y, xa


def backward(
    dy: torch.Tensor, rows: torch.Tensor, weight: Weight, a: torch.Tensor, delta: LoraDelta, *, wants_dx: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Returns the gradients of x [T, in] (None unless `wants_dx`), A and B; `dy` is [T, out]."""
    d_xa = (dy @ delta.b).mul_(delta.scale)  # [T, r]

    dx = None
    if wants_dx:
        dx = dy @ weight()  # [T, in]
        dx.addmm_(d_xa, a)
    return dx, d_xa.T @ rows, (dy.T @ delta.xa).mul_(delta.scale)


class LoraLinearFunction(torch.autograd.Function):
    """Autograd around the products above; saves x, x A^T and the adapter, and nothing of W."""

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
        """See `lora_linear`."""
        rows = x.reshape(-1, x.shape[-1])
        y, xa = forward(rows, weight, a, b, scale, bias)
        ctx.save_for_backward(rows, a, b, xa)
        ctx.weight, ctx.scale = weight, scale
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(
        ctx: Any, dy: torch.Tensor
    ) -> tuple[torch.Tensor | None, None, torch.Tensor, torch.Tensor, None, None]:
        """Returns the gradients of x, A and B."""
        rows, a, b, xa = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1])  # [T, out]
        dx, da, db = backward(flat, rows, ctx.weight, a, LoraDelta(xa, b, ctx.scale), wants_dx=ctx.needs_input_grad[0])
        if dx is not None:
            dx = dx.view(*dy.shape[:-1], dx.shape[-1])
        return dx, None, da, db, None, None


def lora_linear(
    x: torch.Tensor, weight: Weight, a: torch.Tensor, b: torch.Tensor, scale: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """LoRA linear layer over a frozen weight: x [..., in] -> [..., out].

    A and B are converted to the type of x, and their gradients back to their own.
    """
    return LoraLinearFunction.apply(x, weight, a.to(x.dtype), b.to(x.dtype), scale, bias)  # type: ignore[no-untyped-call, no-any-return]
