"""`manifest.json`: the files that a job made, and from which model, data and configuration. It is written last, and
readers trust only the files that it names.

It holds size and SHA-256 of every file, so a copy of the artifacts can be checked years later without this project.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue

from finetune_api.base import ApiModel
from finetune_api.judgement import Judgement
from finetune_api.outcome import Artifact, FailedExport
from finetune_api.run_config import JobIdentity, RunConfig
from finetune_trainer.storage.digests import sha256_of_lines

MANIFEST_NAME = "manifest.json"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ManifestFile(ApiModel):
    """One file of an artifact."""

    path: Annotated[str, Field(min_length=1)]
    """Path relative to the manifest's folder."""
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256

    @property
    def is_uploaded(self) -> bool:
        """True if the path leads to what an attempt uploads: a manifest is data from a store, and may name any path."""
        return self.path.startswith("attempts/") and not {"", ".", ".."} & set(self.path.split("/"))


class ManifestArtifact(Artifact):
    """An artifact with its files."""

    files: Annotated[tuple[ManifestFile, ...], Field(min_length=1)]

    def as_artifact(self) -> Artifact:
        """Returns the artifact as status and termination message carry it: without its files."""
        return Artifact.model_validate(self.model_dump(exclude={"files"}))


class Manifest(ApiModel):
    """Manifest of a committed result."""

    version: Literal[1] = 1
    job: JobIdentity
    attempt_id: str
    """The attempt that made it: UID of the job, a dot, UID of the pod."""
    spec_digest: Sha256
    """`RunConfig.spec_digest`: results with equal digests are interchangeable."""
    training_digest: Sha256 | None = None
    """`RunConfig.training_digest`: equal for results that differ in their exports only."""
    model_source: str
    model_revision: str | None = None
    """Commit of a model from the Hub."""
    model_version: str | None = None
    """`FetchedSource.version`: another one means that the model's files have changed."""
    dataset_source: str
    dataset_digest: Sha256
    evaluation_digest: Sha256 | None = None
    """Of the evaluation source, if the job has one."""
    created: datetime
    metrics: dict[str, float] = Field(default_factory=dict)
    """Summary of the training, such as final loss and steps."""
    judgement: Judgement | None = None
    """What the published weights kept of the training; None if they were not judged."""
    configuration: dict[str, JsonValue] = Field(default_factory=dict)
    """The resolved job, without anything secret."""
    artifacts: tuple[ManifestArtifact, ...]
    failed_exports: tuple[FailedExport, ...] = ()
    """Artifacts that could not be made: another run of the same training may replace this result."""

    def encode(self) -> bytes:
        """Returns the content of the file."""
        return self.model_dump_json(by_alias=True, exclude_none=True, indent=2).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Reads a manifest. Raises pydantic.ValidationError for anything else."""
        return cls.model_validate_json(data)

    def lacks_exports_of(self, config: RunConfig) -> bool:
        """True if an export failed and the run `config` trains the same, so that it may replace this result."""
        return bool(self.failed_exports) and self.training_digest == config.training_digest()

    def files(self) -> list[ManifestFile]:
        """Returns every file of every artifact."""
        return [file for artifact in self.artifacts for file in artifact.files]


def artifact_digest(folder: str, files: tuple[ManifestFile, ...]) -> str:
    """Returns the digest of an artifact as `finetune_api.outcome.Artifact` defines it.

    It is the SHA-256 of a single file, or of the `sha256sum` lines of a folder's files, with paths relative to `folder`
    (which then ends in "/").
    """
    if not folder.endswith("/"):
        return files[0].sha256

    named: Mapping[str, str] = {file.path.removeprefix(folder): file.sha256 for file in files}
    return sha256_of_lines(named)
