"""Frozen linear layers that read the same input, with their LoRA adapters, as one: q, k, v; gate, up; or one alone.

    y  = x W^T + bias + (x A^T) B^T          W [out, in]: the layers' weights on top of each other
    dx = dy W + (dy B) A                     A [R, in]: their A's on top of each other, times their scales
    dA = scale (dy B)^T x,  dB = dy^T (x A^T)  B [out, R]: their B's on the diagonal, zero elsewhere

x is read once for all adapters, x A^T is kept and dy B made once. A and B are 16-bit copies of the parameters, taken
again before every forward pass over the model. W stays decoded or is decoded from NF4 where it is used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from finetune_kernels.nf4 import dequantize


@dataclass(frozen=True)
class _Adapter:
    """One layer's adapter, and its place in the merged A and B."""

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float
    ranks: slice
    outputs: slice


class LinearGroup:
    """The layers `linears` (peft's LoRA layers, or plain ones) as one; `resident` keeps W decoded."""

    def __init__(self, linears: Sequence[Any], dtype: torch.dtype, *, resident: bool) -> None:
        self._bases = [getattr(linear, "base_layer", linear) for linear in linears]
        self._dtype = dtype
        self._sizes = [base.out_features for base in self._bases]
        self.features = self._bases[0].in_features
        self._adapters = self._place(linears)
        rank = self._adapters[-1].ranks.stop if self._adapters else 0
        device = self._bases[0].weight.device
        self._a = torch.zeros(rank, self.features, dtype=dtype, device=device)
        self._b = torch.zeros(sum(self._sizes), rank, dtype=dtype, device=device)
        self.bias = self._merge_biases()
        self._kept = self._decode() if resident else None

    def _place(self, linears: Sequence[Any]) -> list[_Adapter]:
        found: list[_Adapter] = []
        rank = output = 0
        for linear, size in zip(linears, self._sizes, strict=True):
            if hasattr(linear, "lora_A"):
                (name,) = linear.active_adapters
                a, b = linear.lora_A[name].weight, linear.lora_B[name].weight
                places = slice(rank, rank + a.shape[0]), slice(output, output + size)
                found.append(_Adapter(a, b, float(linear.scaling[name]), *places))
                rank += a.shape[0]
            output += size
        return found

    def _merge_biases(self) -> torch.Tensor | None:
        if all(base.bias is None for base in self._bases):
            return None
        device = self._bases[0].weight.device
        parts = [
            torch.zeros(size, device=device) if base.bias is None else base.bias.detach()
            for base, size in zip(self._bases, self._sizes, strict=True)
        ]
        return torch.cat([part.to(self._dtype) for part in parts])

    def _decode(self) -> torch.Tensor:
        states = [getattr(base.weight, "quant_state", None) for base in self._bases]
        if len(self._bases) == 1 and states[0] is None and self._bases[0].weight.dtype == self._dtype:
            return self._bases[0].weight.detach()  # type: ignore[no-any-return]
        merged = torch.empty(sum(self._sizes), self.features, dtype=self._dtype, device=self._bases[0].weight.device)
        for base, state, part in zip(self._bases, states, merged.split(self._sizes), strict=True):
            if state is None:
                part.copy_(base.weight.detach())
            else:
                dequantize(base.weight.data, state, part)
        return merged

    def weight(self) -> torch.Tensor:
        """W [out, in] in the compute type."""
        return self._decode() if self._kept is None else self._kept

    def release(self) -> None:
        """Do not keep W decoded any longer."""
        self._kept = None

    @property
    def resident_bytes(self) -> int:
        """Bytes of decoded weights that stay."""
        if self._kept is None or self._kept.data_ptr() == self._bases[0].weight.data_ptr():
            return 0
        return self._kept.numel() * self._kept.element_size()

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """A and B of each adapter in turn: the order of `gradients`."""
        return [parameter for adapter in self._adapters for parameter in (adapter.a, adapter.b)]

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the adapters' present values."""
        for adapter in self._adapters:
            self._a[adapter.ranks] = adapter.a * adapter.scale if adapter.scale != 1 else adapter.a
            self._b[adapter.outputs, adapter.ranks] = adapter.b

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """x A^T [T, R]."""
        return x @ self._a.T

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, in] -> y [T, out] and x A^T [T, R]."""
        inner = self.inner(x)
        y = functional.linear(x, self.weight(), self.bias)
        return (y.addmm_(inner, self._b.T) if self._adapters else y), inner

    def backward(self, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dy [T, out] -> dx [T, in] and dy B [T, R]."""
        d_inner = dy @ self._b
        dx = dy @ self.weight()
        return (dx.addmm_(d_inner, self._a) if self._adapters else dx), d_inner

    def gradients(
        self, dy: torch.Tensor, x: torch.Tensor, inner: torch.Tensor, d_inner: torch.Tensor
    ) -> list[torch.Tensor]:
        """Gradients of `parameters`, in their types."""
        if not self._adapters:
            return []
        da, db = d_inner.T @ x, dy.T @ inner
        found = []
        for adapter in self._adapters:
            of_a = da[adapter.ranks] * adapter.scale if adapter.scale != 1 else da[adapter.ranks]
            found += [of_a.to(adapter.a.dtype), db[adapter.outputs, adapter.ranks].to(adapter.b.dtype).contiguous()]
        return found
