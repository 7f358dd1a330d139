"""F32, F16 and BF16 on CPUs: weights of 16 bits from and to fp32, as torch converts them.

torch would do it too, but on threads of its own, beside those that call it: on a busy machine they wait for each other.
"""

import torch

from finetune_trainer.export.quantization.cpu.float16 import (
    INFINITY_BITS,
    ONE_HALF_BITS,
    OVERFLOW_BITS,
    REBIAS,
    SUBNORMAL_BITS,
)
from finetune_trainer.export.quantization.cpu.jit import Bytes, Floats, f4, jit, u2, u4
from finetune_trainer.export.quantization.floats import FloatQuantizer

_MAGNITUDE, _INFINITY = u4(0x7FFFFFFF), u4(0x7F800000)  # of fp32
_FLOAT16_SCALE = f4(2.0**112)  # float16's bits, read as fp32's, are too small by this


def encode(blocks: Floats, encoded: Bytes, quantizer: FloatQuantizer) -> None:
    """fp32 `blocks` [n, 1] -> uint8 `encoded` [n, bytes]."""
    kernel = {torch.float32: _encode_f32, torch.float16: _encode_f16, torch.bfloat16: _encode_bf16}[quantizer.dtype]
    kernel(blocks, encoded)


@jit
def _encode_f32(blocks, encoded):
    """fp32 `blocks` [n, 1] -> uint8 `encoded` [n, 4]."""
    source, target = blocks.reshape(-1), encoded.reshape(-1).view(f4)
    for i in range(source.shape[0]):
        target[i] = source[i]


@jit
def _encode_bf16(blocks, encoded):
    """fp32 `blocks` [n, 1] -> uint8 `encoded` [n, 2]: to nearest, ties to even."""
    source, target = blocks.reshape(-1).view(u4), encoded.reshape(-1).view(u2)
    for i in range(source.shape[0]):
        bits = source[i]
        rounded = (bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)
        # NaN has a pattern of its own: rounding its bits could give those of a number.
        target[i] = u2(0x7FC0) if (bits & _MAGNITUDE) > _INFINITY else u2(rounded)


@jit
def _encode_f16(blocks, encoded):
    """fp32 `blocks` [n, 1] -> uint8 `encoded` [n, 2]: to nearest, ties to even; too large ones become infinite."""
    source, target = blocks.reshape(-1), encoded.reshape(-1).view(u2)
    bits = source.view(u4)

    # Without branches, so that the loop fills vector registers: each case is computed, then one is chosen.
    for i in range(source.shape[0]):
        magnitude = bits[i] & _MAGNITUDE
        # 0.5 has float16's smallest number as its last place, so the sum rounds to a multiple of that.
        subnormal = u4(f4(abs(source[i]) + f4(0.5)).view(u4) - ONE_HALF_BITS)
        normal = u4(u4(magnitude + REBIAS + ((magnitude >> u4(13)) & u4(1))) >> u4(13))

        rounded = subnormal if magnitude < SUBNORMAL_BITS else normal
        rounded = rounded if magnitude < OVERFLOW_BITS else INFINITY_BITS
        rounded = rounded if magnitude <= _INFINITY else u4(0x7E00)  # NaN
        target[i] = u2(rounded | ((bits[i] ^ magnitude) >> u4(16)))


@jit
def widen_bf16(values, wide):
    """Bits of bfloat16, uint16 [n] -> fp32 [n]."""
    bits = wide.view(u4)
    for i in range(values.shape[0]):
        bits[i] = u4(values[i]) << u4(16)


@jit
def widen_f16(values, wide):
    """Bits of float16, uint16 [n] -> fp32 [n]; the product is exact, also for subnormal numbers."""
    bits = wide.view(u4)
    for i in range(values.shape[0]):
        magnitude = u4(values[i]) & u4(0x7FFF)
        bits[i] = magnitude << u4(13)
        wide[i] = wide[i] * _FLOAT16_SCALE
        if magnitude >= INFINITY_BITS:
            bits[i] |= _INFINITY
        bits[i] |= (u4(values[i]) & u4(0x8000)) << u4(16)


@jit
def count_infinite(values):
    """Number of infinities among the bits of float16s, uint16 [n]."""
    found = 0
    for i in range(values.shape[0]):
        found += (values[i] & u2(0x7FFF)) == u2(0x7C00)
    return found
