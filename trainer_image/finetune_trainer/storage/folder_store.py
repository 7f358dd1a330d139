"""Results of a job in a local folder, for `finetune run --output FOLDER`. One process writes at a time."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError
from finetune_trainer.stopping import committing
from finetune_trainer.storage.digests import FileDigest, digest_file
from finetune_trainer.storage.object_store import OnBytes, PreconditionFailedError, Version
from finetune_trainer.storage.s3_upload import PartPlan

NO_LINK = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)
"""Errors of a link where a copy is possible: another file system, or one without links."""


@dataclass(frozen=True)
class FolderStore:
    """An `ObjectStore` below a folder."""

    folder: Path

    def uri(self, key: str) -> str:
        """Returns the path itself."""
        return f"{self.folder / key}{'/' if key.endswith('/') else ''}"

    def probe(self) -> None:
        """Creates the folder and writes into it. Raises TrainerError (StorageNotWritable)."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".write-probe").touch()
            (self.folder / ".write-probe").unlink()
        except OSError as error:
            message = f"the output folder {self.folder} cannot be written: {error.strerror}"
            raise TrainerError(FailureReason.STORAGE_NOT_WRITABLE, message) from None

    def put_file(self, key: str, path: Path, on_bytes: OnBytes) -> FileDigest:
        """Gives a file a second name in the folder, which nothing can damage on the way; on another file system, copies
        it and compares the copy with it."""
        target = self._target(key)
        digest = digest_file(path, PartPlan().part_bytes(path.stat().st_size))
        if not _link(path, target):
            shutil.copyfile(path, target)
            with target.open("rb") as copy:
                if hashlib.file_digest(copy, "sha256").hexdigest() != digest.sha256:
                    raise TrainerError(
                        FailureReason.UPLOAD_CORRUPTED, f"{target} differs from {path}, of which it is a copy"
                    )

        on_bytes(digest.bytes)
        return digest

    def put_if(self, key: str, data: bytes, replaces: str | None) -> None:
        """Writes `data` if the key does not exist (`replaces` None) or its content still has this SHA-256.

        Raises PreconditionFailedError otherwise. No signal ends the process in the middle of it.
        """
        with committing():
            self._put_if(key, data, replaces)

    def _put_if(self, key: str, data: bytes, replaces: str | None) -> None:
        target = self._target(key)
        # Written under another name first: under the real one a file is always complete.
        partial = target.with_name(f".{target.name}.{uuid4().hex}")
        try:
            with partial.open("wb") as file:
                file.write(data)
                os.fsync(file.fileno())

            if replaces is None:
                target.hardlink_to(partial)  # fails if the target exists, as a rename does not
            elif (found := self.read(key)) and found.tag == replaces:
                partial.replace(target)
            else:
                raise PreconditionFailedError(self.uri(key))
        except FileExistsError:
            raise PreconditionFailedError(self.uri(key)) from None
        finally:
            partial.unlink(missing_ok=True)

    def read(self, key: str) -> Version | None:
        """Returns content and its SHA-256, or None if there is no such file."""
        try:
            data = (self.folder / key).read_bytes()
        except FileNotFoundError:
            return None
        return Version(data, hashlib.sha256(data).hexdigest())

    def get_file(self, key: str, target: Path, on_bytes: OnBytes) -> None:
        """Copies a file out of the folder."""
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(self.folder / key, target)
        except FileNotFoundError:
            raise TrainerError(
                FailureReason.STORAGE_UNAVAILABLE, f"{self.folder / key} does not exist any more"
            ) from None
        on_bytes(target.stat().st_size)

    def size(self, key: str) -> int | None:
        """Returns the size in bytes, or None if there is no such file."""
        path = self.folder / key
        return path.stat().st_size if path.is_file() else None

    def keys(self, prefix: str) -> list[str]:
        """Returns every file below a prefix that ends in "/", except those that another attempt deletes meanwhile."""
        # os.walk ignores folders that vanish meanwhile; Path.rglob may raise for them.
        found = (Path(folder) / name for folder, _, names in os.walk(self.folder / prefix) for name in names)
        return sorted(path.relative_to(self.folder).as_posix() for path in found)

    def delete(self, keys: Iterable[str]) -> None:
        """Deletes files, and folders that become empty."""
        for key in keys:
            path = self.folder / key
            path.unlink(missing_ok=True)
            for parent in path.parents:
                if parent == self.folder or not _remove_if_empty(parent):
                    break

    def abort_unfinished(self, is_own: Callable[[str], bool]) -> int:
        """Returns 0: a folder has no unfinished uploads."""
        return 0

    def close(self) -> None:
        """Does nothing: no file stays open."""

    def _target(self, key: str) -> Path:
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _link(path: Path, target: Path) -> bool:
    """Makes `target` another name of a file; False where the file system cannot."""
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(path.resolve())
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        return False
    return True


def _remove_if_empty(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True
