"""What to do about a job, and what it is to be called: ordered rules over one observation (pure).

The first rule that applies decides. Rules about the end come before rules about children, so that a terminal job never
creates anything again.
"""

from collections.abc import Callable
from dataclasses import replace

from finetune_api.base import Json
from finetune_api.outcome import Result
from finetune_api.vocabulary import Phase
from finetune_operator.decide.decision import RETRY_SECONDS, Actions, Decision, Installation
from finetune_operator.decide.failure import explain_failure, last_outcome
from finetune_operator.decide.preflight import decide_preflight
from finetune_operator.decide.running import decide_running
from finetune_operator.decide.shared import config_map_actions, wait_for_deletion, wait_for_orphaned_pods
from finetune_operator.desired.trainer_job import build_trainer_job
from finetune_operator.observe.children import ChildJob
from finetune_operator.observe.snapshot import Snapshot
from finetune_operator.reasons import Reason


def decide(snapshot: Snapshot, installation: Installation) -> Decision:
    """Apply the rules in order."""
    for rule in _RULES:
        decision = rule(snapshot, installation)
        if decision is not None:
            return decision
    raise AssertionError("the last rule always applies")


def _is_over(snapshot: Snapshot, _: Installation) -> Decision | None:
    phase = snapshot.status.phase
    if phase is None or not phase.is_terminal:
        return None
    ttl = snapshot.spec.run_policy.ttl_seconds_after_finished if snapshot.spec else None
    jobs = [job for job in (snapshot.child, snapshot.preflight) if job is not None and _is_ours(snapshot, job)]
    waits = ttl is not None and not all(job.is_over for job in jobs)
    actions = Actions(patch_job=_ttl(snapshot.child, jobs, ttl), patch_preflight=_ttl(snapshot.preflight, jobs, ttl))
    return Decision(phase, "", "", actions, requeue_seconds=RETRY_SECONDS if waits else None)


def _is_ours(snapshot: Snapshot, job: ChildJob) -> bool:
    return job.owner_uid == snapshot.metadata.uid and not job.deleting


def _ttl(job: ChildJob | None, ours: list[ChildJob], ttl: int | None) -> Json | None:
    if job is None or job not in ours or not job.is_over or job.ttl == ttl:
        return None
    return {"spec": {"ttlSecondsAfterFinished": ttl}}


def _is_being_deleted(snapshot: Snapshot, _: Installation) -> Decision | None:
    if snapshot.metadata.deletion_timestamp is None:
        return None
    return Decision(Phase.CANCELLING, Reason.DELETED, "the job is being deleted, its trainer is stopped")


def _is_unreadable(snapshot: Snapshot, _: Installation) -> Decision | None:
    if snapshot.spec is not None:
        return None
    phase = snapshot.status.phase or Phase.PENDING
    message = f"this version of the operator cannot read the job: {snapshot.spec_error}"
    return Decision(phase, Reason.INVALID_CONFIGURATION, message[:1024], is_stalled=True)


def _name_is_taken(snapshot: Snapshot, _: Installation) -> Decision | None:
    if snapshot.foreign_child is None:
        return None
    message = f"{snapshot.foreign_child} exists already and does not belong to this job: remove it"
    return Decision(Phase.PENDING, Reason.NAME_CONFLICT, message, is_stalled=True, requeue_seconds=RETRY_SECONDS)


def _is_validating(snapshot: Snapshot, installation: Installation) -> Decision | None:
    return decide_preflight(snapshot.of_preflight(), installation) if snapshot.is_validating else None


def _has_succeeded(snapshot: Snapshot, _: Installation) -> Decision | None:
    outcome = last_outcome(snapshot)
    pod = snapshot.newest_pod
    exited_well = pod is not None and pod.termination is not None and pod.termination.exit_code == 0
    if exited_well and outcome is not None and outcome.result is Result.SUCCEEDED:
        message = "the result was there already" if outcome.reused else "every artifact is uploaded and verified"
        return Decision(
            Phase.SUCCEEDED, Reason.REUSED if outcome.reused else Reason.COMPLETED, message, outcome=outcome
        )
    if snapshot.child is None or snapshot.child.complete is None or exited_well:
        return None
    message = "the trainer succeeded, but its pod was removed before its outcome was read: see the manifest in S3"
    return Decision(Phase.SUCCEEDED, Reason.OUTCOME_LOST, message)


def _has_failed(snapshot: Snapshot, _: Installation) -> Decision | None:
    child = snapshot.child
    if child is None or (child.failed is None and child.complete is None):
        return None  # a Job that is complete and comes here had a trainer that said nothing, which is no success
    failure = explain_failure(snapshot)
    return Decision(
        Phase.FAILED, failure.reason, failure.message, is_stalled=True, failure=failure, outcome=last_outcome(snapshot)
    )


def _needs_children(snapshot: Snapshot, installation: Installation) -> Decision | None:
    assert snapshot.spec is not None
    actions = config_map_actions(snapshot, installation)
    if snapshot.child is not None:
        if actions == Actions():
            return None
        running = decide_running(snapshot)
        return Decision(running.phase, running.reason, running.message, actions, requeue_seconds=0)
    if (waiting := wait_for_orphaned_pods(snapshot, Phase.QUEUED)) is not None:
        return waiting
    active_seconds = snapshot.status.active_seconds or 0
    job = build_trainer_job(snapshot.metadata, snapshot.spec, installation.trainer_image, active_seconds)
    actions = replace(actions, create_job=job)
    if snapshot.spec.run_policy.suspend:
        return Decision(Phase.SUSPENDED, Reason.SUSPENDED, "spec.runPolicy.suspend is true", actions)
    return Decision(Phase.QUEUED, Reason.JOB_CREATED, "waiting for a pod", actions)


def _child_is_going(snapshot: Snapshot, _: Installation) -> Decision | None:
    return wait_for_deletion(snapshot, Phase.QUEUED)


def _running(snapshot: Snapshot, _: Installation) -> Decision:
    return decide_running(snapshot)


_RULES: tuple[Callable[[Snapshot, Installation], Decision | None], ...] = (
    _is_over,
    _is_being_deleted,
    _is_unreadable,
    _name_is_taken,
    _is_validating,
    _has_succeeded,
    _has_failed,
    _child_is_going,
    _needs_children,
    _running,
)
