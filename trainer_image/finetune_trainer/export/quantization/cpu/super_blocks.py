"""Super-blocks on CPUs: tiles of 128 groups, arithmetic on their lanes, and packing of codes.

torch makes each step a pass over memory; here a tile stays in a core's own cache from the first step to the last. The
lanes of a tile are groups, so every sum runs over a group in one order and still fills vector registers. A tile of
fp32 weights, codes or error weights is [group size, LANES]; a value of each group is [LANES]. With `groups` groups to
a super-block, a tile holds LANES // groups super-blocks.
"""

import numpy as np

from finetune_trainer.export.quantization.cpu.jit import f4, jit, u1

LANES = 128
ZERO, LOWEST = f4(0), f4(-np.inf)
_SHIFT = f4(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to an integer, ties to even


@jit
def divide_or_zero(numerator, denominator):
    """Quotient; 0 where the denominator is not positive."""
    return numerator / denominator if denominator > ZERO else ZERO


@jit
def inverse_or_zero(value):
    """1 / value; 0 for 0."""
    return f4(1) / value if value != ZERO else ZERO


@jit
def round_between(value, low, high):
    """The nearest whole number within the bounds, ties to even."""
    value = value if value > low else low
    value = value if value < high else high
    return (value + _SHIFT) - _SHIFT


@jit
def load_groups(blocks, start, held, group, x):
    """Copy the groups of `held` super-blocks from `start` into the columns of x; zeros into the other columns."""
    used = held * (blocks.shape[1] // group)
    flat = blocks[start : start + held].reshape(used, group)

    for g in range(used):
        for i in range(group):
            x[i, g] = flat[g, i]
    for g in range(used, LANES):
        for i in range(group):
            x[i, g] = ZERO


@jit
def find_bounds(x, group, low, high):
    """Smallest and largest value of each group, into `low` and `high` [LANES]."""
    for g in range(LANES):
        low[g] = x[0, g]
        high[g] = x[0, g]

    for i in range(1, group):
        for g in range(LANES):
            value = x[i, g]
            low[g] = value if value < low[g] else low[g]
            high[g] = value if value > high[g] else high[g]


@jit
def spread(factors, groups, wide):
    """Copy each super-block's factor to each of its groups: -> `wide` [LANES]."""
    for g in range(LANES):
        wide[g] = factors[g // groups]


@jit
def collect_codes(q, first, group, zero_point):
    """uint8 [256]: codes of the super-block whose groups are the columns from `first`, in the order of the weights."""
    codes = np.empty(256, np.uint8)  # the tile holds a group in a column, the file in a row
    for g in range(256 // group):
        for i in range(group):
            codes[g * group + i] = u1(np.int32(q[i, first + g]) + zero_point)
    return codes


@jit
def put_bits(codes, out, position, first_bit, bits, parts):
    """Write bits first_bit..first_bit+bits-1 of 256 codes from byte `position`.

    A run of 32 bytes holds `parts` runs of 32 codes: part i in `bits` bits from bit i * bits.
    """
    mask = (1 << bits) - 1
    for run in range(256 // (32 * parts)):
        for i in range(32):
            packed = 0
            for part in range(parts):
                code = np.int64(codes[run * 32 * parts + part * 32 + i])
                packed |= ((code >> first_bit) & mask) << (part * bits)
            out[position + run * 32 + i] = u1(packed)
