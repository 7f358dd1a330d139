"""Results and checkpoints below a job's prefix in an S3 bucket."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from finetune_trainer.storage.digests import FileDigest
from finetune_trainer.storage.object_store import OnBytes, PreconditionFailedError, Version
from finetune_trainer.storage.s3_download import S3Downloader
from finetune_trainer.storage.s3_faults import FaultKind, S3Fault
from finetune_trainer.storage.s3_probe import observe_checksum_support
from finetune_trainer.storage.s3_session import S3Session
from finetune_trainer.storage.s3_upload import PARALLEL_PARTS, ChecksumSupport, S3Uploader

MAX_DELETED_KEYS = 1000  # of one DeleteObjects request
CANARY_KEY = ".write-probe"


@dataclass
class S3Store:
    """An `ObjectStore` below `prefix` (without a slash at its end)."""

    session: S3Session
    prefix: str
    checksums: ChecksumSupport = ChecksumSupport.STORED
    """Result of `probe`; until it has run, every upload is read back."""
    parts: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(PARALLEL_PARTS, "s3"))

    def uri(self, key: str) -> str:
        """Returns the s3:// address of a key."""
        return f"s3://{self.session.bucket}/{self._full(key)}"

    def probe(self) -> None:
        """Writes and deletes a canary. Raises S3Fault if the bucket does not exist or cannot be written."""
        self.checksums = observe_checksum_support(self.session, self._full(CANARY_KEY))

    def put_file(self, key: str, path: Path, on_bytes: OnBytes) -> FileDigest:
        """Uploads a file and verifies what the store holds. Raises S3Fault, or TrainerError (UploadCorrupted)."""
        return S3Uploader(self.session, self.parts, self.checksums).upload(self._full(key), path, on_bytes)

    def put_if(self, key: str, data: bytes, replaces: str | None) -> None:
        """Writes `data` if the key does not exist (`replaces` None) or still has this ETag.

        Raises PreconditionFailedError otherwise, and S3Fault.
        """
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if replaces is None else {"IfMatch": replaces}

        try:
            self.session.call("put_object", self._full(key), Body=data, **condition)
        except S3Fault as fault:
            if fault.kind not in (FaultKind.PRECONDITION, FaultKind.KEY_MISSING):
                raise
            # A retried request may find what its own first attempt wrote, if only the answer was lost.
            if (found := self.read(key)) is None or found.data != data:
                raise PreconditionFailedError(self.uri(key)) from None

    def read(self, key: str) -> Version | None:
        """Returns content and ETag of a small object, or None if it does not exist."""

        def fetch() -> Version:
            answer = self.session.client.get_object(Bucket=self.session.bucket, Key=self._full(key))
            return Version(answer["Body"].read(), answer["ETag"])

        try:
            return self.session.retry(fetch, "get_object", self._full(key))
        except S3Fault as fault:
            if fault.kind is FaultKind.KEY_MISSING:
                return None
            raise

    def get_file(self, key: str, target: Path, on_bytes: OnBytes) -> None:
        """Downloads an object into a file."""
        S3Downloader(self.session, self.parts).download(self._full(key), target, on_bytes)

    def size(self, key: str) -> int | None:
        """Returns the size in bytes, or None if the object does not exist."""
        try:
            return int(self.session.call("head_object", self._full(key))["ContentLength"])
        except S3Fault as fault:
            if fault.kind is FaultKind.KEY_MISSING:
                return None
            raise

    def keys(self, prefix: str) -> list[str]:
        """Returns every key below `prefix`, relative to the job's prefix."""
        pages = self.session.pages(
            "list_objects_v2", "ContinuationToken", "NextContinuationToken", Prefix=self._full(prefix)
        )
        return [entry["Key"].removeprefix(f"{self.prefix}/") for page in pages for entry in page.get("Contents", [])]

    def delete(self, keys: Iterable[str]) -> None:
        """Deletes objects, in batches; keys that do not exist are ignored. Raises S3Fault for the first refusal."""
        listed = [{"Key": self._full(key)} for key in keys]

        for start in range(0, len(listed), MAX_DELETED_KEYS):
            batch = {"Objects": listed[start : start + MAX_DELETED_KEYS], "Quiet": True}
            answer = self.session.call("delete_objects", Delete=batch)

            # The request itself succeeds; each refused key is listed in the answer.
            for refused in answer.get("Errors", [])[:1]:
                fault = ClientError({"Error": {"Code": refused["Code"]}}, "DeleteObjects")
                raise self.session.fault(fault, "delete_objects", refused["Key"])

    def abort_unfinished(self, is_own: Callable[[str], bool]) -> int:
        """Discards the unfinished multipart uploads of keys for which `is_own` holds, and returns their number.

        A store that cannot list them counts as one that has none.
        """
        pages = self.session.pages("list_multipart_uploads", "KeyMarker", "NextKeyMarker", Prefix=f"{self.prefix}/")
        count = 0

        try:
            for page in pages:
                listed = page.get("Uploads", [])
                for upload in (each for each in listed if is_own(each["Key"].removeprefix(f"{self.prefix}/"))):
                    self.session.call("abort_multipart_upload", upload["Key"], UploadId=upload["UploadId"])
                    count += 1
        except S3Fault as fault:
            if fault.kind not in (FaultKind.UNSUPPORTED, FaultKind.UPLOAD_LOST):
                raise
        return count

    def close(self) -> None:
        """Ends all waits and drops queued transfers."""
        self.session.close()
        self.parts.shutdown(wait=False, cancel_futures=True)

    def _full(self, key: str) -> str:
        return f"{self.prefix}/{key}"
