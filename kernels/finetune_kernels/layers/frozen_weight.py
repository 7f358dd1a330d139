"""The frozen weights of linear layers that read the same input, on top of each other: W [out, in].

W is kept, or decoded from NF4 where it is used; either in the compute type or in FP8. What is on the GPU only while its
layer computes is kept from its next use on.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from finetune_kernels.layers.decoded_fp8 import DecodedFp8
from finetune_kernels.primitives.byte_products.fp8 import Fp8Weight, fits_fp8
from finetune_kernels.primitives.nf4 import dequantize


class FrozenWeight:
    """W of the layers `bases`, in `dtype`; `keep_dequantized`: W is kept in that type."""

    def __init__(self, bases: Sequence[Any], dtype: torch.dtype, *, keep_dequantized: bool) -> None:
        self._bases, self._dtype = bases, dtype
        self.sizes: list[int] = [base.out_features for base in bases]
        """Rows of each layer."""
        self.features = int(bases[0].in_features)
        self._keeps = False
        self._kept: torch.Tensor | None = None
        self._fp8: Fp8Weight | DecodedFp8 | None = None
        if keep_dequantized:
            self.keep()

    def _dequantize(self) -> torch.Tensor:
        """W [out, in]; a single layer's own tensor if it is in the compute type already."""
        states = [getattr(base.weight, "quant_state", None) for base in self._bases]
        if len(self._bases) == 1 and states[0] is None and self._bases[0].weight.dtype == self._dtype:
            return self._bases[0].weight.detach()  # type: ignore[no-any-return]

        # Each layer's part is written in place: no second copy to concatenate.
        merged = torch.empty(sum(self.sizes), self.features, dtype=self._dtype, device=self._bases[0].weight.device)
        for base, state, part in zip(self._bases, states, torch.split(merged, self.sizes), strict=True):
            if state is None:
                part.copy_(base.weight.detach())
            else:
                dequantize(base.weight.data, state, part)

        return merged

    def tensor(self) -> torch.Tensor:
        """W [out, in] in the compute type."""
        if self._kept is not None:
            return self._kept
        found = self._dequantize()
        self._kept = found if self._keeps else None
        return found

    @contextmanager
    def dequantized(self) -> Iterator[None]:
        """Decodes W once for all products inside, and releases it afterwards unless it was kept before."""
        if isinstance(self._fp8, DecodedFp8):
            with self._fp8.held():
                yield
            return

        stays = self._keeps or self._fp8 is not None
        if not stays:
            self._kept = self._dequantize()
        try:
            yield
        finally:
            if not stays:
                self._kept = None

    def use_fp8(self) -> None:
        """Multiplies in FP8 from now on: by a copy in FP8 instead of a kept one in the compute type, or by W as decoded
        to FP8 in each pass; does nothing if FP8 does not take W's sizes, or W is neither kept nor in NF4."""
        if not fits_fp8(sum(self.sizes), self.features):
            return
        if self._keeps:
            self._fp8, self._kept = Fp8Weight(self.tensor()), None
        else:
            self._fp8 = DecodedFp8.of(self._bases, self._dtype)

    @property
    def is_fp8(self) -> bool:
        """True if products are in FP8."""
        return self._fp8 is not None

    def use_compute_dtype(self) -> None:
        """Multiplies in the compute type again, and keeps W in it if it was kept."""
        self._fp8 = None
        if self._keeps:
            self.tensor()

    def keep(self) -> None:
        """Keeps W dequantised in the compute type, unless it is kept in FP8: from now on, or from its next use if the
        layers' weights are not on the device now."""
        if self._fp8 is None:
            self._keeps = True
            if all(base.weight.untyped_storage().size() for base in self._bases):
                self.tensor()

    def release(self) -> None:
        """Keeps W no longer; from now on it is decoded where it is used, to FP8 if it was multiplied in FP8."""
        was_fp8 = self.is_fp8
        self._kept, self._fp8, self._keeps = None, None, False
        if was_fp8:
            self.use_fp8()

    @property
    def dequantized_bytes(self) -> int:
        """Bytes of kept weights beside those loaded, in the compute type or FP8; of weights that are decoded to FP8,
        those of their scales."""
        if self._fp8 is not None:
            return self._fp8.bytes

        # A base layer's own tensor costs nothing.
        if self._kept is None or self._kept.data_ptr() == self._bases[0].weight.data_ptr():
            return 0
        return self._kept.numel() * self._kept.element_size()

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, in] -> x W^T + bias [T, out]."""
        if self._fp8 is not None:
            return self._fp8.forward(x, bias)
        return functional.linear(x, self.tensor(), bias)

    def backward(self, dy: torch.Tensor) -> torch.Tensor:
        """dy [T, out] -> dy W [T, in]."""
        return dy @ self.tensor() if self._fp8 is None else self._fp8.backward(dy)
