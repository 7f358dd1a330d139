"""MXFP4 weights of a base as llama.cpp's MXFP4 blocks, without decoding: experts that were not trained keep their bits.

Both keep an exponent for 32 numbers of 4 bits, in another order. Encoding the decoded weights again would give the same
values, but a smaller exponent wherever a block's largest number is below 4.

    published    exponents apart; byte i has numbers 2i and 2i + 1
    llama.cpp    exponent first; byte i has numbers i and i + 16
"""

from collections.abc import Iterable

import torch

from finetune_trainer.export.base_model.packed_tensors import PackedTensor
from finetune_trainer.export.tensor_io.safetensors_files import StoredTensor
from finetune_trainer.model.published_formats import Format


def find_mxfp4(tensors: Iterable[StoredTensor]) -> dict[str, PackedTensor]:
    """The tensors that are stored in MXFP4, by name."""
    return {
        tensor.name: tensor for tensor in tensors if isinstance(tensor, PackedTensor) and tensor.format is Format.MXFP4
    }


def read_blocks(tensor: PackedTensor) -> torch.Tensor:
    """Read an MXFP4 tensor of shape [E, in, out] as blocks: uint8 [E, in / 32 * 17, out]."""
    pairs, exponents = tensor.codes.read(), tensor.scale.read()  # [E, out, in / 32, 16], [E, out, in / 32]
    codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)  # [..., 32]
    nibbles = codes[..., :16] | (codes[..., 16:] << 4)
    return torch.cat([exponents.unsqueeze(-1), nibbles], dim=-1).flatten(-2).transpose(-1, -2)
