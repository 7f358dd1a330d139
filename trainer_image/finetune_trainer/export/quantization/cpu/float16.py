"""float16 in compiled code, which has no such type: rounding to nearest, ties to even, by integer arithmetic."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = njit(nogil=True, error_model="numpy", boundscheck=False)
"""Machine code without the interpreter's lock; IEEE arithmetic in the order written."""

f4, u4 = np.float32, np.uint32
_SIGN, _INFINITE, _OVERFLOW, _SUBNORMAL = u4(0x80000000), u4(0x7C00), u4(0x47800000), u4(0x38800000)
_HALF_BITS, _REBIAS = u4(0x3F000000), u4(0xC8000FFF)  # 0.5; and -112 exponents, plus just under half a unit


@compiled
def round_to_float16(values, halves, count):
    """Round fp32 `values` [count] to float16 in place, and write the float16s' bits to uint16 `halves`."""
    bits = values.view(np.uint32)
    for i in range(count):
        sign = bits[i] & _SIGN
        bits[i] ^= sign
        if bits[i] >= _OVERFLOW:
            half = _INFINITE
        elif bits[i] < _SUBNORMAL:
            values[i] += f4(0.5)  # whose last place is float16's smallest number
            half = u4(bits[i] - _HALF_BITS)
        else:
            half = u4(u4(bits[i] + _REBIAS + u4((bits[i] >> u4(13)) & u4(1))) >> u4(13))
        halves[i] = half | (sign >> u4(16))
        if half >= _INFINITE:
            values[i] = f4(np.inf)
        elif half < u4(0x0400):
            values[i] = f4(half) * f4(2.0**-24)
        else:
            bits[i] = u4((half << u4(13)) + u4(0x38000000))
        bits[i] |= sign
