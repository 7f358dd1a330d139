"""Q3_K and Q6_K: x ~ d * s_j * q. `super_blocks` tells the algorithm; `cpu.symmetric` is the twin."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType

from finetune_trainer.export.quantization.quantizer import as_bytes, inverse_or_zero
from finetune_trainer.export.quantization.super_blocks import (
    SUPER_BLOCK,
    KQuantizer,
    divide_or_zero,
    farther_from_zero,
    stack_bits,
    sum_groups,
    sum_rows,
    to_float16,
)


@dataclass
class PackedParts:
    """An encoded chunk of n super-blocks, whose bytes `pack` puts in the type's order."""

    codes: torch.Tensor
    """uint8 [n, 256]: q + zero_point, in the order of the weights."""
    scales: torch.Tensor
    """uint8 [n, groups]: s + scale_offset, as two's complement."""
    factor: torch.Tensor
    """uint8 [n, 2]: d as float16."""


@dataclass(frozen=True)
class SymmetricQuantizer(KQuantizer):
    """Codes q are -zero_point..zero_point-1, integers s are -scale_limit..scale_limit-1; the error of x weighs x^2."""

    scale_limit: int
    scale_offset: int
    """Added to s where it is stored."""
    pack: Callable[[PackedParts], torch.Tensor]
    """Bytes of super-blocks: uint8 [n, block bytes]."""

    @property
    def zero_point(self) -> int:
        """The stored code that stands for zero."""
        return 1 << (self.bits - 1)

    def steps(self) -> list[float]:
        """The code that each trial gives the largest weight, exact in fp32; it takes the longer, negative side."""
        return [-float(np.float32(self.zero_point + trial)) for trial in self.trials]

    def encode(self, blocks: torch.Tensor) -> torch.Tensor:
        return self.pack(_Chunk(blocks, self).search())


class _Chunk:
    """Working state of n super-blocks. G is the group size, N the number of groups of all of them."""

    def __init__(self, blocks: torch.Tensor, quantizer: SymmetricQuantizer) -> None:
        self.quantizer = quantizer
        self.x = blocks.reshape(-1, quantizer.group).t().contiguous()  # [G, N]
        self.w = self.x.square()  # weights of the squared error
        self.wx = self.w * self.x

        self.codes = torch.empty_like(self.x)  # [G, N]
        self.products = self.x.new_empty(quantizer.group, 2, self.x.shape[1])  # [G, 2, N]

    def search(self) -> PackedParts:
        groups, limit = self.quantizer.groups, self.quantizer.scale_limit

        # Steps 1 and 2: the scale of each group, then the integers that stand for the scales.
        scale = self.search_ranges()  # [N]
        grouped = scale.view(-1, groups)
        d = to_float16(farther_from_zero(grouped.amin(dim=1), grouped.amax(dim=1)) * (-1 / limit))  # [n]
        s = self.integers(scale, d)  # [N]

        # Step 3: coordinate descent.
        for _ in range(self.quantizer.rounds):
            self.set_codes(inverse_or_zero(d.repeat_interleave(groups) * s))
            sum_qq, sum_xq = self.sums()
            s = torch.where(sum_qq > 0, self.integers(divide_or_zero(sum_xq, sum_qq), d), s)

            numerator, denominator = s * sum_xq, s * s * sum_qq
            fitted = divide_or_zero(sum_groups(numerator, groups), sum_groups(denominator, groups))
            d = to_float16(torch.where(fitted == 0, d, fitted))
        self.set_codes(inverse_or_zero(d.repeat_interleave(groups) * s))

        codes = (self.codes + self.quantizer.zero_point).to(torch.uint8).t().reshape(-1, SUPER_BLOCK)
        scales = (s + self.quantizer.scale_offset).to(torch.int8).view(torch.uint8).view(-1, groups)
        return PackedParts(codes, scales, as_bytes(d.unsqueeze(1), torch.float16))

    def sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sums of q q and x q over each group: [N] each."""
        by_qq, by_xq = self.products.unbind(dim=1)
        torch.mul(self.w, self.codes, out=by_qq)
        by_qq *= self.codes
        torch.mul(self.wx, self.codes, out=by_xq)

        sum_qq, sum_xq = sum_rows(self.products)
        return sum_qq, sum_xq

    def set_codes(self, inverse: torch.Tensor) -> None:
        """Round all weights to codes, given the inverse of each group's step [N]."""
        torch.mul(self.x, inverse, out=self.codes)
        self.codes.clamp_(-self.quantizer.zero_point, self.quantizer.zero_point - 1).round_()

    def search_ranges(self) -> torch.Tensor:
        """The scale of the best trial for each group: [N]."""
        high, low = self.x.amax(dim=0), self.x.amin(dim=0)
        inverse = inverse_or_zero(farther_from_zero(low, high))
        scale, best = torch.zeros_like(inverse), torch.full_like(inverse, -torch.inf)

        for steps in self.quantizer.steps():
            self.set_codes(inverse * steps)
            sum_qq, sum_xq = self.sums()
            trial_scale = divide_or_zero(sum_xq, sum_qq)

            gain = trial_scale * sum_xq
            scale = torch.where(gain > best, trial_scale, scale)
            best = torch.maximum(best, gain)
        return scale

    def integers(self, scale: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        wide = inverse_or_zero(d).repeat_interleave(self.quantizer.groups)
        return (scale * wide).clamp_(-self.quantizer.scale_limit, self.quantizer.scale_limit - 1).round_()


def _pack_q3_k(parts: PackedParts) -> torch.Tensor:
    """[n, 110]: third bits of the codes, their lower two, 16 scales of 6 bits (stored + 32), factor."""
    third = stack_bits((parts.codes >> 2).view(-1, 1, 8, 32), 1)
    lower = stack_bits((parts.codes & 3).view(-1, 2, 4, 32), 2)

    # Scales: the lower four bits of scale j and j + 8 share a byte; the upper two of four scales share one.
    nibbles = (parts.scales[:, :8] & 15) | (parts.scales[:, 8:] << 4)  # [n, 8]
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=parts.codes.device)
    upper = ((parts.scales >> 4).view(-1, 4, 4) << shifts.view(1, -1, 1)).sum(dim=1, dtype=torch.uint8)  # [n, 4]
    return torch.cat([third, lower, nibbles, upper, parts.factor], dim=1)


def _pack_q6_k(parts: PackedParts) -> torch.Tensor:
    """[n, 210]: lower four bits of the codes, upper two, 16 scales of 8 bits (two's complement), factor."""
    quarters = parts.codes.view(-1, 2, 4, 32)
    lower = ((quarters[:, :, :2] & 15) | (quarters[:, :, 2:] << 4)).flatten(1)
    return torch.cat([lower, stack_bits(quarters >> 4, 2), parts.scales, parts.factor], dim=1)


QUANTIZERS = {
    GGMLQuantizationType.Q3_K: SymmetricQuantizer(
        bits=3,
        group=16,
        trials=(-0.6, -0.2, 0.2, 0.6),
        rounds=1,
        scale_limit=32,
        scale_offset=32,
        pack=_pack_q3_k,
    ),
    GGMLQuantizationType.Q6_K: SymmetricQuantizer(
        bits=6,
        group=16,
        trials=(-0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.9),
        rounds=1,
        scale_limit=128,
        scale_offset=0,
        pack=_pack_q6_k,
    ),
}
