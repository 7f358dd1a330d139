"""The phase of a run whose Job has neither succeeded nor failed, and the patch that makes it follow the spec (pure).

Training and preflight go through the same states. They differ in words: while preflight runs, the phase is Validating.
"""

from dataclasses import replace

from finetune_api.base import Json
from finetune_api.vocabulary import Phase
from finetune_operator.decide.decision import RETRY_SECONDS, Decision
from finetune_operator.decide.explain_failure import explain_pod
from finetune_operator.decide.gpu_time import backstop_deadline, seconds_until_budget_is_spent
from finetune_operator.decide.silence import find_silence
from finetune_operator.decide.waiting.explain_waiting import find_waiting
from finetune_operator.decide.waiting.gpu_limit import find_gpu_wait, seconds_until_next_gpu_look
from finetune_operator.decide.waiting.queue import describe_eviction, describe_suspension, seconds_until_next_look
from finetune_operator.decide.waiting.startup_deadline import seconds_until_startup_deadline
from finetune_operator.desired.names import ACTIVE_SECONDS_ANNOTATION, ACTIVE_SINCE_ANNOTATION, PREFLIGHT
from finetune_operator.desired.trainer_job import remaining_deadline
from finetune_operator.observe.children import ChildJob
from finetune_operator.observe.snapshot import ChildRun, Snapshot, Waiting
from finetune_operator.status_reasons import StatusReason

IS_SUSPENDED = "spec.runPolicy.suspend is true"
_WORDS_OF_PREFLIGHT: dict[str, tuple[str, str]] = {
    StatusReason.TRAINER_STARTED: (StatusReason.CHECKING, "model, dataset and output are being checked"),
    StatusReason.SUSPENDING: (StatusReason.SUSPENDING, "the checks are being stopped"),
}


def describe_open_run(snapshot: Snapshot, run: ChildRun) -> Decision:
    """Says what an open run is doing. The decision has no actions."""
    decision = _describe(snapshot, run)
    return _in_words_of_preflight(decision) if run.component == PREFLIGHT else decision


def follow_spec(snapshot: Snapshot, run: ChildRun, job: ChildJob) -> Json | None:
    """Returns the patch for the fields of a Job that may follow the spec; None if they do.

    The seconds that the Job has run are recorded in the very patch that suspends it, because the Job controller then
    forgets when it started.
    """
    if job.queue is not None or run.job_set is not None:
        return _follow_spec_of_others(snapshot, run, job)

    policy = snapshot.spec.run_policy
    if policy.suspend:
        if job.suspended:
            return None
        active = job.active_seconds_at(snapshot.now)
        return {"spec": {"suspend": True}, "metadata": {"annotations": {ACTIVE_SECONDS_ANNOTATION: str(active)}}}

    # The Job controller starts a resumed Job's deadline anew, so what the Job has run before is subtracted.
    changes: Json = {}
    if job.suspended and not job.is_held_by_kueue and find_gpu_wait(snapshot, run) is None:
        changes["suspend"] = False
    return _with_deadline(snapshot, run, job.active_seconds, changes)


def follow_suspension_of_set(snapshot: Snapshot, run: ChildRun) -> Json | None:
    """Returns the patch that makes a JobSet follow spec.runPolicy.suspend, as its Job follows it; None if it does, and
    for one that a queue starts and stops."""
    job_set, wanted = run.job_set, snapshot.spec.run_policy.suspend
    if job_set is None or job_set.queue is not None or job_set.is_over or job_set.suspended is wanted:
        return None
    if not wanted and (job_set.is_held_by_kueue or find_gpu_wait(snapshot, run) is not None):
        return None
    if not wanted and run.job is None and snapshot.gpu_use is not None:
        return None  # other jobs see by its Job that it takes its GPUs
    return {"spec": {"suspend": wanted}}


def _follow_spec_of_others(snapshot: Snapshot, run: ChildRun, job: ChildJob) -> Json | None:
    """Leaves `suspend` to the queue, or to the JobSet's controller, and notes what the Job controller forgets when they
    write it: the start while the Job runs, and afterwards the seconds that it has run."""
    if not job.suspended:
        if job.started is None or job.noted_start == job.started:
            return _with_deadline(snapshot, run, job.active_seconds, {})
        noted: Json = {ACTIVE_SINCE_ANNOTATION: job.started.isoformat()}
        if run.job_set is not None:
            noted[ACTIVE_SECONDS_ANNOTATION] = str(job.active_seconds)  # those of a Job that was made again are old
        return {"metadata": {"annotations": noted}} | (_with_deadline(snapshot, run, job.active_seconds, {}) or {})

    active = job.active_seconds_at(snapshot.now)
    changes = _with_deadline(snapshot, run, active, {})
    if job.noted_start is None:
        return changes
    noted = {ACTIVE_SECONDS_ANNOTATION: str(active), ACTIVE_SINCE_ANNOTATION: None}
    return {"metadata": {"annotations": noted}} | (changes or {})


def _with_deadline(snapshot: Snapshot, run: ChildRun, active_seconds: int, changes: Json) -> Json | None:
    deadlines = (
        remaining_deadline(snapshot.spec.run_policy.active_deadline_seconds, active_seconds),
        backstop_deadline(snapshot, run),
    )
    deadline = min((seconds for seconds in deadlines if seconds is not None), default=None)
    if run.job is not None and run.job.deadline != deadline:
        changes = changes | {"activeDeadlineSeconds": deadline}
    return {"spec": changes} if changes else None


def _describe(snapshot: Snapshot, run: ChildRun) -> Decision:
    pod = run.awaited_pod

    if (queued := describe_suspension(snapshot, run)) is not None:
        return queued

    # The Job controller stops the pods of a suspended Job; the phase stays until they have ended.
    if snapshot.spec.run_policy.suspend:
        if any(not pod.is_finished for pod in (*run.pods, *run.others)):
            phase = snapshot.status.phase or Phase.RUNNING
            return Decision(phase, StatusReason.SUSPENDING, "the trainer is writing its checkpoint before it stops")
        return Decision(Phase.SUSPENDED, StatusReason.SUSPENDED, IS_SUSPENDED, outcome=run.outcome)

    if pod is not None and pod.is_running:
        return describe_eviction(snapshot, run) or _with_trainer(snapshot, run)

    waiting = find_waiting(snapshot, run)
    if waiting is not None:
        return _waiting(snapshot, run, waiting)
    return _ending(snapshot, run)


def _with_trainer(snapshot: Snapshot, run: ChildRun) -> Decision:
    if run.report is None:
        message = "the trainer has started and has not reported its progress yet"
        decision = Decision(Phase.RUNNING, StatusReason.TRAINER_STARTED, message)
    else:
        stage = run.report.report.finetune.stage
        decision = Decision(stage.phase, stage.value, f"the trainer is in stage {stage.value}")

    # Nothing announces that a trainer falls silent, or that its budget is spent.
    timers = (_seconds_until_silence(snapshot, run), seconds_until_budget_is_spent(snapshot, run))
    return replace(decision, requeue_seconds=min((left for left in timers if left is not None), default=None))


def _seconds_until_silence(snapshot: Snapshot, run: ChildRun) -> float | None:
    silence = find_silence(snapshot, run)
    left = silence.seconds_until(silence.limit.silence, snapshot.now) if silence else None
    if left is None:
        return None
    # A silence that is no sign of a stall, as that of a trainer that reports elsewhere, is no reason for haste.
    return left if left > 0 else RETRY_SECONDS


def _waiting(snapshot: Snapshot, run: ChildRun, waiting: Waiting) -> Decision:
    # No watch announces Events. Whatever else a run waits for brings an event of its Job or pod.
    timers = (
        None if (wait := run.seconds_until_events(snapshot.now)) is None else wait or RETRY_SECONDS,
        seconds_until_startup_deadline(snapshot, run, waiting),
        seconds_until_next_look(snapshot, run),
        seconds_until_next_gpu_look(snapshot, run),
    )
    return Decision(
        Phase.QUEUED,
        waiting.reason,
        waiting.message,
        is_stalled=waiting.is_stalled,
        outcome=run.outcome,
        requeue_seconds=min((seconds for seconds in timers if seconds is not None), default=None),
    )


def _ending(snapshot: Snapshot, run: ChildRun) -> Decision:
    """The newest pod has ended for good, and the Job controller has not reacted yet: calling the job queued for a
    moment would be wrong."""
    last = snapshot.status.phase
    phase = last if last in (Phase.EXPORTING, Phase.UPLOADING) else Phase.RUNNING
    reason, message = explain_pod(snapshot, run, run.pods[-1])
    return Decision(phase, StatusReason.ENDING, f"{reason}: {message}; the job ends", outcome=run.outcome)


def _in_words_of_preflight(decision: Decision) -> Decision:
    phase = Phase.SUSPENDED if decision.phase is Phase.SUSPENDED else Phase.VALIDATING
    reason, message = _WORDS_OF_PREFLIGHT.get(decision.reason, (decision.reason, decision.message))
    # The outcome of preflight's pods is not the job's: they have no step and no checkpoint.
    return replace(decision, phase=phase, reason=reason, message=message, outcome=None)
