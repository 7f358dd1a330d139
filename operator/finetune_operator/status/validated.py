"""The condition Validated: model, dataset and output were found usable, by preflight or by the trainer's first stages,
which read them (pure)."""

from typing import Literal

from finetune_api.failures import FAILURES, ExitCode, FailureReason, PodFailureAction, action_after, ends_the_job
from finetune_api.status import Condition, Failure
from finetune_api.vocabulary import Phase, PreflightResult, Stage
from finetune_operator.decide.decision import Decision
from finetune_operator.status_reasons import StatusReason

Standing = tuple[Literal["True", "False", "Unknown"], str, str]
"""Status, reason and message of a condition."""

_INPUT_ERRORS = (ExitCode.CONFIGURATION, ExitCode.DATA, ExitCode.ACCESS)
_BEFORE_VALIDATED = (Stage.PREFLIGHT, Stage.MODEL_LOADING, Stage.ADAPTER_INJECTION, Stage.DATA_FORMATTING)


def find_validated(decision: Decision, stage: Stage | None, old: Condition | None) -> Standing:
    """Finds status, reason and message of the condition Validated. `old`: the condition as it was."""
    failure = decision.failure
    if failure is not None and (_blames_the_inputs(failure) or _is_refused(decision, failure)):
        return "False", failure.reason, failure.message

    # Inputs cannot change, so what was usable once stays so.
    if old is not None and old.status == "True":
        return "True", old.reason, old.message
    if decision.reason == StatusReason.REUSED:
        return "True", StatusReason.REUSED, "the same job succeeded before with the same model and dataset"
    if decision.preflight is PreflightResult.PASSED:
        return "True", StatusReason.PREFLIGHT_PASSED, decision.message
    # Without preflight, the trainer's first stages are the check.
    if decision.phase is Phase.SUCCEEDED or (stage is not None and stage not in _BEFORE_VALIDATED):
        return "True", StatusReason.INPUTS_READ, "the trainer has read model and dataset"

    if decision.reason == StatusReason.CHECKING:
        return "Unknown", StatusReason.CHECKING, decision.message
    return "Unknown", StatusReason.NOT_CHECKED, "nothing has read model and dataset to the end"


def _is_refused(decision: Decision, failure: Failure) -> bool:
    """True if preflight found that the job cannot run. False if preflight itself did not get to the end, by a crash or
    a deadline."""
    if decision.preflight is not PreflightResult.FAILED or failure.exit_code is None:
        return False

    # Both must agree: a crash may have any exit code, and some reasons are given for several.
    is_final = failure.reason in tuple(FailureReason) and ends_the_job(FailureReason(failure.reason))
    return is_final and action_after(failure.exit_code) is PodFailureAction.FAIL_JOB


def _blames_the_inputs(failure: Failure) -> bool:
    """True if a failure is the fault of model, dataset or spec."""
    return failure.reason in tuple(FailureReason) and (
        FAILURES[FailureReason(failure.reason)].exit_code in _INPUT_ERRORS
    )
