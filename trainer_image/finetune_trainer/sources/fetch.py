"""Download of a model or a dataset to this disk, with its exact identity: revision and SHA-256."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune_api.failures import FailureReason
from finetune_api.spec.sources import Scheme, Source
from finetune_trainer.errors import TrainerError
from finetune_trainer.model.safetensors_header import TensorHeader
from finetune_trainer.model.weight_files import list_weights
from finetune_trainer.sources.dataset_card import choose_from_card
from finetune_trainer.sources.front_matter import CARD, MAX_CARD_BYTES
from finetune_trainer.sources.hub import HubRepository
from finetune_trainer.sources.local import LocalRepository
from finetune_trainer.sources.repository import Repository, SourceAccess
from finetune_trainer.sources.s3 import S3Repository
from finetune_trainer.sources.selection import (
    check_names,
    choose_adapter_files,
    choose_data_files,
    choose_model_files,
)
from finetune_trainer.storage.digests import sha256_of_each, sha256_of_lines
from finetune_trainer.storage.disk_faults import check_room
from finetune_trainer.storage.object_store import OnBytes, ignore_bytes
from finetune_trainer.storage.s3_faults import DATASET_REASONS, MODEL_REASONS, FaultReasons

WEIGHTS_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class FetchedSource:
    """A model or dataset on this disk."""

    folder: Path
    files: tuple[Path, ...]
    """Below `folder`, sorted."""
    revision: str | None
    """Commit of an hf:// source."""
    digest: str
    """SHA-256 of the lines "<sha256>  <relative path>\\n" of the files, sorted by path."""
    version: str
    """Changes with the files of the source, and is known before they are read (`Repository.version`)."""


def fetch_model(uri: str, revision: str | None, work: Path, access: SourceAccess, on_bytes: OnBytes) -> FetchedSource:
    """Downloads a model folder into `work`, which is emptied first. Its README.md comes too, outside the digest.

    Raises TrainerError (ModelNotFound, ModelAccessDenied, UnsafeModel, DiskFull, HubUnavailable, StorageUnavailable).
    """
    repository = _open(uri, revision, access, MODEL_REASONS, is_model=True)
    names = choose_model_files(uri, repository.files)
    return _download(repository, names, work, on_bytes, extra=[CARD] if _has_card(repository) else [])


def fetch_model_configuration(uri: str, revision: str | None, work: Path, access: SourceAccess) -> FetchedSource:
    """Downloads a model's configuration and tokenizer, without weights, after the same checks as `fetch_model`.

    Raises the same errors.
    """
    repository = _open(uri, revision, access, MODEL_REASONS, is_model=True)
    names = choose_model_files(uri, repository.files)
    fetched = _download(repository, [name for name in names if not name.endswith(WEIGHTS_SUFFIX)], work, ignore_bytes)
    return replace(fetched, version=repository.version(names))


def find_model_version(uri: str, revision: str | None, access: SourceAccess) -> str:
    """Returns the version of a model, of which nothing is downloaded. Raises the same errors as `fetch_model`."""
    repository = _open(uri, revision, access, MODEL_REASONS, is_model=True)
    return repository.version(choose_model_files(uri, repository.files))


def fetch_weight_headers(uri: str, revision: str | None, access: SourceAccess) -> list[TensorHeader]:
    """Reads name, type, shape and place of every tensor of a model, without its weights.

    Raises the same errors as `fetch_model`, and TrainerError (InvalidConfiguration) for a damaged file.
    """
    repository = _open(uri, revision, access, MODEL_REASONS, is_model=True)
    chosen = {name: repository.files[name] for name in choose_model_files(uri, repository.files)}
    repository.download_size(chosen)  # raises for links that lead out of a claim
    return list_weights(chosen, repository.read)


def fetch_adapter(uri: str, work: Path, access: SourceAccess, on_bytes: OnBytes) -> FetchedSource:
    """Downloads a peft adapter into `work`, which is emptied first. Raises the same errors as `fetch_model`."""
    repository = _open(uri, None, access, MODEL_REASONS, is_model=True)
    return _download(repository, choose_adapter_files(uri, repository.files), work, on_bytes)


def fetch_dataset(
    uri: str, split: str, work: Path, access: SourceAccess, on_bytes: OnBytes, subset: str | None = None
) -> FetchedSource:
    """Downloads data files into `work`, which is emptied first.

    From an hf:// dataset, only the files of `split` in `subset`; without `subset`, of the subset that the dataset card
    makes the default.

    Raises TrainerError (DatasetNotFound, DatasetAccessDenied, DiskFull, HubUnavailable, StorageUnavailable).
    """
    repository = _open(uri, None, access, DATASET_REASONS, is_model=False)
    names: Iterable[str] = repository.files
    wanted: str | None = None

    if Source.parse(uri).scheme is Scheme.HUGGING_FACE:
        listed = choose_from_card(uri, _read_card(repository, work), repository.files, split, subset)
        if listed is None:  # no card, or one without a list of files: paths name split and subset
            names, wanted = _of_subset(uri, repository.files, subset), split
        else:
            names = listed

    return _download(repository, choose_data_files(uri, names, wanted), work, on_bytes)


def _read_card(repository: Repository, work: Path) -> str:
    if not _has_card(repository):
        return ""
    fetched = _download(repository, [CARD], work, ignore_bytes)
    return fetched.files[0].read_text(encoding="utf-8", errors="replace")


def _has_card(repository: Repository) -> bool:
    return 0 < repository.files.get(CARD, 0) <= MAX_CARD_BYTES


def _of_subset(uri: str, names: Iterable[str], subset: str | None) -> list[str]:
    """Returns the files in a folder with the subset's name: the meaning of a subset without a card."""
    found = [name for name in names if subset is None or subset in name.split("/")[:-1]]
    if not found:
        message = (
            f"{uri} has no subset {subset}: its README.md lists no subsets, and it has no folder with this name; "
            "correct or remove spec.dataset.subset"
        )
        raise TrainerError(FailureReason.DATASET_NOT_FOUND, message)
    return found


def _open(uri: str, revision: str | None, access: SourceAccess, reasons: FaultReasons, *, is_model: bool) -> Repository:
    source = Source.parse(uri)
    if source.scheme is Scheme.HUGGING_FACE:
        return HubRepository(source.location, "model" if is_model else "dataset", revision, access, reasons)
    if source.scheme is Scheme.S3:
        return S3Repository(source, access, reasons, is_folder=is_model)
    return LocalRepository(uri, source, access, reasons)


def _download(
    repository: Repository, names: list[str], work: Path, on_bytes: OnBytes, *, extra: Sequence[str] = ()
) -> FetchedSource:
    """Downloads `names`, which make up the source, and `extra`, which stay outside its digest."""
    check_names(names)

    # A former attempt on this node may have left half a download of another revision.
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)

    check_room(work, repository.download_size([*names, *extra]), "download the source")

    # Files that are used in place stay where they are: `folder` is then not `work`.
    folder = repository.download([*names, *extra], work, on_bytes)
    files = tuple(folder / name for name in names)
    if folder == work:
        _check_sizes(repository, names, folder)
    digests = sha256_of_each(folder, files)

    # The Hub gives the SHA-256 of large files; for the others, and for S3, the digest is only recorded.
    if damaged := [name for name in names if repository.sha256.get(name, digests[name]) != digests[name]]:
        message = f"{damaged[0]} is not the file that the hub lists: its SHA-256 is {digests[damaged[0]]}"
        raise TrainerError(repository.incomplete, message)

    return FetchedSource(folder, files, repository.revision, sha256_of_lines(digests), repository.version(names))


def _check_sizes(repository: Repository, names: Iterable[str], folder: Path) -> None:
    """Raises TrainerError for a file that is shorter or longer than its source lists it."""
    for name in names:
        found, listed = (folder / name).stat().st_size, repository.files[name]
        if found != listed:
            message = f"{name} arrived with {found:,} bytes, but its source lists {listed:,}: it was cut, or replaced"
            raise TrainerError(repository.incomplete, message)
