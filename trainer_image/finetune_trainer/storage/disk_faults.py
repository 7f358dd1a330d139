"""Errors of a disk that is full or must not be written, wherever they come up.

Libraries wrap the system's error, or keep only its text (safetensors, PyTorch's writer), so that the chain of causes
and the texts are looked through. Such a failure is never retried: waiting frees no disk.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_api.failures import FailureReason
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage.sizes import MEBIBYTE, format_size

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_FULL_TEXTS = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
_WRITER_TEXTS = ("PytorchStreamWriter failed writing", "inline_container.cc")  # PyTorch's do not say why
_ALMOST_NOTHING = 1 << 20


class DiskFullError(TrainerError):
    """A write found the disk full; the message says what is free, and whoever knows adds what is needed."""

    def __init__(self, message: str) -> None:
        super().__init__(FailureReason.DISK_FULL, message)


def explain_disk_fault(error: BaseException, work: Path | None = None) -> TrainerError | None:
    """Returns our error for one that comes of a full or read-only disk, else None. `work` is where files are written.

    Our own errors stay what they are.
    """
    if isinstance(error, TrainerError):
        return None

    for cause in chain(error):
        number = cause.errno if isinstance(cause, OSError) else None
        where = _folder(cause) or work
        if number in FULL or any(text in str(cause) for text in _FULL_TEXTS) or _broke_off(cause, where):
            return DiskFullError(f"the disk is full{_describe_free(where)}")
        # Firewalls refuse connections by the same numbers, but then no file is named.
        if isinstance(cause, OSError) and (number == errno.EROFS or (number in FORBIDDEN and cause.filename)):
            what = f"{cause.filename} cannot be written or read" if cause.filename else "a file cannot be written"
            return TrainerError(FailureReason.STORAGE_NOT_WRITABLE, f"{what}: {cause.strerror}")
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an error and what it was raised from or during, the newest first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def free_disk(folder: Path, limit: int | None) -> int:
    """Bytes that can still be written to `folder`, of which all files may take `limit` (a pod's ephemeral storage)."""
    free: int = _usage(folder).free
    if limit is None:
        return free
    return min(free, limit - sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))


def check_room(folder: Path, needed: int, purpose: str) -> None:
    """Raises TrainerError (DiskFull) if `folder` has less than `needed` bytes left; `purpose` goes on "to ..."."""
    free: int = _usage(folder).free
    if needed > free:
        message = f"{format_size(needed)} are needed to {purpose}, but only {format_size(free)} are free in {folder}"
        raise TrainerError(FailureReason.DISK_FULL, message)


def _usage(folder: Path) -> Any:
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists()))


def _folder(error: BaseException) -> Path | None:
    """The folder of the file that the error names; of a copy, the target's."""
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return Path(os.fsdecode(name)).parent if isinstance(name, str | bytes) else None


def _broke_off(error: BaseException, where: Path | None) -> bool:
    """True for a writer that gives no reason, on a disk with nothing left."""
    if where is None or not any(text in str(error) for text in _WRITER_TEXTS):
        return False
    return free_disk(where, None) < _ALMOST_NOTHING


def _describe_free(folder: Path | None) -> str:
    if folder is None:
        return ""
    usage = _usage(folder)
    return f": {usage.free / MEBIBYTE:,.0f} of {usage.total / MEBIBYTE:,.0f} MiB are free in {folder}"
