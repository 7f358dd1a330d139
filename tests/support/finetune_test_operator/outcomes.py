"""Ends of a small job at fixed times: what its trainer wrote last, and what the Job controller made of it."""

from datetime import UTC, datetime

from finetune_api.failures import ExitCode, FailureReason
from finetune_api.outcome import Artifact, Outcome, Result
from finetune_api.vocabulary import ArtifactType, Stage
from finetune_operator.observe.children import TrueCondition
from finetune_test_operator.snapshot_builder import NOW, at

END = datetime(2026, 11, 24, 12, 0, 10, tzinfo=UTC)
ARTIFACT = Artifact(type=ArtifactType.GGUF, uri="s3://r/a.gguf", bytes=3, sha256="b" * 64, format="gguf")
SUCCEEDED = Outcome(
    result=Result.SUCCEEDED,
    step=20,
    total_steps=20,
    loss=1.25,
    checkpoint_step=20,
    artifacts=(ARTIFACT,),
    manifest_uri="s3://r/manifest.json",
    hub_url="https://hub/acme/x/commit/1",
    finished=END,
)
BAD_ROW = Outcome(
    result=Result.FAILED,
    reason=FailureReason.INVALID_ROW,
    message="line 2",
    exit_code=ExitCode.DATA,
    stage=Stage.DATA_FORMATTING,
    step=0,
    finished=END,
)
FAILED = TrueCondition("PodFailurePolicy", "", NOW)
STAGES = [
    {"name": "ModelLoading", "startTime": at(1), "endTime": at(2)},
    {"name": "Training", "startTime": at(2)},
]
