"""IQ4_NL, IQ4_XS and MXFP4 on CPUs: the algorithms of `quantization.codebook`, compiled, with the same bytes.

Shapes: x, q are fp32 [32, LANES], a group in a column; inverse, scale and the like fp32 [LANES]. The nearest value is
found by comparing with every middle, which fills vector registers; a search by halves does not.
"""

import numpy as np

from finetune_trainer.export.quantization.codebook import (
    FLOAT4_MIDDLES,
    GROUP,
    MIDDLES,
    MIN_LARGEST,
    SCALE_LIMIT,
    TRIALS,
    VALUES,
    Float4Quantizer,
    NonlinearQuantizer,
    NonlinearSuperQuantizer,
)
from finetune_trainer.export.quantization.cpu.float16 import put_float16, round_to_float16
from finetune_trainer.export.quantization.cpu.jit import Bytes, Floats, f4, jit, u1
from finetune_trainer.export.quantization.cpu.super_blocks import (
    LANES,
    LOWEST,
    ZERO,
    inverse_or_zero,
    load_groups,
    round_between,
)

_MIDDLES, _STEPS = np.array(MIDDLES, np.float32), np.diff(np.array(VALUES, np.float32))
_ONES = np.ones(len(MIDDLES), np.float32)
_TRIALS = np.array(TRIALS, np.float32)
_FLOAT4_MIDDLES = np.array(FLOAT4_MIDDLES, np.float32)
_LOWEST_VALUE, _MIN_LARGEST, _LIMIT = f4(VALUES[0]), f4(MIN_LARGEST), f4(SCALE_LIMIT)


def encode_nonlinear(blocks: Floats, encoded: Bytes, quantizer: NonlinearQuantizer) -> None:
    """fp32 `blocks` [n, 32] -> uint8 `encoded` [n, 18]."""
    _encode_nonlinear(blocks, encoded)


def encode_nonlinear_super(blocks: Floats, encoded: Bytes, quantizer: NonlinearSuperQuantizer) -> None:
    """fp32 `blocks` [n, 256] -> uint8 `encoded` [n, 136]."""
    _encode_nonlinear_super(blocks, encoded)


def encode_float4(blocks: Floats, encoded: Bytes, quantizer: Float4Quantizer) -> None:
    """fp32 `blocks` [n, 32] -> uint8 `encoded` [n, 17]."""
    _encode_float4(blocks, encoded)


@jit
def _encode_nonlinear(blocks, encoded):
    x, q = np.empty((GROUP, LANES), f4), np.empty((GROUP, LANES), f4)
    scale, inverse, scale_bits = np.empty(LANES, f4), np.empty(LANES, f4), np.empty(LANES, np.uint16)

    for start in range(0, blocks.shape[0], LANES):
        held = min(LANES, blocks.shape[0] - start)
        load_groups(blocks, start, held, GROUP, x)
        _search_scales(x, q, inverse, scale)
        for g in range(LANES):
            inverse[g] = inverse_or_zero(scale[g])
        _set_nearest(x, q, inverse, ZERO, _ONES)
        round_to_float16(scale, scale_bits, LANES)

        for g in range(held):
            put_float16(encoded[start + g], 0, scale_bits[g])
            _put_codes(q, g, encoded[start + g], 2)


@jit
def _encode_nonlinear_super(blocks, encoded):
    x, q = np.empty((GROUP, LANES), f4), np.empty((GROUP, LANES), f4)
    scale, inverse, integers = np.empty(LANES, f4), np.empty(LANES, f4), np.empty(LANES, f4)
    groups = blocks.shape[1] // GROUP
    tile = LANES // groups  # super-blocks
    factor, factor_bits = np.empty(tile, f4), np.empty(tile, np.uint16)

    for start in range(0, blocks.shape[0], tile):
        held = min(tile, blocks.shape[0] - start)
        load_groups(blocks, start, held, GROUP, x)
        _search_scales(x, q, inverse, scale)

        for t in range(tile):
            furthest = ZERO
            for g in range(t * groups, t * groups + groups):
                furthest = scale[g] if abs(scale[g]) > abs(furthest) else furthest
            factor[t] = -furthest / _LIMIT
            for g in range(t * groups, t * groups + groups):
                integers[g] = round_between(scale[g] * inverse_or_zero(factor[t]), -_LIMIT, _LIMIT - f4(1))
                inverse[g] = inverse_or_zero(factor[t] * integers[g])
        _set_nearest(x, q, inverse, ZERO, _ONES)
        round_to_float16(factor, factor_bits, tile)

        for t in range(held):
            out = encoded[start + t]
            put_float16(out, 0, factor_bits[t])
            _put_integers(integers, t * groups, out)
            for j in range(groups):
                _put_codes(q, t * groups + j, out, 8 + j * GROUP // 2)


@jit
def _search_scales(x, q, inverse, scale):
    """Find the best scale of each group, into `scale`; `q` and `inverse` are working memory."""
    largest, best = np.empty(LANES, f4), np.empty(LANES, f4)
    for g in range(LANES):
        largest[g] = x[0, g]
    for i in range(1, GROUP):
        for g in range(LANES):
            largest[g] = x[i, g] if abs(x[i, g]) > abs(largest[g]) else largest[g]

    for g in range(LANES):
        scale[g] = ZERO
        best[g] = LOWEST
        inverse[g] = inverse_or_zero(largest[g] / -_LOWEST_VALUE)
    _try_scales(x, q, inverse, scale, best)
    for trial in _TRIALS:
        for g in range(LANES):
            inverse[g] = trial / largest[g]
        _try_scales(x, q, inverse, scale, best)

    for g in range(LANES):
        scale[g] = ZERO if abs(largest[g]) < _MIN_LARGEST else scale[g]


@jit
def _try_scales(x, q, inverse, scale, best):
    sum_xq, sum_qq = np.zeros(LANES, f4), np.zeros(LANES, f4)
    _set_nearest(x, q, inverse, _LOWEST_VALUE, _STEPS)
    for i in range(GROUP):
        for g in range(LANES):
            weighted = x[i, g] * x[i, g] * q[i, g]
            sum_xq[g] += weighted * x[i, g]
            sum_qq[g] += weighted * q[i, g]

    for g in range(LANES):
        better = sum_qq[g] > ZERO and sum_xq[g] * sum_xq[g] > best[g] * sum_qq[g]
        scale[g] = sum_xq[g] / sum_qq[g] if better else scale[g]
        best[g] = scale[g] * sum_xq[g] if better else best[g]


@jit
def _set_nearest(x, q, inverse, lowest, steps):
    """Set q to the nearest value of each scaled weight, counted from `lowest` by `steps`."""
    scaled = np.empty(LANES, f4)
    for i in range(GROUP):
        for g in range(LANES):
            scaled[g] = x[i, g] * inverse[g]
            q[i, g] = lowest
        for k in range(steps.shape[0]):
            for g in range(LANES):
                q[i, g] += steps[k] if scaled[g] >= _MIDDLES[k] else ZERO


@jit
def _put_codes(q, group, out, position):
    """Write the 32 codes in column `group` from byte `position`: codes 0-15 in the low nibbles, 16-31 in the high."""
    for i in range(GROUP // 2):
        out[position + i] = u1(np.int32(q[i, group]) | (np.int32(q[i + GROUP // 2, group]) << 4))


@jit
def _put_integers(integers, first, out):
    """Write 8 integers of 6 bits: their upper two bits to bytes 2-3, the lower four to bytes 4-7."""
    for half in range(2):
        upper = np.int64(0)
        for j in range(4):
            upper |= ((np.int64(integers[first + half * 4 + j]) + SCALE_LIMIT) >> 4) << (2 * j)
        out[2 + half] = u1(upper)
    for j in range(4):
        low = np.int64(integers[first + 2 * j]) + SCALE_LIMIT
        high = np.int64(integers[first + 2 * j + 1]) + SCALE_LIMIT
        out[4 + j] = u1((low & 15) | ((high & 15) << 4))


@jit
def _encode_float4(blocks, encoded):
    largest, codes = np.empty(1, f4), np.empty(GROUP, np.int32)
    for block in range(blocks.shape[0]):
        x, out = blocks[block], encoded[block]
        largest[0] = ZERO
        for i in range(GROUP):
            largest[0] = max(largest[0], abs(x[i]))

        # The exponent is in the number's own bits; 127 is its bias, and 2 that of the largest 4-bit float.
        stored = np.int64(largest.view(np.uint32)[0] >> 23) - 2
        stored = stored if stored > 0 else np.int64(0)
        step = f4(2.0 ** (stored - 128))
        for i in range(GROUP):
            magnitude = abs(x[i]) / step
            codes[i] = 0
            for k in range(_FLOAT4_MIDDLES.shape[0]):
                codes[i] += 1 if magnitude > _FLOAT4_MIDDLES[k] else 0
            if x[i] < ZERO and codes[i] > 0:
                codes[i] += 8

        out[0] = u1(stored)
        for i in range(GROUP // 2):
            out[1 + i] = u1(codes[i] | (codes[i + GROUP // 2] << 4))
