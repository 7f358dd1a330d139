"""Digests are those that sha256sum and S3 give."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest
from awscrt import checksums

from finetune_trainer.storage.digests import (
    DigestStoppedError,
    crc64_header,
    digest_file,
    files_below,
    sha256_of_each,
    sha256_of_lines,
)
from finetune_trainer.storage.s3_upload import MAX_PARTS, MIN_PART_BYTES, PartPlan


@pytest.mark.parametrize(("size", "parts"), [(0, 1), (1, 1), (99, 1), (100, 1), (101, 2), (250, 3), (300, 3)])
def test_parts_cover_the_file(tmp_path: Path, size: int, parts: int) -> None:
    data = os.urandom(size)
    path = tmp_path / "file"
    path.write_bytes(data)
    digest = digest_file(path, 100)
    assert digest.sha256 == hashlib.sha256(data).hexdigest()
    assert digest.bytes == size
    assert len(digest.parts) == parts
    assert b"".join(data[part.start : part.end] for part in digest.parts) == data
    for part in digest.parts:
        assert part.crc64 == crc64_header(checksums.crc64nvme(data[part.start : part.end]))
    assert digest.crc64 == crc64_header(checksums.crc64nvme(data))


def test_a_digest_that_nobody_wants_stops(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100)
    with pytest.raises(DigestStoppedError):
        digest_file(tmp_path / "file", 10, lambda: True)


def test_crc64_is_that_of_the_specification(tmp_path: Path) -> None:
    (tmp_path / "check").write_bytes(b"123456789")
    # CRC-64/NVME's published check value, 0xae8b14860a799888.
    assert digest_file(tmp_path / "check", 4).crc64 == "rosUhgp5mIg="


def test_a_folder_has_the_digest_of_what_sha256sum_prints(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("a.txt", "b/c.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    command = "find . -type f | sed s:^./:: | LC_ALL=C sort | xargs sha256sum | sha256sum"
    printed = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert sha256_of_lines(sha256_of_each(tmp_path, files_below(tmp_path))) == printed.split()[0]


@pytest.mark.parametrize("size", [1, MIN_PART_BYTES * MAX_PARTS, MIN_PART_BYTES * MAX_PARTS + 1, 5 << 40])
def test_a_file_never_has_more_parts_than_s3_takes(size: int) -> None:
    part = PartPlan().part_bytes(size)
    assert part >= MIN_PART_BYTES
    assert -(-size // part) <= MAX_PARTS
