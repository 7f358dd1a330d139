"""float16 for numba, which has no such type: rounding to nearest, ties to even, by integer arithmetic."""

import numpy as np

from finetune_trainer.export.quantization.cpu.jit import f4, jit, u1, u4

INFINITY_BITS, OVERFLOW_BITS, SUBNORMAL_BITS = u4(0x7C00), u4(0x47800000), u4(0x38800000)
"""float16's infinity; fp32's 65536, from which on everything overflows; fp32's 2^-14, the smallest normal float16."""
ONE_HALF_BITS, REBIAS = u4(0x3F000000), u4(0xC8000FFF)
"""fp32's 0.5; 112 less in the exponent, plus just under half a unit in float16's last place."""
_SIGN = u4(0x80000000)


@jit
def round_to_float16(values, encoded, count):
    """Round fp32 `values` [count] to float16 in place, and write the float16s' bits to uint16 `encoded`."""
    bits = values.view(np.uint32)
    for i in range(count):
        sign = bits[i] & _SIGN
        bits[i] ^= sign

        if bits[i] >= OVERFLOW_BITS:
            rounded = INFINITY_BITS
        elif bits[i] < SUBNORMAL_BITS:
            values[i] += f4(0.5)  # whose last place is float16's smallest number
            rounded = u4(bits[i] - ONE_HALF_BITS)
        else:
            rounded = u4(u4(bits[i] + REBIAS + u4((bits[i] >> u4(13)) & u4(1))) >> u4(13))
        encoded[i] = rounded | (sign >> u4(16))

        # Back to fp32: infinities, subnormal numbers, normal numbers.
        if rounded >= INFINITY_BITS:
            values[i] = f4(np.inf)
        elif rounded < u4(0x0400):
            values[i] = f4(rounded) * f4(2.0**-24)
        else:
            bits[i] = u4((rounded << u4(13)) + u4(0x38000000))
        bits[i] |= sign


@jit
def put_float16(out, position, bits):
    """Write the bits of a float16 to bytes `position` and `position` + 1 of `out`, little-endian."""
    out[position] = u1(bits & 0xFF)
    out[position + 1] = u1(bits >> 8)
