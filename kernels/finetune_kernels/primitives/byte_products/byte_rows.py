"""Rows of 16-bit values as bytes, E4M3 or int8, with a scale for each row.

    q = x f / s rounded,   s = max |row of x f| / limit;   limit: 448 or 127

Shapes: x [T, N] -> q [T, N], s fp32 [T, 1]; f [N], a factor of each column, or none.

A scale per row keeps one token's outlier to itself. Factors take the scales of a weight that lie along the summed side:
dy W = (dy f) (W / f), as W's bytes are the same in both directions.
"""

from typing import Any

import torch
import triton
import triton.language as tl

E4M3_MAX = 448.0
"""Largest number of E4M3."""
INT8_MAX = 127.0
"""Largest number of int8 that has an opposite."""


def limit_of(dtype: torch.dtype) -> float:
    """Returns the largest value that rows are brought to in torch.float8_e4m3fn or torch.int8."""
    return INT8_MAX if dtype is torch.int8 else E4M3_MAX


def smallest_row(dtype: torch.dtype) -> float:
    """Returns the least largest value of a row: below it, a scale's inverse would be infinite."""
    return torch.finfo(torch.float32).tiny * limit_of(dtype)


def reference(
    x: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what `quantize_rows` returns, by PyTorch."""
    wide = x.float() if factors is None else x.float() * factors
    scales = wide.abs().amax(dim=1, keepdim=True).clamp_min(smallest_row(dtype)) * (1 / limit_of(dtype))
    scaled = wide * (1 / scales)
    return (scaled.round() if dtype is torch.int8 else scaled).to(dtype), scales


@triton.jit
def to_byte(value, out_ptr) -> Any:  # type: ignore[no-untyped-def]
    """fp32 values, rounded to the type of `out_ptr`."""
    if out_ptr.dtype.element_ty == tl.int8:
        # The sum with 1.5 * 2^23 has the nearest whole number in its lowest bits.
        return (value + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:  # noqa: RET505 - Triton compiles the branch that is taken
        return value.to(out_ptr.dtype.element_ty)


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    x_ptr, factor_ptr, q_ptr, s_ptr, stride, n_cols, SMALLEST: tl.constexpr, LIMIT: tl.constexpr,
    HAS_FACTORS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    mask = columns < n_cols

    x = tl.load(x_ptr + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_FACTORS:
        x *= tl.load(factor_ptr + columns, mask=mask, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), SMALLEST) * (1 / LIMIT)
    tl.store(s_ptr + row, scale)
    tl.store(q_ptr + row * n_cols + columns, to_byte(x * tl.math.div_rn(1.0, scale), q_ptr), mask=mask)


def quantize_rows(
    x: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns values [T, N] in `dtype` and fp32 scales [T, 1] with x f ~ values * scales; rows of `x` may be strided.

    PyTorch on a CPU: Triton's interpreter rounds to E4M3 wrongly (127 to 64, not to 128).
    """
    if not x.is_cuda:
        return reference(x, dtype, factors)
    return quantize_by_kernel(x, dtype, factors)


def quantize_by_kernel(
    x: torch.Tensor, dtype: torch.dtype, factors: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the same by the kernel."""
    count, n_cols = x.shape
    values = torch.empty(count, n_cols, dtype=dtype, device=x.device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(n_cols)
    _quantize[(count,)](
        x, x if factors is None else factors, values, scales, x.stride(0), n_cols, SMALLEST=smallest_row(dtype),
        LIMIT=limit_of(dtype), HAS_FACTORS=factors is not None, BLOCK_N=block,
        num_warps=min(16, max(4, block // 1024)), enable_fp_fusion=False,
    )  # fmt: skip
    return values, scales
