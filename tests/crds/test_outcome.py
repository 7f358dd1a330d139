"""The termination message: 4096 bytes, whatever a job made."""

import hashlib
from datetime import UTC, datetime
from itertools import pairwise

import pytest

from finetune_api.failures import ExitCode, FailureReason
from finetune_api.outcome import COMPRESSED_PREFIX, MAX_BYTES, Artifact, Outcome, Result
from finetune_api.progress import MemoryFallback, MemoryUse
from finetune_api.vocabulary import ArtifactType, MemoryMode

NOW = datetime(2026, 11, 24, tzinfo=UTC)


def made(count: int) -> Outcome:
    """A success with `count` artifacts, whose digests cannot be compressed."""
    place = "s3://acme-models/team-a/everything/attempts/0b1c2d3e-4f50-6172-8394-a5b6c7d8e9f0/gguf/everything"
    artifacts = tuple(
        Artifact(
            type=ArtifactType.GGUF if index % 2 else ArtifactType.MODELFILE,
            uri=f"{place}-Q{index}.gguf",
            bytes=10**9 + index,
            sha256=hashlib.sha256(str(index).encode()).hexdigest(),
            format="gguf",
            quantization=f"Q{index}_K",
        )
        for index in range(count)
    )
    modes = (MemoryMode.FASTEST, MemoryMode.BALANCED, MemoryMode.SMALLEST)
    fallbacks = tuple(
        MemoryFallback(step=10**6 + step, from_mode=before, to_mode=after)
        for step, (before, after) in enumerate(pairwise(modes))
    )
    memory = MemoryUse(
        mode=MemoryMode.SMALLEST,
        predicted_peak_bytes=10**11,
        measured_peak_bytes=10**11,
        micro_batch=8,
        streamed_layers=42,
        fallbacks=fallbacks,
    )
    return Outcome(
        result=Result.SUCCEEDED,
        artifacts=artifacts,
        finished=NOW,
        best_step=10**6,
        best_eval_loss=1.2345,
        stopped_early=True,
        memory=memory,
    )


@pytest.mark.parametrize("count", [3, 12, 36], ids=["a few", "about as many as fit", "every GGUF type with Modelfile"])
def test_every_artifact_arrives(count: int) -> None:
    outcome = made(count)
    text = outcome.encode()
    assert len(text.encode()) <= MAX_BYTES
    assert Outcome.decode(text) == outcome
    assert text.startswith(COMPRESSED_PREFIX) == (count == 36) or count == 12


def test_a_long_message_is_cut_and_stays_readable() -> None:
    failed = Outcome(
        result=Result.FAILED,
        reason=FailureReason.INVALID_ROW,
        message="é" * 9000,
        exit_code=ExitCode.DATA,
        finished=NOW,
    )
    text = failed.encode()
    assert len(text.encode()) <= MAX_BYTES
    assert Outcome.decode(text).message.endswith("é…")


@pytest.mark.parametrize("text", ["zlib:", "zlib:!!", "zlib:AAAA", "zlib:eJwDAAAAAAE=", "{", ""])
def test_anything_else_is_no_outcome(text: str) -> None:
    with pytest.raises(ValueError):
        Outcome.decode(text)
