"""One linear layer of all experts of a mixture, frozen, with the adapters that some of its outputs have.

    y[s] = x[s] W_e^T + bias_e + scale (x[s] A_e^T) B_e^T                    for each row s, of expert e

Shapes: x [S, in], rows sorted by expert, W [E, out, in], bias [E, out], A [E, r, in], B [E, out of the adapter, r].
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from finetune_kernels.primitives import grouped

Weight = Callable[[torch.dtype], torch.Tensor]
"""Gives W [E, out, in] in the compute type: a tensor that is kept, or a fresh dequantisation."""


class ExpertAdapter(NamedTuple):
    """The adapters of one projection's experts, in the compute type."""

    a: torch.Tensor
    """A [E, r, in]"""
    b: torch.Tensor
    """B [E, out of this adapter, r]"""
    scale: float
    outputs: slice
    """Its columns of the projection's output."""


class Projection(NamedTuple):
    """A frozen linear layer of all experts."""

    weight: Weight
    bias: torch.Tensor | None
    """[E, out]"""
    scales: tuple[float, ...]
    """s of each adapter."""
    outputs: tuple[slice, ...]
    """Columns of each adapter's output."""

    def adapters(self, parameters: list[torch.Tensor], dtype: torch.dtype) -> list[ExpertAdapter]:
        """The adapters whose A and B are `parameters`, one after the other; ranks are filled up to what the grouped
        product takes."""
        found = []
        for number, (scale, outputs) in enumerate(zip(self.scales, self.outputs, strict=True)):
            a, b = (part.to(dtype) for part in parameters[2 * number : 2 * number + 2])
            if a.is_cuda and (lacking := -a.shape[1] % grouped.ALIGNMENT):
                a, b = functional.pad(a, (0, 0, 0, lacking)), functional.pad(b, (0, lacking))
            found.append(ExpertAdapter(a, b, scale, outputs))
        return found

    def forward(self, x: torch.Tensor, adapters: list[ExpertAdapter], rows: "Rows") -> torch.Tensor:
        """x [S, in] -> y [S, out]."""
        y = grouped.linear(x, self.weight(x.dtype), rows.ends)
        if self.bias is not None:
            y += self.bias[rows.experts].to(y.dtype)
        for a, b, scale, outputs in adapters:
            y[:, outputs] += grouped.linear(grouped.linear(x, a, rows.ends), b * scale, rows.ends)
        return y

    def backward(self, dy: torch.Tensor, adapters: list[ExpertAdapter], rows: "Rows") -> torch.Tensor:
        """dy [S, out] -> dx [S, in]."""
        dx = grouped.backward(dy, self.weight(dy.dtype), rows.ends)
        for a, b, scale, outputs in adapters:
            d_xa = grouped.backward(_aligned(dy[:, outputs]), b * scale, rows.ends)
            dx += grouped.backward(d_xa, a, rows.ends)
        return dx

    def gradients(
        self, dy: torch.Tensor, x: torch.Tensor, adapters: list[ExpertAdapter], parameters: list[torch.Tensor],
        rows: "Rows",
    ) -> list[torch.Tensor]:  # fmt: skip
        """Gradients of `parameters`, in their types and shapes: dy [S, out], x [S, in]."""
        found = []
        for number, (a, b, scale, outputs) in enumerate(adapters):
            part = _aligned(dy[:, outputs])
            xa, d_xa = grouped.linear(x, a, rows.ends), grouped.backward(part, b * scale, rows.ends)
            rank = parameters[2 * number].shape[1]
            da, db = grouped.outer(d_xa, x, rows.ends), grouped.outer(part, xa, rows.ends) * scale
            found += [da[:, :rank].to(parameters[0].dtype), db[:, :, :rank].to(parameters[0].dtype)]
        return found


class Rows(NamedTuple):
    """The rows of all experts, sorted by expert."""

    order: torch.Tensor
    """Place of each row in the flat [T k], int64 [S]."""
    ends: torch.Tensor
    """Row behind the last one of each expert, int32 [E]."""
    experts: torch.Tensor
    """Expert of each row, int64 [S]."""
    places: torch.Tensor
    """Row of each place in the flat [T k], int64 [S]: the inverse of `order`."""

    @classmethod
    def sort(cls, index: torch.Tensor, experts: int) -> "Rows":
        """Sorts by the experts' `index` [T, k]; does not wait for the GPU."""
        expert, order = torch.sort(index.flatten(), stable=True)
        ends = torch.searchsorted(expert, torch.arange(experts, device=index.device), right=True, out_int32=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=index.device))
        return cls(order, ends, expert, places)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """Columns of a tensor whose rows begin where the grouped product takes them."""
    return x if x.stride(1) == 1 and x.data_ptr() % 16 == 0 else x.contiguous()
