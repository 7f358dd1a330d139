"""The pods of a run as `status.attempts` lists them, remembered after the pods are gone (pure)."""

from collections.abc import Iterable

from finetune_api.failures import ExitCode, FailureReason
from finetune_api.status import MAX_ATTEMPTS, Attempt
from finetune_operator.observe.children import EVICTED, TrainerPod
from finetune_operator.status_reasons import StatusReason


def merge_attempts(
    previous: Iterable[Attempt], pods: Iterable[TrainerPod], given_up: str | None = None
) -> tuple[Attempt, ...]:
    """Merges the pods into the attempts that are known; oldest first, at most the newest `MAX_ATTEMPTS`.

    `given_up`: UID of a pod that counts as stalled from now on.
    """
    attempts = {attempt.uid: attempt for attempt in previous}
    for pod in pods:
        known = attempts.get(pod.uid)
        merged = _attempt(pod, known)
        is_stalled = pod.uid == given_up or (known is not None and known.reason == FailureReason.STALLED)
        attempts[pod.uid] = merged.model_copy(update={"reason": FailureReason.STALLED}) if is_stalled else merged

    # Only the newest pod can still be running: an older one without an end is gone.
    ordered = list(attempts.values())
    return (*map(_mark_if_gone, ordered[:-1]), *ordered[-1:])[-MAX_ATTEMPTS:]


def count_retries(attempts: tuple[Attempt, ...], known: int) -> int:
    """Counts pods that failed and were replaced. Never less than `known`, because old attempts are dropped."""
    return max(known, sum(1 for attempt in attempts[:-1] if has_failed(attempt)))


def has_failed(attempt: Attempt) -> bool:
    """True if an attempt ended by a failure of its own; False if its pod was stopped or removed."""
    stopped = attempt.exit_code in (None, ExitCode.SUCCESS, ExitCode.INTERRUPTED)
    return not stopped and attempt.reason != EVICTED


def _mark_if_gone(attempt: Attempt) -> Attempt:
    """Marks an older attempt whose end nobody saw: its pod was removed while the operator was down."""
    if attempt.exit_code is not None or attempt.reason is not None:
        return attempt
    return attempt.model_copy(update={"reason": StatusReason.POD_GONE})


def _attempt(pod: TrainerPod, known: Attempt | None) -> Attempt:
    disruption = EVICTED if pod.is_disrupted else ""

    # Without a container's end, the pod was refused or removed, or still runs.
    end = pod.termination
    if end is None:
        reason = disruption or pod.reason or (pod.phase if pod.is_finished else None)
        return Attempt(pod=pod.name, uid=pod.uid, start_time=pod.started, reason=reason)

    # An attempt that has ended never changes again.
    if known is not None and known.exit_code is not None:
        return known

    outcome = end.outcome()
    reported_reason = (outcome.reason or outcome.result) if outcome else None
    return Attempt(
        pod=pod.name,
        uid=pod.uid,
        start_time=end.started,
        end_time=end.finished,
        exit_code=end.exit_code,
        reason=reported_reason or disruption or pod.reason or end.reason or None,
    )
