"""The pods of a run on several nodes, told as those of one: the pod of index 0 leads, and speaks for the run (pure).

Its pods end together. So an attempt is the leading pod's, and ends as the pod ended that ended it: a leading pod that
only stopped because of another takes over that one's end, for everything that is decided, counted and told.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from finetune_api.failures import ExitCode
from finetune_api.outcome import Outcome, Result
from finetune_operator.observe.children import TrainerPod
from finetune_operator.observe.termination import Termination, parse_time


def explain_ends(leaders: Sequence[TrainerPod], others: Sequence[TrainerPod]) -> tuple[TrainerPod, ...]:
    """Returns the leading pods, oldest first, each with the end of its attempt."""
    begins = [_created(pod) for pod in leaders]
    return tuple(
        _with_cause(pod, [other for other in others if _has_ended_in(other, begin, end)])
        for pod, begin, end in zip(leaders, begins, [*begins[1:], None], strict=False)
    )


def newest_others(leader: TrainerPod | None, others: Sequence[TrainerPod]) -> tuple[TrainerPod, ...]:
    """Returns the newest pod of each further index, by index. One that ended before the leading pod was made belongs to
    the attempt before."""
    newest: dict[int, TrainerPod] = {}
    for pod in sorted(others, key=lambda each: (each.created, not each.is_finished)):
        newest[pod.index] = pod

    begin = _created(leader) if leader else None
    current = (pod for pod in newest.values() if not pod.is_finished or begin is None or _has_ended_in(pod, begin))
    return tuple(sorted(current, key=lambda pod: pod.index))


def find_survivors(leaders: Sequence[TrainerPod], others: Sequence[TrainerPod]) -> tuple[TrainerPod, ...]:
    """Returns the pods of further nodes that still run although the attempt that they were part of is over."""
    ended = end_of_attempt(leaders)
    return tuple(pod for pod in others if ended and not pod.is_finished and (_created(pod) or ended) < ended)


def end_of_attempt(leaders: Sequence[TrainerPod]) -> datetime | None:
    """Returns when the newest attempt that is over has ended; None if none is, or if its pod left no time."""
    if len(leaders) > 1 and not leaders[-1].is_finished:
        return _created(leaders[-1])  # no sooner than the end of the one before
    end = leaders[-1].termination if leaders else None
    return end.finished if end else None


def _with_cause(leader: TrainerPod, ended: Sequence[TrainerPod]) -> TrainerPod:
    if not leader.is_finished or leader.is_disrupted or not _is_stop(leader.termination):
        return leader
    causes = [(pod, pod.termination) for pod in ended if pod.termination is not None and _is_failure(pod)]
    if not causes:
        return leader

    pod, end = min(causes, key=lambda each: (each[1].finished is None, each[1].finished))
    said = _outcome(leader.termination)
    # What the leading pod was told it says with the step and the checkpoint, which the other does not know.
    message = leader.termination.message if leader.termination and said and said.result is Result.FAILED else None
    started = leader.termination.started if leader.termination else leader.started
    cause = replace(end, started=started, message=end.message if message is None else message)
    return replace(leader, termination=cause, ended_by=f"pod {pod.name}, node {pod.index}")


def _is_stop(end: Termination | None) -> bool:
    """True for a pod that failed for no reason of its own; also for one that vanished."""
    return end is None or end.exit_code == ExitCode.INTERRUPTED


def _is_failure(pod: TrainerPod) -> bool:
    end = pod.termination
    return end is not None and not pod.is_disrupted and end.exit_code not in (ExitCode.SUCCESS, ExitCode.INTERRUPTED)


def _has_ended_in(pod: TrainerPod, begin: datetime | None, end: datetime | None = None) -> bool:
    time = pod.termination.finished if pod.termination else None
    if not pod.is_finished or time is None:
        return False
    return (begin is None or time >= begin) and (end is None or time < end)


def _outcome(end: Termination | None) -> Outcome | None:
    return end.outcome() if end else None


def _created(pod: TrainerPod) -> datetime | None:
    return parse_time(pod.created or None)
