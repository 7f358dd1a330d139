"""Decoding of GGUF's tensor types, in torch: on a GPU if the bytes are there. The formulas are those of the quantisers.

A weight is its code times its scale, less its minimum; `plain` and `super_blocks` define the codes, and the encoders'
`pack` functions the order of their bits. The `gguf` package decodes too, but in numpy on a CPU only: it is the judge in
the tests.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from finetune_trainer.export.quantization.codebook import FLOAT4_MAGNITUDES, GROUP, SCALE_LIMIT, VALUES
from finetune_trainer.export.quantization.floats import FLOAT_DTYPES

_T = GGMLQuantizationType
CHUNK_WEIGHTS = 1 << 23
"""Weights decoded at a time: codes and products of a chunk need about ten bytes each."""


def dequantize(data: torch.Tensor, tensor_type: GGMLQuantizationType, dtype: torch.dtype) -> torch.Tensor:
    """Decode the bytes of a tensor, uint8 [encoded bytes]; returns its weights in `dtype`, flat, on the same device."""
    if tensor_type in FLOAT_DTYPES:
        return data.view(FLOAT_DTYPES[tensor_type]).to(dtype)

    block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
    blocks = data.view(-1, block_bytes)  # [n, block bytes]
    weights = torch.empty((blocks.shape[0], block_size), dtype=dtype, device=data.device)

    step = CHUNK_WEIGHTS // block_size
    for start in range(0, blocks.shape[0], step):
        weights[start : start + step] = _DECODERS[tensor_type](blocks[start : start + step])
    return weights.flatten()


def _decode_int8(blocks: torch.Tensor) -> torch.Tensor:
    """Q8_0: [n, 34] -> fp32 [n, 32]."""
    return _float16(blocks[:, :2]) * blocks[:, 2:].contiguous().view(torch.int8).float()


def _decode_plain(blocks: torch.Tensor, *, bits: int, has_minimum: bool) -> torch.Tensor:
    """Q4_0, Q5_0, Q4_1, Q5_1: scale, minimum if there is one, fifth bits if there are any, nibbles -> fp32 [n, 32]."""
    nibbles = blocks[:, -16:]
    codes = torch.cat([nibbles & 15, nibbles >> 4], dim=1)
    if bits == 5:
        shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
        codes |= ((blocks[:, -20:-16].unsqueeze(2) >> shifts) & 1).flatten(1) << 4  # bit i of the word is code i's

    scale = _float16(blocks[:, :2])
    if has_minimum:
        return scale * codes.float() + _float16(blocks[:, 2:4])
    return scale * (codes.float() - (1 << (bits - 1)))


def _decode_q2_k(blocks: torch.Tensor) -> torch.Tensor:
    pairs, codes, factors = blocks.split_with_sizes([16, 64, 4], dim=1)
    return _affine(_unstack_bits(codes, runs=2, parts=4, bits=2), pairs & 15, pairs >> 4, factors)


def _decode_q4_k(blocks: torch.Tensor) -> torch.Tensor:
    factors, pairs, codes = blocks.split_with_sizes([4, 12, 128], dim=1)
    return _affine(_unstack_bits(codes, runs=4, parts=2, bits=4), *_six_bit_pairs(pairs), factors)


def _decode_q5_k(blocks: torch.Tensor) -> torch.Tensor:
    factors, pairs, fifth, lower = blocks.split_with_sizes([4, 12, 32, 128], dim=1)
    codes = _unstack_bits(lower, runs=4, parts=2, bits=4) | _unstack_bits(fifth, runs=1, parts=8, bits=1) << 4
    return _affine(codes, *_six_bit_pairs(pairs), factors)


def _decode_q3_k(blocks: torch.Tensor) -> torch.Tensor:
    third, lower, nibbles, upper, factor = blocks.split_with_sizes([32, 64, 8, 4, 2], dim=1)
    codes = _unstack_bits(lower, runs=2, parts=4, bits=2) | _unstack_bits(third, runs=1, parts=8, bits=1) << 2

    # Lower four bits: scale j and j + 8 share a byte. Upper two: four bytes hold those of four scales each.
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device).view(1, 4, 1)
    scales = torch.cat([nibbles & 15, nibbles >> 4], dim=1)
    scales |= ((upper.unsqueeze(1) >> shifts) & 3).flatten(1) << 4
    return _symmetric(codes.float() - 4, scales.float() - 32, factor)


def _decode_q6_k(blocks: torch.Tensor) -> torch.Tensor:
    lower, upper, scales, factor = blocks.split_with_sizes([128, 64, 16, 2], dim=1)
    halves = lower.view(-1, 2, 64)
    nibbles = torch.cat([halves & 15, halves >> 4], dim=2).flatten(1)
    codes = nibbles | _unstack_bits(upper, runs=2, parts=4, bits=2) << 4
    return _symmetric(codes.float() - 32, scales.contiguous().view(torch.int8).float(), factor)


def _decode_iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    return _float16(blocks[:, :2]) * _look_up(blocks[:, 2:], VALUES)


def _decode_iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    factor, upper, lower, codes = blocks.split_with_sizes([2, 2, 4, 128], dim=1)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    integers = ((upper.unsqueeze(2) >> shifts) & 3).flatten(1) << 4
    integers |= torch.stack([lower & 15, lower >> 4], dim=2).flatten(1)
    step = _float16(factor) * (integers.float() - SCALE_LIMIT)  # [n, 8]
    return (_look_up(codes.reshape(-1, 16), VALUES).view(*step.shape, GROUP) * step.unsqueeze(2)).flatten(1)


def _decode_mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    values = (*FLOAT4_MAGNITUDES, *(-magnitude for magnitude in FLOAT4_MAGNITUDES))
    return torch.ldexp(_look_up(blocks[:, 1:], values), blocks[:, :1].int() - 128)


def _look_up(nibbles: torch.Tensor, values: Sequence[int]) -> torch.Tensor:
    """Codes 0-15 of a block in the low halves of [n, 16], codes 16-31 in the high ones -> values, fp32 [n, 32]."""
    table = torch.tensor(values, dtype=torch.float32, device=nibbles.device)
    return table[torch.cat([nibbles & 15, nibbles >> 4], dim=1).int()]


def _affine(codes: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """d * s_j * q - e * m_j, from codes [n, 256], integers [n, groups] and factors d, e [n, 4 bytes]."""
    d, e = _float16(factors[:, :2]), _float16(factors[:, 2:])  # [n, 1]
    step, minimum = d * scales.float(), e * minima.float()  # [n, groups]
    grouped = codes.float().view(*scales.shape, -1)
    return (grouped * step.unsqueeze(2) - minimum.unsqueeze(2)).flatten(1)


def _symmetric(codes: torch.Tensor, scales: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """d * s_j * q, from signed codes [n, 256], signed scales [n, groups] and d [n, 2 bytes]."""
    step = _float16(factor) * scales  # [n, groups]
    return (codes.view(*scales.shape, -1) * step.unsqueeze(2)).flatten(1)


def _float16(data: torch.Tensor) -> torch.Tensor:
    """[n, 2 bytes] -> fp32 [n, 1]."""
    return data.contiguous().view(torch.float16).float()


def _unstack_bits(data: torch.Tensor, *, runs: int, parts: int, bits: int) -> torch.Tensor:
    """[n, runs * 32] -> codes [n, runs * parts * 32]: the inverse of `super_blocks.stack_bits`."""
    shifts = torch.arange(0, parts * bits, bits, dtype=torch.uint8, device=data.device).view(1, 1, parts, 1)
    return ((data.reshape(-1, runs, 1, 32) >> shifts) & ((1 << bits) - 1)).flatten(1)


def _six_bit_pairs(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, 12] -> 8 scales and 8 minima of 6 bits; the upper two bits of groups 4-7 fill the bytes of groups 0-3."""
    scales, minima, rest = data.chunk(3, dim=1)  # [n, 4] each
    return (
        torch.cat([scales & 63, (rest & 15) | (scales >> 6 << 4)], dim=1),
        torch.cat([minima & 63, (rest >> 4) | (minima >> 6 << 4)], dim=1),
    )


_DECODERS: dict[GGMLQuantizationType, Callable[[torch.Tensor], torch.Tensor]] = {
    _T.Q8_0: _decode_int8,
    _T.Q4_0: partial(_decode_plain, bits=4, has_minimum=False),
    _T.Q5_0: partial(_decode_plain, bits=5, has_minimum=False),
    _T.Q4_1: partial(_decode_plain, bits=4, has_minimum=True),
    _T.Q5_1: partial(_decode_plain, bits=5, has_minimum=True),
    _T.Q2_K: _decode_q2_k,
    _T.Q3_K: _decode_q3_k,
    _T.Q4_K: _decode_q4_k,
    _T.Q5_K: _decode_q5_k,
    _T.Q6_K: _decode_q6_k,
    _T.IQ4_NL: _decode_iq4_nl,
    _T.IQ4_XS: _decode_iq4_xs,
    _T.MXFP4: _decode_mxfp4,
}
