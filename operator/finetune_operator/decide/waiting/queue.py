"""A run whose Job is in a queue of Kueue: what it waits for, and how its suspension reaches Kueue (pure).

Kueue alone writes `suspend` of such a Job. What the spec wants is told to its Workload: while `spec.active` is false,
Kueue stops the Job and keeps it out of the line.
"""

from finetune_api.base import Json
from finetune_api.vocabulary import ConditionType, Phase
from finetune_operator.decide.decision import RETRY_SECONDS, Decision, WorkloadPatch
from finetune_operator.desired.names import PREFLIGHT, Component
from finetune_operator.observe.children import ChildJob
from finetune_operator.observe.snapshot import AnySnapshot, ChildRun, Snapshot, Waiting
from finetune_operator.observe.workload import DEACTIVATED_ANNOTATION, QueueView, Workload
from finetune_operator.status_reasons import StatusReason

FIRST_LOOK_SECONDS = 2.0
NEAR, NEAR_SECONDS, FAR_SECONDS = 10, 60.0, 300.0
"""A place in the line up to NEAR is read again every NEAR_SECONDS, any other one every FAR_SECONDS: each time that a
job is admitted, all places behind it change."""

_ALLOW = "The operator does so itself if the chart's value kueue.enabled is true"


def queue_is_missing(snapshot: Snapshot, run: ChildRun, *_: object) -> Decision | None:
    """The spec names a queue that does not exist. Nothing is created, so that the user learns it before the checks."""
    queue = snapshot.queue
    if queue is None or queue.problem is None or snapshot.current_run.job is not None:
        return None
    if snapshot.spec.run_policy.suspend:
        return None

    phase = Phase.PENDING if snapshot.awaits_preflight else Phase.QUEUED
    message = f"spec.scheduling.queueName is {queue.name}, but {queue.problem}"
    return Decision(
        phase,
        StatusReason.QUEUE_NOT_FOUND,
        message,
        is_stalled=True,
        outcome=run.outcome,
        requeue_seconds=RETRY_SECONDS,
    )


def explain_queue(snapshot: Snapshot, job: ChildJob) -> Waiting:
    """Explains what a Job that its queue holds waits for, in Kueue's words."""
    queue = snapshot.queue or QueueView(str(job.queue), is_visible=False)
    place = f" at position {queue.position}" if queue.position else ""
    head = f"Job {job.name} waits in queue {queue.name}{place}"

    if queue.problem is not None:
        return Waiting(StatusReason.QUEUE_NOT_FOUND, f"{head}, but {queue.problem}", is_stalled=True)
    if not queue.is_visible:
        command = (
            f"kubectl -n {snapshot.metadata.namespace} get workloads -l kueue.x-k8s.io/job-uid={job.queued_uid} -o yaml"
        )
        message = (
            f"{head} until Kueue admits it; `{command}` says for what. "
            "The operator says it here if the chart's value kueue.enabled is true"
        )
        return Waiting(StatusReason.WAITING_IN_QUEUE, message)
    if queue.workload is None:
        message = f"{head}: Kueue has made no Workload of it yet. If that lasts, Kueue does not run"
        return Waiting(StatusReason.WAITING_IN_QUEUE, message)
    return _explain_workload(snapshot, queue.workload, head)


def explain_required_queue(job: ChildJob, component: Component) -> Waiting:
    """Explains that Kueue holds a Job which names no queue: it manages every Job of the namespace."""
    what = f"Kueue manages every Job of this namespace and has suspended Job {job.name}, which names no queue"
    remedy = "create the job with spec.scheduling.queueName"
    if component == PREFLIGHT:
        remedy += ", in an installation whose chart's value kueue.queuePreflight is true"
    return Waiting(StatusReason.QUEUE_REQUIRED, f"{what}: {remedy}", is_stalled=True)


def describe_pods_ready(snapshot: Snapshot, waiting: Waiting) -> Waiting:
    """Adds to the wait of an admitted run what Kueue says of its pods: after a time it evicts those that do not
    start."""
    workload = snapshot.queue.workload if snapshot.queue else None
    late = workload.fails("PodsReady") if workload else None
    if late is None:
        return waiting
    return Waiting(waiting.reason, f"{waiting.message} (Kueue: PodsReady is False, {late})", waiting.is_stalled)


def describe_suspension(snapshot: Snapshot, run: ChildRun) -> Decision | None:
    """Describes a job that is to be suspended while its Job is in a queue; None if there is nothing special."""
    job = run.job
    if not snapshot.spec.run_policy.suspend or job is None or job.queue is None:
        return None

    queue = snapshot.queue or QueueView(job.queue, is_visible=False)
    phase = snapshot.status.phase or Phase.QUEUED
    if not queue.is_visible or (queue.workload is None and not job.suspended):
        return Decision(phase, StatusReason.QUEUE_DECIDES, _ask_for_deactivation(snapshot, job), is_stalled=True)

    # Kueue makes the Workload of a new Job in its own time. Until then nobody can keep it from admitting the Job.
    if queue.workload is None and queue.problem is None:
        message = "waiting until Kueue has made a Workload of the Job, which is then deactivated"
        return Decision(phase, StatusReason.SUSPENDING, message, requeue_seconds=FIRST_LOOK_SECONDS)
    if not job.suspended:
        message = "Kueue was asked to stop the trainer, which then writes its checkpoint"
        return Decision(phase, StatusReason.SUSPENDING, message, requeue_seconds=RETRY_SECONDS)
    return None


def describe_eviction(snapshot: Snapshot, run: ChildRun) -> Decision | None:
    """Describes a trainer that runs although its queue has suspended its Job: it is being stopped."""
    if run.job is None or not run.job.waits_in_queue:
        return None
    phase, workload = snapshot.status.phase, snapshot.queue.workload if snapshot.queue else None
    evicted = workload.holds("Evicted") if workload else None
    cause = f" ({evicted})" if evicted else ""
    message = f"Kueue evicted the job{cause}, and the trainer is writing its checkpoint before it stops"
    return Decision(phase if phase and phase.holds_gpu else Phase.RUNNING, StatusReason.EVICTED_BY_QUEUE, message)


def follow_suspension(snapshot: Snapshot, run: ChildRun) -> WorkloadPatch | None:
    """Returns the patch that makes the Workload follow spec.runPolicy.suspend; None if it does."""
    workload = snapshot.queue.workload if snapshot.queue and run.job else None
    if workload is None:
        return None
    if snapshot.spec.run_policy.suspend:
        return _deactivate(workload, "spec.runPolicy.suspend") if workload.is_active else None
    if workload.is_active or not workload.is_deactivated_by_us:
        return None
    return WorkloadPatch(workload.body, {"spec": {"active": True}, "metadata": _annotation(None)})


def leave_queue(snapshot: AnySnapshot, job: ChildJob | None) -> WorkloadPatch | None:
    """Returns the patch that takes the Job of a job that is over out of the line: admitted, it would train again."""
    workload = snapshot.queue.workload if snapshot.queue else None
    if job is None or not job.waits_in_queue or workload is None or not workload.is_active:
        return None
    return _deactivate(workload, "the FineTuneJob is over")


def seconds_until_next_look(snapshot: Snapshot, run: ChildRun) -> float | None:
    """Returns the seconds after which a Job in a queue is looked at though nothing happens; None for other Jobs."""
    queue, job = snapshot.queue, run.job
    if job is None or not job.waits_in_queue or queue is None:
        return None
    if queue.problem is not None:
        return RETRY_SECONDS
    if not queue.is_visible:
        return None

    since = next((c.last_transition_time for c in snapshot.status.conditions if c.type is ConditionType.QUEUED), None)
    waited = (snapshot.now - since).total_seconds() if since else 0.0
    longest = (
        RETRY_SECONDS if queue.workload is None else NEAR_SECONDS if (queue.position or NEAR + 1) <= NEAR else None
    )
    return min(longest or FAR_SECONDS, max(FIRST_LOOK_SECONDS, waited / 2))


def _explain_workload(snapshot: Snapshot, workload: Workload, head: str) -> Waiting:
    evicted, finished = workload.holds("Evicted"), workload.holds("Finished")
    if finished is not None:
        message = f"Kueue has finished Workload {workload.name} ({finished}) and starts no pod: delete the Job"
        return Waiting(StatusReason.QUEUE_DEACTIVATED, message, is_stalled=True)

    if not workload.is_active and not workload.is_deactivated_by_us:
        namespace, change = snapshot.metadata.namespace, '{"spec": {"active": true}}'
        cause = f" ({evicted})" if evicted else ""
        message = (
            f"Workload {workload.name} was deactivated{cause}, so Kueue does not admit it: remove the cause, then "
            f"`kubectl -n {namespace} patch workload {workload.name} --type merge -p '{change}'`"
        )
        return Waiting(StatusReason.QUEUE_DEACTIVATED, message, is_stalled=True)

    state = _admission_state(workload)
    if evicted is not None:
        told = f"Kueue evicted the job ({evicted}); it goes on from its newest checkpoint. {head}"
        return Waiting(StatusReason.EVICTED_BY_QUEUE, f"{told}: {state}" if state else told)
    return Waiting(StatusReason.WAITING_IN_QUEUE, f"{head}: {state}" if state else head)


def _admission_state(workload: Workload) -> str:
    """Says in Kueue's words why a Workload is not admitted."""
    parts = []
    reserved = workload.fails("QuotaReserved")
    if reserved is not None:
        parts.append(str(reserved))
    elif workload.holds("QuotaReserved"):
        checks = "; ".join(workload.pending_checks) or "Kueue starts it"
        parts.append(f"its quota is reserved, and admission checks are awaited: {checks}")

    if (requeued := workload.fails("Requeued")) is not None:
        until = f" until {workload.requeue_at}" if workload.requeue_at else ""
        parts.append(f"not put back into the line{until} ({requeued})")
    return "; ".join(parts)


def _ask_for_deactivation(snapshot: Snapshot, job: ChildJob) -> str:
    command = f"kubectl -n {snapshot.metadata.namespace} get workloads -l kueue.x-k8s.io/job-uid={job.queued_uid}"
    state = "holds it now and may start it at any time" if job.suspended else "starts and stops it"
    return (
        f"spec.runPolicy.suspend is true, but Job {job.name} is in Kueue's queue {job.queue}, which {state}: "
        f"set spec.active to false in the Workload that `{command}` shows. {_ALLOW}"
    )


def _deactivate(workload: Workload, cause: str) -> WorkloadPatch:
    return WorkloadPatch(workload.body, {"spec": {"active": False}, "metadata": _annotation(cause)})


def _annotation(value: str | None) -> Json:
    return {"annotations": {DEACTIVATED_ANNOTATION: value}}
