"""Q8_0, Q4_0, Q5_0, Q4_1 and Q5_1 on CPUs: the arithmetic of `quantization.plain`, compiled, with the same bytes.

Each kernel reads the weights once: TILE blocks at a time, first their scales, then their codes.
"""

import numpy as np

from finetune_trainer.export.quantization.cpu.float16 import put_float16, round_to_float16
from finetune_trainer.export.quantization.cpu.jit import Bytes, Floats, f4, jit, u1
from finetune_trainer.export.quantization.plain import Int8Quantizer, PlainAffineQuantizer, PlainSymmetricQuantizer

HALF_BLOCK, BLOCK, TILE = 16, 32, 64  # weights, weights, blocks
_ZERO = f4(0)


def encode_int8(blocks: Floats, encoded: Bytes, quantizer: Int8Quantizer) -> None:
    """Q8_0: fp32 `blocks` [n, 32] -> uint8 `encoded` [n, 34]."""
    _encode_q8_0(blocks, encoded)


def encode_symmetric(blocks: Floats, encoded: Bytes, quantizer: PlainSymmetricQuantizer) -> None:
    """Q4_0 or Q5_0: fp32 `blocks` [n, 32] -> uint8 `encoded` [n, 18 or 22]."""
    _encode_symmetric(blocks, encoded, quantizer.bits)


def encode_affine(blocks: Floats, encoded: Bytes, quantizer: PlainAffineQuantizer) -> None:
    """Q4_1 or Q5_1: fp32 `blocks` [n, 32] -> uint8 `encoded` [n, 20 or 24]."""
    _encode_affine(blocks, encoded, quantizer.bits)


@jit
def _smaller(a, b):
    return a if a < b else b


@jit
def _larger(a, b):
    return a if a > b else b


@jit
def _largest_magnitude(block, scratch, width):
    """Largest |x| of a block.

    `width` is HALF_BLOCK, which the compiler must not know: it would unroll the loop instead of vectorising it.
    """
    for i in range(width):
        scratch[i] = _larger(abs(block[i]), abs(block[i + width]))
    return _fold_larger(scratch)


@jit
def _largest(block, scratch, width):
    """Largest x of a block; `width` as for _largest_magnitude."""
    for i in range(width):
        scratch[i] = _larger(block[i], block[i + width])
    return _fold_larger(scratch)


@jit
def _smallest(block, scratch, width):
    """Smallest x of a block; `width` as for _largest_magnitude."""
    for i in range(width):
        scratch[i] = _smaller(block[i], block[i + width])
    for i in range(8):
        scratch[i] = _smaller(scratch[i], scratch[i + 8])
    for i in range(4):
        scratch[i] = _smaller(scratch[i], scratch[i + 4])
    return _smaller(_smaller(scratch[0], scratch[1]), _smaller(scratch[2], scratch[3]))


@jit
def _fold_larger(scratch):
    """Largest of 16 values, halving them step by step."""
    for i in range(8):
        scratch[i] = _larger(scratch[i], scratch[i + 8])
    for i in range(4):
        scratch[i] = _larger(scratch[i], scratch[i + 4])
    return _larger(_larger(scratch[0], scratch[1]), _larger(scratch[2], scratch[3]))


@jit
def _first_of_magnitude(block, magnitude):
    """First weight with this magnitude, with its sign."""
    for i in range(BLOCK):
        if abs(block[i]) == magnitude:
            return block[i]
    return _ZERO


@jit
def _first_equal(block, value):
    """First weight equal to `value`: of two zeros the sign may differ."""
    for i in range(BLOCK):
        if block[i] == value:
            return block[i]
    return _ZERO


@jit
def _inverse_or_zero(scale):
    return f4(1) / scale if scale != _ZERO else _ZERO


@jit
def _put_five_bits(codes, out, position, width):
    """Write codes of 5 bits from byte `position`: fifth bits as a little-endian word, then nibbles.

    The low nibbles hold the first `width` codes of the block, the high ones the others.
    """
    word = np.int32(0)  # bit i is the fifth bit of code i
    for i in range(BLOCK):
        word |= (codes[i] >> np.int32(4)) << np.int32(i)
    for byte in range(4):
        out[position + byte] = u1((word >> np.int32(8 * byte)) & np.int32(255))

    for i in range(width):
        out[position + 4 + i] = u1((codes[i] & np.int32(15)) | ((codes[i + width] & np.int32(15)) << np.int32(4)))


@jit
def _join_nibbles(low, high, max_code):
    """Two codes in one byte. The loops around it stay in their kernels: as functions they are 40 % slower."""
    return u1((low if low < max_code else max_code) | ((high if high < max_code else max_code) << np.int32(4)))


@jit
def _encode_q8_0(blocks, encoded):
    scales, scale_bits = np.empty(TILE, f4), np.empty(TILE, np.uint16)
    inverses, scratch = np.empty(TILE, f4), np.empty(HALF_BLOCK, f4)
    size = blocks.shape[1]

    for start in range(0, blocks.shape[0], TILE):
        held = min(TILE, blocks.shape[0] - start)  # blocks of this tile; fewer in the last
        for t in range(held):
            scales[t] = _largest_magnitude(blocks[start + t], scratch, size // 2) / f4(127)
            inverses[t] = _inverse_or_zero(scales[t])
        round_to_float16(scales, scale_bits, held)

        for t in range(held):
            block, out, inverse = blocks[start + t], encoded[start + t], inverses[t]
            put_float16(out, 0, scale_bits[t])
            for i in range(size):
                scaled = block[i] * inverse
                whole = np.int32(scaled)  # truncated towards zero
                rest = scaled - f4(whole)
                away = np.int32(rest >= f4(0.5)) - np.int32(rest <= f4(-0.5))  # half away from zero
                out[2 + i] = u1(whole + away)


@jit
def _encode_symmetric(blocks, encoded, bits):
    scales, scale_bits = np.empty(TILE, f4), np.empty(TILE, np.uint16)
    inverses, scratch, codes = np.empty(TILE, f4), np.empty(HALF_BLOCK, f4), np.empty(BLOCK, np.int32)
    zero_point, size = f4(1 << (bits - 1)), blocks.shape[1]
    shift, max_code = zero_point + f4(0.5), np.int32((1 << bits) - 1)  # conversion to int truncates, hence the half

    for start in range(0, blocks.shape[0], TILE):
        held = min(TILE, blocks.shape[0] - start)  # blocks of this tile; fewer in the last
        for t in range(held):
            block = blocks[start + t]
            low, high = _smallest(block, scratch, size // 2), _largest(block, scratch, size // 2)
            furthest = high if high > -low else low
            if high == -low:  # both bounds are as far from zero: llama.cpp takes the first
                furthest = _first_of_magnitude(block, high) if high > _ZERO else _ZERO
            scales[t] = furthest / -zero_point
            inverses[t] = _inverse_or_zero(scales[t])
        round_to_float16(scales, scale_bits, held)

        for t in range(held):
            block, out, inverse = blocks[start + t], encoded[start + t], inverses[t]
            put_float16(out, 0, scale_bits[t])
            if bits == 4:
                for i in range(size // 2):
                    low, high = np.int32(block[i] * inverse + shift), np.int32(block[i + size // 2] * inverse + shift)
                    out[2 + i] = _join_nibbles(low, high, max_code)
                continue

            for i in range(size):
                code = np.int32(block[i] * inverse + shift)
                codes[i] = code if code < max_code else max_code
            _put_five_bits(codes, out, 2, size // 2)


@jit
def _encode_affine(blocks, encoded, bits):
    scales, scale_bits = np.empty(TILE, f4), np.empty(TILE, np.uint16)
    minima, minimum_bits = np.empty(TILE, f4), np.empty(TILE, np.uint16)
    inverses, exact_minima = np.empty(TILE, f4), np.empty(TILE, f4)
    scratch, codes = np.empty(HALF_BLOCK, f4), np.empty(BLOCK, np.int32)
    max_code, size = np.int32((1 << bits) - 1), blocks.shape[1]

    for start in range(0, blocks.shape[0], TILE):
        held = min(TILE, blocks.shape[0] - start)  # blocks of this tile; fewer in the last
        for t in range(held):
            block = blocks[start + t]
            minima[t] = _smallest(block, scratch, size // 2)
            if minima[t] == _ZERO:  # of zeros of both signs, llama.cpp stores the first
                minima[t] = _first_equal(block, _ZERO)
            exact_minima[t] = minima[t]  # before it is rounded to float16: codes count from this one
            scales[t] = (_largest(block, scratch, size // 2) - minima[t] + _ZERO) / f4(max_code)
            inverses[t] = _inverse_or_zero(scales[t])
        round_to_float16(scales, scale_bits, held)
        round_to_float16(minima, minimum_bits, held)

        for t in range(held):
            block, out, inverse, minimum = blocks[start + t], encoded[start + t], inverses[t], exact_minima[t]
            put_float16(out, 0, scale_bits[t])
            put_float16(out, 2, minimum_bits[t])
            if bits == 4:
                for i in range(size // 2):
                    low = np.int32((block[i] - minimum) * inverse + f4(0.5))
                    high = np.int32((block[i + size // 2] - minimum) * inverse + f4(0.5))
                    out[4 + i] = _join_nibbles(low, high, max_code)
                continue

            for i in range(size):
                code = np.int32((block[i] - minimum) * inverse + f4(0.5))
                codes[i] = code if code < max_code else max_code
            _put_five_bits(codes, out, 4, size // 2)
