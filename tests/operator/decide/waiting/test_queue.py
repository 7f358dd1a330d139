"""A run in a queue of Kueue: what it waits for, its suspension, its clock, and how it leaves the queue."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from finetune_api.failures import ExitCode
from finetune_api.spec.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_api.vocabulary import QUEUE_LABEL, ConditionType, Phase
from finetune_operator.decide.decide import decide
from finetune_operator.decide.decision import Decision
from finetune_operator.desired.names import ACTIVE_SECONDS_ANNOTATION, ACTIVE_SINCE_ANNOTATION
from finetune_operator.observe.children import ChildJob, TrueCondition
from finetune_operator.observe.snapshot import Snapshot
from finetune_operator.observe.workload import DEACTIVATED_ANNOTATION, QueueView, Workload
from finetune_test_operator.snapshot_builder import (
    INSTALLATION,
    NOW,
    a_condition,
    a_pod,
    a_preflight_job,
    a_preflight_snapshot,
    a_running_pod,
    a_snapshot,
    a_spec,
    a_trainer_job,
    a_workload,
    an_ended_pod,
    at,
    decision_about,
)

QUEUE = {"scheduling": {"queueName": "research"}}
PAUSED: dict[str, Any] = QUEUE | {"runPolicy": {"suspend": True}}
CHECKED = QUEUE | {"runPolicy": {"preflight": "Skip"}}
NO_QUOTA = ("QuotaReserved", "False", "Pending", "insufficient unused quota for nvidia.com/gpu, 1 more needed")
PREEMPTED = ("Evicted", "True", "Preempted", "Preempted to accommodate a workload")


def held(workload: Workload | None = None, spec: FineTuneJobSpec | None = None, **fields: Any) -> Snapshot:
    """A job whose Job its queue holds; keyword arguments are fields of the queue's view."""
    spec = spec or a_spec(**QUEUE)
    return a_snapshot(spec, job=a_job(spec), queue=QueueView("research", workload=workload, **fields))


def a_job(spec: FineTuneJobSpec | None = None, **changes: Any) -> ChildJob:
    """The Job of a job in a queue, as it is created: suspended."""
    return a_trainer_job(spec or a_spec(**QUEUE), **changes)


EXPLAINED: dict[str, tuple[Snapshot, str, str]] = {
    "no quota": (
        held(a_workload(NO_QUOTA), position=3),
        "WaitingInQueue",
        "waits in queue research at position 3: Pending: insufficient unused quota for nvidia.com/gpu, 1 more needed",
    ),
    "no Workload yet": (held(), "WaitingInQueue", "has made no Workload of it yet"),
    "no rights": (held(is_visible=False), "WaitingInQueue", "if the chart's value kueue.enabled is true"),
    "no queue": (held(problem="namespace team has no LocalQueue research"), "QueueNotFound", "no LocalQueue research"),
    "admission checks": (
        held(
            a_workload(
                ("QuotaReserved", "True", "QuotaReserved", ""),
                admissionChecks=[{"name": "capacity", "state": "Pending", "message": "no nodes"}, {"state": "Ready"}],
            )
        ),
        "WaitingInQueue",
        "admission checks are awaited: capacity is Pending (no nodes)",
    ),
    "an eviction": (
        held(a_workload(NO_QUOTA, PREEMPTED)),
        "EvictedByQueue",
        "Kueue evicted the job (Preempted: Preempted to accommodate a workload); it goes on from its newest checkpoint",
    ),
    "a pause before the next try": (
        held(
            a_workload(
                ("Evicted", "True", "PodsReadyTimeout", "not ready"),
                ("Requeued", "False", "PodsReadyTimeout", "too slow"),
                requeueState={"requeueAt": at(60)},
            )
        ),
        "EvictedByQueue",
        f"not put back into the line until {at(60)} (PodsReadyTimeout: too slow)",
    ),
    "somebody else's deactivation": (
        held(a_workload(("Evicted", "True", "Deactivated", "The workload is deactivated"), active=False)),
        "QueueDeactivated",
        '`kubectl -n team patch workload job-bot --type merge -p \'{"spec": {"active": true}}\'`',
    ),
    "a finished Workload": (
        held(a_workload(("Finished", "True", "OutOfSync", "not in sync"))),
        "QueueDeactivated",
        "has finished Workload job-bot (OutOfSync: not in sync)",
    ),
}


@pytest.mark.parametrize(("snapshot", "reason", "words"), EXPLAINED.values(), ids=EXPLAINED)
def test_what_a_job_waits_for_is_said_in_the_words_of_its_queue(snapshot: Snapshot, reason: str, words: str) -> None:
    decision = decision_about(snapshot)
    assert (decision.phase, decision.reason) == (Phase.QUEUED, reason)
    assert words in decision.message
    assert decision.is_stalled == (reason in ("QueueNotFound", "QueueDeactivated"))
    assert decision.actions.patch_trainer_job is None
    assert decision.actions.patch_workload is None


def test_a_position_that_is_not_known_is_not_mentioned() -> None:
    assert "position" not in decision_about(held(a_workload(NO_QUOTA))).message


def test_an_admitted_job_whose_pods_are_late_says_that_kueue_will_evict_it() -> None:
    late = QueueView("research", workload=a_workload(("PodsReady", "False", "WaitForStart", "not all pods are ready")))
    running = a_job(suspended=False, started=NOW)
    decision = decision_about(a_snapshot(a_spec(**QUEUE), job=running, pods=(a_pod(),), queue=late))
    assert decision.reason == "PodStarting"
    assert "(Kueue: PodsReady is False, WaitForStart: not all pods are ready)" in decision.message


def test_a_missing_queue_is_said_before_anything_is_created() -> None:
    missing = QueueView("research", problem="namespace team has no LocalQueue research: create it")
    for spec, phase in ((a_spec(**QUEUE), Phase.PENDING), (a_spec(**CHECKED), Phase.QUEUED)):
        decision = decision_about(a_snapshot(spec, job=None, queue=missing))
        assert (decision.phase, decision.reason, decision.is_stalled) == (phase, "QueueNotFound", True)
        assert decision.message.startswith(
            "spec.scheduling.queueName is research, but namespace team has no LocalQueue"
        )
        assert decision.actions.create_preflight_job is None
        assert decision.actions.create_trainer_job is None
        assert decision.requeue_seconds == 30


def _suspending(workload: Workload | None, *pods: Any, suspended: bool, **fields: Any) -> Decision:
    spec = a_spec(**PAUSED)
    job = a_job(spec, suspended=suspended, started=None if suspended else NOW)
    view = QueueView("research", workload=workload, **fields)
    return decision_about(a_snapshot(spec, job=job, pods=pods, queue=view))


def test_a_running_job_is_suspended_by_its_workload() -> None:
    decision = _suspending(a_workload(), a_running_pod(), suspended=False)
    assert decision.reason == "Suspending"
    assert decision.actions.patch_workload is not None
    assert decision.actions.patch_workload.changes["spec"] == {"active": False}
    assert DEACTIVATED_ANNOTATION in decision.actions.patch_workload.changes["metadata"]["annotations"]
    assert "spec" not in (decision.actions.patch_trainer_job or {})


SUSPENSIONS: dict[str, tuple[Decision, Phase | None, str]] = {
    "its pod still ends": (_suspending(a_workload(active=False), a_running_pod(), suspended=True), None, "Suspending"),
    "it has ended": (_suspending(a_workload(active=False), suspended=True), Phase.SUSPENDED, "Suspended"),
    "its Workload is not there yet": (_suspending(None, suspended=True), None, "Suspending"),
    "the queue is gone": (_suspending(None, suspended=True, problem="gone"), Phase.SUSPENDED, "Suspended"),
    "no rights, and it runs": (_suspending(None, suspended=False, is_visible=False), None, "QueueDecides"),
    "no rights, and it is held": (_suspending(None, suspended=True, is_visible=False), None, "QueueDecides"),
    "Kueue knows nothing of a running Job": (_suspending(None, suspended=False), None, "QueueDecides"),
}


@pytest.mark.parametrize(("decision", "phase", "reason"), SUSPENSIONS.values(), ids=SUSPENSIONS)
def test_suspended_is_only_what_its_queue_does_not_start(decision: Decision, phase: Phase | None, reason: str) -> None:
    assert decision.reason == reason
    assert (decision.phase is Phase.SUSPENDED) == (phase is Phase.SUSPENDED)
    assert decision.is_stalled == (reason == "QueueDecides")


def test_only_our_own_deactivation_is_taken_back() -> None:
    ours = decision_about(held(a_workload(active=False, ours=True))).actions.patch_workload
    assert ours is not None
    assert ours.changes == {"spec": {"active": True}, "metadata": {"annotations": {DEACTIVATED_ANNOTATION: None}}}
    assert decision_about(held(a_workload(active=False))).actions.patch_workload is None


def test_a_job_that_is_suspended_from_the_start_gets_no_job_that_a_queue_could_start() -> None:
    spec = a_spec(scheduling={"queueName": "research"}, runPolicy={"suspend": True, "preflight": "Skip"})
    decision = decision_about(a_snapshot(spec, job=None, queue=QueueView("research")))
    assert decision.phase is Phase.SUSPENDED
    assert decision.actions.create_trainer_job is None


def test_the_time_of_running_survives_an_eviction() -> None:
    spec = a_spec(scheduling={"queueName": "research"}, runPolicy={"activeDeadlineSeconds": 1000})
    running = a_job(spec, suspended=False, started=NOW, active_seconds=100, deadline=900)
    noted = decision_about(a_snapshot(spec, job=running, pods=(a_running_pod(),))).actions.patch_trainer_job
    assert noted == {"metadata": {"annotations": {ACTIVE_SINCE_ANNOTATION: NOW.isoformat()}}}

    known = replace(running, noted_start=NOW)
    assert decision_about(a_snapshot(spec, job=known, pods=(a_running_pod(),))).actions.patch_trainer_job is None

    evicted = replace(
        known, suspended=True, started=None, suspension=TrueCondition("JobSuspended", "", NOW + timedelta(seconds=50))
    )
    later = a_snapshot(spec, job=evicted, queue=QueueView("research"), now=NOW + timedelta(hours=9))
    annotations = {ACTIVE_SECONDS_ANNOTATION: "150", ACTIVE_SINCE_ANNOTATION: None}
    assert decision_about(later).actions.patch_trainer_job == {
        "metadata": {"annotations": annotations},
        "spec": {"activeDeadlineSeconds": 850},
    }
    counted = replace(evicted, active_seconds=150, noted_start=None, deadline=850)
    assert (
        decision_about(replace(later, training=replace(later.training, job=counted))).actions.patch_trainer_job is None
    )
    assert counted.active_seconds_at(later.now) == 150


def test_the_notes_of_a_job_are_read_from_it() -> None:
    body = a_job().body
    conditions = [{"type": "Suspended", "status": "True", "lastTransitionTime": at(50)}]
    for note, seconds in ((at(0), 50), ("yesterday", 0), ("2026-11-24T12:00:00", 0)):
        annotations = {ACTIVE_SINCE_ANNOTATION: note}
        metadata = body["metadata"] | {"annotations": annotations}
        job = ChildJob.parse(body | {"metadata": metadata, "status": {"conditions": conditions}})
        assert job.active_seconds_at(NOW + timedelta(hours=1)) == seconds


def test_an_evicted_trainer_is_no_failure_and_keeps_its_checkpoint() -> None:
    pod = an_ended_pod(ExitCode.INTERRUPTED)
    snapshot = held(a_workload(NO_QUOTA, PREEMPTED))
    decision = decision_about(replace(snapshot, training=replace(snapshot.training, pods=(pod,))))
    assert (decision.phase, decision.reason, decision.failure) == (Phase.QUEUED, "EvictedByQueue", None)


def test_a_trainer_that_its_queue_stops_says_so_until_it_has_ended() -> None:
    snapshot = held(a_workload(PREEMPTED))
    decision = decision_about(replace(snapshot, training=replace(snapshot.training, pods=(a_running_pod(),))))
    assert (decision.phase, decision.reason) == (Phase.RUNNING, "EvictedByQueue")
    assert "writing its checkpoint before it stops" in decision.message


@pytest.mark.parametrize("phase", [Phase.FAILED, Phase.SUCCEEDED])
def test_a_job_that_is_over_leaves_the_line_and_cannot_start_again(phase: Phase) -> None:
    snapshot = replace(held(a_workload()), status=FineTuneJobStatus(phase=phase))
    actions = decision_about(snapshot).actions
    assert actions.patch_workload is not None
    assert actions.patch_workload.changes["spec"] == {"active": False}
    assert actions.patch_trainer_job == {"spec": {"activeDeadlineSeconds": 1}}

    done = replace(held(a_workload(active=False)), status=FineTuneJobStatus(phase=phase))
    assert decision_about(done).actions.patch_workload is None
    assert decision_about(replace(done, training=replace(done.training, job=None))).actions.patch_workload is None


LOOKS: dict[str, tuple[Snapshot, float, float | None]] = {
    "a Workload that was not made yet": (held(), 0, 2),
    "the same, later": (held(), 3600, 30),
    "near the front": (held(a_workload(NO_QUOTA), position=10), 3600, 60),
    "far behind": (held(a_workload(NO_QUOTA), position=11), 3600, 300),
    "no place known": (held(a_workload(NO_QUOTA)), 3600, 300),
    "soon after the start": (held(a_workload(NO_QUOTA), position=500), 20, 10),
    "no queue": (held(problem="gone"), 3600, 30),
    "no rights": (held(is_visible=False), 3600, None),
}


@pytest.mark.parametrize(("snapshot", "waited", "seconds"), LOOKS.values(), ids=LOOKS)
def test_how_often_a_job_in_a_queue_is_looked_at(snapshot: Snapshot, waited: float, seconds: float | None) -> None:
    status = FineTuneJobStatus(phase=Phase.QUEUED, conditions=(a_condition(ConditionType.QUEUED, -waited),))
    assert decision_about(replace(snapshot, status=status)).requeue_seconds == seconds


def test_a_job_without_a_queue_that_kueue_holds_is_not_fought_for() -> None:
    ours = a_trainer_job(suspended=True, started=None)
    assert decision_about(a_snapshot(job=ours)).actions.patch_trainer_job == {"spec": {"suspend": False}}

    decision = decision_about(a_snapshot(job=replace(ours, is_held_by_kueue=True)))
    assert (decision.reason, decision.is_stalled) == ("QueueRequired", True)
    assert decision.actions.patch_trainer_job is None

    checks = a_preflight_job(suspended=True, started=None, is_held_by_kueue=True)
    assert "kueue.queuePreflight is true" in decision_about(a_preflight_snapshot(job=checks)).message


def test_who_suspended_a_job_is_read_from_its_managed_fields() -> None:
    body = a_trainer_job(a_spec(runPolicy={"suspend": True})).body
    for manager, is_held in (("kueue", True), ("finetune-operator", False)):
        entry = {"manager": manager, "fieldsV1": {"f:spec": {"f:suspend": {}}}}
        metadata = body["metadata"] | {"managedFields": [{"manager": "x", "fieldsV1": {}}, entry]}
        assert ChildJob.parse(body | {"metadata": metadata}).is_held_by_kueue is is_held


@pytest.mark.parametrize("queued", [False, True])
def test_the_checks_wait_in_the_queue_only_where_the_installation_says_so(queued: bool) -> None:
    spec = a_spec(scheduling={"queueName": "research", "schedulerName": "volcano"})
    installation = replace(INSTALLATION, queue_preflight=queued)
    job = decide(a_snapshot(spec, job=None, queue=QueueView("research")), installation).actions.create_preflight_job
    assert job is not None
    assert (QUEUE_LABEL in job["metadata"]["labels"]) is queued
    assert job["spec"]["suspend"] is queued
    assert ("schedulerName" in job["spec"]["template"]["spec"]) is queued
