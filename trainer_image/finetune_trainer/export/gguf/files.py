"""GGUF files written side by side, tensor by tensor: one file for each requested type, from one reading of the weights.

A GGUF file begins with the sizes of all its tensors, so everything is planned from the shapes before the first weight
is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUF_DEFAULT_ALIGNMENT, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, Metadata

from finetune_trainer.export.gguf.config_checks import check_sizes
from finetune_trainer.export.gguf.families import GgufFamily, find_family
from finetune_trainer.export.gguf.hyperparameters import add_hyperparameters, load_full_config, load_generation_config
from finetune_trainer.export.gguf.metadata import Origin, read_metadata
from finetune_trainer.export.gguf.rope import rope_factor_tensors
from finetune_trainer.export.gguf.tensors import TensorConverter
from finetune_trainer.export.gguf.tokenizer import add_tokenizer
from finetune_trainer.export.quantization.file_types import FileType, find_file_type
from finetune_trainer.export.quantization.quantize import encoded_size
from finetune_trainer.export.quantization.streamed_encoder import StreamedEncoder
from finetune_trainer.export.quantization.tensor_types import TensorTypeInputs, choose_tensor_types
from finetune_trainer.export.tensor_io.file_writer import AppendedFile, FileWriters
from finetune_trainer.export.tensor_io.stopwatch import Stopwatch


@dataclass(frozen=True)
class _PlannedTensor:
    name: str
    type: GGMLQuantizationType


class GgufFile:
    """One GGUF file: opened with its whole plan, then fed the tensors in the planned order."""

    def __init__(self, path: Path, file_type: FileType, writer: GGUFWriter) -> None:
        self.path = path
        self.file_type = file_type
        self.size = 0  # of the tensors, in bytes
        self.watch = Stopwatch()  # of encoding them
        self._writer = writer
        self._file: AppendedFile | None = None
        self._encoder: StreamedEncoder | None = None
        self._plan: list[_PlannedTensor] = []

    def plan(self, model: TensorTypeInputs, tensors: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """Announce all tensors (GGUF names and shapes) in the order in which they will come."""
        types = choose_tensor_types(self.file_type, model, tensors)
        for name, shape in tensors:
            size = encoded_size(shape, types[name])
            self._writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=types[name])
            self._plan.append(_PlannedTensor(name, types[name]))
            self.size += size
        planned = [(shape, types[name]) for name, shape in tensors]
        self._encoder = StreamedEncoder(planned, advice="choose BF16 or a quantised type")

    def begin(self, writers: FileWriters) -> None:
        """Write everything before the weights."""
        self._writer.add_file_type(self.file_type.number)
        self._writer.write_header_to_file(self.path)
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        self._writer.close()
        self._file = AppendedFile(writers, self.path)
        self._file.pad(GGUF_DEFAULT_ALIGNMENT)
        self._plan.reverse()

    def write(self, name: str, weights: torch.Tensor) -> int:
        """Encode and append the next planned tensor, of 16 or 32 bits; returns its bytes in the file."""
        planned = self._plan.pop()
        if planned.name != name:
            raise AssertionError(f"tensor {name} came where {planned.name} was planned")
        assert self._encoder is not None, "plan comes first"
        assert self._file is not None, "begin comes first"
        written = self._encoder.append(self._file, name, weights, planned.type, self.watch)
        self._file.pad(GGUF_DEFAULT_ALIGNMENT)
        return written

    def end(self) -> None:
        """Close the file; every planned tensor must have been written."""
        assert self._file is not None, "begin comes first"
        self._file.close()
        if self._plan:
            raise AssertionError(f"tensors never written: {[planned.name for planned in self._plan]}")

    def abandon(self) -> None:
        """Close and delete the unfinished file, whose writers have ended."""
        self._writer.close()
        if self._file is not None:
            self._file.abandon()
        self.path.unlink(missing_ok=True)


class GgufFiles:
    """The GGUF files of one model. Weights are transformed once and encoded for each file."""

    def __init__(
        self,
        paths: dict[str, Path],
        *,
        origin: Origin,
        tokenizer: Path,
        shapes: Sequence[tuple[str, tuple[int, ...]]],
        name: str,
    ) -> None:
        """Plan and begin a file at `paths[type]` for each type.

        `origin.base` holds config.json, `tokenizer` the tokenizer files; `shapes` are the Hugging Face tensors in the
        order in which they will be written; `name` is general.name. Raises ExportError before anything is written.
        """
        config, generation = load_full_config(origin.base), load_generation_config(origin.base)
        check_sizes(config, shapes)
        family = find_family(config)
        self._converter = TensorConverter(family, config)
        self._factors = rope_factor_tensors(config)
        self.files: dict[str, GgufFile] = {}
        parameters = sum(torch.Size(shape).numel() for _, shape in shapes)
        facts = read_metadata(origin, generation, name=name, parameters=parameters)
        prepared = [
            (kind, path, find_file_type(kind), _prepare_writer(family, config, generation, tokenizer, facts))
            for kind, path in paths.items()
        ]
        renamed = [(self._converter.rename(tensor), shape) for tensor, shape in shapes]
        tensors = [(factor_name, tuple(factors.shape)) for factor_name, factors in self._factors.items()]
        tensors += [(tensor, shape) for tensor, shape in renamed if tensor is not None]
        model_shape = TensorTypeInputs.of(family.architecture, config)
        for kind, path, file_type, writer in prepared:
            file = self.files[kind] = GgufFile(path, file_type, writer)
            file.plan(model_shape, tensors)

    @property
    def size(self) -> int:
        """Bytes of all tensors of all files."""
        return sum(file.size for file in self.files.values())

    def seconds(self) -> dict[str, float]:
        """Seconds spent on each file, by its name."""
        return {file.path.name: file.watch.seconds() for file in self.files.values()}

    def begin(self, writers: FileWriters) -> int:
        """Create the files and write what comes before the model's own weights; returns the bytes of tensors
        written."""
        for file in self.files.values():
            file.begin(writers)
        return sum(file.write(name, factors) for file in self.files.values() for name, factors in self._factors.items())

    def write(self, name: str, weights: torch.Tensor) -> int:
        """Write Hugging Face tensor `name`, of 16 or 32 bits, to every file; returns the bytes written."""
        renamed = self._converter.rename(name)
        if renamed is None:
            return 0
        transformed = self._converter.transform(name, weights)
        return sum(file.write(renamed, transformed) for file in self.files.values())

    def end(self) -> None:
        """Close all files, complete."""
        for file in self.files.values():
            file.end()

    def abandon(self) -> None:
        """Close and delete all files."""
        for file in self.files.values():
            file.abandon()


def _prepare_writer(
    family: GgufFamily, config: dict[str, Any], generation: dict[str, Any], tokenizer: Path, facts: Metadata
) -> GGUFWriter:
    writer = GGUFWriter(None, MODEL_ARCH_NAMES[family.architecture])
    facts.set_gguf_meta_model(writer)
    add_hyperparameters(writer, family, config)
    add_tokenizer(writer, tokenizer, config, generation)
    return writer
