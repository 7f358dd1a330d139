"""Locates the result of a job, given a manifest, a folder or URI, or the name of a job in the cluster."""

import re
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from pydantic import ValidationError

from finetune_api.base import SUBDOMAIN
from finetune_api.failures import FailureReason
from finetune_api.job import FineTuneJob, load_manifest, read_document
from finetune_api.run_config import JobIdentity, RunConfig
from finetune_trainer.artifacts.download import read_manifest
from finetune_trainer.artifacts.manifest import MANIFEST_NAME, Manifest
from finetune_trainer.cli.cluster_job import ClusterChoice, ClusterJobError, get_cluster_job, has_cluster
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage.folder_store import FolderStore
from finetune_trainer.storage.object_store import ObjectStore
from finetune_trainer.storage.s3_faults import OUTPUT_REASONS
from finetune_trainer.storage.s3_session import S3Location, S3Session
from finetune_trainer.storage.s3_store import S3Store

_NAME = re.compile(rf"({SUBDOMAIN}/)?{SUBDOMAIN}")


@dataclass(frozen=True)
class ResultLocation:
    """Location of a job's result: a prefix in a bucket, or a folder."""

    folder: Path | None = None
    bucket: str = ""
    prefix: str = ""
    endpoint_url: str | None = None
    region: str | None = None
    spec_digest: str | None = None
    """Digest of the specification, if the user gave a manifest or a name in the cluster."""
    note: str | None = None
    """What the user should know about this location."""

    def open(self, credentials: Path | None) -> ObjectStore:
        """Opens the storage; `credentials` is a folder like a mounted Secret, None is boto3's own chain."""
        if self.folder is not None:
            return FolderStore(self.folder)

        session = S3Session(self.bucket, S3Location(self.endpoint_url, self.region), credentials, OUTPUT_REASONS)
        return S3Store(session, self.prefix)


@dataclass(frozen=True)
class LocalResult:
    """The result of a job, in folders on this disk."""

    folder: Path
    manifest: Manifest | None = None
    """None for a downloaded result, which is only its files."""
    adapter: Path | None = None
    merged: Path | None = None
    gguf: tuple[Path, ...] = ()


def find_local_result(path: Path) -> LocalResult | None:
    """Reads the result in folder `path`, or in the only folder below it that holds one; None if there is none.

    Raises TrainerError if there are several, or if the manifest is something else.
    """
    below = sorted(each.parent for each in path.glob(f"*/{MANIFEST_NAME}"))
    if not (path / MANIFEST_NAME).is_file() and len(below) > 1:
        names = ", ".join(str(each) for each in below)
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, f"{path} holds several results, name one: {names}")

    folder = path if (path / MANIFEST_NAME).is_file() or not below else below[0]
    manifest = read_manifest(FolderStore(folder)) if (folder / MANIFEST_NAME).is_file() else None
    attempt = folder / "attempts" / manifest.attempt_id if manifest is not None else folder
    found = _list_result(attempt if attempt.is_dir() else folder, folder, manifest)
    return found if found.adapter or found.merged or found.gguf else None


def find_result_above(path: Path) -> LocalResult | None:
    """The result that the file or folder `path` is a part of; None if it stands alone."""
    for parent in path.resolve().parents[:4]:
        if (parent / MANIFEST_NAME).is_file():
            return find_local_result(parent)
    beside = path.resolve().parent if path.is_dir() else path.resolve().parents[1]
    return _list_result(beside, beside, None) if path.parent.name in ("gguf", "") else None


def _list_result(root: Path, folder: Path, manifest: Manifest | None) -> LocalResult:
    adapter, merged = root / "adapter", root / "merged"
    return LocalResult(
        folder,
        manifest,
        adapter if (adapter / "adapter_config.json").is_file() else None,
        merged if (merged / "config.json").is_file() else None,
        tuple(sorted((root / "gguf").glob("*.gguf"))),
    )


def locate_result(
    job: str,
    results: Path | None,
    endpoint_url: str | None,
    region: str | None,
    cluster: ClusterChoice = ClusterChoice(),  # noqa: B008 (frozen)
) -> ResultLocation:
    """Returns where the result of `job` is. Raises TrainerError if that cannot be found out.

    `job` is an s3:// prefix, a folder with manifest.json, a FineTuneJob's YAML file, or [namespace/]name in a cluster.
    `results` is the folder that `finetune run --output` wrote to.
    """
    path = Path(job)
    if job.startswith("s3://"):
        location = _location_of_uri(job)
    elif path.is_dir():
        location = ResultLocation(folder=path)
    elif path.is_file():
        location = _location_of_manifest(path, results, cluster)
    elif _NAME.fullmatch(job):
        location = _location_in_cluster(job, cluster)
    else:
        message = f"{job} is neither an s3:// address, a folder, a manifest nor the name of a job"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)

    return replace(location, endpoint_url=endpoint_url or location.endpoint_url, region=region or location.region)


def _location_of_uri(uri: str) -> ResultLocation:
    bucket, _, path = uri.removeprefix("s3://").partition("/")
    prefix = path.removesuffix(MANIFEST_NAME).strip("/")
    if not prefix:
        message = f"{uri} names a bucket, not a job's result in it: write s3://{bucket}/PREFIX/JOB/"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)
    return ResultLocation(bucket=bucket, prefix=prefix)


def _location_of_manifest(path: Path, results: Path | None, cluster: ClusterChoice) -> ResultLocation:
    try:
        text = path.read_text(encoding="utf-8")
        job, document = load_manifest(text), read_document(text)
    except (OSError, yaml.YAMLError, ValidationError) as error:
        message = f"{path} is not a FineTuneJob: {str(error).splitlines()[0]}; see `finetune validate {path}`"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message) from None

    config = _config(job)
    if results is not None:
        return ResultLocation(folder=results / config.job.name, spec_digest=config.spec_digest())
    by_default = _location_in_bucket(config)
    if not has_cluster(cluster):
        return by_default

    # An administrator's template may lead elsewhere, and only the job's status says where.
    namespace = cluster.namespace or document["metadata"].get("namespace")
    try:
        found = _location_in_status(get_cluster_job(config.job.name, replace(cluster, namespace=namespace)))
    except ClusterJobError as error:
        note = f"{error.message}; this is s3://{by_default.bucket}/{by_default.prefix}/, where it writes by default"
        return replace(by_default, note=note)
    return replace(found, spec_digest=config.spec_digest())


def _location_in_cluster(job: str, cluster: ClusterChoice) -> ResultLocation:
    namespace, slash, name = job.rpartition("/")
    try:
        return _location_in_status(get_cluster_job(name, replace(cluster, namespace=namespace) if slash else cluster))
    except ClusterJobError as error:
        raise ClusterJobError(f"there is no file {job}, and {error.message}", error.code) from None


def _location_in_status(job: FineTuneJob) -> ResultLocation:
    """The status knows where the result is; the specification knows how to reach that bucket."""
    if job.status.manifest_uri is None:
        message = f"{job.metadata.name} has no result yet: its phase is {job.status.phase or 'unknown'}"
        raise TrainerError(FailureReason.STORAGE_UNAVAILABLE, message)

    location = _location_of_uri(job.status.manifest_uri)
    in_bucket = _location_in_bucket(_config(job))
    return replace(in_bucket, bucket=location.bucket, prefix=location.prefix)


def _config(job: FineTuneJob) -> RunConfig:
    # A manifest file has no UID yet; the location of a result does not depend on it.
    uid = job.metadata.uid or str(uuid.uuid4())
    identity = JobIdentity(namespace=job.metadata.namespace, name=job.metadata.name, uid=uid)
    return RunConfig.from_spec(identity, job.spec, progress=None)


def _location_in_bucket(config: RunConfig) -> ResultLocation:
    s3 = config.output.s3
    if s3.bucket is None:
        message = "the manifest names no bucket: give the folder of `finetune run --output DIR` as --results DIR"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)
    return ResultLocation(
        bucket=s3.bucket,
        prefix=config.output_prefix,
        endpoint_url=s3.endpoint_url,
        region=s3.region,
        spec_digest=config.spec_digest(),
    )
