"""Tiles of 128 groups, which every compiled K-quant works on: loading them, and arithmetic on their lanes."""

from finetune_trainer.export.quantization.cpu.float16 import compiled, f4

LANES = 128
ZERO = f4(0)
_SHIFT = f4(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to an integer, ties to even


@compiled
def divide(numerator, denominator):
    """0 where the denominator is not positive."""
    return numerator / denominator if denominator > ZERO else ZERO


@compiled
def signed_inverse(value):
    """1 / value; 0 for 0."""
    return f4(1) / value if value != ZERO else ZERO


@compiled
def round_between(value, low, high):
    """The nearest whole number within the bounds, ties to even."""
    value = value if value > low else low
    value = value if value < high else high
    return (value + _SHIFT) - _SHIFT


@compiled
def load_groups(blocks, start, held, group, x):
    """Groups of `held` super-blocks from `start` into the columns of x; zeros into the rest."""
    used = held * (blocks.shape[1] // group)
    flat = blocks[start : start + held].reshape(used, group)
    for g in range(used):
        for i in range(group):
            x[i, g] = flat[g, i]
    for g in range(used, LANES):
        for i in range(group):
            x[i, g] = ZERO


@compiled
def find_bounds(x, group, low, high):
    """Smallest and largest value of each column's group."""
    for g in range(LANES):
        low[g] = x[0, g]
        high[g] = x[0, g]
    for i in range(1, group):
        for g in range(LANES):
            value = x[i, g]
            low[g] = value if value < low[g] else low[g]
            high[g] = value if value > high[g] else high[g]


@compiled
def spread(factors, per, wide):
    """Each factor to the `per` groups that share it."""
    for g in range(LANES):
        wide[g] = factors[g // per]
