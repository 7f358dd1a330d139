"""The weights in a GGUF file under their Hugging Face names, with Hugging Face's values: what `files` wrote, undone.

Names, order of heads and offsets of norms are inverted by the converter that made them, and the bytes are decoded when
they are read, on the device. So a GGUF file is one more model folder to whoever reads tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFReader

from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.gguf.families import find_family
from finetune_trainer.export.gguf.tensors import TensorConverter
from finetune_trainer.export.quantization.dequantize import dequantize
from finetune_trainer.export.quantization.quantizers import QUANTIZERS
from finetune_trainer.export.tensor_io.safetensors_files import StoredTensor


@dataclass(frozen=True)
class GgufTensor(StoredTensor):
    """A tensor of a GGUF file: offset and size are those of the encoded bytes, dtype and shape of the weights."""

    tensor_type: GGMLQuantizationType
    restore: Callable[[torch.Tensor], torch.Tensor]
    """llama.cpp's values -> Hugging Face's."""

    def to_values(self, data: torch.Tensor) -> torch.Tensor:
        """Decode the bytes, on their device."""
        return self.restore(dequantize(data, self.tensor_type, self.dtype).reshape(self.shape))


def list_gguf_weights(
    path: Path, config: Mapping[str, Any], shapes: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype
) -> list[StoredTensor]:
    """List the weights of the GGUF file at `path`, to be decoded as `dtype`, in the order of `shapes`.

    `config` and `shapes` (Hugging Face names) are those of the model that the file was made from. Raises
    InvalidBaseError if a tensor is missing, or has another shape or a type that is never written here.
    """
    converter = TensorConverter(find_family(config), config)
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise InvalidBaseError(f"{path} is not a GGUF file that can be read: {error}") from error
    stored = {tensor.name: tensor for tensor in reader.tensors}

    weights: list[StoredTensor] = []
    for name, shape in shapes:
        place = converter.place(name)
        if place is None or place.slot is not None:
            if converter.parts(name, shape):
                raise InvalidBaseError(f"{path} has {name} in several tensors: such a file cannot be read back here")
            continue
        renamed = place.name
        found = stored.get(renamed)
        # GGUF counts dimensions from the fastest on.
        if found is None or tuple(int(size) for size in reversed(found.shape)) != shape:
            raise InvalidBaseError(f"{path} has no tensor {renamed} of shape {shape}: it is not of this model")
        if found.tensor_type not in QUANTIZERS:
            raise InvalidBaseError(f"{path} stores {renamed} as {found.tensor_type.name}, which cannot be decoded here")

        restore = _restorer(converter, name)
        span = (path, int(found.data_offset), int(found.n_bytes))
        weights.append(GgufTensor(name, dtype, shape, *span, GGMLQuantizationType(found.tensor_type), restore))
    return weights


def _restorer(converter: TensorConverter, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda weights: converter.restore(name, weights)
