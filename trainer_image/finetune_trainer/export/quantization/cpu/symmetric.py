"""Q3_K and Q6_K on CPUs: the algorithm of `k_quants`, compiled, with the same bytes; see `affine`."""

import numpy as np

from finetune_trainer.export.quantization.cpu.float16 import compiled, f4, round_to_float16
from finetune_trainer.export.quantization.cpu.groups import (
    LANES,
    ZERO,
    divide,
    find_bounds,
    load_groups,
    round_between,
    signed_inverse,
    spread,
)
from finetune_trainer.export.quantization.cpu.layouts import pack_symmetric

_LOWEST = f4(-np.inf)


@compiled
def _sum_up(q, w, wx, group, sum_qq, sum_xq):
    for g in range(LANES):
        sum_qq[g] = ZERO
        sum_xq[g] = ZERO
    for i in range(group):
        for g in range(LANES):
            sum_qq[g] += w[i, g] * q[i, g] * q[i, g]
            sum_xq[g] += wx[i, g] * q[i, g]


@compiled
def _encode(x, q, group, half, inverse):
    for i in range(group):
        for g in range(LANES):
            q[i, g] = round_between(x[i, g] * inverse[g], -half, half - f4(1))


@compiled
def _search_ranges(x, w, wx, group, steps, half, low, high, inverse, best, scale, sums):
    sum_qq, sum_xq = sums[0], sums[1]
    for g in range(LANES):
        inverse[g] = signed_inverse(high[g] if high[g] >= -low[g] else low[g])
        scale[g] = ZERO
        best[g] = _LOWEST
    for trial in range(steps.shape[0]):
        for g in range(LANES):
            sum_qq[g] = ZERO
            sum_xq[g] = ZERO
        for i in range(group):
            for g in range(LANES):
                code = round_between(x[i, g] * (inverse[g] * steps[trial]), -half, half - f4(1))
                sum_qq[g] += w[i, g] * code * code
                sum_xq[g] += wx[i, g] * code
        for g in range(LANES):
            new_scale = divide(sum_xq[g], sum_qq[g])
            gain = new_scale * sum_xq[g]
            better = gain > best[g]
            scale[g] = new_scale if better else scale[g]
            best[g] = gain if better else best[g]


@compiled
def _find_factors(scale, per, share, d, d_bits):
    for t in range(LANES // per):
        low, high = scale[t * per], scale[t * per]
        for g in range(t * per, t * per + per):
            low = scale[g] if scale[g] < low else low
            high = scale[g] if scale[g] > high else high
        d[t] = (high if high >= -low else low) * share + ZERO
    round_to_float16(d, d_bits, LANES // per)


@compiled
def _improve(per, sums, scale_half, wide, s, d, d_bits):
    """Integers for the best scales, then the factor for those integers."""
    for g in range(LANES):
        wanted = divide(sums[1, g], sums[0, g]) * signed_inverse(wide[g])
        found = round_between(wanted, -scale_half, scale_half - f4(1))
        s[g] = found if sums[0, g] > ZERO else s[g]
    for t in range(LANES // per):
        numerator = denominator = ZERO
        for g in range(t * per, t * per + per):
            numerator += s[g] * sums[1, g]
            denominator += s[g] * s[g] * sums[0, g]
        fitted = divide(numerator, denominator)
        d[t] = (fitted if fitted != ZERO else d[t]) + ZERO
    round_to_float16(d, d_bits, LANES // per)


@compiled
def encode_symmetric(blocks, encoded, bits, group, scale_half, steps, rounds, scale_offset):
    """fp32 `blocks` [n, 256] -> uint8 `encoded` [n, bytes]; the other arguments are those of a SymmetricForm."""
    per = blocks.shape[1] // group
    half = f4(1 << (bits - 1))
    x, w, wx, q = (np.empty((group, LANES), f4), np.empty((group, LANES), f4),
                   np.empty((group, LANES), f4), np.empty((group, LANES), f4))  # fmt: skip
    lanes, sums = np.empty((7, LANES), f4), np.empty((2, LANES), f4)
    low, high, inverse, best, s, wide, scale = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5], lanes[6]
    d, d_bits = np.empty(LANES, f4), np.empty(LANES, np.uint16)
    tile = LANES // per
    for start in range(0, blocks.shape[0], tile):
        held = min(tile, blocks.shape[0] - start)
        load_groups(blocks, start, held, group, x)
        for i in range(group):
            for g in range(LANES):
                w[i, g] = x[i, g] * x[i, g]
                wx[i, g] = w[i, g] * x[i, g]
        find_bounds(x, group, low, high)
        _search_ranges(x, w, wx, group, steps, half, low, high, inverse, best, scale, sums)
        _find_factors(scale, per, f4(-1 / scale_half), d, d_bits)
        spread(d, per, wide)
        for g in range(LANES):
            s[g] = round_between(scale[g] * signed_inverse(wide[g]), -f4(scale_half), f4(scale_half - 1))
        for _ in range(rounds):
            for g in range(LANES):
                inverse[g] = signed_inverse(wide[g] * s[g])
            _encode(x, q, group, half, inverse)
            _sum_up(q, w, wx, group, sums[0], sums[1])
            _improve(per, sums, f4(scale_half), wide, s, d, d_bits)
            spread(d, per, wide)
        for g in range(LANES):
            inverse[g] = signed_inverse(wide[g] * s[g])
        _encode(x, q, group, half, inverse)
        for t in range(held):
            pack_symmetric(q, s, t * per, group, bits, scale_offset, d_bits[t], encoded[start + t])
