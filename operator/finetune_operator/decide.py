"""What to do about a job, and what it is to be called: ordered rules over one observation (pure).

The first rule that applies decides. Rules about the end come before rules about children, so that a terminal job never
creates anything again.
"""

from collections.abc import Callable
from dataclasses import dataclass

from finetune_api.failures import PERMANENT, ExitCode
from finetune_api.outcome import Outcome, Result
from finetune_api.status import Failure
from finetune_api.vocabulary import Phase
from finetune_operator.children import ChildJob, Json, TrainerPod
from finetune_operator.desired.names import ACTIVE_SECONDS_ANNOTATION
from finetune_operator.desired.run_config_map import build_run_config, build_run_config_map
from finetune_operator.desired.trainer_job import build_trainer_job, remaining_deadline
from finetune_operator.failure import explain_failure, explain_pod, is_interruption, last_outcome
from finetune_operator.observed import Observed
from finetune_operator.reasons import Reason
from finetune_operator.waiting import explain_waiting

RETRY_SECONDS = 30.0
STRAY_SECONDS = 2.0


@dataclass(frozen=True)
class Installation:
    """What every job gets from the way the operator was installed."""

    trainer_image: str
    progress_url: str
    ca_certificate: str | None


@dataclass(frozen=True)
class Actions:
    """Writes to child objects, in the order of the fields."""

    create_config_map: Json | None = None
    update_config_map: Json | None = None
    create_job: Json | None = None
    patch_job: Json | None = None


@dataclass(frozen=True)
class Decision:
    """The answer to one observation."""

    phase: Phase
    reason: str
    message: str
    actions: Actions = Actions()
    is_stalled: bool = False
    """Whether the job needs a person."""

    failure: Failure | None = None
    outcome: Outcome | None = None
    """The last words of a job that has ended, or of its newest pod."""

    requeue_seconds: float | None = None
    """Look again after this time even if nothing happens."""


def decide(observed: Observed, installation: Installation) -> Decision:
    """Apply the rules in order."""
    for rule in _RULES:
        decision = rule(observed, installation)
        if decision is not None:
            return decision
    raise AssertionError("the last rule always applies")


def _is_over(observed: Observed, _: Installation) -> Decision | None:
    phase = observed.status.phase
    if phase is None or not phase.is_terminal:
        return None
    child, spec = observed.child, observed.spec
    ttl = spec.run_policy.ttl_seconds_after_finished if spec else None
    ours = child is not None and child.owner_uid == observed.metadata.uid and not child.deleting
    ended = child is not None and (child.complete is not None or child.failed is not None)
    changes = {"spec": {"ttlSecondsAfterFinished": ttl}} if ours and ended and child and child.ttl != ttl else None
    waits = ttl is not None and ours and not ended
    return Decision(phase, "", "", Actions(patch_job=changes), requeue_seconds=RETRY_SECONDS if waits else None)


def _is_being_deleted(observed: Observed, _: Installation) -> Decision | None:
    if observed.metadata.deletion_timestamp is None:
        return None
    return Decision(Phase.CANCELLING, Reason.DELETED, "the job is being deleted, its trainer is stopped")


def _is_unreadable(observed: Observed, _: Installation) -> Decision | None:
    if observed.spec is not None:
        return None
    phase = observed.status.phase or Phase.PENDING
    message = f"this version of the operator cannot read the job: {observed.spec_error}"
    return Decision(phase, Reason.INVALID_CONFIGURATION, message[:1024], is_stalled=True)


def _name_is_taken(observed: Observed, _: Installation) -> Decision | None:
    if observed.foreign_child is None:
        return None
    message = f"{observed.foreign_child} exists already and does not belong to this job: remove it"
    return Decision(Phase.PENDING, Reason.NAME_CONFLICT, message, is_stalled=True, requeue_seconds=RETRY_SECONDS)


def _has_succeeded(observed: Observed, _: Installation) -> Decision | None:
    outcome = last_outcome(observed)
    pod = observed.newest_pod
    exited_well = pod is not None and pod.termination is not None and pod.termination.exit_code == 0
    if exited_well and outcome is not None and outcome.result is Result.SUCCEEDED:
        message = "the result was there already" if outcome.reused else "every artifact is uploaded and verified"
        return Decision(
            Phase.SUCCEEDED, Reason.REUSED if outcome.reused else Reason.COMPLETED, message, outcome=outcome
        )
    if observed.child is None or observed.child.complete is None or exited_well:
        return None
    message = "the trainer succeeded, but its pod was removed before its outcome was read: see the manifest in S3"
    return Decision(Phase.SUCCEEDED, Reason.OUTCOME_LOST, message)


def _has_failed(observed: Observed, _: Installation) -> Decision | None:
    child = observed.child
    if child is None or (child.failed is None and child.complete is None):
        return None  # a Job that is complete and comes here had a trainer that said nothing, which is no success
    failure = explain_failure(observed)
    return Decision(
        Phase.FAILED, failure.reason, failure.message, is_stalled=True, failure=failure, outcome=last_outcome(observed)
    )


def _needs_children(observed: Observed, installation: Installation) -> Decision | None:
    assert observed.spec is not None
    config = build_run_config(observed.metadata, observed.spec, installation.progress_url, installation.ca_certificate)
    desired = build_run_config_map(observed.metadata, config)
    existing = observed.config_map
    create = desired if existing is None else None
    update = {"data": desired["data"]} if existing is not None and existing.get("data") != desired["data"] else None
    if observed.child is not None:
        if not (create or update):
            return None
        running = _running(observed, installation)
        return Decision(running.phase, running.reason, running.message, Actions(create, update), requeue_seconds=0)
    if observed.strays:
        message = f"pod {observed.strays[0].name} of a Job that was deleted by someone else still runs"
        return Decision(Phase.QUEUED, Reason.JOB_DELETED, message, requeue_seconds=STRAY_SECONDS)
    active_seconds = observed.status.active_seconds or 0
    job = build_trainer_job(observed.metadata, observed.spec, installation.trainer_image, active_seconds)
    actions = Actions(create, update, create_job=job)
    if observed.spec.run_policy.suspend:
        return Decision(Phase.SUSPENDED, Reason.SUSPENDED, "spec.runPolicy.suspend is true", actions)
    return Decision(Phase.QUEUED, Reason.JOB_CREATED, "waiting for a pod", actions)


def _child_is_going(observed: Observed, _: Installation) -> Decision | None:
    if observed.child is None or not observed.child.deleting:
        return None
    message = f"Job {observed.child.name} was deleted by someone else: it is made again as soon as it is gone"
    return Decision(Phase.QUEUED, Reason.JOB_DELETED, message, requeue_seconds=RETRY_SECONDS)


def _running(observed: Observed, _: Installation) -> Decision:
    assert observed.spec is not None
    assert observed.child is not None
    actions = Actions(patch_job=_changes(observed, observed.child))
    outcome = last_outcome(observed)
    if observed.spec.run_policy.suspend:
        if any(not pod.is_finished for pod in observed.pods):
            phase = observed.status.phase or Phase.RUNNING
            return Decision(phase, Reason.SUSPENDING, "the trainer writes its checkpoint and stops", actions)
        return Decision(Phase.SUSPENDED, Reason.SUSPENDED, "spec.runPolicy.suspend is true", actions, outcome=outcome)
    pod = observed.newest_pod
    if pod is not None and pod.is_running:
        return _with_trainer(observed, actions)
    if pod is not None and pod.is_finished:
        return _between_pods(observed, pod, actions, outcome)
    waiting = explain_waiting(pod, observed.obstacle)
    return Decision(
        Phase.QUEUED,
        waiting.reason,
        waiting.message,
        actions,
        is_stalled=waiting.is_stalled,
        requeue_seconds=RETRY_SECONDS,
    )


def _with_trainer(observed: Observed, actions: Actions) -> Decision:
    if observed.report is None:
        return Decision(Phase.RUNNING, Reason.TRAINER_STARTED, "the trainer has not reported yet", actions)
    stage = observed.report.report.finetune.stage
    return Decision(stage.phase, stage.value, f"the trainer is in stage {stage.value}", actions)


def _between_pods(observed: Observed, pod: TrainerPod, actions: Actions, outcome: Outcome | None) -> Decision:
    assert observed.spec is not None
    reason, said = explain_pod(observed, pod)
    if is_interruption(pod):
        waiting = explain_waiting(None, observed.obstacle)
        return Decision(
            Phase.QUEUED, waiting.reason, waiting.message, actions, is_stalled=waiting.is_stalled, outcome=outcome
        )
    failures = sum(1 for each in observed.pods if each.is_finished and not is_interruption(each))
    final = pod.termination is not None and pod.termination.exit_code in (ExitCode.SUCCESS, *PERMANENT)
    if final or failures > observed.spec.run_policy.max_retries:
        phase = observed.status.phase or Phase.RUNNING
        return Decision(phase, reason, f"{said}: the job ends", actions, outcome=outcome)
    return Decision(Phase.QUEUED, Reason.RETRYING, f"{reason}: {said}; another pod goes on", actions, outcome=outcome)


def _changes(observed: Observed, child: ChildJob) -> Json | None:
    """The fields of the child Job that may have to follow the spec. What the job has run for is recorded in the very
    patch that suspends it, because the Job controller forgets its start time then."""
    assert observed.spec is not None
    policy = observed.spec.run_policy
    if policy.suspend:
        if child.suspended:
            return None
        active = child.active_seconds_at(observed.now)
        return {"spec": {"suspend": True}, "metadata": {"annotations": {ACTIVE_SECONDS_ANNOTATION: str(active)}}}
    deadline = remaining_deadline(policy.active_deadline_seconds, child.active_seconds)
    changes: Json = {}
    if child.suspended:
        changes["suspend"] = False
    if child.deadline != deadline:
        changes["activeDeadlineSeconds"] = deadline
    return {"spec": changes} if changes else None


_RULES: tuple[Callable[[Observed, Installation], Decision | None], ...] = (
    _is_over,
    _is_being_deleted,
    _is_unreadable,
    _name_is_taken,
    _has_succeeded,
    _has_failed,
    _child_is_going,
    _needs_children,
    _running,
)
