"""Upload of one file to S3, and proof that the store holds it.

Large files go up in parts, on several threads. Every part is repeated on its own (boto3's transfer manager throws the
whole upload away when one part has used up its retries, and cannot wait for rotated credentials), so an outage costs
the parts in flight.

Proof, cheapest first:
* A store that was seen to reject wrong checksums (`ChecksumSupport.CHECKED`, see s3_probe) compared the CRC64-NVME of
  every part and of the whole object with ours when it stored them; HEAD then has to return the same size and
  CRC64-NVME. This proves that what arrived is what we hashed, and costs one request.
* Any other store is read back, range by range in parallel, and the CRC64-NVME of every range is compared with ours.
  This proves that what the store returns is what we hashed, and costs the download.

The file is hashed while its parts are sent; each part's CRC64-NVME is computed from the bytes that go out, and must be
the one that the hashing found.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from awscrt import checksums

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage.digests import FileDigest, PartDigest, crc64_header, digest_file
from finetune_trainer.storage.object_store import OnBytes
from finetune_trainer.storage.s3_faults import FaultKind, S3Fault
from finetune_trainer.storage.s3_session import Patience, S3Session

log = logging.getLogger(__name__)
Value = TypeVar("Value")

MIN_PART_BYTES = 16 << 20
MAX_PARTS = 10_000
PARALLEL_PARTS = 8
_ABORT_ONCE = Patience(outage_seconds=5, expired_seconds=0, rejected_seconds=0)


class ChecksumSupport(Enum):
    """What a store does with the CRC64-NVME that we send."""

    CHECKED = "rejects content that does not match"
    STORED = "takes any value"
    REFUSED = "does not know it"


@dataclass(frozen=True)
class PartPlan:
    """Size of the parts; 8 of them are in memory at a time."""

    min_part_bytes: int = MIN_PART_BYTES

    def part_bytes(self, size: int) -> int:
        """Part size for a file: S3 takes at most 10 000 parts, so it grows beyond 156 GiB."""
        mebibyte = 1 << 20
        needed = -(-size // MAX_PARTS)
        return max(self.min_part_bytes, -(-needed // mebibyte) * mebibyte if needed > self.min_part_bytes else 0)


DEFAULT_PLAN = PartPlan()


@dataclass(frozen=True)
class SentPart:
    """A part that the store has taken."""

    number: int
    etag: str
    crc64: str

    def listed(self, *, checked: bool) -> dict[str, Any]:
        """As the request that completes the upload names it."""
        return {"ETag": self.etag, "PartNumber": self.number} | ({"ChecksumCRC64NVME": self.crc64} if checked else {})


@dataclass(frozen=True)
class S3Uploader:
    """Uploads files on the threads of `parts`; `checksums` says what the store does with ours."""

    session: S3Session
    parts: Executor
    checksums: ChecksumSupport
    plan: PartPlan = DEFAULT_PLAN

    def upload(self, key: str, path: Path, on_bytes: OnBytes) -> FileDigest:
        """Upload and verify a file. Raises TrainerError, UploadCorrupted among them."""
        digest = self.send(key, path, on_bytes)
        self.verify(key, digest)
        return digest

    def send(self, key: str, path: Path, on_bytes: OnBytes) -> FileDigest:
        """Upload a file; what the store made of it is not known yet. Raises TrainerError."""
        size = path.stat().st_size
        part_bytes = self.plan.part_bytes(size)
        if size > part_bytes:
            return self._put_parts(key, path, size, part_bytes, on_bytes)
        digest = digest_file(path, part_bytes)
        self._put_whole(key, path, digest, on_bytes)
        return digest

    def verify(self, key: str, digest: FileDigest) -> None:
        """Check what the store holds against our digests; see the module's docstring."""
        head = self.session.call("head_object", key, ChecksumMode="ENABLED")
        if head["ContentLength"] != digest.bytes:
            raise self._corrupted(key, f"holds {head['ContentLength']} bytes, {digest.bytes} were sent")
        if self.checksums is ChecksumSupport.CHECKED and head.get("ChecksumCRC64NVME") == digest.crc64:
            return
        if digest.bytes:
            collect(self.parts, [partial(self._verify_part, key, part) for part in digest.parts])

    def _put_whole(self, key: str, path: Path, digest: FileDigest, on_bytes: OnBytes) -> None:
        self.session.call("put_object", key, Body=path.read_bytes(), **self._checksum(digest.crc64))
        on_bytes(digest.bytes)

    def _put_parts(self, key: str, path: Path, size: int, part_bytes: int, on_bytes: OnBytes) -> FileDigest:
        typed: dict[str, Any] = (
            {} if self._unchecked else {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "FULL_OBJECT"}
        )
        upload_id = self.session.call("create_multipart_upload", key, **typed)["UploadId"]
        stopped = threading.Event()
        try:
            with ThreadPoolExecutor(1, "digest") as hasher:
                try:
                    hashed = hasher.submit(digest_file, path, part_bytes, stopped.is_set)
                    starts = enumerate(range(0, size, part_bytes), start=1)
                    send = partial(self._put_part, key, path, upload_id, on_bytes)
                    tasks = [partial(send, number, start, min(start + part_bytes, size)) for number, start in starts]
                    sent = collect(self.parts, tasks)
                    digest = hashed.result()
                except BaseException:
                    stopped.set()
                    raise
            if [part.crc64 for part in digest.parts] != [part.crc64 for part in sent]:
                raise self._corrupted(key, "is not what was hashed: the file changed while it was uploaded")
            self._complete(key, upload_id, [part.listed(checked=not self._unchecked) for part in sent], digest)
        except BaseException:
            self._abort(key, upload_id)
            raise
        return digest

    def _put_part(
        self, key: str, path: Path, upload_id: str, on_bytes: OnBytes, number: int, start: int, end: int
    ) -> SentPart:
        body = read_range(path, start, end)
        crc64 = crc64_header(checksums.crc64nvme(body))
        checksum: dict[str, Any] = {} if self._unchecked else {"ChecksumCRC64NVME": crc64}
        answer = self.session.call("upload_part", key, UploadId=upload_id, PartNumber=number, Body=body, **checksum)
        on_bytes(len(body))
        return SentPart(number, answer["ETag"], crc64)

    def _complete(self, key: str, upload_id: str, sent: list[dict[str, Any]], digest: FileDigest) -> None:
        whole: dict[str, Any] = (
            {} if self._unchecked else {"ChecksumCRC64NVME": digest.crc64, "ChecksumType": "FULL_OBJECT"}
        )
        try:
            self.session.call(
                "complete_multipart_upload", key, UploadId=upload_id, MultipartUpload={"Parts": sent}, **whole
            )
        except S3Fault as fault:
            # Completed, but the answer was lost and the repeated request found no upload: verify() decides what is
            # there.
            if fault.kind is not FaultKind.UPLOAD_LOST or not self._exists(key):
                raise

    def _exists(self, key: str) -> bool:
        try:
            self.session.call("head_object", key)
        except S3Fault as fault:
            if fault.kind is FaultKind.KEY_MISSING:
                return False
            raise
        return True

    def _abort(self, key: str, upload_id: str) -> None:
        try:
            self.session.call("abort_multipart_upload", key, UploadId=upload_id, patience=_ABORT_ONCE)
        except S3Fault as fault:
            log.warning("%s: the unfinished upload stays until the next start", fault.message)

    def _verify_part(self, key: str, part: PartDigest) -> None:
        data = fetch_range(self.session, key, part.start, part.end)
        if crc64_header(checksums.crc64nvme(data)) != part.crc64:
            raise self._corrupted(key, f"returns other bytes than were sent, between {part.start} and {part.end}")

    def _corrupted(self, key: str, found: str) -> TrainerError:
        return TrainerError(FailureReason.UPLOAD_CORRUPTED, f"s3://{self.session.bucket}/{key} {found}")

    def _checksum(self, crc64: str) -> dict[str, Any]:
        return {} if self._unchecked else {"ChecksumAlgorithm": "CRC64NVME", "ChecksumCRC64NVME": crc64}

    @property
    def _unchecked(self) -> bool:
        return self.checksums is ChecksumSupport.REFUSED


def fetch_range(session: S3Session, key: str, start: int, end: int, etag: str | None = None) -> bytes:
    """Bytes [start, end) of an object (of that version); a body that breaks off is fetched again. Raises S3Fault."""
    same = {} if etag is None else {"IfMatch": etag}

    def fetch() -> bytes:
        answer = session.client.get_object(Bucket=session.bucket, Key=key, Range=f"bytes={start}-{end - 1}", **same)
        data: bytes = answer["Body"].read()
        if len(data) != end - start:
            raise ConnectionError(f"{len(data)} of {end - start} bytes arrived")
        return data

    return session.patiently(fetch, "get_object", key)


def read_range(path: Path, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file."""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(end - start)


def collect(executor: Executor, tasks: Iterable[Callable[[], Value]]) -> list[Value]:
    """Results of all tasks, in order. At the first failure, or when a signal interrupts this thread, the tasks that
    wait are dropped and the failure is raised."""
    futures: list[Future[Value]] = [executor.submit(task) for task in tasks]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        for future in futures:
            future.cancel()
    wait(futures)
    for future in futures:
        if not future.cancelled() and (error := future.exception()) is not None:
            raise error
    return [future.result() for future in futures]
