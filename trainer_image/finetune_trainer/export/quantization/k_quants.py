"""K-quants: the search for the scales (and minima) of a super-block, vectorised over all groups at once.

A super-block of 256 weights has groups of 16 or 32; weight x of group j becomes code q with

    x ~ d * s_j * q - e * m_j    Q2_K, Q4_K, Q5_K (affine)          x ~ d * s_j * q    Q3_K, Q6_K (symmetric)

where s_j and m_j are small integers, d and e float16. The squared error is weighted as llama.cpp weights it without an
importance matrix. Three steps: (1) for each group the best of several trial ranges, with scale and minimum by least
squares; (2) integers for scale and minimum; (3) rounds of coordinate descent: codes, then integers, then d and e by
least squares, each given the rest. llama.cpp stops after (2) and tries 16 to 21 ranges; with (3) half of them give a
smaller error.

Weights are held as [group size, groups], so that sums over a group are additions of long rows. Every sum is taken in
one order and no product is fused with an addition, so a GPU gives the same bytes as `compiled` on a CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from finetune_trainer.export.quantization import k_quant_forms as forms
from finetune_trainer.export.quantization import k_quant_layouts as layouts
from finetune_trainer.export.quantization.k_quant_forms import SUPER_BLOCK, AffineForm, SymmetricForm

Encoder = Callable[[torch.Tensor], torch.Tensor]
Pack = Callable[..., torch.Tensor]


def _divide(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Quotient; 0 where the denominator is not positive."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def _signed_inverse(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values == 0, 0.0, 1 / values)


def _to_float16(values: torch.Tensor) -> torch.Tensor:
    """Rounded to float16; zeros are positive."""
    return (values + 0.0).to(torch.float16).to(torch.float32)


def _sum(rows: torch.Tensor) -> torch.Tensor:
    """[rows, ...] -> [...], one row after the other."""
    total = torch.zeros_like(rows[0])
    for row in rows:
        total += row
    return total


def _root(values: torch.Tensor) -> torch.Tensor:
    """Correctly rounded: torch's own fp32 root is the neighbouring number for one value in five on a CPU."""
    return values.double().sqrt().float()


def _larger_side(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Whichever is further from zero; `high` where both are."""
    return torch.where(high >= -low, high, low)


@dataclass
class _Sums:
    """Weighted sums over each group for given codes q: [groups]."""

    q: torch.Tensor
    qq: torch.Tensor
    xq: torch.Tensor


class _AffineSearch:
    """Working state of one chunk: n super-blocks of `per` groups."""

    def __init__(self, blocks: torch.Tensor, form: AffineForm) -> None:
        self.form = form
        self.count, self.per = blocks.shape[0], SUPER_BLOCK // form.group
        self.x = blocks.reshape(-1, form.group).t().contiguous()  # group size, groups
        self.w = self.x.abs()
        if form.mean_weight:
            self.w += _root(_sum(self.x.square()) * (1 / form.group))
        self.wx = self.w * self.x
        self.sum_w, self.sum_x = _sum(self.w), _sum(self.wx)
        self.codes, self.products = torch.empty_like(self.x), self.x.new_empty(form.group, 3, self.x.shape[1])

    def sums(self) -> _Sums:
        by_q, by_qq, by_xq = self.products.unbind(dim=1)
        torch.mul(self.w, self.codes, out=by_q)
        torch.mul(by_q, self.codes, out=by_qq)
        torch.mul(self.wx, self.codes, out=by_xq)
        return _Sums(*_sum(self.products))

    def fit(self, sums: _Sums) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and subtracted minimum (never negative) of each group by least squares."""
        determinant = self.sum_w * sums.qq - sums.q.square()
        scale = _divide(self.sum_w * sums.xq - self.sum_x * sums.q, determinant)
        minimum = _divide(sums.q * sums.xq - sums.qq * self.sum_x, determinant)
        without = minimum < 0
        return torch.where(without, _divide(sums.xq, sums.qq), scale), minimum.clamp_(min=0)

    def gain(self, sums: _Sums, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
        """By how much scale and minimum reduce each group's error below that of all zeros."""
        fitted = scale * (2 * sums.xq - scale * sums.qq)
        return fitted - minimum * (2 * self.sum_x - 2 * scale * sums.q + minimum * self.sum_w)

    def search_ranges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Each trial starts at the minimum of the best one before, so the trials are steps of a descent as well."""
        high, minimum = self.x.amax(dim=0), -self.x.amin(dim=0).clamp_(max=0)
        scale, best = torch.zeros_like(high), torch.full_like(high, -torch.inf)
        for steps in self.form.steps():
            torch.add(self.x, minimum, out=self.codes)
            self.codes.mul_(_divide(torch.full_like(high, steps), high + minimum)).clamp_(0, self.form.top).round_()
            sums = self.sums()
            trial_scale, trial_minimum = self.fit(sums)
            gain = self.gain(sums, trial_scale, trial_minimum)
            better = gain > best
            scale, minimum = torch.where(better, trial_scale, scale), torch.where(better, trial_minimum, minimum)
            best = torch.maximum(best, gain)
        return scale, minimum

    def spread(self, factor: torch.Tensor) -> torch.Tensor:
        """[n] of super-blocks -> [groups]."""
        return factor.repeat_interleave(self.per)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """[groups] -> [n], summed over each super-block."""
        return _sum(values.view(self.count, self.per).t())

    def factor(self, values: torch.Tensor) -> torch.Tensor:
        return _to_float16(values.view(self.count, self.per).amax(dim=1) * (1 / self.form.scale_top))

    def integers(self, values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return _divide(values, self.spread(factor)).clamp_(0, self.form.scale_top).round_()

    def encode(self, step: torch.Tensor, minimum: torch.Tensor) -> None:
        inverse = _divide(torch.ones_like(step), step)
        torch.mul(self.x, inverse, out=self.codes)
        self.codes.add_(minimum * inverse).clamp_(0, self.form.top).round_()

    def improve_integers(
        self, sums: _Sums, s: torch.Tensor, m: torch.Tensor, d: torch.Tensor, e: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Nearest integers for the best scale, then for the minimum that suits that scale; kept where they are
        better."""
        wide_d, wide_e = self.spread(d), self.spread(e)
        scale, _ = self.fit(sums)
        new_s = self.integers(scale, d)
        new_m = self.integers((wide_d * new_s * sums.q - self.sum_x) / self.sum_w.clamp(min=1e-30), e)
        gained = self.gain(sums, wide_d * new_s, wide_e * new_m) > self.gain(sums, wide_d * s, wide_e * m)
        return torch.where(gained, new_s, s), torch.where(gained, new_m, m)

    def improve_factors(
        self, sums: _Sums, s: torch.Tensor, m: torch.Tensor, d: torch.Tensor, e: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """d and e of each super-block by least squares (2 x 2), kept where they are better after rounding."""
        ss, sm, mm = self.total(s * s * sums.qq), self.total(s * m * sums.q), self.total(m * m * self.sum_w)
        sx, mx = self.total(s * sums.xq), self.total(m * self.sum_x)
        determinant = ss * mm - sm.square()
        new_d = torch.where(determinant > 0, _divide(mm * sx - sm * mx, determinant), _divide(sx, ss))
        new_e = _divide(sm * sx - ss * mx, determinant)
        new_d, new_e = _to_float16(new_d.clamp_(min=0)), _to_float16(new_e.clamp_(min=0))

        def gain(d: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
            return d * (2 * sx - d * ss) - e * (2 * mx - 2 * d * sm + e * mm)

        better = gain(new_d, new_e) > gain(d, e)
        return torch.where(better, new_d, d), torch.where(better, new_e, e)

    def run(self, pack: Pack) -> torch.Tensor:
        scale, minimum = self.search_ranges()
        d, e = self.factor(scale), self.factor(minimum)
        s, m = self.integers(scale, d), self.integers(minimum, e)
        self.encode(self.spread(d) * s, self.spread(e) * m)
        for _ in range(self.form.rounds):
            sums = self.sums()
            s, m = self.improve_integers(sums, s, m, d, e)
            d, e = self.improve_factors(sums, s, m, d, e)
            self.encode(self.spread(d) * s, self.spread(e) * m)
        codes = self.codes.to(torch.uint8).t().reshape(self.count, SUPER_BLOCK)
        integers = (values.to(torch.uint8).view(self.count, self.per) for values in (s, m))
        return pack(codes, *integers, d.unsqueeze(1), e.unsqueeze(1))


class _SymmetricSearch:
    """As _AffineSearch, without minima; weights of the error are x squared."""

    def __init__(self, blocks: torch.Tensor, form: SymmetricForm) -> None:
        self.form = form
        self.count, self.per = blocks.shape[0], SUPER_BLOCK // form.group
        self.x = blocks.reshape(-1, form.group).t().contiguous()
        self.w = self.x.square()
        self.wx = self.w * self.x
        self.codes, self.products = torch.empty_like(self.x), self.x.new_empty(form.group, 2, self.x.shape[1])

    def sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sums of q q and x q over each group."""
        by_qq, by_xq = self.products.unbind(dim=1)
        torch.mul(self.w, self.codes, out=by_qq)
        by_qq *= self.codes
        torch.mul(self.wx, self.codes, out=by_xq)
        sum_qq, sum_xq = _sum(self.products)
        return sum_qq, sum_xq

    def encode(self, inverse: torch.Tensor) -> None:
        torch.mul(self.x, inverse, out=self.codes)
        self.codes.clamp_(-self.form.half, self.form.half - 1).round_()

    def search_ranges(self) -> torch.Tensor:
        high, low = self.x.amax(dim=0), self.x.amin(dim=0)
        inverse = _signed_inverse(_larger_side(low, high))
        scale, best = torch.zeros_like(inverse), torch.full_like(inverse, -torch.inf)
        for steps in self.form.steps():
            self.encode(inverse * steps)
            sum_qq, sum_xq = self.sums()
            trial_scale = _divide(sum_xq, sum_qq)
            gain = trial_scale * sum_xq
            scale = torch.where(gain > best, trial_scale, scale)
            best = torch.maximum(best, gain)
        return scale

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """[groups] -> [n], summed over each super-block."""
        return _sum(values.view(self.count, self.per).t())

    def integers(self, scale: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        wide = _signed_inverse(d).repeat_interleave(self.per)
        return (scale * wide).clamp_(-self.form.scale_half, self.form.scale_half - 1).round_()

    def run(self, pack: Pack) -> torch.Tensor:
        scale = self.search_ranges()
        grouped = scale.view(self.count, self.per)
        d = _to_float16(_larger_side(grouped.amin(dim=1), grouped.amax(dim=1)) * (-1 / self.form.scale_half))
        s = self.integers(scale, d)
        for _ in range(self.form.rounds):
            self.encode(_signed_inverse(d.repeat_interleave(self.per) * s))
            sum_qq, sum_xq = self.sums()
            s = torch.where(sum_qq > 0, self.integers(_divide(sum_xq, sum_qq), d), s)
            numerator, denominator = s * sum_xq, s * s * sum_qq
            fitted = _divide(self.total(numerator), self.total(denominator))
            d = _to_float16(torch.where(fitted == 0, d, fitted))
        self.encode(_signed_inverse(d.repeat_interleave(self.per) * s))
        codes = (self.codes + self.form.half).to(torch.uint8).t().reshape(self.count, SUPER_BLOCK)
        stored = (s + self.form.scale_offset).to(torch.int8).view(torch.uint8).view(self.count, self.per)
        return pack(codes, stored, d.unsqueeze(1))


def _affine(form: AffineForm, pack: Pack) -> Encoder:
    return lambda blocks: _AffineSearch(blocks, form).run(pack)


def _symmetric(form: SymmetricForm, pack: Pack) -> Encoder:
    return lambda blocks: _SymmetricSearch(blocks, form).run(pack)


encode_q2_k = _affine(forms.Q2_K, layouts.pack_q2_k)
encode_q4_k = _affine(forms.Q4_K, layouts.pack_q4_k)
encode_q5_k = _affine(forms.Q5_K, layouts.pack_q5_k)
encode_q3_k = _symmetric(forms.Q3_K, layouts.pack_q3_k)
encode_q6_k = _symmetric(forms.Q6_K, layouts.pack_q6_k)
