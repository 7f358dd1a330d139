"""The adapters of linear layers that run as one group, as peft made them, and what a pass through them is made with.

Weights stay peft's parameters, read where they are used: nothing is copied that an optimiser changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from finetune_kernels.primitives.adapter_dropout import Mask
from finetune_kernels.primitives.dora import Scales


@dataclass(frozen=True)
class LoraPass:
    """What one pass through a group is made with, forward and backward alike."""

    masks: tuple[Mask, ...] = ()
    """Of each adapter's input; empty where nothing is dropped."""
    scales: Scales | None = None
    """None where no adapter has magnitudes."""

    def from_row(self, row: int) -> "LoraPass":
        """For rows that begin `row` further on."""
        return replace(self, masks=tuple(mask.from_row(row) for mask in self.masks)) if self.masks else self


PLAIN = LoraPass()


@dataclass(frozen=True)
class LinearAdapter:
    """One layer's adapter, and its place among the group's ranks and outputs."""

    a: nn.Parameter
    b: nn.Parameter
    magnitude: nn.Parameter | None
    """DoRA's m."""
    scale: float
    ranks: slice
    outputs: slice
    dropout: nn.Module
    """peft's: nn.Dropout, or nn.Identity."""
    philox_stream: int
    """Of its masks."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """A, B and, where there are magnitudes, m."""
        return [self.a, self.b] if self.magnitude is None else [self.a, self.b, self.magnitude]

    @property
    def p(self) -> float:
        """The share of its input that is dropped now."""
        return float(self.dropout.p) if isinstance(self.dropout, nn.Dropout) and self.dropout.training else 0.0


def lay_out_adapters(linears: Sequence[Any], philox_stream: int) -> list[LinearAdapter]:
    """The adapters of those of the layers that have one; the layers' streams are counted from `philox_stream` on."""
    found: list[LinearAdapter] = []
    rank = output = 0
    for number, linear in enumerate(linears, philox_stream):
        size = getattr(linear, "base_layer", linear).out_features
        if hasattr(linear, "lora_A"):
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
        output += size
    return found
