"""Download of a committed result: the files of the manifest and no others, each checked against its SHA-256.

The manifest comes from outside: a path in it that leads out of the target folder is refused.
"""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from finetune_api.failures import FailureReason
from finetune_trainer.artifacts.manifest import MANIFEST_NAME, Manifest, ManifestArtifact, ManifestFile
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage.digests import sha256_file
from finetune_trainer.storage.disk_faults import check_room
from finetune_trainer.storage.object_store import ObjectStore, OnBytes

SUMS_NAME = "SHA256SUMS"


def read_manifest(store: ObjectStore) -> Manifest:
    """Returns the manifest of the result. Raises TrainerError if there is none, or if the file is something else."""
    found = store.read(MANIFEST_NAME)
    if found is None:
        message = f"{store.uri(MANIFEST_NAME)} does not exist: the job has not finished, or its output is elsewhere"
        raise TrainerError(FailureReason.STORAGE_UNAVAILABLE, message)

    try:
        return Manifest.decode(found.data)
    except ValidationError:
        message = f"{store.uri(MANIFEST_NAME)} is not a manifest of this project"
        raise TrainerError(FailureReason.STORAGE_UNAVAILABLE, message) from None


def local_path(file: ManifestFile) -> Path:
    """Returns the path of a file below the target: without `attempts/<attempt>/`.

    Raises TrainerError for a path that could lead elsewhere.
    """
    parts = PurePosixPath(file.path).parts
    if parts[:1] == ("attempts",) and len(parts) > 2:
        parts = parts[2:]

    if not parts or file.path.startswith("/") or "\\" in file.path or {"..", "."} & set(file.path.split("/")):
        message = f"the manifest names {file.path!r}, which is not a path inside a result"
        raise TrainerError(FailureReason.STORAGE_UNAVAILABLE, message)
    return Path(*parts)


def download_artifacts(
    store: ObjectStore, artifacts: Iterable[ManifestArtifact], target: Path, on_bytes: OnBytes
) -> list[Path]:
    """Downloads every file of these artifacts below `target`, and writes SHA256SUMS for `sha256sum --check`.

    An intact file that is there already is kept. A file gets its final name when it is complete and verified. Returns
    the paths. Raises TrainerError (DiskFull; UploadCorrupted if the content is not what the manifest says).
    """
    files = [file for artifact in artifacts for file in artifact.files]
    paths = [local_path(file) for file in files]
    missing = sum(file.bytes for file, path in zip(files, paths, strict=True) if not (target / path).exists())
    check_room(target, missing, "copy the result")

    for file, path in zip(files, paths, strict=True):
        _download(store, file, target / path, on_bytes)

    # In the format of `sha256sum`, two spaces between digest and path.
    lines = sorted(f"{file.sha256}  {path.as_posix()}\n" for file, path in zip(files, paths, strict=True))
    (target / SUMS_NAME).write_text("".join(lines), encoding="utf-8")
    return [target / path for path in paths]


def _download(store: ObjectStore, file: ManifestFile, path: Path, on_bytes: OnBytes) -> None:
    if path.is_file() and path.stat().st_size == file.bytes and sha256_file(path) == file.sha256:
        on_bytes(file.bytes)
        return

    # A hidden name until the digest is right: a reader of the folder never sees half a file.
    partial = path.with_name(f".{path.name}.partial")
    try:
        store.get_file(file.path, partial, on_bytes)
        if (found := sha256_file(partial)) != file.sha256:
            message = f"{store.uri(file.path)} is not what the job made: its SHA-256 is {found}"
            raise TrainerError(FailureReason.UPLOAD_CORRUPTED, message)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
