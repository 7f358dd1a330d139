"""Weights that are published in FP8 or MXFP4, as tensors that are decoded when they are read, on their device.

    FP8     W[i, j] = q[i, j] * scale[i / rows, j / columns]        also with one scale for all
    MXFP4   W[e, j, i] = E2M1(code[e, i, j]) * 2^(scale[e, i, j / 32] - 127)

FP8 comes out in fp32, so that a merge rounds once; MXFP4 in BF16, which holds all its values. Decoding takes the memory
of one tensor: no model is ever in 16 bits as a whole because of it.

Source: DeepSeek-V3's weight_dequant; the OCP microscaling formats 1.0; transformers' GptOssExperts, which keeps
[experts, in, out].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from finetune_api.base import Json
from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.tensor_io.safetensors_files import NAMES, StoredTensor
from finetune_trainer.model.published_formats import (
    MXFP4_GROUP,
    Format,
    PackedWeight,
    block_size,
    find_packed,
    mxfp4_shape,
)

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Number of each of the 16 codes."""
EXPONENT_BIAS = 127


def decode_fp8(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The weights [..., out, in] in fp32, of codes in E4M3 and a scale for each block, or a single one.

    The last block of a row or column may be cut off.
    """
    weights, factors = codes.to(torch.float32), scale_values(scale).to(codes.device)
    if factors.numel() == 1:
        return weights.mul_(factors.reshape(()))

    # A slice at a time: the factors of all weights would take as much memory as the weights.
    rows, columns = codes.shape[-2:]
    for index in range(factors.shape[-2]):
        part = slice(index * block[0], min(rows, (index + 1) * block[0]))
        spread = factors[..., index, :].repeat_interleave(block[1], dim=-1)[..., :columns]
        weights[..., part, :] *= spread.unsqueeze(-2)
    return weights


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """Scales in fp32; exponents alone (E8M0) become powers of two."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return torch.exp2(scale.view(torch.uint8).to(torch.float32) - EXPONENT_BIAS)
    return scale.to(torch.float32)


def decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weights [E, in, out] in BF16, of blocks [E, out, in / 32, 16] and exponents [E, out, in / 32]."""
    experts, out, groups, width = blocks.shape
    table = torch.tensor(E2M1, dtype=torch.bfloat16, device=blocks.device)
    weights = torch.empty(experts, groups * width * 2, out, dtype=torch.bfloat16, device=blocks.device)

    for index in range(experts):  # an expert at a time: indices take eight bytes a number
        codes = blocks[index]
        pairs = torch.stack((table[(codes & 15).int()], table[(codes >> 4).int()]), dim=-1)  # the low half is first
        exponents = scales[index].to(torch.int32) - EXPONENT_BIAS
        values = torch.ldexp(pairs.float().flatten(-2), exponents.unsqueeze(-1))
        weights[index] = values.reshape(out, -1).T
    return weights


@dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """A weight in FP8 or MXFP4: offset and size are those of its codes, shape that of the decoded weight."""

    format: Format
    codes: StoredTensor
    scale: StoredTensor
    block: tuple[int, int]
    """Rows and columns of a block of FP8 weights with one scale."""

    def to_values(self, data: torch.Tensor) -> torch.Tensor:
        """Decode the codes, on their device."""
        codes, scale = self.codes.to_values(data), self.scale.read().to(data.device)
        if self.format is Format.MXFP4:
            return decode_mxfp4(codes, scale)
        return decode_fp8(codes, scale, self.block)


def fold_packed(tensors: Sequence[StoredTensor], config: Json) -> tuple[StoredTensor, ...]:
    """Join each FP8 or MXFP4 weight with its scales into one tensor; `config` is config.json as written.

    Raises InvalidBaseError for parts that do not fit.
    """
    named = {tensor.name: tensor for tensor in tensors}
    packed = find_packed({tensor.name: NAMES[tensor.dtype] for tensor in tensors})
    parts = {part for weight in packed.values() for part in weight.parts}
    block = block_size(config)

    return tuple(
        _join(packed[tensor.name], named, block) if tensor.name in packed else tensor
        for tensor in tensors
        if tensor.name in packed or tensor.name not in parts
    )


def _join(weight: PackedWeight, named: Mapping[str, StoredTensor], block: tuple[int, int]) -> PackedTensor:
    codes, scale = named[weight.codes], named[weight.scales]
    if weight.format is Format.MXFP4:
        fits = len(codes.shape) == 4 and codes.shape[3] * 2 == MXFP4_GROUP and scale.shape == codes.shape[:3]
        shape, dtype = mxfp4_shape(codes.shape) if fits else (), torch.bfloat16
    else:
        fits, shape, dtype = _fits_fp8(codes.shape, scale, block), codes.shape, torch.float32

    if not fits:
        raise InvalidBaseError(
            f"{codes.path} is damaged, or its config.json is of another model: the scales {scale.name} of shape "
            f"{scale.shape} do not fit {codes.name} of shape {codes.shape}"
            + (f" in blocks of {block[0]} x {block[1]}" if weight.format is Format.FP8 else "")
        )
    return PackedTensor(
        weight.name, dtype, shape, codes.path, codes.offset, codes.size, weight.format, codes, scale, block
    )


def _fits_fp8(shape: tuple[int, ...], scale: StoredTensor, block: tuple[int, int]) -> bool:
    """True for one scale for all weights, or one for each block."""
    if all(size == 1 for size in scale.shape):
        return True
    if len(shape) < 2 or len(scale.shape) != len(shape):
        return False
    grid = (-(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    return scale.shape == (*shape[:-2], *grid)
