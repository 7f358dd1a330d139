"""A job's results in a local folder, for `finetune run --output FOLDER`; one writer at a time."""

import hashlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage.digests import FileDigest, digest_file
from finetune_trainer.storage.object_store import OnBytes, PreconditionFailedError, Version
from finetune_trainer.storage.s3_upload import PartPlan


@dataclass(frozen=True)
class FolderStore:
    """`ObjectStore` below a folder."""

    folder: Path

    def uri(self, key: str) -> str:
        """The path itself."""
        return f"{self.folder / key}{'/' if key.endswith('/') else ''}"

    def probe(self) -> None:
        """Make the folder; raises TrainerError where that is refused."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".write-probe").touch()
            (self.folder / ".write-probe").unlink()
        except OSError as error:
            message = f"{self.folder} cannot be written: {error.strerror}"
            raise TrainerError(FailureReason.STORAGE_NOT_WRITABLE, message) from None

    def put_file(self, key: str, path: Path, on_bytes: OnBytes) -> FileDigest:
        """Copy a file and compare the copy."""
        target = self._target(key)
        shutil.copyfile(path, target)
        digest = digest_file(path, PartPlan().part_bytes(path.stat().st_size))
        with target.open("rb") as copy:
            if hashlib.file_digest(copy, "sha256").hexdigest() != digest.sha256:
                raise TrainerError(FailureReason.UPLOAD_CORRUPTED, f"{target} differs from what was copied there")
        on_bytes(digest.bytes)
        return digest

    def put_if(self, key: str, data: bytes, replaces: str | None) -> None:
        """Write where the key is absent (None) or still has this digest; raises PreconditionFailedError."""
        target = self._target(key)
        partial = target.with_name(f".{target.name}.{uuid4().hex}")
        with partial.open("wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        try:
            if replaces is None:
                target.hardlink_to(partial)  # unlike a rename, fails where the target exists
            elif (found := self.read(key)) and found.tag == replaces:
                partial.replace(target)
            else:
                raise PreconditionFailedError(self.uri(key))
        except FileExistsError:
            raise PreconditionFailedError(self.uri(key)) from None
        finally:
            partial.unlink(missing_ok=True)

    def read(self, key: str) -> Version | None:
        """Content and its SHA-256, or None."""
        try:
            data = (self.folder / key).read_bytes()
        except FileNotFoundError:
            return None
        return Version(data, hashlib.sha256(data).hexdigest())

    def get_file(self, key: str, target: Path, on_bytes: OnBytes) -> None:
        """Copy a file out."""
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(self.folder / key, target)
        except FileNotFoundError:
            raise TrainerError(FailureReason.STORAGE_UNAVAILABLE, f"{self.folder / key} is gone") from None
        on_bytes(target.stat().st_size)

    def size(self, key: str) -> int | None:
        """Size in bytes, or None."""
        path = self.folder / key
        return path.stat().st_size if path.is_file() else None

    def keys(self, prefix: str) -> list[str]:
        """Every file below a prefix that ends in /; what another attempt removes meanwhile may be missing."""
        found = (Path(folder) / name for folder, _, names in os.walk(self.folder / prefix) for name in names)
        return sorted(path.relative_to(self.folder).as_posix() for path in found)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove files, and folders that become empty."""
        for key in keys:
            path = self.folder / key
            path.unlink(missing_ok=True)
            for parent in path.parents:
                if parent == self.folder or not _remove_if_empty(parent):
                    break

    def abort_unfinished(self) -> int:
        """A folder has no unfinished uploads."""
        return 0

    def close(self) -> None:
        """Nothing is open."""

    def _target(self, key: str) -> Path:
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _remove_if_empty(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True
