"""The deadline of a run that waits for its pod to start (pure).

It is the operator that ends such a job: to the Job controller, a pod that waits is a pod that runs. The clock is the
status itself, in which condition Queued turns when the wait begins, and the Job's start, which the Job controller
forgets while a Job is suspended. So neither suspension nor a restart of the operator counts.

The API server may refuse the Job itself, by a quota for example. Then the status says so, and the clock runs as well.
"""

from dataclasses import dataclass
from datetime import datetime

from finetune_api.failures import FailureReason
from finetune_api.status import Condition
from finetune_api.vocabulary import ConditionType, PreflightResult, Stage
from finetune_operator.decide.decision import Decision
from finetune_operator.decide.explain_failure import build_failure
from finetune_operator.decide.waiting.explain_waiting import find_waiting
from finetune_operator.decide.waiting.gpu_limit import find_gpu_wait
from finetune_operator.desired.names import PREFLIGHT
from finetune_operator.observe.snapshot import ChildRun, Snapshot, Waiting
from finetune_operator.status_reasons import StatusReason

MAX_HELD_SECONDS = 3600
"""Limit for a pod that keeps a GPU from others while it waits for a person, if the spec sets none."""

_HOLDS_A_NODE = (FailureReason.IMAGE_PULL_FAILED, FailureReason.CONTAINER_CONFIG_ERROR)
_FIELD = "spec.runPolicy.startupDeadlineSeconds"


@dataclass(frozen=True)
class _Limit:
    """Maximum time of a wait, and its beginning."""

    seconds: int
    since: datetime
    sentence: str

    def seconds_left(self, now: datetime) -> float:
        """Returns the seconds until the deadline; 0 or less once it has passed."""
        return self.seconds - (now - self.since).total_seconds()


def startup_deadline_has_passed(snapshot: Snapshot, run: ChildRun, *_: object) -> Decision | None:
    """The run's pod has waited too long for its start. The job fails with the reason of the wait; the next look, which
    sees this in the status, ends the Job."""
    waiting = find_waiting(snapshot, run)
    if run.job is None:
        made = None if run.job_set is None else waiting  # JobSet's controller may not run
        waiting = _find_refusal(snapshot) or find_gpu_wait(snapshot, run) or made
    limit = _limit(snapshot, run, waiting) if waiting else None
    if waiting is None or limit is None or limit.seconds_left(snapshot.now) > 0:
        return None

    waited = int((snapshot.now - limit.since).total_seconds())
    is_failure = waiting.reason in tuple(FailureReason)
    reason = FailureReason(waiting.reason) if is_failure else FailureReason.STARTUP_DEADLINE_EXCEEDED
    failure = build_failure(snapshot, run, reason, f"{limit.sentence}, and it has waited {waited} s: {waiting.message}")

    is_preflight = run.component == PREFLIGHT
    if is_preflight:
        failure = failure.model_copy(update={"stage": Stage.PREFLIGHT, "step": None})

    return Decision.fail(
        failure,
        outcome=None if is_preflight else run.outcome,
        preflight=PreflightResult.FAILED if is_preflight else None,
        requeue_seconds=0,
    )


def seconds_until_startup_deadline(snapshot: Snapshot, run: ChildRun, waiting: Waiting) -> float | None:
    """Returns the seconds that a wait may still take; None if nothing limits it."""
    limit = _limit(snapshot, run, waiting)
    return limit.seconds_left(snapshot.now) if limit else None


def _limit(snapshot: Snapshot, run: ChildRun, waiting: Waiting) -> _Limit | None:
    # A Job that is suspended, by the spec or by a queue, has no start.
    waits_for_gpus = waiting.reason == StatusReason.GPU_LIMIT_REACHED
    starts = [] if run.job is None or waits_for_gpus else [run.job.started]
    if None in starts:
        return None

    # Trainers may come and go between two looks, and then Queued never turned.
    ends = [pod.termination.finished for pod in run.pods if pod.termination]
    times = [time for time in (*starts, *ends) if time is not None]
    since = max((_true_since(snapshot, ConditionType.QUEUED), *times))

    seconds = snapshot.spec.run_policy.startup_deadline_seconds
    if seconds is not None:
        return _Limit(seconds, since, f"the pod may take {seconds} s to start ({_FIELD})")
    if waiting.reason not in _HOLDS_A_NODE:
        return None

    # The time before, in which the pod had no node, hurt nobody.
    stuck = max(since, _true_since(snapshot, ConditionType.STALLED))
    sentence = f"the pod may keep its node for {MAX_HELD_SECONDS} s without starting ({_FIELD} sets another limit)"
    return _Limit(MAX_HELD_SECONDS, stuck, sentence)


def _find_refusal(snapshot: Snapshot) -> Waiting | None:
    """Finds why a run has no Job, if the last look was refused to create it."""
    stalled = _condition(snapshot, ConditionType.STALLED)
    if snapshot.spec.run_policy.suspend or stalled is None or stalled.status != "True":
        return None
    if stalled.reason not in (StatusReason.PERMISSION_DENIED, StatusReason.CHILD_REJECTED):
        return None  # a name that was taken, for example, and is free now
    return Waiting(stalled.reason, stalled.message, is_stalled=True)


def _condition(snapshot: Snapshot, kind: ConditionType) -> Condition | None:
    return next((each for each in snapshot.status.conditions if each.type is kind), None)


def _true_since(snapshot: Snapshot, kind: ConditionType) -> datetime:
    """Time since which a condition of the last status is True; now if it is not."""
    found = _condition(snapshot, kind)
    return found.last_transition_time if found and found.status == "True" else snapshot.now
