"""Root mean square normalisation over the last dimension, in one pass each way.

    y = x * rstd * (w + offset),   rstd = 1 / sqrt(mean(x^2) + eps)
    dx = rstd * (g - x * r^2 * mean(g * x)),   g = dy * (w + offset)

Everything between load and store is fp32 and rounded once. `offset` is 1 for Gemma, whose weights are stored around
zero. The weight is frozen: it gets no gradient. Eager PyTorch reads and writes the row about six times forward.

The residual stream goes through the same launches: forward adds the layer's output first and keeps the sum, backward
adds the gradient that came past the layer, and can give the normalised rows once more, so that they need not be kept.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from finetune_kernels.primitives.precision import widen


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """The formula, in fp32 or fp64; same shape and dtype as `x` ([..., N], weight [N])."""
    return reference_forward(x, weight, eps, offset)[1]


def reference_forward(
    rows: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0, delta: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`forward` by PyTorch."""
    h = rows if delta is None else (widen(rows) + widen(delta)).to(rows.dtype)
    wide = widen(h)
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    return h, (wide * rstd.unsqueeze(-1) * (widen(weight) + offset)).to(rows.dtype), rstd


def reference_backward(
    dy: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
    *,
    return_y: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`backward` by PyTorch."""
    x, w, rstd = widen(rows), widen(weight) + offset, rstd.unsqueeze(-1)
    g = widen(dy) * w
    dx = rstd * (g - x * rstd * rstd * (g * x).mean(-1, keepdim=True))
    if residual is not None:
        dx = dx + widen(residual)
    return dx.to(rows.dtype), (x * rstd * w if return_y else dx).to(rows.dtype)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x_ptr,
    delta_ptr,
    w_ptr,
    h_ptr,
    y_ptr,
    rstd_ptr,
    n,
    eps,
    OFFSET: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    inside = columns < n
    at = row * n + columns
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta_ptr + at, mask=inside, other=0.0).to(tl.float32)
        h = x.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + at, h, mask=inside)
        x = h.to(tl.float32)
    w = tl.load(w_ptr + columns, mask=inside, other=0.0).to(tl.float32) + OFFSET
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / n + eps)
    tl.store(rstd_ptr + row, rstd)
    tl.store(y_ptr + at, x * rstd * w, mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    dy_ptr, residual_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr, y_ptr, n,
    OFFSET: tl.constexpr, ADD: tl.constexpr, RETURN_Y: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    inside = columns < n
    at = row * n + columns
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + columns, mask=inside, other=0.0).to(tl.float32) + OFFSET
    g = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32) * w
    rstd = tl.load(rstd_ptr + row)
    mean = tl.sum(g * x, axis=0) / n
    dx = rstd * (g - x * rstd * rstd * mean)
    if ADD:
        dx += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, dx, mask=inside)
    if RETURN_Y:
        tl.store(y_ptr + at, x * rstd * w, mask=inside)


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16


def forward(
    rows: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0, delta: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h = rows + delta (or rows), norm(h), and the rstd r [T] in fp32; rows and delta [T, N], contiguous."""
    count, n = rows.shape
    y, rstd = torch.empty_like(rows), torch.empty(count, dtype=torch.float32, device=rows.device)
    h = rows if delta is None else torch.empty_like(rows)
    block = triton.next_power_of_2(n)
    _forward[(count,)](
        rows, rows if delta is None else delta, weight, h, y, rstd, n, eps,
        OFFSET=offset, ADD=delta is not None, BLOCK_N=block, num_warps=_warps(block),
    )  # fmt: skip
    return h, y, rstd


def backward(
    dy: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
    *,
    return_y: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the norm's input `rows`, plus `residual` where given; with `again`, norm(rows) once more as well
    (the first tensor twice otherwise)."""
    count, n = rows.shape
    dx, block = torch.empty_like(rows), triton.next_power_of_2(n)
    y = torch.empty_like(rows) if return_y else dx
    _backward[(count,)](
        dy, dy if residual is None else residual, rows, weight, rstd, dx, y, n,
        OFFSET=offset, ADD=residual is not None, RETURN_Y=return_y, BLOCK_N=block, num_warps=_warps(block),
    )  # fmt: skip
    return dx, y


class RmsNormFunction(torch.autograd.Function):
    """Autograd around the two kernels."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        """See `reference`."""
        rows, y, rstd = forward(x.contiguous().view(-1, x.shape[-1]), weight, eps, offset)
        ctx.save_for_backward(rows, weight, rstd)
        ctx.offset = offset
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Gradient of `x`."""
        rows, weight, rstd = ctx.saved_tensors
        dx, _ = backward(dy.contiguous().view(rows.shape), rows, weight, rstd, ctx.offset)
        return dx.view(dy.shape), None, None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """RMS norm of `x` [..., N] with a frozen `weight` [N]: Triton on CUDA, the reference elsewhere."""
    if not x.is_cuda or weight.requires_grad:
        return reference(x, weight, eps, offset)
    return RmsNormFunction.apply(x, weight, eps, offset)  # type: ignore[no-untyped-call, no-any-return]
