"""The pods of a job as `status.attempts` tells them (pure). They are remembered after the pods are gone."""

from collections.abc import Iterable

from finetune_api.failures import ExitCode
from finetune_api.status import Attempt
from finetune_operator.observe.children import EVICTED, TrainerPod
from finetune_operator.reasons import Reason

MAX_ATTEMPTS = 20


def merge_attempts(previous: Iterable[Attempt], pods: Iterable[TrainerPod]) -> tuple[Attempt, ...]:
    """What was known before, and what the pods say now; oldest first, at most the newest 20."""
    attempts = {attempt.uid: attempt for attempt in previous}
    for pod in pods:
        attempts[pod.uid] = _attempt(pod, attempts.get(pod.uid))
    ordered = list(attempts.values())
    return (*map(_without_end, ordered[:-1]), *ordered[-1:])[-MAX_ATTEMPTS:]


def count_retries(attempts: tuple[Attempt, ...], known: int) -> int:
    """Pods that failed and were replaced; never less than was known, as old attempts are dropped."""
    return max(known, sum(1 for attempt in attempts[:-1] if has_failed(attempt)))


def has_failed(attempt: Attempt) -> bool:
    """Whether an attempt ended by a failure of its own, not because its pod was stopped or taken away."""
    stopped = attempt.exit_code in (None, ExitCode.SUCCESS, ExitCode.INTERRUPTED)
    return not stopped and attempt.reason != EVICTED


def _without_end(attempt: Attempt) -> Attempt:
    """An older attempt whose end nobody saw: its pod was removed while the operator was down."""
    if attempt.exit_code is not None or attempt.reason is not None:
        return attempt
    return attempt.model_copy(update={"reason": Reason.POD_GONE})


def _attempt(pod: TrainerPod, known: Attempt | None) -> Attempt:
    end = pod.termination
    disruption = EVICTED if pod.is_disrupted else ""
    if end is None:
        reason = disruption or pod.reason or (pod.phase if pod.is_finished else None)
        return Attempt(pod=pod.name, uid=pod.uid, start_time=pod.started, reason=reason)
    if known is not None and known.exit_code is not None:
        return known
    outcome = end.outcome()
    said = (outcome.reason or outcome.result) if outcome else None
    reason = said or disruption or pod.reason or end.reason or None
    return Attempt(
        pod=pod.name,
        uid=pod.uid,
        start_time=end.started,
        end_time=end.finished,
        exit_code=end.exit_code,
        reason=reason,
    )
