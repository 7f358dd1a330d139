"""Counts what a status write says for the first time: stages that ended, retries, and the end of a job.

Counted after the write, so a write that is lost is counted when it is made again, and never twice; a process that dies
between a write and its count loses the count.
"""

from finetune_api.cost.energy import JOULES_PER_WATT_HOUR
from finetune_api.failures import FailureReason
from finetune_api.status import FineTuneJobStatus
from finetune_operator.metrics.series import (
    COMPLETIONS,
    COST,
    ENERGY_JOULES,
    ESTIMATE_RATIO,
    GPU_SECONDS,
    JOB_SECONDS,
    LOST_STEPS,
    RETRIES,
    STAGE_SECONDS,
    UPLOADED_BYTES,
    WAITING_SECONDS,
)

_KUBELET_REASONS = frozenset({"Evicted", "OOMKilled", "Error", "Preempted", "NodeLost", "PodGone", "Stalled"})


def count_write(last: FineTuneJobStatus, written: FineTuneJobStatus, seconds_since_creation: float) -> None:
    """Counts what the status that was written says beyond the last one."""
    _count_stages(last, written)
    _count_retries(last, written)

    is_new_end = written.phase is not None and written.phase.is_terminal
    if is_new_end and not (last.phase is not None and last.phase.is_terminal):
        _count_end(written, seconds_since_creation)


def _count_stages(last: FineTuneJobStatus, written: FineTuneJobStatus) -> None:
    ended = {(stage.name, stage.start_time) for stage in last.stages if stage.end_time}
    for stage in written.stages:
        if stage.end_time and (stage.name, stage.start_time) not in ended:
            STAGE_SECONDS.labels(stage.name).observe(max(0.0, (stage.end_time - stage.start_time).total_seconds()))


def _count_retries(last: FineTuneJobStatus, written: FineTuneJobStatus) -> None:
    known = {attempt.uid for attempt in last.attempts}
    for former, attempt in zip(written.attempts, written.attempts[1:], strict=False):
        if attempt.uid not in known:
            RETRIES.labels(_bounded(former.reason)).inc()

    # Steps between the checkpoint that a pod resumed from and what its predecessor had reported.
    if written.resumed_from_step is not None and written.resumed_from_step != last.resumed_from_step:
        reported = last.progress.step if last.progress else None
        LOST_STEPS.inc(max(0, (reported or 0) - written.resumed_from_step))


def _count_end(written: FineTuneJobStatus, seconds_since_creation: float) -> None:
    result = "Reused" if written.reused else str(written.phase)
    COMPLETIONS.labels(result, _bounded(written.reason)).inc()
    JOB_SECONDS.labels(result).observe(max(0.0, seconds_since_creation))

    _count_usage(written, result)
    if not written.reused:
        for artifact in written.artifacts:
            UPLOADED_BYTES.labels(artifact.type).inc(artifact.bytes)


def _count_usage(written: FineTuneJobStatus, result: str) -> None:
    usage = written.usage
    if usage is None:
        return

    GPU_SECONDS.labels(result).inc(usage.gpu_seconds)
    WAITING_SECONDS.observe(usage.waiting_seconds)
    if usage.energy_watt_hours is not None:
        ENERGY_JOULES.labels(result).inc(usage.energy_watt_hours * JOULES_PER_WATT_HOUR)
    if usage.cost is not None and usage.currency is not None:
        COST.labels(usage.currency).inc(usage.cost)
    if usage.estimate_error_percent is not None:
        ESTIMATE_RATIO.observe(1 + usage.estimate_error_percent / 100)


def _bounded(reason: str | None) -> str:
    """Returns a reason of ours; what a kubelet or a pod says may be anything, and is Other."""
    known = reason in _KUBELET_REASONS or reason in tuple(FailureReason) or reason in ("Completed", "Reused")
    return str(reason) if reason and known else "Other"
