"""Q2_K, Q4_K and Q5_K on CPUs: the algorithm of `quantization.affine`, compiled, with the same bytes.

Shapes: x, w, wx, q are fp32 [group, LANES]; sum_*, scale, minimum, s, m and the like fp32 [LANES]; sums fp32
[3, LANES] (of w q, w q q and w x q); d and e fp32 [LANES // groups], d_bits and e_bits the same as float16's bits.
"""

import numpy as np

from finetune_trainer.export.quantization.affine import AffineQuantizer
from finetune_trainer.export.quantization.cpu.float16 import put_float16, round_to_float16
from finetune_trainer.export.quantization.cpu.jit import Bytes, Floats, f4, jit, u1
from finetune_trainer.export.quantization.cpu.super_blocks import (
    LANES,
    LOWEST,
    ZERO,
    collect_codes,
    divide_or_zero,
    find_bounds,
    load_groups,
    put_bits,
    round_between,
    spread,
)

_TWO, _TINY = f4(2), f4(1e-30)


def encode(blocks: Floats, encoded: Bytes, quantizer: AffineQuantizer) -> None:
    """fp32 `blocks` [n, 256] -> uint8 `encoded` [n, block bytes]."""
    steps = np.array(quantizer.steps(), dtype=np.float32)
    _encode(
        blocks,
        encoded,
        quantizer.bits,
        quantizer.group,
        quantizer.max_scale,
        steps,
        quantizer.rounds,
        quantizer.mean_weight,
    )


@jit
def _encode(blocks, encoded, bits, group, max_scale, steps, rounds, mean_weight):
    groups = blocks.shape[1] // group
    max_code = f4((1 << bits) - 1)

    # Working memory of one tile, used again for each.
    x, w, wx, q = (np.empty((group, LANES), f4), np.empty((group, LANES), f4),
                   np.empty((group, LANES), f4), np.empty((group, LANES), f4))  # fmt: skip
    lanes, sums = np.empty((11, LANES), f4), np.empty((3, LANES), f4)
    sum_w, sum_x, high, inverse, best = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4]
    s, m, wide_d, wide_e, scale, minimum = lanes[5], lanes[6], lanes[7], lanes[8], lanes[9], lanes[10]
    d, e, new = np.empty(LANES, f4), np.empty(LANES, f4), np.empty(2, f4)
    d_bits, e_bits = np.empty(LANES, np.uint16), np.empty(LANES, np.uint16)
    new_bits = np.empty(2, np.uint16)

    tile = LANES // groups  # super-blocks
    for start in range(0, blocks.shape[0], tile):
        held = min(tile, blocks.shape[0] - start)

        # Step 1: scale and minimum of each group.
        load_groups(blocks, start, held, group, x)
        _weigh(x, group, mean_weight, w, wx, sum_w, sum_x)
        find_bounds(x, group, minimum, high)
        _search_ranges(x, w, wx, group, steps, max_code, sum_w, sum_x, high, inverse, best, scale, minimum, sums)

        # Step 2: factors, and the integers that stand for scales and minima.
        _find_factors(scale, groups, f4(1 / max_scale), d, d_bits)
        _find_factors(minimum, groups, f4(1 / max_scale), e, e_bits)
        spread(d, groups, wide_d)
        spread(e, groups, wide_e)
        for g in range(LANES):
            s[g] = round_between(divide_or_zero(scale[g], wide_d[g]), ZERO, f4(max_scale))
            m[g] = round_between(divide_or_zero(minimum[g], wide_e[g]), ZERO, f4(max_scale))
        _set_codes(x, q, group, max_code, wide_d, wide_e, s, m, inverse, best)

        # Step 3: coordinate descent.
        for _ in range(rounds):
            _sum_up(q, w, wx, group, sums[0], sums[1], sums[2])
            _improve_integers(sum_w, sum_x, sums, wide_d, wide_e, f4(max_scale), s, m)
            _improve_factors(sum_w, sum_x, sums, groups, s, m, d, e, d_bits, e_bits, new, new_bits)
            spread(d, groups, wide_d)
            spread(e, groups, wide_e)
            _set_codes(x, q, group, max_code, wide_d, wide_e, s, m, inverse, best)

        for t in range(held):
            _pack(q, s, m, t * groups, group, bits, d_bits[t], e_bits[t], encoded[start + t])


@jit
def _weigh(x, group, mean_weight, w, wx, sum_w, sum_x):
    """Weights of the squared error, into w; w x, into wx; the sums of both."""
    # sum_x holds the root mean square of each group first.
    share = f4(1 / group)  # multiplied, as in torch: a division could round differently
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


@jit
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


@jit
def _fit(sum_w, sum_x, sum_q, sum_qq, sum_xq):
    """Scale and minimum of one group by least squares; the minimum is subtracted and never negative."""
    determinant = sum_w * sum_qq - sum_q * sum_q
    scale = divide_or_zero(sum_w * sum_xq - sum_x * sum_q, determinant)
    minimum = divide_or_zero(sum_q * sum_xq - sum_qq * sum_x, determinant)

    if minimum < ZERO:  # an offset above zero, which m cannot express: the scale alone is fitted
        scale = divide_or_zero(sum_xq, sum_qq)
        minimum = ZERO
    return scale, minimum


@jit
def _gain(sum_w, sum_x, sum_q, sum_qq, sum_xq, scale, minimum):
    """Reduction of one group's error below the error of all zeros."""
    fitted = scale * (_TWO * sum_xq - scale * sum_qq)
    return fitted - minimum * (_TWO * sum_x - _TWO * scale * sum_q + minimum * sum_w)


@jit
def _search_ranges(x, w, wx, group, steps, max_code, sum_w, sum_x, high, inverse, best, scale, minimum, sums):
    """Find scale and minimum of the best trial; `high` and `minimum` hold the bounds of each group at first."""
    sum_q, sum_qq, sum_xq = sums[0], sums[1], sums[2]
    for g in range(LANES):
        minimum[g] = -(minimum[g] if minimum[g] < ZERO else ZERO)
        scale[g] = ZERO
        best[g] = LOWEST

    for trial in range(steps.shape[0]):
        for g in range(LANES):
            inverse[g] = divide_or_zero(steps[trial], high[g] + minimum[g])
            sum_q[g] = ZERO
            sum_qq[g] = ZERO
            sum_xq[g] = ZERO

        # Codes are only summed up, not stored: they are of no use if another trial is better.
        for i in range(group):
            for g in range(LANES):
                code = round_between((x[i, g] + minimum[g]) * inverse[g], ZERO, max_code)
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


@jit
def _find_factors(values, groups, share, factors, factor_bits):
    """The largest value of each super-block, times `share`, as float16."""
    for t in range(LANES // groups):
        largest = values[t * groups]
        for g in range(t * groups, t * groups + groups):
            largest = values[g] if values[g] > largest else largest
        factors[t] = largest * share + ZERO
    round_to_float16(factors, factor_bits, LANES // groups)


@jit
def _set_codes(x, q, group, max_code, wide_d, wide_e, s, m, inverse, shift):
    """Round all weights to codes, into q; `inverse` and `shift` are scratch."""
    for g in range(LANES):
        inverse[g] = divide_or_zero(f4(1), wide_d[g] * s[g])
        shift[g] = (wide_e[g] * m[g]) * inverse[g]

    for i in range(group):
        for g in range(LANES):
            q[i, g] = round_between(x[i, g] * inverse[g] + shift[g], ZERO, max_code)


@jit
def _improve_integers(sum_w, sum_x, sums, wide_d, wide_e, max_scale, s, m):
    """The nearest integer for the best scale, then for the minimum that suits it; kept where the gain is larger."""
    for g in range(LANES):
        sum_q, sum_qq, sum_xq, d, e = sums[0, g], sums[1, g], sums[2, g], wide_d[g], wide_e[g]
        scale, _ = _fit(sum_w[g], sum_x[g], sum_q, sum_qq, sum_xq)
        new_s = round_between(divide_or_zero(scale, d), ZERO, max_scale)
        weight = sum_w[g] if sum_w[g] > _TINY else _TINY
        new_m = round_between(divide_or_zero((d * new_s * sum_q - sum_x[g]) / weight, e), ZERO, max_scale)

        before = _gain(sum_w[g], sum_x[g], sum_q, sum_qq, sum_xq, d * s[g], e * m[g])
        better = _gain(sum_w[g], sum_x[g], sum_q, sum_qq, sum_xq, d * new_s, e * new_m) > before
        s[g] = new_s if better else s[g]
        m[g] = new_m if better else m[g]


@jit
def _factor_gain(ss, sm, mm, sx, mx, d, e):
    return d * (_TWO * sx - d * ss) - e * (_TWO * mx - _TWO * d * sm + e * mm)


@jit
def _improve_factors(sum_w, sum_x, sums, groups, s, m, d, e, d_bits, e_bits, new, new_bits):
    """d and e of each super-block by least squares (2 x 2), kept where the gain is larger after rounding."""
    for t in range(LANES // groups):
        ss = sm = mm = sx = mx = ZERO
        for g in range(t * groups, t * groups + groups):
            # Normal equations of the super-block's 2 x 2 least squares.
            ss += s[g] * s[g] * sums[1, g]
            sm += s[g] * m[g] * sums[0, g]
            mm += m[g] * m[g] * sum_w[g]
            sx += s[g] * sums[2, g]
            mx += m[g] * sum_x[g]

        determinant = ss * mm - sm * sm
        new_d = divide_or_zero(mm * sx - sm * mx, determinant) if determinant > ZERO else divide_or_zero(sx, ss)
        new_e = divide_or_zero(sm * sx - ss * mx, determinant)
        new[0] = (new_d if new_d > ZERO else ZERO) + ZERO
        new[1] = (new_e if new_e > ZERO else ZERO) + ZERO
        round_to_float16(new, new_bits, 2)

        if _factor_gain(ss, sm, mm, sx, mx, new[0], new[1]) > _factor_gain(ss, sm, mm, sx, mx, d[t], e[t]):
            d[t], e[t] = new[0], new[1]
            d_bits[t], e_bits[t] = new_bits[0], new_bits[1]


@jit
def _pack(q, s, m, first, group, bits, d, e, out):
    """Write the super-block whose groups are the columns from `first`; layouts as in `quantization.affine`."""
    codes = collect_codes(q, first, group, 0)
    if bits == 2:
        for j in range(16):
            out[j] = u1(np.int64(s[first + j]) | (np.int64(m[first + j]) << 4))
        put_bits(codes, out, 16, 0, 2, 4)
        put_float16(out, 80, d)
        put_float16(out, 82, e)
        return

    put_float16(out, 0, d)
    put_float16(out, 2, e)
    _put_six_bit_pairs(s, m, first, out, 4)
    if bits == 5:
        put_bits(codes, out, 16, 4, 1, 8)
    put_bits(codes, out, 48 if bits == 5 else 16, 0, 4, 2)


@jit
def _put_six_bit_pairs(s, m, first, out, position):
    """Write 8 scales and minima of 6 bits; the upper two bits of groups 4-7 fill the bytes of groups 0-3."""
    for j in range(4):
        low_s, low_m = np.int64(s[first + j]), np.int64(m[first + j])
        high_s, high_m = np.int64(s[first + 4 + j]), np.int64(m[first + 4 + j])
        out[position + j] = u1(low_s | ((high_s >> 4) << 6))
        out[position + 4 + j] = u1(low_m | ((high_m >> 4) << 6))
        out[position + 8 + j] = u1((high_s & 15) | ((high_m & 15) << 4))
