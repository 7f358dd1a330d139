"""A stack of NF4 matrices of one shape, such as the experts of a layer: each is quantised as if it were alone.

bitsandbytes quantises linear layers only. Here it quantises matrix by matrix, so that codes, scales and offsets are
those that a linear layer of the same weights would have; they lie in one tensor each, and one launch decodes them all.

Shapes: weights [N, out, in], codes [N, ceil(out in / 2)], scales [N, out in / 64].
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Self

import torch

from finetune_kernels.primitives import nf4


@dataclass
class Nf4Stack:
    """Matrices of one shape in NF4; what is None is there with double quantisation only."""

    shape: tuple[int, int, int]
    """[N, out, in]"""
    codes: torch.Tensor
    """uint8 [N, ceil(out in / 2)], two weights a byte."""
    code: torch.Tensor
    """The 16 values of NF4, fp32."""
    scales: torch.Tensor
    """uint8 [N, blocks] with double quantisation, else fp32."""
    code8: torch.Tensor | None = None
    """The 256 values of a quantised scale, fp32."""
    scales2: torch.Tensor | None = None
    """fp32 [N, ceil(blocks / 256)]"""
    offsets: torch.Tensor | None = None
    """fp32 [N], added to each matrix's scales."""

    @classmethod
    def of(cls, matrices: Iterable[torch.Tensor], *, double: bool) -> Self:
        """Quantises matrices [out, in] one after the other, each on its own device; `double`: the scales, too."""
        from bitsandbytes.functional import quantize_4bit

        shape: tuple[int, ...] = ()
        parts: list[tuple[torch.Tensor, Any]] = []
        for matrix in matrices:
            shape = tuple(matrix.shape)
            parts.append(quantize_4bit(matrix.contiguous(), quant_type="nf4", compress_statistics=double))

        states, nested = [state for _, state in parts], {}
        if double:
            nested = {
                "code8": states[0].state2.code,
                "scales2": torch.stack([state.state2.absmax for state in states]),
                "offsets": torch.stack([state.offset for state in states]),
            }
        return cls(
            (len(parts), shape[0], shape[1]),
            torch.stack([packed.flatten() for packed, _ in parts]),
            states[0].code,
            torch.stack([state.absmax for state in states]),
            **nested,
        )

    @property
    def bytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by their field's name."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    def reference(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights [N, out, in] by the formula, in fp32 and rounded to `dtype`."""
        matrices, rows, columns = self.shape
        scales = self.scales
        if self.code8 is not None and self.scales2 is not None and self.offsets is not None:
            wide = self.scales2.repeat_interleave(nf4.BLOCK2, dim=1)[:, : scales.shape[1]]
            scales = self.code8[scales.int()] * wide + self.offsets.unsqueeze(1)

        codes, count = self.codes.int(), rows * columns
        values = self.code[torch.stack((codes >> 4, codes & 15), dim=2).view(matrices, -1)[:, :count]]
        decoded = values * scales.repeat_interleave(nf4.BLOCK, dim=1)[:, :count]
        return decoded.to(dtype).view(self.shape)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights [N, out, in] in `dtype`: by the kernel on CUDA, by the formula elsewhere."""
        if not self.codes.is_cuda:
            return self.reference(dtype)
        return nf4.dequantize_stack(self, torch.empty(self.shape, dtype=dtype, device=self.codes.device))
