"""The rules, one by one: what is seen, and what is done about it."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from finetune_api.failures import ExitCode, FailureReason
from finetune_api.job import ObjectMeta
from finetune_api.outcome import Outcome, Result
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_api.vocabulary import Phase, Stage
from finetune_operator.decide.decide import TRAINING, UNREADABLE
from finetune_operator.decide.decision import Actions
from finetune_operator.desired.names import ACTIVE_SECONDS_ANNOTATION
from finetune_operator.observe.children import TrueCondition
from finetune_operator.observe.snapshot import Snapshot, UnreadableSnapshot, Waiting
from finetune_operator.status_reasons import StatusReason
from finetune_test_operator.snapshot_builder import (
    METADATA,
    NOW,
    a_pod,
    a_report,
    a_running_pod,
    a_snapshot,
    a_spec,
    a_trainer_job,
    an_ended_pod,
    an_unreadable_snapshot,
    at,
    deciding_rule,
    decision_about,
)

MAGIC = "spec.model.magic: unknown"
DONE = datetime(2026, 11, 24, 12, 1, tzinfo=UTC)
SUCCEEDED = Outcome(result=Result.SUCCEEDED, finished=DONE, manifest_uri="s3://results/manifest.json")
REUSED = SUCCEEDED.model_copy(update={"reused": True})
BAD_ROW = Outcome(
    result=Result.FAILED, reason=FailureReason.INVALID_ROW, message="line 2", exit_code=ExitCode.DATA, finished=DONE
)
STOPPED = Outcome(
    result=Result.INTERRUPTED, reason=FailureReason.INTERRUPTED, exit_code=ExitCode.INTERRUPTED, finished=DONE
)
COMPLETE = TrueCondition("CompletionsReached", "", NOW)
DELETED = METADATA.model_copy(update={"deletion_timestamp": at(0)})
SUSPENDED = {"runPolicy": {"suspend": True}}


def _failed(reason: str) -> TrueCondition:
    return TrueCondition(reason, "the Job controller says so", NOW)


def _status(phase: Phase) -> FineTuneJobStatus:
    return FineTuneJobStatus(phase=phase)


def _waiting(reason: str) -> tuple[object, ...]:
    return (a_pod(state={"waiting": {"reason": reason, "message": "m"}}),)


UNSCHEDULABLE = a_pod(conditions=[{"type": "PodScheduled", "status": "False", "message": "no GPU"}])
EVICTED = an_ended_pod(137, reason="Evicted")
DISRUPTED = an_ended_pod(137, conditions=[{"type": "DisruptionTarget", "status": "True"}])
UNCHECKED = a_spec(runPolicy={"preflight": "Skip"})
FLAKY = a_spec(runPolicy={"maxRetries": 1})

CASES: dict[str, tuple[Snapshot, Phase, str]] = {
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
        "TrainerCrashed",
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
        "InvalidRow",
    ),
    "a crash is tried again": (a_snapshot(pods=(an_ended_pod(139),)), Phase.QUEUED, "Retrying"),
    "the last crash is not called a retry": (
        a_snapshot(FLAKY, pods=(an_ended_pod(139, uid="1"), an_ended_pod(139, uid="2")), status=_status(Phase.RUNNING)),
        Phase.RUNNING,
        "TrainerCrashed",
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
    "another's Job has the name": (a_snapshot(job=a_trainer_job(owner="someone")), Phase.PENDING, "NameConflict"),
    "another's ConfigMap has the name": (
        a_snapshot(config_map={"metadata": {"name": "bot-x"}}),
        Phase.PENDING,
        "NameConflict",
    ),
    "the child Job is being deleted": (a_snapshot(job=a_trainer_job(deleting=True)), Phase.QUEUED, "JobDeleted"),
    "no Job exists yet, and preflight comes first": (a_snapshot(job=None), Phase.VALIDATING, "JobCreated"),
    "no Job exists yet, and preflight is skipped": (a_snapshot(UNCHECKED, job=None), Phase.QUEUED, "JobCreated"),
    "the ConfigMap of a running Job was deleted": (
        a_snapshot(pods=(a_running_pod(),), config_map=None),
        Phase.RUNNING,
        "TrainerStarted",
    ),
    "a pod of a deleted Job still runs": (
        a_snapshot(UNCHECKED, job=None, orphaned_pods=(a_running_pod("old"),)),
        Phase.QUEUED,
        "JobDeleted",
    ),
}


@pytest.mark.parametrize(("snapshot", "phase", "reason"), CASES.values(), ids=CASES)
def test_phase_and_reason(snapshot: Snapshot, phase: Phase, reason: str) -> None:
    decision = decision_about(snapshot)
    assert (decision.phase, decision.reason) == (phase, reason)


@pytest.mark.parametrize("name", CASES)
def test_every_reason_is_one_of_the_documented_ones(name: str) -> None:
    documented = {*StatusReason, *FailureReason, *Stage}
    assert decision_about(CASES[name][0]).reason in documented


NEED_A_PERSON = {"ImagePullFailed", "ContainerConfigError", "PodRejected", "NameConflict"}


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


@pytest.mark.parametrize("phase", [Phase.SUCCEEDED, Phase.FAILED])
def test_a_terminal_job_never_gets_children_again(phase: Phase) -> None:
    decision = decision_about(a_snapshot(job=None, config_map=None, status=_status(phase)))
    assert decision.actions == Actions()
    assert decision.phase is phase


def test_children_are_made_in_order_and_once() -> None:
    actions = decision_about(a_snapshot(UNCHECKED, job=None, config_map=None)).actions
    assert actions.create_config_map is not None
    assert actions.create_trainer_job is not None
    assert actions.create_trainer_job["metadata"]["name"] == actions.create_config_map["metadata"]["name"]
    with_map = decision_about(a_snapshot(UNCHECKED, job=None)).actions
    assert with_map.create_config_map is None
    assert with_map.create_trainer_job is not None


def test_a_job_created_suspended_has_a_suspended_job() -> None:
    spec = a_spec(runPolicy={"suspend": True, "preflight": "Skip"})
    decision = decision_about(a_snapshot(spec, job=None))
    assert decision.phase is Phase.SUSPENDED
    assert decision.actions.create_trainer_job is not None
    assert decision.actions.create_trainer_job["spec"]["suspend"] is True


def test_a_changed_authority_reaches_the_config_map() -> None:
    snapshot = a_snapshot()
    assert snapshot.config_map is not None
    old = snapshot.config_map | {"data": {"run_config.yaml": "old"}}
    owned = old | {"metadata": snapshot.config_map["metadata"]}
    assert decision_about(replace(snapshot, config_map=owned)).actions.update_config_map == {
        "data": snapshot.config_map["data"]
    }


def test_suspending_records_the_time_of_running_in_the_same_patch() -> None:
    snapshot = a_snapshot(a_spec(**SUSPENDED), job=a_trainer_job(active_seconds=100), now=NOW + timedelta(seconds=50))
    assert decision_about(snapshot).actions.patch_trainer_job == {
        "spec": {"suspend": True},
        "metadata": {"annotations": {ACTIVE_SECONDS_ANNOTATION: "150"}},
    }


def test_resuming_leaves_what_is_left_of_the_deadline() -> None:
    spec = a_spec(runPolicy={"activeDeadlineSeconds": 1000})
    child = a_trainer_job(suspended=True, started=None, active_seconds=400, deadline=1000)
    assert decision_about(a_snapshot(spec, job=child)).actions.patch_trainer_job == {
        "spec": {"suspend": False, "activeDeadlineSeconds": 600}
    }


DEADLINES: dict[str, tuple[int | None, int | None, object]] = {
    "unchanged": (1000, 1000, None),
    "longer": (1000, 2000, {"spec": {"activeDeadlineSeconds": 2000}}),
    "removed": (1000, None, {"spec": {"activeDeadlineSeconds": None}}),
    "added": (None, 60, {"spec": {"activeDeadlineSeconds": 60}}),
}


@pytest.mark.parametrize(("live", "wanted", "patch"), DEADLINES.values(), ids=DEADLINES)
def test_the_deadline_follows_the_spec(live: int | None, wanted: int | None, patch: object) -> None:
    spec = a_spec(runPolicy={"activeDeadlineSeconds": wanted} if wanted else {})
    snapshot = a_snapshot(spec, job=a_trainer_job(deadline=live))
    assert decision_about(snapshot).actions.patch_trainer_job == patch


def test_the_ttl_is_set_only_after_the_terminal_status_is_written() -> None:
    spec = a_spec(runPolicy={"ttlSecondsAfterFinished": 60})
    child = a_trainer_job(complete=COMPLETE)
    pods = (an_ended_pod(0, SUCCEEDED),)
    assert decision_about(a_snapshot(spec, job=child, pods=pods)).actions == Actions()
    after = a_snapshot(spec, job=child, status=_status(Phase.SUCCEEDED))
    assert decision_about(after).actions.patch_trainer_job == {"spec": {"ttlSecondsAfterFinished": 60}}
    done = a_snapshot(spec, job=replace(child, ttl=60), status=_status(Phase.SUCCEEDED))
    assert decision_about(done).actions == Actions()


UNREADABLE_CASES: dict[str, tuple[UnreadableSnapshot, Phase, str]] = {
    "it runs": (
        an_unreadable_snapshot(MAGIC, status=_status(Phase.RUNNING), pods=(a_running_pod(),)),
        Phase.RUNNING,
        "InvalidConfiguration",
    ),
    "it is new": (an_unreadable_snapshot(MAGIC, job=None), Phase.PENDING, "InvalidConfiguration"),
    "it is being deleted": (an_unreadable_snapshot(MAGIC, metadata=DELETED), Phase.CANCELLING, "Deleted"),
    "it is over": (
        an_unreadable_snapshot(MAGIC, status=_status(Phase.FAILED), job=a_trainer_job(complete=COMPLETE, ttl=60)),
        Phase.FAILED,
        "",
    ),
}


@pytest.mark.parametrize(("snapshot", "phase", "reason"), UNREADABLE_CASES.values(), ids=UNREADABLE_CASES)
def test_a_job_that_this_version_cannot_read_is_left_alone(
    snapshot: UnreadableSnapshot, phase: Phase, reason: str
) -> None:
    decision = decision_about(snapshot)
    assert (decision.phase, decision.reason) == (phase, reason)
    assert decision.is_stalled == (reason == "InvalidConfiguration")
    assert decision.actions == Actions()
    assert ("spec.model.magic" in decision.message) == decision.is_stalled


def test_every_rule_of_every_chain_decides_a_case() -> None:
    snapshots = [*(case[0] for case in CASES.values()), a_snapshot(status=_status(Phase.FAILED))]
    deciding = {deciding_rule(TRAINING, snapshot, snapshot.training) for snapshot in snapshots}
    assert deciding == {rule.__name__ for rule in (*TRAINING.rules, TRAINING.otherwise)}
    deciding = {deciding_rule(UNREADABLE, case[0], case[0].training) for case in UNREADABLE_CASES.values()}
    assert deciding == {rule.__name__ for rule in (*UNREADABLE.rules, UNREADABLE.otherwise)}


def test_a_failure_has_a_hint_and_the_trainers_own_words() -> None:
    failure = decision_about(CASES["bad data ends the job"][0]).failure
    assert failure is not None
    assert (failure.message, failure.exit_code) == ("line 2", ExitCode.DATA)
    assert failure.hint


def test_a_termination_message_that_is_no_outcome_is_not_shown() -> None:
    pod = an_ended_pod(1, terminated={"message": "secret rows of the dataset"})
    snapshot = a_snapshot(pods=(pod,), job=a_trainer_job(failed=_failed("BackoffLimitExceeded")))
    failure = decision_about(snapshot).failure
    assert failure is not None
    assert "secret" not in failure.message
    assert failure.reason == "TrainerCrashed"


def test_the_uid_decides_whose_job_it_is() -> None:
    again = ObjectMeta(name=METADATA.name, namespace=METADATA.namespace, uid="another", generation=1)
    spec: FineTuneJobSpec = a_spec()
    assert decision_about(a_snapshot(spec, metadata=again)).reason == "NameConflict"
