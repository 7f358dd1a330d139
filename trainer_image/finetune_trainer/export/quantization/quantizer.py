"""The interface that every quant family implements, and arithmetic that several of them share.

A quantizer is one tensor type of GGUF: its parameters, its encoder in torch and the layout of its bytes. Families of
types with the same arithmetic share a file: `floats`, `plain`, `affine`, `symmetric`, `codebook`. The file of the same
name in `cpu/` has the compiled twin of each, which gives the same bytes. `quantizers.QUANTIZERS` lists every type.
"""

from abc import ABC, abstractmethod

import torch


class Quantizer(ABC):
    """One tensor type; subclasses are frozen dataclasses whose fields are the type's parameters."""

    @abstractmethod
    def encode(self, blocks: torch.Tensor) -> torch.Tensor:
        """Encode fp32 `blocks` [n, block size] in torch; returns uint8 [n, block bytes] on the same device."""


def as_bytes(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round `values` [..., k] to `dtype`; returns their bytes, uint8 [..., k * bytes per value]."""
    return values.to(dtype).contiguous().view(torch.uint8)


def inverse_or_zero(values: torch.Tensor) -> torch.Tensor:
    """1 / value; 0 for 0."""
    return torch.where(values == 0, 0.0, 1 / values)
