"""Data files as byte streams; gzip and zstd are unpacked while they are read, within limits.

pyarrow unpacks both, with a window of at most 128 MiB for zstd. Real text shrinks about 30 times. A file that unpacks
to more than `MAX_RATIO` times its size is refused once `RATIO_FREE_BYTES` were read, before a bomb can keep the pod
busy for a day.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as arrow  # type: ignore[import-untyped]

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
MAX_RATIO = 200
RATIO_FREE_BYTES = 256 * 2**20
BUFFER_BYTES = 2**20
# First bytes of files that are not what their name says, with what the file is and what to do.
OTHER_KINDS = (
    (b"PK\x03\x04", "a ZIP archive: unpack it and use the data files in it"),
    (b"\x1f\x8b", "compressed with gzip: compress it once only, and name it .gz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: compress it once only, and name it .zst"),
    (b"BZh", "compressed with bzip2: use gzip or zstd"),
    (b"\xfd7zXZ\x00", "compressed with xz: use gzip or zstd"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it and use the data files in it"),
    (b"Rar!", "a RAR archive: unpack it and use the data files in it"),
    (b"PAR1", "a Parquet file: name it .parquet"),
    (b"ARROW1", "an Arrow file: name it .arrow"),
    (b"\xff\xfe", "UTF-16 text: save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text: save it as UTF-8"),
)
TAR_MARK, TAR_MARK_AT = b"ustar", 257


class UnreadableFileError(ValueError):
    """A file that cannot be read to its end; the message says why."""


def kind_of(name: str) -> str:
    """The suffix that says how rows are written: .jsonl for chat.jsonl.gz."""
    path = Path(name)
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSIONS else path.suffix.lower()


@contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedReader]:
    """The unpacked bytes, without a byte order mark. Opening and reading raise UnreadableFileError."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    with path.open("rb") as plain:
        raw: Any = plain
        if compression is not None:
            raw = _Unpacked(arrow.CompressedInputStream(plain, compression), path.stat().st_size)
        stream = io.BufferedReader(raw, BUFFER_BYTES) if compression else plain

        _check_kind(stream.peek(TAR_MARK_AT + len(TAR_MARK)))
        if stream.peek(3)[:3] == b"\xef\xbb\xbf":
            stream.read(3)
        yield stream


def _check_kind(start: bytes) -> None:
    """Raises UnreadableFileError if a file's first bytes are those of another kind of file."""
    if start[TAR_MARK_AT:].startswith(TAR_MARK):
        raise UnreadableFileError("is a tar archive: unpack it and use the data files in it")
    for mark, meaning in OTHER_KINDS:
        if start.startswith(mark):
            raise UnreadableFileError(f"is {meaning}")


class _Unpacked(io.RawIOBase):
    """pyarrow's stream with a limit on the bytes that come out of it."""

    def __init__(self, stream: Any, packed_bytes: int) -> None:
        self._stream = stream
        self._allowed = max(RATIO_FREE_BYTES, MAX_RATIO * packed_bytes)
        self._unpacked = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer; returns the number of bytes read."""
        try:
            data = self._stream.read(len(buffer))
        except (OSError, arrow.ArrowException, EOFError) as error:
            raise UnreadableFileError(f"cannot be unpacked: {str(error)[:200]}") from None

        self._unpacked += len(data)
        if self._unpacked > self._allowed:
            raise UnreadableFileError(
                f"unpacks to more than {self._allowed // 2**20} MiB, over {MAX_RATIO} times its size, like a "
                "decompression bomb: leave it uncompressed if it is real data"
            )

        buffer[: len(data)] = data
        return len(data)
