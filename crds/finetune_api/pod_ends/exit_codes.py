"""Exit codes of the trainer, and what the Job controller does after each; `finetune_api.failures` explains both."""

from enum import IntEnum, StrEnum


class ExitCode(IntEnum):
    """Exit codes of the trainer. Each code names a class of failures that are handled alike."""

    SUCCESS = 0
    CONFIGURATION = 10
    DATA = 11
    ACCESS = 12
    OUT_OF_MEMORY = 13
    TRAINING = 14
    STORAGE = 15
    DISK_FULL = 16
    EXPORT = 17
    UNAVAILABLE = 20
    INTERRUPTED = 30
    STALLED = 31
    DIVERGED = 32
    INTERNAL = 40


class PodFailureAction(StrEnum):
    """Reaction of the Job controller to a pod that failed, in the words of `podFailurePolicy`."""

    FAIL_JOB = "FailJob"
    """The job fails at once: another attempt with the same job can only end the same way."""

    IGNORE = "Ignore"
    """Another pod starts, and the failure counts as no retry."""

    COUNT = "Count"
    """Another pod starts, unless `spec.runPolicy.maxRetries` pods have failed before. The default of Kubernetes."""


_ACTIONS: dict[ExitCode, PodFailureAction] = {
    ExitCode.CONFIGURATION: PodFailureAction.FAIL_JOB,
    ExitCode.DATA: PodFailureAction.FAIL_JOB,
    ExitCode.ACCESS: PodFailureAction.FAIL_JOB,
    ExitCode.OUT_OF_MEMORY: PodFailureAction.FAIL_JOB,
    ExitCode.TRAINING: PodFailureAction.FAIL_JOB,
    ExitCode.STORAGE: PodFailureAction.FAIL_JOB,
    ExitCode.DISK_FULL: PodFailureAction.FAIL_JOB,
    ExitCode.EXPORT: PodFailureAction.FAIL_JOB,
    ExitCode.UNAVAILABLE: PodFailureAction.COUNT,
    ExitCode.INTERRUPTED: PodFailureAction.IGNORE,
    ExitCode.STALLED: PodFailureAction.IGNORE,
    ExitCode.DIVERGED: PodFailureAction.IGNORE,
    ExitCode.INTERNAL: PodFailureAction.COUNT,
}


def action_after(exit_code: int) -> PodFailureAction:
    """Returns what the Job controller does after a pod ended with an exit code other than 0. Codes that are not the
    trainer's own, 137 of a kill among them, are counted."""
    return next((action for code, action in _ACTIONS.items() if code == exit_code), PodFailureAction.COUNT)


def exit_codes_with(action: PodFailureAction) -> tuple[ExitCode, ...]:
    """Returns the trainer's exit codes that lead to an action."""
    return tuple(code for code, follows in _ACTIONS.items() if follows is action)


RESTARTED_ONCE = (ExitCode.STALLED, ExitCode.DIVERGED)
"""Exit codes after which the run goes on from its last checkpoint, once for each reason."""
