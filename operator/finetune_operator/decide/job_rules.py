"""Rules about the FineTuneJob itself, whatever its runs do (pure)."""

from finetune_api.base import Json
from finetune_api.failures import FailureReason
from finetune_api.vocabulary import Phase
from finetune_operator.decide.decision import RETRY_SECONDS, Actions, Decision
from finetune_operator.decide.explain_failure import build_failure
from finetune_operator.decide.waiting.queue import leave_queue
from finetune_operator.desired.installation import Installation
from finetune_operator.observe.children import ChildJob
from finetune_operator.observe.job_set import find_foreign
from finetune_operator.observe.snapshot import AnySnapshot, BlindSnapshot, ChildRun, Snapshot, UnreadableSnapshot
from finetune_operator.status_reasons import StatusReason

MAX_SPEC_ERROR_LENGTH = 1024  # characters


def job_is_over(snapshot: AnySnapshot, *_: object) -> Decision | None:
    """The status says that the job succeeded or failed. All that remains is to end a Job that still waits for its pod,
    and to give the Jobs their TTL, which happens only now because the Job controller removes a Job with its pods as
    soon as the TTL has passed."""
    phase = snapshot.status.phase
    if phase is None or not phase.is_terminal:
        return None
    if not isinstance(snapshot, Snapshot):
        return Decision(phase, "", "")  # its TTL cannot be read

    ttl = snapshot.spec.run_policy.ttl_seconds_after_finished
    trainer_job, preflight_job = _owned(snapshot, snapshot.training), _owned(snapshot, snapshot.preflight)

    # The outcome is read, or the startup deadline passes, before the Job controller has marked the Job.
    jobs = [job for job in (trainer_job, preflight_job) if job is not None]
    job_set = snapshot.training.job_set
    still_ending = [job for job in jobs if not job.is_over and not job.waits_in_queue]
    is_ending = bool(still_ending) or (job_set is not None and bool(jobs) and not job_set.is_over)

    return Decision(
        phase,
        reason="",  # a terminal status keeps its reason and message
        message="",
        actions=Actions(
            patch_trainer_job=_patch_at_the_end(trainer_job, phase, None if job_set else ttl),
            patch_preflight_job=_patch_at_the_end(preflight_job, phase, ttl),
            patch_job_set=_patch_set_at_the_end(snapshot, ttl),
            patch_workload=leave_queue(snapshot, trainer_job or preflight_job),
        ),
        requeue_seconds=RETRY_SECONDS if ttl is not None and is_ending else None,
    )


def job_is_being_deleted(snapshot: AnySnapshot, *_: object) -> Decision | None:
    """Somebody deleted the FineTuneJob; the garbage collector removes its children."""
    if snapshot.metadata.deletion_timestamp is None:
        return None
    return Decision(Phase.CANCELLING, StatusReason.DELETED, "the job is being deleted, and its pods are being stopped")


def spec_is_unreadable(snapshot: UnreadableSnapshot, *_: object) -> Decision:
    """This version of the operator cannot read the spec, so it leaves the children alone."""
    phase = snapshot.status.phase or Phase.PENDING
    message = f"this version of the operator cannot read the job: {snapshot.spec_error}"[:MAX_SPEC_ERROR_LENGTH]
    return Decision(phase, StatusReason.INVALID_CONFIGURATION, message, is_stalled=True)


def namespace_is_denied(snapshot: Snapshot, _: ChildRun, installation: Installation) -> Decision | None:
    """The operator makes nothing in this namespace. A job that began before the namespace was denied goes on."""
    namespace = snapshot.metadata.namespace
    if namespace not in installation.denied_namespaces or snapshot.current_run.job is not None:
        return None

    message = f"the operator runs no jobs in namespace {namespace}: create the job in a namespace of your own"
    return Decision(Phase.PENDING, StatusReason.NAMESPACE_DENIED, message, is_stalled=True)


def children_are_hidden(snapshot: BlindSnapshot, *_: object) -> Decision:
    """The operator's role does not let it read a child. It writes nothing to children that it cannot see."""
    return Decision(
        snapshot.status.phase or Phase.PENDING,
        StatusReason.PERMISSION_DENIED,
        snapshot.refusal,
        is_stalled=True,
        requeue_seconds=RETRY_SECONDS,
    )


def child_name_is_taken(snapshot: AnySnapshot, *_: object) -> Decision | None:
    """An object of somebody else has the name of a child, or another ConfigMap took the place of ours. It is neither
    adopted nor replaced."""
    if snapshot.foreign_child is not None:
        message = f"{snapshot.foreign_child} already exists and does not belong to this job: delete it"
    elif snapshot.altered_config_map is not None:
        message = f"ConfigMap {snapshot.altered_config_map} does not hold what the operator wrote: delete it"
    else:
        return None
    return Decision(Phase.PENDING, StatusReason.NAME_CONFLICT, message, is_stalled=True, requeue_seconds=RETRY_SECONDS)


def job_sets_are_missing(snapshot: Snapshot, *_: object) -> Decision | None:
    """The spec asks for a JobSet, and none can be made. Said before the checks run."""
    if snapshot.job_set_problem is None:
        return None
    message = (
        f"spec.resources.multiNode is JobSet, and {snapshot.job_set_problem}; "
        "or create the job with multiNode: Job, which needs neither"
    )
    phase = snapshot.status.phase or Phase.PENDING
    return Decision(phase, StatusReason.JOB_SET_UNAVAILABLE, message, is_stalled=True, requeue_seconds=RETRY_SECONDS)


def endpoint_is_refused(snapshot: Snapshot, run: ChildRun, installation: Installation) -> Decision | None:
    """The spec names an endpoint that the administrator does not allow. A job that has a Job was checked before."""
    url = snapshot.spec.output.s3.endpoint_url
    if url is None or snapshot.current_run.job is not None:
        return None

    refusal = installation.endpoints.refuse_url(url)
    if refusal is None:
        return None

    message = f"spec.output.s3.endpointURL is not allowed: {refusal}"
    return Decision.fail(build_failure(snapshot, run, FailureReason.ENDPOINT_NOT_ALLOWED, message))


def pod_field_is_refused(snapshot: Snapshot, run: ChildRun, installation: Installation) -> Decision | None:
    """The spec sets what pods carry, where the administrator does not let a job. One that has a Job was checked."""
    if snapshot.current_run.job is not None:
        return None

    found = installation.pods.refuse(snapshot.spec.pod)
    if not found:
        return None

    message = f"the administrator has not allowed jobs to set {'; '.join(found)}"
    return Decision.fail(build_failure(snapshot, run, FailureReason.POD_FIELD_NOT_ALLOWED, message))


def gpu_limit_is_exceeded(snapshot: Snapshot, run: ChildRun, installation: Installation) -> Decision | None:
    """The job alone asks for more GPUs than the administrator allows to its namespace: waiting would not help."""
    limit, wanted = installation.max_gpus_per_namespace, snapshot.spec.resources.all_gpus
    if limit is None or wanted <= limit or snapshot.current_run.job is not None:
        return None
    if snapshot.spec.scheduling.queue_name is not None:
        return None

    asked = "spec.resources.gpus" if snapshot.spec.resources.nodes == 1 else "spec.resources.gpus x nodes"
    message = (
        f"{asked} is {wanted}, and the administrator allows {limit} at a time to the jobs of namespace "
        f"{snapshot.metadata.namespace} (maxGpusPerNamespace)"
    )
    return Decision.fail(build_failure(snapshot, run, FailureReason.GPU_LIMIT_EXCEEDED, message))


def _owned(snapshot: Snapshot, run: ChildRun) -> ChildJob | None:
    """The run's Job, if it is ours and stays."""
    if run.job is None or run.job.deleting or find_foreign(snapshot.metadata.uid, run.job, run.job_set):
        return None
    return run.job


def _patch_set_at_the_end(snapshot: Snapshot, ttl: int | None) -> Json | None:
    """Gives a JobSet that is over its TTL. One that has no Job yet is suspended: its controller would make it."""
    run = snapshot.training
    job_set = run.job_set
    if job_set is None or job_set.deleting or job_set.owner_uid != snapshot.metadata.uid:
        return None
    if job_set.is_over:
        return None if job_set.ttl == ttl else {"spec": {"ttlSecondsAfterFinished": ttl}}

    is_ours_to_suspend = job_set.queue is None and not job_set.suspended
    return {"spec": {"suspend": True}} if run.job is None and is_ours_to_suspend else None


def _patch_at_the_end(job: ChildJob | None, phase: Phase, ttl: int | None) -> Json | None:
    if job is None:
        return None
    if job.is_over:
        return None if job.ttl == ttl else {"spec": {"ttlSecondsAfterFinished": ttl}}

    # Its deadline ends a Job for good, with its pods: one that a queue holds as soon as it is admitted.
    must_end = job.deadline != 1 and (job.waits_in_queue or (phase is Phase.FAILED and not job.suspended))
    return {"spec": {"activeDeadlineSeconds": 1}} if must_end else None
