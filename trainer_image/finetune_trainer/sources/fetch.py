"""Bring a model or a dataset to this disk, and say exactly what was brought: revision and SHA-256.

Models: only safetensors weights, configuration and tokenizer files are fetched. Pickled weights and code never arrive
here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from finetune_api.failures import FailureReason
from finetune_api.sources import Scheme, Source
from finetune_trainer.artifacts.digests import files_below, sha256_of_files
from finetune_trainer.errors import TrainerError
from finetune_trainer.sources.hub import fetch_from_hub
from finetune_trainer.sources.s3 import fetch_from_s3

MODEL_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt")
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
DATASET_PATTERNS = tuple(f"*{suffix}" for suffix in DATA_SUFFIXES)
OnBytes = Callable[[int], None]


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


@dataclass(frozen=True)
class FetchedSource:
    """What was brought."""

    folder: Path
    files: tuple[Path, ...]
    """Below `folder`, sorted."""
    revision: str | None
    """Commit of an hf:// source."""
    digest: str
    """SHA-256 over the files' `sha256sum` lines; for a pinned hf:// source, too."""


def fetch_model(uri: str, revision: str | None, work: Path, access: SourceAccess, on_bytes: OnBytes) -> FetchedSource:
    """Bring a model folder; raises TrainerError (ModelNotFound, ModelAccessDenied, UnsafeModel, ...)."""
    found = _fetch(uri, revision, work, access, on_bytes, is_model=True)
    if not any(path.suffix == ".safetensors" for path in found.files):
        message = f"{uri} holds no safetensors weights; pickled weights (.bin, .pt) are not loaded"
        raise TrainerError(FailureReason.UNSAFE_MODEL, message)
    return found


def fetch_dataset(
    uri: str, split: str, work: Path, access: SourceAccess, on_bytes: OnBytes, max_files: int = 10_000
) -> FetchedSource:
    """Bring data files; of an hf:// dataset only those of the split. Raises TrainerError (DatasetNotFound, ...)."""
    found = _fetch(uri, None, work, access, on_bytes, is_model=False)
    files = found.files
    if uri.startswith("hf://"):
        files = tuple(path for path in files if split in path.relative_to(found.folder).as_posix())
    if not files or len(files) > max_files:
        kinds = ", ".join(DATA_SUFFIXES)
        message = f"{uri} has {len(files)} data files ({kinds}) of split {split}; 1 to {max_files} are needed"
        raise TrainerError(FailureReason.DATASET_NOT_FOUND, message)
    return FetchedSource(found.folder, files, found.revision, sha256_of_files(found.folder, files))


def _fetch(
    uri: str, revision: str | None, work: Path, access: SourceAccess, on_bytes: OnBytes, *, is_model: bool
) -> FetchedSource:
    source = Source.parse(uri)
    patterns = MODEL_PATTERNS if is_model else DATASET_PATTERNS
    folder, commit = work, None
    if source.scheme is Scheme.HUGGING_FACE:
        commit = fetch_from_hub(source.location, revision, folder, patterns, access, is_model=is_model)
    elif source.scheme is Scheme.S3:
        fetch_from_s3(source, folder, patterns, access, on_bytes, is_model=is_model)
    else:
        folder = _local_path(source, access, uri, is_model=is_model)
    files = [folder] if folder.is_file() else files_below(folder)
    kept = tuple(path for path in files if any(fnmatch(path.name, pattern) for pattern in patterns))
    root = folder.parent if folder.is_file() else folder
    return FetchedSource(root, kept, commit, sha256_of_files(root, kept) if is_model else "")


def _local_path(source: Source, access: SourceAccess, uri: str, *, is_model: bool) -> Path:
    if source.scheme is Scheme.PVC:
        assert access.mount is not None, "the operator mounts the claim of every pvc:// source"
        path = access.mount / source.path
        inside = path.resolve().is_relative_to(access.mount.resolve())
    else:
        path, inside = Path(source.path), True
    if not path.exists() or not inside:
        reason = FailureReason.MODEL_NOT_FOUND if is_model else FailureReason.DATASET_NOT_FOUND
        raise TrainerError(reason, f"{uri} does not exist")
    return path
