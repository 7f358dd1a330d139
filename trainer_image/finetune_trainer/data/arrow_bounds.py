"""Computes how much a batch of an Arrow file unpacks to, before it is unpacked.

A compressed batch is unpacked as a whole when it is read, and a megabyte can unpack to gigabytes. Arrow writes the
unpacked size in front of each buffer. The batch's metadata, a flatbuffer, says where the buffers are
(https://arrow.apache.org/docs/format/Columnar.html#recordbatch-message). pyarrow shows nothing of it, so the few fields
needed are read here. pyarrow has checked the flatbuffer when it gives out a message.
"""

import struct
from typing import Any

from pyarrow import ipc  # type: ignore[import-untyped]

from finetune_trainer.data.data_files import UnreadableFileError

MAX_BATCH_BYTES = 256 * 2**20
START_OF_STREAM = 8  # bytes in front of the first message of a file; a stream has none
HEADER_TYPE, HEADER = 1, 2  # fields of a message, by Arrow's Message.fbs
DICTIONARY_BATCH, RECORD_BATCH = 2, 3  # types of a message
DATA = 1  # field of a dictionary batch
BUFFERS, COMPRESSION = 2, 3  # fields of a record batch


def check_batches(mapped: Any, *, is_file: bool) -> None:
    """Raises UnreadableFileError if a batch of this memory map unpacks to more than MAX_BATCH_BYTES."""
    mapped.seek(START_OF_STREAM if is_file else 0)
    for message in ipc.MessageReader.open_stream(mapped):
        size = unpacked_bytes(message.metadata.to_pybytes(), message.body)
        if size > MAX_BATCH_BYTES:
            raise UnreadableFileError(
                f"a batch unpacks to {size // 2**20} MiB, but at most {MAX_BATCH_BYTES // 2**20} MiB are unpacked at "
                "once: write smaller batches, leave them uncompressed, or write Parquet"
            )
    mapped.seek(0)


def unpacked_bytes(metadata: bytes, body: Any) -> int:
    """Bytes that the compressed buffers of a message unpack to; 0 for a message of another kind."""
    message = _Table(metadata, struct.unpack_from("<I", metadata)[0])
    kind, header = message.field(HEADER_TYPE), message.field(HEADER)
    if kind is None or header is None or metadata[kind] not in (DICTIONARY_BATCH, RECORD_BATCH):
        return 0

    # A dictionary batch has a record batch in it.
    batch = _Table(metadata, message.follow(header))
    if metadata[kind] == DICTIONARY_BATCH and (data := batch.field(DATA)) is not None:
        batch = _Table(metadata, batch.follow(data))

    buffers = batch.field(BUFFERS)
    if batch.field(COMPRESSION) is None or buffers is None or body is None:
        return 0

    # A vector: its count, then an offset and a length for each buffer.
    vector = batch.follow(buffers)
    (count,) = struct.unpack_from("<I", metadata, vector)
    places = struct.iter_unpack("<qq", metadata[vector + 4 : vector + 4 + 16 * count])
    return sum(_unpacked_buffer(memoryview(body), offset, length) for offset, length in places)


def _unpacked_buffer(body: memoryview, offset: int, length: int) -> int:
    """The size that a buffer says it unpacks to; 0 for one that is not compressed (it says -1)."""
    if length < 8 or not 0 <= offset <= len(body) - 8:
        return 0
    (size,) = struct.unpack_from("<q", body, offset)
    return max(0, int(size))


class _Table:
    """A flatbuffer's table."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at
        self._fields = at - struct.unpack_from("<i", data, at)[0]

    def field(self, number: int) -> int | None:
        """Position of a field; None if it is absent."""
        slot = 4 + 2 * number
        if slot >= struct.unpack_from("<H", self._data, self._fields)[0]:
            return None
        offset = struct.unpack_from("<H", self._data, self._fields + slot)[0]
        return self._at + int(offset) if offset else None

    def follow(self, position: int) -> int:
        """Position that the pointer at `position` points to."""
        return position + int(struct.unpack_from("<I", self._data, position)[0])
