"""Reasons that are not failures: why a job is in its phase, and what happened to it, for machines.

They stand in conditions, events and `status.attempts`. Failures have a table of their own, `finetune_api.failures`.
While the trainer runs, the reason is its stage.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from finetune_api.failures import FailureReason


class StatusReason(StrEnum):
    """Reasons that the operator gives of its own. `STATUS_REASONS` says what each means."""

    CHECKING = "Checking"
    PREFLIGHT_PASSED = "PreflightPassed"
    JOB_CREATED = "JobCreated"
    WAITING_FOR_POD = "WaitingForPod"
    WAITING_IN_QUEUE = "WaitingInQueue"
    EVICTED_BY_QUEUE = "EvictedByQueue"
    GPU_LIMIT_REACHED = "GpuLimitReached"
    POD_STARTING = "PodStarting"
    RETRYING = "Retrying"
    JOB_DELETED = "JobDeleted"
    PREDECESSOR_RUNNING = "PredecessorRunning"
    TRAINER_STARTED = "TrainerStarted"
    NOT_REPORTING = "NotReporting"
    ENDING = "Ending"
    SUSPENDING = "Suspending"
    GPU_BUDGET_SPENT = "GpuBudgetSpent"
    QUEUE_DECIDES = "QueueDecides"
    QUEUE_NOT_FOUND = "QueueNotFound"
    QUEUE_REQUIRED = "QueueRequired"
    QUEUE_DEACTIVATED = "QueueDeactivated"
    JOB_SET_UNAVAILABLE = "JobSetUnavailable"
    SUSPENDED = "Suspended"
    DELETED = "Deleted"
    COMPLETED = "Completed"
    REUSED = "Reused"
    OUTCOME_LOST = "OutcomeLost"
    NAMESPACE_DENIED = "NamespaceDenied"
    NAME_CONFLICT = "NameConflict"
    INVALID_CONFIGURATION = "InvalidConfiguration"
    PERMISSION_DENIED = "PermissionDenied"
    CHILD_REJECTED = "ChildRejected"
    PROGRESSING = "Progressing"
    WAITING_FOR_PERSON = "WaitingForPerson"
    NOT_RUNNING = "NotRunning"
    NOT_FINISHED = "NotFinished"
    NOT_SUSPENDED = "NotSuspended"
    FINISHED = "Finished"
    NOT_CHECKED = "NotChecked"
    INPUTS_READ = "InputsRead"
    VALIDATING = "Validating"
    VALIDATED = "Validated"
    PREFLIGHT_WARNING = "PreflightWarning"
    EXPORT_WARNING = "ExportWarning"
    QUEUED = "Queued"
    STARTED = "Started"
    RESUMED = "Resumed"
    SUCCEEDED = "Succeeded"
    MEMORY_FALLBACK = "MemoryFallback"
    PRECISION_FALLBACK = "PrecisionFallback"
    POD_GONE = "PodGone"


@dataclass(frozen=True)
class ReasonClass:
    """Meaning of a reason, and the places where it stands."""

    meaning: str
    in_conditions: bool = True
    event: Literal["Normal", "Warning"] | None = None
    """Type of the Event with this reason; None if there is none."""

    is_stalled: bool = False
    """True if the job then waits for a person. For the page of reasons; the condition follows `Decision.is_stalled`."""


def _needs_a_person(meaning: str) -> ReasonClass:
    return ReasonClass(meaning, event="Warning", is_stalled=True)


def _event_only(meaning: str, event: Literal["Normal", "Warning"] = "Normal") -> ReasonClass:
    return ReasonClass(meaning, in_conditions=False, event=event)


STATUS_REASONS: dict[StatusReason, ReasonClass] = {
    # Validating
    StatusReason.CHECKING: ReasonClass("Preflight runs."),
    StatusReason.PREFLIGHT_PASSED: ReasonClass("Model, dataset and output are usable."),
    # Waiting
    StatusReason.JOB_CREATED: ReasonClass("The batch/v1 Job was created just now."),
    StatusReason.WAITING_FOR_POD: ReasonClass("The Job controller has not created a pod yet."),
    StatusReason.WAITING_IN_QUEUE: ReasonClass("Kueue has not admitted the Job yet; the message says for what."),
    StatusReason.EVICTED_BY_QUEUE: ReasonClass(
        "Kueue has stopped the trainer, for a job of higher priority for example; it goes on once it is admitted again."
    ),
    StatusReason.GPU_LIMIT_REACHED: ReasonClass(
        "The namespace's jobs use all GPUs that the administrator allows (maxGpusPerNamespace); the message has them."
    ),
    StatusReason.POD_STARTING: ReasonClass("The pod has a node, and its container does not run yet."),
    StatusReason.RETRYING: ReasonClass("A pod failed in a way that may pass, so another one follows.", event="Warning"),
    StatusReason.JOB_DELETED: ReasonClass("Somebody deleted the batch/v1 Job; it is created again."),
    StatusReason.PREDECESSOR_RUNNING: ReasonClass("A deleted FineTuneJob of the same name still has a pod that runs."),
    # Running
    StatusReason.STARTED: ReasonClass("The trainer runs in a new pod (Queued, Running).", event="Normal"),
    StatusReason.TRAINER_STARTED: ReasonClass("The trainer runs and has not reported yet."),
    StatusReason.NOT_REPORTING: ReasonClass(
        "The trainer has reported before and is silent; its pod is evicted unless it reports.", event="Warning"
    ),
    StatusReason.ENDING: ReasonClass(
        "The last pod has ended; the Job controller has not said yet that the Job failed."
    ),
    StatusReason.SUSPENDING: ReasonClass("The trainer was asked to stop and is writing its checkpoint."),
    StatusReason.GPU_BUDGET_SPENT: ReasonClass(
        "The GPU time of spec.runPolicy.maxGpuSeconds is spent; the trainer was asked to stop and stores a checkpoint."
    ),
    StatusReason.SUSPENDED: ReasonClass("spec.runPolicy.suspend is true, and no pod runs.", event="Normal"),
    StatusReason.DELETED: ReasonClass("The FineTuneJob is being deleted."),
    # The end
    StatusReason.SUCCEEDED: ReasonClass("The job has succeeded (Failed).", event="Normal"),
    StatusReason.COMPLETED: ReasonClass("Every artifact is uploaded and verified."),
    StatusReason.REUSED: ReasonClass("A finished result of the same job was found, so nothing was trained."),
    StatusReason.OUTCOME_LOST: ReasonClass("The run succeeded, but its pod was removed before its result was read."),
    # Waiting for a person
    StatusReason.QUEUE_DECIDES: _needs_a_person(
        "spec.runPolicy.suspend is true, but only Kueue may suspend the Job: its Workload is to be deactivated."
    ),
    StatusReason.QUEUE_NOT_FOUND: _needs_a_person(
        "spec.scheduling.queueName names no LocalQueue, or Kueue is missing."
    ),
    StatusReason.QUEUE_REQUIRED: _needs_a_person("Kueue holds every Job of the namespace that names no queue."),
    StatusReason.QUEUE_DEACTIVATED: _needs_a_person(
        "Somebody, or Kueue itself after too many evictions, has deactivated or finished the job's Workload."
    ),
    StatusReason.JOB_SET_UNAVAILABLE: _needs_a_person(
        "spec.resources.multiNode is JobSet, and the cluster, or the operator's rights, have none; or its Job is gone."
    ),
    StatusReason.NAMESPACE_DENIED: _needs_a_person("The operator runs no jobs in this namespace."),
    StatusReason.NAME_CONFLICT: _needs_a_person("An object of somebody else has the name of a child."),
    StatusReason.INVALID_CONFIGURATION: _needs_a_person("This version of the operator cannot read the spec."),
    StatusReason.PERMISSION_DENIED: _needs_a_person("The operator's role does not let it read or make a child."),
    StatusReason.CHILD_REJECTED: _needs_a_person("The API server refused a child as invalid."),
    # Of single conditions: what a condition says that is not what the job is about
    StatusReason.PROGRESSING: ReasonClass("The job goes on by itself (Reconciling, Stalled)."),
    StatusReason.WAITING_FOR_PERSON: ReasonClass(
        "The job waits for a person; condition Stalled says for what (Reconciling)."
    ),
    StatusReason.NOT_RUNNING: ReasonClass("No pod of the trainer runs (Running)."),
    StatusReason.NOT_FINISHED: ReasonClass("The job is not over (Succeeded, Failed)."),
    StatusReason.NOT_SUSPENDED: ReasonClass("The job is not suspended (Suspended)."),
    StatusReason.FINISHED: ReasonClass("The job is over (all but Ready, Validated, Succeeded and Failed)."),
    StatusReason.NOT_CHECKED: ReasonClass("Nothing has read model and dataset to the end (Validated)."),
    StatusReason.INPUTS_READ: ReasonClass("The trainer has read model and dataset (Validated)."),
    # Of events only
    StatusReason.VALIDATING: _event_only("Preflight begins."),
    StatusReason.PREFLIGHT_WARNING: _event_only("Preflight passed, with findings to look at.", "Warning"),
    StatusReason.EXPORT_WARNING: _event_only("Published weights lost part of the training.", "Warning"),
    StatusReason.VALIDATED: _event_only("Preflight passed; the message says what it found."),
    StatusReason.QUEUED: _event_only("The job waits for its trainer."),
    StatusReason.RESUMED: _event_only("The job continues after a suspension."),
    StatusReason.MEMORY_FALLBACK: _event_only("GPU memory ran out, and the run continued with less.", "Warning"),
    StatusReason.PRECISION_FALLBACK: _event_only("The job asks for FP8, and trains in BF16; why.", "Warning"),
    # Of attempts only
    StatusReason.POD_GONE: ReasonClass("The pod was removed, and nobody saw its end.", in_conditions=False),
}


def is_warning(reason: str) -> bool:
    """True if an Event with this reason is a Warning: that of every failure, and those that the table says."""
    if reason in tuple(StatusReason):
        return STATUS_REASONS[StatusReason(reason)].event == "Warning"
    return reason in tuple(FailureReason)
