"""Super-blocks: what all K-quants share, in torch. `affine` and `symmetric` are the two families.

A super-block of 256 weights has groups of 16 or 32. Weight x of group j becomes code q with

    x ~ d * s_j * q - e * m_j    affine: Q2_K, Q4_K, Q5_K           x ~ d * s_j * q    symmetric: Q3_K, Q6_K

where s_j and m_j are small integers, and d and e are float16. The squared error is weighted as llama.cpp weights it
without an importance matrix. Three steps:

1. For each group, the best of several trial ranges, with scale and minimum by least squares.
2. Integers for scale and minimum.
3. Rounds of coordinate descent: codes, then integers, then d and e by least squares, each given the rest.

llama.cpp stops after step 2 and tries 16 to 21 ranges; with step 3, half as many ranges give a smaller error.

Weights are held as [group size, groups], so that a sum over a group is an addition of long rows. Every sum is taken in
one order and no product is fused with an addition, so a GPU gives the same bytes as `cpu/` does.

Source: the layouts are llama.cpp's published structs block_q*_K (ggml-common.h).
"""

from abc import ABC
from dataclasses import dataclass

import torch

from finetune_trainer.export.quantization.quantizer import Quantizer

SUPER_BLOCK = 256
"""Weights of a super-block."""


@dataclass(frozen=True)
class KQuantizer(Quantizer, ABC):
    """Parameters that both families of K-quants have."""

    bits: int
    """Bits of a code."""
    group: int
    """Weights that share a scale."""
    trials: tuple[float, ...]
    """One trial range each: what is added to the number of steps that a group's range is first divided into."""
    rounds: int
    """Rounds of coordinate descent."""

    @property
    def groups(self) -> int:
        """Groups of a super-block."""
        return SUPER_BLOCK // self.group


def divide_or_zero(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Quotient; 0 where the denominator is not positive."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def to_float16(values: torch.Tensor) -> torch.Tensor:
    """Round fp32 values to numbers that float16 holds; zeros become positive."""
    return (values + 0.0).to(torch.float16).to(torch.float32)


def sum_rows(rows: torch.Tensor) -> torch.Tensor:
    """[rows, ...] -> [...], added one row after the other."""
    total = torch.zeros_like(rows[0])
    for row in rows:
        total += row
    return total


def sum_groups(values: torch.Tensor, groups: int) -> torch.Tensor:
    """[n * groups] -> [n]: the sum over each super-block, in the order of its groups."""
    return sum_rows(values.view(-1, groups).t())


def square_root(values: torch.Tensor) -> torch.Tensor:
    """Correctly rounded root: torch's own fp32 root is the neighbouring number for one value in five on a CPU."""
    return values.double().sqrt().float()


def farther_from_zero(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Whichever has the larger magnitude; `high` where they are equal."""
    return torch.where(high >= -low, high, low)


def stack_bits(parts: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes: [n, runs, k, 32] -> [n, runs * 32].

    Part i of a run goes into `bits` bits from bit i * `bits` of the run's 32 bytes.
    """
    shifts = torch.arange(0, parts.shape[2] * bits, bits, dtype=torch.uint8, device=parts.device)  # [k]
    return (parts << shifts.view(1, 1, -1, 1)).sum(dim=2, dtype=torch.uint8).flatten(1)
