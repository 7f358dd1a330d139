"""`manifest.json`: what a job made, out of what. It is written last, and readers trust nothing that it does not name.

The file list carries the size and SHA-256 of every file, so a copy of the artifacts can be checked years later
without us.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue

from finetune_api.base import ApiModel
from finetune_api.outcome import Artifact
from finetune_api.run_config import JobIdentity
from finetune_trainer.storage.digests import sha256_of_lines

MANIFEST_NAME = "manifest.json"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ManifestFile(ApiModel):
    """One file of an artifact."""

    path: Annotated[str, Field(min_length=1)]
    """Path relative to the folder that holds the manifest."""
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class ManifestArtifact(Artifact):
    """An artifact with its files."""

    files: Annotated[tuple[ManifestFile, ...], Field(min_length=1)]

    def as_artifact(self) -> Artifact:
        """The artifact as status and termination message carry it."""
        return Artifact.model_validate(self.model_dump(exclude={"files"}))


class Manifest(ApiModel):
    """A committed result."""

    version: Literal[1] = 1
    job: JobIdentity
    attempt_id: str
    """The attempt (pod) that made it."""
    spec_digest: Sha256
    """`RunConfig.spec_digest`: results of an equal specification are interchangeable."""
    model_source: str
    model_revision: str | None = None
    """Commit of an hf:// model."""
    dataset_source: str
    dataset_digest: Sha256
    created: datetime
    metrics: dict[str, float] = Field(default_factory=dict)
    """Summary of the training, such as final loss and steps."""
    configuration: dict[str, JsonValue] = Field(default_factory=dict)
    """The resolved job, without anything secret."""
    artifacts: tuple[ManifestArtifact, ...]

    def encode(self) -> bytes:
        """The file's bytes."""
        return self.model_dump_json(by_alias=True, exclude_none=True, indent=2).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read a manifest; raises pydantic.ValidationError for anything else."""
        return cls.model_validate_json(data)

    def files(self) -> list[ManifestFile]:
        """Every file of every artifact."""
        return [file for artifact in self.artifacts for file in artifact.files]


def artifact_digest(folder: str, files: tuple[ManifestFile, ...]) -> str:
    """Digest of an artifact as `finetune_api.outcome.Artifact` defines it: the file's own, or that of the `sha256sum`
    lines of a folder's files, named relative to `folder` (which ends in "/")."""
    if not folder.endswith("/"):
        return files[0].sha256
    named: Mapping[str, str] = {file.path.removeprefix(folder): file.sha256 for file in files}
    return sha256_of_lines(named)
