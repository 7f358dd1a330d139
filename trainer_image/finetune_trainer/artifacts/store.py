"""Results: uploaded below the attempt's own prefix, then committed with one conditional write of `manifest.json`.

A pod that dies before the commit leaves files only below its own prefix, and the next successful attempt deletes them.
If two pods run at once, the condition lets one of them commit; the other takes the winner's result for its own.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pydantic import JsonValue, ValidationError

from finetune_api.failures import FailureReason
from finetune_api.judgement import Judgement
from finetune_api.outcome import FailedExport
from finetune_api.progress import Resolved
from finetune_api.run_config import RunConfig
from finetune_api.spec.location import attempt_name, attempt_prefix
from finetune_api.vocabulary import ArtifactType
from finetune_trainer.artifacts.existing import ReadInputs, takes_existing
from finetune_trainer.artifacts.manifest import MANIFEST_NAME, Manifest, ManifestArtifact, ManifestFile, artifact_digest
from finetune_trainer.errors import TrainerError
from finetune_trainer.stopping import finishing, run_within, stop_point
from finetune_trainer.storage.digests import files_below
from finetune_trainer.storage.folder_store import FolderStore
from finetune_trainer.storage.object_store import ObjectStore, OnBytes, PreconditionFailedError
from finetune_trainer.storage.s3_faults import OUTPUT_REASONS
from finetune_trainer.storage.s3_session import S3Location, S3Session
from finetune_trainer.storage.s3_store import S3Store

log = logging.getLogger(__name__)
CLEANUP_SECONDS = 5


@dataclass(frozen=True)
class LocalArtifact:
    """A finished artifact on this disk: a file, or a folder of files."""

    type: ArtifactType
    path: Path
    format: str
    quantization: str | None = None
    loss: float | None = None
    """On the rows of the judgement; None if these weights were not judged."""
    improvement_kept: float | None = None

    @property
    def folder(self) -> str:
        """Folder of the artifact below the attempt's prefix; a Modelfile lies beside the GGUF file that it names."""
        kind = ArtifactType.GGUF if self.type is ArtifactType.MODELFILE else self.type
        return kind.value.lower()

    @property
    def files(self) -> list[Path]:
        """Files of the artifact."""
        return files_below(self.path) if self.path.is_dir() else [self.path]


@dataclass(frozen=True)
class Provenance:
    """Origin, metrics and judgement of a result, for the manifest."""

    resolved: Resolved
    metrics: Mapping[str, float] = field(default_factory=dict)
    judgement: Judgement | None = None
    failed_exports: tuple[FailedExport, ...] = ()
    model_version: str | None = None
    """`FetchedSource.version` of the base model."""


def remove_uncommitted(folder: Path, attempt: str) -> bool:
    """Deletes what an attempt has written below a job's local folder, unless that is the job's result: returns True."""
    manifest, uploaded = folder / MANIFEST_NAME, attempt_prefix(attempt)
    if not (is_result := manifest.is_file() and uploaded in manifest.read_text(encoding="utf-8")):
        shutil.rmtree(folder / uploaded, ignore_errors=True)
    return is_result


class ArtifactStore:
    """Results of one job, read and written by one attempt (pod)."""

    def __init__(self, object_store: ObjectStore, config: RunConfig, pod_uid: str) -> None:
        self.object_store = object_store
        self.config = config
        self.attempt_id = attempt_name(config.job.uid, pod_uid)
        self._replaces: tuple[Manifest, str] | None = None
        """The result that this job may replace, and the tag of its manifest."""

    def probe(self) -> None:
        """Tests that the output can be written, and discards unfinished uploads of this job's former attempts.

        Raises TrainerError (BucketNotFound, StorageNotWritable, StorageUnavailable).
        """
        self.object_store.probe()
        if aborted := self.object_store.abort_unfinished(self._is_own):
            log.info("discarded %d unfinished uploads of former attempts", aborted)

    def find_existing(self, read_inputs: ReadInputs) -> Manifest | None:
        """Returns a finished result that this job can take for its own; None if the job has to run.

        Raises TrainerError (OutputExists) for one that is neither taken nor replaced, and the errors of `read_inputs`.
        """
        found = self._read_manifest()
        if found is None:
            return None

        if takes_existing(found[0], self.config, self.manifest_uri(), read_inputs):
            self._check_complete(found[0])
            return found[0]

        self._replaces = found  # the commit replaces this version only, not one that somebody writes meanwhile
        return None

    def publish(self, artifacts: list[LocalArtifact], provenance: Provenance, on_bytes: OnBytes) -> Manifest:
        """Uploads and verifies all artifacts, then commits.

        Returns the committed manifest: this attempt's, or the one of another attempt of this job that committed first.
        Raises TrainerError; nothing is then published.
        """
        draft = self._draft_manifest(provenance)  # before the upload: errors in it show now
        try:
            listed = tuple(self._upload(artifact, on_bytes) for artifact in artifacts)
            stop_point()
        except BaseException as error:
            self.discard_uploads(attempt_prefix(self.attempt_id), error)
            raise

        manifest = draft.model_copy(update={"artifacts": listed, "created": datetime.now(UTC)})
        try:
            with finishing():  # from here on a signal comes too late
                replaces = self._replaces[1] if self._replaces else None
                self.object_store.put_if(MANIFEST_NAME, manifest.encode(), replaces)
        except PreconditionFailedError:  # another attempt, or another job, committed while this one was training
            return self._yield_to_winner()

        self._remove_leftovers(manifest)
        return manifest

    def discard_uploads(self, prefix: str, error: BaseException | None = None) -> None:
        """Deletes what this attempt has uploaded below `prefix`, where `error` ended it; nobody else can use it.

        Not if storage is what failed. What cannot be deleted within seconds is left to the next attempt.
        """
        if isinstance(error, TrainerError) and error.reason is FailureReason.STORAGE_UNAVAILABLE:
            return

        try:
            with finishing():
                deleted = run_within(CLEANUP_SECONDS, lambda: self.object_store.delete(self.object_store.keys(prefix)))
        except (TrainerError, OSError) as failure:
            log.warning("files of this attempt were not deleted: %s", failure)
        else:
            log.info("what this attempt had uploaded %s deleted: %s", "is" if deleted else "could not be", prefix)

    def manifest_uri(self) -> str:
        """Returns the address of the manifest."""
        return self.object_store.uri(MANIFEST_NAME)

    def close(self) -> None:
        """Ends all waits of transfers: the process is about to end."""
        self.object_store.close()

    def _upload(self, artifact: LocalArtifact, on_bytes: OnBytes) -> ManifestArtifact:
        base = f"{attempt_prefix(self.attempt_id)}{artifact.folder}/"
        is_folder = artifact.path.is_dir()
        root = artifact.path if is_folder else artifact.path.parent
        location = base if is_folder else base + artifact.path.name

        files = []
        for path in artifact.files:
            key = base + path.relative_to(root).as_posix()
            digest = self.object_store.put_file(key, path, on_bytes)
            files.append(ManifestFile(path=key, bytes=digest.bytes, sha256=digest.sha256))

        return ManifestArtifact(
            type=artifact.type,
            uri=self.object_store.uri(location),
            bytes=sum(file.bytes for file in files),
            sha256=artifact_digest(location, tuple(files)),
            format=artifact.format,
            quantization=artifact.quantization,
            loss=artifact.loss,
            improvement_kept=artifact.improvement_kept,
            files=tuple(files),
        )

    def _draft_manifest(self, provenance: Provenance) -> Manifest:
        """Returns the manifest without its files: an invalid field must show before hours of upload, not after."""
        config, resolved = self.config, provenance.resolved
        if resolved.dataset_digest is None:
            raise ValueError("a result is published with the digest of its dataset")

        run: dict[str, JsonValue] = config.to_wire()
        run.pop("progress", None)  # the operator's address: no part of what was trained

        return Manifest(
            job=config.job,
            attempt_id=self.attempt_id,
            spec_digest=config.spec_digest(),
            training_digest=config.training_digest(),
            model_source=config.model.source,
            model_revision=resolved.model_revision,
            model_version=provenance.model_version,
            dataset_source=config.dataset.source,
            dataset_digest=resolved.dataset_digest,
            evaluation_digest=resolved.evaluation_digest,
            created=datetime.now(UTC),
            metrics=dict(provenance.metrics),
            judgement=provenance.judgement,
            failed_exports=provenance.failed_exports,
            configuration={"run": run, "resolved": resolved.to_wire()},
            artifacts=(),
        )

    def _yield_to_winner(self) -> Manifest:
        """Returns the manifest of the attempt that committed first, and deletes the files of this one."""
        try:
            winner = self._read_winner()
        except TrainerError as error:
            self.discard_uploads(attempt_prefix(self.attempt_id), error)
            raise

        self.discard_uploads(attempt_prefix(self.attempt_id))
        return winner

    def _read_winner(self) -> Manifest:
        found = self._read_manifest()
        if found is None or found[0].job.uid != self.config.job.uid:
            by = found[0].job.path if found else "somebody"
            message = f"{self.manifest_uri()} was changed by another job, {by}, while this one was training"
            raise TrainerError(FailureReason.OUTPUT_EXISTS, message)

        log.warning("attempt %s of this job committed first: its result is the job's result", found[0].attempt_id)
        return found[0]

    def _read_manifest(self) -> tuple[Manifest, str] | None:
        if (found := self.object_store.read(MANIFEST_NAME)) is None:
            return None

        try:
            return Manifest.decode(found.data), found.tag
        except ValidationError:
            message = (
                f"{self.object_store.uri(MANIFEST_NAME)} is not a manifest of this project: delete the file, or choose "
                "another output prefix"
            )
            raise TrainerError(FailureReason.OUTPUT_EXISTS, message) from None

    def _check_complete(self, manifest: Manifest) -> None:
        # Sizes only: digests would need a download of everything.
        for file in manifest.files():
            if (size := self.object_store.size(file.path)) != file.bytes:
                found = "is missing" if size is None else f"has {size} bytes instead of {file.bytes}"
                message = (
                    f"{self.object_store.uri(file.path)} belongs to the finished result, but {found}: delete "
                    f"{self.manifest_uri()} to train again"
                )
                raise TrainerError(FailureReason.OUTPUT_EXISTS, message)

    def _remove_leftovers(self, manifest: Manifest) -> None:
        """Deletes what failed attempts of this job left, and the files of the result that was replaced.

        An error here is only logged, and a signal only ends it: the result is committed.
        """
        kept = {file.path for file in manifest.files()}
        replaced = self._replaces[0].files() if self._replaces else []
        try:
            left = [key for key in self.object_store.keys("attempts/") if self._is_own(key)]
            left += [file.path for file in replaced if file.is_uploaded]
            self.object_store.delete(key for key in left if key not in kept)
        except TrainerError as error:
            log.warning("files of former attempts were not deleted: %s", error.message)

    def _is_own(self, key: str) -> bool:
        """True if an attempt of this job wrote the key; what others wrote beside or below it is left alone."""
        return any(part.startswith(attempt_name(self.config.job.uid, "")) for part in key.split("/"))


def open_store(config: RunConfig, pod_uid: str, credentials: Path | None, folder: Path | None) -> ArtifactStore:
    """Returns the store of the job's results, in S3 or below `folder`, for one pod.

    `credentials` is the folder of a mounted Secret; None is boto3's default chain.
    """
    return ArtifactStore(open_object_store(config, credentials, folder), config, pod_uid)


def open_object_store(config: RunConfig, credentials: Path | None, folder: Path | None) -> ObjectStore:
    """Returns the storage below the job's prefix, in S3 or below `folder`."""
    if folder is not None:
        return FolderStore(folder / config.job.name)

    s3 = config.output.s3
    if s3.bucket is None:
        message = "spec.output.s3.bucket is missing: write it, or give a folder with --output DIR"
        raise TrainerError(FailureReason.INVALID_CONFIGURATION, message)
    where = S3Location(s3.endpoint_url, s3.region, config.endpoints)
    return S3Store(S3Session(s3.bucket, where, credentials, OUTPUT_REASONS), config.output_prefix)
