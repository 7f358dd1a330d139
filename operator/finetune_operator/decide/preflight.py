"""Rules about preflight: from "no Job yet" to "the trainer's Job may be created" (pure).

Nothing is created in the step that first sees preflight passed. The result is written to the status before, so that the
checks never start again, whoever deletes what, and whenever the operator dies.
"""

from finetune_api.failures import FailureReason
from finetune_api.outcome import Result
from finetune_api.spec.scheduling import SchedulingSpec
from finetune_api.vocabulary import Phase, PreflightResult, Stage
from finetune_operator.decide.decision import Actions, Decision
from finetune_operator.decide.explain_failure import explain_failure, has_failed
from finetune_operator.decide.open_run import IS_SUSPENDED
from finetune_operator.decide.shared import wanted_config_map
from finetune_operator.decide.training import REUSED
from finetune_operator.desired.installation import Installation
from finetune_operator.desired.preflight_job import MEMORY, build_preflight_job
from finetune_operator.observe.snapshot import ChildRun, Snapshot
from finetune_operator.status_reasons import StatusReason

NO_QUEUE = SchedulingSpec()
MEMORY_HINT = "Shorten the longest rows, or set spec.runPolicy.preflight: Skip."
_OUTCOME_LOST = "the checks passed, but their pod was removed before its result could be read: see report.html in S3"


def checks_passed(snapshot: Snapshot, run: ChildRun, *_: object) -> Decision | None:
    """The newest pod says that it passed, or the Job is complete and its pod is gone."""
    outcome = run.outcome if run.has_exited_with_0 else None
    passed = outcome is not None and outcome.result is Result.SUCCEEDED
    is_lost = run.job is not None and run.job.complete is not None and not run.has_exited_with_0
    if not passed and not is_lost:
        return None

    # Preflight also looks for a finished result of the same job, which makes training unnecessary.
    if outcome is not None and outcome.reused:
        return Decision(
            Phase.SUCCEEDED,
            StatusReason.REUSED,
            REUSED,
            preflight=PreflightResult.PASSED,
            outcome=outcome,
            requeue_seconds=0,
        )

    # The next look, which sees the result in the status, creates the trainer's Job.
    return Decision(
        Phase.SUSPENDED if snapshot.spec.run_policy.suspend else Phase.QUEUED,
        StatusReason.PREFLIGHT_PASSED,
        message=outcome.message if outcome is not None else _OUTCOME_LOST,
        preflight=PreflightResult.PASSED,
        requeue_seconds=0,
    )


def checks_failed(snapshot: Snapshot, run: ChildRun, *_: object) -> Decision | None:
    """The Job controller has given up, the Job is complete although its pod wrote no outcome, or memory ran out."""
    if not has_failed(run):
        return None

    failure = explain_failure(snapshot, run)

    # The memory limit of preflight is its own: raising spec.resources.memory would not help.
    changes: dict[str, object] = {"stage": Stage.PREFLIGHT, "step": None}
    if failure.reason == FailureReason.OUT_OF_MEMORY:
        changes |= {
            "message": f"the checks were killed when their memory reached its limit of {MEMORY}",
            "hint": MEMORY_HINT,
        }
    failure = failure.model_copy(update=changes)

    return Decision.fail(failure, preflight=PreflightResult.FAILED, requeue_seconds=0)


def checks_are_suspended(snapshot: Snapshot, run: ChildRun, *_: object) -> Decision | None:
    """The job is suspended before its checks began. Their Job is created when the job is resumed."""
    if run.job is not None or not snapshot.spec.run_policy.suspend:
        return None
    return Decision(Phase.SUSPENDED, StatusReason.SUSPENDED, IS_SUSPENDED)


def preflight_job_is_missing(snapshot: Snapshot, run: ChildRun, installation: Installation) -> Decision | None:
    """The Job of preflight is to be created."""
    if run.job is not None:
        return None

    active_seconds = snapshot.status.active_seconds or 0
    config_map = wanted_config_map(snapshot, installation)
    name = config_map["metadata"]["name"]
    spec = installation.pods.apply(snapshot.spec)
    if not installation.queue_preflight:
        spec = spec.model_copy(update={"scheduling": NO_QUEUE})
    job = build_preflight_job(snapshot.metadata, spec, installation.trainer_image, name, active_seconds)
    missing = config_map if snapshot.config_map is None else None
    actions = Actions(create_config_map=missing, create_preflight_job=job)
    message = "waiting for the pod that checks model, dataset and output"
    return Decision(Phase.VALIDATING, StatusReason.JOB_CREATED, message, actions)
