"""Manifest, metrics and samples of a result, from a folder or a bucket."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from finetune_api.base import ApiModel
from finetune_trainer.artifacts.download import read_manifest
from finetune_trainer.artifacts.manifest import Manifest
from finetune_trainer.cli.find_result import find_local_result, locate_result
from finetune_trainer.storage.object_store import ObjectStore
from finetune_trainer.training.metrics_log import METRICS_FILE, MetricLine
from finetune_trainer.training.records import SAMPLES_FILE, SampleLine

Line = TypeVar("Line", bound=ApiModel)


@dataclass(frozen=True)
class Access:
    """Access to results in a bucket; None is boto3's own."""

    credentials: Path | None = None
    endpoint_url: str | None = None
    region: str | None = None


@dataclass(frozen=True)
class ReadResult:
    """One side of a comparison."""

    name: str
    manifest: Manifest
    metrics: tuple[MetricLine, ...] = ()
    samples: tuple[SampleLine, ...] = ()


def read_result(name: str, access: Access) -> ReadResult:
    """Reads the result that `name` means: an output folder, s3:// prefix, manifest file or name of a job.

    Raises TrainerError if there is none.
    """
    local = find_local_result(Path(name)) if Path(name).is_dir() else None
    job = str(local.folder) if local is not None and local.manifest is not None else name

    store = locate_result(job, None, access.endpoint_url, access.region).open(access.credentials)
    try:
        manifest = read_manifest(store)
        metrics = _read_lines(store, manifest, METRICS_FILE, MetricLine)
        return ReadResult(name, manifest, metrics, _read_lines(store, manifest, SAMPLES_FILE, SampleLine))
    finally:
        store.close()


def _read_lines(store: ObjectStore, manifest: Manifest, file: str, kind: type[Line]) -> tuple[Line, ...]:
    """The lines of one JSON Lines file of the result; none if it has no such file, or a later version's."""
    path = next((each.path for each in manifest.files() if each.path.rpartition("/")[2] == file), None)
    found = store.read(path) if path is not None else None
    if found is None:
        return ()
    try:
        return tuple(kind.model_validate_json(line) for line in found.data.decode().splitlines())
    except (ValidationError, UnicodeDecodeError):
        return ()
