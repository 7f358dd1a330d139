"""Progress protocol: the reports that a trainer posts while it runs.

The body is a superset of Kubeflow's KEP-2779 (`trainerStatus`), so tools that read that shape can read ours; our own
part, `finetune`, carries the rest. Reports are numbered within a pod: the receiver drops a report that is not newer
than the last one.
"""

from typing import Annotated

from pydantic import AfterValidator, Field

from finetune_api.base import ApiModel, Count, Name, NonNegative, Share, Time
from finetune_api.vocabulary import Batching, MemoryMode, Parallelism, Stage

MAX_BODY_BYTES = 65_536
AUDIENCE_PREFIX = "finetune.dev/"


def token_audience(job_uid: str) -> str:
    """Audience of the projected token that one job's pods report with."""
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
    last_updated_time: Time


class StageTimes(ApiModel):
    """Start and end of a stage."""

    name: Stage
    """Name of the stage."""

    start_time: Time
    """Time at which the stage started."""

    end_time: Time | None = None
    """Time at which the stage ended; absent while it runs."""


def _each_once(stages: tuple[StageTimes, ...]) -> tuple[StageTimes, ...]:
    """Raise ValueError if a stage is listed twice: the status lists stages by name."""
    if len({stage.name for stage in stages}) < len(stages):
        raise ValueError("list each stage once")
    return stages


Stages = Annotated[tuple[StageTimes, ...], Field(max_length=16), AfterValidator(_each_once)]


class Resolved(ApiModel):
    """Values that the trainer chose or found, where the spec leaves them open."""

    model_revision: Name | None = None
    """Commit of an hf:// model."""

    architecture: Name | None = None
    """Architecture of the base model, such as LlamaForCausalLM."""

    dataset_digest: Name | None = None
    """SHA-256 over all files of the dataset."""

    dataset_format: Name | None = None
    """Detected layout of the rows."""

    rows: Count | None = None
    """Rows used for training."""

    skipped_rows: Count | None = None
    """Rows left out by onBadRow: Skip."""

    evaluation_rows: Count | None = None
    """Rows held out for evaluation."""

    evaluation_digest: Name | None = None
    """SHA-256 over the files of dataset.evaluation.source or split."""

    supervised_tokens: Count | None = None
    """Tokens that carry loss, in one epoch."""

    precision: Name | None = None
    """Compute type used for training."""

    precision_reason: Annotated[str, Field(max_length=256)] | None = None
    """Why this compute type was chosen, if spec.training.precision asked for FP8."""

    device: Name | None = None
    """Device that trains, such as NVIDIA H200."""

    batch_size: Count | None = None
    """Sequences in one forward pass."""

    gradient_accumulation: Count | None = None
    """Forward passes per optimiser step."""

    batching: Batching | None = None
    """Arrangement of the documents of a forward pass: Packed, unless the model's packed documents see each other."""

    batching_reason: Annotated[str, Field(max_length=256)] | None = None
    """Why documents are not packed, and what that costs; absent if they are."""

    padding_share: Share | None = None
    """Share of the computed tokens that are padding, if rows are padded."""

    world_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Processes that train together, one a GPU; absent for one."""

    parallelism: Parallelism | None = None
    """Placement of the base model on the GPUs, if several processes train: Replicated or Sharded."""

    base_bytes_per_process: Count | None = None
    """Bytes of the base model that each process keeps, if several train."""

    slowest_rank_share: Share | None = None
    """Share of the tokens that the busiest process trains on; the others wait for it. At best 1 / worldSize."""

    new_tokens: Count | None = None
    """Tokens that spec.model.newTokens added to the vocabulary; absent for none."""

    embedding_rows: Count | None = None
    """Rows of the embedding with the new tokens, which is vocab_size of the merged model; absent without new tokens."""

    total_steps: Count | None = None
    """Optimiser steps of the run."""

    trainable_parameters: Count | None = None
    """Parameters of the adapter."""

    total_parameters: Count | None = None
    """Parameters of base model and adapter."""

    expert_rank: Count | None = None
    """Rank of the adapters on a mixture's experts; absent if they have none."""

    adapted_share: Share | None = None
    """Share of the layers' weights that get an adapter, from 0 to 1; embeddings and head are not counted."""

    quantized_share: Share | None = None
    """Share of the layers' weights that are in NF4, from 0 to 1."""


class MemoryFallback(ApiModel):
    """One time that GPU memory ran out and training continued with a smaller memory plan."""

    step: Count
    """Optimiser steps finished when memory ran out."""

    from_mode: MemoryMode
    """Memory mode that did not fit."""

    to_mode: MemoryMode
    """Memory mode that training continued with."""


class MemoryUse(ApiModel):
    """The memory plan of a run, with predicted and measured use."""

    mode: MemoryMode
    """Memory mode in use: that of spec.training.memory, or a smaller one that fits."""

    predicted_peak_bytes: Count
    """Peak GPU memory that the plan predicts, in bytes."""

    measured_peak_bytes: Count | None = None
    """Peak GPU memory measured so far, in bytes."""

    micro_batch: Count
    """Sequences in one forward pass."""

    streamed_layers: Count | None = None
    """Layers whose frozen weights stream from host memory; absent if all are on the GPU."""

    fallbacks: Annotated[tuple[MemoryFallback, ...], Field(max_length=8)] = ()
    """Fallbacks to smaller plans in this pod, oldest first."""


class RunProgress(ApiModel):
    """Our own part of a report."""

    sequence: Count
    """Number of the report within its pod, strictly rising."""

    stage: Stage
    stages: Stages = ()
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
    energy_joules: Count | None = None
    """Energy of the pod's GPUs since the trainer started; None if nothing measures it."""
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
