"""What every kind of source has in common: it lists its files before anything is fetched, so that what is unsafe,
missing or too large is refused within a second."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetune_trainer.storage.object_store import OnBytes


@dataclass(frozen=True)
class SourceAccess:
    """How a source is reached; None means the default of its kind."""

    credentials: Path | None = None
    """Folder of a mounted Secret."""
    endpoint_url: str | None = None
    """S3 store."""
    region: str | None = None
    mount: Path | None = None
    """Where a pvc:// source's claim is mounted."""
    hub_endpoint: str | None = None
    hub_patience_seconds: float = 120
    """How long a hub that does not answer is asked again."""


class Repository(Protocol):
    """A source with its files. Making one, and every method, raises TrainerError."""

    @property
    def files(self) -> dict[str, int]:
        """Relative path (with "/") to size in bytes."""
        ...

    @property
    def sha256(self) -> Mapping[str, str]:
        """SHA-256 (hex) of those files for which the source gives one."""
        ...

    @property
    def revision(self) -> str | None:
        """Commit, where the source has commits."""
        ...

    def download(self, names: Iterable[str], folder: Path, on_bytes: OnBytes) -> Path:
        """Have these files below a folder, which is returned: `folder`, or where they are already."""
        ...

    def download_size(self, names: Iterable[str]) -> int:
        """Space that `bring` needs."""
        ...
