"""The protocol of every kind of source. A source lists its files before anything is downloaded, so that one that is
unsafe, incomplete or too large is refused within a second."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetune_api.failures import FailureReason
from finetune_api.spec.endpoints import EndpointPolicy
from finetune_trainer.storage.object_store import OnBytes
from finetune_trainer.storage.retry import HUB_RETRIES, RetryPolicy


@dataclass(frozen=True)
class SourceAccess:
    """Access to a source. None is the default of its kind."""

    credentials: Path | None = None
    """Folder of a mounted Secret."""
    endpoint_url: str | None = None
    """Address of the S3 store."""
    region: str | None = None
    """Region of the S3 store."""
    endpoints: EndpointPolicy | None = None
    """Addresses that the installation allows; None: any."""
    mount: Path | None = None
    """Folder where the claim of a pvc:// source is mounted."""
    hub_endpoint: str | None = None
    """Address of the Hugging Face Hub."""
    hub_retries: RetryPolicy = HUB_RETRIES
    hub_cache: bool = False
    """True: files of the Hub stay in its own cache on this machine, for whoever needs them again."""


class Repository(Protocol):
    """A source with its files. The constructor and every method raise TrainerError."""

    @property
    def files(self) -> dict[str, int]:
        """{relative path with "/": size in bytes}."""
        ...

    @property
    def sha256(self) -> Mapping[str, str]:
        """{relative path: SHA-256 (hex)} of those files for which the source gives one."""
        ...

    @property
    def incomplete(self) -> FailureReason:
        """Reason of a failure in which a file did not arrive as it is listed."""
        ...

    @property
    def revision(self) -> str | None:
        """Commit, if the source has commits."""
        ...

    def version(self, names: Iterable[str]) -> str:
        """Returns what changes with the files: the commit, else a digest of their names with sizes, times or ETags."""
        ...

    def download(self, names: Iterable[str], folder: Path, on_bytes: OnBytes) -> Path:
        """Downloads files and returns the folder that holds them: `folder`, or the one where they are already."""
        ...

    def read(self, name: str, start: int, end: int) -> bytes:
        """Returns bytes [start, end) of a file, without a download of the whole."""
        ...

    def download_size(self, names: Iterable[str]) -> int:
        """Returns the bytes of disk that `download` needs."""
        ...
