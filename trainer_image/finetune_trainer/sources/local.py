"""Sources that are used in place: a mounted PersistentVolumeClaim (pvc://), or a path of this machine (file://)."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from finetune_api.failures import FailureReason
from finetune_api.spec.sources import Scheme, Source
from finetune_trainer.errors import TrainerError
from finetune_trainer.model.weight_files import read_range
from finetune_trainer.sources.repository import SourceAccess
from finetune_trainer.storage.digests import files_below, sha256_of_lines
from finetune_trainer.storage.object_store import OnBytes
from finetune_trainer.storage.s3_faults import FaultReasons


class LocalRepository:
    """A folder, or one file. In a claim, links that lead out of it are refused."""

    revision = None
    incomplete = FailureReason.INVALID_CONFIGURATION
    sha256: Mapping[str, str] = MappingProxyType({})

    def __init__(self, uri: str, source: Source, access: SourceAccess, reasons: FaultReasons) -> None:
        path = Path(source.path)
        root = Path("/")  # on the user's own machine, links may lead anywhere

        if source.scheme is Scheme.PVC:
            if access.mount is None:
                message = (
                    f"{uri} can only be read in a cluster, where its claim is mounted: use file:// on this machine"
                )
                raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)
            # A claim may hold links that others made: what lies outside of it is the pod's own disk.
            root, path = access.mount.resolve(), access.mount / source.path

        self._uri, self._reasons = uri, reasons
        self._folder = path.parent if path.is_file() else path
        resolved = {found.relative_to(self._folder).as_posix(): found.resolve() for found in _files(path)}
        self._outside = {name for name, target in resolved.items() if not target.is_relative_to(root)}
        self.files = {name: 0 if name in self._outside else target.stat().st_size for name, target in resolved.items()}

        if not self.files:
            found = "is an empty folder" if path.is_dir() else "does not exist"
            raise TrainerError(reasons.key_missing, f"{uri} {found}")

    def version(self, names: Iterable[str]) -> str:
        """Returns the SHA-256 of names, sizes and times of the last change."""
        found = {name: (self._folder / name).stat() for name in names}
        return sha256_of_lines({name: f"{stat.st_size} {stat.st_mtime_ns}" for name, stat in found.items()})

    def download_size(self, names: Iterable[str]) -> int:
        """Returns 0: nothing is copied. Raises TrainerError for a link that leads out of the claim."""
        if leading_out := sorted(self._outside.intersection(names)):
            message = (
                f"{self._uri}: {leading_out[0]} is a link that leads out of the claim, and such links are not "
                "followed: copy the file into the claim"
            )
            raise TrainerError(self._reasons.key_missing, message)
        return 0

    def download(self, names: Iterable[str], folder: Path, on_bytes: OnBytes) -> Path:
        """Returns the folder itself."""
        return self._folder

    def read(self, name: str, start: int, end: int) -> bytes:
        """Returns bytes [start, end) of a file, or fewer if it ends before."""
        self.download_size([name])
        return read_range(self._folder / name, start, end)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else files_below(path)
