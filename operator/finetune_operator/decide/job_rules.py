"""Rules about the FineTuneJob itself, whatever its runs do (pure)."""

from finetune_api.base import Json
from finetune_api.vocabulary import Phase
from finetune_operator.decide.decision import RETRY_SECONDS, Actions, Decision
from finetune_operator.observe.children import ChildJob
from finetune_operator.observe.snapshot import AnySnapshot, Snapshot, UnreadableSnapshot
from finetune_operator.status_reasons import StatusReason

MAX_SPEC_ERROR_LENGTH = 1024  # characters


def job_is_over(snapshot: AnySnapshot, *_: object) -> Decision | None:
    """The status says that the job succeeded or failed. All that remains is to give its Jobs their TTL, which happens
    only now because the Job controller removes a Job with its pods as soon as the TTL has passed."""
    phase = snapshot.status.phase
    if phase is None or not phase.is_terminal:
        return None
    if not isinstance(snapshot, Snapshot):
        return Decision(phase, "", "")  # its TTL cannot be read

    ttl = snapshot.spec.run_policy.ttl_seconds_after_finished
    trainer_job, preflight_job = _owned(snapshot, snapshot.training.job), _owned(snapshot, snapshot.preflight.job)

    # The trainer's outcome is read before the Job controller has marked the Job complete.
    still_ending = [job for job in (trainer_job, preflight_job) if job is not None and not job.is_over]

    return Decision(
        phase,
        reason="",  # a terminal status keeps its reason and message
        message="",
        actions=Actions(
            patch_trainer_job=_ttl_patch(trainer_job, ttl), patch_preflight_job=_ttl_patch(preflight_job, ttl)
        ),
        requeue_seconds=RETRY_SECONDS if ttl is not None and still_ending else None,
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


def child_name_is_taken(snapshot: AnySnapshot, *_: object) -> Decision | None:
    """An object of somebody else has the name of a child. It is neither adopted nor replaced."""
    if snapshot.foreign_child is None:
        return None
    message = f"{snapshot.foreign_child} already exists and does not belong to this job: delete it"
    return Decision(Phase.PENDING, StatusReason.NAME_CONFLICT, message, is_stalled=True, requeue_seconds=RETRY_SECONDS)


def _owned(snapshot: Snapshot, job: ChildJob | None) -> ChildJob | None:
    """The Job, if it is ours and stays."""
    return job if job is not None and job.owner_uid == snapshot.metadata.uid and not job.deleting else None


def _ttl_patch(job: ChildJob | None, ttl: int | None) -> Json | None:
    if job is None or not job.is_over or job.ttl == ttl:
        return None
    return {"spec": {"ttlSecondsAfterFinished": ttl}}
