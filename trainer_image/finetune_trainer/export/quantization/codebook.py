"""IQ4_NL, IQ4_XS and MXFP4: codes of 4 bits that stand for sixteen values at uneven distances.

Weight x becomes the code of the value v that is nearest to x / scale. For IQ4_NL and IQ4_XS, whose values are close to
the quantiles of normal weights, each group of 32 weights tries sixteen scales; the best by least squares, weighted with
x^2, wins:

    IQ4_NL    d * v             d: float16
    IQ4_XS    d * s_j * v       s_j: integers of 6 bits for the groups of a super-block; d: float16
    MXFP4     2^(e - 128) * v   v: twice a 4-bit float; e: exponent of the group's largest weight

The arithmetic follows llama.cpp's published reference operation by operation, so the bytes are equal to the
reference's; `cpu.codebook` is the twin. MXFP4 takes the exponent from the number's bits; the reference takes a rounded
logarithm, which is one more for weights within a few millionths of the next power of two.

Source: ggml's quantize_row_iq4_nl_impl and quantize_row_mxfp4_ref (ggml-quants.c).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from gguf import GGMLQuantizationType

from finetune_trainer.export.quantization.plain import pack_nibbles, true_divide
from finetune_trainer.export.quantization.quantizer import Quantizer, as_bytes, inverse_or_zero
from finetune_trainer.export.quantization.super_blocks import sum_rows

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The value of each code of IQ4_NL and IQ4_XS."""
MIDDLES = tuple((low + high) / 2 for low, high in pairwise(VALUES))
"""Between neighbouring values; a weight there gets the higher one."""
TRIALS = tuple(range(VALUES[0] - 7, VALUES[0] + 8))
"""The value that each trial scales a group's largest weight to."""
MIN_LARGEST = 1e-15
"""Groups whose largest weight is smaller count as zeros."""
GROUP = 32
SCALE_LIMIT = 32
"""The integers of IQ4_XS are -32..31, stored + 32."""

FLOAT4_MAGNITUDES = (0, 1, 2, 3, 4, 6, 8, 12)
"""Twice the magnitudes that four bits, one of them the sign, can hold."""
FLOAT4_MIDDLES = tuple((low + high) / 2 for low, high in pairwise(FLOAT4_MAGNITUDES))
"""Between neighbouring magnitudes; a weight there gets the lower one."""


@dataclass(frozen=True)
class NonlinearQuantizer(Quantizer):
    """IQ4_NL: float16 scale, then 32 codes; 18 bytes a block."""

    def encode(self, blocks: torch.Tensor) -> torch.Tensor:
        x = blocks.t().contiguous()  # [32, n]
        scale = search_scales(x)  # [n]
        codes = nearest_codes(x * inverse_or_zero(scale))
        return torch.cat([as_bytes(scale.unsqueeze(1), torch.float16), pack_nibbles(codes.t())], dim=1)


@dataclass(frozen=True)
class NonlinearSuperQuantizer(Quantizer):
    """IQ4_XS: float16 factor, upper two bits of 8 integers, lower four, then 256 codes; 136 bytes a super-block."""

    def encode(self, blocks: torch.Tensor) -> torch.Tensor:
        x = blocks.reshape(-1, GROUP).t().contiguous()  # [32, n * 8]
        scale = search_scales(x).view(blocks.shape[0], -1)  # [n, 8]

        # The scale farthest from zero, the first of equals, becomes the integer -32.
        factor = -scale.gather(1, scale.abs().argmax(dim=1, keepdim=True)) / SCALE_LIMIT  # [n, 1]
        integers = (scale * inverse_or_zero(factor)).round().clamp(-SCALE_LIMIT, SCALE_LIMIT - 1)  # [n, 8]
        codes = nearest_codes(x * inverse_or_zero(factor * integers).flatten())

        stored = (integers + SCALE_LIMIT).to(torch.uint8)
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
        upper = ((stored >> 4).view(-1, 2, 4) << shifts).sum(dim=2, dtype=torch.uint8)  # [n, 2]
        lower = (stored[:, 0::2] & 15) | (stored[:, 1::2] << 4)  # [n, 4]
        nibbles = pack_nibbles(codes.t()).reshape(blocks.shape[0], -1)  # [n, 128]
        return torch.cat([as_bytes(factor, torch.float16), upper, lower, nibbles], dim=1)


@dataclass(frozen=True)
class Float4Quantizer(Quantizer):
    """MXFP4: exponent of 8 bits, then 32 codes of sign and magnitude; 17 bytes a block."""

    def encode(self, blocks: torch.Tensor) -> torch.Tensor:
        largest = blocks.abs().amax(dim=1, keepdim=True)  # [n, 1]
        exponent = torch.frexp(largest).exponent - 1  # largest = 1.xxx * 2^exponent
        stored = torch.where(largest > 0, exponent + 125, 0).clamp(0, 254)
        step = torch.ldexp(torch.ones_like(largest), stored - 128)

        middles = torch.tensor(FLOAT4_MIDDLES, device=blocks.device)
        magnitudes = torch.bucketize(blocks.abs() / step, middles)  # of equals, the lower
        codes = magnitudes + 8 * ((blocks < 0) & (magnitudes > 0))
        return torch.cat([stored.to(torch.uint8), pack_nibbles(codes.to(torch.uint8))], dim=1)


def search_scales(x: torch.Tensor) -> torch.Tensor:
    """Find the scale of each column of `x`, fp32 [32, n]; returns [n], 0 for columns of zeros."""
    largest = x.gather(0, x.abs().argmax(dim=0, keepdim=True)).squeeze(0)  # with its sign, the first of equals
    values_of = torch.tensor(VALUES, dtype=torch.float32, device=x.device)
    products = x.new_empty(GROUP, 2, x.shape[1])
    scale, best = torch.zeros_like(largest), torch.full_like(largest, -torch.inf)

    squares = x.square()
    inverses = (torch.full_like(largest, trial) / largest for trial in TRIALS)
    for inverse in (inverse_or_zero(true_divide(largest, -VALUES[0])), *inverses):
        values = values_of[nearest_codes(x * inverse).int()]
        weighted = squares * values
        torch.mul(weighted, x, out=products[:, 0])
        torch.mul(weighted, values, out=products[:, 1])
        sum_xq, sum_qq = sum_rows(products)

        better = (sum_qq > 0) & (sum_xq * sum_xq > best * sum_qq)
        scale = torch.where(better, sum_xq / sum_qq, scale)
        best = torch.where(better, scale * sum_xq, best)
    return torch.where(largest.abs() < MIN_LARGEST, 0.0, scale)


def nearest_codes(scaled: torch.Tensor) -> torch.Tensor:
    """The code, uint8, of the value that is nearest to each of `scaled`."""
    middles = torch.tensor(MIDDLES, dtype=torch.float32, device=scaled.device)
    return torch.bucketize(scaled, middles, right=True, out_int32=True).to(torch.uint8)


QUANTIZERS: dict[GGMLQuantizationType, Quantizer] = {
    GGMLQuantizationType.IQ4_NL: NonlinearQuantizer(),
    GGMLQuantizationType.IQ4_XS: NonlinearSuperQuantizer(),
    GGMLQuantizationType.MXFP4: Float4Quantizer(),
}
