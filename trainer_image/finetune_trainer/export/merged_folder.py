"""The merged model as a Hugging Face folder, sharded like the base, written tensor by tensor."""

import json
from collections import defaultdict
from pathlib import Path

import torch
from gguf import GGMLQuantizationType

from finetune_trainer.export.base_model.folder import BaseModel, write_side_files
from finetune_trainer.export.quantization.streamed_encoder import StreamedEncoder
from finetune_trainer.export.tensor_io.file_writer import FileWriters
from finetune_trainer.export.tensor_io.safetensors_files import SafetensorsWriter
from finetune_trainer.export.tensor_io.stopwatch import Stopwatch
from finetune_trainer.model.weight_files import INDEX_NAME

TYPES = {torch.bfloat16: GGMLQuantizationType.BF16, torch.float16: GGMLQuantizationType.F16}


class MergedFolder:
    """Weights go into one file for each of the base's, under the same name; the other files are written at the end."""

    def __init__(self, path: Path, base: BaseModel, *, dtype: torch.dtype) -> None:
        self.path = path
        self._base, self._dtype = base, dtype
        self._files = {tensor.name: tensor.path.name for tensor in base.tensors}  # tensor -> file
        self._writers: dict[str, SafetensorsWriter] = {}
        self._watches = {name: Stopwatch() for name in self._files.values()}

        shapes = [(tensor.shape, TYPES[dtype]) for tensor in base.tensors]
        self._encoder = StreamedEncoder(shapes, advice="merge as BF16")
        self.size = sum(torch.Size(tensor.shape).numel() * dtype.itemsize for tensor in base.tensors)

    def seconds(self) -> dict[str, float]:
        """Seconds spent on each weight file, by its name."""
        return {name: watch.seconds() for name, watch in self._watches.items()}

    def begin(self, writers: FileWriters) -> int:
        """Create the folder and the headers of its weight files; returns 0, the bytes of tensors written."""
        self.path.mkdir(parents=True)
        by_file: defaultdict[str, list[tuple[str, torch.dtype, tuple[int, ...]]]] = defaultdict(list)
        for tensor in self._base.tensors:
            by_file[tensor.path.name].append((tensor.name, self._dtype, tensor.shape))
        self._writers = {
            name: SafetensorsWriter(writers, self.path / name, tensors) for name, tensors in by_file.items()
        }
        return 0

    def write(self, name: str, weights: torch.Tensor) -> int:
        """Round `weights` of 16 or 32 bits and append them to their file; returns the bytes written."""
        file = self._files[name]
        target = self._writers[file].begin(name, self._dtype, tuple(weights.shape))
        return self._encoder.append(target, name, weights, TYPES[self._dtype], self._watches[file])

    def end(self) -> None:
        """Close the weight files and write index, config, tokenizer and licence."""
        for writer in self._writers.values():
            writer.close()
        if self._base.is_sharded:
            index = {"metadata": {"total_size": self.size}, "weight_map": dict(sorted(self._files.items()))}
            (self.path / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        write_side_files(self._base, self.path, dtype=str(self._dtype).removeprefix("torch."))

    def abandon(self) -> None:
        """Close the unfinished files, whose writers have ended."""
        for writer in self._writers.values():
            writer.abandon()
