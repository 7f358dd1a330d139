"""Where the bits of a K-quant super-block lie, for compiled code: the same layouts as `k_quant_layouts`."""

import numpy as np

from finetune_trainer.export.quantization.cpu.float16 import compiled

_u1 = np.uint8


@compiled
def _put_half(out, at, half):
    out[at] = _u1(half & 0xFF)
    out[at + 1] = _u1(half >> 8)


@compiled
def _put_bits(codes, out, at, first_bit, bits, parts):
    """Bits first_bit..first_bit+bits-1 of 256 codes from byte `at`: a run of 32 bytes holds `parts` runs of 32 codes,
    part i in the bits from i * bits."""
    mask = (1 << bits) - 1
    for run in range(256 // (32 * parts)):
        for i in range(32):
            packed = 0
            for part in range(parts):
                code = np.int64(codes[run * 32 * parts + part * 32 + i])
                packed |= ((code >> first_bit) & mask) << (part * bits)
            out[at + run * 32 + i] = _u1(packed)


@compiled
def _collect(q, first, group, offset):
    """Codes of the super-block whose groups are the columns from `first`, in the order of the weights."""
    codes = np.empty(256, np.uint8)
    for g in range(256 // group):
        for i in range(group):
            codes[g * group + i] = _u1(np.int32(q[i, first + g]) + offset)
    return codes


@compiled
def _put_six_bit_pairs(s, m, first, out, at):
    for j in range(4):
        low_s, low_m = np.int64(s[first + j]), np.int64(m[first + j])
        high_s, high_m = np.int64(s[first + 4 + j]), np.int64(m[first + 4 + j])
        out[at + j] = _u1(low_s | ((high_s >> 4) << 6))
        out[at + 4 + j] = _u1(low_m | ((high_m >> 4) << 6))
        out[at + 8 + j] = _u1((high_s & 15) | ((high_m & 15) << 4))


@compiled
def pack_affine(q, s, m, first, group, bits, d, e, out):
    """Q2_K, Q4_K or Q5_K, by `bits`, into the bytes `out` of one super-block."""
    codes = _collect(q, first, group, 0)
    if bits == 2:
        for j in range(16):
            out[j] = _u1(np.int64(s[first + j]) | (np.int64(m[first + j]) << 4))
        _put_bits(codes, out, 16, 0, 2, 4)
        _put_half(out, 80, d)
        _put_half(out, 82, e)
        return
    _put_half(out, 0, d)
    _put_half(out, 2, e)
    _put_six_bit_pairs(s, m, first, out, 4)
    if bits == 5:
        _put_bits(codes, out, 16, 4, 1, 8)
    _put_bits(codes, out, 48 if bits == 5 else 16, 0, 4, 2)


@compiled
def pack_symmetric(q, s, first, group, bits, scale_offset, d, out):
    """Q3_K or Q6_K, by `bits`, into the bytes `out` of one super-block."""
    codes = _collect(q, first, group, 1 << (bits - 1))
    if bits == 3:
        _put_bits(codes, out, 0, 2, 1, 8)
        _put_bits(codes, out, 32, 0, 2, 4)
        for j in range(8):
            low = np.int64(s[first + j]) + scale_offset
            high = np.int64(s[first + 8 + j]) + scale_offset
            out[96 + j] = _u1((low & 15) | ((high & 15) << 4))
        for j in range(4):
            upper = 0
            for part in range(4):
                upper |= ((np.int64(s[first + part * 4 + j]) + scale_offset) >> 4) << (2 * part)
            out[104 + j] = _u1(upper)
        _put_half(out, 108, d)
        return
    for half in range(2):
        for i in range(64):
            low, high = codes[half * 128 + i], codes[half * 128 + 64 + i]
            out[half * 64 + i] = _u1((low & 15) | ((high & 15) << 4))
    _put_bits(codes, out, 128, 4, 2, 4)
    for j in range(16):
        out[192 + j] = _u1(np.int64(s[first + j]) + scale_offset)
    _put_half(out, 208, d)
