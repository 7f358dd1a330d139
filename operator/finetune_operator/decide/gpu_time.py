"""GPU time that a job has taken, and what is left of spec.runPolicy.maxGpuSeconds (pure).

A pod holds its GPUs from the moment at which it got a node, long before its container starts. The times are those of
scheduler and kubelet. What a pod that is gone has held is known from the status, in which it was counted while it ran,
and from the Job, which makes the next pod only when the last one has ended.
"""

import math
from collections.abc import Iterable, Sequence
from datetime import datetime

from finetune_api.status import Attempt
from finetune_operator.desired.names import TRAINER
from finetune_operator.observe.children import TrainerPod
from finetune_operator.observe.snapshot import ChildRun, Snapshot
from finetune_operator.observe.termination import parse_time

BACKSTOP_SECONDS = 60
"""Seconds after the budget is spent at which the Job itself ends, if no operator has seen to it: longer than a new
leader takes, so that the operator's own reason comes first."""


def pod_seconds(pod: TrainerPod, now: datetime) -> int:
    """Returns the seconds that a pod has held its node; 0 before it got one."""
    begun = pod.scheduled or pod.started
    if begun is None:
        return 0

    end = pod.termination.finished if pod.termination else None
    if end is None and pod.is_finished:
        return 0  # refused or removed, and nothing says when: what was counted before stands
    return max(0, int(((end or now) - begun).total_seconds()))


def held_seconds(attempts: Sequence[Attempt], run: ChildRun, now: datetime) -> dict[str, int]:
    """Returns the seconds that each pod has held its node, by UID: those of the status and those that exist."""
    held = {attempt.uid: attempt.held_seconds or 0 for attempt in attempts}
    for pod in run.pods:
        # The kubelet's time of the end replaces what was counted by another clock before.
        known = 0 if pod.termination else held.get(pod.uid, 0)
        held[pod.uid] = max(known, pod_seconds(pod, now))

    exist = {pod.uid for pod in run.pods}
    for place, attempt in enumerate(attempts):
        if attempt.uid not in exist and attempt.end_time is None and attempt.start_time is not None:
            end = _latest_end(attempt.start_time, attempts[place + 1 :], run)
            seen = int((end - attempt.start_time).total_seconds()) if end else 0
            held[attempt.uid] = max(held[attempt.uid], seen)
    return held


def _latest_end(started: datetime, later: Iterable[Attempt], run: ChildRun) -> datetime | None:
    """Returns the time by which a pod had ended that vanished unseen; None if nothing tells.

    It had ended when the next pod was made, when the Job ended, or when it was suspended. After a suspension that is
    over, which may have lasted for days, nobody knows.
    """
    job = run.job
    if job is None or (job.started is not None and job.started > started):
        return None

    times = [parse_time(pod.created) for pod in run.pods]
    times += [attempt.start_time for attempt in later]
    times += [end.time for end in (job.complete, job.failed, job.suspension) if end is not None]
    return min((time for time in times if time is not None and time >= started), default=None)


def spent_gpu_seconds(snapshot: Snapshot, run: ChildRun) -> int:
    """Returns the GPU-seconds that all pods of the job have taken."""
    usage, attempts = snapshot.status.usage, snapshot.status.attempts
    held = sum(held_seconds(attempts, run, snapshot.now).values())
    return (held + (usage.earlier_held_seconds if usage else 0)) * snapshot.spec.resources.all_gpus


def seconds_until_budget_is_spent(snapshot: Snapshot, run: ChildRun) -> float | None:
    """Returns the seconds that a running pod may go on; None if nothing limits it, or if no pod holds a GPU."""
    limit, gpus = snapshot.spec.run_policy.max_gpu_seconds, snapshot.spec.resources.all_gpus
    if limit is None or gpus == 0 or not any(_holds_a_node(pod) for pod in run.pods):
        return None
    return (limit - spent_gpu_seconds(snapshot, run)) / gpus


def is_budget_spent(snapshot: Snapshot, run: ChildRun) -> bool:
    """True if the job has taken all the GPU time that it may."""
    limit = snapshot.spec.run_policy.max_gpu_seconds
    has_gpus = snapshot.spec.resources.all_gpus > 0
    return limit is not None and has_gpus and spent_gpu_seconds(snapshot, run) >= limit


def backstop_deadline(snapshot: Snapshot, run: ChildRun) -> int | None:
    """Returns the activeDeadlineSeconds at which the Job itself ends a trainer whose budget is spent; None for none.

    Only while a pod holds its GPUs: the Job counts the wait for a node, too, and a job that waits must lose nothing.
    It is counted from times that stay, so that each look finds the same number.
    """
    job, limit = run.job, snapshot.spec.run_policy.max_gpu_seconds
    pod = next((pod for pod in reversed(run.pods) if _holds_a_node(pod)), None)
    if job is None or job.started is None or limit is None or run.component != TRAINER:
        return None
    if is_budget_spent(snapshot, run) or job.is_past_deadline(snapshot.now):
        return job.deadline  # whatever ends it stays: why it ended is read from it
    if pod is None or snapshot.spec.resources.all_gpus == 0:
        return None

    begun = pod.scheduled or pod.started
    assert begun is not None
    before = spent_gpu_seconds(snapshot, run) / snapshot.spec.resources.all_gpus - pod_seconds(pod, snapshot.now)
    left = limit / snapshot.spec.resources.all_gpus - before
    return max(1, math.ceil((begun - job.started).total_seconds() + left) + BACKSTOP_SECONDS)


def _holds_a_node(pod: TrainerPod) -> bool:
    return not pod.is_finished and (pod.scheduled or pod.started) is not None
