"""Conditions of a FineTuneJob, from the decision about it (pure).

Ready, Reconciling and Stalled follow kstatus, so that Argo CD, Flux and `kubectl wait` understand them without any
configuration: at most one of the three is true. The others say where the job is. Each has a reason and a message of its
own; Ready has those of the decision. `lastTransitionTime` changes only when `status` does.
"""

from collections.abc import Iterable
from datetime import datetime

from finetune_api.failures import FailureReason
from finetune_api.status import Condition
from finetune_api.vocabulary import ConditionType, Phase, Stage
from finetune_operator.decide.decision import Decision
from finetune_operator.decide.open_run import IS_SUSPENDED
from finetune_operator.status.validated import Standing, find_validated
from finetune_operator.status_reasons import StatusReason

_RUNNING = (Phase.RUNNING, Phase.EXPORTING, Phase.UPLOADING)
_OF_CHECKS = (StatusReason.CHECKING, StatusReason.SUSPENDING, StatusReason.ENDING)  # preflight's pod runs, or has ended
_OF_TRAINER = (
    StatusReason.TRAINER_STARTED,
    StatusReason.NOT_REPORTING,
    FailureReason.STALLED,
    StatusReason.SUSPENDING,
    StatusReason.ENDING,
    *Stage,
)


def build_conditions(
    decision: Decision,
    stage: Stage | None,
    previous: Iterable[Condition],
    generation: int,
    now: datetime,
) -> tuple[Condition, ...]:
    """Builds all nine conditions, in the order of `ConditionType`. `stage` is the job's newest stage."""
    before = {condition.type: condition for condition in previous}
    standings = {
        # kstatus: tools wait until Ready is True, or until Stalled is
        ConditionType.READY: _ready(decision),
        ConditionType.RECONCILING: _reconciling(decision),
        ConditionType.STALLED: _stalled(decision),
        # Ours
        ConditionType.VALIDATED: find_validated(decision, stage, before.get(ConditionType.VALIDATED)),
        ConditionType.QUEUED: _queued(decision),
        ConditionType.RUNNING: _running(decision),
        ConditionType.SUCCEEDED: _succeeded(decision),
        ConditionType.FAILED: _failed(decision),
        ConditionType.SUSPENDED: _suspended(decision),
    }

    conditions = []
    for kind in ConditionType:
        status, reason, message = standings[kind]
        old = before.get(kind)
        conditions.append(
            Condition(
                type=kind,
                status=status,
                reason=reason,
                message=message,
                last_transition_time=old.last_transition_time if old and old.status == status else now,
                observed_generation=generation,
            )
        )

    return tuple(conditions)


def _ready(decision: Decision) -> Standing:
    """The whole story in one condition: the reason and message of the decision, whatever they are."""
    return "True" if decision.phase is Phase.SUCCEEDED else "False", decision.reason, decision.message


def _reconciling(decision: Decision) -> Standing:
    if decision.phase is Phase.CANCELLING:
        return "True", decision.reason, decision.message
    if decision.is_stalled and not decision.phase.is_terminal:
        return "False", StatusReason.WAITING_FOR_PERSON, "the job waits for a person: see condition Stalled"
    return _at_rest(decision) or ("True", StatusReason.PROGRESSING, "the job goes on by itself")


def _stalled(decision: Decision) -> Standing:
    if decision.is_stalled:
        return "True", decision.reason, decision.message
    return _at_rest(decision) or ("False", StatusReason.PROGRESSING, "the job goes on by itself")


def _queued(decision: Decision) -> Standing:
    if (rest := _at_rest(decision)) is not None:
        return rest
    if decision.phase in _RUNNING:
        return "False", StatusReason.STARTED, "the trainer has started"

    # While preflight's pod runs, nothing is waited for.
    return "False" if decision.reason in _OF_CHECKS else "True", decision.reason, decision.message


def _running(decision: Decision) -> Standing:
    if (rest := _at_rest(decision)) is not None:
        return rest
    if decision.phase not in _RUNNING:
        return "False", StatusReason.NOT_RUNNING, "no pod of the trainer runs"

    # What keeps the operator from acting belongs into other conditions.
    if decision.reason in _OF_TRAINER:
        return "True", decision.reason, decision.message
    return "True", StatusReason.STARTED, "the trainer has started"


def _succeeded(decision: Decision) -> Standing:
    if decision.phase.is_terminal:
        return "True" if decision.phase is Phase.SUCCEEDED else "False", decision.reason, decision.message
    return "False", StatusReason.NOT_FINISHED, "the job is not over"


def _failed(decision: Decision) -> Standing:
    if decision.phase is Phase.FAILED:
        return "True", decision.reason, decision.message
    if decision.phase is Phase.SUCCEEDED:
        return "False", StatusReason.SUCCEEDED, "the job has succeeded"
    return "False", StatusReason.NOT_FINISHED, "the job is not over"


def _suspended(decision: Decision) -> Standing:
    if decision.phase is Phase.SUSPENDED:
        return "True", StatusReason.SUSPENDED, IS_SUSPENDED
    if decision.reason == StatusReason.SUSPENDING:
        return "False", decision.reason, decision.message
    return _at_rest(decision) or ("False", StatusReason.NOT_SUSPENDED, "the job is not suspended")


def _at_rest(decision: Decision) -> Standing | None:
    """Returns why a condition is false for a job that is over, suspended or being deleted; None for others."""
    if decision.phase.is_terminal:
        return "False", StatusReason.FINISHED, "the job is over"
    if decision.phase is Phase.SUSPENDED:
        return "False", StatusReason.SUSPENDED, IS_SUSPENDED
    if decision.phase is Phase.CANCELLING:
        return "False", decision.reason, decision.message
    return None
