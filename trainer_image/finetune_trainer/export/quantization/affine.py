"""Q2_K, Q4_K and Q5_K: x ~ d * s_j * q - e * m_j. `super_blocks` tells the algorithm; `cpu.affine` is the twin."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType

from finetune_trainer.export.quantization.quantizer import as_bytes
from finetune_trainer.export.quantization.super_blocks import (
    SUPER_BLOCK,
    KQuantizer,
    divide_or_zero,
    square_root,
    stack_bits,
    sum_groups,
    sum_rows,
    to_float16,
)


@dataclass
class PackedParts:
    """An encoded chunk of n super-blocks, whose bytes `pack` puts in the type's order."""

    codes: torch.Tensor
    """uint8 [n, 256], in the order of the weights."""
    scales: torch.Tensor
    """uint8 [n, groups]: s."""
    minima: torch.Tensor
    """uint8 [n, groups]: m."""
    factors: torch.Tensor
    """uint8 [n, 4]: d and e as float16."""


@dataclass(frozen=True)
class AffineQuantizer(KQuantizer):
    """Codes q are 0..max_code, integers s and m are 0..max_scale."""

    max_scale: int
    mean_weight: bool
    """True: the error of x weighs |x| plus the group's root mean square. False: it weighs |x|."""
    pack: Callable[[PackedParts], torch.Tensor]
    """Bytes of super-blocks: uint8 [n, block bytes]."""

    @property
    def max_code(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def steps(self) -> list[float]:
        """The number of steps that each trial divides a group's range into, exact in fp32."""
        return [float(np.float32(self.max_code + trial)) for trial in self.trials]

    def encode(self, blocks: torch.Tensor) -> torch.Tensor:
        return self.pack(_Chunk(blocks, self).search())


@dataclass
class _Sums:
    """Weighted sums over each group for given codes q: [groups] each."""

    q: torch.Tensor
    qq: torch.Tensor
    xq: torch.Tensor


class _Chunk:
    """Working state of n super-blocks. G is the group size, N the number of groups of all of them."""

    def __init__(self, blocks: torch.Tensor, quantizer: AffineQuantizer) -> None:
        self.quantizer = quantizer
        self.x = blocks.reshape(-1, quantizer.group).t().contiguous()  # [G, N]

        # Weights of the squared error.
        self.w = self.x.abs()  # [G, N]
        if quantizer.mean_weight:
            self.w += square_root(sum_rows(self.x.square()) * (1 / quantizer.group))
        self.wx = self.w * self.x
        self.sum_w, self.sum_x = sum_rows(self.w), sum_rows(self.wx)  # [N]

        self.codes = torch.empty_like(self.x)  # [G, N]
        self.products = self.x.new_empty(quantizer.group, 3, self.x.shape[1])  # [G, 3, N]

    def search(self) -> PackedParts:
        # Steps 1 and 2: scale and minimum of each group, then the integers that stand for them.
        scale, minimum = self.search_ranges()  # [N]
        d, e = self.factor(scale), self.factor(minimum)  # [n]
        s, m = self.integers(scale, d), self.integers(minimum, e)  # [N]
        self.set_codes(self.spread(d) * s, self.spread(e) * m)

        # Step 3: coordinate descent.
        for _ in range(self.quantizer.rounds):
            sums = self.sums()
            s, m = self.improve_integers(sums, (s, m), (d, e))
            d, e = self.improve_factors(sums, (s, m), (d, e))
            self.set_codes(self.spread(d) * s, self.spread(e) * m)

        codes = self.codes.to(torch.uint8).t().reshape(-1, SUPER_BLOCK)
        scales, minima = (values.to(torch.uint8).view(-1, self.quantizer.groups) for values in (s, m))
        factors = torch.cat([as_bytes(factor.unsqueeze(1), torch.float16) for factor in (d, e)], dim=1)
        return PackedParts(codes, scales, minima, factors)

    def sums(self) -> _Sums:
        by_q, by_qq, by_xq = self.products.unbind(dim=1)
        torch.mul(self.w, self.codes, out=by_q)
        torch.mul(by_q, self.codes, out=by_qq)
        torch.mul(self.wx, self.codes, out=by_xq)
        return _Sums(*sum_rows(self.products))

    def fit(self, sums: _Sums) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and minimum of each group by least squares; the minimum is subtracted and never negative."""
        determinant = self.sum_w * sums.qq - sums.q.square()
        scale = divide_or_zero(self.sum_w * sums.xq - self.sum_x * sums.q, determinant)
        minimum = divide_or_zero(sums.q * sums.xq - sums.qq * self.sum_x, determinant)

        # A minimum below 0 would be an offset above zero, which m cannot express: the scale alone is fitted.
        without = minimum < 0
        return torch.where(without, divide_or_zero(sums.xq, sums.qq), scale), minimum.clamp_(min=0)

    def gain(self, sums: _Sums, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
        """Reduction of each group's error below the error of all zeros."""
        fitted = scale * (2 * sums.xq - scale * sums.qq)
        return fitted - minimum * (2 * self.sum_x - 2 * scale * sums.q + minimum * self.sum_w)

    def search_ranges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and minimum of the best trial. Each trial starts at the best minimum so far, so the trials descend."""
        high, minimum = self.x.amax(dim=0), -self.x.amin(dim=0).clamp_(max=0)  # [N]
        scale, best = torch.zeros_like(high), torch.full_like(high, -torch.inf)

        for steps in self.quantizer.steps():
            torch.add(self.x, minimum, out=self.codes)
            inverse = divide_or_zero(torch.full_like(high, steps), high + minimum)
            self.codes.mul_(inverse).clamp_(0, self.quantizer.max_code).round_()

            sums = self.sums()
            trial_scale, trial_minimum = self.fit(sums)
            gain = self.gain(sums, trial_scale, trial_minimum)

            better = gain > best
            scale, minimum = torch.where(better, trial_scale, scale), torch.where(better, trial_minimum, minimum)
            best = torch.maximum(best, gain)
        return scale, minimum

    def spread(self, factor: torch.Tensor) -> torch.Tensor:
        """Each super-block's factor for each of its groups: [n] -> [N]."""
        return factor.repeat_interleave(self.quantizer.groups)

    def factor(self, values: torch.Tensor) -> torch.Tensor:
        """The float16 factor [n] with which the largest of a super-block's values is max_scale times as large."""
        return to_float16(values.view(-1, self.quantizer.groups).amax(dim=1) * (1 / self.quantizer.max_scale))

    def integers(self, values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return divide_or_zero(values, self.spread(factor)).clamp_(0, self.quantizer.max_scale).round_()

    def set_codes(self, step: torch.Tensor, minimum: torch.Tensor) -> None:
        """Round all weights to the codes of given steps and minima [N]."""
        inverse = divide_or_zero(torch.ones_like(step), step)
        torch.mul(self.x, inverse, out=self.codes)
        self.codes.add_(minimum * inverse).clamp_(0, self.quantizer.max_code).round_()

    def improve_integers(
        self, sums: _Sums, integers: tuple[torch.Tensor, torch.Tensor], factors: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest integer for the best scale, then for the minimum that suits it; kept where the gain is larger."""
        s, m = integers  # [N]
        d, e = factors  # [n]
        wide_d, wide_e = self.spread(d), self.spread(e)

        scale, _ = self.fit(sums)
        new_s = self.integers(scale, d)
        new_m = self.integers((wide_d * new_s * sums.q - self.sum_x) / self.sum_w.clamp(min=1e-30), e)

        gained = self.gain(sums, wide_d * new_s, wide_e * new_m) > self.gain(sums, wide_d * s, wide_e * m)
        return torch.where(gained, new_s, s), torch.where(gained, new_m, m)

    def improve_factors(
        self, sums: _Sums, integers: tuple[torch.Tensor, torch.Tensor], factors: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """d and e of each super-block by least squares (2 x 2), kept where the gain is larger after rounding."""
        s, m = integers  # [N]
        d, e = factors  # [n]
        # Sums over each super-block: [n].
        ss, sm, mm = self.total(s * s * sums.qq), self.total(s * m * sums.q), self.total(m * m * self.sum_w)
        sx, mx = self.total(s * sums.xq), self.total(m * self.sum_x)

        # Normal equations; if every m is 0, so is the determinant, and d alone is fitted.
        determinant = ss * mm - sm.square()
        new_d = torch.where(determinant > 0, divide_or_zero(mm * sx - sm * mx, determinant), divide_or_zero(sx, ss))
        new_e = divide_or_zero(sm * sx - ss * mx, determinant)
        new_d, new_e = to_float16(new_d.clamp_(min=0)), to_float16(new_e.clamp_(min=0))

        def gain(d: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
            return d * (2 * sx - d * ss) - e * (2 * mx - 2 * d * sm + e * mm)

        better = gain(new_d, new_e) > gain(d, e)
        return torch.where(better, new_d, d), torch.where(better, new_e, e)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over each super-block: [N] -> [n]."""
        return sum_groups(values, self.quantizer.groups)


def _pack_q2_k(parts: PackedParts) -> torch.Tensor:
    """[n, 84]: 16 pairs of 4-bit scale and minimum, 2-bit codes, factors."""
    codes = stack_bits(parts.codes.view(-1, 2, 4, 32), 2)
    return torch.cat([parts.scales | (parts.minima << 4), codes, parts.factors], dim=1)


def _pack_q4_k(parts: PackedParts) -> torch.Tensor:
    """[n, 144]: factors, 8 pairs of 6-bit scale and minimum, codes."""
    codes = stack_bits(parts.codes.view(-1, 4, 2, 32), 4)
    return torch.cat([parts.factors, _pack_six_bit_pairs(parts), codes], dim=1)


def _pack_q5_k(parts: PackedParts) -> torch.Tensor:
    """[n, 176]: as Q4_K, with the codes' fifth bits before their lower four."""
    fifth = stack_bits((parts.codes >> 4).view(-1, 1, 8, 32), 1)
    lower = stack_bits((parts.codes & 15).view(-1, 4, 2, 32), 4)
    return torch.cat([parts.factors, _pack_six_bit_pairs(parts), fifth, lower], dim=1)


def _pack_six_bit_pairs(parts: PackedParts) -> torch.Tensor:
    """8 scales and minima of 6 bits -> [n, 12]; the upper two bits of groups 4-7 fill the bytes of groups 0-3."""
    first_scales, last_scales = parts.scales.chunk(2, dim=1)  # [n, 4]
    first_minima, last_minima = parts.minima.chunk(2, dim=1)
    packed = [
        first_scales | (last_scales >> 4 << 6),
        first_minima | (last_minima >> 4 << 6),
        (last_scales & 15) | (last_minima << 4),
    ]
    return torch.cat(packed, dim=1)


QUANTIZERS = {
    GGMLQuantizationType.Q2_K: AffineQuantizer(
        bits=2,
        group=16,
        trials=(-0.4, 0.0, 0.4, 0.8),
        rounds=2,
        max_scale=15,
        mean_weight=False,
        pack=_pack_q2_k,
    ),
    GGMLQuantizationType.Q4_K: AffineQuantizer(
        bits=4,
        group=32,
        trials=(-2.0, -1.7, -1.4, -1.1, -0.8, -0.5, -0.2, 0.1, 0.4, 0.7, 1.0),
        rounds=2,
        max_scale=63,
        mean_weight=True,
        pack=_pack_q4_k,
    ),
    GGMLQuantizationType.Q5_K: AffineQuantizer(
        bits=5,
        group=32,
        trials=(-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0),
        rounds=2,
        max_scale=63,
        mean_weight=True,
        pack=_pack_q5_k,
    ),
}
