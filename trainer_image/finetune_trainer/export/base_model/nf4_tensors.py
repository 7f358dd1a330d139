"""Weights that exist in bitsandbytes' NF4 only, as tensors that are dequantised when they are read.

Such a checkpoint keeps a matrix as packed codes `name` (uint8) beside `name.absmax`, `name.quant_map` and, with double
quantisation, `name.nested_absmax` and `name.nested_quant_map`; the sizes are JSON in `name.quant_state.*`. Dequantising
gives the weights that training computed with, rounded to the 16-bit type that the checkpoint names; the original
weights are gone.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from bitsandbytes.functional import QuantState

from finetune_api.base import Json
from finetune_kernels.primitives import nf4
from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.tensor_io.safetensors_files import StoredTensor
from finetune_trainer.model.safetensors_header import NF4_STATE

PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Nf4Tensor(StoredTensor):
    """A matrix in NF4: offset and size are those of the codes, dtype and shape those of the dequantised weights."""

    parts: tuple[StoredTensor, ...]

    def to_values(self, data: torch.Tensor) -> torch.Tensor:
        """Dequantise the codes, on their device."""
        found = {part.name.removeprefix(f"{self.name}."): part.read() for part in self.parts}
        return nf4.reference(data, QuantState.from_dict(found, device=data.device))


def fold_nf4(tensors: Sequence[StoredTensor]) -> tuple[StoredTensor, ...]:
    """Join each NF4 matrix with its parts into one tensor; raises InvalidBaseError for parts that do not fit."""
    by_name = {tensor.name: tensor for tensor in tensors}
    folded: dict[str, Nf4Tensor] = {}
    part_names: set[str] = set()
    for name in by_name:
        if name.endswith(NF4_STATE):
            weight = _fold(name.removesuffix(NF4_STATE), by_name)
            folded[weight.name] = weight
            part_names |= {part.name for part in weight.parts}

    return tuple(folded.get(tensor.name, tensor) for tensor in tensors if tensor.name not in part_names)


def _fold(name: str, by_name: Mapping[str, StoredTensor]) -> Nf4Tensor:
    codes, state = by_name.get(name), by_name[f"{name}{NF4_STATE}"]
    if codes is None or codes.dtype is not torch.uint8 or state.dtype is not torch.uint8:
        raise InvalidBaseError(f"{state.path} is damaged: {name} has an NF4 state but no codes")
    parts = {kind: by_name[f"{name}.{kind}"] for kind in PARTS if f"{name}.{kind}" in by_name}

    try:
        sizes: Json = json.loads(bytes(state.read().numpy()))
        shape, dtype = tuple(sizes["shape"]), DTYPES[sizes["dtype"]]
        usable = all(type(size) is int and size > 0 for size in shape) and len(shape) == 2
        counts = {kind: math.prod(part.shape) for kind, part in parts.items()}
        # Two codes share a byte.
        fits = counts == _expected_counts(sizes, parts) and math.prod(codes.shape) == -(-math.prod(shape) // 2)
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError) as error:
        raise InvalidBaseError(f"{state.path} is damaged: the NF4 state of {name} cannot be read: {error!r}") from error

    if not usable or not fits:
        raise InvalidBaseError(f"{state.path} is damaged: the NF4 parts of {name} do not fit its shape {shape}")
    return Nf4Tensor(name, dtype, shape, codes.path, codes.offset, codes.size, (*parts.values(), state))


def _expected_counts(sizes: Json, parts: Mapping[str, StoredTensor]) -> dict[str, int]:
    """Number of values that each part must have."""
    # One absmax for each block of weights; with double quantisation, those are quantised in blocks, too.
    blocks = -(-math.prod(sizes["shape"]) // sizes["blocksize"])
    expected = {"absmax": blocks, "quant_map": 16}
    if "nested_absmax" in parts:
        expected |= {"nested_absmax": -(-blocks // sizes["nested_blocksize"]), "nested_quant_map": 256}
    return expected
