"""Where the bits of a K-quant super-block lie: 256 codes, a scale (and a minimum) per group, and the factors of both.

Layouts are llama.cpp's published structs. `n` is the number of super-blocks; codes are uint8 [n, 256] in the order of
the weights, scales and minima uint8 [n, groups], factors fp32 [n, 1] that float16 holds exactly.
"""

import torch


def as_float16_bytes(factors: torch.Tensor) -> torch.Tensor:
    """[n, 1] fp32 -> [n, 2] bytes."""
    return factors.to(torch.float16).view(torch.uint8)


def _stack_bits(parts: torch.Tensor, bits: int) -> torch.Tensor:
    """[n, runs, k, 32] -> [n, runs * 32]: part i of each run goes into bits i * `bits` and up of the same 32 bytes."""
    shifts = torch.arange(0, parts.shape[2] * bits, bits, dtype=torch.uint8, device=parts.device)
    return (parts << shifts.view(1, 1, -1, 1)).sum(dim=2, dtype=torch.uint8).flatten(1)


def _pack_six_bit_pairs(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """[n, 8] scales and minima of 6 bits -> [n, 12]; the upper two bits of groups 4-7 fill the bytes of groups 0-3."""
    first_scales, last_scales = scales.chunk(2, dim=1)
    first_minima, last_minima = minima.chunk(2, dim=1)
    return torch.cat(
        [
            first_scales | (last_scales >> 4 << 6),
            first_minima | (last_minima >> 4 << 6),
            (last_scales & 15) | (last_minima << 4),
        ],
        dim=1,
    )


def pack_q2_k(
    codes: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor, factor: torch.Tensor, minimum_factor: torch.Tensor
) -> torch.Tensor:
    """[n, 84]: 16 pairs of 4-bit scale and minimum, 2-bit codes, factors."""
    packed = _stack_bits(codes.view(-1, 2, 4, 32), 2)
    return torch.cat(
        [scales | (minima << 4), packed, as_float16_bytes(factor), as_float16_bytes(minimum_factor)], dim=1
    )


def pack_q3_k(codes: torch.Tensor, scales: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """[n, 110]: third bits of the codes, their lower two, 16 scales of 6 bits (stored + 32), factor."""
    high = _stack_bits((codes >> 2).view(-1, 1, 8, 32), 1)
    low = _stack_bits((codes & 3).view(-1, 2, 4, 32), 2)
    nibbles = (scales[:, :8] & 15) | (scales[:, 8:] << 4)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device)
    upper = ((scales >> 4).view(-1, 4, 4) << shifts.view(1, -1, 1)).sum(dim=1, dtype=torch.uint8)
    return torch.cat([high, low, nibbles, upper, as_float16_bytes(factor)], dim=1)


def pack_q4_k(
    codes: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor, factor: torch.Tensor, minimum_factor: torch.Tensor
) -> torch.Tensor:
    """[n, 144]: factors, 8 pairs of 6-bit scale and minimum, codes."""
    head = [as_float16_bytes(factor), as_float16_bytes(minimum_factor), _pack_six_bit_pairs(scales, minima)]
    return torch.cat([*head, _stack_bits(codes.view(-1, 4, 2, 32), 4)], dim=1)


def pack_q5_k(
    codes: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor, factor: torch.Tensor, minimum_factor: torch.Tensor
) -> torch.Tensor:
    """[n, 176]: as Q4_K, with the codes' fifth bits before their lower four."""
    head = [as_float16_bytes(factor), as_float16_bytes(minimum_factor), _pack_six_bit_pairs(scales, minima)]
    high = _stack_bits((codes >> 4).view(-1, 1, 8, 32), 1)
    return torch.cat([*head, high, _stack_bits((codes & 15).view(-1, 4, 2, 32), 4)], dim=1)


def pack_q6_k(codes: torch.Tensor, scales: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """[n, 210]: lower four bits of the codes, upper two, 16 scales of 8 bits (two's complement), factor."""
    quarters = codes.view(-1, 2, 4, 32)
    low = ((quarters[:, :, :2] & 15) | (quarters[:, :, 2:] << 4)).flatten(1)
    return torch.cat([low, _stack_bits(quarters >> 4, 2), scales, as_float16_bytes(factor)], dim=1)
