"""Reading and writing safetensors one tensor at a time.

The safetensors package maps whole files into memory (so resident memory grows with the file) and writes only complete
dictionaries. The format itself is a length, a JSON header and the tensors' bytes, so plain reads and writes do here.

Source: https://huggingface.co/docs/safetensors
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from finetune_trainer.errors import TrainerError
from finetune_trainer.export.errors import ExportError, InvalidBaseError
from finetune_trainer.export.tensor_io.file_writer import AppendedFile, FileWriters
from finetune_trainer.model.safetensors_header import TensorHeader, read_header
from finetune_trainer.model.weight_files import read_range

DTYPES: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
RAW = {"U8": torch.uint8}  # only parts of packed weights may be bytes
STORED_TYPES: dict[str, torch.dtype] = DTYPES | RAW | {
    "F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""Types that can be read, so that they can be decoded or copied; only those of DTYPES can be exported as they are."""
NAMES = {dtype: name for name, dtype in STORED_TYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """The location of a tensor in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    """First byte."""
    size: int
    """Number of bytes."""

    def read(self) -> torch.Tensor:
        """Read the values into fresh memory on the CPU."""
        return self.to_values(self.read_bytes())

    def read_bytes(self) -> torch.Tensor:
        """Read the file's bytes into fresh memory on the CPU, uint8 [size]."""
        buffer = torch.empty(self.size, dtype=torch.uint8)

        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            view, done = memoryview(buffer.numpy().data), 0
            while done < self.size:  # one read gives at most 2 GiB
                count = file.readinto(view[done:])
                if not count:
                    raise InvalidBaseError(f"{self.path} ended while {self.name} was read: get the file again")
                done += count

        return buffer

    def to_values(self, data: torch.Tensor) -> torch.Tensor:
        """View the file's bytes, uint8 [size] on any device, as the values."""
        return data.view(self.dtype).reshape(self.shape)


def list_tensors(path: Path, *, error: type[ExportError] = InvalidBaseError) -> list[StoredTensor]:
    """List the tensors of a safetensors file in the order in which they are stored, bytes (U8) among them.

    Raises `error` if the file is damaged or holds other types.
    """
    try:
        headers = read_header(str(path), path.stat().st_size, partial(read_range, path))
    except TrainerError as damaged:
        raise error(damaged.message) from damaged
    return [locate(header, path, error=error) for header in headers]


def locate(
    header: TensorHeader,
    path: Path,
    *,
    error: type[ExportError] = InvalidBaseError,
    types: Mapping[str, torch.dtype] = DTYPES | RAW,
) -> StoredTensor:
    """The tensor that a header describes in the file at `path`. Raises `error` for a type that is not in `types`."""
    dtype = types.get(header.dtype)
    if dtype is None:
        raise error(
            f"{header.name} in {path} is stored as {header.dtype}; only F32, F16 and BF16 weights can be exported: "
            "use the original 16-bit model, not a quantised one"
        )
    return StoredTensor(header.name, dtype, header.shape, path, header.start, header.end - header.start)


class SafetensorsWriter:
    """A safetensors file whose tensors are written one by one, in the order announced."""

    def __init__(
        self, writers: FileWriters, path: Path, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]
    ) -> None:
        """Write the header. `tensors` are name, dtype and shape of each, in the order in which they will come."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, dtype, shape in tensors:
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        self.size = offset  # bytes of all tensors

        self._expected: Iterator[tuple[str, torch.dtype, tuple[int, ...]]] = iter(tensors)
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded)
        self._file = AppendedFile(writers, path)

    def write(self, name: str, values: torch.Tensor) -> int:
        """Append the next announced tensor, whose values the caller must not change afterwards; returns its bytes."""
        return self.begin(name, values.dtype, tuple(values.shape)).append(values)

    def begin(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> AppendedFile:
        """Return the file, to which the caller appends the next announced tensor's bytes."""
        expected = next(self._expected)
        if expected != (name, dtype, shape):
            raise AssertionError(f"tensor {name} came where {expected} was announced")
        return self._file

    def close(self) -> None:
        """Wait until everything is written, and close."""
        self._file.close()

    def abandon(self) -> None:
        """Close an unfinished file whose writers have ended."""
        self._file.abandon()
