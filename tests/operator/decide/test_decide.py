"""The rules, one by one: what is seen, and what is done about it."""

from datetime import UTC, datetime, timedelta

import pytest

from finetune_api.failures import FAILURES, Consequence, ExitCode, FailureReason
from finetune_api.outcome import Outcome, Result
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_api.vocabulary import ConditionType, Phase, Stage
from finetune_operator.decide.decide import TRAINING
from finetune_operator.decide.decision import Actions
from finetune_operator.desired.names import child_name
from finetune_operator.observe.children import TrueCondition
from finetune_operator.observe.report_store import Channel, Heard
from finetune_operator.observe.snapshot import GpuUse, GpuUser, Predecessor, Snapshot, Waiting
from finetune_operator.observe.workload import QueueView
from finetune_operator.status_reasons import STATUS_REASONS, StatusReason
from finetune_test_operator.snapshot_builder import (
    METADATA,
    NOW,
    a_condition,
    a_config_map,
    a_pod,
    a_report,
    a_running_pod,
    a_snapshot,
    a_spec,
    a_trainer_job,
    an_ended_pod,
    an_outlived_attempt,
    at,
    deciding_rule,
    decision_about,
    without_a_job_set,
)

MAGIC = "spec.model.magic: unknown"
DONE = datetime(2026, 11, 24, 12, 1, tzinfo=UTC)
SUCCEEDED = Outcome(result=Result.SUCCEEDED, finished=DONE, manifest_uri="s3://results/manifest.json")
REUSED = SUCCEEDED.model_copy(update={"reused": True})
BAD_ROW = Outcome(
    result=Result.FAILED, reason=FailureReason.INVALID_ROW, message="line 2", exit_code=ExitCode.DATA, finished=DONE
)
HALT = FailureReason.INTERRUPTED
STOPPED = Outcome(result=Result.INTERRUPTED, reason=HALT, exit_code=ExitCode.INTERRUPTED, finished=DONE)
COMPLETE = TrueCondition("CompletionsReached", "", NOW)
DELETED = METADATA.model_copy(update={"deletion_timestamp": at(0)})
SUSPENDED = {"runPolicy": {"suspend": True}}
OTHER_ACCOUNT, EIGHT_GPUS = a_spec(pod={"serviceAccountName": "other"}), a_spec(resources={"gpus": 8})


def _failed(reason: str) -> TrueCondition:
    return TrueCondition(reason, "the Job controller says so", NOW)


def _status(phase: Phase) -> FineTuneJobStatus:
    return FineTuneJobStatus(phase=phase)


def _waiting(reason: str) -> tuple[object, ...]:
    return (a_pod(state={"waiting": {"reason": reason, "message": "m"}}),)


QUEUED = FineTuneJobStatus(phase=Phase.QUEUED, conditions=(a_condition(ConditionType.QUEUED),))
LATER = NOW + timedelta(seconds=60)
UNSCHEDULABLE = a_pod(conditions=[{"type": "PodScheduled", "status": "False", "message": "no GPU"}])
EVICTED = an_ended_pod(137, reason="Evicted")
DISRUPTED = an_ended_pod(137, conditions=[{"type": "DisruptionTarget", "status": "True"}])
UNCHECKED = a_spec(runPolicy={"preflight": "Skip"})
FLAKY, BUDGET = (a_spec(runPolicy={name: 1}) for name in ("maxRetries", "maxGpuSeconds"))


def _with_endpoint(url: str) -> FineTuneJobSpec:
    return a_spec(output={"s3": {"bucket": "results", "endpointURL": url}})


AN_OLD_CONFIG_MAP = {
    "metadata": {"name": child_name(METADATA), "ownerReferences": [{"controller": True, "uid": METADATA.uid}]},
    "data": {"run_config.yaml": "a: 1"},
}

CASES: dict[str, tuple[Snapshot, Phase, str]] = {
    "its Job has no time": (a_snapshot(BUDGET, pods=(a_running_pod(),), now=LATER), Phase.RUNNING, "GpuBudgetSpent"),
    "a pod is awaited": (a_snapshot(), Phase.QUEUED, "WaitingForPod"),
    "a pod starts": (a_snapshot(pods=(a_pod(),)), Phase.QUEUED, "PodStarting"),
    "no node fits": (a_snapshot(pods=(UNSCHEDULABLE,)), Phase.QUEUED, "Unschedulable"),
    "the image cannot be pulled": (a_snapshot(pods=_waiting("ErrImagePull")), Phase.QUEUED, "ImagePullFailed"),
    "a Secret is missing": (
        a_snapshot(pods=_waiting("CreateContainerConfigError")),
        Phase.QUEUED,
        "ContainerConfigError",
    ),
    "a quota refuses the pod": (
        a_snapshot(blocker=Waiting("PodRejected", "quota", is_stalled=True)),
        Phase.QUEUED,
        "PodRejected",
    ),
    "a pod that may not wait any longer": (
        a_snapshot(a_spec(runPolicy={"startupDeadlineSeconds": 60}), pods=(UNSCHEDULABLE,), status=QUEUED, now=LATER),
        Phase.FAILED,
        "Unschedulable",
    ),
    "the trainer runs, silently": (a_snapshot(pods=(a_running_pod(),)), Phase.RUNNING, "TrainerStarted"),
    "the trainer trains": (a_snapshot(pods=(a_running_pod(),), report=a_report()), Phase.RUNNING, "Training"),
    "the trainer exports": (
        a_snapshot(pods=(a_running_pod(),), report=a_report(stage=Stage.SAVING)),
        Phase.EXPORTING,
        "Saving",
    ),
    "the trainer uploads": (
        a_snapshot(pods=(a_running_pod(),), report=a_report(stage=Stage.UPLOADING)),
        Phase.UPLOADING,
        "Uploading",
    ),
    "the trainer succeeded": (a_snapshot(pods=(an_ended_pod(0, SUCCEEDED),)), Phase.SUCCEEDED, "Completed"),
    "the result was there already": (a_snapshot(pods=(an_ended_pod(0, REUSED),)), Phase.SUCCEEDED, "Reused"),
    "the pod of a complete Job is gone": (
        a_snapshot(job=a_trainer_job(complete=COMPLETE)),
        Phase.SUCCEEDED,
        "OutcomeLost",
    ),
    "exit code 0 without an outcome waits for the Job's verdict": (
        a_snapshot(pods=(an_ended_pod(0),), status=_status(Phase.UPLOADING)),
        Phase.UPLOADING,
        "Ending",
    ),
    "exit code 0 without an outcome is no success": (
        a_snapshot(pods=(an_ended_pod(0),), job=a_trainer_job(complete=COMPLETE)),
        Phase.FAILED,
        "TrainerCrashed",
    ),
    "bad data ends the job": (
        a_snapshot(pods=(an_ended_pod(11, BAD_ROW),), job=a_trainer_job(failed=_failed("PodFailurePolicy"))),
        Phase.FAILED,
        "InvalidRow",
    ),
    "bad data, before the Job controller has said so, is not called queued": (
        a_snapshot(pods=(an_ended_pod(11, BAD_ROW),), status=_status(Phase.RUNNING)),
        Phase.RUNNING,
        "Ending",
    ),
    "a crash is tried again": (a_snapshot(pods=(an_ended_pod(139),)), Phase.QUEUED, "Retrying"),
    "the last crash is not called a retry": (
        a_snapshot(FLAKY, pods=(an_ended_pod(139, uid="1"), an_ended_pod(139, uid="2")), status=_status(Phase.RUNNING)),
        Phase.RUNNING,
        "Ending",
    ),
    "a crash after the last retry": (
        a_snapshot(pods=(an_ended_pod(139),), job=a_trainer_job(failed=_failed("BackoffLimitExceeded"))),
        Phase.FAILED,
        "TrainerCrashed",
    ),
    "the kernel killed the trainer for its memory": (
        a_snapshot(
            pods=(an_ended_pod(137, terminated={"reason": "OOMKilled"}),),
            job=a_trainer_job(failed=_failed("BackoffLimitExceeded")),
        ),
        Phase.FAILED,
        "OutOfMemory",
    ),
    "the kernel killed the trainer for its memory, before the Job controller has said anything": (
        a_snapshot(pods=(an_ended_pod(137, terminated={"reason": "OOMKilled"}),)),
        Phase.FAILED,
        "OutOfMemory",
    ),
    "a kill for another reason is tried again": (a_snapshot(pods=(an_ended_pod(137),)), Phase.QUEUED, "Retrying"),
    "the deadline has passed": (
        a_snapshot(pods=(an_ended_pod(30, STOPPED),), job=a_trainer_job(failed=_failed("DeadlineExceeded"))),
        Phase.FAILED,
        "DeadlineExceeded",
    ),
    "a failed Job without a pod": (
        a_snapshot(job=a_trainer_job(failed=_failed("BackoffLimitExceeded"))),
        Phase.FAILED,
        "TrainerCrashed",
    ),
    "an evicted pod is replaced": (a_snapshot(pods=(EVICTED,)), Phase.QUEUED, "WaitingForPod"),
    "a preempted pod is replaced": (a_snapshot(pods=(DISRUPTED,)), Phase.QUEUED, "WaitingForPod"),
    "a stopped pod is replaced": (a_snapshot(pods=(an_ended_pod(30, STOPPED),)), Phase.QUEUED, "WaitingForPod"),
    "suspension waits for the trainer's checkpoint": (
        a_snapshot(a_spec(**SUSPENDED), pods=(a_running_pod(),), status=_status(Phase.RUNNING)),
        Phase.RUNNING,
        "Suspending",
    ),
    "suspended": (a_snapshot(a_spec(**SUSPENDED)), Phase.SUSPENDED, "Suspended"),
    "a deleted job is being cancelled": (
        a_snapshot(metadata=DELETED, pods=(a_running_pod(),)),
        Phase.CANCELLING,
        "Deleted",
    ),
    "a namespace of the system": (
        a_snapshot(job=None, metadata=METADATA.model_copy(update={"namespace": "kube-system"})),
        Phase.PENDING,
        "NamespaceDenied",
    ),
    "an endpoint that gives out credentials": (
        a_snapshot(_with_endpoint("http://169.254.169.254"), job=None),
        Phase.FAILED,
        "EndpointNotAllowed",
    ),
    "a second pod has stalled": (
        a_snapshot(pods=(an_ended_pod(31, uid="old"), an_ended_pod(31, created=60))),
        Phase.FAILED,
        "TrainerCrashed",
    ),
    "a trainer has fallen silent": (
        a_snapshot(
            pods=(a_running_pod(),),
            report=a_report(),
            channel=Channel(NOW, Heard("pod-1", NOW)),
            now=NOW + timedelta(seconds=2000),
        ),
        Phase.RUNNING,
        "NotReporting",
    ),
    "another's Job has the name": (a_snapshot(job=a_trainer_job(owner="someone")), Phase.PENDING, "NameConflict"),
    "another's ConfigMap has the name": (
        a_snapshot(config_map={"metadata": {"name": "bot-x"}}),
        Phase.PENDING,
        "NameConflict",
    ),
    "the child Job is being deleted": (a_snapshot(job=a_trainer_job(deleting=True)), Phase.QUEUED, "JobDeleted"),
    "no Job exists yet, and preflight comes first": (a_snapshot(job=None), Phase.VALIDATING, "JobCreated"),
    "no Job exists yet, and preflight is skipped": (a_snapshot(UNCHECKED, job=None), Phase.QUEUED, "JobCreated"),
    "somebody put another ConfigMap in its place": (
        a_snapshot(config_map=a_config_map() | {"data": {"run_config.yaml": "endpoints: {}"}}),
        Phase.PENDING,
        "NameConflict",
    ),
    "a ConfigMap that can be changed took its place": (
        a_snapshot(config_map=a_config_map() | {"immutable": False}),
        Phase.PENDING,
        "NameConflict",
    ),
    "the ConfigMap that an older operator made": (
        a_snapshot(pods=(a_running_pod(),), config_map=AN_OLD_CONFIG_MAP),
        Phase.RUNNING,
        "TrainerStarted",
    ),
    "the ConfigMap of a running Job was deleted": (
        a_snapshot(pods=(a_running_pod(),), config_map=None),
        Phase.RUNNING,
        "TrainerStarted",
    ),
    "a deleted job of the same name still has a pod": (
        a_snapshot(UNCHECKED, job=None, predecessor=Predecessor("bot-0", "bot-0-x")),
        Phase.QUEUED,
        "PredecessorRunning",
    ),
    "a pod of a deleted Job still runs": (
        a_snapshot(UNCHECKED, job=None, orphaned_pods=(a_running_pod("old"),)),
        Phase.QUEUED,
        "JobDeleted",
    ),
}


@pytest.mark.parametrize(("snapshot", "phase", "reason"), CASES.values(), ids=CASES)
def test_phase_and_reason(snapshot: Snapshot, phase: Phase, reason: str) -> None:
    made = decision_about(snapshot)
    assert (made.phase, made.reason) == (phase, reason)
    assert not (phase.is_terminal and snapshot.current_run.job) or made.requeue_seconds == 0, "Jobs get their TTL"


@pytest.mark.parametrize("name", CASES)
def test_every_reason_is_one_of_the_documented_ones(name: str) -> None:
    documented = {*StatusReason, *FailureReason, *Stage}
    assert decision_about(CASES[name][0]).reason in documented


NEED_A_PERSON = {
    *(reason for reason, row in STATUS_REASONS.items() if row.is_stalled),
    *(reason for reason, row in FAILURES.items() if row.seen_by_operator is Consequence.WAITS),
}


@pytest.mark.parametrize("name", CASES)
def test_only_what_needs_a_person_is_stalled(name: str) -> None:
    decision = decision_about(CASES[name][0])
    assert decision.is_stalled == (decision.reason in NEED_A_PERSON or decision.phase is Phase.FAILED)


@pytest.mark.parametrize("name", [name for name in CASES if "suspen" not in name and "Job" not in name])
def test_a_job_with_its_children_in_order_has_nothing_written(name: str) -> None:
    snapshot = CASES[name][0]
    if snapshot.training.job is not None and snapshot.training.job.suspended:
        return
    assert decision_about(snapshot).actions == Actions()


def test_children_are_made_in_order_and_once() -> None:
    actions = decision_about(a_snapshot(UNCHECKED, job=None, config_map=None)).actions
    assert actions.create_config_map is not None
    assert actions.create_trainer_job is not None
    volumes = actions.create_trainer_job["spec"]["template"]["spec"]["volumes"]
    (config,) = (volume for volume in volumes if volume["name"] == "config")
    assert config["configMap"]["name"] == actions.create_config_map["metadata"]["name"]
    with_map = decision_about(a_snapshot(UNCHECKED, job=None)).actions
    assert with_map.create_config_map is None
    assert with_map.create_trainer_job is not None


def test_a_job_created_suspended_has_a_suspended_job() -> None:
    spec = a_spec(runPolicy={"suspend": True, "preflight": "Skip"})
    decision = decision_about(a_snapshot(spec, job=None))
    assert decision.phase is Phase.SUSPENDED
    assert decision.actions.create_trainer_job is not None
    assert decision.actions.create_trainer_job["spec"]["suspend"] is True


def test_every_rule_of_the_chain_decides_a_case() -> None:
    no_queue, in_use = QueueView("gpus", problem="gone"), GpuUse(4, (GpuUser("other", 4),))
    more = [a_snapshot(a_spec(resources={"nodes": 2})), a_snapshot(status=_status(Phase.FAILED))]
    more += [a_snapshot(job=None, queue=no_queue), a_snapshot(UNCHECKED, job=None, gpu_use=in_use)]
    more += [a_snapshot(each, job=None) for each in (OTHER_ACCOUNT, EIGHT_GPUS)]
    more += [an_outlived_attempt(), *without_a_job_set()]
    deciding = {deciding_rule(TRAINING, each, each.training) for each in (*(case[0] for case in CASES.values()), *more)}
    assert deciding == {rule.__name__ for rule in (*TRAINING.rules, TRAINING.otherwise)}
