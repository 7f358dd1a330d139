"""A safetensors file that tells damage: its last tensor holds a checksum of the header and of every other tensor.

    header | tensor 0 | tensor 1 | ... | checksums, U64 [1 + tensors]: CRC64-NVME of the header, tensor 0, tensor 1, ...

Files are written under a name of their own and renamed when they are complete, so that writers do not meet and readers
see whole files. A tensor is compared when it is read; CRC64 costs a tenth of reading, SHA-256 would cost more than it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import uuid4

import torch
from awscrt import checksums

from finetune_trainer.errors import TrainerError
from finetune_trainer.export.tensor_io.safetensors_files import NAMES, STORED_TYPES, StoredTensor, locate
from finetune_trainer.export.tensor_io.staged_reader import StagedReader
from finetune_trainer.model.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES, read_header
from finetune_trainer.model.weight_files import read_range
from finetune_trainer.stopping import stop_point

CHECKSUMS = "checksums"
"""Name of the last tensor."""
CRC_BYTES = 8
CPU = torch.device("cpu")
UNFINISHED = ".unfinished"
"""End of the names of files that are being written."""


class DamagedFileError(Exception):
    """The file is not what was written."""


@dataclass(frozen=True)
class CheckedTensor:
    """A tensor that is read when its values are asked for, as a slice of the safetensors package is."""

    stored: StoredTensor
    header_type: str
    """The format's name of the type, such as BF16."""
    crc: int
    reader: StagedReader

    def get_dtype(self) -> str:
        """Returns the format's name of the type."""
        return self.header_type

    def __getitem__(self, _: object) -> torch.Tensor:
        """Reads the values to the reader's device. Raises DamagedFileError if they are not what was written."""
        stop_point()
        crc = 0

        def look(piece: memoryview) -> None:
            nonlocal crc
            crc = checksums.crc64nvme(piece, crc)

        values = self.reader.read(self.stored, look)
        if crc != self.crc:
            raise DamagedFileError(f"{self.stored.name} is not what was written")
        return values


def write_checked(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, str]) -> int:
    """Writes tensors, on any device, and words `about` them to `path`; returns the bytes. A file that is there is
    replaced. Raises OSError, and leaves nothing then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid4().hex}{UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            header = _header(tensors, about)
            sums = [checksums.crc64nvme(header)]
            file.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)

            for value in tensors.values():
                stop_point()
                values = value.detach().to("cpu").contiguous()
                sums.append(_crc(values))
                file.write(_bytes_of(values))
            file.write(b"".join(crc.to_bytes(CRC_BYTES, "little") for crc in sums))
        size = unfinished.stat().st_size
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return size


def open_checked(path: Path, about: Mapping[str, str], device: torch.device = CPU) -> dict[str, CheckedTensor]:
    """Lists the tensors of a file by name, to be read to `device`. Raises OSError, or DamagedFileError if it is damaged
    or about something else."""
    size = path.stat().st_size
    try:
        listed = read_header(str(path), size, partial(read_range, path))
    except TrainerError as error:
        raise DamagedFileError(error.message) from error

    length = int.from_bytes(read_range(path, 0, LENGTH_BYTES), "little")
    header = read_range(path, LENGTH_BYTES, LENGTH_BYTES + min(length, MAX_HEADER_BYTES))
    last = listed[-1] if listed else None
    if last is None or last.name != CHECKSUMS or last.shape != (len(listed),):
        raise DamagedFileError("it has no checksums")

    data = read_range(path, last.start, last.end)
    sums = [int.from_bytes(data[at : at + CRC_BYTES], "little") for at in range(0, len(data), CRC_BYTES)]
    if checksums.crc64nvme(header) != sums[0]:
        raise DamagedFileError("its header is not what was written")
    if json.loads(header).get("__metadata__") != dict(about):
        raise DamagedFileError("it is about something else")

    reader = StagedReader(device)
    return {
        each.name: CheckedTensor(locate(each, path, types=STORED_TYPES), each.dtype, crc, reader)
        for each, crc in zip(listed[:-1], sums[1:], strict=True)
    }


def _header(tensors: Mapping[str, torch.Tensor], about: Mapping[str, str]) -> bytes:
    """The JSON text of the header, filled up as the format aligns data."""
    entries: dict[str, object] = {"__metadata__": dict(about)}
    at = 0
    for name, value in tensors.items():
        size = math.prod(value.shape) * value.dtype.itemsize
        entries[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [at, at + size]}
        at += size
    count = len(tensors) + 1
    entries[CHECKSUMS] = {"dtype": "U64", "shape": [count], "data_offsets": [at, at + count * CRC_BYTES]}

    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % LENGTH_BYTES)


def _bytes_of(values: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy."""
    flat = values.flatten().view(torch.uint8) if values.numel() else values.new_empty(0, dtype=torch.uint8)
    return memoryview(flat.numpy().data).cast("B")


def _crc(values: torch.Tensor) -> int:
    return int(checksums.crc64nvme(_bytes_of(values)))
