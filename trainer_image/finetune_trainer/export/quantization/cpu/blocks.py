"""Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 on CPUs: the arithmetic of `quantizers`, compiled, with the same bytes.

Each kernel reads the weights once: 64 blocks at a time, first their scales, then their codes.
"""

import numpy as np

from finetune_trainer.export.quantization.cpu.float16 import compiled, f4, round_to_float16

HALF_BLOCK, BLOCK, TILE = 16, 32, 64
_ZERO = f4(0)
_u1 = np.uint8


@compiled
def _smaller(a, b):
    return a if a < b else b


@compiled
def _larger(a, b):
    return a if a > b else b


@compiled
def _largest_magnitude(block, scratch, width):
    """`width` is HALF_BLOCK, which the compiler must not know: it would unroll the loop instead of vectorising it."""
    for i in range(width):
        scratch[i] = _larger(abs(block[i]), abs(block[i + width]))
    return _fold_larger(scratch)


@compiled
def _fold_larger(scratch):
    for i in range(8):
        scratch[i] = _larger(scratch[i], scratch[i + 8])
    for i in range(4):
        scratch[i] = _larger(scratch[i], scratch[i + 4])
    return _larger(_larger(scratch[0], scratch[1]), _larger(scratch[2], scratch[3]))


@compiled
def _largest(block, scratch, width):
    for i in range(width):
        scratch[i] = _larger(block[i], block[i + width])
    return _fold_larger(scratch)


@compiled
def _smallest(block, scratch, width):
    for i in range(width):
        scratch[i] = _smaller(block[i], block[i + width])
    for i in range(8):
        scratch[i] = _smaller(scratch[i], scratch[i + 8])
    for i in range(4):
        scratch[i] = _smaller(scratch[i], scratch[i + 4])
    return _smaller(_smaller(scratch[0], scratch[1]), _smaller(scratch[2], scratch[3]))


@compiled
def _first_of_magnitude(block, magnitude):
    for i in range(BLOCK):
        if abs(block[i]) == magnitude:
            return block[i]
    return _ZERO


@compiled
def _first_equal(block, value):
    """The first of equals: of two zeros the sign may differ."""
    for i in range(BLOCK):
        if block[i] == value:
            return block[i]
    return _ZERO


@compiled
def _inverse(scale):
    return f4(1) / scale if scale != _ZERO else _ZERO


@compiled
def _put_half(out, at, half):
    out[at] = _u1(half & 0xFF)
    out[at + 1] = _u1(half >> 8)


@compiled
def _put_five_bits(codes, out, at, width):
    """Fifth bits as a little-endian word, then nibbles: the first half of the block in the low ones."""
    word = np.int32(0)
    for i in range(BLOCK):
        word |= (codes[i] >> np.int32(4)) << np.int32(i)
    for byte in range(4):
        out[at + byte] = _u1((word >> np.int32(8 * byte)) & np.int32(255))
    for i in range(width):
        out[at + 4 + i] = _u1((codes[i] & np.int32(15)) | ((codes[i + width] & np.int32(15)) << np.int32(4)))


@compiled
def _join(low, high, top):
    """Two codes in one byte. The loops around it stay in their kernels: as functions they are 40 % slower."""
    return _u1((low if low < top else top) | ((high if high < top else top) << np.int32(4)))


@compiled
def encode_q8_0(blocks, encoded):
    """fp32 `blocks` [n, 32] -> uint8 `encoded` [n, 34]."""
    scales, halves = np.empty(TILE, f4), np.empty(TILE, np.uint16)
    inverses, scratch = np.empty(TILE, f4), np.empty(HALF_BLOCK, f4)
    size = blocks.shape[1]
    for start in range(0, blocks.shape[0], TILE):
        held = min(TILE, blocks.shape[0] - start)
        for t in range(held):
            scales[t] = _largest_magnitude(blocks[start + t], scratch, size // 2) / f4(127)
            inverses[t] = _inverse(scales[t])
        round_to_float16(scales, halves, held)
        for t in range(held):
            block, out, inverse = blocks[start + t], encoded[start + t], inverses[t]
            _put_half(out, 0, halves[t])
            for i in range(size):
                scaled = block[i] * inverse
                whole = np.int32(scaled)
                rest = scaled - f4(whole)
                away = np.int32(rest >= f4(0.5)) - np.int32(rest <= f4(-0.5))  # half away from zero
                out[2 + i] = _u1(whole + away)


@compiled
def encode_symmetric_blocks(blocks, encoded, bits):
    """Q4_0 or Q5_0, by `bits`: fp32 `blocks` [n, 32] -> uint8 `encoded` [n, 18 or 22]."""
    scales, halves = np.empty(TILE, f4), np.empty(TILE, np.uint16)
    inverses, scratch, codes = np.empty(TILE, f4), np.empty(HALF_BLOCK, f4), np.empty(BLOCK, np.int32)
    half, size = f4(1 << (bits - 1)), blocks.shape[1]
    shift, top = half + f4(0.5), np.int32((1 << bits) - 1)
    for start in range(0, blocks.shape[0], TILE):
        held = min(TILE, blocks.shape[0] - start)
        for t in range(held):
            block = blocks[start + t]
            low, high = _smallest(block, scratch, size // 2), _largest(block, scratch, size // 2)
            furthest = high if high > -low else low
            if high == -low:
                furthest = _first_of_magnitude(block, high) if high > _ZERO else _ZERO
            scales[t] = furthest / -half
            inverses[t] = _inverse(scales[t])
        round_to_float16(scales, halves, held)
        for t in range(held):
            block, out, inverse = blocks[start + t], encoded[start + t], inverses[t]
            _put_half(out, 0, halves[t])
            if bits == 4:
                for i in range(size // 2):
                    low, high = np.int32(block[i] * inverse + shift), np.int32(block[i + size // 2] * inverse + shift)
                    out[2 + i] = _join(low, high, top)
                continue
            for i in range(size):
                code = np.int32(block[i] * inverse + shift)
                codes[i] = code if code < top else top
            _put_five_bits(codes, out, 2, size // 2)


@compiled
def encode_affine_blocks(blocks, encoded, bits):
    """Q4_1 or Q5_1, by `bits`: fp32 `blocks` [n, 32] -> uint8 `encoded` [n, 20 or 24]."""
    scales, halves = np.empty(TILE, f4), np.empty(TILE, np.uint16)
    minima, minimum_halves = np.empty(TILE, f4), np.empty(TILE, np.uint16)
    inverses, exact = np.empty(TILE, f4), np.empty(TILE, f4)
    scratch, codes = np.empty(HALF_BLOCK, f4), np.empty(BLOCK, np.int32)
    top, size = np.int32((1 << bits) - 1), blocks.shape[1]
    for start in range(0, blocks.shape[0], TILE):
        held = min(TILE, blocks.shape[0] - start)
        for t in range(held):
            block = blocks[start + t]
            minima[t] = _smallest(block, scratch, size // 2)
            if minima[t] == _ZERO:
                minima[t] = _first_equal(block, _ZERO)
            exact[t] = minima[t]
            scales[t] = (_largest(block, scratch, size // 2) - minima[t] + _ZERO) / f4(top)
            inverses[t] = _inverse(scales[t])
        round_to_float16(scales, halves, held)
        round_to_float16(minima, minimum_halves, held)
        for t in range(held):
            block, out, inverse, minimum = blocks[start + t], encoded[start + t], inverses[t], exact[t]
            _put_half(out, 0, halves[t])
            _put_half(out, 2, minimum_halves[t])
            if bits == 4:
                for i in range(size // 2):
                    low = np.int32((block[i] - minimum) * inverse + f4(0.5))
                    high = np.int32((block[i + size // 2] - minimum) * inverse + f4(0.5))
                    out[4 + i] = _join(low, high, top)
                continue
            for i in range(size):
                code = np.int32((block[i] - minimum) * inverse + f4(0.5))
                codes[i] = code if code < top else top
            _put_five_bits(codes, out, 4, size // 2)
