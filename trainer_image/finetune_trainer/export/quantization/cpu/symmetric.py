"""Q3_K and Q6_K on CPUs: the algorithm of `quantization.symmetric`, compiled, with the same bytes.

Shapes: x, w, wx, q are fp32 [group, LANES]; low, high, scale, s and the like fp32 [LANES]; sums fp32 [2, LANES] (of
w q q and w x q); d fp32 [LANES // groups], d_bits the same as float16's bits.
"""

import numpy as np

from finetune_trainer.export.quantization.cpu.float16 import put_float16, round_to_float16
from finetune_trainer.export.quantization.cpu.jit import Bytes, Floats, f4, jit, u1
from finetune_trainer.export.quantization.cpu.super_blocks import (
    LANES,
    LOWEST,
    ZERO,
    collect_codes,
    divide_or_zero,
    find_bounds,
    inverse_or_zero,
    load_groups,
    put_bits,
    round_between,
    spread,
)
from finetune_trainer.export.quantization.symmetric import SymmetricQuantizer


def encode(blocks: Floats, encoded: Bytes, quantizer: SymmetricQuantizer) -> None:
    """fp32 `blocks` [n, 256] -> uint8 `encoded` [n, block bytes]."""
    steps = np.array(quantizer.steps(), dtype=np.float32)
    _encode(
        blocks,
        encoded,
        quantizer.bits,
        quantizer.group,
        quantizer.scale_limit,
        steps,
        quantizer.rounds,
        quantizer.scale_offset,
    )


@jit
def _encode(blocks, encoded, bits, group, scale_limit, steps, rounds, scale_offset):
    groups = blocks.shape[1] // group
    zero_point = f4(1 << (bits - 1))

    # Working memory of one tile, used again for each.
    x, w, wx, q = (np.empty((group, LANES), f4), np.empty((group, LANES), f4),
                   np.empty((group, LANES), f4), np.empty((group, LANES), f4))  # fmt: skip
    lanes, sums = np.empty((7, LANES), f4), np.empty((2, LANES), f4)
    low, high, inverse, best, s, wide, scale = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5], lanes[6]
    d, d_bits = np.empty(LANES, f4), np.empty(LANES, np.uint16)

    tile = LANES // groups  # super-blocks
    for start in range(0, blocks.shape[0], tile):
        held = min(tile, blocks.shape[0] - start)
        load_groups(blocks, start, held, group, x)
        for i in range(group):
            for g in range(LANES):
                w[i, g] = x[i, g] * x[i, g]
                wx[i, g] = w[i, g] * x[i, g]

        # Steps 1 and 2: the scale of each group, then the integers that stand for the scales.
        find_bounds(x, group, low, high)
        _search_ranges(x, w, wx, group, steps, zero_point, low, high, inverse, best, scale, sums)
        _find_factors(scale, groups, f4(-1 / scale_limit), d, d_bits)
        spread(d, groups, wide)
        for g in range(LANES):
            s[g] = round_between(scale[g] * inverse_or_zero(wide[g]), -f4(scale_limit), f4(scale_limit - 1))

        # Step 3: coordinate descent.
        for _ in range(rounds):
            for g in range(LANES):
                inverse[g] = inverse_or_zero(wide[g] * s[g])
            _set_codes(x, q, group, zero_point, inverse)
            _sum_up(q, w, wx, group, sums[0], sums[1])
            _improve(groups, sums, f4(scale_limit), wide, s, d, d_bits)
            spread(d, groups, wide)

        for g in range(LANES):
            inverse[g] = inverse_or_zero(wide[g] * s[g])
        _set_codes(x, q, group, zero_point, inverse)
        for t in range(held):
            _pack(q, s, t * groups, group, bits, scale_offset, d_bits[t], encoded[start + t])


@jit
def _sum_up(q, w, wx, group, sum_qq, sum_xq):
    for g in range(LANES):
        sum_qq[g] = ZERO
        sum_xq[g] = ZERO

    for i in range(group):
        for g in range(LANES):
            sum_qq[g] += w[i, g] * q[i, g] * q[i, g]
            sum_xq[g] += wx[i, g] * q[i, g]


@jit
def _set_codes(x, q, group, zero_point, inverse):
    """Round all weights to codes, into q, given the inverse of each group's step."""
    for i in range(group):
        for g in range(LANES):
            q[i, g] = round_between(x[i, g] * inverse[g], -zero_point, zero_point - f4(1))


@jit
def _search_ranges(x, w, wx, group, steps, zero_point, low, high, inverse, best, scale, sums):
    """Find the scale of the best trial; `low` and `high` are the bounds of each group."""
    sum_qq, sum_xq = sums[0], sums[1]
    for g in range(LANES):
        inverse[g] = inverse_or_zero(high[g] if high[g] >= -low[g] else low[g])
        scale[g] = ZERO
        best[g] = LOWEST

    for trial in range(steps.shape[0]):
        for g in range(LANES):
            sum_qq[g] = ZERO
            sum_xq[g] = ZERO

        # Codes are only summed up, not stored: they are of no use if another trial is better.
        for i in range(group):
            for g in range(LANES):
                code = round_between(x[i, g] * (inverse[g] * steps[trial]), -zero_point, zero_point - f4(1))
                sum_qq[g] += w[i, g] * code * code
                sum_xq[g] += wx[i, g] * code

        for g in range(LANES):
            new_scale = divide_or_zero(sum_xq[g], sum_qq[g])
            gain = new_scale * sum_xq[g]
            better = gain > best[g]
            scale[g] = new_scale if better else scale[g]
            best[g] = gain if better else best[g]


@jit
def _find_factors(scale, groups, share, d, d_bits):
    """The scale farthest from zero in each super-block, times `share`, as float16."""
    for t in range(LANES // groups):
        low, high = scale[t * groups], scale[t * groups]
        for g in range(t * groups, t * groups + groups):
            low = scale[g] if scale[g] < low else low
            high = scale[g] if scale[g] > high else high
        d[t] = (high if high >= -low else low) * share + ZERO
    round_to_float16(d, d_bits, LANES // groups)


@jit
def _improve(groups, sums, scale_limit, wide, s, d, d_bits):
    """Find the integers for the best scales, then the factor for those integers."""
    for g in range(LANES):
        wanted = divide_or_zero(sums[1, g], sums[0, g]) * inverse_or_zero(wide[g])
        found = round_between(wanted, -scale_limit, scale_limit - f4(1))
        s[g] = found if sums[0, g] > ZERO else s[g]

    for t in range(LANES // groups):
        numerator = denominator = ZERO
        for g in range(t * groups, t * groups + groups):
            numerator += s[g] * sums[1, g]
            denominator += s[g] * s[g] * sums[0, g]
        fitted = divide_or_zero(numerator, denominator)
        d[t] = (fitted if fitted != ZERO else d[t]) + ZERO
    round_to_float16(d, d_bits, LANES // groups)


@jit
def _pack(q, s, first, group, bits, scale_offset, d, out):
    """Write the super-block whose groups are the columns from `first`; layouts as in `quantization.symmetric`."""
    codes = collect_codes(q, first, group, 1 << (bits - 1))
    if bits == 3:
        _pack_q3_k(codes, s, first, scale_offset, d, out)
    else:
        _pack_q6_k(codes, s, first, scale_offset, d, out)


@jit
def _pack_q3_k(codes, s, first, scale_offset, d, out):
    put_bits(codes, out, 0, 2, 1, 8)
    put_bits(codes, out, 32, 0, 2, 4)

    # Scales: the lower four bits of scale j and j + 8 share a byte; the upper two of four scales share one.
    for j in range(8):
        low = np.int64(s[first + j]) + scale_offset
        high = np.int64(s[first + 8 + j]) + scale_offset
        out[96 + j] = u1((low & 15) | ((high & 15) << 4))
    for j in range(4):
        upper = 0
        for part in range(4):
            upper |= ((np.int64(s[first + part * 4 + j]) + scale_offset) >> 4) << (2 * part)
        out[104 + j] = u1(upper)
    put_float16(out, 108, d)


@jit
def _pack_q6_k(codes, s, first, scale_offset, d, out):
    for part in range(2):  # 128 codes each
        for i in range(64):
            low, high = codes[part * 128 + i], codes[part * 128 + 64 + i]
            out[part * 64 + i] = u1((low & 15) | ((high & 15) << 4))
    put_bits(codes, out, 128, 4, 2, 4)

    for j in range(16):
        out[192 + j] = u1(np.int64(s[first + j]) + scale_offset)
    put_float16(out, 208, d)
