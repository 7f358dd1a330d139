"""What to do while a job is checked: the rules between "no Job yet" and "the trainer's Job may be made" (pure).

They see preflight's Job and pods in the place of the trainer's (`Snapshot.of_preflight`). Nothing is made in the step
in which preflight is seen to have passed: the result is written to the status first, so that the checks are never
started again, whoever deletes what, and whenever the operator dies.
"""

from collections.abc import Callable
from dataclasses import replace

from finetune_api.failures import FailureReason
from finetune_api.outcome import Result
from finetune_api.vocabulary import Phase, PreflightResult, Stage
from finetune_operator.decide.decision import Actions, Decision, Installation
from finetune_operator.decide.failure import explain_failure, last_outcome
from finetune_operator.decide.running import decide_running
from finetune_operator.decide.shared import config_map_actions, wait_for_deletion, wait_for_orphaned_pods
from finetune_operator.desired.preflight_job import MEMORY, build_preflight_job
from finetune_operator.observe.snapshot import Snapshot
from finetune_operator.reasons import Reason

MEMORY_HINT = "Shorten the longest rows, or set spec.runPolicy.preflight: Skip."
_LOST = "the checks passed, but their pod was removed before its outcome was read: see report.html in S3"
_WORDS: dict[str, tuple[str, str]] = {
    Reason.TRAINER_STARTED: (Reason.CHECKING, "model, data and output are checked"),
    Reason.SUSPENDING: (Reason.SUSPENDING, "the checks stop"),
}


def decide_preflight(snapshot: Snapshot, installation: Installation) -> Decision:
    """Apply the rules in order to `Snapshot.of_preflight`."""
    for rule in _RULES:
        decision = rule(snapshot, installation)
        if decision is not None:
            return decision
    raise AssertionError("the last rule always applies")


def _has_passed(snapshot: Snapshot, _: Installation) -> Decision | None:
    pod, outcome = snapshot.newest_pod, last_outcome(snapshot)
    exited_well = pod is not None and pod.termination is not None and pod.termination.exit_code == 0
    said_so = exited_well and outcome is not None and outcome.result is Result.SUCCEEDED
    is_lost = snapshot.child is not None and snapshot.child.complete is not None and not exited_well
    if not said_so and not is_lost:
        return None
    if said_so and outcome is not None and outcome.reused:
        message = "the result was there already, no trainer was needed"
        return Decision(Phase.SUCCEEDED, Reason.REUSED, message, preflight=PreflightResult.PASSED, outcome=outcome)
    message = outcome.message if said_so and outcome is not None else _LOST
    is_held = snapshot.spec is not None and snapshot.spec.run_policy.suspend
    phase = Phase.SUSPENDED if is_held else Phase.QUEUED
    return Decision(phase, Reason.PREFLIGHT_PASSED, message, preflight=PreflightResult.PASSED, requeue_seconds=0)


def _has_failed(snapshot: Snapshot, _: Installation) -> Decision | None:
    if snapshot.child is None or not snapshot.child.is_over:
        return None
    failure = explain_failure(snapshot)
    changes: dict[str, object] = {"stage": Stage.PREFLIGHT, "step": None}
    if failure.reason == FailureReason.OUT_OF_MEMORY:
        changes |= {"message": f"the checks used more memory than the {MEMORY} they have", "hint": MEMORY_HINT}
    failure = failure.model_copy(update=changes)
    return Decision(
        Phase.FAILED,
        failure.reason,
        failure.message,
        is_stalled=True,
        failure=failure,
        preflight=PreflightResult.FAILED,
    )


def _is_going(snapshot: Snapshot, _: Installation) -> Decision | None:
    return wait_for_deletion(snapshot, Phase.VALIDATING)


def _needs_job(snapshot: Snapshot, installation: Installation) -> Decision | None:
    assert snapshot.spec is not None
    actions = config_map_actions(snapshot, installation)
    if snapshot.child is not None:
        return None if actions == Actions() else replace(_running(snapshot), actions=actions, requeue_seconds=0)
    if (waiting := wait_for_orphaned_pods(snapshot, Phase.VALIDATING)) is not None:
        return waiting
    if snapshot.spec.run_policy.suspend:
        return Decision(Phase.SUSPENDED, Reason.SUSPENDED, "spec.runPolicy.suspend is true")
    active_seconds = snapshot.status.active_seconds or 0
    job = build_preflight_job(snapshot.metadata, snapshot.spec, installation.trainer_image, active_seconds)
    message = "waiting for the pod that checks model, data and output"
    return Decision(Phase.VALIDATING, Reason.JOB_CREATED, message, replace(actions, create_job=job))


def _is_running(snapshot: Snapshot, _: Installation) -> Decision:
    return _running(snapshot)


def _running(snapshot: Snapshot) -> Decision:
    decision = decide_running(snapshot)
    phase = Phase.SUSPENDED if decision.phase is Phase.SUSPENDED else Phase.VALIDATING
    reason, message = _WORDS.get(decision.reason, (decision.reason, decision.message))
    actions = Actions(patch_preflight=decision.actions.patch_job)
    return replace(decision, phase=phase, reason=reason, message=message, actions=actions, outcome=None)


_RULES: tuple[Callable[[Snapshot, Installation], Decision | None], ...] = (
    _has_passed,
    _has_failed,
    _is_going,
    _needs_job,
    _is_running,
)
