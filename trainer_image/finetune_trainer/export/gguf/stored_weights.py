"""The weights in a GGUF file under their Hugging Face names, with Hugging Face's values: what `files` wrote, undone.

Names, stacks of experts, order of heads and offsets of norms are inverted by the converter that made them, and the
bytes are decoded when they are read, on the device. So a GGUF file is one more model folder to whoever reads tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor

from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.gguf.families.table import find_family
from finetune_trainer.export.gguf.tensors import Part, TensorConverter
from finetune_trainer.export.quantization.dequantize import dequantize
from finetune_trainer.export.quantization.quantizers import QUANTIZERS
from finetune_trainer.export.tensor_io.safetensors_files import StoredTensor


@dataclass(frozen=True)
class GgufPart(StoredTensor):
    """A tensor of a GGUF file, or one place of a stack: offset and size are those of its encoded bytes."""

    tensor_type: GGMLQuantizationType

    def to_values(self, data: torch.Tensor) -> torch.Tensor:
        """Decode the bytes, on their device, to llama.cpp's values."""
        return dequantize(data, self.tensor_type, self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class GgufTensor(StoredTensor):
    """A Hugging Face tensor in a GGUF file: offset and size are those of its first part's bytes."""

    parts: tuple[GgufPart, ...]
    """The others are read when the tensor is decoded."""
    restore: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    """llama.cpp's values of all parts -> Hugging Face's."""

    def to_values(self, data: torch.Tensor) -> torch.Tensor:
        """Decode the bytes, on their device."""
        first, *others = self.parts
        rest = [part.to_values(part.read_bytes().to(data.device)) for part in others]
        return self.restore([first.to_values(data), *rest])


def list_gguf_weights(
    path: Path, config: Mapping[str, Any], shapes: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype
) -> list[StoredTensor]:
    """List the weights of the GGUF file at `path`, to be decoded as `dtype`, in the order of `shapes`.

    `config` and `shapes` (Hugging Face names) are those of the model that the file was made from; tensors that GGUF
    files leave out are not among them. Raises InvalidBaseError if a tensor is missing, or has another shape or a type
    that is never written here.
    """
    converter = TensorConverter(find_family(config), config)
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise InvalidBaseError(f"{path} is not a GGUF file that can be read: {error}") from error
    stored = {tensor.name: tensor for tensor in reader.tensors}

    weights: list[StoredTensor] = []
    for name, shape in shapes:
        parts = tuple(_find(path, stored, part, dtype) for part in converter.parts(name, shape))
        if parts:
            span = (path, parts[0].offset, parts[0].size)
            weights.append(GgufTensor(name, dtype, shape, *span, parts, partial(converter.restore, name)))
    return weights


def _find(path: Path, stored: Mapping[str, ReaderTensor], part: Part, dtype: torch.dtype) -> GgufPart:
    name, slot = part.destination.name, part.destination.slot
    found = stored.get(name)
    # GGUF counts dimensions from the fastest on.
    shape = () if found is None else tuple(int(size) for size in reversed(found.shape))
    places = 1 if slot is None or not shape else shape[0]
    if found is None or (shape if slot is None else shape[1:]) != part.shape or (slot or 0) >= places:
        raise InvalidBaseError(f"{path} has no tensor {name} with parts of shape {part.shape}: it is not of this model")
    if found.tensor_type not in QUANTIZERS:
        raise InvalidBaseError(f"{path} stores {name} as {found.tensor_type.name}, which cannot be decoded here")

    size = int(found.n_bytes) // places
    place = (path, int(found.data_offset) + (slot or 0) * size, size)
    return GgufPart(name, dtype, part.shape, *place, GGMLQuantizationType(found.tensor_type))
