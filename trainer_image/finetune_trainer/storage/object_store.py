"""The few operations that results and checkpoints need from storage: implemented by S3 and by a local folder.

Keys are relative to the job's prefix and use "/". Whoever implements this has verified the content when `put_file`
returns.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetune_trainer.storage.digests import FileDigest

OnBytes = Callable[[int], None]
"""Called from any thread with the number of bytes just moved."""


def ignore_bytes(_: int) -> None:
    """For transfers that nobody watches."""


class PreconditionFailedError(Exception):
    """A conditional write lost: the key exists, or is no longer the version that was seen."""


@dataclass(frozen=True)
class Version:
    """An object's content with the tag that identifies this version of it."""

    data: bytes
    tag: str


class ObjectStore(Protocol):
    """Objects below one job's prefix. Every method raises TrainerError for storage that fails or refuses."""

    def uri(self, key: str) -> str:
        """Where a key is, for people and for status."""
        ...

    def probe(self) -> None:
        """Write and delete a canary."""
        ...

    def put_file(self, key: str, path: Path, on_bytes: OnBytes) -> FileDigest:
        """Upload a file and verify what the storage holds."""
        ...

    def put_if(self, key: str, data: bytes, replaces: str | None) -> None:
        """Write small content only where the key is absent (`replaces=None`) or still has that tag.

        Raises PreconditionFailedError.
        """
        ...

    def read(self, key: str) -> Version | None:
        """Small content, or None where the key is absent."""
        ...

    def get_file(self, key: str, target: Path, on_bytes: OnBytes) -> None:
        """Download an object."""
        ...

    def size(self, key: str) -> int | None:
        """Size in bytes, or None where the key is absent."""
        ...

    def keys(self, prefix: str) -> list[str]:
        """Every key below a prefix ending in "/"."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove keys; absent ones are no error."""
        ...

    def abort_unfinished(self) -> int:
        """Discard unfinished uploads below the prefix; says how many."""
        ...

    def close(self) -> None:
        """Let nothing wait any longer: the process is about to end."""
        ...
