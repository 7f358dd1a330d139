"""Rules about training: it succeeded, it failed, its Job is missing (pure)."""

from dataclasses import replace

from finetune_api.outcome import Result
from finetune_api.vocabulary import Phase
from finetune_operator.decide.decision import RETRY_SECONDS, Actions, Decision
from finetune_operator.decide.explain_failure import explain_failure, has_failed
from finetune_operator.decide.open_run import IS_SUSPENDED, follow_suspension_of_set
from finetune_operator.decide.shared import missing_peers, wanted_config_map
from finetune_operator.decide.waiting.gpu_limit import find_gpu_wait, seconds_until_next_gpu_look
from finetune_operator.decide.waiting.startup_deadline import seconds_until_startup_deadline
from finetune_operator.desired.installation import Installation
from finetune_operator.desired.job_set import build_job_set
from finetune_operator.desired.pod_plan import is_in_job_set
from finetune_operator.desired.trainer_job import build_trainer_job
from finetune_operator.observe.snapshot import ChildRun, Snapshot
from finetune_operator.status_reasons import StatusReason

REUSED = "a finished result of the same job was found, so nothing was trained"
_OUTCOME_LOST = "the trainer succeeded, but its pod was removed before its result could be read: see the manifest in S3"


def trainer_succeeded(_: Snapshot, run: ChildRun, *__: object) -> Decision | None:
    """The newest pod says that it succeeded, or the Job is complete and its pod is gone. The next look, which sees the
    success in the status, gives the Jobs their TTL: the Job may have been complete before, and then no event follows.
    """
    outcome = run.outcome
    if run.has_exited_with_0 and outcome is not None and outcome.result is Result.SUCCEEDED:
        if outcome.reused:
            return Decision(Phase.SUCCEEDED, StatusReason.REUSED, REUSED, outcome=outcome, requeue_seconds=0)
        message = "every artifact is uploaded and verified"
        return Decision(Phase.SUCCEEDED, StatusReason.COMPLETED, message, outcome=outcome, requeue_seconds=0)

    # A pod that exited with 0 and wrote no outcome is no success: `trainer_failed` decides about it.
    is_lost = run.job is not None and run.job.complete is not None and not run.has_exited_with_0
    lost = Decision(Phase.SUCCEEDED, StatusReason.OUTCOME_LOST, _OUTCOME_LOST, requeue_seconds=0)
    return lost if is_lost else None


def trainer_failed(snapshot: Snapshot, run: ChildRun, *_: object) -> Decision | None:
    """The Job controller has given up, the Job is complete although its trainer wrote no outcome, or memory ran out.
    In the last case, the next look, which sees the failure in the status, ends the Job."""
    if not has_failed(run):
        return None

    failure = explain_failure(snapshot, run)
    return Decision.fail(failure, outcome=run.outcome, requeue_seconds=0)


def job_of_set_is_missing(snapshot: Snapshot, run: ChildRun, *_: object) -> Decision | None:
    """The JobSet is there, and its Job is not: its controller has yet to make it, or makes none any more."""
    if run.job is not None or run.job_set is None:
        return None
    name = run.job_set.name
    if run.job_set.is_over:
        remedy = f"`kubectl delete jobset {name}` lets both be made again"
        message = f"JobSet {name} is over, and somebody deleted its Job: {remedy}"
        phase = snapshot.status.phase or Phase.QUEUED
        return Decision(
            phase, StatusReason.JOB_SET_UNAVAILABLE, message, is_stalled=True, requeue_seconds=RETRY_SECONDS
        )

    actions = Actions(patch_job_set=follow_suspension_of_set(snapshot, run))
    if snapshot.spec.run_policy.suspend:
        return Decision(Phase.SUSPENDED, StatusReason.SUSPENDED, IS_SUSPENDED, actions)
    message = f"waiting until JobSet's controller makes the Job of JobSet {name}; if that lasts, it does not run"
    return Decision(Phase.QUEUED, StatusReason.WAITING_FOR_POD, message, actions, requeue_seconds=RETRY_SECONDS)


def gpus_are_in_use(snapshot: Snapshot, run: ChildRun, *_: object) -> Decision | None:
    """The namespace's other jobs use its GPUs, or come first: the trainer's Job is not created yet."""
    waiting = find_gpu_wait(snapshot, run) if run.job is None else None
    if waiting is None:
        return None
    timers = (
        seconds_until_next_gpu_look(snapshot, run),
        seconds_until_startup_deadline(snapshot, run, waiting),
    )
    seconds = min((left for left in timers if left is not None), default=None)
    return Decision(Phase.QUEUED, waiting.reason, waiting.message, requeue_seconds=seconds)


def trainer_job_is_missing(snapshot: Snapshot, run: ChildRun, installation: Installation) -> Decision | None:
    """The trainer's Job is to be created. A suspended job gets a suspended Job, unless a queue would start it."""
    if run.job is not None:
        return None
    if snapshot.spec.run_policy.suspend and snapshot.spec.scheduling.queue_name is not None:
        return Decision(Phase.SUSPENDED, StatusReason.SUSPENDED, IS_SUSPENDED)

    active_seconds = snapshot.status.active_seconds or 0
    spec = installation.pods.apply(snapshot.spec)
    config_map = wanted_config_map(snapshot, installation)
    name = config_map["metadata"]["name"]
    values = (snapshot.metadata, spec, installation.trainer_image, name, active_seconds)
    missing = config_map if snapshot.config_map is None else None
    actions = replace(missing_peers(snapshot), create_config_map=missing)
    if is_in_job_set(spec):
        # Its Job shows who holds GPUs, and its controller makes that later. So it is made first, and then resumed.
        job_set = build_job_set(*values, waits=installation.max_gpus_per_namespace is not None)
        actions = replace(actions, create_job_set=job_set)
    else:
        actions = replace(actions, create_trainer_job=build_trainer_job(*values))
    if snapshot.spec.run_policy.suspend:
        return Decision(Phase.SUSPENDED, StatusReason.SUSPENDED, IS_SUSPENDED, actions)
    return Decision(Phase.QUEUED, StatusReason.JOB_CREATED, "waiting for the trainer's pod", actions)
