"""The trainer's errors: one class, since only the reason differs, and reasons are a table shared with the operator.

    TrainerError(reason, message)
    ├── S3Fault                storage/s3_faults.py: with the kind of fault, for code that can act on it
    ├── DiskFullError          storage/disk_faults.py: a write that found no room, and does not say what it needed
    ├── ExportError ...        export/errors.py
    ├── OtherNodeError         another pod of the run is the cause, and says how its Job counts it
    └── InterruptedRunError    the pod is being stopped; a checkpoint was written first

The message is for people: what was found, what was expected, what to do. It reaches status and events, so it never
holds a secret.
"""

from finetune_api.failures import ExitCode, FailureReason, exit_code_of


class TrainerError(Exception):
    """Ends the run, with one of the reasons that the operator knows."""

    def __init__(self, reason: FailureReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    @property
    def exit_code(self) -> ExitCode:
        """Exit code of the process; the operator retries the Job or not by this code."""
        return exit_code_of(self.reason)


class OtherNodeError(TrainerError):
    """Ends this pod's part of a run for a failure of another pod, with its reason. The Job counts one of them only."""

    @property
    def exit_code(self) -> ExitCode:
        """Exit code after which the Job makes another pod and counts no retry."""
        return ExitCode.INTERRUPTED


class RankError(TrainerError):
    """Ends a run for the failure of one of its ranks, which the message names."""


class InterruptedRunError(TrainerError):
    """Ends a run that was asked to stop, in a state from which it can be resumed."""

    def __init__(self, message: str) -> None:
        super().__init__(FailureReason.INTERRUPTED, message)
