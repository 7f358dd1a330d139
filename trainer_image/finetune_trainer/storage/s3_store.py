"""A job's prefix in an S3 bucket."""

from collections.abc import Iterable
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

DELETE_BATCH = 1000  # the most keys that one DeleteObjects takes
CANARY_KEY = ".write-probe"


@dataclass
class S3Store:
    """`ObjectStore` below `prefix` (no trailing slash)."""

    session: S3Session
    prefix: str
    checksums: ChecksumSupport = ChecksumSupport.STORED
    """What `probe` found out; until then every upload is read back."""
    parts: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(PARALLEL_PARTS, "s3"))

    def uri(self, key: str) -> str:
        """s3:// address of a key."""
        return f"s3://{self.session.bucket}/{self._full(key)}"

    def probe(self) -> None:
        """Write and delete a canary; raises S3Fault where the bucket is missing or not writable."""
        self.checksums = observe_checksum_support(self.session, self._full(CANARY_KEY))

    def put_file(self, key: str, path: Path, on_bytes: OnBytes) -> FileDigest:
        """Upload a file and verify what the store holds."""
        return S3Uploader(self.session, self.parts, self.checksums).upload(self._full(key), path, on_bytes)

    def put_if(self, key: str, data: bytes, replaces: str | None) -> None:
        """Write where the key is absent (None) or still has this ETag; raises PreconditionFailedError."""
        condition: dict[str, Any] = {"IfNoneMatch": "*"} if replaces is None else {"IfMatch": replaces}
        try:
            self.session.call("put_object", self._full(key), Body=data, **condition)
        except S3Fault as fault:
            if fault.kind not in (FaultKind.PRECONDITION, FaultKind.KEY_MISSING):
                raise
            # A repeated request may meet its own first try, whose answer was lost.
            if (found := self.read(key)) is None or found.data != data:
                raise PreconditionFailedError(self.uri(key)) from None

    def read(self, key: str) -> Version | None:
        """Content and ETag of a small object, or None."""

        def fetch() -> Version:
            answer = self.session.client.get_object(Bucket=self.session.bucket, Key=self._full(key))
            return Version(answer["Body"].read(), answer["ETag"])

        try:
            return self.session.patiently(fetch, "get_object", self._full(key))
        except S3Fault as fault:
            if fault.kind is FaultKind.KEY_MISSING:
                return None
            raise

    def get_file(self, key: str, target: Path, on_bytes: OnBytes) -> None:
        """Download an object."""
        S3Downloader(self.session, self.parts).download(self._full(key), target, on_bytes)

    def size(self, key: str) -> int | None:
        """Size in bytes, or None where there is no such object."""
        try:
            return int(self.session.call("head_object", self._full(key))["ContentLength"])
        except S3Fault as fault:
            if fault.kind is FaultKind.KEY_MISSING:
                return None
            raise

    def keys(self, prefix: str) -> list[str]:
        """Every key below a prefix."""
        pages = self.session.pages(
            "list_objects_v2", "ContinuationToken", "NextContinuationToken", Prefix=self._full(prefix)
        )
        return [entry["Key"].removeprefix(f"{self.prefix}/") for page in pages for entry in page.get("Contents", [])]

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; absent ones are no error."""
        listed = [{"Key": self._full(key)} for key in keys]
        for start in range(0, len(listed), DELETE_BATCH):
            batch = {"Objects": listed[start : start + DELETE_BATCH], "Quiet": True}
            answer = self.session.call("delete_objects", Delete=batch)
            for refused in answer.get("Errors", [])[:1]:
                fault = ClientError({"Error": {"Code": refused["Code"]}}, "DeleteObjects")
                raise self.session.fault(fault, "delete_objects", refused["Key"])

    def abort_unfinished(self) -> int:
        """Discard the unfinished multipart uploads below the prefix; says how many. A store without the request has
        none."""
        count = 0
        try:
            for page in self.session.pages(
                "list_multipart_uploads", "KeyMarker", "NextKeyMarker", Prefix=f"{self.prefix}/"
            ):
                for upload in page.get("Uploads", []):
                    self.session.call("abort_multipart_upload", upload["Key"], UploadId=upload["UploadId"])
                    count += 1
        except S3Fault as fault:
            if fault.kind not in (FaultKind.UNSUPPORTED, FaultKind.UPLOAD_LOST):
                raise
        return count

    def close(self) -> None:
        """Let nothing wait any longer."""
        self.session.give_up()
        self.parts.shutdown(wait=False, cancel_futures=True)

    def _full(self, key: str) -> str:
        return f"{self.prefix}/{key}"
