"""What a Job whose end is open is doing, and which of its fields follow the spec (pure).

The same for the trainer's Job and for that of preflight, which is looked at through `Snapshot.of_preflight`.
"""

from finetune_api.base import Json
from finetune_api.failures import ExitCode, PodFailureAction, action_after
from finetune_api.outcome import Outcome
from finetune_api.vocabulary import Phase
from finetune_operator.decide.decision import RETRY_SECONDS, Actions, Decision
from finetune_operator.decide.failure import explain_pod, is_interruption, last_outcome
from finetune_operator.decide.waiting import explain_waiting
from finetune_operator.desired.names import ACTIVE_SECONDS_ANNOTATION
from finetune_operator.desired.trainer_job import remaining_deadline
from finetune_operator.observe.children import ChildJob, TrainerPod
from finetune_operator.observe.snapshot import Snapshot
from finetune_operator.reasons import Reason


def decide_running(snapshot: Snapshot) -> Decision:
    """The last rule: the Job exists, and its end is open."""
    assert snapshot.spec is not None
    assert snapshot.child is not None
    actions = Actions(patch_job=_changes(snapshot, snapshot.child))
    outcome = last_outcome(snapshot)
    if snapshot.spec.run_policy.suspend:
        if any(not pod.is_finished for pod in snapshot.pods):
            phase = snapshot.status.phase or Phase.RUNNING
            return Decision(phase, Reason.SUSPENDING, "the trainer writes its checkpoint and stops", actions)
        return Decision(Phase.SUSPENDED, Reason.SUSPENDED, "spec.runPolicy.suspend is true", actions, outcome=outcome)
    pod = snapshot.newest_pod
    if pod is not None and pod.is_running:
        return _with_trainer(snapshot, actions)
    if pod is not None and pod.is_finished:
        return _between_pods(snapshot, pod, actions, outcome)
    waiting = explain_waiting(pod, snapshot.blocker)
    return Decision(
        Phase.QUEUED,
        waiting.reason,
        waiting.message,
        actions,
        is_stalled=waiting.is_stalled,
        requeue_seconds=RETRY_SECONDS,
    )


def _with_trainer(snapshot: Snapshot, actions: Actions) -> Decision:
    if snapshot.report is None:
        return Decision(Phase.RUNNING, Reason.TRAINER_STARTED, "the trainer has not reported yet", actions)
    stage = snapshot.report.report.finetune.stage
    return Decision(stage.phase, stage.value, f"the trainer is in stage {stage.value}", actions)


def _between_pods(snapshot: Snapshot, pod: TrainerPod, actions: Actions, outcome: Outcome | None) -> Decision:
    assert snapshot.spec is not None
    reason, said = explain_pod(snapshot, pod)
    if is_interruption(pod):
        waiting = explain_waiting(None, snapshot.blocker)
        return Decision(
            Phase.QUEUED, waiting.reason, waiting.message, actions, is_stalled=waiting.is_stalled, outcome=outcome
        )
    failures = sum(1 for each in snapshot.pods if each.is_finished and not is_interruption(each))
    code = pod.termination.exit_code if pod.termination else None
    final = code is not None and (code == ExitCode.SUCCESS or action_after(code) is PodFailureAction.FAIL_JOB)
    if final or failures > snapshot.spec.run_policy.max_retries:
        phase = snapshot.status.phase or Phase.RUNNING
        return Decision(phase, reason, f"{said}: the job ends", actions, outcome=outcome)
    return Decision(Phase.QUEUED, Reason.RETRYING, f"{reason}: {said}; another pod goes on", actions, outcome=outcome)


def _changes(snapshot: Snapshot, child: ChildJob) -> Json | None:
    """The fields of the child Job that may have to follow the spec. What the job has run for is recorded in the very
    patch that suspends it, because the Job controller forgets its start time then."""
    assert snapshot.spec is not None
    policy = snapshot.spec.run_policy
    if policy.suspend:
        if child.suspended:
            return None
        active = child.active_seconds_at(snapshot.now)
        return {"spec": {"suspend": True}, "metadata": {"annotations": {ACTIVE_SECONDS_ANNOTATION: str(active)}}}
    deadline = remaining_deadline(policy.active_deadline_seconds, child.active_seconds)
    changes: Json = {}
    if child.suspended:
        changes["suspend"] = False
    if child.deadline != deadline:
        changes["activeDeadlineSeconds"] = deadline
    return {"spec": changes} if changes else None
