"""GGUF files written side by side, tensor by tensor: one for each requested type, from one reading of the weights.

A GGUF file begins with the sizes of all its tensors, so everything is planned from the shapes before the first weight
is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFWriter

from finetune_trainer.export.base_model.folder import BaseModel
from finetune_trainer.export.gguf.conversion import plan_conversion
from finetune_trainer.export.gguf.metadata import Origin, read_metadata
from finetune_trainer.export.gguf.rope import rope_factor_tensors
from finetune_trainer.export.gguf.tensors import TensorConverter
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
    """One GGUF file: planned as a whole, then fed the tensors in the planned order."""

    def __init__(self, path: Path, file_type: FileType, writer: GGUFWriter) -> None:
        self.path = path
        self.file_type = file_type
        self.size = 0  # bytes of all tensors
        self.watch = Stopwatch()  # time spent on encoding
        self._writer = writer
        self._file: AppendedFile | None = None
        self._encoder: StreamedEncoder | None = None
        self._plan: list[_PlannedTensor] = []

    def plan(self, model: TensorTypeInputs, tensors: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """Announce all tensors (GGUF names and shapes) in the order in which they will be written."""
        types = choose_tensor_types(self.file_type, model, tensors)
        for name, shape in tensors:
            size = encoded_size(shape, types[name])
            # The dtype is that of the values before encoding; llama.cpp reads raw_dtype.
            self._writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=types[name])
            self._plan.append(_PlannedTensor(name, types[name]))
            self.size += size

        planned = [(shape, types[name]) for name, shape in tensors]
        self._encoder = StreamedEncoder(planned, advice="choose BF16 or a quantised type")

    def begin(self, writers: FileWriters) -> None:
        """Write everything that comes before the tensors."""
        self._writer.add_file_type(self.file_type.number)
        self._writer.write_header_to_file(self.path)
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        self._writer.close()

        self._file = AppendedFile(writers, self.path)
        self._file.pad(GGUF_DEFAULT_ALIGNMENT)  # the data section begins at a multiple of it
        self._plan.reverse()  # so that pop() gives the next tensor

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

    def __init__(self, paths: dict[str, Path], base: BaseModel, origin: Origin) -> None:
        """Plan a file at `paths[type]` for each type; raises ExportError before anything is written."""
        config, generation = base.full_config, base.generation_config
        conversion = plan_conversion(config, base.tokenizer, generation, base.shapes)

        # Tensors in the order in which they will be written: RoPE's divisors, then the model's own.
        self._converter = TensorConverter(conversion.family, config)
        self._factors = rope_factor_tensors(config)
        tensors = [(factor_name, tuple(factors.shape)) for factor_name, factors in self._factors.items()]
        renamed = [(self._converter.rename(tensor), shape) for tensor, shape in base.shapes]
        tensors += [(tensor, shape) for tensor, shape in renamed if tensor is not None]

        parameters = sum(torch.Size(shape).numel() for _, shape in base.shapes)
        metadata = read_metadata(base.path, origin, generation, parameters=parameters)
        model = TensorTypeInputs.of(conversion.family.architecture, config)

        self.files: dict[str, GgufFile] = {}
        for kind, path in paths.items():
            file = self.files[kind] = GgufFile(path, find_file_type(kind), conversion.new_writer(metadata))
            file.plan(model, tensors)

    @property
    def size(self) -> int:
        """Bytes of all tensors of all files."""
        return sum(file.size for file in self.files.values())

    def seconds(self) -> dict[str, float]:
        """Seconds spent on each file, by its name."""
        return {file.path.name: file.watch.seconds() for file in self.files.values()}

    def begin(self, writers: FileWriters) -> int:
        """Create the files and write everything before the model's own weights; returns the bytes of tensors."""
        for file in self.files.values():
            file.begin(writers)
        return sum(file.write(name, factors) for file in self.files.values() for name, factors in self._factors.items())

    def write(self, name: str, weights: torch.Tensor) -> int:
        """Write Hugging Face tensor `name`, of 16 or 32 bits, to every file; returns the bytes written."""
        renamed = self._converter.rename(name)
        if renamed is None:
            return 0
        transformed = self._converter.transform(name, weights)  # once for all files
        return sum(file.write(renamed, transformed) for file in self.files.values())

    def end(self) -> None:
        """Close all files, complete."""
        for file in self.files.values():
            file.end()

    def abandon(self) -> None:
        """Close and delete all files."""
        for file in self.files.values():
            file.abandon()
