"""What a running Job takes over from the spec: suspension and deadline."""

from datetime import timedelta

import pytest

from finetune_api.vocabulary import QUEUE_LABEL, Phase
from finetune_operator.desired.names import ACTIVE_SECONDS_ANNOTATION
from finetune_operator.observe.children import ChildJob
from finetune_operator.status_reasons import StatusReason
from finetune_test_operator.snapshot_builder import (
    NOW,
    a_running_pod,
    a_snapshot,
    a_spec,
    a_trainer_job,
    decision_about,
)

SUSPENDED = {"runPolicy": {"suspend": True}}


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


def test_the_queue_of_a_job_is_read_from_its_label() -> None:
    body = a_trainer_job().body
    labels = body["metadata"]["labels"] | {QUEUE_LABEL: "research"}
    queued = ChildJob.parse(body | {"metadata": body["metadata"] | {"labels": labels}})
    assert (queued.queue, a_trainer_job().queue) == ("research", None)


@pytest.mark.parametrize("suspended", [True, False])
@pytest.mark.parametrize("paused", [True, False])
def test_suspend_of_a_queued_job_is_never_written(suspended: bool, paused: bool) -> None:
    spec = a_spec(runPolicy={"suspend": paused, "activeDeadlineSeconds": 1000})
    started = None if suspended else NOW
    child = a_trainer_job(queue="research", suspended=suspended, started=started, deadline=600)

    # The deadline still follows the spec.
    patch = decision_about(a_snapshot(spec, job=child)).actions.patch_trainer_job
    assert patch is not None
    assert patch["spec"] == {"activeDeadlineSeconds": 1000}


def test_a_job_that_its_queue_holds_says_so_and_does_not_use_up_its_startup_deadline() -> None:
    spec = a_spec(runPolicy={"startupDeadlineSeconds": 10})
    child = a_trainer_job(queue="research", suspended=True, started=None)
    decision = decision_about(a_snapshot(spec, job=child, now=NOW + timedelta(days=1)))
    assert (decision.phase, decision.reason) == (Phase.QUEUED, StatusReason.WAITING_IN_QUEUE)
    assert "waits in queue research" in decision.message
    assert "kueue.x-k8s.io/job-uid=child-uid" in decision.message


def test_pausing_a_queued_job_names_the_workload_to_deactivate() -> None:
    child = a_trainer_job(queue="research")
    decision = decision_about(a_snapshot(a_spec(**SUSPENDED), job=child, pods=(a_running_pod(),)))
    assert (decision.reason, decision.is_stalled) == (StatusReason.QUEUE_DECIDES, True)
    assert "set spec.active to false" in decision.message

    held = a_trainer_job(queue="research", suspended=True, started=None)
    assert "may start it at any time" in decision_about(a_snapshot(a_spec(**SUSPENDED), job=held)).message
