"""`status` of a FineTuneJob: what the operator answers. Only the operator writes it."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import ApiModel
from finetune_api.outcome import Artifact
from finetune_api.preflight import PreflightSummary
from finetune_api.progress import MemoryUse, Resolved, StageTimes
from finetune_api.vocabulary import ConditionType, Phase, PreflightResult, Stage


class Condition(ApiModel):
    """A metav1.Condition."""

    type: ConditionType
    """Type of the condition."""

    status: Literal["True", "False", "Unknown"]
    """True, False or Unknown."""

    reason: Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")]
    """CamelCase reason for machines."""

    message: Annotated[str, Field(max_length=32_768)] = ""
    """Sentence for people."""

    last_transition_time: datetime
    """When status last changed."""

    observed_generation: Annotated[int, Field(ge=0)]
    """Generation of the spec that this was computed from."""


class Progress(ApiModel):
    """How far the run is."""

    step: int | None = None
    """Finished optimiser steps."""

    total_steps: int | None = None
    """Optimiser steps of the whole run."""

    epoch: float | None = None
    """Passes over the data."""

    percent: Annotated[int, Field(ge=0, le=100)] = 0
    """Share of the whole job that is done; 100 means that the artifacts are uploaded."""

    completion: str = "0%"
    """The percentage for people."""

    eta_seconds: int | None = None
    """Estimated seconds to the end."""

    eta: str | None = None
    """The estimate for people, such as 12m30s."""

    loss: float | None = None
    """Newest training loss, in nats per supervised token."""

    eval_loss: float | None = None
    """Newest loss on the held-out rows."""

    best_step: int | None = None
    """Step with the lowest evaluation loss so far, where the best adapter is kept: it is what is exported."""

    best_eval_loss: float | None = None
    """Evaluation loss of that step."""

    stopped_early: bool | None = None
    """Whether training stopped because the evaluation loss no longer fell."""

    learning_rate: float | None = None
    """Current learning rate."""

    tokens_per_second: float | None = None
    """Training speed, in tokens of input per second."""

    trained_tokens: int | None = None
    """Tokens trained on so far."""

    gpu_memory_bytes: int | None = None
    """Peak GPU memory, in bytes."""

    uploaded_bytes: int | None = None
    """Bytes uploaded so far."""

    upload_total_bytes: int | None = None
    """Bytes to upload."""

    upload_bytes_per_second: float | None = None
    """Upload speed, in bytes per second, over the last 30 seconds."""

    last_report_time: datetime | None = None
    """When the operator received the newest report."""

    sequence: int | None = None
    """Number of the newest report, within its pod."""


class Attempt(ApiModel):
    """One pod of the job."""

    pod: str
    """Name of the pod."""

    uid: str
    """UID of the pod: it also fences what the pod writes to S3."""

    start_time: datetime | None = None
    """When the trainer started."""

    end_time: datetime | None = None
    """When the trainer ended."""

    exit_code: int | None = None
    """Exit code of the trainer."""

    reason: str | None = None
    """How it ended."""


class Failure(ApiModel):
    """Why the job failed, and what to do."""

    reason: str
    """Machine-readable reason."""

    message: str
    """What was found, in a sentence."""

    hint: str
    """What to change."""

    exit_code: int | None = None
    """Exit code of the trainer."""

    stage: Stage | None = None
    """Stage in which it failed."""

    step: int | None = None
    """Last finished optimiser step."""


class PreflightStatus(PreflightSummary):
    """The checks before a GPU is asked for."""

    result: PreflightResult | None = None
    """Passed or Failed; absent while the checks run. They are never started again after either."""

    job_name: str | None = None
    """Name of the batch/v1 Job that runs the checks."""

    start_time: datetime | None = None
    """When the checks started."""

    end_time: datetime | None = None
    """When they ended."""

    attempts: tuple[Attempt, ...] = ()
    """Pods that ran the checks, oldest first; at most the newest 20."""


class FineTuneJobStatus(ApiModel):
    """What is known about the job."""

    observed_generation: int | None = None
    """Generation of the spec that this status answers."""

    phase: Phase | None = None
    """One-word summary; conditions say more."""

    conditions: Annotated[
        tuple[Condition, ...],
        Field(json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}),
    ] = ()
    """Conditions; Ready, Reconciling and Stalled follow kstatus."""

    preflight: PreflightStatus | None = None
    """What was found before a GPU was asked for."""

    progress: Progress | None = None
    """How far the run is."""

    stages: Annotated[
        tuple[StageTimes, ...],
        Field(json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}),
    ] = ()
    """The job's stages with their times."""

    resolved: Resolved | None = None
    """What the values left to us became."""

    memory: MemoryUse | None = None
    """The memory plan of the newest attempt, where a GPU trains with our kernels."""

    attempts: tuple[Attempt, ...] = ()
    """The job's pods, oldest first; at most the newest 20."""

    retries: int | None = None
    """Pods that failed and were replaced."""

    checkpoint_step: int | None = None
    """Step of the newest checkpoint in S3."""

    resumed_from_step: int | None = None
    """Step from which the newest attempt went on."""

    artifacts: tuple[Artifact, ...] = ()
    """What the job made: exactly what its manifest lists."""

    manifest_uri: str | None = None
    """Where the manifest is, which holds size and SHA-256 of every file."""

    hub_url: str | None = None
    """Commit of the Hugging Face Hub that the artifacts were pushed in."""

    reused: bool | None = None
    """Whether the artifacts were there already and nothing was trained."""

    failure: Failure | None = None
    """Why the job failed, and what to do."""

    job_name: str | None = None
    """Name of the child batch/v1 Job."""

    start_time: datetime | None = None
    """When the first trainer started."""

    completion_time: datetime | None = None
    """When the job reached its end."""

    active_seconds: int | None = None
    """Seconds of running so far, time in suspension not counted; the deadline counts these."""
