"""The few operations that results and checkpoints need from storage; S3 and local folders implement them.

Keys are relative to the job's prefix and use "/". When `put_file` returns, the stored content has been verified.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetune_trainer.storage.digests import FileDigest

OnBytes = Callable[[int], None]
"""Called from any thread with the number of bytes just moved."""


def ignore_bytes(_: int) -> None:
    """Ignores the count: for transfers without a progress bar."""


class PreconditionFailedError(Exception):
    """A conditional write failed: the key exists, or has changed since it was read."""


@dataclass(frozen=True)
class Version:
    """Content of an object, with the tag of this version."""

    data: bytes
    tag: str


class ObjectStore(Protocol):
    """Objects below the prefix of one job. Every method raises TrainerError if the storage fails or refuses."""

    def uri(self, key: str) -> str:
        """Returns the address of a key, for people and for the status."""
        ...

    def probe(self) -> None:
        """Writes and deletes a canary."""
        ...

    def put_file(self, key: str, path: Path, on_bytes: OnBytes) -> FileDigest:
        """Uploads a file and verifies what the storage holds."""
        ...

    def put_if(self, key: str, data: bytes, replaces: str | None) -> None:
        """Writes small content if the key does not exist (`replaces=None`) or still has the tag `replaces`.

        Raises PreconditionFailedError otherwise.
        """
        ...

    def read(self, key: str) -> Version | None:
        """Returns small content, or None if the key does not exist."""
        ...

    def get_file(self, key: str, target: Path, on_bytes: OnBytes) -> None:
        """Downloads an object into a file."""
        ...

    def size(self, key: str) -> int | None:
        """Returns the size in bytes, or None if the key does not exist."""
        ...

    def keys(self, prefix: str) -> list[str]:
        """Returns every key below a prefix that ends in "/"."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Deletes keys; those that do not exist are ignored."""
        ...

    def abort_unfinished(self, is_own: Callable[[str], bool]) -> int:
        """Discards the unfinished uploads of keys for which `is_own` holds, and returns their number."""
        ...

    def close(self) -> None:
        """Ends all waits: the process is about to end."""
        ...
