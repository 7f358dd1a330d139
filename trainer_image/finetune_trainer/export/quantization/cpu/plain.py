"""Weights of 16 bits from and to fp32, as torch converts them.

torch would do it too, but on threads of its own, beside those that call it: on a busy machine they wait for each other.
"""

import numpy as np

from finetune_trainer.export.quantization.cpu.float16 import compiled, f4, u4

_u2 = np.uint16
_MAGNITUDE, _NOT_A_NUMBER = u4(0x7FFFFFFF), u4(0x7F800000)
_HALF_OVERFLOW, _HALF_SUBNORMAL, _HALF_BITS, _REBIAS = u4(0x47800000), u4(0x38800000), u4(0x3F000000), u4(0xC8000FFF)
_HALF_SCALE, _HALF_INFINITE = f4(2.0**112), u4(0x7C00)


@compiled
def encode_f32(blocks, encoded):
    """fp32 `blocks` [n, 1] -> uint8 `encoded` [n, 4]."""
    source, target = blocks.reshape(-1), encoded.reshape(-1).view(f4)
    for i in range(source.shape[0]):
        target[i] = source[i]


@compiled
def encode_bf16(blocks, encoded):
    """fp32 `blocks` [n, 1] -> uint8 `encoded` [n, 2]: to nearest, ties to even."""
    source, target = blocks.reshape(-1).view(u4), encoded.reshape(-1).view(_u2)
    for i in range(source.shape[0]):
        bits = source[i]
        rounded = (bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)
        target[i] = _u2(0x7FC0) if (bits & _MAGNITUDE) > _NOT_A_NUMBER else _u2(rounded)


@compiled
def encode_f16(blocks, encoded):
    """fp32 `blocks` [n, 1] -> uint8 `encoded` [n, 2]: to nearest, ties to even; too large ones become infinite."""
    source, target = blocks.reshape(-1), encoded.reshape(-1).view(_u2)
    bits = source.view(u4)
    for i in range(source.shape[0]):
        magnitude = bits[i] & _MAGNITUDE
        small = u4(np.float32(abs(source[i]) + f4(0.5)).view(u4) - _HALF_BITS)
        usual = u4(u4(magnitude + _REBIAS + ((magnitude >> u4(13)) & u4(1))) >> u4(13))
        half = small if magnitude < _HALF_SUBNORMAL else usual
        half = half if magnitude < _HALF_OVERFLOW else _HALF_INFINITE
        half = half if magnitude <= _NOT_A_NUMBER else u4(0x7E00)
        target[i] = _u2(half | ((bits[i] ^ magnitude) >> u4(16)))


@compiled
def widen_bf16(values, wide):
    """Bits of bfloat16, uint16 [n] -> fp32 [n]."""
    bits = wide.view(u4)
    for i in range(values.shape[0]):
        bits[i] = u4(values[i]) << u4(16)


@compiled
def widen_f16(values, wide):
    """Bits of float16, uint16 [n] -> fp32 [n]; the product is exact, also for subnormal numbers."""
    bits = wide.view(u4)
    for i in range(values.shape[0]):
        magnitude = u4(values[i]) & u4(0x7FFF)
        bits[i] = magnitude << u4(13)
        wide[i] = wide[i] * _HALF_SCALE
        if magnitude >= _HALF_INFINITE:
            bits[i] |= _NOT_A_NUMBER
        bits[i] |= (u4(values[i]) & u4(0x8000)) << u4(16)


@compiled
def count_infinite(halves):
    """How many of float16's bits, uint16 [n], are infinities."""
    found = 0
    for i in range(halves.shape[0]):
        found += (halves[i] & _u2(0x7FFF)) == _u2(0x7C00)
    return found
