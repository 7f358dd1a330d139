"""Reasons that are not failures: why a job is in its phase, and what happened to it, for machines.

They stand in conditions, events and `status.attempts`. Failures have a table of their own, `finetune_api.failures`.
While the trainer runs, the reason is its stage.
"""

from enum import StrEnum

from finetune_api.failures import FailureReason


class StatusReason(StrEnum):
    """Reasons that the operator gives of its own."""

    # Validating
    CHECKING = "Checking"  # preflight runs
    PREFLIGHT_PASSED = "PreflightPassed"
    # Waiting
    JOB_CREATED = "JobCreated"  # the child Job was created just now
    WAITING_FOR_POD = "WaitingForPod"  # the Job controller has not created a pod yet
    UNSCHEDULABLE = "Unschedulable"  # no node fits; the message is the scheduler's
    POD_STARTING = "PodStarting"
    RETRYING = "Retrying"  # a pod failed in a way that may pass, so another one follows
    JOB_DELETED = "JobDeleted"  # somebody deleted the child Job; it is created again when it is gone
    # Running
    TRAINER_STARTED = "TrainerStarted"  # the trainer runs and has not reported yet
    SUSPENDING = "Suspending"  # the trainer was asked to stop and writes its checkpoint
    SUSPENDED = "Suspended"
    DELETED = "Deleted"  # the FineTuneJob is being deleted
    # The end
    COMPLETED = "Completed"
    REUSED = "Reused"  # a finished result of the same job was found, so nothing was trained
    OUTCOME_LOST = "OutcomeLost"  # succeeded, but the pod was removed before its termination message was read
    # Waiting for a person
    NAME_CONFLICT = "NameConflict"  # an object of somebody else has the child's name
    INVALID_CONFIGURATION = "InvalidConfiguration"  # this version of the operator cannot read the spec
    PERMISSION_DENIED = "PermissionDenied"  # the operator's role or the namespace's quota refused a child
    CHILD_REJECTED = "ChildRejected"  # the API server refused a child as invalid
    # Of the condition Validated
    NOT_CHECKED = "NotChecked"
    INPUTS_READ = "InputsRead"
    # Of events only
    VALIDATING = "Validating"
    VALIDATED = "Validated"
    PREFLIGHT_WARNING = "PreflightWarning"
    QUEUED = "Queued"
    STARTED = "Started"
    RESUMED = "Resumed"
    SUCCEEDED = "Succeeded"
    MEMORY_FALLBACK = "MemoryFallback"  # the GPU's memory ran out, and the run continued with a smaller plan
    # Of attempts only
    POD_GONE = "PodGone"  # the pod was removed, and nobody saw its end


NEEDS_A_PERSON = frozenset(
    {
        StatusReason.NAME_CONFLICT,
        StatusReason.INVALID_CONFIGURATION,
        StatusReason.PERMISSION_DENIED,
        StatusReason.CHILD_REJECTED,
    }
)
"""Reasons for which the job is Stalled until somebody does something about it."""

WARNINGS = NEEDS_A_PERSON | {StatusReason.RETRYING, StatusReason.PREFLIGHT_WARNING, StatusReason.MEMORY_FALLBACK}
"""Reasons whose event is a Warning. Every failure's is one too; all other events are Normal."""


def is_warning(reason: str) -> bool:
    """True if an event of this reason is a Warning."""
    return reason in WARNINGS or reason in tuple(FailureReason)
