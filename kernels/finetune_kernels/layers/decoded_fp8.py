"""Frozen NF4 weights of linear layers that read the same input, multiplied in FP8 without a copy that stays.

Each pass decodes them to E4M3, as rows for x W^T and as columns for dy W; both are a byte a weight. Only the scales of
rows stay, 8 bytes each.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch

from finetune_kernels.primitives.byte_products.byte_rows import quantize_rows
from finetune_kernels.primitives.byte_products.fp8 import product
from finetune_kernels.primitives.byte_products.nf4_bytes import decode, fits_bytes, row_scales

E4M3 = torch.float8_e4m3fn


class _Scales(NamedTuple):
    """Scales of W's rows, their inverses, [out, 1] each, and ones [in, 1], the scales of its columns; fp32."""

    rows: torch.Tensor
    inverses: torch.Tensor
    columns: torch.Tensor


class DecodedFp8:
    """W [out, in] of the layers `bases`, which `of` accepts; products are in `dtype`."""

    def __init__(self, bases: Sequence[Any], dtype: torch.dtype) -> None:
        self._bases, self._dtype = bases, dtype
        self._sizes = [base.out_features for base in bases]
        self._features = int(bases[0].in_features)
        self._scales: _Scales | None = None
        self._held: dict[bool, torch.Tensor] | None = None

    @classmethod
    def of(cls, bases: Sequence[Any], dtype: torch.dtype) -> Self | None:
        """Returns the weights of `bases`; None if they are not NF4 in whole blocks a row."""
        states = [getattr(base.weight, "quant_state", None) for base in bases]
        return cls(bases, dtype) if all(state is not None and fits_bytes(state) for state in states) else None

    @property
    def bytes(self) -> int:
        """Bytes in memory, of the scales."""
        return sum(part.nbytes for part in self._scales or ())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Decodes W at most once in either order for all products inside."""
        self._held = {}
        try:
            yield
        finally:
            self._held = None

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns x W^T + bias, [T, out], for x [T, in]."""
        scales = self._row_scales()
        return product(*quantize_rows(x), self._decode(transposed=False), scales.rows, bias, self._dtype)

    def backward(self, dy: torch.Tensor) -> torch.Tensor:
        """Returns dy W, [T, in], for dy [T, out]: the rows' scales lie along the summed side, so dy takes them."""
        scales = self._row_scales()
        rows = quantize_rows(dy, E4M3, scales.rows.squeeze(1))
        return product(*rows, self._decode(transposed=True), scales.columns, None, self._dtype)

    def _row_scales(self) -> _Scales:
        """Made at the first product, as weights may be on the device only while their layer computes."""
        if self._scales is None:
            rows = torch.cat([row_scales(base.weight.quant_state, E4M3) for base in self._bases])
            self._scales = _Scales(rows, 1 / rows, rows.new_ones(self._features, 1))
        return self._scales

    def _decode(self, *, transposed: bool) -> torch.Tensor:
        """Values [out, in], or [in, out]; each layer's part is written in place."""
        if self._held is not None and transposed in self._held:
            return self._held[transposed]

        shape = (self._features, sum(self._sizes)) if transposed else (sum(self._sizes), self._features)
        values = torch.empty(shape, dtype=E4M3, device=self._bases[0].weight.device)
        parts = torch.split(values, self._sizes, 1 if transposed else 0)
        inverses = torch.split(self._row_scales().inverses, self._sizes)
        for base, part, inverse in zip(self._bases, parts, inverses, strict=True):
            decode(base.weight.data, base.weight.quant_state, inverse, part, transposed=transposed)

        if self._held is not None:
            self._held[transposed] = values
        return values
