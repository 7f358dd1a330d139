"""The merged model as a Hugging Face folder, sharded like the base, written tensor by tensor."""

import json
import time
from collections import defaultdict
from pathlib import Path

import torch

from finetune_trainer.export.errors import OverflowingWeightsError
from finetune_trainer.export.model_folder import INDEX_NAME, ModelFolder, write_side_files
from finetune_trainer.export.safetensors_files import SafetensorsWriter


class MergedFolder:
    """Weights go into one file per base file, under the same name; the rest of the folder is written at the end."""

    def __init__(self, path: Path, base: ModelFolder, tokenizer: Path, *, dtype: torch.dtype) -> None:
        self.path = path
        self._base, self._tokenizer, self._dtype = base, tokenizer, dtype
        self._files = {tensor.name: tensor.path.name for tensor in base.tensors}
        self._writers: dict[str, SafetensorsWriter] = {}
        self._seconds = dict.fromkeys(self._files.values(), 0.0)
        self.size = sum(torch.Size(tensor.shape).numel() * dtype.itemsize for tensor in base.tensors)

    def seconds(self) -> dict[str, float]:
        """Seconds spent on each weight file, by its name."""
        return dict(self._seconds)

    def begin(self) -> int:
        """Create the folder and the headers of its weight files; returns 0, the bytes of tensors written."""
        self.path.mkdir(parents=True)
        by_file: defaultdict[str, list[tuple[str, torch.dtype, tuple[int, ...]]]] = defaultdict(list)
        for tensor in self._base.tensors:
            by_file[tensor.path.name].append((tensor.name, self._dtype, tensor.shape))
        self._writers = {name: SafetensorsWriter(self.path / name, tensors) for name, tensors in by_file.items()}
        return 0

    def write(self, name: str, weights: torch.Tensor) -> int:
        """Round fp32 `weights` and append them to their file; returns the bytes written."""
        began = time.monotonic()
        rounded = weights.to(self._dtype)
        if self._dtype == torch.float16 and rounded.isinf().any():
            raise OverflowingWeightsError(f"{name} holds weights that float16 cannot; merge as BF16")
        file = self._files[name]
        written = self._writers[file].write(name, rounded)
        self._seconds[file] += time.monotonic() - began
        return written

    def end(self) -> None:
        """Close the weight files and write index, config, tokenizer and licence."""
        self._close()
        if self._base.is_sharded:
            index = {"metadata": {"total_size": self.size}, "weight_map": dict(sorted(self._files.items()))}
            (self.path / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        write_side_files(self._base, self._tokenizer, self.path, dtype=str(self._dtype).removeprefix("torch."))

    def _close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    abandon = _close
