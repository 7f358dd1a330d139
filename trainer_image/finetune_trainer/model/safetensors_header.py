"""The header of a safetensors file: name, type, shape and bytes of each tensor, without the weights.

The bytes come from a function, as the file may lie on a disk, on the Hub or in a bucket. What is checked is what the
safetensors package checks when it opens a file: each tensor has the bytes that its shape needs, the tensors lie one
behind the other, and the file ends with the last one. So a file that broke off is known by its size.

Source: https://huggingface.co/docs/safetensors
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError

ReadRange = Callable[[int, int], bytes]
"""Reads bytes [start, end) of a file."""

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
FIRST_BYTES = 100_000
"""Bytes of the first read: enough for the headers of almost all files, so that a second read is rare."""
LENGTH_BYTES = 8

TYPES = {
    4: ("F4",),
    6: ("F6_E2M3", "F6_E3M2"),
    8: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    16: ("U16", "I16", "F16", "BF16"),
    32: ("U32", "I32", "F32"),
    64: ("U64", "I64", "F64", "C64"),
}
BITS = {name: bits for bits, names in TYPES.items() for name in names}
"""Bits of one number of each type."""
NF4_STATE = ".quant_state.bitsandbytes__nf4"
"""What bitsandbytes adds to the name of an NF4 weight for the tensor with its sizes."""


@dataclass(frozen=True)
class TensorHeader:
    """A tensor in a file, as the header describes it."""

    name: str
    dtype: str
    """The format's name of the type, such as BF16."""
    shape: tuple[int, ...]
    file: str
    start: int
    """First byte in the file."""
    end: int
    """Byte behind the last one."""

    @property
    def parameters(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def read_header(file: str, size: int, read: ReadRange) -> list[TensorHeader]:
    """The tensors of a file of `size` bytes, in the order in which they are stored.

    Raises TrainerError (InvalidConfiguration) for a file that is damaged or broke off.
    """
    begin = read(0, min(size, FIRST_BYTES)) if size else b""  # an empty range cannot be asked for
    length = int.from_bytes(begin[:LENGTH_BYTES], "little")
    if size < LENGTH_BYTES or not 2 <= length <= MAX_HEADER_BYTES:
        raise _error(f"{file} is not a safetensors file: its first 8 bytes are no header length")

    data = LENGTH_BYTES + length
    if data > size:
        raise _error(f"{file} broke off: it has {size} bytes, but its header alone needs {data}; get the file again")
    text = begin[LENGTH_BYTES:data] + (read(len(begin), data) if data > len(begin) else b"")

    tensors = [_locate(file, name, entry, data) for name, entry in _parse(file, text).items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_layout(file, tensors, data, size)
    return tensors


def _parse(file: str, text: bytes) -> dict[str, object]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _error(f"{file} has a damaged safetensors header: {error}") from error

    if not isinstance(header, dict):
        raise _error(f"{file} has a damaged safetensors header: it is no JSON object")
    header.pop("__metadata__", None)
    return header


def _locate(file: str, name: str, entry: object, data: int) -> TensorHeader:
    """The tensor of an entry of the header; the data begin at byte `data` of the file."""
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    bits = BITS.get(str(dtype))
    if bits is None:
        raise _error(f"{name} in {file} is stored as {dtype}, which is no type of a safetensors file")

    match entry:
        case {"shape": [*shape], "data_offsets": [start, stop]} if all(
            type(number) is int and number >= 0 for number in (*shape, start, stop)
        ):
            # Offsets in the header count from the end of the header.
            if 8 * (stop - start) == math.prod(shape) * bits:
                return TensorHeader(name, str(dtype), tuple(shape), file, data + start, data + stop)
    raise _error(f"{file} is damaged: {name} does not have the bytes that its shape needs; get the file again")


def _check_layout(file: str, tensors: list[TensorHeader], data: int, size: int) -> None:
    """Raises TrainerError unless the tensors fill the file from byte `data` to its end."""
    at = data
    for before, tensor in zip([None, *tensors], tensors, strict=False):
        if tensor.start < at and before is not None:
            raise _error(f"{file} is damaged: {before.name} and {tensor.name} share bytes; get the file again")
        if tensor.start > at:
            raise _error(f"{file} is damaged: nothing names the bytes in front of {tensor.name}; get the file again")
        at = tensor.end

    if at > size:
        cut = next(tensor.name for tensor in tensors if tensor.end > size)
        raise _error(
            f"{file} broke off: it has {size} bytes, but its header names {at}, so {cut} is not whole; "
            "get the file again"
        )
    if at < size:
        raise _error(f"{file} is damaged: {size - at} bytes follow behind its last tensor; get the file again")


def _error(message: str) -> TrainerError:
    return TrainerError(FailureReason.INVALID_CONFIGURATION, message)
