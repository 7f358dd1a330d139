"""Root mean square normalisation over the last dimension, in one pass each way.

    y  = x * rstd * (w + offset),                       rstd = 1 / sqrt(mean(x^2) + eps)
    dx = rstd * (g - x * rstd^2 * mean(g * x)),         g = dy * (w + offset)

Shapes: x and y [T, hidden] in any float type, w [hidden], rstd [T] in fp32. Everything between load and store is fp32
and rounded once. `offset` is 1 for Gemma, whose weights are stored around zero. The weight is frozen: it gets no
gradient. Eager PyTorch reads and writes the row about six times forward.

Tensors may differ in type: y has that of the residual stream unless another is asked for, dx that of x, and what
backward writes again that of dy.

The residual stream goes through the same launches. Forward adds the output of the block before and writes the sum;
backward adds the gradient that came past the block, and can write the normalised rows once more, so that they need not
be saved.

LayerNorm (Cohere, Phi-2, StarCoder2, StableLM) is the same with x - mean(x) in place of x, g - mean(g) in place of the
first g of dx, and a bias added to y if there is one.

Source: Ba, Kiros and Hinton, "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean Square Layer Normalization",
2019. Liger's fused_add_rms_norm fuses the same sum.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from finetune_kernels.primitives.precision import widen


class Norm(NamedTuple):
    """A frozen RMS norm: x * rstd * (weight + offset); or a LayerNorm."""

    weight: torch.Tensor
    """[hidden]."""
    eps: float
    """Added to the mean square."""
    offset: float = 0.0
    """1 for Gemma, unless it was added to the weight before."""
    centered: bool = False
    """True for a LayerNorm: the mean is taken off first."""
    bias: torch.Tensor | None = None
    """[hidden], added to the result."""


def reference(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Returns the formula's y in fp32 or fp64, rounded to the dtype of `x` [..., hidden]."""
    return reference_forward(x, norm)[1]


def reference_forward(
    rows: torch.Tensor, norm: Norm, delta: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns what `forward` returns, by PyTorch."""
    h = rows if delta is None else (widen(rows) + widen(delta)).to(rows.dtype)
    wide = _center(widen(h), norm)
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + norm.eps)
    return h, _scale(wide, rstd.unsqueeze(-1), norm).to(dtype or rows.dtype), rstd


def reference_backward(
    dy: torch.Tensor,
    rows: torch.Tensor,
    norm: Norm,
    rstd: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    return_y: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what `backward` returns, by PyTorch."""
    x, w, rstd = _center(widen(rows), norm), widen(norm.weight) + norm.offset, rstd.unsqueeze(-1)
    g = _center(widen(dy) * w, norm)
    dx = rstd * (g - x * rstd * rstd * (g * x).mean(-1, keepdim=True))
    if residual is not None:
        dx = dx + widen(residual)
    return dx.to(rows.dtype), _scale(x, rstd, norm).to(dy.dtype) if return_y else dx.to(rows.dtype)


def _center(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Returns x [..., hidden] without its mean if the norm takes it off."""
    return x - x.mean(-1, keepdim=True) if norm.centered else x


def _scale(x: torch.Tensor, rstd: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Returns the norm's result for the centered x [..., hidden]."""
    y = x * rstd * (widen(norm.weight) + norm.offset)
    return y if norm.bias is None else y + widen(norm.bias)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x_ptr, delta_ptr, w_ptr, bias_ptr, h_ptr, y_ptr, rstd_ptr, n_cols, eps,
    OFFSET: tl.constexpr, ADD: tl.constexpr, CENTER: tl.constexpr, BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)  # a row's offset may exceed 2^31
    columns = tl.arange(0, BLOCK_N)
    mask = columns < n_cols
    offsets = row * n_cols + columns

    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        h = x.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + offsets, h, mask=mask)
        x = h.to(tl.float32)  # the norm is of the rounded sum, as backward will see it

    if CENTER:
        x = tl.where(mask, x - tl.sum(x, axis=0) / n_cols, 0.0)
    w = tl.load(w_ptr + columns, mask=mask, other=0.0).to(tl.float32) + OFFSET
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / n_cols + eps)
    tl.store(rstd_ptr + row, rstd)
    y = x * rstd * w
    if BIAS:
        y += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, y, mask=mask)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    dy_ptr, residual_ptr, x_ptr, w_ptr, bias_ptr, rstd_ptr, dx_ptr, y_ptr, n_cols,
    OFFSET: tl.constexpr, ADD: tl.constexpr, RETURN_Y: tl.constexpr, CENTER: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    mask = columns < n_cols
    offsets = row * n_cols + columns

    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + columns, mask=mask, other=0.0).to(tl.float32) + OFFSET
    g = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * w
    rstd = tl.load(rstd_ptr + row)

    if CENTER:
        x = tl.where(mask, x - tl.sum(x, axis=0) / n_cols, 0.0)
        g -= tl.sum(g, axis=0) / n_cols  # changes no sum over g x: the sum of x is zero
    mean = tl.sum(g * x, axis=0) / n_cols
    dx = rstd * (g - x * rstd * rstd * mean)
    if ADD:
        dx += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offsets, dx, mask=mask)

    if RETURN_Y:
        y = x * rstd * w
        if BIAS:
            y += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + offsets, y, mask=mask)


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16


def _bias(norm: Norm) -> torch.Tensor:
    """Returns the bias, or a tensor that stands in for it."""
    return norm.weight if norm.bias is None else norm.bias


def forward(
    rows: torch.Tensor, norm: Norm, delta: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns h = rows + delta (or rows), norm(h), both [T, hidden], and rstd [T] in fp32.

    `rows` and `delta` are [T, hidden] and contiguous. `dtype`: of norm(h); None for that of `rows`.
    """
    count, n_cols = rows.shape
    y, rstd = torch.empty_like(rows, dtype=dtype), torch.empty(count, dtype=torch.float32, device=rows.device)
    h = rows if delta is None else torch.empty_like(rows)

    block = triton.next_power_of_2(n_cols)
    _forward[(count,)](
        rows, rows if delta is None else delta, norm.weight, _bias(norm), h, y, rstd, n_cols, norm.eps,
        OFFSET=norm.offset, ADD=delta is not None, CENTER=norm.centered, BIAS=norm.bias is not None, BLOCK_N=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return h, y, rstd


def backward(
    dy: torch.Tensor,
    rows: torch.Tensor,
    norm: Norm,
    rstd: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    return_y: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradient of the norm's input `rows` [T, hidden], plus `residual` if given, and a second tensor.

    The second tensor is norm(rows) once more if `return_y`, and the first tensor again otherwise.
    """
    count, n_cols = rows.shape
    dx, block = torch.empty_like(rows), triton.next_power_of_2(n_cols)
    y = torch.empty_like(rows, dtype=dy.dtype) if return_y else dx
    _backward[(count,)](
        dy, dy if residual is None else residual, rows, norm.weight, _bias(norm), rstd, dx, y, n_cols,
        OFFSET=norm.offset, ADD=residual is not None, RETURN_Y=return_y, CENTER=norm.centered,
        BIAS=norm.bias is not None, BLOCK_N=block, num_warps=_warps(block),
    )  # fmt: skip
    return dx, y


class RmsNormFunction(torch.autograd.Function):
    """Autograd around the two kernels; saves x and rstd."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """See `rms_norm`."""
        rows, y, rstd = forward(x.contiguous().view(-1, x.shape[-1]), norm)
        ctx.save_for_backward(rows, norm.weight, rstd)
        ctx.eps, ctx.offset, ctx.centered = norm.eps, norm.offset, norm.centered
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Returns the gradient of `x`."""
        rows, weight, rstd = ctx.saved_tensors
        norm = Norm(weight, ctx.eps, ctx.offset, ctx.centered)
        dx, _ = backward(dy.contiguous().view(rows.shape), rows, norm, rstd)
        return dx.view(dy.shape), None


def rms_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """RMS norm of `x` [..., hidden]: Triton on CUDA with a frozen weight, the reference elsewhere."""
    if not x.is_cuda or norm.weight.requires_grad:
        return reference(x, norm)
    return RmsNormFunction.apply(x, norm)  # type: ignore[no-untyped-call, no-any-return]
