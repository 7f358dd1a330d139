"""The budget of GPU time, spec.runPolicy.maxGpuSeconds: refused beforehand, and ended when it is spent (pure)."""

from dataclasses import replace
from datetime import timedelta

from finetune_api.base import Json
from finetune_api.failures import FailureReason
from finetune_api.vocabulary import Phase, PreflightResult, Stage
from finetune_operator.decide.decision import Actions, Decision
from finetune_operator.decide.explain_failure import MAX_GPU_SECONDS, build_failure, describe_spent_budget
from finetune_operator.decide.gpu_time import is_budget_spent
from finetune_operator.observe.snapshot import ChildRun, Snapshot
from finetune_operator.status_reasons import StatusReason

SLACK_SECONDS = 60
"""Time beyond its grace period that a trainer may take to end, before the job fails without waiting for it."""


def gpu_budget_is_too_small(snapshot: Snapshot, run: ChildRun, *_: object) -> Decision | None:
    """The checks say that training would take more GPU time than it may: it does not begin."""
    limit, outcome = snapshot.spec.run_policy.max_gpu_seconds, run.outcome
    hours = outcome.preflight.gpu_hours if outcome is not None and outcome.preflight else None
    if outcome is None or outcome.reused or limit is None or hours is None or hours * 3600 <= limit:
        return None

    needed = int(hours * 3600)
    message = (
        f"training would take about {needed:,} GPU-seconds, and {MAX_GPU_SECONDS} allows {limit:,}: "
        f"write {needed * 5 // 4}"
    )
    failure = build_failure(snapshot, run, FailureReason.GPU_BUDGET_EXHAUSTED, message)
    failure = failure.model_copy(update={"stage": Stage.PREFLIGHT, "step": None})
    return Decision.fail(failure, preflight=PreflightResult.FAILED, requeue_seconds=0)


def gpu_budget_is_spent(snapshot: Snapshot, run: ChildRun, *_: object) -> Decision | None:
    """The pods have held GPUs for as long as they may. The Job is told to end, and the job fails when its trainer has
    stored a checkpoint and is gone: the GPU is held so long, and that counts."""
    is_open = any(not pod.is_finished for pod in run.pods)
    if run.job is None or run.job.suspended or not is_open or not is_budget_spent(snapshot, run):
        return None

    message = describe_spent_budget(snapshot, run)
    ends = _end_of_job(snapshot, run)
    if ends > 0:
        stops = f"{message}; the trainer is being stopped"
        phase = snapshot.status.phase if snapshot.status.phase and snapshot.status.phase.holds_gpu else Phase.RUNNING
        decision = Decision(phase, StatusReason.GPU_BUDGET_SPENT, stops, requeue_seconds=ends)
        return replace(decision, actions=Actions(patch_trainer_job=_end_now(snapshot, run)))

    failure = build_failure(snapshot, run, FailureReason.GPU_BUDGET_EXHAUSTED, message)
    return Decision.fail(failure, outcome=run.outcome, requeue_seconds=0)


def _end_of_job(snapshot: Snapshot, run: ChildRun) -> float:
    """Returns the seconds for which the end of a trainer is waited for."""
    patience = snapshot.spec.run_policy.termination_grace_period_seconds + SLACK_SECONDS
    assert run.job is not None
    if run.job.started is None:
        return 0.0  # nothing tells when it was told
    if _end_now(snapshot, run) is not None:
        return float(patience)

    told = run.job.started + timedelta(seconds=run.job.deadline or 0)
    return patience - (snapshot.now - told).total_seconds()


def _end_now(snapshot: Snapshot, run: ChildRun) -> Json | None:
    """Returns the patch with which the Job's deadline is now; None if it has passed."""
    job = run.job
    if job is None or job.started is None:
        return None
    elapsed = max(1, int((snapshot.now - job.started).total_seconds()))
    has_passed = job.deadline is not None and job.deadline <= elapsed
    return None if has_passed else {"spec": {"activeDeadlineSeconds": elapsed}}
