"""GGUF files written side by side, tensor by tensor: one for each requested type, from one reading of the weights.

A GGUF file begins with the sizes of all its tensors, so everything is planned from the shapes before the first weight
is read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFWriter

from finetune_trainer.export.base_model.folder import BaseModel
from finetune_trainer.export.base_model.mxfp4_blocks import find_mxfp4, read_blocks
from finetune_trainer.export.errors import InvalidBaseError
from finetune_trainer.export.gguf.conversion import check_types, plan_conversion
from finetune_trainer.export.gguf.family_row import GgufFamily
from finetune_trainer.export.gguf.metadata import Origin, Size, read_metadata
from finetune_trainer.export.gguf.rope.factors import rope_factor_tensors
from finetune_trainer.export.gguf.state_layers.metadata import count_kv_heads
from finetune_trainer.export.gguf.tensor_names import Destination
from finetune_trainer.export.gguf.tensors import Part, TensorConverter
from finetune_trainer.export.quantization.file_types import FileType, find_file_type
from finetune_trainer.export.quantization.quantize import encoded_size
from finetune_trainer.export.quantization.streamed_encoder import StreamedEncoder
from finetune_trainer.export.quantization.tensor_types import TensorTypeInputs, choose_tensor_types
from finetune_trainer.export.tensor_io.file_writer import AppendedFile, FileWriters
from finetune_trainer.export.tensor_io.stopwatch import Stopwatch


@dataclass
class _PlannedTensor:
    """A tensor that is written as a whole, or place by place."""

    type: GGMLQuantizationType
    offset: int
    """From the beginning of the file's data."""
    places: int
    """Parts that make the tensor, of one size each."""
    missing: int
    """Parts that are still to be written."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Layout:
    """Shape of a GGUF tensor, and the number of places if it is a stack."""

    shape: tuple[int, ...]
    places: int = 1


class GgufFile:
    """One GGUF file: planned as a whole, then fed the tensors, in any order."""

    def __init__(self, path: Path, file_type: FileType, writer: GGUFWriter) -> None:
        self.path = path
        self.file_type = file_type
        self.size = 0  # bytes of all tensors
        self.watch = Stopwatch()  # time spent on encoding
        self._writer = writer
        self._file: AppendedFile | None = None
        self._encoder: StreamedEncoder | None = None
        self._plan: dict[str, _PlannedTensor] = {}
        self._data = 0  # position of the first tensor
        self._length = 0  # bytes of all tensors with what aligns them

    def plan(self, model: TensorTypeInputs, tensors: Mapping[str, Layout]) -> None:
        """Announce all tensors in the order in which they will lie in the file."""
        types = choose_tensor_types(self.file_type, model, [(name, layout.shape) for name, layout in tensors.items()])
        for name, layout in tensors.items():
            size = encoded_size(layout.shape, types[name])
            # The dtype is that of the values before encoding; llama.cpp reads raw_dtype.
            self._writer.add_tensor_info(name, layout.shape, np.dtype(np.float32), size, raw_dtype=types[name])
            self._plan[name] = _PlannedTensor(types[name], self._length, layout.places, layout.places, size)
            self._length += size + -size % GGUF_DEFAULT_ALIGNMENT
            self.size += size

        planned = [(layout.shape, types[name]) for name, layout in tensors.items()]
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
        self._data = self._file.end

    def keeps_mxfp4(self, name: str) -> bool:
        """True if tensor `name` is stored in MXFP4."""
        return self._plan[name].type is GGMLQuantizationType.MXFP4

    def write(self, place: Destination, weights: torch.Tensor, *, is_encoded: bool = False) -> int:
        """Encode a planned tensor of 16 or 32 bits, or one place of it; returns its bytes in the file.

        `is_encoded`: `weights` are the bytes of its blocks, which are written as they are.
        """
        planned = self._plan[place.name]
        assert planned.missing, f"{place.name} is complete"
        assert self._encoder is not None, "plan comes first"
        assert self._file is not None, "begin comes first"

        self._file.move_to(self._data + planned.offset + (place.slot or 0) * (planned.size // planned.places))
        planned.missing -= 1
        if is_encoded:
            return self._file.append(weights)
        return self._encoder.append(self._file, place.name, weights, planned.type, self.watch)

    def end(self) -> None:
        """Close the file; every planned tensor must have been written."""
        assert self._file is not None, "begin comes first"
        missing = [name for name, planned in self._plan.items() if planned.missing]
        if not missing and self._plan:
            last = list(self._plan.values())[-1]
            self._file.move_to(self._data + last.offset + last.size)
            self._file.pad(GGUF_DEFAULT_ALIGNMENT)
        self._file.close()
        if missing:
            raise AssertionError(f"tensors never written: {missing}")

    def abandon(self) -> None:
        """Close and delete the unfinished file, whose writers have ended."""
        self._writer.close()
        if self._file is not None:
            self._file.abandon()
        self.path.unlink(missing_ok=True)


def lay_out(parts: Iterable[Part]) -> dict[str, Layout]:
    """The GGUF tensors that `parts` make, in the order of their first parts.

    Raises InvalidBaseError if a stack has a gap, or parts of different shapes.
    """
    shapes: dict[str, list[tuple[int, ...]]] = {}
    slots: dict[str, list[int | None]] = {}
    for part in parts:
        shapes.setdefault(part.destination.name, []).append(part.shape)
        slots.setdefault(part.destination.name, []).append(part.destination.slot)

    layouts = {}
    for name, found in shapes.items():
        if slots[name] == [None]:
            layouts[name] = Layout(found[0])
            continue
        if None in slots[name] or sorted(slots[name], key=int) != list(range(len(found))) or len({*found}) > 1:  # type: ignore[arg-type]
            raise InvalidBaseError(
                f"the weights of {name} are {len(found)} tensors that make no stack: some are missing, or differ in "
                "shape; get the base model's files again"
            )
        layouts[name] = Layout((len(found), *found[0]), places=len(found))
    return layouts


class GgufFiles:
    """The GGUF files of one model. Weights are transformed once and encoded for each file."""

    def __init__(self, paths: dict[str, Path], base: BaseModel, origin: Origin) -> None:
        """Plan a file at `paths[type]` for each type; raises ExportError before anything is written."""
        config, generation = base.full_config, base.generation_config
        check_types(paths, config)
        conversion = plan_conversion(config, base.tokenizer, generation, base.shapes)

        # Tensors in the order in which they will lie in the file: RoPE's divisors, then the model's own.
        self._converter = TensorConverter(conversion.family, config)
        self._mxfp4 = find_mxfp4(base.tensors)
        self._factors = rope_factor_tensors(config)
        tensors = {factor_name: Layout(tuple(factors.shape)) for factor_name, factors in self._factors.items()}
        self._parts = {tensor: self._converter.parts(tensor, shape) for tensor, shape in base.shapes}
        own = lay_out(part for parts in self._parts.values() for part in parts)
        tensors |= own
        metadata = read_metadata(base.path, origin, generation, _measure(own))
        kv_heads = count_kv_heads(conversion.family, config)
        first = kv_heads if isinstance(kv_heads, int) else kv_heads[0]
        model = TensorTypeInputs.of(conversion.family.architecture, config, first)
        arrays = read_arrays(conversion.family, base)

        self.files: dict[str, GgufFile] = {}
        for kind, path in paths.items():
            writer = conversion.new_writer(metadata)
            for add, values in arrays.items():
                getattr(writer, f"add_{add}")(values)
            file = self.files[kind] = GgufFile(path, find_file_type(kind), writer)
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
        factors = [(Destination(name), values) for name, values in self._factors.items()]
        return sum(file.write(place, values) for file in self.files.values() for place, values in factors)

    def write(self, name: str, weights: torch.Tensor) -> int:
        """Write Hugging Face tensor `name`, of 16 or 32 bits, to every file; returns the bytes written.

        A base's own MXFP4 weights have 16 bits as long as no adapter changed them: they are stored as they were.
        """
        written, blocks = 0, None
        for part in self._parts[name]:
            values = part.take(weights).contiguous()  # once for all files
            for file in self.files.values():
                is_kept = name in self._mxfp4 and weights.dtype is torch.bfloat16
                if not is_kept or not file.keeps_mxfp4(part.destination.name):
                    written += file.write(part.destination, values)
                    continue
                blocks = read_blocks(self._mxfp4[name]) if blocks is None else blocks
                written += file.write(part.destination, part.take(blocks).contiguous(), is_encoded=True)
        return written

    def end(self) -> None:
        """Close all files, complete."""
        for file in self.files.values():
            file.end()

    def abandon(self) -> None:
        """Close and delete all files."""
        for file in self.files.values():
            file.abandon()


def read_arrays(family: GgufFamily, base: BaseModel) -> dict[str, list[float]]:
    """The values of scalars that every layer of `base` has, in the order of the layers, by the writer's method."""
    found: dict[str, list[float]] = {}
    for end, add in family.arrays.items():
        scalars = {_layer(tensor.name): tensor for tensor in base.tensors if tensor.name.endswith(end)}
        found[add] = [float(scalars[layer].read()) for layer in sorted(scalars)]
    return found


def _layer(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdecimal())


def _measure(tensors: Mapping[str, Layout]) -> Size:
    """Count the weights; experts are counted where a layer has them in one tensor of three dimensions."""
    shared, expert, counts = 0, 0, []
    for name, layout in tensors.items():
        weights, is_bias = torch.Size(layout.shape).numel(), name.endswith(".bias")
        if "_exps." not in name or len(layout.shape) < 3 - is_bias:
            shared += weights
            continue
        counts.append(layout.shape[0])
        expert += weights // layout.shape[0]
    return Size(shared, expert, sum(counts) // len(counts) if counts else 0)
