"""Frozen linear layers that read the same input, with their LoRA adapters, as one: q, k, v; gate, up; or one alone.

    y  = x W^T + bias, y_i += scale_i (x A_i^T) B_i^T      W [out, in]: the layers' weights on top of each other
    dx = dy W + d A,   d_i = scale_i dy_i B_i              A [R, in]: their A's on top of each other
    dA_i = d_i^T x,    dB_i = scale_i dy_i^T (x A_i^T)

x is read once for all adapters, x A^T is kept, d made once, and the adapters' shares are added by the products
themselves (beta = 1). W stays decoded, or is decoded from NF4 where it is used.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from finetune_kernels.adapted_activation import Share
from finetune_kernels.eight_bit import EightBitWeight, suits
from finetune_kernels.nf4 import dequantize


@dataclass(frozen=True)
class _Adapter:
    """One layer's adapter, and its place among the group's ranks and outputs."""

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float
    ranks: slice
    outputs: slice


def reference(linears: Sequence[Any], x: torch.Tensor) -> torch.Tensor:
    """The layers one by one, side by side: x [T, in] -> [T, out]."""
    return torch.cat([linear(x) for linear in linears], dim=-1)


class LinearGroup:
    """The layers `linears` (peft's LoRA layers, or plain ones) as one; `resident` keeps W decoded."""

    def __init__(self, linears: Sequence[Any], dtype: torch.dtype, *, resident: bool) -> None:
        self._bases = [getattr(linear, "base_layer", linear) for linear in linears]
        self._dtype = dtype
        self._sizes = [base.out_features for base in self._bases]
        self.features = self._bases[0].in_features
        self._adapters = self._place(linears)
        self._ranks = self._adapters[-1].ranks.stop if self._adapters else 0
        self.bias = self._merge_biases()
        self._kept = self._decode() if resident else None
        self._eight_bit: EightBitWeight | None = None

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
        for base, state, part in zip(self._bases, states, torch.split(merged, self._sizes), strict=True):
            if state is None:
                part.copy_(base.weight.detach())
            else:
                dequantize(base.weight.data, state, part)
        return merged

    def weight(self) -> torch.Tensor:
        """W [out, in] in the compute type."""
        return self._decode() if self._kept is None else self._kept

    @contextmanager
    def decoded(self) -> Iterator[None]:
        """W is decoded once for all products inside."""
        stays = self._kept is not None or self._eight_bit is not None
        if not stays:
            self._kept = self._decode()
        try:
            yield
        finally:
            if not stays:
                self._kept = None

    def use_eight_bits(self) -> None:
        """Keep W in 8 bits for both products, instead of decoded."""
        if suits(sum(self._sizes), self.features):
            self._eight_bit, self._kept = EightBitWeight(self.weight()), None

    def use_sixteen_bits(self) -> None:
        """Keep W decoded."""
        self._kept, self._eight_bit = self.weight(), None

    def release(self) -> None:
        """Do not keep W any longer; it is decoded where it is used."""
        self._kept = self._eight_bit = None

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights that stay beside those loaded."""
        if self._eight_bit is not None:
            return self._eight_bit.bytes
        if self._kept is None or self._kept.data_ptr() == self._bases[0].weight.data_ptr():
            return 0
        return self._kept.numel() * self._kept.element_size()

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """A and B of each adapter in turn: the order of `gradients`."""
        return [parameter for adapter in self._adapters for parameter in (adapter.a, adapter.b)]

    def a(self) -> torch.Tensor:
        """A [R, in] in the compute type."""
        if len(self._adapters) == 1:
            return self._adapters[0].a.to(self._dtype)
        return torch.cat([adapter.a.to(self._dtype) for adapter in self._adapters])

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """x A^T [T, R]."""
        return x @ self.a().T if self._adapters else x.new_empty(x.shape[0], 0)

    def base(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> x W^T + bias [T, out]: y without the adapters' shares."""
        if self._eight_bit is not None:
            return self._eight_bit.forward(x, self.bias)
        return functional.linear(x, self.weight(), self.bias)

    def shares(self, inner: torch.Tensor) -> tuple[Share | None, Share | None]:
        """What the adapters add to the first and to the second half of y."""
        half = sum(self._sizes) // 2
        found: list[Share | None] = [None, None]
        for adapter in self._adapters:
            b, i = adapter.b.to(self._dtype), inner[:, adapter.ranks]
            for index in (0, 1):
                if adapter.outputs.start <= index * half and adapter.outputs.stop >= (index + 1) * half:
                    first = index * half - adapter.outputs.start
                    found[index] = Share(i, b[first : first + half], adapter.scale)
        return found[0], found[1]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, in] -> y [T, out] and x A^T [T, R]."""
        inner = self.inner(x)
        y = self.base(x)
        for adapter in self._adapters:
            b = adapter.b.to(self._dtype)
            y[:, adapter.outputs].addmm_(inner[:, adapter.ranks], b.T, alpha=adapter.scale)
        return y, inner

    def d_inner(self, dy: torch.Tensor) -> torch.Tensor:
        """dy [T, out] -> d [T, R]."""
        found = dy.new_empty(dy.shape[0], self._ranks)
        for adapter in self._adapters:
            b = _scaled(adapter.b.to(self._dtype), adapter.scale)
            torch.mm(dy[:, adapter.outputs], b, out=found[:, adapter.ranks])
        return found

    def backward_base(self, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dy [T, out] -> dy W [T, in], which lacks d A, and d [T, R]."""
        dx = dy @ self.weight() if self._eight_bit is None else self._eight_bit.backward(dy)
        return dx, self.d_inner(dy)

    def backward(self, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dy [T, out] -> dx [T, in] and d [T, R]."""
        dx, d_inner = self.backward_base(dy)
        return (dx.addmm_(d_inner, self.a()) if self._adapters else dx), d_inner

    def gradients(
        self, dy: torch.Tensor, x: torch.Tensor, inner: torch.Tensor, d_inner: torch.Tensor
    ) -> list[torch.Tensor]:
        """Gradients of `parameters`, in their types."""
        if not self._adapters:
            return []
        da = d_inner.T @ x
        found = []
        for adapter in self._adapters:
            db = dy[:, adapter.outputs].T @ inner[:, adapter.ranks]
            found += [da[adapter.ranks].to(adapter.a.dtype), _scaled(db, adapter.scale).to(adapter.b.dtype)]
        return found


def _scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x if scale == 1 else x * scale
