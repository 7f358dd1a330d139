"""Events at the turning points of a job (pure).

An event is posted before the status that it belongs to, under a name that only this turning point can have: an
operator that dies in between posts it again, and the API server refuses the second one.

They come from comparing the status that is written with the one before, so each transition is reported once, however
often the job is looked at.
"""

import hashlib
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from finetune_api import API_VERSION, KIND
from finetune_api.job import ObjectMeta
from finetune_api.status import FineTuneJobStatus, PreflightStatus
from finetune_api.vocabulary import ConditionType, Phase, PreflightResult, Stage
from finetune_operator.desired.names import FIELD_MANAGER
from finetune_operator.reasons import Reason
from finetune_operator.status.attempts import has_failed
from finetune_operator.status.preflight import describe_preflight
from finetune_operator.status.status import current_stage

_MAX_MESSAGE_LENGTH = 1024  # the API server's limit
_SIMPLE = {
    Phase.VALIDATING: Reason.VALIDATING,
    Phase.QUEUED: Reason.QUEUED,
    Phase.SUSPENDED: Reason.SUSPENDED,
    Phase.SUCCEEDED: Reason.SUCCEEDED,
}


@dataclass(frozen=True)
class Transition:
    """One turning point."""

    reason: str
    message: str
    is_warning: bool = False
    moment: str = ""
    """What tells this transition from another one of the same reason: the pod, or else generation and ended pods."""


def find_transitions(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Transition]:
    """What happened between two statuses, in order."""
    transitions = _preflight_transitions(old.preflight or PreflightStatus(), new.preflight or PreflightStatus())
    message = _message(new)
    pod = new.attempts[-1].uid if new.attempts else ""
    if (new.retries or 0) > (old.retries or 0):
        transitions.append(Transition(Reason.RETRYING, _retry_message(new), is_warning=True))
    if old.phase is Phase.SUSPENDED and new.phase not in (Phase.SUSPENDED, Phase.CANCELLING):
        transitions.append(Transition(Reason.RESUMED, "the job goes on from its newest checkpoint"))
    if _started_attempts(new) > _started_attempts(old):
        transitions.append(Transition(Reason.STARTED, f"the trainer runs in pod {new.attempts[-1].pod}", moment=pod))
    stage = current_stage(new)
    if stage not in (None, Stage.PREFLIGHT, current_stage(old)):
        transitions.append(Transition(stage.value, f"the trainer is in stage {stage.value}", moment=pod))
    transitions += _fallbacks(old, new)
    if new.phase is not old.phase and new.phase in _SIMPLE:
        transitions.append(Transition(_SIMPLE[new.phase], message))
    if new.phase is Phase.FAILED and old.phase is not Phase.FAILED and new.failure:
        transitions.append(
            Transition(new.failure.reason, f"{new.failure.message} ({new.failure.hint})", is_warning=True)
        )
    elif _is_stalled(new) and _stall_reason(new) != _stall_reason(old):
        transitions.append(Transition(_stall_reason(new), message, is_warning=True))
    ended = sum(1 for attempt in new.attempts if attempt.exit_code is not None)
    return [
        replace(transition, moment=transition.moment or f"{new.observed_generation} {ended}")
        for transition in transitions
    ]


def _preflight_transitions(old: PreflightStatus, new: PreflightStatus) -> list[Transition]:
    transitions: list[Transition] = []
    failed = [attempt for attempt in new.attempts[:-1] if has_failed(attempt)]
    if len(failed) > sum(1 for attempt in old.attempts[:-1] if has_failed(attempt)):
        how = f"the checks in {failed[-1].pod} ended with {failed[-1].reason} (exit code {failed[-1].exit_code})"
        transitions.append(
            Transition(Reason.RETRYING, f"{how}; another pod tries again", is_warning=True, moment=failed[-1].uid)
        )
    if new.result is PreflightResult.PASSED and old.result is None:
        moment = new.job_name or ""
        if new.warnings:
            more = (new.warning_count or 0) - len(new.warnings)
            said = "; ".join(new.warnings) + (f" (and {more} more)" if more > 0 else "")
            transitions.append(Transition(Reason.PREFLIGHT_WARNING, said, is_warning=True, moment=moment))
        if new.rows is not None:
            transitions.append(Transition(Reason.VALIDATED, describe_preflight(new), moment=moment))
    return transitions


def build_event(job: ObjectMeta, transition: Transition, now: datetime) -> dict[str, Any]:
    """The core/v1 Event of a turning point, named after it: a repeated post is refused as a duplicate."""
    stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    digest = hashlib.sha256(f"{job.uid} {transition.reason} {transition.moment}".encode()).hexdigest()[:16]
    reference = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "namespace": job.namespace,
        "name": job.name,
        "uid": job.uid,
        "resourceVersion": job.resource_version,
    }
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{job.name}.{digest}", "namespace": job.namespace},
        "involvedObject": reference,
        "type": "Warning" if transition.is_warning else "Normal",
        "reason": transition.reason,
        "message": transition.message[:_MAX_MESSAGE_LENGTH],
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
        "source": {"component": FIELD_MANAGER},
        "reportingComponent": FIELD_MANAGER,
    }


def _fallbacks(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Transition]:
    """Memory that ran out since the last status. Another pod may run out at the same step, which is told again."""
    if new.memory is None or not new.attempts or new.memory == old.memory:
        return []
    pod = new.attempts[-1].uid
    is_same_pod = bool(old.attempts) and old.attempts[-1].uid == pod
    known = old.memory.fallbacks if old.memory and is_same_pod else ()
    return [
        Transition(
            Reason.MEMORY_FALLBACK,
            f"out of GPU memory after step {each.step}: went on with memory {each.to_mode} instead of {each.from_mode}",
            is_warning=True,
            moment=f"{pod} {number}",
        )
        for number, each in enumerate(new.memory.fallbacks)
        if each not in known
    ]


def _message(status: FineTuneJobStatus) -> str:
    return next((each.message for each in status.conditions if each.type is ConditionType.READY), "")


def _retry_message(status: FineTuneJobStatus) -> str:
    failed = next((each for each in reversed(status.attempts[:-1]) if has_failed(each)), None)
    how = f"{failed.pod} ended with {failed.reason} (exit code {failed.exit_code})" if failed else "a pod failed"
    return f"{how}; another pod goes on"


def _started_attempts(status: FineTuneJobStatus) -> int:
    return sum(1 for attempt in status.attempts if attempt.start_time)


def _is_stalled(status: FineTuneJobStatus) -> bool:
    return _stall_reason(status) != ""


def _stall_reason(status: FineTuneJobStatus) -> str:
    for condition in status.conditions:
        if condition.type is ConditionType.STALLED and condition.status == "True":
            return condition.reason
    return ""
