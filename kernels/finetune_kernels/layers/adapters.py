"""The LoRA adapters of linear layers that run as one group, as peft made them.

Weights stay peft's parameters and are read where they are used: nothing is copied that an optimiser changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class LinearAdapter:
    """The adapter of one linear layer, and its slices of the group's ranks and outputs."""

    a: nn.Parameter
    """A [r, in]."""
    b: nn.Parameter
    """B [out of this layer, r]."""
    magnitude: nn.Parameter | None
    """DoRA's m [out of this layer]."""
    scale: float
    ranks: slice
    """Its columns of x A^T [T, R]."""
    outputs: slice
    """Its columns of y [T, out]."""
    dropout: nn.Module
    """peft's: nn.Dropout, or nn.Identity."""
    philox_stream: int
    """Stream of random numbers that its dropout mask is drawn from."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A, B and, for DoRA, m."""
        return [self.a, self.b] if self.magnitude is None else [self.a, self.b, self.magnitude]

    @property
    def p(self) -> float:
        """Probability that an element of its input is dropped now."""
        return float(self.dropout.p) if isinstance(self.dropout, nn.Dropout) and self.dropout.training else 0.0


@dataclass(frozen=True)
class AdapterStack:
    """The adapters of a group: their A's on top of each other, in the compute type."""

    adapters: list[LinearAdapter]
    dtype: torch.dtype

    @property
    def ranks(self) -> int:
        """R, the sum of all ranks."""
        return self.adapters[-1].ranks.stop if self.adapters else 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Each adapter's parameters in turn."""
        return [parameter for adapter in self.adapters for parameter in adapter.parameters]

    def a(self) -> torch.Tensor:
        """A [R, in] in the compute type."""
        if len(self.adapters) == 1:
            return self.adapters[0].a.to(self.dtype)
        return torch.cat([adapter.a.to(self.dtype) for adapter in self.adapters])


def lay_out_adapters(linears: Sequence[Any], philox_stream: int) -> list[LinearAdapter]:
    """Gives every layer that has an adapter its slices of ranks and outputs; linear i draws its dropout mask from
    stream `philox_stream` + i."""
    found: list[LinearAdapter] = []
    rank = output = 0

    for number, linear in enumerate(linears, philox_stream):
        size = getattr(linear, "base_layer", linear).out_features
        if hasattr(linear, "lora_A"):
            # Exactly one adapter is active: `why_not_adapter` lets no other layer through.
            (name,) = linear.active_adapters
            a, b, magnitudes = linear.lora_A[name].weight, linear.lora_B[name].weight, linear.lora_magnitude_vector
            found.append(
                LinearAdapter(
                    a,
                    b,
                    magnitudes[name].weight if name in magnitudes else None,
                    scale=float(linear.scaling[name]),
                    ranks=slice(rank, rank + a.shape[0]),
                    outputs=slice(output, output + size),
                    dropout=linear.lora_dropout[name],
                    philox_stream=number,
                )
            )
            rank += a.shape[0]
        output += size  # layers without an adapter have outputs, too

    return found
