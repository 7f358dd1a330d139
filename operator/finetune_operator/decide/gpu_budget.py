"""The budget of GPU time, spec.runPolicy.maxGpuSeconds, and the time that counts against it (pure).

A pod holds its GPUs from the moment at which it got a node, long before its container starts. The times are those of
scheduler and kubelet. What a pod that is gone has held is known from the status, in which it was counted while it ran.
"""

from collections.abc import Iterable
from datetime import datetime

from finetune_api.failures import FailureReason
from finetune_api.status import Attempt
from finetune_api.vocabulary import PreflightResult, Stage
from finetune_operator.decide.decision import Decision
from finetune_operator.decide.explain_failure import build_failure
from finetune_operator.observe.children import TrainerPod
from finetune_operator.observe.snapshot import ChildRun, Snapshot

_FIELD = "spec.runPolicy.maxGpuSeconds"


def pod_seconds(pod: TrainerPod, now: datetime) -> int:
    """Returns the seconds that a pod has held its node; 0 before it got one."""
    begun = pod.scheduled or pod.started
    if begun is None:
        return 0

    end = pod.termination.finished if pod.termination else None
    if end is None and pod.is_finished:
        return 0  # refused or removed, and nothing says when: what was counted before stands
    return max(0, int(((end or now) - begun).total_seconds()))


def held_seconds(attempts: Iterable[Attempt], pods: Iterable[TrainerPod], now: datetime) -> dict[str, int]:
    """Returns the seconds that each pod has held its node, by UID: those of the status and those that exist."""
    held = {attempt.uid: attempt.held_seconds or 0 for attempt in attempts}
    for pod in pods:
        # The kubelet's time of the end replaces what was counted by another clock before.
        known = 0 if pod.termination else held.get(pod.uid, 0)
        held[pod.uid] = max(known, pod_seconds(pod, now))
    return held


def gpu_budget_is_too_small(snapshot: Snapshot, run: ChildRun, *_: object) -> Decision | None:
    """The checks say that training would take more GPU time than it may: it does not begin."""
    limit, outcome = snapshot.spec.run_policy.max_gpu_seconds, run.outcome
    hours = outcome.preflight.gpu_hours if outcome is not None and outcome.preflight else None
    if outcome is None or outcome.reused or limit is None or hours is None or hours * 3600 <= limit:
        return None

    needed = int(hours * 3600)
    message = (
        f"training would take about {needed:,} GPU-seconds, and {_FIELD} allows {limit:,}: write {needed * 5 // 4}"
    )
    failure = build_failure(snapshot, run, FailureReason.GPU_BUDGET_EXHAUSTED, message)
    failure = failure.model_copy(update={"stage": Stage.PREFLIGHT, "step": None})
    return Decision.fail(failure, preflight=PreflightResult.FAILED, requeue_seconds=0)


def gpu_budget_is_spent(snapshot: Snapshot, run: ChildRun, *_: object) -> Decision | None:
    """The pods have held GPUs for as long as they may. The job fails; the next look, which sees this in the status,
    ends the Job, whose trainer then stores a checkpoint."""
    left = seconds_until_budget_is_spent(snapshot, run)
    if left is None or left > 0:
        return None

    step = snapshot.status.checkpoint_step
    kept = f"the newest checkpoint is that of step {step}" if step else "there is no checkpoint yet"
    limit = snapshot.spec.run_policy.max_gpu_seconds
    message = f"the job has held GPUs for {_spent(snapshot, run):,} GPU-seconds, and {_FIELD} allows {limit:,}; {kept}"
    failure = build_failure(snapshot, run, FailureReason.GPU_BUDGET_EXHAUSTED, message)
    return Decision.fail(failure, outcome=run.outcome, requeue_seconds=0)


def seconds_until_budget_is_spent(snapshot: Snapshot, run: ChildRun) -> float | None:
    """Returns the seconds that a running pod may go on; None if nothing limits it, or if no pod holds a GPU."""
    limit, gpus = snapshot.spec.run_policy.max_gpu_seconds, snapshot.spec.resources.gpus
    holds = any(not pod.is_finished and (pod.scheduled or pod.started) for pod in run.pods)
    if limit is None or gpus == 0 or not holds:
        return None
    return (limit - _spent(snapshot, run)) / gpus


def _spent(snapshot: Snapshot, run: ChildRun) -> int:
    usage, status = snapshot.status.usage, snapshot.status
    held = sum(held_seconds(status.attempts, run.pods, snapshot.now).values())
    return (held + (usage.earlier_held_seconds if usage else 0)) * snapshot.spec.resources.gpus
