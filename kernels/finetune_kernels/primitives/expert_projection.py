"""One linear layer of all experts of a mixture, frozen, with the adapters that some of its outputs have.

    y[s] = x[s] W_e^T + bias_e + scale (x[s] A_e^T) B_e^T                    for each row s, of expert e

Shapes: x [S, in], rows sorted by expert, W [E, out, in], bias [E, out], A [E, r, in], B [E, out of the adapter, r].
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from finetune_kernels.primitives.grouped import low_rank, products
from finetune_kernels.primitives.grouped.low_rank import Factor

Weight = Callable[[torch.dtype], torch.Tensor]
"""Gives W [E, out, in] in the compute type: a tensor that is kept, or a fresh dequantisation."""


class ExpertAdapter(NamedTuple):
    """The adapters of one projection's experts, in the compute type."""

    a: Factor
    """A [E, r, in], on all inputs."""
    b: Factor
    """B^T [E, r, out of this adapter], on its columns of the output, with the adapter's scale."""


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
        """The adapters whose A and B are `parameters`, one after the other."""
        found = []
        for number, (scale, outputs) in enumerate(zip(self.scales, self.outputs, strict=True)):
            a, b = (part.to(dtype) for part in parameters[2 * number : 2 * number + 2])
            found.append(ExpertAdapter(Factor(a, slice(None), 1.0), Factor(b.transpose(1, 2), outputs, scale)))
        return found

    def forward(self, x: torch.Tensor, adapters: list[ExpertAdapter], rows: "Rows") -> torch.Tensor:
        """x [S, in] -> y [S, out]."""
        y = products.linear(x, self.weight(x.dtype), rows.ends)
        if self.bias is not None:
            y += self.bias[rows.experts].to(y.dtype)
        if adapters:
            low_rank.expand(y, self.xa(x, adapters, rows), [adapter.b for adapter in adapters], rows.ends)
        return y

    def xa(self, x: torch.Tensor, adapters: list[ExpertAdapter], rows: "Rows") -> torch.Tensor:
        """x [S, in] -> x A^T of all adapters, side by side [S, r of all]."""
        return low_rank.shrink(x, [adapter.a for adapter in adapters], rows.ends)

    def backward(
        self, dy: torch.Tensor, adapters: list[ExpertAdapter], rows: "Rows"
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """dy [S, out] -> dx [S, in] and the gradient of `xa`; None without adapters."""
        dx = products.backward(dy, self.weight(dy.dtype), rows.ends)
        if not adapters:
            return dx, None

        d_xa = low_rank.shrink(dy, [adapter.b for adapter in adapters], rows.ends)
        low_rank.expand(dx, d_xa, [adapter.a for adapter in adapters], rows.ends)
        return dx, d_xa

    def gradients(
        self, dy: torch.Tensor, x: torch.Tensor, d_xa: torch.Tensor | None, adapters: list[ExpertAdapter], rows: "Rows",
        weights: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:  # fmt: skip
        """dy [S, out], x [S, in], d_xa of `backward` -> the gradients of A and B of each adapter; `weights` [S]
        multiplies the rows of dy and d_xa."""
        if d_xa is None:
            return []

        xa = self.xa(x, adapters, rows)
        da = low_rank.outer(d_xa, x, [adapter.a for adapter in adapters], rows.ends, weights)
        db = low_rank.outer(xa, dy, [adapter.b for adapter in adapters], rows.ends, weights)
        return [part for a, b in zip(da, db, strict=True) for part in (a, b.transpose(1, 2))]


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
