"""Digests of files and folders.

One pass over a file gives the SHA-256 of the whole and the CRC64-NVME of each part. The parts' checksums prove what
is sent and read back; the common pass ties them to the SHA-256. hashlib and awscrt release the interpreter lock, so
that hashing (1.6 GB/s; SHA-256 is the slow one) runs beside the transfers.
"""

import hashlib
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from awscrt import checksums

from finetune_trainer.stopping import stop_point

READ_BYTES = 1 << 20  # 1 MiB
HASHING_THREADS = 4  # SHA-256 of one file uses one core


class DigestStoppedError(Exception):
    """The digest was stopped: it is not needed any more."""


@dataclass(frozen=True)
class PartDigest:
    """A byte range [start, end) of a file with its checksum."""

    start: int
    end: int
    crc64: str
    """CRC64-NVME as in S3 headers: base64 of the big-endian value."""


@dataclass(frozen=True)
class FileDigest:
    """Digests of a whole file and of its parts; an empty file has one empty part."""

    bytes: int
    sha256: str
    crc64: str
    parts: tuple[PartDigest, ...]


def crc64_header(value: int) -> str:
    """Returns a CRC64-NVME value as S3 headers carry it."""
    return b64encode(value.to_bytes(8, "big")).decode()


def digest_file(path: Path, part_bytes: int, stopped: Callable[[], bool] = lambda: False) -> FileDigest:
    """Hashes a file and its parts of `part_bytes` (the last one shorter) in one pass.

    `stopped` is asked after every MiB; DigestStoppedError is raised as soon as it returns True.
    """
    whole, whole_crc, start = hashlib.sha256(), 0, 0
    parts: list[PartDigest] = []

    with path.open("rb") as file:
        while True:
            # One part, read in slices of a MiB so that memory stays small.
            crc, end = 0, start
            while end - start < part_bytes and (data := file.read(min(READ_BYTES, part_bytes - (end - start)))):
                stop_point()
                if stopped():
                    raise DigestStoppedError(str(path))
                whole.update(data)
                crc = checksums.crc64nvme(data, crc)
                end += len(data)
            if end == start and parts:  # the file ended with the part before
                break

            # The CRC of the whole follows from the parts' CRCs; only SHA-256 needs every byte in order.
            whole_crc = checksums.combine_crc64nvme(whole_crc, crc, end - start)
            parts.append(PartDigest(start, end, crc64_header(crc)))
            is_last, start = end - start < part_bytes, end
            if is_last:
                break

    return FileDigest(start, whole.hexdigest(), crc64_header(whole_crc), tuple(parts))


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 (hex) of a file."""
    digest, buffer = hashlib.sha256(), bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            stop_point()
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def sha256_of_lines(digests: Mapping[str, str]) -> str:
    """Returns the SHA-256 of the lines that `sha256sum` prints for files ({relative path: SHA-256}), sorted by path."""
    lines = "".join(f"{digest}  {path}\n" for path, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def files_below(folder: Path) -> list[Path]:
    """Returns every file below a folder, sorted by relative path; links are followed."""
    return sorted(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.relative_to(folder).as_posix()
    )


def sha256_of_each(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """Returns {path relative to `root`: SHA-256} of files on disk; several are hashed at a time."""
    listed = list(files)
    with ThreadPoolExecutor(HASHING_THREADS, "hash") as pool:
        digests = list(pool.map(sha256_file, listed))
    return {path.relative_to(root).as_posix(): digest for path, digest in zip(listed, digests, strict=True)}
