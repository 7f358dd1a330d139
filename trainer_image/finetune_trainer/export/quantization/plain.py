"""Q8_0, Q4_0, Q5_0, Q4_1 and Q5_1: blocks of 32 weights with one scale (and minimum) each.

The arithmetic follows llama.cpp's published reference operation by operation (fp32, one rounding each), so the bytes
are equal to the reference's. `d` is the scale and `m` the minimum, both stored as float16; `q` are the integer codes:

    Q8_0          d = max|x| / 127                   q = round_half_away(x / d)
    Q4_0, Q5_0    d = x_at_max|x| / -2^(b-1)         q = trunc(x / d + 2^(b-1) + 1/2)
    Q4_1, Q5_1    d = (max - min) / (2^b - 1)        q = trunc((x - m) / d + 1/2),  m = min

Source: ggml's quantize_row_*_ref (ggml-quants.c).
"""

from dataclasses import dataclass

import torch
from gguf import GGMLQuantizationType

from finetune_trainer.export.quantization.quantizer import Quantizer, as_bytes, inverse_or_zero


@dataclass(frozen=True)
class Int8Quantizer(Quantizer):
    """Q8_0: float16 scale, then 32 signed bytes; 34 bytes a block."""

    def encode(self, blocks: torch.Tensor) -> torch.Tensor:
        scale = true_divide(blocks.abs().amax(dim=1, keepdim=True), 127)  # [n, 1]
        scaled = blocks * inverse_or_zero(scale)  # [n, 32]

        # Halves are rounded away from zero, which torch.round does not do.
        magnitude = scaled.abs()
        floor = magnitude.floor()
        codes = torch.copysign(floor + (2 * (magnitude - floor)).floor(), scaled)

        return torch.cat([as_bytes(scale, torch.float16), as_bytes(codes, torch.int8)], dim=1)


@dataclass(frozen=True)
class PlainSymmetricQuantizer(Quantizer):
    """Q4_0 and Q5_0: float16 scale, then codes around zero; 18 or 22 bytes a block."""

    bits: int

    @property
    def zero_point(self) -> int:
        """The stored code that stands for zero."""
        return 1 << (self.bits - 1)

    def encode(self, blocks: torch.Tensor) -> torch.Tensor:
        # The weight of largest magnitude, with its sign; the first of equals. It gets the lowest code.
        largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True)) + 0.0  # [n, 1]
        scale = largest / -self.zero_point

        scaled = blocks * inverse_or_zero(scale) + (self.zero_point + 0.5)
        codes = scaled.trunc().clamp(0, 2 * self.zero_point - 1).to(torch.uint8)  # [n, 32]
        return torch.cat([as_bytes(scale, torch.float16), *_pack(codes, self.bits)], dim=1)


@dataclass(frozen=True)
class PlainAffineQuantizer(Quantizer):
    """Q4_1 and Q5_1: float16 scale and minimum, then codes above the minimum; 20 or 24 bytes a block."""

    bits: int

    @property
    def max_code(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def encode(self, blocks: torch.Tensor) -> torch.Tensor:
        # argmin takes the first of equals, as llama.cpp does: zeros have signs.
        minimum = blocks.gather(1, blocks.argmin(dim=1, keepdim=True))  # [n, 1]
        maximum = blocks.amax(dim=1, keepdim=True)
        scale = true_divide(maximum - minimum + 0.0, self.max_code)

        scaled = (blocks - minimum) * inverse_or_zero(scale) + 0.5
        codes = scaled.trunc().clamp(0, self.max_code).to(torch.uint8)  # [n, 32]
        head = [as_bytes(scale, torch.float16), as_bytes(minimum, torch.float16)]
        return torch.cat([*head, *_pack(codes, self.bits)], dim=1)


def true_divide(values: torch.Tensor, divisor: float) -> torch.Tensor:
    """Divide by a tensor: by a Python number, a GPU would multiply with the reciprocal and round twice."""
    return values / values.new_full((), divisor)


def _pack(codes: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """Codes [n, 32] of 4 or 5 bits -> the byte tensors that follow scale and minimum."""
    nibbles = pack_nibbles(codes)
    return [nibbles] if bits == 4 else [_pack_fifth_bits(codes), nibbles]


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """[n, 32] -> [n, 16]: codes 0-15 of a block in the low nibbles, codes 16-31 in the high ones."""
    low, high = (codes & 0x0F).chunk(2, dim=1)
    return low | (high << 4)


def _pack_fifth_bits(codes: torch.Tensor) -> torch.Tensor:
    """[n, 32] -> [n, 4]: bit i of the little-endian word is the fifth bit of code i."""
    place_values = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=codes.device)
    return ((codes >> 4).view(-1, 4, 8) * place_values).sum(dim=2, dtype=torch.uint8)


QUANTIZERS: dict[GGMLQuantizationType, Quantizer] = {
    GGMLQuantizationType.Q8_0: Int8Quantizer(),
    GGMLQuantizationType.Q4_0: PlainSymmetricQuantizer(bits=4),
    GGMLQuantizationType.Q5_0: PlainSymmetricQuantizer(bits=5),
    GGMLQuantizationType.Q4_1: PlainAffineQuantizer(bits=4),
    GGMLQuantizationType.Q5_1: PlainAffineQuantizer(bits=5),
}
