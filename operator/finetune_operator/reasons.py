"""Reasons of conditions and events that the operator gives itself; for failures see `finetune_api.failures`, and while
the trainer runs the reason is its stage."""

from enum import StrEnum


class Reason(StrEnum):
    """Why a job is in its phase, for machines."""

    # Validating
    CHECKING = "Checking"  # preflight runs
    PREFLIGHT_PASSED = "PreflightPassed"
    # Waiting
    JOB_CREATED = "JobCreated"  # the child Job was made just now
    WAITING_FOR_POD = "WaitingForPod"  # the Job controller has not made a pod yet
    UNSCHEDULABLE = "Unschedulable"  # no node fits; the message is the scheduler's
    POD_STARTING = "PodStarting"
    RETRYING = "Retrying"  # a pod failed in a way that may pass, another one follows
    JOB_DELETED = "JobDeleted"  # somebody deleted the child Job; it is made again when it is gone
    # Running
    TRAINER_STARTED = "TrainerStarted"  # the trainer runs, and has not reported yet
    SUSPENDING = "Suspending"  # the trainer was told to stop, and writes its checkpoint
    SUSPENDED = "Suspended"
    DELETED = "Deleted"  # the FineTuneJob is being deleted
    # The end
    COMPLETED = "Completed"
    REUSED = "Reused"  # the result was there already, nothing was trained
    OUTCOME_LOST = "OutcomeLost"  # succeeded, but the pod was removed before its last words were read
    # Needs a person
    NAME_CONFLICT = "NameConflict"  # an object of somebody else has the child's name
    INVALID_CONFIGURATION = "InvalidConfiguration"  # this version of the operator cannot read the spec
    PERMISSION_DENIED = "PermissionDenied"  # the operator's role or the namespace's quota refused a child
    CHILD_REJECTED = "ChildRejected"  # the API server refused a child as invalid
    # Of condition Validated
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
    MEMORY_FALLBACK = "MemoryFallback"  # the GPU's memory ran out, and the run went on with a smaller plan
    # Of attempts only
    POD_GONE = "PodGone"  # the pod was removed, and nobody saw its end
