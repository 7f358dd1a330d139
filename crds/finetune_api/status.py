"""`status` of a FineTuneJob. Only the operator writes it."""

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import (
    MAX_EXACT_INTEGER,
    ApiModel,
    Count,
    Int32,
    Message,
    Name,
    NonNegative,
    Time,
    Uri,
    Word,
)
from finetune_api.cost.usage import Currency, Usage
from finetune_api.judgement import Judgement
from finetune_api.outcome import MAX_ARTIFACTS, Artifact, FailedExport
from finetune_api.preflight import PreflightSummary
from finetune_api.progress import MemoryUse, Resolved, Stages
from finetune_api.vocabulary import ConditionType, Phase, PreflightResult, Stage

ConditionReason = Annotated[
    str, Field(min_length=1, max_length=1024, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")
]
MAX_STATUS_BYTES = 65_536
MAX_ATTEMPTS = 20  # keeps the status small; retries are counted apart
NO_GENERATION = -1  # what the API server gives a new job: smaller than every generation


class Condition(ApiModel):
    """A metav1.Condition."""

    type: ConditionType
    """Type of the condition."""

    status: Literal["True", "False", "Unknown"]
    """Status of the condition: True, False or Unknown."""

    reason: ConditionReason
    """CamelCase reason for machines."""

    message: Message = ""
    """Human-readable explanation."""

    last_transition_time: Time
    """Time at which the status last changed."""

    observed_generation: Count
    """Generation of the spec that the condition was computed from."""


class ProgressStatus(ApiModel):
    """Progress of the run."""

    step: Count | None = None
    """Finished optimiser steps."""

    total_steps: Count | None = None
    """Total optimiser steps of the run."""

    epoch: NonNegative | None = None
    """Passes over the data so far."""

    percent: Annotated[int, Field(ge=0, le=100)] = 0
    """Finished share of the whole job in percent; 100 means that the artifacts are uploaded."""

    completion: Name = "0%"
    """The percentage as text, such as 47%."""

    eta_seconds: Count | None = None
    """Estimated remaining seconds."""

    eta: Name | None = None
    """The estimated remaining time as text, such as 12m30s."""

    loss: float | None = None
    """Latest training loss, in nats per supervised token."""

    eval_loss: float | None = None
    """Latest loss on the evaluation rows, in nats per supervised token."""

    best_step: Count | None = None
    """Step with the lowest evaluation loss so far, if the best adapter is kept; its adapter is exported."""

    best_eval_loss: float | None = None
    """Evaluation loss at bestStep."""

    stopped_early: bool | None = None
    """True if training stopped because the evaluation loss no longer fell."""

    learning_rate: NonNegative | None = None
    """Current learning rate."""

    tokens_per_second: NonNegative | None = None
    """Training speed, in tokens of input per second, of all GPUs together."""

    tokens_per_second_per_gpu: NonNegative | None = None
    """The same of one GPU; absent for a run on one."""

    trained_tokens: Count | None = None
    """Input tokens processed so far."""

    gpu_memory_bytes: Count | None = None
    """Peak GPU memory, in bytes."""

    uploaded_bytes: Count | None = None
    """Bytes uploaded so far."""

    upload_total_bytes: Count | None = None
    """Total bytes to upload."""

    upload_bytes_per_second: NonNegative | None = None
    """Upload speed, in bytes per second, over the last 30 seconds."""

    last_report_time: Time | None = None
    """Time at which the operator received the latest report."""

    sequence: Count | None = None
    """Number of the latest report within its pod."""


class Attempt(ApiModel):
    """One pod of the job."""

    pod: Name
    """Name of the pod."""

    uid: Name
    """UID of the pod; the pod's uploads to S3 are kept apart by it."""

    start_time: Time | None = None
    """Time at which the trainer started."""

    end_time: Time | None = None
    """Time at which the trainer ended."""

    exit_code: Int32 | None = None
    """Exit code of the trainer."""

    reason: Word | None = None
    """Reason for which the pod ended."""

    held_seconds: Count | None = None
    """Seconds that the pod has held its node, and with it the GPUs."""

    price_per_gpu_hour: NonNegative | None = None
    """Price of a GPU for an hour when the pod was made; absent if there was none."""

    currency: Currency | None = None
    """Currency of this price."""

    energy_joules: Count | None = None
    """Energy that the pod's GPUs took, as the trainer measured it; absent if it could not."""


class Failure(ApiModel):
    """Reason of a failure, and the way to fix it."""

    reason: Word
    """Machine-readable reason."""

    message: Message
    """Description of what went wrong."""

    hint: Message
    """Suggested change."""

    exit_code: Int32 | None = None
    """Exit code of the trainer."""

    stage: Stage | None = None
    """Stage in which the job failed."""

    step: Count | None = None
    """Last finished optimiser step."""


class PreflightStatus(PreflightSummary):
    """Checks that run before a GPU is requested."""

    result: PreflightResult | None = None
    """Passed or Failed; absent while the checks run. Finished checks are never run again."""

    job_name: Name | None = None
    """Name of the batch/v1 Job that runs the checks."""

    start_time: Time | None = None
    """Time at which the checks started."""

    end_time: Time | None = None
    """Time at which the checks ended."""

    attempts: Annotated[tuple[Attempt, ...], Field(max_length=MAX_ATTEMPTS)] = ()
    """Pods that ran the checks, oldest first; at most the latest 20."""


class FineTuneJobStatus(ApiModel):
    """Observed state of the job."""

    observed_generation: Annotated[int, Field(ge=NO_GENERATION, le=MAX_EXACT_INTEGER)] | None = None
    """Generation of the spec that this status describes; -1 until the operator has looked at the job."""

    phase: Phase | None = None
    """One-word summary of the job; the conditions say more."""

    reason: ConditionReason | None = None
    """Reason of the phase in one word: the stage while the trainer runs, what the job waits for, or why it failed; the
    message is that of condition Ready."""

    conditions: Annotated[
        tuple[Condition, ...],
        Field(
            max_length=len(ConditionType),
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
        ),
    ] = ()
    """Conditions of the job; Ready, Reconciling and Stalled follow kstatus."""

    preflight: PreflightStatus | None = None
    """Findings of the checks before a GPU was requested."""

    progress: ProgressStatus | None = None
    """Progress of the run."""

    stages: Annotated[
        Stages,
        Field(json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}),
    ] = ()
    """Stages of the job with their times."""

    resolved: Resolved | None = None
    """Values that the trainer chose or found, where the spec leaves them open."""

    memory: MemoryUse | None = None
    """Memory plan of the latest attempt, if it trains on a GPU with our kernels."""

    attempts: Annotated[tuple[Attempt, ...], Field(max_length=MAX_ATTEMPTS)] = ()
    """Pods of the job, oldest first; at most the latest 20."""

    usage: Usage | None = None
    """GPU time, waiting, energy and cost."""

    retries: Count | None = None
    """Number of pods that failed and were replaced."""

    checkpoint_step: Count | None = None
    """Step of the latest checkpoint in S3."""

    resumed_from_step: Count | None = None
    """Step from which the latest attempt resumed."""

    artifacts: Annotated[tuple[Artifact, ...], Field(max_length=MAX_ARTIFACTS)] = ()
    """Artifacts of the job, exactly as its manifest lists them."""

    judgement: Judgement | None = None
    """Losses that the artifacts' own are measured against, and warnings where published weights lost the training."""

    failed_exports: Annotated[tuple[FailedExport, ...], Field(max_length=MAX_ARTIFACTS)] = ()
    """Artifacts that could not be made although training succeeded; the job has then failed with ExportFailed, and
    everything that `artifacts` lists is published."""

    result_location: Uri | None = None
    """Address below which the job writes results, checkpoints and reports. It never changes."""

    manifest_uri: Uri | None = None
    """URI of the manifest, which lists the size and SHA-256 of every file."""

    hub_url: Uri | None = None
    """URL of the Hugging Face Hub commit that holds the artifacts."""

    reused: bool | None = None
    """True if the artifacts already existed and nothing was trained."""

    failure: Failure | None = None
    """Reason of the failure, and the way to fix it."""

    job_name: Name | None = None
    """Name of the child batch/v1 Job."""

    start_time: Time | None = None
    """Time at which the first trainer started."""

    completion_time: Time | None = None
    """Time at which the job finished."""

    active_seconds: Count | None = None
    """Seconds that the job has run so far, time in suspension excluded; activeDeadlineSeconds limits them."""
