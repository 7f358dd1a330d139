"""Weights that are published in 8 or 4 bits, by the names of their tensors: FP8 and MXFP4. Pure, and without PyTorch.

    FP8     name (F8_E4M3), name_scale_inv            a scale for each block of weights, or one for all
    MXFP4   name_blocks (U8), name_scales (U8)        two numbers a byte (E2M1), an exponent for each 32 of them (E8M0)

Such weights are decoded tensor by tensor, when a model is loaded and when it is merged; both find them here. Scales of
activations belong to inference, and are left out.

Source: DeepSeek-V3's README_WEIGHTS; the OCP microscaling formats 1.0; transformers' integrations of both.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from finetune_trainer.model.safetensors_header import TensorHeader

SCALE, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"
_OF_ACTIVATIONS = ("activation_scale", "input_scale", "activation_scale_inv", "input_scale_inv")
FP8_TYPE = "F8_E4M3"
DECODED_TYPE = "BF16"
MXFP4_GROUP = 32
"""Numbers that share an exponent."""
METHODS = (None, "bitsandbytes", "fp8", "mxfp4")
"""`quant_method` of the weights that can be loaded."""


class Format(StrEnum):
    """A format of fewer than 16 bits, as people call it."""

    FP8 = "FP8"
    MXFP4 = "MXFP4"


@dataclass(frozen=True)
class PackedWeight:
    """A weight and the tensors that hold it."""

    name: str
    """Name of the decoded weight."""
    format: Format
    codes: str
    scales: str
    unused: tuple[str, ...] = ()
    """Tensors that only inference in 8 bits needs."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of all tensors that the decoded weight stands for."""
        return (self.codes, self.scales, *self.unused)


def find_packed(types: Mapping[str, str]) -> dict[str, PackedWeight]:
    """The packed weights among tensors, by the name of their codes; `types` are the format's names of types by name."""
    found = {}
    for name, kind in types.items():
        if kind == FP8_TYPE and f"{name}{SCALE}" in types:
            stem = name.removesuffix("weight")
            unused = (f"{stem}{each}" for each in _OF_ACTIVATIONS)
            others = (f"{name}_{each}" for each in _OF_ACTIVATIONS)
            present = tuple(dict.fromkeys(each for each in (*unused, *others) if each in types))
            found[name] = PackedWeight(name, Format.FP8, name, f"{name}{SCALE}", present)

        stem = name.removesuffix(BLOCKS)
        if kind == "U8" and stem != name and types.get(f"{stem}{SCALES}") == "U8":
            found[name] = PackedWeight(stem, Format.MXFP4, name, f"{stem}{SCALES}")
    return found


def mxfp4_shape(blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the decoded weight, [E, in, out], of blocks of shape [E, out, in / 32, 16]."""
    experts, out, groups, width = blocks
    return (experts, groups * width * 2, out)


def decoded_headers(headers: Iterable[TensorHeader]) -> list[TensorHeader]:
    """The tensors as they are once decoded: each packed weight as one tensor of 16 bits, with its bytes in the file."""
    listed = {header.name: header for header in headers}
    packed = find_packed({name: header.dtype for name, header in listed.items()})
    parts = {part for weight in packed.values() for part in weight.parts}

    found = []
    for name, header in listed.items():
        weight = packed.get(name)
        if weight is not None:
            shape = header.shape
            if weight.format is Format.MXFP4 and len(shape) == 4:
                shape = mxfp4_shape(shape)
            found.append(replace(header, name=weight.name, dtype=DECODED_TYPE, shape=shape))
        elif name not in parts:
            found.append(header)
    return found


def packed_formats(headers: Iterable[TensorHeader]) -> list[Format]:
    """Formats of the packed weights among the tensors, each once."""
    packed = find_packed({header.name: header.dtype for header in headers})
    return sorted({weight.format for weight in packed.values()})


def block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of an FP8 block by config.json; 128 x 128 unless it says otherwise."""
    stated = (config.get("quantization_config") or {}).get("weight_block_size")
    match stated:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    return 128, 128
