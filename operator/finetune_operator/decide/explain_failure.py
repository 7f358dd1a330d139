"""Explains why a run failed: from the trainer's outcome if it wrote one, else from what the kubelet and the Job
controller say (pure)."""

from finetune_api.failures import FAILURES, RESTARTED_ONCE, ExitCode, FailureReason, PodFailureAction, action_after
from finetune_api.outcome import Result
from finetune_api.status import Failure
from finetune_operator.decide.gpu_time import spent_gpu_seconds
from finetune_operator.decide.silence import is_given_up
from finetune_operator.desired.names import PREFLIGHT
from finetune_operator.desired.preflight_job import MEMORY
from finetune_operator.desired.trainer_job import remaining_deadline
from finetune_operator.observe.children import TrainerPod
from finetune_operator.observe.snapshot import ChildRun, Snapshot

OOM_KILLED = "OOMKilled"
MAX_GPU_SECONDS = "spec.runPolicy.maxGpuSeconds"
DEADLINE_EXCEEDED = "DeadlineExceeded"


def explain_failure(snapshot: Snapshot, run: ChildRun) -> Failure:
    """Explains the failure of a run whose Job controller has given up."""
    verdict = run.job.failed if run.job else None

    # The verdict comes first: a pod that the deadline stopped only says that it was interrupted.
    if verdict is not None and verdict.reason == DEADLINE_EXCEEDED:
        if _is_end_of_budget(snapshot, run):
            message = describe_spent_budget(snapshot, run)
            return build_failure(snapshot, run, FailureReason.GPU_BUDGET_EXHAUSTED, message)
        limit = snapshot.spec.run_policy.active_deadline_seconds
        deadline = f"deadline of {limit} s" if limit else "Job's deadline, which somebody else has set"
        message = f"the job ran longer than its {deadline}"
        return build_failure(snapshot, run, FailureReason.DEADLINE_EXCEEDED, message)

    pod = run.newest_pod
    if pod is None:
        detail = f": {verdict.message}" if verdict else ""
        return build_failure(snapshot, run, FailureReason.TRAINER_CRASHED, f"the trainer's pod is gone{detail}")

    return build_failure(snapshot, run, *explain_pod(snapshot, run, pod))


def describe_spent_budget(snapshot: Snapshot, run: ChildRun) -> str:
    """Says what a job has taken of its GPU time, and what is kept."""
    limit, spent = snapshot.spec.run_policy.max_gpu_seconds or 0, spent_gpu_seconds(snapshot, run)
    said = run.outcome.checkpoint_step if run.outcome else None
    step = said or snapshot.status.checkpoint_step
    kept = f"the newest checkpoint is that of step {step}" if step else "there is no checkpoint yet"
    if spent < limit:
        return f"{MAX_GPU_SECONDS} was raised to {limit:,} when the trainer was already being stopped; {kept}"
    return f"the job has held GPUs for {spent:,} GPU-seconds, and {MAX_GPU_SECONDS} allows {limit:,}; {kept}"


def _is_end_of_budget(snapshot: Snapshot, run: ChildRun) -> bool:
    """True if the deadline that ended the Job is that of its GPU time and not the one that the spec sets."""
    policy, job = snapshot.spec.run_policy, run.job
    if job is None or policy.max_gpu_seconds is None or run.component == PREFLIGHT:
        return False
    return job.deadline != remaining_deadline(policy.active_deadline_seconds, job.active_seconds)


def explain_pod(snapshot: Snapshot, run: ChildRun, pod: TrainerPod) -> tuple[FailureReason, str]:
    """Returns reason and sentence for a pod that ended without success; on several nodes, for the one that ended the
    attempt."""
    reason, message = _explain_end(snapshot, run, pod)
    return (reason, f"{message} ({pod.ended_by})") if pod.ended_by else (reason, message)


def _explain_end(snapshot: Snapshot, run: ChildRun, pod: TrainerPod) -> tuple[FailureReason, str]:
    end = pod.termination
    outcome = end.outcome() if end else None

    if run.doubt is not None and pod is run.newest_pod:
        return FailureReason.UNTRUSTED_RESULT, run.doubt

    if is_given_up(snapshot, pod.uid) and (outcome is None or end is None or end.exit_code != ExitCode.STALLED):
        return FailureReason.STALLED, "the trainer did not report for long, so its pod was evicted"

    # The trainer knows best why it ended.
    if outcome is not None and outcome.result is not Result.SUCCEEDED:
        return outcome.reason or FailureReason.INTERNAL_ERROR, outcome.message

    if pod.is_disrupted:
        return FailureReason.EVICTED, pod.message or "the cluster removed the pod"
    if end is None:
        return FailureReason.TRAINER_CRASHED, pod.message or pod.reason or "the pod ended before its trainer did"
    if end.reason == OOM_KILLED:
        limit = MEMORY if run.component == PREFLIGHT else snapshot.spec.resources.memory
        return FailureReason.OUT_OF_MEMORY, f"the trainer was killed when its memory reached the limit of {limit}"

    fault = end.outcome_fault()
    if fault is not None:
        return FailureReason.UNTRUSTED_RESULT, f"the trainer's result does not fit the status of a job: {fault}"

    # By convention an exit code of 128 + n says that signal n ended the process.
    code = end.exit_code
    how = f"was ended by signal {code - 128}" if code > 128 else f"ended with exit code {code}"
    return FailureReason.TRAINER_CRASHED, f"the trainer {how} and wrote no result"


def is_interruption(pod: TrainerPod) -> bool:
    """True if a pod ended because it was stopped or removed, which is no failure of the job."""
    if pod.is_disrupted:
        return True
    return pod.termination is not None and pod.termination.exit_code == ExitCode.INTERRUPTED


def has_failed(run: ChildRun) -> bool:
    """True if a run has failed for good: the Job controller says so, or the kernel killed the newest pod's trainer for
    its memory. The Job controller cannot know the latter: it sees 137, the exit code of every kill, and would make
    another pod that ends the same way."""
    if run.job is None:
        return False
    pod = run.newest_pod
    end = pod.termination if pod and not pod.is_disrupted else None
    return run.job.is_over or (end is not None and end.reason == OOM_KILLED and run.outcome is None)


def ends_the_run(snapshot: Snapshot, run: ChildRun) -> bool:
    """True if no pod follows the newest one, which has ended, although the Job controller has not said so yet."""
    pod = run.newest_pod
    if pod is None or is_interruption(pod):
        return False

    exit_code = pod.termination.exit_code if pod.termination else None
    if exit_code in RESTARTED_ONCE:
        return False  # a second time is a rule of its own (stalls.py)
    if exit_code is not None and (
        exit_code == ExitCode.SUCCESS or action_after(exit_code) is PodFailureAction.FAIL_JOB
    ):
        return True
    failed_pods = sum(1 for each in run.pods if each.is_finished and _is_counted(each))
    return failed_pods > snapshot.spec.run_policy.max_retries


def _is_counted(pod: TrainerPod) -> bool:
    """True if the Job controller counts a pod that has ended as a retry."""
    return not is_interruption(pod) and not (pod.termination and pod.termination.exit_code in RESTARTED_ONCE)


def build_failure(snapshot: Snapshot, run: ChildRun, reason: FailureReason, message: str) -> Failure:
    """Fills `status.failure`; stage and step come from the outcome, else from what was reported last."""
    outcome, pod = run.outcome, run.newest_pod

    # A trainer that crashed wrote no outcome, but it may have reported its stage before.
    stage = outcome.stage if outcome else None
    if stage is None and run.report is not None:
        stage = run.report.report.finetune.stage
    progress = snapshot.status.progress
    reported_step = progress.step if progress else None

    # The trainer's message may be empty; `status.failure.message` must not be.
    return Failure(
        reason=reason,
        message=message or FAILURES[reason].hint,
        hint=FAILURES[reason].hint,
        exit_code=pod.termination.exit_code if pod and pod.termination else None,
        stage=stage,
        step=outcome.step if outcome else reported_step,
    )
