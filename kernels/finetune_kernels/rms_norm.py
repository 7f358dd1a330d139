"""Root mean square normalisation over the last dimension, in one pass each way.

    y = x * r * (w + offset),   r = 1 / sqrt(mean(x^2) + eps)
    dx = r * (g - x * r^2 * mean(g * x)),   g = dy * (w + offset)

Everything between load and store is fp32 and rounded once. `offset` is 1 for Gemma, whose weights are stored around
zero. The weight is frozen: it gets no gradient. Eager PyTorch reads and writes the row about six times forward.
"""

from typing import Any

import torch
import triton
import triton.language as tl


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """The formula, in fp32; same shape and dtype as `x` ([..., N], weight [N])."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * (weight.float() + offset)).to(x.dtype)


@triton.jit
def _forward(x_ptr, w_ptr, y_ptr, r_ptr, n, eps, OFFSET: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    inside = columns < n
    x = tl.load(x_ptr + row * n + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + columns, mask=inside, other=0.0).to(tl.float32) + OFFSET
    r = tl.rsqrt(tl.sum(x * x, axis=0) / n + eps)
    tl.store(r_ptr + row, r)
    tl.store(y_ptr + row * n + columns, x * r * w, mask=inside)


@triton.jit
def _backward(dy_ptr, x_ptr, w_ptr, r_ptr, dx_ptr, n, OFFSET: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    inside = columns < n
    x = tl.load(x_ptr + row * n + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy_ptr + row * n + columns, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(w_ptr + columns, mask=inside, other=0.0).to(tl.float32) + OFFSET
    r = tl.load(r_ptr + row)
    mean = tl.sum(g * x, axis=0) / n
    tl.store(dx_ptr + row * n + columns, r * (g - x * r * r * mean), mask=inside)


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16


class RmsNormFunction(torch.autograd.Function):
    """Autograd around the two kernels."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        """See `reference`."""
        n = x.shape[-1]
        rows = x.contiguous().view(-1, n)
        y, scales = torch.empty_like(rows), torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(n)
        _forward[(rows.shape[0],)](
            rows, weight, y, scales, n, eps, OFFSET=offset, BLOCK_N=block, num_warps=_warps(block)
        )
        ctx.save_for_backward(rows, weight, scales)
        ctx.offset = offset
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Gradient of `x`."""
        rows, weight, scales = ctx.saved_tensors
        n = rows.shape[-1]
        dx, block = torch.empty_like(rows), triton.next_power_of_2(n)
        _backward[(rows.shape[0],)](
            dy.contiguous(), rows, weight, scales, dx, n, OFFSET=ctx.offset, BLOCK_N=block, num_warps=_warps(block)
        )
        return dx.view(dy.shape), None, None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """RMS norm of `x` [..., N] with a frozen `weight` [N]: Triton on CUDA, the reference elsewhere."""
    if not x.is_cuda or weight.requires_grad:
        return reference(x, weight, eps, offset)
    return RmsNormFunction.apply(x, weight, eps, offset)  # type: ignore[no-untyped-call, no-any-return]
