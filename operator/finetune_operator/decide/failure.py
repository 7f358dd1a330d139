"""Why a job failed, from what is left of it: the trainer's last words first, then what the kubelet and the Job
controller say (pure)."""

from finetune_api.failures import FAILURES, ExitCode, FailureReason
from finetune_api.outcome import Outcome, Result
from finetune_api.status import Failure
from finetune_operator.observe.children import TrainerPod
from finetune_operator.observe.snapshot import Snapshot

OOM_KILLED = "OOMKilled"
DEADLINE_EXCEEDED = "DeadlineExceeded"


def explain_failure(snapshot: Snapshot) -> Failure:
    """The failure of a job whose Job controller has given up."""
    verdict = snapshot.child.failed if snapshot.child else None
    pod = snapshot.newest_pod
    outcome = last_outcome(snapshot)
    if verdict is not None and verdict.reason == DEADLINE_EXCEEDED:
        limit = snapshot.spec.run_policy.active_deadline_seconds if snapshot.spec else None
        return _failure(snapshot, FailureReason.DEADLINE_EXCEEDED, f"the job ran for longer than {limit} s", outcome)
    if pod is None:
        said = verdict.message if verdict else "no pod is left"
        return _failure(snapshot, FailureReason.TRAINER_CRASHED, f"the trainer's pod is gone: {said}", None)
    reason, message = explain_pod(snapshot, pod)
    return _failure(snapshot, reason, message, outcome)


def explain_pod(snapshot: Snapshot, pod: TrainerPod) -> tuple[FailureReason, str]:
    """Reason and sentence for a pod that ended without success."""
    outcome = pod.termination.outcome() if pod.termination else None
    if outcome is not None and outcome.result is not Result.SUCCEEDED:
        return outcome.reason or FailureReason.INTERNAL_ERROR, outcome.message
    if pod.is_disrupted:
        return FailureReason.EVICTED, pod.message or "the cluster took the pod away"
    if pod.termination is None:
        return FailureReason.TRAINER_CRASHED, pod.message or pod.reason or "the pod ended before the trainer did"
    if pod.termination.reason == OOM_KILLED:
        memory = snapshot.spec.resources.memory if snapshot.spec else "its limit"
        return FailureReason.OUT_OF_MEMORY, f"the trainer was killed because it used more memory than {memory}"
    code = pod.termination.exit_code
    how = f"signal {code - 128}" if code > 128 else f"exit code {code}"
    return FailureReason.TRAINER_CRASHED, f"the trainer ended with {how} and left no outcome"


def last_outcome(snapshot: Snapshot) -> Outcome | None:
    """What the newest pod said last."""
    pod = snapshot.newest_pod
    return pod.termination.outcome() if pod and pod.termination else None


def is_interruption(pod: TrainerPod) -> bool:
    """Whether a pod ended because it was stopped, so that its end is no failure of the job."""
    if pod.is_disrupted:
        return True
    return pod.termination is not None and pod.termination.exit_code == ExitCode.INTERRUPTED


def _failure(snapshot: Snapshot, reason: FailureReason, message: str, outcome: Outcome | None) -> Failure:
    pod = snapshot.newest_pod
    progress = snapshot.status.progress
    stage = outcome.stage if outcome else None
    if stage is None and snapshot.report is not None:
        stage = snapshot.report.report.finetune.stage
    return Failure(
        reason=reason,
        message=message or FAILURES[reason].hint,
        hint=FAILURES[reason].hint,
        exit_code=pod.termination.exit_code if pod and pod.termination else None,
        stage=stage,
        step=outcome.step if outcome else (progress.step if progress else None),
    )
