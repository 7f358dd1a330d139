"""Upload of one file to S3, and proof that the store holds it.

Large files go up in parts, on several threads, and every part is retried on its own: an outage costs the parts in
flight. boto3's transfer manager was rejected: when one part has used up its retries it discards the whole upload, and
it cannot wait for rotated credentials.

Proof, the cheapest that the store allows:
* A store that was seen to reject wrong checksums (`ChecksumSupport.CHECKED`, see s3_probe) compared the CRC64-NVME of
  every part and of the whole object with ours when it stored them. A HEAD request must then return the same size and
  CRC64-NVME. This proves that the store received what we hashed, and costs one request.
* From any other store the object is read back, range by range in parallel, and the CRC64-NVME of every range is
  compared with ours. This proves that the store returns what we hashed, and costs the download.

The file is hashed while its parts are sent. The CRC64-NVME of each part is computed a second time from the bytes that
are sent, and both must be equal: a file that changes during the upload is noticed.
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
from finetune_trainer.stopping import finishing, run_abandonable, run_within
from finetune_trainer.storage.digests import FileDigest, PartDigest, crc64_header, digest_file
from finetune_trainer.storage.moving_bytes import MovingBytes, read_moving
from finetune_trainer.storage.object_store import OnBytes
from finetune_trainer.storage.retry import RetryPolicy
from finetune_trainer.storage.s3_faults import FaultKind, S3Fault
from finetune_trainer.storage.s3_session import S3Session

log = logging.getLogger(__name__)
Value = TypeVar("Value")

MIN_PART_BYTES = 16 << 20
MAX_PARTS = 10_000
PARALLEL_PARTS = 8
# At the end of a failed job little time is left: what cannot be discarded now is discarded at the next start.
_ABORT_SECONDS = 5
_ABORT_RETRIES = RetryPolicy(outage_seconds=_ABORT_SECONDS, expired_seconds=0, rejected_seconds=0)


class ChecksumSupport(Enum):
    """Treatment of the CRC64-NVME that we send, by a store."""

    CHECKED = "rejects content that does not match"
    STORED = "accepts any value"
    REFUSED = "does not know them"


@dataclass(frozen=True)
class PartPlan:
    """Sizes of parts; at most 8 parts are in memory at a time."""

    min_part_bytes: int = MIN_PART_BYTES

    def part_bytes(self, size: int) -> int:
        """Part size in bytes for a file of `size` bytes: S3 takes at most 10 000 parts, so parts grow above 156 GiB."""
        mebibyte = 1 << 20
        needed = -(-size // MAX_PARTS)  # rounded up

        return max(self.min_part_bytes, -(-needed // mebibyte) * mebibyte if needed > self.min_part_bytes else 0)


DEFAULT_PLAN = PartPlan()


@dataclass(frozen=True)
class MultipartUpload:
    """An upload in parts that was begun and is neither completed nor aborted."""

    key: str
    upload_id: str
    path: Path
    on_bytes: OnBytes


@dataclass(frozen=True)
class SentPart:
    """A part that the store has accepted."""

    number: int
    """From 1, in the order of the file."""
    etag: str
    crc64: str

    def completion_entry(self, *, checked: bool) -> dict[str, Any]:
        """Entry of this part in CompleteMultipartUpload."""
        checksum = {"ChecksumCRC64NVME": self.crc64} if checked else {}
        return {"ETag": self.etag, "PartNumber": self.number} | checksum


@dataclass(frozen=True)
class S3Uploader:
    """Uploads files on the threads of `parts`; `checksums` is what the store does with ours."""

    session: S3Session
    parts: Executor
    checksums: ChecksumSupport
    plan: PartPlan = DEFAULT_PLAN

    def upload(self, key: str, path: Path, on_bytes: OnBytes) -> FileDigest:
        """Uploads and verifies a file. Raises TrainerError, UploadCorrupted among its reasons."""
        digest = self.send(key, path, on_bytes)
        self.verify(key, digest)
        return digest

    def send(self, key: str, path: Path, on_bytes: OnBytes) -> FileDigest:
        """Uploads a file without verifying what the store holds. Raises TrainerError."""
        size = path.stat().st_size
        part_bytes = self.plan.part_bytes(size)
        if size > part_bytes:
            return self._put_parts(key, path, part_bytes, on_bytes)

        # One request: the checksum has to be known before it starts.
        digest = digest_file(path, part_bytes)
        self._put_whole(key, path, digest, on_bytes)
        return digest

    def verify(self, key: str, digest: FileDigest) -> None:
        """Compares what the store holds with our digests, as the module's docstring says.

        Raises TrainerError (UploadCorrupted) for a difference, and S3Fault.
        """
        head = self.session.call("head_object", key, ChecksumMode="ENABLED")
        if head["ContentLength"] != digest.bytes:
            raise self._corrupted(key, f"holds {head['ContentLength']} bytes, but {digest.bytes} were sent")

        # The store compared the checksum itself when it took the object: no need to read it back.
        if self.checksums is ChecksumSupport.CHECKED and head.get("ChecksumCRC64NVME") == digest.crc64:
            return

        if digest.bytes:
            collect(self.parts, [partial(self._verify_part, key, part) for part in digest.parts])

    def _put_whole(self, key: str, path: Path, digest: FileDigest, on_bytes: OnBytes) -> None:
        self.session.call("put_object", key, Body=MovingBytes(path.read_bytes()), **self._checksum(digest.crc64))
        on_bytes(digest.bytes)

    def _put_parts(self, key: str, path: Path, part_bytes: int, on_bytes: OnBytes) -> FileDigest:
        # FULL_OBJECT: the store checks the CRC of the whole file, not only a digest over the parts' CRCs.
        typed: dict[str, Any] = {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "FULL_OBJECT"}
        answer = self.session.call("create_multipart_upload", key, **({} if self._unchecked else typed))
        upload = MultipartUpload(key, answer["UploadId"], path, on_bytes)

        try:
            digest, sent = self._send_and_hash(upload, part_bytes)
            # Two independent readings of the file have to agree: what was hashed, and what was sent.
            if [part.crc64 for part in digest.parts] != [part.crc64 for part in sent]:
                raise self._corrupted(key, "is not what was hashed: the file changed while it was uploaded")
            self._complete(upload, sent, digest)
        except BaseException:  # a signal, too: parts of an unfinished upload cost money until somebody discards them
            self._abort(upload)
            raise
        return digest

    def _send_and_hash(self, upload: MultipartUpload, part_bytes: int) -> tuple[FileDigest, list[SentPart]]:
        """Sends all parts while another thread hashes the file; the hashing stops if the sending fails."""
        size = upload.path.stat().st_size
        tasks = [
            partial(self._put_part, upload, number, start, min(start + part_bytes, size))
            for number, start in enumerate(range(0, size, part_bytes), start=1)
        ]

        stopped = threading.Event()
        with ThreadPoolExecutor(1, "digest") as hasher:  # leaving the block waits for the hashing to stop
            try:
                hashed = hasher.submit(digest_file, upload.path, part_bytes, stopped.is_set)
                sent = collect(self.parts, tasks)
                return hashed.result(), sent
            except BaseException:
                stopped.set()
                raise

    def _put_part(self, upload: MultipartUpload, number: int, start: int, end: int) -> SentPart:
        body = read_range(upload.path, start, end)
        crc64 = crc64_header(checksums.crc64nvme(body))
        named: dict[str, Any] = {"UploadId": upload.upload_id, "PartNumber": number}
        checksum: dict[str, Any] = {} if self._unchecked else {"ChecksumCRC64NVME": crc64}

        answer = self.session.call("upload_part", upload.key, Body=MovingBytes(body), **named, **checksum)
        upload.on_bytes(len(body))
        return SentPart(number, answer["ETag"], crc64)

    def _complete(self, upload: MultipartUpload, sent: list[SentPart], digest: FileDigest) -> None:
        checked = not self._unchecked
        whole: dict[str, Any] = {"ChecksumCRC64NVME": digest.crc64, "ChecksumType": "FULL_OBJECT"} if checked else {}
        parts = {"Parts": [part.completion_entry(checked=checked) for part in sent]}

        try:
            self.session.call(
                "complete_multipart_upload", upload.key, UploadId=upload.upload_id, MultipartUpload=parts, **whole
            )
        except S3Fault as fault:
            # The first attempt may have completed the upload while its answer was lost; the retry then finds no such
            # upload. verify() judges what is stored.
            if fault.kind is not FaultKind.UPLOAD_LOST or not self._exists(upload.key):
                raise

    def _exists(self, key: str) -> bool:
        try:
            self.session.call("head_object", key)
        except S3Fault as fault:
            if fault.kind is FaultKind.KEY_MISSING:
                return False
            raise
        return True

    def _abort(self, upload: MultipartUpload) -> None:
        call = partial(self.session.call, "abort_multipart_upload", upload.key, _ABORT_RETRIES)
        try:
            with finishing():  # also after a signal, but a silent store is not waited for
                run_within(_ABORT_SECONDS, partial(call, UploadId=upload.upload_id))
        except S3Fault as fault:
            log.warning("%s; the unfinished upload is discarded when the job starts again", fault.message)

    def _verify_part(self, key: str, part: PartDigest) -> None:
        data = fetch_range(self.session, key, part.start, part.end)
        if crc64_header(checksums.crc64nvme(data)) != part.crc64:
            raise self._corrupted(key, f"returns other content than was sent, in bytes {part.start} to {part.end}")

    def _corrupted(self, key: str, found: str) -> TrainerError:
        return TrainerError(FailureReason.UPLOAD_CORRUPTED, f"s3://{self.session.bucket}/{key} {found}")

    def _checksum(self, crc64: str) -> dict[str, Any]:
        return {} if self._unchecked else {"ChecksumAlgorithm": "CRC64NVME", "ChecksumCRC64NVME": crc64}

    @property
    def _unchecked(self) -> bool:
        return self.checksums is ChecksumSupport.REFUSED


def fetch_range(session: S3Session, key: str, start: int, end: int, etag: str | None = None) -> bytes:
    """Returns bytes [start, end) of an object; a body that breaks off is fetched again.

    With `etag`, only of that version of the object. Raises S3Fault.
    """
    same = {} if etag is None else {"IfMatch": etag}

    def fetch() -> bytes:
        answer = session.client.get_object(Bucket=session.bucket, Key=key, Range=f"bytes={start}-{end - 1}", **same)
        data = read_moving(answer["Body"])
        if len(data) != end - start:
            raise ConnectionError(f"only {len(data)} of {end - start} bytes arrived")
        return data

    return session.retry(fetch, "get_object", key)


def read_range(path: Path, start: int, end: int) -> bytes:
    """Returns bytes [start, end) of a file."""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(end - start)


def collect(executor: Executor, tasks: Iterable[Callable[[], Value]]) -> list[Value]:
    """Returns the results of all tasks, in order.

    At the first failure, queued tasks are dropped and the failure is raised once running ones have ended. If the run is
    asked to stop, nothing is waited for: InterruptedRunError.
    """
    futures: list[Future[Value]] = [executor.submit(task) for task in tasks]

    try:
        run_abandonable(lambda: wait(futures, return_when=FIRST_EXCEPTION))
    finally:
        for future in futures:
            future.cancel()

    # Running tasks cannot be cancelled.
    run_abandonable(lambda: wait(futures))
    for future in futures:
        if not future.cancelled() and (error := future.exception()) is not None:
            raise error
    return [future.result() for future in futures]
