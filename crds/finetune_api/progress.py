"""Progress protocol: what the trainer posts while it runs.

The body is a superset of Kubeflow's KEP-2779 (`trainerStatus`), so that tools which know that shape can read ours;
our own part, `finetune`, carries the rest. Reports are numbered within a pod: the receiver drops what is not newer
than the last one.
"""

from datetime import datetime
from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel
from finetune_api.vocabulary import MemoryMode, Stage

MAX_BODY_BYTES = 65_536
AUDIENCE_PREFIX = "finetune.dev/"

# JSON numbers are exact up to here, and the API server refuses larger bounds on an int64.
MOST = 2**53 - 1
Count = Annotated[int, Field(ge=0, le=MOST)]
NonNegative = Annotated[float, Field(ge=0)]


def token_audience(job_uid: str) -> str:
    """Audience of the projected token with which the pods of one job report."""
    return AUDIENCE_PREFIX + job_uid


def progress_path(namespace: str, name: str) -> str:
    """Path of a job's progress endpoint on the operator's progress server."""
    return f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs/{name}/status"


class Metric(ApiModel):
    """A named number of KEP-2779; values travel as strings there."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    value: Annotated[str, Field(max_length=64)]


class TrainerStatus(ApiModel):
    """The part that KEP-2779 defines."""

    progress_percentage: Annotated[int, Field(ge=0, le=100)]
    estimated_remaining_seconds: Count | None = None
    metrics: Annotated[tuple[Metric, ...], Field(max_length=32)] = ()
    last_updated_time: datetime


class StageTimes(ApiModel):
    """When a stage ran."""

    name: Stage
    """Name of the stage."""

    start_time: datetime
    """When it began."""

    end_time: datetime | None = None
    """When it ended; absent while it runs."""


class Resolved(ApiModel):
    """What the values left to us became."""

    model_revision: str | None = None
    """Commit of an hf:// model."""

    architecture: str | None = None
    """Architecture of the base model, such as LlamaForCausalLM."""

    dataset_digest: str | None = None
    """SHA-256 over the dataset's files."""

    dataset_format: str | None = None
    """Layout that the rows were found to have."""

    rows: Count | None = None
    """Rows used for training."""

    skipped_rows: Count | None = None
    """Rows left out by onBadRow: Skip."""

    evaluation_rows: Count | None = None
    """Rows held out for evaluation."""

    evaluation_digest: str | None = None
    """SHA-256 over the files of dataset.evaluation.source or split."""

    supervised_tokens: Count | None = None
    """Tokens that carry loss, in one epoch."""

    precision: str | None = None
    """Compute type."""

    precision_reason: Annotated[str, Field(max_length=256)] | None = None
    """Why it is that one, where spec.training.precision asked for FP8."""

    device: str | None = None
    """Device that trains, such as NVIDIA H200."""

    batch_size: Count | None = None
    """Sequences in one forward pass."""

    gradient_accumulation: Count | None = None
    """Forward passes per optimiser step."""

    total_steps: Count | None = None
    """Optimiser steps of the run."""

    trainable_parameters: Count | None = None
    """Parameters of the adapter."""

    total_parameters: Count | None = None
    """Parameters of base model and adapter."""


class MemoryFallback(ApiModel):
    """Memory ran out, and the run went on with a smaller plan."""

    step: Count
    """Optimiser steps that were finished by then."""

    from_mode: MemoryMode
    """Plan that did not fit."""

    to_mode: MemoryMode
    """Plan that the run went on with."""


class MemoryUse(ApiModel):
    """The memory plan of the run, and what became of it."""

    mode: MemoryMode
    """Mode of the plan that trains: that of spec.training.memory, or a smaller one that fits."""

    predicted_peak_bytes: Count
    """Peak of GPU memory that the plan expects."""

    measured_peak_bytes: Count | None = None
    """Peak of GPU memory so far."""

    micro_batch: Count
    """Sequences in one forward pass."""

    fallbacks: Annotated[tuple[MemoryFallback, ...], Field(max_length=8)] = ()
    """How often memory ran out in this pod, oldest first."""


class RunProgress(ApiModel):
    """Our own part of a report."""

    sequence: Count
    """Number of the report within its pod, rising."""

    stage: Stage
    stages: Annotated[tuple[StageTimes, ...], Field(max_length=16)] = ()
    step: Count | None = None
    total_steps: Count | None = None
    epoch: NonNegative | None = None
    loss: float | None = None
    eval_loss: float | None = None
    best_step: Count | None = None
    best_eval_loss: float | None = None
    stopped_early: bool | None = None
    learning_rate: NonNegative | None = None
    tokens_per_second: NonNegative | None = None
    trained_tokens: Count | None = None
    gpu_memory_bytes: Count | None = None
    uploaded_bytes: Count | None = None
    upload_total_bytes: Count | None = None
    upload_bytes_per_second: NonNegative | None = None
    checkpoint_step: Count | None = None
    resumed_from_step: Count | None = None
    memory: MemoryUse | None = None
    resolved: Resolved | None = None


class ProgressReport(ApiModel):
    """Body of one POST."""

    trainer_status: TrainerStatus
    finetune: RunProgress
