"""Products of int8 rows, each with a scale: y[t, n] = s_x[t] s_W[n] sum_k q_x[t, k] q_W[n, k] + bias[n].

Shapes: q_x [T, in], q_W [out, in] -> y [T, out]; s_x [T, 1], s_W [out, 1] in fp32.

The tensor cores of Turing and Ampere multiply int8 at twice the rate of 16-bit floats, and add up exactly. PyTorch's
product ends with the whole numbers; scales are a pass of its own, 4 bytes read and 2 written for each of y.
"""

import torch
import triton
import triton.language as tl

FEWEST_ROWS = 17
"""Rows that `torch._int_mm` needs at least."""
BLOCK_N = 1024


def reference(
    whole: torch.Tensor, scales: torch.Tensor, weight_scales: torch.Tensor, bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Returns sums [T, out] of whole numbers times both scales, plus the bias, in `dtype`, by PyTorch."""
    y = whole.float() * scales * weight_scales.T
    return (y if bias is None else y + bias.float()).to(dtype)


@triton.jit
def _rescale(  # type: ignore[no-untyped-def]
    whole_ptr, scale_ptr, weight_scale_ptr, bias_ptr, y_ptr, n_cols, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = columns < n_cols

    y = tl.load(whole_ptr + row * n_cols + columns, mask=mask, other=0).to(tl.float32) * tl.load(scale_ptr + row)
    y *= tl.load(weight_scale_ptr + columns, mask=mask, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * n_cols + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


def rescale(
    whole: torch.Tensor, scales: torch.Tensor, weight_scales: torch.Tensor, bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Returns what `reference` returns, in one launch."""
    count, n_cols = whole.shape
    y = torch.empty(count, n_cols, dtype=dtype, device=whole.device)
    _rescale[(count, triton.cdiv(n_cols, BLOCK_N))](
        whole, scales, weight_scales, whole if bias is None else bias, y, n_cols, HAS_BIAS=bias is not None,
        BLOCK_N=BLOCK_N, enable_fp_fusion=False,
    )  # fmt: skip
    return y


def product(
    values: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor,
    bias: torch.Tensor | None, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Returns x W^T + bias, [T, out] in `dtype`, of int8 values [T, in] and [out, in] with scales [T, 1], [out, 1].
    Sizes of the weight are multiples of 8."""
    count = values.shape[0]
    if count < FEWEST_ROWS:
        values = torch.nn.functional.pad(values, (0, 0, 0, FEWEST_ROWS - count))
    return rescale(torch._int_mm(values, weight.T)[:count], scales, weight_scales, bias, dtype)
