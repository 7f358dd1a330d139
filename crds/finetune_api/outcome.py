"""Outcome: the trainer's final result, written to the container's termination message.

The kubelet keeps at most 4096 bytes. `encode` therefore shortens the message for people, never the fields for
machines; a list of artifacts that is still too long is compressed (about 60 bytes each, half of them the digest).
"""

import zlib
from base64 import b64decode, b64encode
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import Field

from finetune_api.base import ApiModel, Count, Message, Name, Time, Uri
from finetune_api.failures import ExitCode, FailureReason
from finetune_api.judgement import Judgement
from finetune_api.preflight import PreflightSummary
from finetune_api.progress import MemoryUse
from finetune_api.vocabulary import ArtifactType, Stage

MAX_BYTES = 4096
MAX_EXPORT_MESSAGE = 300
"""Characters that are kept of what went wrong with one export."""
MAX_ARTIFACTS = 64
MAX_DECODED_BYTES = 40_960
"""Bytes of an outcome's JSON: what the status, of at most 64 KiB, has room for."""

COMPRESSED_PREFIX = "zlib:"


class Result(StrEnum):
    """Final result of a run."""

    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    INTERRUPTED = "Interrupted"


class Artifact(ApiModel):
    """One artifact of the job, as its manifest lists it."""

    type: ArtifactType
    """Adapter, Merged, GGUF, Modelfile (Ollama's, for one GGUF file), Samples (answers during training), Metrics
    (metrics.jsonl and TensorBoard's event file), ModelCard or Configuration (resolved.yaml)."""

    uri: Uri
    """URI of one file, or of a folder (ending in /)."""

    bytes: Count
    """Size in bytes, over all files of a folder."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the file. Of a folder: SHA-256 of its lines "<sha256>  <relative path>\\n", sorted by path, as
    sha256sum prints them."""

    format: Name
    """File format: safetensors, gguf, modelfile, jsonl, markdown or yaml."""

    quantization: Name | None = None
    """Type of the weights, such as BF16 or Q8_0."""

    loss: float | None = None
    """Loss of these weights on the rows of the judgement, in nats per supervised token."""

    improvement_kept: float | None = None
    """Share of the training's improvement over the base that these weights keep on those rows; 1 is all of it."""


class FailedExport(ApiModel):
    """One artifact of the job that could not be made; everything else is published."""

    type: ArtifactType
    """Merged or GGUF."""

    quantization: Name
    """Type of the weights, such as BF16 or Q8_0."""

    message: Annotated[str, Field(max_length=MAX_EXPORT_MESSAGE)]
    """What went wrong."""


class Outcome(ApiModel):
    """Result of a run, with everything the operator needs for the status."""

    version: Literal[1] = 1
    result: Result
    reason: FailureReason | None = None
    message: Message = ""
    exit_code: ExitCode = ExitCode.SUCCESS
    stage: Stage | None = None
    """Stage in which the run ended."""
    step: Count | None = None
    """Last finished optimiser step."""
    total_steps: Count | None = None
    loss: float | None = None
    """Last training loss, in nats per supervised token."""
    eval_loss: float | None = None
    best_step: Count | None = None
    """Step whose adapter was exported, if the best one is kept."""
    best_eval_loss: float | None = None
    stopped_early: bool | None = None
    memory: MemoryUse | None = None
    energy_joules: Count | None = None
    """Energy of the pod's GPUs from the trainer's start to its end; None if nothing measures it."""
    checkpoint_step: Count | None = None
    """Step of the newest checkpoint in S3."""
    resumed_from_step: Count | None = None
    reused: bool = False
    """True if the result already existed and nothing was trained."""
    manifest_uri: Uri | None = None
    hub_url: Uri | None = None
    """Commit of the Hugging Face Hub that holds the artifacts."""
    artifacts: Annotated[tuple[Artifact, ...], Field(max_length=MAX_ARTIFACTS)] = ()
    failed_exports: Annotated[tuple[FailedExport, ...], Field(max_length=MAX_ARTIFACTS)] = ()
    """Artifacts that could not be made although training succeeded; the result is then Failed, with ExportFailed."""
    judgement: Judgement | None = None
    preflight: PreflightSummary | None = None
    """Findings of preflight; only a preflight pod sets it."""
    finished: Time
    """Time at which the trainer wrote this, UTC."""

    def encode(self) -> str:
        """Serialise to at most 4096 bytes: JSON with a shortened message, or compressed JSON if that does not suffice.

        Raises ValueError if the compressed JSON is still too long, or was too long before."""
        text = self.model_dump_json(by_alias=True, exclude_none=True)
        excess = len(text.encode()) - MAX_BYTES
        if excess <= 0:
            return text
        kept = self.message.encode()[: -excess - len("…".encode())].decode(errors="ignore") if self.message else ""
        if not kept:
            return self._compress(text)
        return self.model_copy(update={"message": kept + "…"}).model_dump_json(by_alias=True, exclude_none=True)

    @classmethod
    def decode(cls, text: str) -> Self:
        """Parse a termination message; raises ValueError (a pydantic.ValidationError, too) for anything else."""
        text = _unpack(text) if text.startswith(COMPRESSED_PREFIX) else text
        if len(text.encode()) > MAX_DECODED_BYTES:
            raise ValueError(f"the outcome has more than {MAX_DECODED_BYTES} bytes")
        return cls.model_validate_json(text)

    def _compress(self, text: str) -> str:
        if len(text.encode()) > MAX_DECODED_BYTES:
            raise ValueError(f"the outcome has {len(text.encode())} bytes: at most {MAX_DECODED_BYTES} fit the status")
        packed = COMPRESSED_PREFIX + b64encode(zlib.compress(text.encode(), 9)).decode()
        if len(packed) > MAX_BYTES:
            excess = len(packed) - MAX_BYTES
            raise ValueError(f"the outcome is {excess} bytes too long for a termination message of {MAX_BYTES}")
        return packed


def _unpack(text: str) -> str:
    """Decompress a termination message, but never more than the status has room for; raises ValueError."""
    unpacking = zlib.decompressobj()

    try:
        packed = b64decode(text.removeprefix(COMPRESSED_PREFIX), validate=True)
        return unpacking.decompress(packed, MAX_DECODED_BYTES + 1).decode()  # one byte more shows that it is too long
    except zlib.error as error:
        raise ValueError(f"the outcome cannot be decompressed: {error}") from None
