"""The weights to judge, read by Hugging Face name onto a device: a model folder, merged in passing, or a GGUF file."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from finetune_trainer.export.adapter import LoraWeights
from finetune_trainer.export.base_model.folder import BaseModel
from finetune_trainer.export.base_model.output_head import EMBEDDING, HEAD
from finetune_trainer.export.gguf.stored_weights import list_gguf_weights
from finetune_trainer.export.judge.parameters import Parameters
from finetune_trainer.export.tensor_io.safetensors_files import StoredTensor
from finetune_trainer.export.tensor_io.tensor_reader import read_tensors


@dataclass(frozen=True)
class Weights:
    """All weights of one model, in files."""

    tensors: dict[str, StoredTensor]
    """By name."""
    adapter: LoraWeights | None = None
    """Merged into each tensor, in fp32, when it is read."""

    @classmethod
    def of_model(cls, base: BaseModel, adapter: LoraWeights | None = None) -> "Weights":
        """The weights of a model folder, changed by `adapter`."""
        return cls({tensor.name: tensor for tensor in base.tensors}, adapter)

    @classmethod
    def of_gguf(cls, path: Path, base: BaseModel, dtype: torch.dtype) -> "Weights":
        """The weights of a GGUF file that was made from `base`. Raises InvalidBaseError if they do not fit."""
        return cls({tensor.name: tensor for tensor in list_gguf_weights(path, base.full_config, base.shapes, dtype)})

    def read(
        self, names: Sequence[str], parameters: Parameters, device: torch.device, dtype: torch.dtype
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Yield the named ones of a model's `parameters` on `device`, in order, while the next ones are read."""
        sources = [[self.tensors[self._stored_name(each)] for each in parameters.sources(name)] for name in names]
        with closing(read_tensors([tensor for each in sources for tensor in each], device)) as found:
            for name, tensors in zip(names, sources, strict=True):
                kind = parameters.dtype(name, dtype)
                values = [self._changed(*each).to(kind) for each in islice(found, len(tensors))]
                yield name, parameters.make(name, values)

    def _changed(self, tensor: StoredTensor, values: torch.Tensor) -> torch.Tensor:
        return values if self.adapter is None else self.adapter.merge(tensor.name, values)

    def _stored_name(self, name: str) -> str:
        """A head that is not stored is the embedding."""
        return EMBEDDING if name == HEAD and HEAD not in self.tensors else name
