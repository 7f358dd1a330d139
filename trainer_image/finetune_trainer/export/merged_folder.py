"""The merged model as a Hugging Face folder, sharded like the base, written tensor by tensor."""

import json
import math
from collections import defaultdict
from pathlib import Path

import torch
from gguf import GGMLQuantizationType

from finetune_trainer.export.base_model.folder import BaseModel, write_side_files
from finetune_trainer.export.base_model.language_model import TurnedTensor
from finetune_trainer.export.quantization.streamed_encoder import StreamedEncoder
from finetune_trainer.export.tensor_io.file_writer import FileWriters
from finetune_trainer.export.tensor_io.safetensors_files import SafetensorsWriter, StoredTensor
from finetune_trainer.export.tensor_io.stopwatch import Stopwatch
from finetune_trainer.model.weight_files import INDEX_NAME
from finetune_trainer.stopping import stop_point

TYPES = {torch.bfloat16: GGMLQuantizationType.BF16, torch.float16: GGMLQuantizationType.F16}


class MergedFolder:
    """Weights go into one file for each of the base's, under the same name; the other files are written at the end.

    Of a checkpoint that also reads images or sound, everything but the language model is copied first.
    """

    def __init__(self, path: Path, base: BaseModel, *, dtype: torch.dtype) -> None:
        self.path = path
        self._base, self._dtype = base, dtype
        self._files = {tensor.name: tensor.path.name for tensor in base.tensors}  # tensor -> file
        self._turned = {tensor.name: tensor.stored for tensor in base.tensors if isinstance(tensor, TurnedTensor)}
        self._copied = base.whole.copied if base.whole is not None else ()
        self._writers: dict[str, SafetensorsWriter] = {}
        self._watches = {
            name: Stopwatch() for name in (*self._files.values(), *(each.path.name for each in self._copied))
        }

        shapes = [(tensor.shape, TYPES[dtype]) for tensor in base.tensors]
        self._encoder = StreamedEncoder(shapes, advice="merge as BF16")
        self.size = sum(math.prod(tensor.shape) * dtype.itemsize for tensor in base.tensors)
        self.size += sum(math.prod(tensor.shape) * self._copied_dtype(tensor).itemsize for tensor in self._copied)

    def seconds(self) -> dict[str, float]:
        """Seconds spent on each weight file, by its name."""
        return {name: watch.seconds() for name, watch in self._watches.items()}

    def begin(self, writers: FileWriters) -> int:
        """Create the folder, the headers of its weight files, and the tensors that are copied; returns their bytes."""
        self.path.mkdir(parents=True)
        by_file: defaultdict[str, list[tuple[str, torch.dtype, tuple[int, ...]]]] = defaultdict(list)
        for tensor in self._copied:
            by_file[tensor.path.name].append((tensor.name, self._copied_dtype(tensor), tensor.shape))
        for tensor in self._base.tensors:
            stored = self._turned.get(tensor.name, tensor)
            by_file[tensor.path.name].append((self._stored_name(tensor.name), self._dtype, stored.shape))

        self._writers = {
            name: SafetensorsWriter(writers, self.path / name, tensors) for name, tensors in by_file.items()
        }
        return sum(self._copy(tensor) for tensor in self._copied)

    def _copy(self, tensor: StoredTensor) -> int:
        """Write a tensor that is not the language model's, byte for byte unless its format has fewer than 16 bits."""
        stop_point()
        values = tensor.read()
        if type(tensor) is not StoredTensor:
            values = values.to(self._dtype)
        return self._writers[tensor.path.name].write(tensor.name, values)

    def _copied_dtype(self, tensor: StoredTensor) -> torch.dtype:
        return tensor.dtype if type(tensor) is StoredTensor else self._dtype

    def _stored_name(self, name: str) -> str:
        """The name in the base's files; a packed weight gets its own."""
        whole = self._base.whole
        if whole is None:
            return name
        return whole.stored_name(name)

    def write(self, name: str, weights: torch.Tensor) -> int:
        """Round `weights` of 16 or 32 bits and append them to their file; returns the bytes written."""
        file = self._files[name]
        if name in self._turned:
            weights = weights.transpose(1, 2)
        target = self._writers[file].begin(self._stored_name(name), self._dtype, tuple(weights.shape))
        return self._encoder.append(target, name, weights, TYPES[self._dtype], self._watches[file])

    def end(self) -> None:
        """Close the weight files and write index, config, tokenizer and licence."""
        for writer in self._writers.values():
            writer.close()
        if self._base.is_sharded:
            placed = {self._stored_name(name): file for name, file in self._files.items()}
            placed |= {tensor.name: tensor.path.name for tensor in self._copied}
            index = {"metadata": {"total_size": self.size}, "weight_map": dict(sorted(placed.items()))}
            (self.path / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        write_side_files(self._base, self.path, dtype=str(self._dtype).removeprefix("torch."))

    def abandon(self) -> None:
        """Close the unfinished files, whose writers have ended."""
        for writer in self._writers.values():
            writer.abandon()
