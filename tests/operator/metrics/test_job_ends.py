"""What a status write is counted as: each stage, retry and end once."""

from datetime import timedelta
from typing import Any

import pytest

from finetune_api.outcome import Artifact
from finetune_api.progress import StageTimes
from finetune_api.status import Attempt, FineTuneJobStatus, ProgressStatus
from finetune_api.vocabulary import ArtifactType, Phase, Stage
from finetune_operator.metrics.job_ends import count_write
from finetune_operator.metrics.series import REGISTRY
from finetune_test_operator.snapshot_builder import NOW


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.fixture
def changes() -> Any:
    """Returns by how much a series has grown since the test began."""
    before: dict[Any, float] = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            before[sample.name, tuple(sorted(sample.labels.items()))] = sample.value

    def grown(name: str, **labels: str) -> float:
        return value(name, **labels) - before.get((name, tuple(sorted(labels.items()))), 0.0)

    return grown


def stage(name: Stage, start: float, end: float | None) -> StageTimes:
    times = [NOW + timedelta(seconds=each) if each is not None else None for each in (start, end)]
    return StageTimes.model_validate({"name": name, "start_time": times[0], "end_time": times[1]})


RUNNING = FineTuneJobStatus(
    phase=Phase.RUNNING,
    attempts=(Attempt(pod="p-1", uid="1"),),
    progress=ProgressStatus(step=120),
    stages=(stage(Stage.MODEL_LOADING, 0, None),),
)


def test_a_stage_is_counted_when_it_ends_and_never_again(changes: Any) -> None:
    ended = RUNNING.model_copy(update={"stages": (stage(Stage.MODEL_LOADING, 0, 40), stage(Stage.TRAINING, 40, None))})
    count_write(RUNNING, ended, 60)
    count_write(ended, ended, 60)
    assert changes("finetune_stage_duration_seconds_count", stage="ModelLoading") == 1
    assert changes("finetune_stage_duration_seconds_sum", stage="ModelLoading") == 40
    assert changes("finetune_stage_duration_seconds_count", stage="Training") == 0


@pytest.mark.parametrize(
    ("said", "counted"),
    [
        ("Evicted", "Evicted"),
        ("CudaOutOfMemory", "CudaOutOfMemory"),
        ("a word that a pod made up", "Other"),
        (None, "Other"),
    ],
)
def test_a_retry_is_counted_by_a_reason_of_ours(said: str | None, counted: str, changes: Any) -> None:
    former = RUNNING.attempts[0].model_copy(update={"reason": said})
    resumed = RUNNING.model_copy(update={"attempts": (former, Attempt(pod="p-2", uid="2")), "resumed_from_step": 100})
    count_write(RUNNING, resumed, 60)
    count_write(resumed, resumed, 60)
    assert changes("finetune_retries_total", reason=counted) == 1
    assert changes("finetune_lost_steps_total") == 20


def test_an_end_is_counted_once_with_its_reason_time_and_bytes(changes: Any) -> None:
    artifacts = tuple(
        Artifact(type=kind, uri="s3://r/x", bytes=size, sha256="a" * 64, format="f")
        for kind, size in ((ArtifactType.ADAPTER, 10), (ArtifactType.GGUF, 300))
    )
    over = RUNNING.model_copy(update={"phase": Phase.SUCCEEDED, "reason": "Completed", "artifacts": artifacts})
    count_write(RUNNING, over, 3600)
    count_write(over, over.model_copy(update={"observed_generation": 2}), 7200)
    assert changes("finetune_job_completions_total", result="Succeeded", reason="Completed") == 1
    assert changes("finetune_job_duration_seconds_sum", result="Succeeded") == 3600
    assert changes("finetune_artifact_bytes_total", type="GGUF") == 300


def test_a_reused_result_is_neither_a_training_nor_an_upload(changes: Any) -> None:
    artifact = Artifact(type=ArtifactType.GGUF, uri="s3://r/x", bytes=300, sha256="a" * 64, format="f")
    over = RUNNING.model_copy(
        update={"phase": Phase.SUCCEEDED, "reason": "Reused", "reused": True, "artifacts": (artifact,)}
    )
    count_write(RUNNING, over, 5)
    assert changes("finetune_job_completions_total", result="Reused", reason="Reused") == 1
    assert changes("finetune_job_completions_total", result="Succeeded", reason="Reused") == 0
    assert changes("finetune_artifact_bytes_total", type="GGUF") == 0
