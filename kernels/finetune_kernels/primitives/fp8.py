"""Products with frozen weights in FP8 (E4M3), with a scale for each row of either operand.

    y = x W^T ~ s_x (q_x q_W^T) s_W,   q = x / s rounded to E4M3,   s = max |row| / 448

Shapes: x [T, in], W [out, in] -> y [T, out]; q in E4M3, s in fp32, [T, 1] or [out, 1].

The tensor cores of Hopper and Ada multiply E4M3 at twice the rate of bfloat16 and add up in fp32. A scale per row of x
keeps one token's outlier to itself; one per row of W costs nothing. dx = dy W needs W with scales along the other side,
so both are kept: together as many bytes as W in bfloat16.

Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022; row-wise scales as in torchao and FBGEMM.
"""

import torch
import triton
import triton.language as tl

E4M3_MAX = 448.0
"""Largest number of E4M3."""
ALIGNMENT = 16
"""Divisor of the sizes that the products need."""
MIN_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs with FP8 tensor cores (Ada)."""


def reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what `quantize_rows` returns, by PyTorch."""
    wide = x.float()
    scales = wide.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * E4M3_MAX) * (1 / E4M3_MAX)
    return (wide * (1 / scales)).to(torch.float8_e4m3fn), scales


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    x_ptr, q_ptr, s_ptr, stride, n_cols, TINY: tl.constexpr, E4M3_MAX: tl.constexpr, BLOCK_N: tl.constexpr
):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    mask = columns < n_cols

    x = tl.load(x_ptr + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), TINY) * (1 / E4M3_MAX)
    tl.store(s_ptr + row, scale)
    tl.store(q_ptr + row * n_cols + columns, (x * tl.math.div_rn(1.0, scale)).to(q_ptr.dtype.element_ty), mask=mask)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns E4M3 values [T, N] and fp32 scales [T, 1] with x ~ values * scales; rows of `x` may be strided.

    PyTorch on a CPU: Triton's interpreter rounds to E4M3 wrongly (127 to 64, not to 128).
    """
    if not x.is_cuda:
        return reference(x)

    count, n_cols = x.shape
    values = torch.empty(count, n_cols, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(n_cols)
    _quantize[(count,)](
        x, values, scales, x.stride(0), n_cols, TINY=torch.finfo(torch.float32).tiny * E4M3_MAX, E4M3_MAX=E4M3_MAX,
        BLOCK_N=block, num_warps=min(16, max(4, block // 1024)),
    )  # fmt: skip
    return values, scales


def fits_fp8(rows: int, columns: int) -> bool:
    """True if a weight of this shape can be multiplied in FP8."""
    return rows % ALIGNMENT == 0 and columns % ALIGNMENT == 0


class Fp8Weight:
    """A frozen W [out, in], quantised along both sides, for x W^T and for dy W."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._rows, self._row_scales = quantize_rows(weight)
        self._columns, self._column_scales = quantize_rows(weight.T.contiguous())
        self._dtype = weight.dtype

    @property
    def bytes(self) -> int:
        """Bytes in memory, of values and scales."""
        parts = (self._rows, self._row_scales, self._columns, self._column_scales)
        return sum(part.numel() * part.element_size() for part in parts)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns x W^T + bias, [T, out], for x [T, in]."""
        return self._product(x, self._rows, self._row_scales, bias)

    def backward(self, dy: torch.Tensor) -> torch.Tensor:
        """Returns dy W, [T, in], for dy [T, out]."""
        return self._product(dy, self._columns, self._column_scales, None)

    def _product(
        self, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        values, x_scales = quantize_rows(x)
        return torch._scaled_mm(
            values, weight.T, scale_a=x_scales, scale_b=scales.T, bias=bias, out_dtype=self._dtype, use_fast_accum=True
        )
