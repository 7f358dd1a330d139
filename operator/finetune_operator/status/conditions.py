"""Conditions of a FineTuneJob, from the decision about it (pure).

Ready, Reconciling and Stalled follow kstatus, so that Argo CD, Flux and `kubectl wait` understand them without any
configuration. The others say where the job is. `lastTransitionTime` changes only when `status` does.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Literal

from finetune_api.failures import FAILURES, ExitCode, FailureReason, PodFailureAction, action_after, ends_the_job
from finetune_api.status import Condition, Failure, PreflightStatus
from finetune_api.vocabulary import ConditionType, Phase, PreflightResult, Stage
from finetune_operator.decide.decision import Decision
from finetune_operator.status_reasons import StatusReason

Truth = Literal["True", "False", "Unknown"]

_WAITING = (Phase.PENDING, Phase.VALIDATING, Phase.QUEUED)
_CHECKING = (StatusReason.CHECKING, StatusReason.SUSPENDING)  # preflight's pod runs
_RUNNING = (Phase.RUNNING, Phase.EXPORTING, Phase.UPLOADING)
_INPUT_ERRORS = (ExitCode.CONFIGURATION, ExitCode.DATA, ExitCode.ACCESS)
_BEFORE_VALIDATED = (Stage.PREFLIGHT, Stage.MODEL_LOADING, Stage.ADAPTER_INJECTION, Stage.DATA_FORMATTING)
_MAX_MESSAGE_LENGTH = 4096  # characters


def build_conditions(
    decision: Decision,
    stage: Stage | None,
    preflight: PreflightStatus | None,
    previous: Iterable[Condition],
    generation: int,
    now: datetime,
) -> tuple[Condition, ...]:
    """Builds all nine conditions, in the order of `ConditionType`. `stage` is the job's newest stage."""
    phase = decision.phase
    is_idle = phase.is_terminal or phase is Phase.SUSPENDED

    truths: dict[ConditionType, bool] = {
        # kstatus: tools wait until Ready is True, or until Stalled is
        ConditionType.READY: phase is Phase.SUCCEEDED,
        ConditionType.RECONCILING: not is_idle,
        ConditionType.STALLED: decision.is_stalled,
        # Ours
        ConditionType.QUEUED: phase in _WAITING and decision.reason not in _CHECKING,
        ConditionType.RUNNING: phase in _RUNNING,
        ConditionType.SUCCEEDED: phase is Phase.SUCCEEDED,
        ConditionType.FAILED: phase is Phase.FAILED,
        ConditionType.SUSPENDED: phase is Phase.SUSPENDED,
    }
    before = {condition.type: condition for condition in previous}

    conditions = []
    for kind in ConditionType:
        if kind is ConditionType.VALIDATED:
            status, reason, message = _validated(decision, stage, preflight, before.get(kind))
        else:
            status, reason, message = _truth(truths[kind]), decision.reason, decision.message

        old = before.get(kind)
        conditions.append(
            Condition(
                type=kind,
                status=status,
                reason=reason,
                message=message[:_MAX_MESSAGE_LENGTH],
                last_transition_time=old.last_transition_time if old and old.status == status else now,
                observed_generation=generation,
            )
        )

    return tuple(conditions)


def _validated(
    decision: Decision, stage: Stage | None, preflight: PreflightStatus | None, old: Condition | None
) -> tuple[Truth, str, str]:
    """Status, reason and message of the condition Validated: model, dataset and output were found usable, by preflight
    or by the trainer's first stages, which read them."""
    failure = decision.failure
    if failure is not None and (_blames_the_inputs(failure) or _is_refused(decision, failure)):
        return "False", failure.reason, failure.message

    # Inputs cannot change, so what was usable once stays so.
    if old is not None and old.status == "True":
        return "True", old.reason, old.message
    # Without preflight, the trainer's first stages are the check.
    if decision.phase is Phase.SUCCEEDED or (stage is not None and stage not in _BEFORE_VALIDATED):
        return "True", StatusReason.INPUTS_READ, "the trainer has read model and dataset"
    if decision.preflight is PreflightResult.PASSED:
        return "True", StatusReason.PREFLIGHT_PASSED, decision.message

    if preflight is not None and preflight.result is None:
        return "Unknown", StatusReason.CHECKING, "model, dataset and output are being checked"
    return "Unknown", StatusReason.NOT_CHECKED, "the trainer has not read model and dataset yet"


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


def _truth(value: bool) -> Truth:
    return "True" if value else "False"
