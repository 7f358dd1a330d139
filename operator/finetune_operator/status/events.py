"""Events at the transitions of a job (pure).

A transition is a difference between the status that is about to be written and the one before, so each is reported
once, however often the job is looked at.

An event is posted before its status, under a name that only this transition can have. An operator that dies in between
posts the event again, and the API server refuses the second one.
"""

import hashlib
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from finetune_api import API_VERSION, KIND
from finetune_api.failures import FailureReason
from finetune_api.job import ObjectMeta
from finetune_api.status import Attempt, FineTuneJobStatus, PreflightStatus
from finetune_api.vocabulary import ConditionType, Phase, Precision, PreflightResult, Stage
from finetune_operator.desired.names import FIELD_MANAGER
from finetune_operator.status.attempts import has_failed
from finetune_operator.status.preflight import describe_preflight
from finetune_operator.status.status import current_stage
from finetune_operator.status_reasons import StatusReason, is_warning

_MAX_MESSAGE_LENGTH = 1024  # characters: the API server's limit
_REASONS_OF_PHASES = {
    Phase.VALIDATING: StatusReason.VALIDATING,
    Phase.QUEUED: StatusReason.QUEUED,
    Phase.SUSPENDED: StatusReason.SUSPENDED,
    Phase.SUCCEEDED: StatusReason.SUCCEEDED,
}
"""Phases whose beginning is an event by itself. Other phases begin with a stage, a failure or a deletion."""


@dataclass(frozen=True)
class Transition:
    """One change of a status that is worth an Event."""

    reason: str
    message: str
    moment: str = ""
    """What tells this transition from another one with the same reason: the pod, or generation and ended pods."""

    @property
    def is_warning(self) -> bool:
        """True if the event is a Warning."""
        return is_warning(self.reason)


def find_transitions(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Transition]:
    """Finds what happened between two statuses, in order."""
    found = [
        *_preflight_transitions(old.preflight or PreflightStatus(), new.preflight or PreflightStatus()),
        *_pod_transitions(old, new),
        *_memory_fallbacks(old, new),
        *_precision_fallbacks(old, new),
        *_phase_transitions(old, new),
    ]

    # The same reason may come again after a change of the spec or the end of a pod, but not in between.
    ended = sum(1 for attempt in new.attempts if attempt.exit_code is not None)
    return [replace(each, moment=each.moment or f"{new.observed_generation} {ended}") for each in found]


def build_event(job: ObjectMeta, transition: Transition, now: datetime) -> dict[str, Any]:
    """Builds the core/v1 Event of a transition. Its name follows from the transition, so the API server refuses a
    second one as a duplicate."""
    stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    digest = hashlib.sha256(f"{job.uid} {transition.reason} {transition.moment}".encode()).hexdigest()[:16]  # 64 bits
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


def _preflight_transitions(old: PreflightStatus, new: PreflightStatus) -> list[Transition]:
    found: list[Transition] = []

    failed = _failed_attempts(new.attempts)
    if len(failed) > len(_failed_attempts(old.attempts)):
        message = f"the checks in {_describe_end(failed[-1])}; another pod will try again"
        found.append(Transition(StatusReason.RETRYING, message, moment=failed[-1].uid))

    if new.result is PreflightResult.PASSED and old.result is None:
        moment = new.job_name or ""  # preflight passes once in the life of a job
        if new.warnings:
            more = (new.warning_count or 0) - len(new.warnings)
            message = "; ".join(new.warnings) + (f" (and {more} more)" if more > 0 else "")
            found.append(Transition(StatusReason.PREFLIGHT_WARNING, message, moment=moment))
        if new.rows is not None:
            found.append(Transition(StatusReason.VALIDATED, describe_preflight(new), moment=moment))

    return found


def _pod_transitions(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Transition]:
    """Retries, resumptions, starts and stages of the trainer."""
    found: list[Transition] = []
    pod = new.attempts[-1].uid if new.attempts else ""

    if (new.retries or 0) > (old.retries or 0):
        failed = _failed_attempts(new.attempts)
        end = _describe_end(failed[-1]) if failed else "a pod failed"
        found.append(Transition(StatusReason.RETRYING, f"{end}; another pod will continue"))

    if old.phase is Phase.SUSPENDED and new.phase not in (Phase.SUSPENDED, Phase.CANCELLING):
        found.append(Transition(StatusReason.RESUMED, "the job continues from its newest checkpoint"))
    if new.reason == StatusReason.NOT_REPORTING and old.reason != new.reason:
        found.append(Transition(StatusReason.NOT_REPORTING, _ready_message(new), moment=f"{pod} {_last_report(old)}"))
    if _given_up(new) > _given_up(old):
        found.append(Transition(FailureReason.STALLED, _ready_message(new), moment=pod))
    if _started_attempts(new) > _started_attempts(old):
        found.append(Transition(StatusReason.STARTED, f"the trainer runs in pod {new.attempts[-1].pod}", moment=pod))

    # Preflight is a stage as well, with events of its own.
    stage = current_stage(new)
    if stage not in (None, Stage.PREFLIGHT, current_stage(old)):
        found.append(Transition(stage.value, f"the trainer is in stage {stage.value}", moment=pod))

    return found


def _memory_fallbacks(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Transition]:
    """GPU memory that ran out since the last status. If it runs out in another pod at the same step, that is another
    transition."""
    if new.memory is None or not new.attempts or new.memory == old.memory:
        return []

    pod = new.attempts[-1].uid
    is_same_pod = bool(old.attempts) and old.attempts[-1].uid == pod
    known = old.memory.fallbacks if old.memory and is_same_pod else ()
    return [
        Transition(
            StatusReason.MEMORY_FALLBACK,
            f"out of GPU memory after step {each.step}: continued with memory {each.to_mode}, not {each.from_mode}",
            moment=f"{pod} {number}",
        )
        for number, each in enumerate(new.memory.fallbacks)
        if each not in known
    ]


def _precision_fallbacks(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Transition]:
    """FP8 that the trainer refused or gave up since the last status, once for each pod."""
    was, now = old.resolved, new.resolved
    if now is None or now.precision_reason is None or now.precision == Precision.FP8 or not new.attempts or now == was:
        return []

    pod = new.attempts[-1].uid
    is_same_pod = bool(old.attempts) and old.attempts[-1].uid == pod
    if is_same_pod and was is not None and was.precision_reason == now.precision_reason:
        return []
    message = f"frozen weights are multiplied in {now.precision}: {now.precision_reason}"
    return [Transition(StatusReason.PRECISION_FALLBACK, message, moment=pod)]


def _phase_transitions(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Transition]:
    """A new phase, a failure, or a new reason to wait for a person."""
    found: list[Transition] = []
    message = _ready_message(new)

    if new.phase is not old.phase and new.phase in _REASONS_OF_PHASES:
        found.append(Transition(_REASONS_OF_PHASES[new.phase], message))
    if new.judgement is not None and old.judgement is None and new.judgement.warnings:
        found.append(Transition(StatusReason.EXPORT_WARNING, "; ".join(new.judgement.warnings)))

    # A job that failed is stalled too; one event is enough.
    if new.phase is Phase.FAILED and old.phase is not Phase.FAILED and new.failure:
        explained = f"{new.failure.message.rstrip('.')}. {new.failure.hint}"
        found.append(Transition(new.failure.reason, explained))
    elif _stall_reason(new) not in ("", _stall_reason(old)):
        found.append(Transition(_stall_reason(new), message))

    return found


def _ready_message(status: FineTuneJobStatus) -> str:
    return next((each.message for each in status.conditions if each.type is ConditionType.READY), "")


def _last_report(status: FineTuneJobStatus) -> str:
    return str(status.progress.last_report_time) if status.progress else ""


def _given_up(status: FineTuneJobStatus) -> int:
    """Number of pods that were given up for their silence and have not ended."""
    return sum(1 for each in status.attempts if each.reason == FailureReason.STALLED and each.exit_code is None)


def _failed_attempts(attempts: tuple[Attempt, ...]) -> list[Attempt]:
    """Attempts that failed and were replaced."""
    return [attempt for attempt in attempts[:-1] if has_failed(attempt)]


def _describe_end(attempt: Attempt) -> str:
    return f"pod {attempt.pod} ended with {attempt.reason} (exit code {attempt.exit_code})"


def _started_attempts(status: FineTuneJobStatus) -> int:
    return sum(1 for attempt in status.attempts if attempt.start_time)


def _stall_reason(status: FineTuneJobStatus) -> str:
    for condition in status.conditions:
        if condition.type is ConditionType.STALLED and condition.status == "True":
            return condition.reason
    return ""
