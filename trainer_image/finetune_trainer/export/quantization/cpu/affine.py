"""Q2_K, Q4_K and Q5_K on CPUs: the algorithm of `k_quants`, compiled, with the same bytes.

torch makes each step a pass over memory; here a tile of 128 groups stays in a core's own cache from the first step to
the last. The lanes of a tile are groups, so every sum runs over a group in one order and still fills vector
registers.
"""

import numpy as np

from finetune_trainer.export.quantization.cpu.float16 import compiled, f4, round_to_float16
from finetune_trainer.export.quantization.cpu.groups import (
    LANES,
    ZERO,
    divide,
    find_bounds,
    load_groups,
    round_between,
    spread,
)
from finetune_trainer.export.quantization.cpu.layouts import pack_affine

_TWO, _TINY, _LOWEST = f4(2), f4(1e-30), f4(-np.inf)


@compiled
def _weigh(x, group, mean_weight, w, wx, sum_w, sum_x):
    share = f4(1 / group)
    for g in range(LANES):
        sum_x[g] = ZERO
    for i in range(group):
        for g in range(LANES):
            sum_x[g] += x[i, g] * x[i, g]
    for g in range(LANES):
        sum_x[g] = np.sqrt(sum_x[g] * share) if mean_weight else ZERO
    for i in range(group):
        for g in range(LANES):
            w[i, g] = abs(x[i, g]) + sum_x[g]
            wx[i, g] = w[i, g] * x[i, g]
    for g in range(LANES):
        sum_w[g] = ZERO
        sum_x[g] = ZERO
    for i in range(group):
        for g in range(LANES):
            sum_w[g] += w[i, g]
            sum_x[g] += wx[i, g]


@compiled
def _sum_up(q, w, wx, group, sum_q, sum_qq, sum_xq):
    for g in range(LANES):
        sum_q[g] = ZERO
        sum_qq[g] = ZERO
        sum_xq[g] = ZERO
    for i in range(group):
        for g in range(LANES):
            weighted = w[i, g] * q[i, g]
            sum_q[g] += weighted
            sum_qq[g] += weighted * q[i, g]
            sum_xq[g] += wx[i, g] * q[i, g]


@compiled
def _fit(sum_w, sum_x, sum_q, sum_qq, sum_xq):
    determinant = sum_w * sum_qq - sum_q * sum_q
    scale = divide(sum_w * sum_xq - sum_x * sum_q, determinant)
    minimum = divide(sum_q * sum_xq - sum_qq * sum_x, determinant)
    if minimum < ZERO:
        scale = divide(sum_xq, sum_qq)
        minimum = ZERO
    return scale, minimum


@compiled
def _gain(sum_w, sum_x, sum_q, sum_qq, sum_xq, scale, minimum):
    fitted = scale * (_TWO * sum_xq - scale * sum_qq)
    return fitted - minimum * (_TWO * sum_x - _TWO * scale * sum_q + minimum * sum_w)


@compiled
def _search_ranges(x, w, wx, group, steps, top, sum_w, sum_x, high, inverse, best, scale, minimum, sums):
    """The best scale and minimum of the trials; `high` and `minimum` hold the bounds of each group at first."""
    sum_q, sum_qq, sum_xq = sums[0], sums[1], sums[2]
    for g in range(LANES):
        minimum[g] = -(minimum[g] if minimum[g] < ZERO else ZERO)
        scale[g] = ZERO
        best[g] = _LOWEST
    for trial in range(steps.shape[0]):
        for g in range(LANES):
            inverse[g] = divide(steps[trial], high[g] + minimum[g])
            sum_q[g] = ZERO
            sum_qq[g] = ZERO
            sum_xq[g] = ZERO
        for i in range(group):
            for g in range(LANES):
                code = round_between((x[i, g] + minimum[g]) * inverse[g], ZERO, top)
                weighted = w[i, g] * code
                sum_q[g] += weighted
                sum_qq[g] += weighted * code
                sum_xq[g] += wx[i, g] * code
        for g in range(LANES):
            new_scale, new_minimum = _fit(sum_w[g], sum_x[g], sum_q[g], sum_qq[g], sum_xq[g])
            gain = _gain(sum_w[g], sum_x[g], sum_q[g], sum_qq[g], sum_xq[g], new_scale, new_minimum)
            better = gain > best[g]
            scale[g] = new_scale if better else scale[g]
            minimum[g] = new_minimum if better else minimum[g]
            best[g] = gain if better else best[g]


@compiled
def _find_factors(values, per, share, factors, halves):
    """The largest value of each super-block, times `share`, as float16."""
    for t in range(LANES // per):
        largest = values[t * per]
        for g in range(t * per, t * per + per):
            largest = values[g] if values[g] > largest else largest
        factors[t] = largest * share + ZERO
    round_to_float16(factors, halves, LANES // per)


@compiled
def _encode(x, q, group, top, wide_d, wide_e, s, m, inverse, shift):
    for g in range(LANES):
        inverse[g] = divide(f4(1), wide_d[g] * s[g])
        shift[g] = (wide_e[g] * m[g]) * inverse[g]
    for i in range(group):
        for g in range(LANES):
            q[i, g] = round_between(x[i, g] * inverse[g] + shift[g], ZERO, top)


@compiled
def _improve_integers(sum_w, sum_x, sums, wide_d, wide_e, scale_top, s, m):
    for g in range(LANES):
        sum_q, sum_qq, sum_xq, d, e = sums[0, g], sums[1, g], sums[2, g], wide_d[g], wide_e[g]
        scale, _ = _fit(sum_w[g], sum_x[g], sum_q, sum_qq, sum_xq)
        new_s = round_between(divide(scale, d), ZERO, scale_top)
        weight = sum_w[g] if sum_w[g] > _TINY else _TINY
        new_m = round_between(divide((d * new_s * sum_q - sum_x[g]) / weight, e), ZERO, scale_top)
        before = _gain(sum_w[g], sum_x[g], sum_q, sum_qq, sum_xq, d * s[g], e * m[g])
        better = _gain(sum_w[g], sum_x[g], sum_q, sum_qq, sum_xq, d * new_s, e * new_m) > before
        s[g] = new_s if better else s[g]
        m[g] = new_m if better else m[g]


@compiled
def _factor_gain(ss, sm, mm, sx, mx, d, e):
    return d * (_TWO * sx - d * ss) - e * (_TWO * mx - _TWO * d * sm + e * mm)


@compiled
def _improve_factors(sum_w, sum_x, sums, per, s, m, d, e, d_bits, e_bits, new, new_bits):
    """d and e of each super-block by least squares, where that is better after rounding."""
    for t in range(LANES // per):
        ss = sm = mm = sx = mx = ZERO
        for g in range(t * per, t * per + per):
            ss += s[g] * s[g] * sums[1, g]
            sm += s[g] * m[g] * sums[0, g]
            mm += m[g] * m[g] * sum_w[g]
            sx += s[g] * sums[2, g]
            mx += m[g] * sum_x[g]
        determinant = ss * mm - sm * sm
        new_d = divide(mm * sx - sm * mx, determinant) if determinant > ZERO else divide(sx, ss)
        new_e = divide(sm * sx - ss * mx, determinant)
        new[0] = (new_d if new_d > ZERO else ZERO) + ZERO
        new[1] = (new_e if new_e > ZERO else ZERO) + ZERO
        round_to_float16(new, new_bits, 2)
        if _factor_gain(ss, sm, mm, sx, mx, new[0], new[1]) > _factor_gain(ss, sm, mm, sx, mx, d[t], e[t]):
            d[t], e[t] = new[0], new[1]
            d_bits[t], e_bits[t] = new_bits[0], new_bits[1]


@compiled
def encode_affine(blocks, encoded, bits, group, scale_top, steps, rounds, mean_weight):
    """fp32 `blocks` [n, 256] -> uint8 `encoded` [n, bytes]; the other arguments are those of an AffineForm."""
    per = blocks.shape[1] // group
    top = f4((1 << bits) - 1)
    x, w, wx, q = (np.empty((group, LANES), f4), np.empty((group, LANES), f4),
                   np.empty((group, LANES), f4), np.empty((group, LANES), f4))  # fmt: skip
    lanes, sums = np.empty((11, LANES), f4), np.empty((3, LANES), f4)
    sum_w, sum_x, high, inverse, best = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]
    s, m, wide_d, wide_e, scale, minimum = lanes[5], lanes[6], lanes[7], lanes[8], lanes[9], lanes[10]
    d, e, new = np.empty(LANES, f4), np.empty(LANES, f4), np.empty(2, f4)
    d_bits, e_bits = np.empty(LANES, np.uint16), np.empty(LANES, np.uint16)
    new_bits = np.empty(2, np.uint16)
    tile = LANES // per
    for start in range(0, blocks.shape[0], tile):
        held = min(tile, blocks.shape[0] - start)
        load_groups(blocks, start, held, group, x)
        _weigh(x, group, mean_weight, w, wx, sum_w, sum_x)
        find_bounds(x, group, minimum, high)
        _search_ranges(x, w, wx, group, steps, top, sum_w, sum_x, high, inverse, best, scale, minimum, sums)
        _find_factors(scale, per, f4(1 / scale_top), d, d_bits)
        _find_factors(minimum, per, f4(1 / scale_top), e, e_bits)
        spread(d, per, wide_d)
        spread(e, per, wide_e)
        for g in range(LANES):
            s[g] = round_between(divide(scale[g], wide_d[g]), ZERO, f4(scale_top))
            m[g] = round_between(divide(minimum[g], wide_e[g]), ZERO, f4(scale_top))
        _encode(x, q, group, top, wide_d, wide_e, s, m, inverse, best)
        for _ in range(rounds):
            _sum_up(q, w, wx, group, sums[0], sums[1], sums[2])
            _improve_integers(sum_w, sum_x, sums, wide_d, wide_e, f4(scale_top), s, m)
            _improve_factors(sum_w, sum_x, sums, per, s, m, d, e, d_bits, e_bits, new, new_bits)
            spread(d, per, wide_d)
            spread(e, per, wide_e)
            _encode(x, q, group, top, wide_d, wide_e, s, m, inverse, best)
        for t in range(held):
            pack_affine(q, s, m, t * per, group, bits, d_bits[t], e_bits[t], encoded[start + t])
