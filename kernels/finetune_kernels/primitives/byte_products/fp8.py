"""Products with frozen weights in FP8 (E4M3), with a scale for each row of either operand.

    y = x W^T ~ s_x (q_x q_W^T) s_W,   q = x / s rounded to E4M3,   s = max |row| / 448

Shapes: x [T, in], W [out, in] -> y [T, out]; q in E4M3, s in fp32, [T, 1] or [out, 1].

The tensor cores of Hopper and Ada multiply E4M3 at twice the rate of bfloat16 and add up in fp32. A scale per row of x
keeps one token's outlier to itself; one per row of W costs nothing. dx = dy W needs W with scales along the other side,
so both are kept: together as many bytes as W in bfloat16.

Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022; row-wise scales as in torchao and FBGEMM.
"""

import torch

from finetune_kernels.primitives.byte_products.byte_rows import quantize_rows

ALIGNMENT = 16
"""Divisor of the sizes that the products need."""
MIN_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs with FP8 tensor cores (Ada)."""


def fits_fp8(rows: int, columns: int) -> bool:
    """True if a weight of this shape can be multiplied in FP8."""
    return rows % ALIGNMENT == 0 and columns % ALIGNMENT == 0


def product(
    values: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor,
    bias: torch.Tensor | None, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Returns x W^T + bias, [T, out] in `dtype`, of E4M3 values [T, in] and [out, in] with scales [T, 1], [out, 1]."""
    return torch._scaled_mm(
        values, weight.T, scale_a=scales, scale_b=weight_scales.T, bias=bias, out_dtype=dtype, use_fast_accum=True
    )


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
        return product(*quantize_rows(x), weight, scales, bias, self._dtype)
