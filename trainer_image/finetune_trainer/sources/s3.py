"""Sources in a bucket: one object, or everything below a prefix. Without credentials, requests are unsigned, which
public buckets allow."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType

from finetune_api.failures import FailureReason
from finetune_api.spec.sources import Source
from finetune_trainer.errors import TrainerError
from finetune_trainer.sources.repository import SourceAccess
from finetune_trainer.storage.digests import sha256_of_lines
from finetune_trainer.storage.object_store import OnBytes
from finetune_trainer.storage.s3_download import S3Downloader
from finetune_trainer.storage.s3_faults import FaultReasons
from finetune_trainer.storage.s3_session import S3Location, S3Session
from finetune_trainer.storage.s3_upload import PARALLEL_PARTS, collect, fetch_range

SMALL_BYTES = 8 << 20


class S3Repository:
    """A prefix of a bucket, or one object."""

    revision = None
    incomplete = FailureReason.STORAGE_UNAVAILABLE
    sha256: Mapping[str, str] = MappingProxyType({})

    def __init__(self, source: Source, access: SourceAccess, reasons: FaultReasons, *, is_folder: bool) -> None:
        """Lists the files. With `is_folder`, the path is a folder even without a slash at its end."""
        location = S3Location(access.endpoint_url, access.region, access.endpoints)
        self._session = S3Session(source.location, location, access.credentials, reasons, anonymous_allowed=True)

        path = source.path
        if not path.endswith("/") and not is_folder:
            # One object: HEAD fails at once if it does not exist, where a listing would be empty.
            self._prefix = path[: path.rfind("/") + 1]
            found = self._session.call("head_object", path)
            name = path.removeprefix(self._prefix)
            self.files, self._etags = {name: int(found["ContentLength"])}, {name: str(found["ETag"])}
            return

        # With its slash, the prefix "base/" does not match "base2/config.json".
        self._prefix = f"{path.rstrip('/')}/".lstrip("/")
        self.files, self._etags = self._list()
        if not self.files:
            raise TrainerError(reasons.key_missing, f"s3://{source.location}/{self._prefix} holds no files")

    def version(self, names: Iterable[str]) -> str:
        """Returns the SHA-256 of names and ETags."""
        return sha256_of_lines({name: self._etags[name] for name in names})

    def download_size(self, names: Iterable[str]) -> int:
        """Returns the size of the files in bytes."""
        return sum(self.files[name] for name in names)

    def download(self, names: Iterable[str], folder: Path, on_bytes: OnBytes) -> Path:
        """Downloads small files side by side, and large ones one after the other, each in parallel ranges."""
        listed = list(names)
        small = [name for name in listed if self.files[name] <= SMALL_BYTES]
        parts = ThreadPoolExecutor(PARALLEL_PARTS, "s3")
        try:
            collect(parts, [partial(self._download_small, name, folder / name, on_bytes) for name in small])
            downloader = S3Downloader(self._session, parts)
            for name in listed:
                if self.files[name] > SMALL_BYTES:
                    downloader.download(self._prefix + name, folder / name, on_bytes)
        finally:
            parts.shutdown(wait=False, cancel_futures=True)
        return folder

    def _download_small(self, name: str, target: Path, on_bytes: OnBytes) -> None:
        """Downloads an object in one request; thousands of them would otherwise wait for each other's answers."""
        data = self.read(name, 0, self.files[name]) if self.files[name] else b""
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        on_bytes(len(data))

    def read(self, name: str, start: int, end: int) -> bytes:
        """Returns bytes [start, end) of an object."""
        return fetch_range(self._session, self._prefix + name, start, end)

    def _list(self) -> tuple[dict[str, int], dict[str, str]]:
        """Returns size and ETag of each file."""
        pages = self._session.pages(
            "list_objects_v2", "ContinuationToken", "NextContinuationToken", Prefix=self._prefix
        )
        entries = {
            entry["Key"].removeprefix(self._prefix): entry for page in pages for entry in page.get("Contents", [])
        }
        plain = {name: entry for name, entry in entries.items() if _is_plain_path(name)}

        sizes = {name: int(entry["Size"]) for name, entry in plain.items()}
        return sizes, {name: str(entry["ETag"]) for name, entry in plain.items()}


def _is_plain_path(name: str) -> bool:
    """Returns True if a key is a path that stays below its folder: a key may be any text."""
    return not {"", ".", ".."} & set(name.split("/"))
